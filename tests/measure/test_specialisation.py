from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from handmade import NOT_RUN, cell, make_sweep

from synapse import measure

TARGETS = [0] * 8 + [1] * 8 + [2] * 4
NO_RANKINGS = pd.DataFrame()


def ranking(width, **orders):
    """A ranking table of one layer from the best units of each class, the rest in order."""
    rows = []
    for label, best in orders.items():
        units = list(best) + [unit for unit in range(width) if unit not in best]
        rows += [("cumulative-mass", 0, label, rank, unit, 0.0) for rank, unit in enumerate(units)]
    return pd.DataFrame(rows, columns=["method", "layer", "label", "rank", "unit", "score"])


def ablated(a, b, label, **columns):
    """Cell of one class's units that breaks the first `a` examples of class a and `b` of class b."""
    predicted = [1] * a + [0] * (8 - a) + [0] * b + [1] * (8 - b) + [2] * 4
    return cell(predicted, label=label, fraction=0.5, **columns)


FULL = cell([1] * 8 + [0] * 8 + [2] * 4)


def test_overlap_is_the_mean_jaccard_of_the_top_tenths():
    table = ranking(20, a=[3, 7], b=[7, 9], c=[3, 7])  # pairs share 1, 2 and 1 of two units
    overlap, _ = measure.class_overlap(table)
    assert overlap[0].value == pytest.approx((1 / 3 + 1 + 1 / 3) / 3)
    assert (overlap[0].low, overlap[0].high, overlap[0].n) == (None, None, 3)


def test_two_classes_with_one_ranking_have_no_overlap_and_no_specificity():
    table = ranking(20, a=[3, 7], b=[3, 7])
    sweep = make_sweep([FULL, ablated(4, 4, "a"), ablated(4, 4, "b")], TARGETS)
    found = measure.specialisation(sweep, table)
    ((specificity,), (asymmetry,)) = (list(by["all"].values()) for by in (found.specificity, found.asymmetry))
    for figure in (found.overlap[0], specificity, asymmetry):
        assert (figure.value, figure.note) == (None, "the classes share one ranking")


def test_chance_overlap_agrees_with_all_pairs_of_sets():
    sets = [set(units) for units in combinations(range(20), 2)]
    expected = np.mean([len(a & b) / len(a | b) for a in sets for b in sets])
    _, chance = measure.class_overlap(ranking(20, a=[3, 7], b=[7, 9]))
    assert chance[0].value == pytest.approx(expected)


def test_rankings_at_random_fall_into_the_range_of_chance():
    rng = np.random.default_rng(0)
    inside = []
    for _ in range(100):
        table = ranking(60, **{label: rng.permutation(60)[:6].tolist() for label in "abcd"})
        overlap, chance = measure.class_overlap(table)
        inside.append(chance[0].low <= overlap[0].value <= chance[0].high)
    assert np.mean(inside) > 0.88


def test_overlap_prefers_cumulative_mass_and_leaves_the_global_ranking_out():
    table = ranking(20, a=[3, 7], b=[7, 3])
    other = ranking(20, a=[0, 1], b=[2, 3]).assign(method="attribution")
    everything = pd.concat([other, table, ranking(20, a=[0, 1]).assign(label="")])
    assert measure.class_overlap(everything)[0][0].value == 1


def test_recall_drops_are_paired_within_the_measured_class():
    sweep = make_sweep([FULL, ablated(6, 1, "a"), ablated(2, 5, "b")], TARGETS)
    drops = measure.specialisation(sweep, NO_RANKINGS).recall_drop["all"][0]
    values = {a: {b: drops[a][b].value for b in "abc"} for a in "ab"}
    assert values == {"a": {"a": 0.75, "b": 0.125, "c": 0}, "b": {"a": 0.25, "b": 0.625, "c": 0}}
    low, high = measure.paired_score(1, 0, 8)
    assert (drops["a"]["b"].low, drops["a"]["b"].high, drops["a"]["b"].n) == (low, high, 8)


def test_specificity_and_asymmetry_by_hand():
    sweep = make_sweep([FULL, ablated(6, 1, "a"), ablated(2, 5, "b")], TARGETS)
    figures = measure.specialisation(sweep, NO_RANKINGS)
    specificity, asymmetry = figures.specificity["all"][0], figures.asymmetry["all"][0]
    assert specificity.value == pytest.approx((0.75 + 0.625) / 2 - (0.125 + 0.25) / 2)
    assert asymmetry.value == pytest.approx(abs(0.125 - 0.25))
    assert specificity.low < specificity.value < specificity.high


def test_asymmetry_that_noise_explains_reaches_zero_and_a_real_one_does_not():
    noisy = make_sweep([FULL, ablated(8, 2, "a"), ablated(3, 8, "b")], TARGETS)
    one_way = make_sweep([FULL, ablated(8, 8, "a"), ablated(0, 8, "b")], TARGETS)
    assert measure.specialisation(noisy, NO_RANKINGS).asymmetry["all"][0].low == 0
    assert measure.specialisation(one_way, NO_RANKINGS).asymmetry["all"][0].low > 0


def test_a_class_without_examples_has_a_null_recall_drop_and_a_note():
    targets = [0] * 8 + [1] * 8 + [3] * 4  # class c was not sampled
    cells = [cell([1] * 8 + [0] * 8 + [3] * 4)]
    cells += [cell([1] * 6 + [0] * 2 + [1] * 8 + [3] * 4, label=label, fraction=0.5) for label in "abcd"]
    figures = measure.specialisation(make_sweep(cells, targets), NO_RANKINGS)
    missing = figures.recall_drop["all"][0]["a"]["c"]
    assert (missing.value, missing.n, missing.note) == (None, 0, "no examples")
    assert figures.specificity["all"][0].value == pytest.approx(0.75 / 3 - 2 * 0.75 / 6)  # of a, b and d


def test_the_fraction_nearest_to_half_is_used_and_named():
    near, far = ablated(6, 1, "a") | {"fraction": 0.4}, ablated(8, 8, "a") | {"fraction": 0.9}
    drops = measure.specialisation(make_sweep([FULL, far, near], TARGETS), NO_RANKINGS).recall_drop["all"][0]
    assert (drops["a"]["a"].value, drops["a"]["a"].note) == (0.75, "at 0.4 of the width")


def test_examples_that_a_cell_did_not_run_are_left_out():
    some = ablated(6, 1, "a")
    some["predicted"] = [NOT_RUN] * 4 + some["predicted"][4:]
    drops = measure.specialisation(make_sweep([FULL, some], TARGETS), NO_RANKINGS).recall_drop["all"][0]
    assert (drops["a"]["a"].value, drops["a"]["a"].n) == (0.5, 4)


def test_a_place_that_is_not_used_has_no_specialisation():
    idle = cell([0] * 8 + [1] * 8 + [2] * 4)
    sweep = make_sweep([idle, ablated(6, 1, "a"), ablated(2, 5, "b")], TARGETS)
    figures = measure.specialisation(sweep, NO_RANKINGS)
    drop = figures.recall_drop["all"][0]["a"]["b"]
    null = drop, figures.specificity["all"][0], figures.asymmetry["all"][0]
    assert [(f.value, f.note) for f in null] == [(None, "not used here")] * 3


def test_without_class_rankings_there_are_no_figures():
    figures = measure.specialisation(make_sweep([FULL], TARGETS), ranking(20, a=[0]).assign(label=""))
    assert figures.overlap == figures.overlap_chance == figures.recall_drop == figures.specificity == {}
