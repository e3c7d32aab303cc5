from itertools import combinations, pairwise

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from synapse.errors import SettingsError
from synapse.measure import agreement

N_UNITS = 12
CONSTANT = np.ones(N_UNITS)


def two_orders(seed=0, n_units=N_UNITS):
    rng = np.random.default_rng(seed)
    return rng.permutation(n_units), rng.permutation(n_units)


def direct_overlaps(first, second):
    return [len(set(first[:d].tolist()) & set(second[:d].tolist())) for d in range(1, len(first) + 1)]


def random_sets(n_sets, k, n_units, seed):
    rng = np.random.default_rng(seed)
    chosen = np.zeros((n_sets, n_units), dtype=bool)
    for row in chosen:
        row[rng.choice(n_units, k, replace=False)] = True
    return chosen


def scores_table(width, layer=0, label="", **scores):
    """A ranking table of one layer from the scores of each method."""
    rows = []
    for method, values in scores.items():
        order = np.argsort(-np.asarray(values, dtype=float), kind="stable")
        rows += [
            (method.replace("_", "-"), layer, label, rank, int(unit), float(values[unit]))
            for rank, unit in enumerate(order)
        ]
    assert len(rows) == width * len(scores)
    return pd.DataFrame(rows, columns=["method", "layer", "label", "rank", "unit", "score"])


def test_tau_counts_pairs_in_one_order_less_pairs_in_the_other_with_ties_as_tau_b():
    first, second = np.array([1, 2, 2, 4, 5]), np.array([1, 3, 2, 2, 5])
    pairs = list(combinations(range(5), 2))
    one, other = (np.array([np.sign(x[j] - x[i]) for i, j in pairs]) for x in (first, second))
    expected = (one @ other) / np.sqrt((one @ one) * (other @ other))
    assert agreement.kendall(first, second) == pytest.approx(expected)
    assert agreement.kendall(first, -first) == pytest.approx(-1)


def test_spearman_is_one_less_the_squared_distances_of_the_ranks():
    first, second = two_orders()
    expected = 1 - 6 * np.sum((first - second) ** 2) / (N_UNITS * (N_UNITS**2 - 1))
    assert agreement.spearman(first, second) == pytest.approx(expected)


def test_weighted_tau_punishes_a_swap_at_the_top_more_than_one_at_the_bottom():
    scores = np.arange(10, 0, -1)
    top, bottom = scores.copy(), scores.copy()
    top[:2], bottom[-2:] = top[1::-1], bottom[:-3:-1]
    weight = sum(1 / (r + 1) + 1 / (s + 1) for r, s in combinations(range(10), 2))
    assert agreement.weighted_tau(scores, top) == pytest.approx(1 - 2 * (1 + 1 / 2) / weight)
    assert agreement.weighted_tau(scores, bottom) == pytest.approx(1 - 2 * (1 / 9 + 1 / 10) / weight)
    assert agreement.kendall(scores, top) == pytest.approx(agreement.kendall(scores, bottom))


@pytest.mark.parametrize("measure", [agreement.kendall, agreement.spearman, agreement.weighted_tau])
def test_scores_that_are_all_equal_are_no_order(measure):
    assert np.isnan(measure(CONSTANT, np.arange(N_UNITS)))
    assert np.isnan(measure(np.arange(N_UNITS), CONSTANT))


@pytest.mark.parametrize("persistence", [0.0, 0.5, 0.9])
def test_rank_biased_overlap_is_the_direct_sum(persistence):
    first, second = two_orders()
    shared = direct_overlaps(first, second)
    for depth in (1, 5, N_UNITS):
        terms = [(1 - persistence) * persistence ** (d - 1) * shared[d - 1] / d for d in range(1, depth + 1)]
        beyond = persistence**depth * shared[depth - 1] / depth
        options = {"persistence": persistence, "depth": depth}
        found = agreement.rank_biased_overlap(first, second, **options)
        assert found == pytest.approx(sum(terms) + beyond)
        truncated = agreement.rank_biased_overlap(first, second, **options, extrapolated=False)
        assert truncated == pytest.approx(sum(terms))


def test_rank_biased_overlap_of_a_known_pair_and_of_equal_and_disjoint_heads():
    # 0.828 is what another implementation of the paper gives as its example
    first, second = np.array([0, 1, 2, 3, 4]), np.array([1, 2, 3, 0, 4])
    assert agreement.rank_biased_overlap(first, second, persistence=0.9) == pytest.approx(0.828, abs=5e-4)
    assert agreement.rank_biased_overlap(first, first, persistence=0.7) == pytest.approx(1)
    backwards = np.arange(10)[::-1]
    assert agreement.rank_biased_overlap(np.arange(10), backwards, persistence=0.7, depth=5) == 0


