"""The plan of a sweep: which neurons, where, with which intervention, on which examples; and what it costs.

A *cell* is one intervention (neurons of one site, scope, kind). Cells that come to the same edit on the
same examples are one *run*.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np
import pandas as pd
from jaxtyping import Bool

from synapse.errors import SettingsError
from synapse.model.classifier import Classifier
from synapse.model.resume import CleanPass
from synapse.perturb.base import Intervention
from synapse.ranking.base import Ranking, count_of
from synapse.sweeping.kinds import KINDS, Kind
from synapse.types import CELL_COLUMNS, GLOBAL, SWEPT_SCOPES, Activations, Component, Neurons, Scope, Selection

FRACTIONS = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 1.0)
"""Shares of the width, dense at both ends: in early layers little is lost before nearly all is gone."""


@dataclass(frozen=True)
class Grid:
    """What a study sweeps; every field can be widened by those who will wait.

    The first kind is swept over all of `fractions` and at 100 %, from the top and at random, over `bottom_fractions`
    from the bottom and over `label_fractions` for each class's ranking; the other kinds at `kind_fractions`, top and
    random, where the numbers they need exist. There are `random_sets` random sets of each size; each example meets
    `random_sets_per_example` of them, in turn. Rivals, further rankings to judge beside the first, are swept with the
    first kind, from the top, at the sizes nearest to `rival_fractions` that random sets have too.
    """

    scopes: tuple[Scope, ...] = SWEPT_SCOPES
    fractions: tuple[float, ...] = FRACTIONS
    bottom_fractions: tuple[float, ...] = (0.25, 0.5, 0.75, 0.9, 0.95, 0.98, 0.99)
    label_fractions: tuple[float, ...] = (0.5, 0.9)
    kinds: tuple[Kind, ...] = KINDS
    kind_fractions: tuple[float, ...] = (0.5, 0.9)
    rival_fractions: tuple[float, ...] = (0.1, 0.25, 0.5, 0.75, 0.9, 0.98)
    random_sets: int = 10
    random_sets_per_example: int = 1

    def __post_init__(self) -> None:
        shares = (
            *(*self.fractions, *self.bottom_fractions, *self.label_fractions),
            *(*self.kind_fractions, *self.rival_fractions),
        )
        if any(not 0 < share <= 1 for share in shares):
            raise SettingsError(
                f"The fractions {sorted(set(shares))} include some outside (0, 1]; they are shares of the width."
            )
        if not 1 <= self.random_sets_per_example <= self.random_sets:
            raise SettingsError(
                f"{self.random_sets_per_example} random sets an example were asked for; 1 to {self.random_sets} "
                "(random_sets) was expected."
            )

    @property
    def rival_scope(self) -> Scope:
        """The scope in which rivals are swept: all rows, where nothing can be re-supplied, if it is swept at all."""
        return "all" if "all" in self.scopes else self.scopes[0]


@dataclass(frozen=True)
class Cell:
    """One intervention of a plan.

    `share` is None where it runs on every example; (turn, sets, per_example) where examples take turns: example i
    meets the sets whose turn `(i + turn) % sets` is below `per_example`. `further` holds neurons of later layers that
    are edited too, for a cell that edits several layers, each its own neurons.

    Raises:
        SettingsError: further neurons that are not of later layers of the same component, each of another one; or with
            the scope `readout-onward`, which edits the first neurons in every later layer.
    """

    neurons: Neurons
    scope: Scope
    kind: Kind
    method: str
    label: str
    selection: Selection
    draw: int
    fraction: float
    share: tuple[int, int, int] | None = None
    further: tuple[Neurons, ...] = ()

    def __post_init__(self) -> None:
        """Refuse neurons that cannot be edited together."""
        layers = [neurons.layer for neurons in (self.neurons, *self.further)]
        one_component = {neurons.component for neurons in self.further} <= {self.neurons.component}
        if layers != sorted(set(layers)) or not one_component:
            raise SettingsError(
                f"A cell was to edit the layers {layers}; one component in layers that rise was expected: put the "
                "first into `neurons`, the later ones into `further`."
            )
        if self.further and self.scope == "readout-onward":
            raise SettingsError(
                "A cell of the scope 'readout-onward' was given further neurons; it edits its first ones in every "
                "later layer. Use the scope 'readout' to edit other neurons in each layer."
            )

    def runs(self, n_examples: int) -> Bool[np.ndarray, "example"]:
        """Return which examples the cell runs on."""
        return _taking_turns(self.share, n_examples)


@lru_cache(maxsize=64)  # many cells have the same, and there may be a million examples
def _taking_turns(share: tuple[int, int, int] | None, n_examples: int) -> Bool[np.ndarray, "example"]:
    """Return which examples a cell with this share runs on; not to be written to."""
    if share is None:
        runs = np.ones(n_examples, dtype=bool)
    else:
        turn, sets, per_example = share
        runs = (np.arange(n_examples) + turn) % sets < per_example
    runs.flags.writeable = False
    return runs


def plan(ranking: Ranking, grid: Grid, *, rivals: Sequence[Ranking] = (), seed: int = 0) -> list[Cell]:
    """Return the cells of a grid: every layer, scope, kind, size and end of the ranking, global and for each class.

    Those of the `rivals`, which are fewer (see `Grid`), come last.
    """
    cells = []
    for layer, scope, kind in product(range(len(ranking.scores)), grid.scopes, grid.kinds):
        if not kind.fits(scope):
            continue  # the moments of one layer say nothing about a later one
        build = _CellBuilder(ranking, layer, scope, kind)
        first = kind == grid.kinds[0]
        sizes = _sizes(grid.fractions if first else grid.kind_fractions, ranking.width)
        cells += [build.top(k) for k in sizes]
        cells += [build.everything()] if first else []
        for turn, (k, draw) in enumerate(product(sizes, range(grid.random_sets))):
            # Shifting the turn with the size spreads the sets evenly over the examples.
            share = (draw + turn // grid.random_sets, grid.random_sets, grid.random_sets_per_example)
            every = grid.random_sets == grid.random_sets_per_example
            cells.append(build.random(k, draw, None if every else share, seed))
        if first:
            cells += [build.bottom(k) for k in _sizes(grid.bottom_fractions, ranking.width)]
            cells += [
                build.top(k, label) for label in ranking.labels for k in _sizes(grid.label_fractions, ranking.width)
            ]
    return cells + [cell for rival in rivals for cell in _rival_cells(rival, grid)]


def _rival_cells(rival: Ranking, grid: Grid) -> list[Cell]:
    """Return the cells that judge a further ranking beside the first one and beside random sets."""
    swept = np.array(_sizes(grid.fractions, rival.width))
    if not len(swept):
        return []  # everything at once: there is no curve
    nearest = {int(swept[np.abs(swept - share * rival.width).argmin()]) for share in grid.rival_fractions}
    builders = [_CellBuilder(rival, layer, grid.rival_scope, grid.kinds[0]) for layer in range(len(rival.scores))]
    return [build.top(k) for build in builders for k in sorted(nearest)]


def cumulative(ranking: Ranking, scope: Scope, kind: Kind, fraction: float, *, label: str = GLOBAL) -> list[Cell]:
    """Return one cell for every layer, which edits the top neurons of that layer and of every later one.

    Other than `readout-onward`, which edits the same units throughout, each layer has the top of its own ranking.
    """
    cells = []
    for layer in range(len(ranking.scores)):
        first, *further = [ranking.top(fraction, layer=each, label=label) for each in range(layer, len(ranking.scores))]
        share = len(first) / ranking.width
        cells.append(Cell(first, scope, kind, ranking.method, label, "top", -1, share, further=tuple(further)))
    return cells


def _sizes(fractions: Sequence[float], width: int) -> list[int]:
    """Return the different numbers of neurons that shares of the width come to, below the whole width.

    In a narrow layer two shares may come to one size; a cell's fraction is that of the size, not the one asked for.
    """
    return sorted({count_of(float(fraction), width) for fraction in fractions} - {width})


@dataclass(frozen=True, eq=False)
class _CellBuilder:
    """Builds the cells of one (layer, scope, kind)."""

    ranking: Ranking
    layer: int
    scope: Scope
    kind: Kind

    def top(self, k: int, label: str = GLOBAL) -> Cell:
        neurons = self.ranking.top(k, layer=self.layer, label=label)
        return Cell(neurons, self.scope, self.kind, self.ranking.method, label, "top", -1, k / self.ranking.width)

    def bottom(self, k: int) -> Cell:
        neurons = self.ranking.bottom(k, layer=self.layer)
        return Cell(neurons, self.scope, self.kind, self.ranking.method, GLOBAL, "bottom", -1, k / self.ranking.width)

    def random(self, k: int, draw: int, share: tuple[int, int, int] | None, seed: int) -> Cell:
        neurons = self.ranking.random(k, layer=self.layer, seed=seed * 1009 + draw)
        return Cell(neurons, self.scope, self.kind, "random", GLOBAL, "random", draw, k / self.ranking.width, share)

    def everything(self) -> Cell:
        neurons = Neurons(self.layer, tuple(range(self.ranking.width)), self.ranking.component)
        return Cell(neurons, self.scope, self.kind, "", GLOBAL, "top", -1, 1.0)


_KEYS_AND_VALUES = 0.2
"""Share of a block's work that keys and values of all rows are, and the rest for one row."""


