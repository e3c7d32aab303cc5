import re

import numpy as np
import pytest
from handmade import NOT_RUN, cell, make_sweep
from scipy import stats
from scipy.special import softmax

from synapse import measure
from synapse.errors import SettingsError

RIGHT = [0] * 20
"""Twenty examples of class 0; an edit breaks an example by making it 1."""


def broken(n, of=20):
    return [1] * n + [0] * (of - n)


def curve(selection, *points, **columns):
    return [cell(broken(n), selection=selection, fraction=q, **columns) for q, n in points]


def test_headroom_is_the_accuracy_lost_at_the_full_width():
    headroom = measure.stability(make_sweep([cell(broken(15))], RIGHT)).headroom["all"][0]
    low, high = measure.paired_score(15, 0, 20)
    assert (headroom.value, headroom.n, headroom.unit) == (0.75, 20, "accuracy")
    assert (headroom.low, headroom.high) == (low, high)


def test_damage_areas_are_trapezoids_over_the_headroom():
    cells = [cell(broken(16)), *curve("top", (0.25, 8), (0.5, 12)), *curve("bottom", (0.5, 4))]
    area = measure.stability(make_sweep(cells, RIGHT)).area["all"][0]
    # drops 0, .4, .6, .8 at 0, 1/4, 1/2, 1; and 0, .2, .8 at 0, 1/2, 1
    assert area["top"].value == pytest.approx((0.25 * 0.2 + 0.25 * 0.5 + 0.5 * 0.7) / 0.8)
    assert area["bottom"].value == pytest.approx((0.5 * 0.1 + 0.5 * 0.5) / 0.8)
    assert set(area) == {"top", "bottom"}
    assert area["top"].low < area["top"].value < area["top"].high


def test_an_area_that_no_example_moved_still_has_a_width():
    cells = [cell(broken(16)), *curve("top", (0.9, 0))]
    area = measure.stability(make_sweep(cells, RIGHT)).area["all"][0]["top"]
    margin = stats.binomtest(0, 20).proportion_ci(method="exact").high / 0.8
    assert area.value == pytest.approx(0.05)
    assert (area.low, area.high) == pytest.approx((0.05 - margin, 0.05 + margin))


def test_random_draws_are_pooled_over_the_examples_that_each_ran():
    ran_first, ran_second = broken(10)[:12] + [NOT_RUN] * 8, [NOT_RUN] * 8 + broken(2, of=12)
    random = [
        cell(predicted, selection="random", draw=draw, fraction=0.5)
        for draw, predicted in enumerate((ran_first, ran_second))
    ]
    figures = measure.stability(make_sweep([cell(broken(16)), *random], RIGHT))
    pooled = 12 / 24  # 10 of 12 and 2 of 12 pairs broke
    assert figures.area["all"][0]["random"].value == pytest.approx((0.25 * pooled + 0.25 * (pooled + 0.8)) / 0.8)
    assert figures.flip_rate["all"][0]["random"].value == pytest.approx(pooled)


def test_ordering_quality_is_area_top_minus_area_random_where_both_were_swept():
    cells = [cell(broken(16)), *curve("top", (0.25, 12), (0.5, 12)), *curve("random", (0.5, 4), draw=0)]
    quality = measure.stability(make_sweep(cells, RIGHT)).ordering_quality["all"][0]
    # At 0, 1/2, 1 alone: drops 0, .6, .8 against 0, .2, .8.
    assert quality.value == pytest.approx((0.5 * (0.6 - 0.2)) / 0.8)


def test_figures_of_equal_curves_are_paired_so_their_difference_is_zero_in_every_resample():
    cells = [cell(broken(16)), *curve("top", (0.5, 8)), *curve("random", (0.5, 8), draw=0)]
    quality = measure.stability(make_sweep(cells, RIGHT)).ordering_quality["all"][0]
    margin = 2 / 0.8 * stats.binomtest(0, 20).proportion_ci(method="exact").high
    assert quality.value == 0
    assert quality.high == pytest.approx(margin)