def test_rank_biased_overlap_of_random_orders_is_chance_on_average():
    found = [agreement.rank_biased_overlap(*two_orders(seed, 40), persistence=0.8) for seed in range(2000)]
    chance = agreement.chance_rank_biased_overlap(40, persistence=0.8)
    assert np.mean(found) == pytest.approx(chance, abs=4 * np.std(found) / np.sqrt(2000))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"persistence": 1.0}, "A persistence of 1.0 was asked for; at least 0 and below 1 was expected."),
        (
            {"persistence": 0.9, "depth": 13},
            "Depth 13 was asked for in orders of 12 units; 1 to 12 was expected.",
        ),
    ],
)
def test_a_reader_who_never_stops_and_a_depth_that_is_not_there_are_refused(options, message):
    with pytest.raises(SettingsError) as caught:
        agreement.rank_biased_overlap(*two_orders(), **options)
    assert str(caught.value) == message


def test_chance_of_jaccard_and_of_sharing_are_those_of_all_pairs_of_sets():
    k, n_units = 3, 8
    sets = [set(units) for units in combinations(range(n_units), k)]
    shared = np.array([len(a & b) for a in sets for b in sets])
    unions = np.array([len(a | b) for a in sets for b in sets])
    assert shared.mean() == pytest.approx(k**2 / n_units)
    assert agreement.chance_jaccard(k, n_units) == pytest.approx((shared / unions).mean())
    for least in range(k + 1):
        found = agreement.chance_of_sharing(np.array([least]), k, n_units)
        assert found[0] == pytest.approx((shared >= least).mean())


def test_the_first_hundred_of_768_units_share_thirteen_by_chance():
    random = stats.hypergeom(768, 100, 100)
    assert random.mean() == pytest.approx(100**2 / 768)
    found = agreement.chance_of_sharing(np.array([13, 14, 40]), 100, 768)
    assert found == pytest.approx(random.sf([12, 13, 39]))


def test_kuncheva_is_the_mean_over_pairs_of_sets():
    chosen, k, n_units = random_sets(5, 4, 11, seed=1), 4, 11
    sets = [set(np.flatnonzero(row).tolist()) for row in chosen]
    pairs = [(len(a & b) - k**2 / n_units) / (k - k**2 / n_units) for a, b in combinations(sets, 2)]
    assert agreement.kuncheva(chosen) == pytest.approx(np.mean(pairs))


def test_kuncheva_is_one_for_equal_sets_its_least_for_disjoint_ones_and_zero_by_chance():
    one = random_sets(1, 3, 9, seed=0)
    assert agreement.kuncheva(np.repeat(one, 4, axis=0)) == pytest.approx(1)
    disjoint = np.eye(3, dtype=bool).repeat(3, axis=1)  # three sets of three units
    assert agreement.kuncheva(disjoint) == pytest.approx(-3 / 6)
    assert agreement.kuncheva(random_sets(400, 6, 30, seed=2)) == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize("n_sets", [2, 7])
def test_stability_of_sets_of_one_size_is_kunchevas_index(n_sets):
    chosen = random_sets(n_sets, 4, 15, seed=3)
    found = agreement.nogueira(chosen)
    assert found.value == pytest.approx(agreement.kuncheva(chosen))
    assert (found.n, found.unit) == (n_sets, "stability")


def test_stability_of_sets_of_unequal_size_follows_its_definition():
    chosen = np.array([[1, 1, 0, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 0, 0]], dtype=bool)
    # each unit's variance with denominator 2: 0, 1/3, 1/3, 0, 0; the mean size is 2 of 5
    assert agreement.nogueira(chosen).value == pytest.approx(1 - (2 / 3 / 5) / (0.4 * 0.6))


def test_the_interval_of_stability_is_that_of_the_jackknife_and_covers_the_truth():
    rng = np.random.default_rng(4)
    likely = np.linspace(0.05, 0.95, 20)
    chosen = rng.random((200, 20)) < likely
    found = agreement.nogueira(chosen)
    without = np.array([agreement.nogueira(np.delete(chosen, i, axis=0)).value for i in range(200)])
    jackknife = np.sqrt(199 / 200 * np.sum((without - without.mean()) ** 2))
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * jackknife, rel=0.02)
    truth = 1 - np.mean(likely * (1 - likely)) / (likely.mean() * (1 - likely.mean()))
    held = []
    for _ in range(200):
        each = agreement.nogueira(rng.random((60, 20)) < likely)
        held.append(each.low <= truth <= each.high)
    assert np.mean(held) > 0.9