@dataclass(frozen=True)
class Cost:
    """What a plan costs: runs of an example under a cell, and the work in all, in blocks that run one example.

    `places` are those where runs begin: what a sweep does at one of them on one batch is an item of an executor.
    """

    cells: int
    runs: int
    block_passes: int
    places: int


@dataclass(frozen=True)
class Reach:
    """What an edit of a component can reach: which scopes come to the same there, and how many blocks run after it.

    `knows_rows` says that the last block can be run for the readout row alone, `row_is_alone_from` from which block on
    an edit of that row reaches no other one (`n_blocks`: from none).
    """

    component: Component
    n_layers: int
    n_blocks: int
    is_proved: bool
    reads_every_row: bool
    knows_rows: bool
    row_is_alone_from: int

    @classmethod
    def of(cls, classifier: Classifier, component: Component, clean: CleanPass | None = None) -> "Reach":
        """Return the reach of a classifier's component; a clean pass tells which rows need not be run."""
        anatomy, n_layers = classifier.anatomy, len(classifier.sites(component))
        return cls(
            component,
            n_layers,
            classifier.n_layers,
            anatomy.readout_is_proved,
            anatomy.readout in ("mean", "first-and-mean"),
            clean is not None and clean.knows_rows,
            classifier.n_layers if clean is None else clean.row_is_alone_from,
        )

    def blocks_run(self, layer: int, scope: Scope) -> float:
        """Return how many blocks' worth of work is left when a run starts at this layer; single rows count nothing."""
        first = self.n_blocks if self.component == "pooler" else layer + (self.component == "residual")
        is_one_row = scope in ("readout", "readout-onward") and first >= self.row_is_alone_from
        if first == self.n_blocks or is_one_row:
            return 0.0
        return self.n_blocks - first - (1 - _KEYS_AND_VALUES) * self.knows_rows

    def scope(self, layer: int, scope: Scope, kind: Kind) -> Scope:
        """Return `readout` for a scope that comes to the same, where the readout was proved on load.

        The head reads the readout row of the last block's output only; the input of the final map has no other rows
        that matter; a head that reads the mean has every row that is no padding for its readout rows.
        """
        # Means and deviations of `all` are taken over all rows, so those kinds stay apart.
        if not self.is_proved or (kind.has_moments_of_all_rows and scope in ("all", "non-padding")):
            return scope
        is_read = self.component in ("residual", "pooler") and layer == self.n_layers - 1
        is_every_row = self.reads_every_row and scope in ("all", "non-padding")
        return "readout" if is_read or is_every_row else scope