def test_a_place_whose_headroom_reaches_zero_gets_no_figures():
    cells = [cell(broken(3)), *curve("top", (0.5, 2)), *curve("random", (0.5, 1), draw=0)]
    figures = measure.stability(make_sweep(cells, RIGHT))
    assert figures.headroom["all"][0].value == 0.15
    places = figures.area, figures.flip_rate, figures.kl
    null = [place["all"][0]["top"] for place in places] + [figures.ordering_quality["all"][0]]
    assert [(f.value, f.low, f.high, f.note) for f in null] == [(None, None, None, "not used here")] * 4


def test_flip_rate_and_kl_are_those_at_half_the_width():
    sweep = make_sweep([cell(broken(16)), *curve("top", (0.1, 1), (0.5, 5), (0.9, 9))], RIGHT)
    figures = measure.stability(sweep)
    flips, kl = figures.flip_rate["all"][0]["top"], figures.kl["all"][0]["top"]
    one = stats.entropy(softmax([5.0, 0.0]), softmax([0.0, 5.0]))  # of an example that flipped
    exact = stats.binomtest(5, 20).proportion_ci(method="exact")
    assert (flips.value, flips.low, flips.high) == pytest.approx((0.25, exact.low, exact.high))
    assert kl.value == pytest.approx(one / 4)
    assert (flips.unit, kl.unit, flips.note) == ("predictions", "nats", "")


def test_the_nearest_fraction_stands_in_for_half_and_says_so():
    figures = measure.stability(make_sweep([cell(broken(16)), *curve("top", (0.1, 1), (0.6, 5))], RIGHT))
    assert figures.flip_rate["all"][0]["top"].note == "at 0.6 of the width"


def test_resupply_is_paired_between_the_two_scopes():
    readout = [1] * 4 + [0] * 16  # breaks the first 4, all rows break the last 10
    cells = [cell(readout, scope="readout"), cell([0] * 10 + [1] * 10, scope="all")]
    resupply = measure.stability(make_sweep(cells, RIGHT)).resupply[0]
    low, high = measure.paired_score(10, 4, 20)  # 10 more broken, 4 fewer
    assert (resupply.value, resupply.low, resupply.high) == (pytest.approx(0.3), low, high)


def readouts(*broken_at):
    cells = [cell(broken(n), scope="readout", layer=layer) for layer, n in enumerate(broken_at)]
    return measure.stability(make_sweep(cells, RIGHT, n_layers=len(broken_at))).commitment_depth


def test_commitment_starts_where_every_later_layer_is_used():
    depth = readouts(15, 0, 14, 16)  # the first layer is used too, but the second is not
    assert (depth.value, depth.low, depth.unit) == (0.75, 0.5, "depth")
    assert depth.high == 0.75


def test_commitment_is_as_uncertain_as_the_tests_that_decide_it():
    depth = readouts(0, 5, 16)  # five broken of twenty: significant, but not in every resample
    assert (depth.value, depth.low, depth.high) == (pytest.approx(2 / 3), pytest.approx(1 / 3), 1.0)


def test_no_commitment_without_headroom_at_the_end():
    depth = readouts(15, 1)
    assert (depth.value, depth.low, depth.note) == (None, None, "the last layer has no headroom")


def test_what_was_not_swept_is_absent():
    cells = [
        cell(broken(16)),
        cell(broken(9), kind="noise", fraction=0.5),
        cell(broken(9), layer=1, fraction=0.5),
    ]
    figures = measure.stability(make_sweep(cells, RIGHT))
    assert figures.headroom.keys() == {"all"}
    assert figures.headroom["all"].keys() == {0}  # layer 1 has no end, so no headroom
    assert figures.area["all"][0] == figures.kl["all"][0] == figures.resupply == figures.ordering_quality == {}
    assert figures.commitment_depth.note == "scope readout was not swept"


