"""How much of a layer can be lost before predictions break, and whether a ranking knows where.

The *drop* at a fraction q is the accuracy lost, A - a(q), when that share of the width is zeroed; the
*headroom* of a layer and scope is the drop at q = 1, all there is to lose. A figure of damage means nothing
where the headroom may be zero: later blocks then read the answer again from elsewhere, and a flat curve shows
re-supply, not redundancy. Such figures are null and say `not used here`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TypeVar

import numpy as np
import pandas as pd
from jaxtyping import Float

from synapse.errors import SettingsError, near
from synapse.measure.intervals import Resamples, Z, bracketed, change, figure, rate, resample
from synapse.measure.outcomes import Outcomes, kl, outcomes_of
from synapse.types import GLOBAL, SCOPES, Figure, Selection, Sweep

NOT_USED = "not used here"
PREFERRED = "cumulative-mass"
"""The ranking method whose figures are given where several were swept."""

Place = tuple[str, int]
"""Scope and layer."""

T = TypeVar("T")

SELECTIONS: tuple[Selection, ...] = ("top", "random", "bottom")


def preferred_method(methods: Iterable[str], method: str | None = None) -> str:
    """Return the method to give figures for: the one asked for, else `cumulative-mass`, else the first.

    Random sets and the 100 % point belong to no method; without any method at all, the empty string.

    Raises
    ------
    SettingsError
        Where the method asked for is not there.
    """
    there = sorted(set(methods) - {"", "random"})
    if method is not None and method not in there:
        raise SettingsError(f"No ranking method {method!r} here; there are {', '.join(there)}.{near(method, there)}")
    if method is None and PREFERRED in there:
        return PREFERRED
    return method or next(iter(there), "")


def swept_places(outcomes: Outcomes) -> Iterator[tuple[Place, pd.DataFrame]]:
    """Yield every place and its zeroing cells, by scope and layer; places without a 100 % point are left out.

    Without that point there is no headroom, and no other figure means anything.
    """
    zeroed = outcomes.cells[outcomes.cells["kind"] == "zero"]
    for scope in SCOPES:
        of_scope = zeroed[zeroed["scope"] == scope]
        for layer in np.unique(of_scope["layer"]):
            cells = of_scope[of_scope["layer"] == layer]
            if (cells["fraction"] >= 1).any():
                yield (scope, int(layer)), cells


def by_scope(figures: Mapping[Place, T]) -> dict[str, dict[int, T]]:
    """Return the same figures as a dictionary of scopes of layers."""
    nested: dict[str, dict[int, T]] = {}
    for (scope, layer), found in figures.items():
        nested.setdefault(scope, {})[layer] = found
    return nested


def full_cell(cells: pd.DataFrame) -> int:
    """Return the number of the cell that removed the whole width."""
    return int(cells.index[cells["fraction"] >= 1][0])


def headroom(outcomes: Outcomes, cells: pd.DataFrame) -> Figure:
    """Return the accuracy lost when all units of one place are zeroed."""
    full = full_cell(cells)
    return change(outcomes.lost[full][outcomes.ran[full]], unit="accuracy")


def is_used(headroom: Figure) -> bool:
    """Return whether the headroom's interval lies above zero."""
    return headroom.low is not None and headroom.low > 0


def not_used(n: int, unit: str) -> Figure:
    """Return the null figure of a place whose headroom may be zero."""
    return Figure(None, None, None, n, unit, NOT_USED)


@dataclass(frozen=True, eq=False)
class Curve:
    """Damage at one place along one selection of units, from fraction 0 (the clean model) to 1.

    `lost` adds up the paired outcomes (1 broken, -1 repaired) of all the cells at a point, `ran` counts them:
    random draws are pooled, the mean is over all (draw, example) pairs that ran.
    """

    fractions: Float[np.ndarray, "point"]
    lost: Float[np.ndarray, "point example"]
    ran: Float[np.ndarray, "point example"]

    @property
    def headroom(self) -> float:
        """Drop at the end of the curve."""
        return float(self.lost[-1].sum() / self.ran[-1].sum())

    def at(self, fractions: Float[np.ndarray, "some"]) -> "Curve":
        """Return the curve with only the points at these fractions."""
        kept = np.isin(self.fractions, fractions)
        return Curve(self.fractions[kept], self.lost[kept], self.ran[kept])

    def area(self, resamples: Resamples) -> Float[np.ndarray, "draw"]:
        """Return the damage area, integral of (A - a(q)) / (A - a(1)) over q, in the data and each resample.

        0 where nothing is lost before the end, 1 where everything is lost at once; NaN for resamples without
        headroom. Trapezoids between the points.
        """
        drops = resamples.mean(self.lost, self.ran)
        lost_at_end = np.where(drops[:, -1] > 0, drops[:, -1], np.nan)
        return np.asarray(np.trapezoid(drops, self.fractions, axis=1) / lost_at_end)


