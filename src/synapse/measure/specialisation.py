"""Whether classes live in different units: by the rankings, and by what ablating one class's units does to
all."""

from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd
from jaxtyping import Float

from synapse.measure.agreement import TOP_SHARE, chance_jaccard, jaccard
from synapse.measure.intervals import ALPHA, Resamples, changes, figure, resample, unseen
from synapse.measure.outcomes import Outcomes, outcomes_of
from synapse.measure.stability import (
    Place,
    by_scope,
    half_width,
    headroom,
    is_used,
    not_used,
    preferred_method,
    swept_places,
    where,
)
from synapse.types import GLOBAL, Figure, Sweep

ONE_RANKING = "the classes share one ranking"
"""Why nothing can be said of classes whose neurons are ranked alike, as two classes with mirrored weights are."""


@dataclass(frozen=True)
class Specialisation:
    """Figures on how the classes share a layer; what sweep and rankings lack is absent.

    `recall_drop[scope][layer][a][b]` is the recall that class b loses when the top units of class a are
    zeroed.
    """

    overlap: dict[int, Figure]
    overlap_chance: dict[int, Figure]
    recall_drop: dict[str, dict[int, dict[str, dict[str, Figure]]]]
    specificity: dict[str, dict[int, Figure]]
    asymmetry: dict[str, dict[int, Figure]]


def specialisation(
    sweep: Sweep, ranking_table: pd.DataFrame, *, method: str | None = None, seed: int = 0
) -> Specialisation:
    """Return the overlap of the classes' top tenths, and the recalls lost when each class's units are zeroed.

    `ranking_table` has a row a unit: `method`, `layer`, `label`, `rank`, `unit`. Recalls are measured at half
    the width, or at the nearest fraction that was swept by class. `method` and `seed` as in `stability`.

    Raises
    ------
    SettingsError
        Where the sweep or the table ranks classes, but not by this method.
    DataError
        Where the parts of the sweep do not fit each other.
    """
    outcomes = outcomes_of(sweep)
    overlap, chance = class_overlap(ranking_table, method=method, seed=seed)
    one_ranking = {layer for layer, figure in overlap.items() if figure.note == ONE_RANKING}
    # A recall is a rate within a class, so classes keep their sizes in every resample.
    resamples = resample(len(outcomes), seed=seed, targets=outcomes.targets)
    drops: dict[Place, dict[str, dict[str, Figure]]] = {}
    specificity: dict[Place, Figure] = {}
    asymmetry: dict[Place, Figure] = {}
    for place, cells in swept_places(outcomes):
        by_class = _class_cells(cells)
        if by_class.empty:
            continue
        half = half_width(by_class[by_class["method"] == preferred_method(by_class["method"], method)])
        used = is_used(headroom(outcomes, cells))
        drops[place] = _recall_drops(outcomes, half, used)
        lost = _lost_recalls(outcomes, half, resamples)
        if lost.shape[1] >= 2 and place[1] in one_ranking:
            nothing = Figure(None, None, None, len(outcomes), "recall", ONE_RANKING)
            specificity[place], asymmetry[place] = nothing, nothing
        elif lost.shape[1] >= 2:
            specificity[place] = _specificity(outcomes, lost, used, where(half))
            asymmetry[place] = _asymmetry(outcomes, lost, used, where(half))
    return Specialisation(overlap, chance, by_scope(drops), by_scope(specificity), by_scope(asymmetry))


def class_overlap(
    ranking_table: pd.DataFrame, *, method: str | None = None, seed: int = 0
) -> tuple[dict[int, Figure], dict[int, Figure]]:
    """Return, for each layer, the mean Jaccard overlap of the classes' top tenths and that of random sets.

    Two classes' sets A, B of k units overlap by |A & B| / |A or B|; for random sets |A & B| is
    hypergeometric, and the mean over pairs of classes has the interval that random sets show. The overlap
    itself is a fact about the rankings given, so it has no interval; it means something where it lies outside
    that of chance. It is null where all classes have one and the same ranking: the weights of a linear probe for two
    classes mirror each other, so their absolute values say nothing about sharing.

    Raises
    ------
    SettingsError
        Where the table has no such method.
    """
    if ranking_table.empty or (ranking_table["label"] == GLOBAL).all():
        return {}, {}
    of_classes = ranking_table[ranking_table["label"] != GLOBAL]
    method = preferred_method(of_classes["method"], method)
    overlap, chance = {}, {}
    of_classes = of_classes[of_classes["method"] == method]
    for layer in np.unique(of_classes["layer"]):
        ranking = of_classes[of_classes["layer"] == layer]
        width = int(ranking["unit"].nunique())
        k = max(1, round(TOP_SHARE * width))
        best = ranking.sort_values("rank", kind="stable").groupby("label")["unit"]
        sets = [set(units.iloc[:k]) for _, units in best]
        if len(sets) < 2:
            continue
        if len({tuple(units) for _, units in best}) == 1:
            overlap[int(layer)] = Figure(None, None, None, 1, "Jaccard", ONE_RANKING)
            chance[int(layer)] = _chance(k, width, 1, seed)
            continue
        shared = [len(a & b) for a, b in combinations(sets, 2)]
        note = "of the rankings as given, not resampled"
        value = float(jaccard(np.array(shared), k).mean())
        overlap[int(layer)] = Figure(value, None, None, len(shared), "Jaccard", note)
        chance[int(layer)] = _chance(k, width, len(shared), seed)
    return overlap, chance