def test_a_sweep_without_zeroing_has_no_figures():
    figures = measure.stability(make_sweep([cell(broken(16), kind="mean")], RIGHT))
    assert figures.headroom == figures.area == {}
    assert figures.by_layer().empty


def test_cumulative_mass_is_judged_unless_another_method_is_asked_for():
    cells = [cell(broken(16))]
    cells += curve("top", (0.5, 8), method="linear") + curve("top", (0.5, 12), method="cumulative-mass")
    sweep = make_sweep(cells, RIGHT)
    assert measure.stability(sweep).flip_rate["all"][0]["top"].value == 0.6
    assert measure.stability(sweep, method="linear").flip_rate["all"][0]["top"].value == 0.4


def test_class_rankings_do_not_mix_into_the_global_curve():
    cells = [cell(broken(16)), *curve("top", (0.5, 8)), *curve("top", (0.5, 16), label="a")]
    assert measure.stability(make_sweep(cells, RIGHT)).flip_rate["all"][0]["top"].value == 0.4


def test_an_unknown_method_is_refused_with_those_that_are_there():
    sweep = make_sweep([cell(broken(16)), *curve("top", (0.5, 8), method="linear")], RIGHT)
    message = "No ranking method 'liner' here; there are linear. Did you mean 'linear'?"
    with pytest.raises(SettingsError, match=f"^{re.escape(message)}$"):
        measure.stability(sweep, method="liner")


def test_the_same_seed_gives_the_same_figures():
    sweep = make_sweep([cell(broken(16)), *curve("top", (0.3, 4), (0.5, 8))], RIGHT)
    assert measure.stability(sweep, seed=4) == measure.stability(sweep, seed=4)
    assert measure.stability(sweep, seed=4).area != measure.stability(sweep, seed=5).area


def test_the_table_by_layer_reads_as_text_that_fits_a_terminal():
    used = [cell(broken(16)), *curve("top", (0.5, 8))]
    unused = [cell(broken(0), layer=1, scope="readout-onward")]
    unused += [c for s in ("top", "random", "bottom") for c in curve(s, (0.5, 0), layer=1, scope="readout-onward")]
    table = measure.stability(make_sweep(used + unused, RIGHT)).by_layer()
    assert table.index.tolist() == [(0, "all"), (1, "readout-onward")]
    assert table.columns.tolist() == ["headroom", "top", "random", "bottom"]
    assert table.loc[(1, "readout-onward")].tolist() == ["0 [-16,16]", *["not used here"] * 3]
    assert table.loc[(0, "all"), "top"].startswith("50 [3")
    assert table.loc[(0, "all"), "random"] == ""
    assert max(map(len, table.to_string().splitlines())) <= 80


def test_printed_figures_end_with_the_commitment_depth():
    cells = [cell(broken(16), scope="readout"), *curve("top", (0.5, 8), scope="readout")]
    lines = str(measure.stability(make_sweep(cells, RIGHT))).splitlines()
    assert lines[0].split() == ["headroom", "top", "random", "bottom"]
    assert lines[-1] == "commitment depth: 1.00 [0.00,1.00]"


def test_areas_of_noisy_curves_cover_the_truth():
    """Examples break at random with known rates: the interval should hold the true area nearly always."""
    rng, truth, held = np.random.default_rng(5), (0.25 * 0.3 + 0.25 * (0.3 + 0.8)) / 0.8, []
    for _ in range(60):
        threshold = rng.random(100)
        cells = [cell((threshold < 0.8).astype(int)), cell((threshold < 0.3).astype(int), fraction=0.5)]
        area = measure.stability(make_sweep(cells, [0] * 100)).area["all"][0]["top"]
        held.append(area.low <= truth <= area.high)
    assert np.mean(held) > 0.88  # 95 % of 60, less three standard errors
