"""The tables of the cheapest attack of each kind and of what to protect: on the report's page, and as Markdown."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass

import pandas as pd

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
    "logit-permutation": "each class named as the next",
    "pruning-smallest": "smallest weights set to zero",
    "pruning-largest": "largest weights set to zero",
    "sign-bits": "random signs of weights flipped",
    "exponent-bits": "random exponent bits flipped",
    "adversarial-weights": "all weights, along the gradient of the loss",
    "activation-edit-ranked": "the same, in the neurons ranked highest",
    "universal": "the mean of other examples' smallest edits added",
}
"""What each attack changes, in plain words."""

UNITS: Mapping[str, str] = {
    "||dW||/||W||": "‖ΔW‖ / ‖W‖",
    "||db||/||b||": "‖Δb‖ / ‖b‖",
    "||d||/||x||": "‖Δx‖ / ‖x‖",
    "logit": "logits",
    "tau": "times the log of the shares",
    "bits per million weights": "flips per million weights",
}
"""Units as a reader sees them."""

COUNTED: Mapping[str, str] = {"bits": "bit", "classes": "class"}
"""Units of which there are whole numbers, and what one of them is called."""

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
        detail or f"{source or ('all others' if target else 'all')} → {target or 'any other'}",
        "–" if size is None else _amount(size.value, size.unit),
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
    return " ".join(part for part in (_number(figure.value, figure.unit), interval(figure)) if part)


def _number(value: float | None, unit: str) -> str:
    """Return the value, as a whole number where it counts something."""
    return f"{value:,.0f}" if unit in COUNTED else number(value)


def _amount(value: float | None, unit: str) -> str:
    """Return a number with its unit: `0.36 ‖ΔW‖ / ‖W‖`, `88 bits`, `1 bit`."""
    name = COUNTED[unit] if unit in COUNTED and value == 1 else UNITS.get(unit, unit)
    return f"{_number(value, unit)} {name}"


PROTECTED: Mapping[str, str] = {
    "features": "features that the final map reads",
    "rows": "rows of the final map",
    "bits": "bits of each of its weights",
    "weights": "its weights",
}
"""What each protection protects, in plain words."""

CHOSEN: Mapping[str, str] = {
    "energy": "largest on average",
    "ranking": "ranked highest",
    "dearest": "the best to protect",
    "highest": "the highest",
    "used first": "used by the search",
}
"""How what is protected was chosen, in plain words."""

PROTECTION_COLUMNS = (
    *("what is protected", "where", "which", "how many", "cheapest before", "cheapest then"),
    *("factor", "which attack then", "at random"),
)


@dataclass(frozen=True)
class Protection:
    """What one protection makes of the cheapest attack, as a reader sees it; `PROTECTION_COLUMNS` names the fields."""

    what: str
    where: str
    which: str
    how_many: str
    before: str
    after: str
    factor: str
    attack: str
    random: str

    def __iter__(self) -> Iterator[str]:
        """Yield the cells."""
        yield from astuple(self)


def protections(defence: pd.DataFrame) -> list[Protection]:
    """Return the protections in the table `defence`, each beside as much protection at random.

    Of several that come to the same, the one that protects least stands for all.
    """
    found = []
    for _, rows in defence.groupby(["what", "location"], sort=False) if len(defence) else ():
        is_random = rows["draw"] >= 0
        chosen = rows[~is_random].drop_duplicates(["chosen", "factor"])
        found += [_protection(row, rows[is_random]) for _, row in chosen.iterrows()]
    return found


def _protection(row: pd.Series, drawn: pd.DataFrame) -> Protection:
    after = _amount(row["after"], row["unit"])
    if math.isinf(row["after"]):
        is_proved = math.isinf(row["searched"])
        after = "impossible" if is_proved else f"none found in {_amount(row['searched'], row['unit'])}"
    return Protection(
        PROTECTED.get(row["what"], row["what"]),
        row["location"],
        CHOSEN.get(row["chosen"], row["chosen"]),
        f"{row['protected']:,} of {row['of']:,}",
        _amount(row["before"], row["unit"]),
        after,
        _factor(row),
        f"{row['source']} → {row['target']}" if row["source"] else "–",
        _at_random(row, drawn),
    )


def _at_random(row: pd.Series, drawn: pd.DataFrame) -> str:
    """Return what as much protection at random does, or else how much it takes in a random order; with the extremes."""
    same = drawn[(drawn["chosen"] == "random") & (drawn["protected"] == row["protected"])].sort_values("factor")
    if len(same):
        return _spread([_factor(one) for _, one in same.iterrows()])
    needed = drawn[drawn["chosen"] == "random order"]["protected"].sort_values()
    return f"{_spread([f'{n:,}' for n in needed])} do as much" if len(needed) else "–"


def _spread(ordered: Sequence[str]) -> str:
    """Return the middle one, and the first and the last where they differ: `× 1.4 [× 1.3, × 1.6]`."""
    first, middle, last = ordered[0], ordered[(len(ordered) - 1) // 2], ordered[-1]
    return middle if first == last else f"{middle} [{first}, {last}]"


def _factor(row: pd.Series) -> str:
    """Return `× 12.0`, or that no attack was found; a dash where there is none to be found."""
    if math.isfinite(row["factor"]):
        return f"× {number(row['factor'], 1)}"
    return "none found" if math.isfinite(row["searched"]) else "–"


def markdown(rows: Sequence[Row] | Sequence[Protection], columns: Sequence[str] = COLUMNS) -> str:
    """Return the rows as a table in Markdown."""
    lines: list[Iterable[str]] = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines) + "\n"