def curve(outcomes: Outcomes, cells: pd.DataFrame, selection: Selection, method: str) -> Curve | None:
    """Return the damage curve of one place, or None where nothing between 0 and 1 was swept.

    `cells` are those of the place; `method` says whose top and bottom (random units have no method).
    """
    full, inner = full_cell(cells), inner_cells(cells, selection, method)
    if inner.empty:
        return None
    lost, ran, n = outcomes.lost, outcomes.ran, len(outcomes)
    fractions = np.unique(inner["fraction"])
    cells_at = [inner.index[inner["fraction"] == fraction] for fraction in fractions]
    return Curve(
        fractions=np.array([0.0, *fractions, 1.0]),
        lost=np.array([np.zeros(n), *(lost[at].sum(axis=0) for at in cells_at), lost[full]]),
        ran=np.array([np.ones(n), *(ran[at].sum(axis=0) for at in cells_at), ran[full]]),
    )


def inner_cells(cells: pd.DataFrame, selection: Selection, method: str) -> pd.DataFrame:
    """Return the cells between fraction 0 and 1 that took this end of the method's global ranking."""
    chosen = (cells["selection"] == selection) & (cells["label"] == GLOBAL) & (cells["fraction"] < 1)
    return cells[chosen if selection == "random" else chosen & (cells["method"] == method)]


def on_shared_points(curves: Sequence[Curve]) -> list[Curve]:
    """Return curves of one place with only the points that all of them have."""
    shared = reduce(np.intersect1d, [curve.fractions for curve in curves])
    return [curve.at(shared) for curve in curves]


@dataclass(frozen=True)
class Stability:
    """Figures of damage by scope and layer; what a sweep lacks is absent.

    `area` and the figures at half the width also tell the selections (`top`, `random`, `bottom`) apart.
    """

    headroom: dict[str, dict[int, Figure]]
    resupply: dict[int, Figure]
    commitment_depth: Figure
    area: dict[str, dict[int, dict[str, Figure]]]
    ordering_quality: dict[str, dict[int, Figure]]
    flip_rate: dict[str, dict[int, dict[str, Figure]]]
    kl: dict[str, dict[int, dict[str, Figure]]]

    def by_layer(self) -> pd.DataFrame:
        """Return a table to read, as text: a row for each (layer, scope), `value [low,high]` in per cent.

        `headroom` is the accuracy lost at the full width; `top`, `random` and `bottom` are damage areas as
        shares of it, or say `not used here`. It fits a terminal; the numbers themselves are in the fields.
        """
        rows = []
        for scope, layers in self.headroom.items():
            for layer, room in layers.items():
                areas = self.area.get(scope, {}).get(layer, {})
                texts = [_written(found) for found in (room, *map(areas.get, SELECTIONS))]
                rows.append([layer, scope, *texts])
        columns = ["layer", "scope", "headroom", *SELECTIONS]
        table = pd.DataFrame(rows, columns=columns)
        return table.sort_values("layer", kind="stable").set_index(["layer", "scope"])

    def __str__(self) -> str:
        depth = self.commitment_depth
        place = depth.note if depth.value is None else f"{depth.value:.2f} [{depth.low:.2f},{depth.high:.2f}]"
        return f"{self.by_layer().to_string()}\n\ncommitment depth: {place}"


def _written(figure: Figure | None) -> str:
    if figure is None:
        return ""
    if figure.value is None:
        return figure.note
    return f"{figure.value:.0%} [{figure.low:.0%},{figure.high:.0%}]".replace("%", "")


def stability(sweep: Sweep, *, method: str | None = None, seed: int = 0) -> Stability:
    """Return headroom, damage areas and what goes with them, for every layer and scope of a sweep.

    `method` is the ranking to judge (`cumulative-mass` where it is there, else the first); `seed` that of the
    resamples. Only cells of kind `zero` count.

    Raises
    ------
    SettingsError
        Where the sweep has no such method.
    DataError
        Where the parts of the sweep do not fit each other.
    """
    outcomes = outcomes_of(sweep)
    method = preferred_method(outcomes.cells["method"], method)
    resamples = resample(len(outcomes), seed=seed)
    places = dict(swept_places(outcomes))
    rooms = {place: headroom(outcomes, cells) for place, cells in places.items()}
    area: dict[Place, dict[str, Figure]] = {}
    quality: dict[Place, Figure] = {}
    flips: dict[Place, dict[str, Figure]] = {}
    divergence: dict[Place, dict[str, Figure]] = {}
    for place, cells in places.items():
        curves = {s: c for s in SELECTIONS if (c := curve(outcomes, cells, s, method)) is not None}
        halves = {s: half_width(inner_cells(cells, s, method)) for s in curves if s != "bottom"}
        used = is_used(rooms[place])
        area[place] = {s: _area(c, resamples, used) for s, c in curves.items()}
        flips[place] = {s: _flip_rate(outcomes, half, resamples, used) for s, half in halves.items()}
        divergence[place] = {s: _kl(sweep, outcomes, half, resamples, used) for s, half in halves.items()}
        if {"top", "random"} <= set(curves):
            quality[place] = _ordering_quality(curves["top"], curves["random"], resamples, used)
    return Stability(
        headroom=by_scope(rooms),
        resupply=_resupply(outcomes, places),
        commitment_depth=_commitment_depth(outcomes, places, resamples),
        area=by_scope(area),
        ordering_quality=by_scope(quality),
        flip_rate=by_scope(flips),
        kl=by_scope(divergence),
    )


