import numpy as np
import pytest
from handmade import cell, make_sweep

from synapse import measure

N = 400
RIGHT = [0] * N


def broken(n):
    return [1] * n + [0] * (N - n)


def sweep_of(selection, *points, end=300):
    cells = [cell(broken(end))]
    cells += [cell(broken(n), selection=selection, fraction=q) for q, n in points]
    return make_sweep(cells, RIGHT)


def test_removable_is_the_largest_share_that_costs_less_than_one_percent():
    removable = measure.redundancy(sweep_of("top", (0.1, 0), (0.5, 3), (0.9, 100))).removable["all"][0]
    assert (removable.value, removable.n, removable.unit) == (0.5, N, "share of the width")


def test_exactly_one_percent_is_too_much():
    assert measure.redundancy(sweep_of("top", (0.1, 3), (0.5, 4))).removable["all"][0].value == 0.1


def test_a_share_beyond_a_dip_does_not_count():
    points = (0.1, 0), (0.3, 60), (0.5, 0), (0.9, 100)  # 0.5 alone would look safe
    assert measure.redundancy(sweep_of("top", *points)).removable["all"][0].value == 0.1


def test_nothing_removable_is_zero():
    removable = measure.redundancy(sweep_of("top", (0.1, 60), (0.5, 100))).removable["all"][0]
    assert (removable.value, removable.low, removable.high) == (0, 0, 0.1)


def test_the_interval_reaches_the_next_point_of_the_grid_even_where_every_resample_agrees():
    removable = measure.redundancy(sweep_of("top", (0.1, 0), (0.5, 0), (0.9, 100))).removable["all"][0]
    assert (removable.low, removable.value, removable.high) == (0.5, 0.5, 0.9)


def test_a_loss_near_one_percent_is_decided_differently_by_resamples():
    removable = measure.redundancy(sweep_of("top", (0.1, 0), (0.5, 3), (0.9, 100))).removable["all"][0]
    assert (removable.low, removable.high) == (0.1, 0.9)


def test_sufficient_is_what_the_removed_bottom_leaves():
    sufficient = measure.redundancy(sweep_of("bottom", (0.5, 0), (0.9, 0), (0.99, 100))).sufficient["all"][0]
    assert (sufficient.low, sufficient.value, sufficient.high) == (0.01, 0.1, 0.1)


def test_a_repaired_example_makes_up_for_a_broken_one():
    clean = [0] * 390 + [1] * 10  # ten wrong before the edit
    edited = [1] * 10 + [0] * 390  # ten others wrong after it
    cells = [cell(broken(300)), cell(edited, fraction=0.5)]
    assert measure.redundancy(make_sweep(cells, RIGHT, clean)).removable["all"][0].value == 0.5


def test_a_place_that_is_not_used_has_no_redundancy():
    figures = measure.redundancy(sweep_of("top", (0.5, 0), end=2))
    assert (figures.removable["all"][0].value, figures.removable["all"][0].note) == (None, "not used here")
    assert figures.sufficient == {}


def test_few_examples_are_told_to_be_too_coarse_for_one_percent():
    cells = [cell([1] * 40 + [0] * 10), cell([0] * 50, fraction=0.5)]
    assert measure.redundancy(make_sweep(cells, [0] * 50)).removable["all"][0].note == (
        "one example is 2.0% of the accuracy"
    )


@pytest.mark.parametrize("seed", [0, 1])
def test_the_removable_share_agrees_with_a_plain_search(seed):
    rng = np.random.default_rng(seed)
    fractions, lost = [0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9], np.sort(rng.integers(0, 12, size=7))
    expected = 0.0
    for fraction, n in zip(fractions, lost, strict=True):
        if n / N >= 0.01:
            break
        expected = fraction
    points = zip(fractions, lost.tolist(), strict=True)
    assert measure.redundancy(sweep_of("top", *points)).removable["all"][0].value == expected
