"""Numbers and names as a reader sees them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from synapse.types import Figure

COMPONENTS: Mapping[str, str] = {
    "residual": "the output of each block",
    "mlp": "the hidden units of each block's feed-forward network",
    "attention": "the output of each block's attention sublayer",
    "heads": "the attention heads of each block, side by side",
    "pooler": "the input of the final linear map",
}
"""What each component is, in plain words."""

READOUTS: Mapping[str, str] = {
    "first": "the first row ([CLS])",
    "last": "the last row that is no padding",
    "first-two": "the first two rows, alike",
    "mean": "the mean of all rows that are no padding",
    "mean-but-first": "the mean of all rows that are no padding, the first left out",
    "first-and-mean": "the first row, and the mean of all others that are no padding",
}
"""What the head reads, for each kind of readout."""

_WHICH: Mapping[str, str] = {
    "first": "[CLS]",
    "last": "the last that is no padding",
    "first-two": "the first two",
    "mean": "all that are no padding",
    "mean-but-first": "all that are no padding but the first",
    "first-and-mean": "the first, and all others that are no padding",
}
_EVERY_ROW = ("mean", "first-and-mean")
_INNER: Mapping[str, str] = {
    "mlp": "hidden feed-forward units",
    "attention": "attention output",
    "heads": "attention heads",
}

SELECTIONS = {"top": "highest ranked first", "random": "random", "bottom": "lowest ranked first"}
"""What each selection is called on a page."""

EVERY = "all classes"
"""What the global ranking is called on a page."""


@dataclass(frozen=True)
class Wording:
    """What the sites and rows of a run are called: its component, and the rows that the head reads.

    A readout that is not known, as in older run folders, is one row.
    """

    component: str = "residual"
    readout: str = ""

    @property
    def is_final(self) -> bool:
        """Whether the component is the input of the final linear map: one layer, and one row that matters."""
        return self.component == "pooler"

    @property
    def is_inner(self) -> bool:
        """Whether the component lies inside the blocks, so that a residual connection passes by it."""
        return self.component in _INNER

    @property
    def reads_every_row(self) -> bool:
        """Whether the head reads every row that is no padding."""
        return self.readout in _EVERY_ROW

    @property
    def reads_several_rows(self) -> bool:
        """Whether the head reads more than one row."""
        return self.readout in ("first-two", "mean-but-first", *_EVERY_ROW)

    @property
    def site(self) -> str:
        """`mlp: the hidden units of each block's feed-forward network`."""
        meaning = COMPONENTS.get(self.component)
        return f"{self.component}: {meaning}" if meaning else self.component

    @property
    def read(self) -> str:
        """`first: the first row ([CLS])`; empty where the readout is not known."""
        meaning = READOUTS.get(self.readout)
        return f"{self.readout}: {meaning}" if meaning else self.readout

    @property
    def which(self) -> str:
        """Which rows the head reads, ` ([CLS])`, to stand behind their name; empty where that is not known."""
        return f" ({_WHICH[self.readout]})" if self.readout in _WHICH else ""

    @property
    def rows(self) -> str:
        """What the rows are called that an edit of the scope `readout` acts on."""
        if self.reads_every_row:
            return "all rows"
        return "readout rows" if self.reads_several_rows else "readout row"

    @property
    def unit_of_depth(self) -> str:
        """What one layer is: `block`, or `layer` where there are no blocks."""
        return "layer" if self.is_final else "block"

    def layer(self, layer: int) -> str:
        """Return `block 3`; the final map has one layer, without a number."""
        return "input of the final map" if self.is_final else f"block {layer}"

    def scope(self, scope: str) -> str:
        """Return what a scope is called on a page: `readout row, this block only`."""
        if self.is_final:
            return COMPONENTS[self.component].removeprefix("the ")
        return {
            "readout": f"{self.rows}, this block only",
            "readout-onward": f"{self.rows}, this block and later",
            "all": "all rows, this block",
            "non-padding": "all rows that are no padding, this block",
        }[scope]

    def distinct(self, scopes: Iterable[str]) -> tuple[str, ...]:
        """Return the scopes without those that come to the same edit as an earlier one.

        The final map has one row that matters; where the head reads every row, the readout rows are all rows.
        """

        def edit(scope: str) -> str:
            if self.is_final:
                return ""
            return scope if not self.reads_every_row or scope == "readout-onward" else "all"

        first: dict[str, str] = {}
        for scope in scopes:
            first.setdefault(edit(scope), scope)
        return tuple(first.values())

    def lost(self, scope: str, layer: int | None = None) -> str:
        """Return what is lost in a scope, within a sentence: `the readout row at block 3`, `all rows`."""
        if self.is_final:
            return COMPONENTS[self.component]
        rows = {"all": "all rows", "non-padding": "all rows that are no padding"}.get(scope, self.rows)
        if not rows.startswith("all"):
            rows = f"the {rows}"
        where = ""
        if layer is not None:
            joint = "of" if self.is_inner else "at"
            where = f" from block {layer} on" if scope == "readout-onward" else f" {joint} block {layer}"
        if not self.is_inner:
            return rows + where
        return f"the {_INNER[self.component]} {'in' if rows.startswith('all') else 'at'} {rows}{where}"

    def place(self, scope: str, layer: int) -> str:
        """Return what `lost` returns without its article, to stand in brackets."""
        return self.lost(scope, layer).removeprefix("the ")

    def units_of(self, block: str) -> str:
        """Return the units of a layer: `hidden units of that block's feed-forward network`."""
        return {
            "mlp": f"hidden units of {block}'s feed-forward network",
            "attention": f"units of {block}'s attention output",
            "heads": f"units of {block}'s attention heads",
            "pooler": "units of the final map's input",
        }.get(self.component, f"units of {block}")

    @property
    def state(self) -> str:
        """What was recorded of each example, within a sentence: what probes are fitted to."""
        if self.is_final:
            return COMPONENTS[self.component]
        rows = self.rows if self.reads_every_row else f"the {self.rows}"
        if self.is_inner:
            what = f"the {_INNER[self.component]}"
            return f"{what}, averaged over {rows}" if self.reads_several_rows else f"{what} at {rows}"
        return f"the mean of {rows}" if self.reads_several_rows else rows

    @property
    def recorded(self) -> str:
        """What was recorded, as the beginning of a sentence."""
        if self.is_final:
            return "The input of its final linear map, which gives the logits, was recorded"
        if self.reads_every_row:
            rows = f"averaged over the token rows that the head reads{self.which}"
        elif self.reads_several_rows:
            rows = f"averaged over the readout rows, the token rows that the head reads{self.which}"
        else:
            rows = f"at the readout row, the token row that the head reads{self.which}"
        comma = "," if self.reads_several_rows else ""
        if self.is_inner:
            return f"The values of its {_INNER[self.component]}{comma} {rows}, were recorded in each block"
        return f"Its state{comma} {rows}, was recorded after each block"

    def size(self, n_layers: int, width: int, n_heads: int | None = None) -> str:
        """Return `6 blocks of 384 units`; for heads `6 blocks of 12 heads with 32 units each`."""
        layers = f"{n_layers} {self.unit_of_depth}{'s' if n_layers != 1 else ''}"
        if self.component == "heads" and n_heads:
            return f"{layers} of {n_heads} heads with {width // n_heads:,} units each"
        return f"{layers} of {width:,} {'hidden units' if self.component == 'mlp' else 'units'}"


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


def few(names: Sequence[str]) -> str:
    """Return a list of names, a long one by its ends: `a.0, a.1 … a.11 (12)`."""
    if len(set(names)) == 1 and len(names) > 1:
        return f"{names[0]} ({len(names)} calls)"
    return ", ".join(names) if len(names) <= 3 else f"{names[0]}, {names[1]} … {names[-1]} ({len(names)})"


def sentence(text: str) -> str:
    """Return a clause with a capital letter and a full stop; nothing for nothing."""
    return f"{text[0].upper()}{text[1:].removesuffix('.')}." if text else ""