def _area(curve: Curve, resamples: Resamples, used: bool) -> Figure:
    n, unit = curve.lost.shape[1], "share of headroom"
    if not used:
        return not_used(n, unit)
    # One share of the examples that changed everywhere would move the area by that share of the headroom.
    return figure(curve.area(resamples), n=n, unit=unit, span=1 / curve.headroom)


def _ordering_quality(top: Curve, random: Curve, resamples: Resamples, used: bool) -> Figure:
    n, unit = top.lost.shape[1], "share of headroom"
    if not used:
        return not_used(n, unit)
    # On the points that both have: trapezoids of unequal grids differ even where the curves do not.
    top, random = on_shared_points([top, random])
    difference = top.area(resamples) - random.area(resamples)
    return figure(difference, n=n, unit=unit, span=2 / top.headroom)


def _flip_rate(outcomes: Outcomes, half: pd.DataFrame, resamples: Resamples, used: bool) -> Figure:
    flipped, ran = outcomes.flipped[half.index].sum(axis=0), outcomes.ran[half.index].sum(axis=0)
    n, unit = int(np.sum(ran > 0)), "predictions"
    if not used:
        return not_used(n, unit)
    if ran.max() == 1:
        return rate(int(flipped.sum()), n, unit=unit, note=where(half))
    pooled = resamples.mean(flipped[None], ran[None])[:, 0]
    return figure(pooled, n=n, unit=unit, bounds=(0, 1), note=where(half))


def _kl(sweep: Sweep, outcomes: Outcomes, half: pd.DataFrame, resamples: Resamples, used: bool) -> Figure:
    ran = outcomes.ran[half.index]
    n, unit = int(np.sum(ran.any(axis=0))), "nats"
    if not used:
        return not_used(n, unit)
    total = np.zeros(len(outcomes))
    for cell, examples in zip(half.index, ran, strict=True):
        total[examples] += kl(sweep.clean_logits[examples], sweep.logits[cell, examples])
    pooled = resamples.mean(total[None], ran.sum(axis=0)[None])[:, 0]
    return figure(pooled, n=n, unit=unit, bounds=(0, np.inf), note=where(half))


def half_width(cells: pd.DataFrame) -> pd.DataFrame:
    """Return the cells at half the width, or at the fraction nearest to it that was swept."""
    fractions = cells["fraction"].to_numpy()
    nearest = fractions[np.argmin(np.abs(fractions - 0.5))]
    return pd.DataFrame(cells[cells["fraction"] == nearest])


def where(half: pd.DataFrame) -> str:
    """Return a note that says the fraction, where it is not one half."""
    fraction = half["fraction"].iloc[0]
    return "" if fraction == 0.5 else f"at {fraction:g} of the width"


def _resupply(outcomes: Outcomes, places: dict[Place, pd.DataFrame]) -> dict[int, Figure]:
    """Headroom of all rows minus that of the readout row: what later blocks win back from the other rows."""
    found = {}
    for scope, layer in places:
        if scope == "readout" and ("all", layer) in places:
            readout, everywhere = full_cell(places["readout", layer]), full_cell(places["all", layer])
            both = outcomes.ran[readout] & outcomes.ran[everywhere]
            change_between = outcomes.lost[everywhere] - outcomes.lost[readout]
            found[layer] = change(change_between[both], unit="accuracy")
    return found


def _commitment_depth(outcomes: Outcomes, places: dict[Place, pd.DataFrame], resamples: Resamples) -> Figure:
    """Depth of the first layer from which on every later one has headroom at the readout row.

    The layer is where a whole block ends, so the interval also holds that block: it begins at the depth
    before. Every resample repeats the decision, by McNemar's test, which the headroom's interval is the
    inverse of.
    """
    n, unit = len(outcomes), "depth"
    readout = [cells for (scope, _), cells in places.items() if scope == "readout"]
    if not readout:
        return Figure(None, None, None, n, unit, "scope readout was not swept")
    lost = outcomes.lost[[full_cell(cells) for cells in readout]]
    broken, repaired = resamples.weights @ (lost == 1).T, resamples.weights @ (lost == -1).T
    used = broken - repaired > Z * np.sqrt(broken + repaired)  # (draw, layer)
    committed = np.cumprod(used[:, ::-1], axis=1).sum(axis=1)  # layers at the end that are all used
    if committed[0] == 0:
        return Figure(None, None, None, n, unit, "the last layer has no headroom")
    depths = np.array([0.0, *(cells["depth"].iloc[0] for cells in readout)])
    # A resample in which not even the last layer is used says: no earlier than the end.
    first = np.minimum(len(readout) - committed, len(readout) - 1)
    lower, upper = depths[first], depths[first + 1]
    return bracketed(float(upper[0]), lower, upper, n=n, unit=unit)