@pytest.mark.parametrize(
    "chosen",
    [
        np.ones((1, 4), dtype=bool),
        np.zeros((3, 4), dtype=bool),
        np.ones((3, 4), dtype=bool),
    ],
)
def test_one_set_and_sets_of_nothing_or_all_have_no_stability(chosen):
    with pytest.raises(SettingsError, match="two or more sets of one size between 1 and 3"):
        agreement.kuncheva(chosen)
    with pytest.raises(SettingsError, match="neither all empty nor all full"):
        agreement.nogueira(chosen)


def test_every_pair_of_methods_stands_in_the_table_once_for_each_layer_and_label():
    rng = np.random.default_rng(5)
    parts = [
        scores_table(20, layer, label, one=rng.random(20), two=rng.random(20), three=rng.random(20))
        for layer in range(2)
        for label in ("", "a")
    ]
    table = agreement.agreement_table(pd.concat(parts))
    assert table.columns.tolist() == list(agreement.AGREEMENT_COLUMNS[1:])
    assert len(table) == 2 * 2 * 3
    places = table[["layer", "label"]].drop_duplicates()
    pairs = table[["method", "other"]].drop_duplicates()
    assert places.to_numpy().tolist() == [[0, ""], [0, "a"], [1, ""], [1, "a"]]
    assert pairs.to_numpy().tolist() == [["one", "two"], ["one", "three"], ["two", "three"]]


def test_a_row_of_the_table_has_the_measures_of_its_pair():
    rng = np.random.default_rng(6)
    one, two = rng.random(30), rng.random(30)
    (row,) = agreement.agreement_table(scores_table(30, one=one, two=two)).to_dict("records")
    first, second = np.argsort(-one), np.argsort(-two)
    shared = len(set(first[:3].tolist()) & set(second[:3].tolist()))
    assert row["k"] == 3
    assert row["tau"] == pytest.approx(stats.kendalltau(one, two).statistic)
    overlaps = direct_overlaps(first, second)
    p = 2 / 3  # a reader who sees three units on average
    rbo = (1 - p) * sum(p ** (d - 1) * overlaps[d - 1] / d for d in range(1, 31)) + p**30
    assert row["rbo"] == pytest.approx(rbo)
    assert row["jaccard"] == pytest.approx(shared / (6 - shared))
    assert row["p"] == row["p_adjusted"] == pytest.approx(stats.hypergeom(30, 3, 3).sf(shared - 1))


def test_p_values_are_adjusted_over_the_whole_table():
    rng = np.random.default_rng(7)
    same = rng.random(40)
    table = agreement.agreement_table(scores_table(40, one=same, two=same, three=rng.random(40), four=rng.random(40)))
    assert table["p_adjusted"].tolist() == pytest.approx(stats.false_discovery_control(table["p"]).tolist())
    assert (table["p_adjusted"] >= table["p"]).all()


def test_a_ranking_without_an_order_has_no_agreement_and_does_not_count_as_a_test():
    rng = np.random.default_rng(8)
    scores = rng.random(20)
    table = agreement.agreement_table(scores_table(20, one=scores, two=scores, none=np.zeros(20)))
    of_none = table["other"] == "none"
    assert table.loc[of_none, ["tau", "rbo", "jaccard", "p", "p_adjusted"]].isna().all(axis=None)
    assert table.loc[~of_none, "p_adjusted"].tolist() == table.loc[~of_none, "p"].tolist()


def test_components_of_a_table_stay_apart_and_a_table_of_one_method_has_no_pairs():
    scores = np.random.default_rng(9).random(20)
    wide = scores_table(40, one=np.tile(scores, 2), two=-np.tile(scores, 2))
    tables = [scores_table(20, one=scores, two=scores).assign(component="residual"), wide.assign(component="mlp")]
    table = agreement.agreement_table(pd.concat(tables))
    assert table[["component", "k"]].to_numpy().tolist() == [["residual", 2], ["mlp", 4]]
    assert [round(tau, 6) for tau in table["tau"]] == [1, -1]
    assert agreement.agreement_table(scores_table(20, one=scores)).empty
    assert agreement.agreement_table(pd.DataFrame()).columns.tolist() == list(agreement.AGREEMENT_COLUMNS)


def test_a_wider_top_can_be_asked_for():
    scores = np.random.default_rng(10).random((2, 20))
    table = scores_table(20, one=scores[0], two=scores[1])
    assert [agreement.agreement_table(table, share=share)["k"].item() for share in (0.01, 0.1, 0.5)] == [1, 2, 10]
    assert all(a <= b for a, b in pairwise(agreement.shared_heads(*two_orders()).tolist()))