def _chance(k: int, width: int, n_pairs: int, seed: int) -> Figure:
    """Mean Jaccard of random sets of k units, and the range of its mean over that many pairs.

    Pairs of random sets are independent two by two even where they share a set, so drawing them one by one
    has the right variance.
    """
    drawn = np.random.default_rng(seed).hypergeometric(k, width - k, k, size=(1000, n_pairs))
    low, high = np.quantile(jaccard(drawn, k).mean(axis=1), (ALPHA / 2, 1 - ALPHA / 2))
    return Figure(chance_jaccard(k, width), float(low), float(high), n_pairs, "Jaccard")


def _class_cells(cells: pd.DataFrame) -> pd.DataFrame:
    """Cells before the 100 % point that removed the top units of one class."""
    return cells[(cells["label"] != GLOBAL) & (cells["selection"] == "top") & (cells["fraction"] < 1)]


def _cell_of(outcomes: Outcomes, half: pd.DataFrame) -> dict[str, int]:
    """Cell of each class whose units were ablated, in the order of the labels."""
    cell_of = dict(zip(half["label"], half.index, strict=True))
    return {label: int(cell_of[label]) for label in outcomes.labels if label in cell_of}


def _recall_drops(outcomes: Outcomes, half: pd.DataFrame, used: bool) -> dict[str, dict[str, Figure]]:
    """Paired change of each class's recall for each class that was ablated."""
    cell_of = _cell_of(outcomes, half)
    cells = list(cell_of.values())
    of_class = (outcomes.targets[:, None] == np.arange(len(outcomes.labels))).astype(int)
    n = outcomes.ran[cells] @ of_class  # (ablated, measured), as the next two
    broken, repaired = (outcomes.lost[cells] == 1) @ of_class, (outcomes.lost[cells] == -1) @ of_class
    if used:
        found = changes(broken.ravel(), repaired.ravel(), n.ravel(), unit="recall", note=where(half))
    else:
        found = [not_used(int(count), "recall") for count in n.ravel()]
    return {
        ablated: dict(zip(outcomes.labels, found[row * len(outcomes.labels) :], strict=False))
        for row, ablated in enumerate(cell_of)
    }


def _lost_recalls(
    outcomes: Outcomes, half: pd.DataFrame, resamples: Resamples
) -> Float[np.ndarray, "draw class class"]:
    """Recall that the second class loses when the first is ablated, for classes both ablated and seen."""
    seen = set(np.unique(outcomes.targets))
    cell_of = _cell_of(outcomes, half)
    classes = [i for i, label in enumerate(outcomes.labels) if label in cell_of and i in seen]
    cells = [cell_of[outcomes.labels[i]] for i in classes]
    lost = np.empty((len(resamples.weights), len(classes), len(classes)))
    for column, index in enumerate(classes):
        members = np.flatnonzero(outcomes.targets == index)
        drops, counts = outcomes.lost[cells][:, members], outcomes.ran[cells][:, members]
        lost[:, :, column] = resamples.among(members).mean(drops, counts)
    return lost


def _specificity(outcomes: Outcomes, lost: Float[np.ndarray, "draw class class"], used: bool, note: str) -> Figure:
    """Mean recall lost by the class whose units are zeroed, minus that lost by the others."""
    if not used:
        return not_used(len(outcomes), "recall")
    own = np.eye(lost.shape[1], dtype=bool)
    difference = lost[:, own].mean(axis=1) - lost[:, ~own].mean(axis=1)
    return figure(difference, n=len(outcomes), unit="recall", span=2.0, bounds=(-2, 2), note=note)


def _asymmetry(outcomes: Outcomes, lost: Float[np.ndarray, "draw class class"], used: bool, note: str) -> Figure:
    """Mean over pairs of classes of |S_ab - S_ba|.

    Noise alone makes absolute values positive, and resamples add more, so their percentiles would exclude a
    true zero. By the triangle inequality the error of the mean is at most the mean |error|: its resampled 95
    % quantile is the half width, and the interval reaches zero where noise explains the value.
    """
    if not used:
        return not_used(len(outcomes), "recall")
    upper = np.triu_indices(lost.shape[1], k=1)
    skew = (lost - lost.transpose(0, 2, 1))[:, *upper]  # (draw, pair)
    value = float(np.abs(skew[0]).mean())
    error = float(np.quantile(np.abs(skew[1:] - skew[0]).mean(axis=1), 1 - ALPHA))
    if error < 1e-12:  # no resample moved it
        error = 2 * unseen(len(outcomes))
    low, high = max(0.0, value - error), min(2.0, value + error)
    return Figure(value, low, high, len(outcomes), "recall", note)
