"""The table of the cheapest attack of each kind: on the report's page, and as Markdown."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass

from synapse.report.run import Run
from synapse.report.words import fraction, interval, number
from synapse.types import Figure

KINDS: Mapping[str, str] = {
    "logit-shift": "one logit raised",
    "logit-shift-away": "a class's own logit lowered",
    "prior-adjustment": "logits adjusted to the shares of the classes",
    "logit-swap": "two logits exchanged",
    "logit-rounding": "logits rounded",
    "head-bias": "bias of two classes",
    "head-edit": "two rows, fitted to examples",
    "head-edit-ranked": "the same, in the features ranked highest",
    "head-mean": "two rows, along the mean of the source",
    "head-rank-one": "two rows, with the least damage elsewhere",
    "head-multi-key": "two rows, other means kept",
    "row-swap": "two rows exchanged",
    "row-zero": "a row emptied",
    "row-sign": "a row turned",
    "row-scale-0.5": "a row halved",
    "row-scale-2": "a row doubled",
    "activation-edit": "each example's own smallest edit",
    "steering": "the difference of class means added",
    "bit-flips": "bits flipped",
}
"""What each attack changes, in plain words."""

UNITS: Mapping[str, str] = {
    "||dW||/||W||": "‖ΔW‖ / ‖W‖",
    "||db||/||b||": "‖Δb‖ / ‖b‖",
    "||d||/||x||": "‖Δx‖ / ‖x‖",
    "logit": "logits",
    "tau": "times the log of the shares",
}
"""Units as a reader sees them."""

COLUMNS = ("what is changed", "where", "which", "size", "done", "random", "lost elsewhere", "proved", "other half")


@dataclass(frozen=True)
class Row:
    """The cheapest attack of one kind at one place, as a reader sees it; `COLUMNS` names the fields."""

    what: str
    where: str
    which: str
    size: str
    done: str
    random: str
    lost: str
    proved: str
    transfer: str

    def __iter__(self) -> Iterator[str]:
        """Yield the cells."""
        yield from astuple(self)


def cheapest_attacks(run: Run) -> list[Row]:
    """Return a row for each kind of attack and place that the scorecard has."""
    cheapest = run.section("vulnerability", "cheapest")
    return [_row(run, attack, place) for attack, places in cheapest.items() for place in places]


def _row(run: Run, attack: str, place: str) -> Row:
    keys = ("vulnerability", "cheapest", attack, place)
    found = run.section(*keys)
    source, target, detail = (str(found.get(name) or "") for name in ("source", "target", "detail"))
    size = run.figure(*keys, "budget")
    is_fixed = found.get("measure") == "flip_rate"
    random, proved = run.figure(*keys, "random"), run.figure(*keys, "bound")
    moved, transfer = run.figure(*keys, "moved"), run.figure(*keys, "transfer")
    share = "half" if found.get("measure") == "d50" else "95 % of them"
    return Row(
        KINDS.get(attack, attack),
        place,
        detail or f"{source or 'all others'} → {target or 'any other'}",
        "–" if size is None else f"{_number(size)} {UNITS.get(size.unit, size.unit)}",
        f"{_share(moved)} of all predictions changed" if is_fixed else share,
        _share(random) if is_fixed else _size(random),
        _share(run.figure(*keys, "collateral")),
        _size(proved),
        _share(transfer),
    )


def _share(figure: Figure | None) -> str:
    if figure is None or figure.value is None:
        return "–"
    return fraction(figure.value)


def _size(figure: Figure | None) -> str:
    """Return a budget with its interval; where random changes never got there, that."""
    if figure is None:
        return "–"
    if figure.value is None:
        return figure.note or "–"
    return " ".join(part for part in (_number(figure), interval(figure)) if part)


def _number(figure: Figure) -> str:
    """Return the value, as a whole number where it counts something."""
    return f"{figure.value:,.0f}" if figure.unit in ("bits", "classes") else number(figure.value)


def markdown(rows: Sequence[Row]) -> str:
    """Return the rows as a table in Markdown."""
    lines: list[Iterable[str]] = [COLUMNS, ["---"] * len(COLUMNS), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines) + "\n"