def cost_of(cells: Sequence[Cell], n_examples: int, reach: Reach) -> Cost:
    """Return what the plan will really run, after equal cells were merged."""
    runs = merged_runs(cells, n_examples, reach)
    total = sum(int(run.examples.sum()) for run in runs)
    blocks = sum(int(run.examples.sum()) * reach.blocks_run(run.layer, run.scope) for run in runs)
    places = {(run.layer, run.scope) for run in runs}
    return Cost(len(cells), total, round(blocks) + n_examples * reach.n_blocks, len(places))


@dataclass(frozen=True, eq=False)
class Run:
    """Cells that come to the same edit on the same examples, run once for all of them.

    `cells` are their positions in the plan, `neurons` the first ones that are edited and `further` those of later
    layers, `examples` says which examples it runs on.
    """

    neurons: Neurons
    further: tuple[Neurons, ...]
    scope: Scope
    kind: Kind
    cells: tuple[int, ...]
    examples: Bool[np.ndarray, "example"]

    @property
    def layer(self) -> int:
        """The first layer that is edited."""
        return self.neurons.layer

    def interventions(self, reference: Activations, *, seed: int) -> dict[int, Intervention]:
        """Return the intervention of every layer with neurons, with the numbers of the reference examples."""
        return {
            neurons.layer: self.kind.of(neurons, self.scope, reference, seed=seed)
            for neurons in (self.neurons, *self.further)
        }


def merged_runs(cells: Sequence[Cell], n_examples: int, reach: Reach) -> list[Run]:
    """Return what has to be run for these cells: equal edits of the same examples once."""
    merged: dict[tuple[object, ...], list[int]] = {}
    scopes = [reach.scope(cell.neurons.layer, cell.scope, cell.kind) for cell in cells]
    for position, (cell, scope) in enumerate(zip(cells, scopes, strict=True)):
        # What is drawn for a set may depend on the order of its units.
        units = tuple(cell.neurons.units if cell.kind.is_random else sorted(cell.neurons.units))
        key = (cell.neurons.layer, scope, cell.kind, units, cell.further, cell.share)
        merged.setdefault(key, []).append(position)
    return [
        Run(
            neurons=cells[first].neurons,
            further=cells[first].further,
            scope=scopes[first],
            kind=cells[first].kind,
            cells=(first, *others),
            examples=cells[first].runs(n_examples),
        )
        for first, *others in merged.values()
    ]


def cells_frame(cells: Sequence[Cell], n_layers: int) -> pd.DataFrame:
    """Return the columns of the `sweep` table that say what a cell is, one row a cell."""
    rows = [
        (
            cell.neurons.component,
            cell.neurons.layer,
            (cell.neurons.layer + 1) / n_layers,
            cell.scope,
            cell.kind.name,
            cell.kind.strength,
            cell.method,
            cell.label,
            cell.selection,
            cell.draw,
            cell.fraction,
            len(cell.neurons),
        )
        for cell in cells
    ]
    return pd.DataFrame(rows, columns=list(CELL_COLUMNS))
