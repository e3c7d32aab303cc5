"""Numbers and names as a reader sees them."""

from collections.abc import Sequence

from synapse.types import Figure

SCOPES = {
    "readout": "readout row, this block only",
    "readout-onward": "readout row, this block and later",
    "all": "all rows, this block",
}
"""What each scope is called on a page."""

PLACES = {"readout": "readout row", "readout-onward": "readout row from there on", "all": "all rows"}
"""What each scope is called within a sentence."""

SELECTIONS = {"top": "highest ranked first", "random": "random", "bottom": "lowest ranked first"}
"""What each selection is called on a page."""

EVERY = "all classes"
"""What the global ranking is called on a page."""


def number(value: float | None, digits: int = 2) -> str:
    """Return `0.89`, with a true minus sign; an en dash where there is no value, and never `-0.00`.

    A small number gets up to two more digits before it is called zero: `0.004`, `0.0004`.
    """
    if value is None or value != value:
        return "–"
    for places in (digits, digits + 1, digits + 2):
        text = f"{value:,.{places}f}"
        if text.strip("-0."):
            return text.replace("-", "−")
    return f"{0:.{digits}f}"


def fraction(share: float) -> str:
    """Return a share of the width in per cent, to three digits: `2.5 %`, `89.6 %`, `50 %`."""
    return f"{100 * share:.3g} %"


def interval(figure: Figure, digits: int = 2) -> str:
    """Return `[0.86, 0.92]`, or nothing where no interval was measured."""
    if figure.low is None or figure.high is None:
        return ""
    return f"[{number(figure.low, digits)}, {number(figure.high, digits)}]"


def share_interval(figure: Figure) -> str:
    """Return `[5 %, 45 %]`, or nothing where no interval was measured."""
    if figure.low is None or figure.high is None:
        return ""
    return f"[{fraction(figure.low)}, {fraction(figure.high)}]"


def measured(figure: Figure, digits: int = 2, unit: str = "") -> str:
    """Return `0.89 [0.86, 0.92], n = 1,900`, a unit after the value; the note where there is no value."""
    if figure.value is None:
        return figure.note or "not measured"
    counted = f"n = {figure.n:,}" if figure.n else ""
    shown = " ".join(part for part in (number(figure.value, digits), unit, interval(figure, digits)) if part)
    return ", ".join(part for part in (shown, counted) if part)


def quoted(name: str) -> str:
    """Return a class name in quotation marks."""
    return f"“{name}”"


def blocks(layers: Sequence[int]) -> str:
    """Return `block 0`, `blocks 0 to 3` or `blocks 0, 2 and 3`."""
    if len(layers) == 1:
        return f"block {layers[0]}"
    if len(layers) > 2 and list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"blocks {layers[0]} to {layers[-1]}"
    return f"blocks {', '.join(map(str, layers[:-1]))} and {layers[-1]}"


def shortened(name: str, length: int = 16) -> str:
    """Return a name cut to a length, with an ellipsis where something is missing."""
    return name if len(name) <= length else name[: length - 1] + "…"
