import numpy as np
import pytest
from handmade import cell, make_sweep

from synapse.measure.faithfulness import faithfulness
from synapse.measure.intervals import resample
from synapse.measure.stability import NOT_USED

RIGHT = [0] * 40
"""Forty examples of class 0; an edit breaks an example by making it 1."""


def broken(n):
    return [1] * n + [0] * (40 - n)


def curve(method, *points, **columns):
    selection = "random" if method == "random" else "top"
    return [cell(broken(n), selection=selection, method=method, fraction=q, **columns) for q, n in points]


def place(good=32, middling=16, random=8, full=32, **columns):
    """Cells of one layer: three methods, of which the third never does more than random."""
    return [
        cell(broken(full), **columns),
        *curve("good", (0.5, good), **columns),
        *curve("middling", (0.5, middling), **columns),
        *curve("chance", (0.5, random), **columns),
        *curve("random", (0.5, random), draw=0, **columns),
    ]


def test_the_ranking_whose_units_do_most_damage_is_best():
    found = faithfulness(make_sweep(place(), RIGHT))
    quality, best = found.quality["all"][0], found.best["all"][0]
    # drops at half the width: .8, .4 and .2 of .8; only the middle of the trapezoids differs
    assert {method: figure.value for method, figure in quality.items()} == pytest.approx(
        {"good": 0.5 * (0.8 - 0.2) / 0.8, "middling": 0.5 * (0.4 - 0.2) / 0.8, "chance": 0}
    )
    assert (best.method, best.second) == ("good", "middling")
    assert best.lead.value == pytest.approx(0.5 * (0.8 - 0.4) / 0.8)
    assert best.lead.low > 0


def test_a_lead_is_paired_by_example_and_reaches_zero_where_two_rankings_do_alike():
    cells = [
        cell(broken(32)),
        *curve("one", (0.5, 17)),
        *curve("two", (0.5, 16)),
        *curve("random", (0.5, 8), draw=0),
    ]
    best = faithfulness(make_sweep(cells, RIGHT)).best["all"][0]
    assert (best.method, best.second) == ("one", "two")
    assert best.lead.low <= 0 < best.lead.value
    # one example of forty, in a paired difference: the noise of the two curves themselves would be ten times that
    assert best.lead.high < 0.06


def test_a_paired_interval_is_that_of_the_same_resamples_of_both():
    found = faithfulness(make_sweep(place(), RIGHT), seed=3).best["all"][0].lead
    drawn = resample(40, seed=3).weights[1:]
    full, good, middling = (drawn @ np.array(broken(n)) for n in (32, 32, 16))
    expected = np.quantile(0.5 * (good - middling) / full, (0.025, 0.975))
    assert (found.low, found.high) == pytest.approx(expected)


def test_methods_are_compared_where_all_of_them_were_swept():
    dense = [*place(), *curve("good", (0.1, 32)), *curve("random", (0.1, 4), draw=0)]
    sparse = faithfulness(make_sweep(place(), RIGHT)).quality["all"][0]
    assert faithfulness(make_sweep(dense, RIGHT)).quality["all"][0] == sparse


def test_the_mean_over_layers_is_over_those_that_are_used():
    cells = [*place(), *place(good=16, middling=24, layer=1), *place(good=0, middling=0, random=0, full=1, layer=2)]
    found = faithfulness(make_sweep(cells, RIGHT, n_layers=3))
    qualities = found.quality["all"]
    assert {figure.note for figure in qualities[2].values()} == {NOT_USED}
    assert set(found.best["all"]) == {0, 1}
    assert found.best["all"][1].method == "middling"
    overall = found.overall["all"]
    assert overall["good"].value == pytest.approx((qualities[0]["good"].value + qualities[1]["good"].value) / 2)
    lead = found.best_overall["all"]
    assert (lead.method, lead.second) == ("good", "middling")
    assert lead.lead.value == pytest.approx(overall["good"].value - overall["middling"].value)


def test_a_reversed_ranking_is_worse_than_chance():
    cells = [cell(broken(32)), *curve("right", (0.5, 32)), *curve("reversed", (0.5, 0))]
    cells += curve("random", (0.5, 16), draw=0)
    found = faithfulness(make_sweep(cells, RIGHT))
    assert found.best["all"][0].method == "right"
    assert found.quality["all"][0]["reversed"].high < 0


def test_one_method_alone_and_methods_without_random_sets_are_not_judged():
    alone = [cell(broken(32)), *curve("good", (0.5, 32)), *curve("random", (0.5, 8), draw=0)]
    without = [cell(broken(32)), *curve("good", (0.5, 32)), *curve("middling", (0.5, 8))]
    for cells in (alone, without):
        found = faithfulness(make_sweep(cells, RIGHT))
        assert found.quality == found.best == found.overall == found.best_overall == {}


def test_a_tie_goes_to_the_method_that_was_swept_first():
    cells = [cell(broken(32)), *curve("b", (0.5, 20)), *curve("a", (0.5, 20)), *curve("random", (0.5, 8), draw=0)]
    best = faithfulness(make_sweep(cells, RIGHT)).best["all"][0]
    assert (best.method, best.second, best.lead.value) == ("b", "a", 0)
    assert best.lead.low < 0 < best.lead.high
