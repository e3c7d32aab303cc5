from dataclasses import dataclass

import numpy as np
import pytest
from planted import B_UNIT, C_UNIT, planted_classifier, planted_examples
from scipy.optimize import minimize
from scipy.special import expit
from sklearn.cluster import AgglomerativeClustering
from sklearn.metrics import adjusted_rand_score

from synapse.errors import ConvergenceError, SettingsError
from synapse.ranking.base import Evidence, RankingMethod, for_every_class
from synapse.ranking.selection import (
    KSparse,
    L1Weight,
    RedundancyFiltered,
    SvmWeight,
    correlation_clusters,
)
from synapse.ranking.statistics import CohenD
from synapse.ranking.weights import LinearWeight
from synapse.recording import record
from synapse.types import Activations

WEIGHTS = [L1Weight(), SvmWeight(), KSparse()]


def evidence(values, targets, labels="abcd"):
    values, targets = np.asarray(values, dtype=np.float32), np.asarray(targets)
    logits = np.zeros((len(targets), len(labels)), dtype=np.float32)
    return Evidence(Activations(values, logits, targets, tuple(labels), "source"))


def some_evidence(n=80, n_units=6):
    """Two layers, and four classes of which the third has no example."""
    rng = np.random.default_rng(0)
    targets = rng.choice([0, 1, 3], size=n, p=[0.2, 0.3, 0.5])
    return evidence(rng.normal(size=(2, n, n_units)) * 5 + targets[:, None] * rng.normal(size=n_units), targets)


def inputs_and_sides(found, label):
    """Return standardised inputs, +1 or -1 for the side of each example, and balanced weights."""
    members = found.activations.targets == label
    x = found.activations.values[0].astype(float)
    weights = len(members) / 2 / np.where(members, members.sum(), (~members).sum())
    return (x - x.mean(axis=0)) / x.std(axis=0), np.where(members, 1.0, -1.0), weights


def test_l1_minimises_the_weighted_logistic_loss_with_an_l1_penalty():
    found = some_evidence()
    x, sides, weights = inputs_and_sides(found, 3)

    def objective(split):  # w = split[:6] - split[6:12], both parts positive; the intercept is nearly free
        margins = sides * (x @ (split[:6] - split[6:12]) + split[12])
        slope = -0.1 * weights * expit(-margins) * sides
        gradient = np.concatenate([x.T @ slope + 1, -x.T @ slope + 1, [slope.sum() + 0.01 * np.sign(split[12])]])
        return (0.1 * weights * np.logaddexp(0, -margins)).sum() + split[:12].sum() + 0.01 * abs(split[12]), gradient

    bounds = [(0, None)] * 12 + [(None, None)]
    best = minimize(objective, np.full(13, 0.1), jac=True, bounds=bounds, options={"ftol": 1e-15, "gtol": 1e-9})
    signed = L1Weight().rank(found).signed[0, 4]
    np.testing.assert_allclose(signed, best.x[:6] - best.x[6:12], atol=1e-4)
    assert (signed == 0).any()


def test_svm_minimises_the_weighted_squared_hinge():
    found = some_evidence()
    x, sides, weights = inputs_and_sides(found, 3)

    def objective(parameters):
        short = np.maximum(0, 1 - sides * (x @ parameters[:6] + parameters[6]))
        slope = -0.2 * weights * short * sides
        penalty = parameters * [1, 1, 1, 1, 1, 1, 1e-4]
        return 0.1 * (weights * short**2).sum() + parameters @ penalty / 2, np.append(
            x.T @ slope, slope.sum()
        ) + penalty

    best = minimize(objective, np.zeros(7), jac=True, options={"gtol": 1e-10})
    np.testing.assert_allclose(SvmWeight().rank(found).signed[0, 4], best.x[:6], atol=1e-4)


def test_k_sparse_is_the_ridge_logistic_regression_on_the_units_whose_means_differ_most():
    found = some_evidence()
    x, sides, weights = inputs_and_sides(found, 3)
    raw = found.activations.values[0].astype(float)
    difference = np.abs(raw[sides > 0].mean(axis=0) - raw[sides < 0].mean(axis=0))
    chosen = np.argsort(-difference)[:3]

    def objective(parameters):
        margins = sides * (x[:, chosen] @ parameters[:3] + parameters[3])
        slope = -weights * expit(-margins) * sides / len(sides)
        penalty = 0.01 * parameters * [1, 1, 1, 0]
        value = (weights * np.logaddexp(0, -margins)).mean() + parameters @ penalty / 2
        return value, np.append(x[:, chosen].T @ slope, slope.sum()) + penalty

    best = minimize(objective, np.zeros(4), jac=True, options={"gtol": 1e-12})
    expected = np.zeros(6)
    expected[chosen] = best.x[:3]
    ranking = KSparse(k=3).rank(found)
    np.testing.assert_allclose(ranking.signed[0, 4], expected, atol=1e-6)
    assert (ranking.scores[0, 4] > 0).sum() == 3


@pytest.mark.parametrize("method", WEIGHTS, ids=lambda method: method.name)
def test_the_global_score_is_the_mean_over_the_classes_that_have_examples(method):
    scores = method.rank(some_evidence()).scores
    np.testing.assert_allclose(scores[:, 0], scores[:, [1, 2, 4]].mean(axis=1))


@pytest.mark.parametrize("method", [*WEIGHTS, RedundancyFiltered()], ids=lambda method: method.name)
def test_the_planted_neuron_comes_first_for_its_class(method):
    ranking = method.rank(Evidence(record(planted_classifier(), planted_examples(300, seed=1))))
    for layer in (0, 1):
        assert ranking.order(layer, "b")[0] == B_UNIT
        assert ranking.order(layer, "c")[0] == C_UNIT
        assert set(ranking.order(layer)[:2]) == {B_UNIT, C_UNIT}


@pytest.mark.parametrize("method", WEIGHTS, ids=lambda method: method.name)
def test_constant_neurons_score_nothing_and_fits_come_out_the_same_again(method):
    found = some_evidence()
    values = found.activations.values.copy()
    values[:, :, 2] = 0.1
    constant = evidence(values, found.activations.targets)
    assert (method.rank(constant).scores[:, :, 2] == 0).all()
    np.testing.assert_array_equal(method.rank(constant).scores, method.rank(constant).scores)


def test_repeated_neurons_share_a_ridge_weight():
    values = some_evidence().activations.values.copy()
    values[:, :, 4] = values[:, :, 1]
    for method in (SvmWeight(), KSparse()):
        scores = method.rank(evidence(values, some_evidence().activations.targets)).scores
        np.testing.assert_allclose(scores[:, :, 4], scores[:, :, 1], rtol=1e-4)


@pytest.mark.parametrize("method", [*WEIGHTS, RedundancyFiltered()], ids=lambda method: method.name)
@pytest.mark.parametrize("targets", [[0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 3], [0, 3], [0, 1, 2, 3]])
def test_classes_of_few_examples_and_more_units_than_examples_give_finite_scores(method, targets):
    values = np.random.default_rng(1).normal(size=(2, len(targets), 9))
    scores = method.rank(evidence(values, targets)).scores
    assert np.isfinite(scores).all()
    absent = [1 + c for c in range(4) if c not in targets]
    assert (scores[:, absent] == 0).all()


@pytest.mark.parametrize("method", WEIGHTS, ids=lambda method: method.name)
def test_a_single_class_has_nothing_to_be_told_from(method):
    values = np.random.default_rng(1).normal(size=(2, 5, 9))
    assert (method.rank(evidence(values, [1] * 5)).scores == 0).all()


@pytest.mark.parametrize("method", WEIGHTS, ids=lambda method: method.name)
def test_separable_classes_have_finite_weights(method):
    values = np.random.default_rng(1).normal(size=(1, 40, 3))
    values[0, 20:, 1] += 100
    ranking = method.rank(evidence(values, np.repeat([0, 1], 20), "ab"))
    assert np.isfinite(ranking.scores).all()
    assert ranking.order(0, "a")[0] == 1


def grouped_values(n=400):
    """Units 0, 1 and 2 say nearly the same, as 3 and 4 do up to the sign; 5 stands alone and 6 is constant."""
    rng = np.random.default_rng(0)
    a, b, c = rng.normal(size=(3, n))
    noise = 0.1 * rng.normal(size=(3, n))
    return np.stack([a, a + noise[0], a + noise[1], b, noise[2] - b, c, np.ones(n)], axis=1)


def test_clusters_join_what_correlates_up_to_the_sign():
    clusters = correlation_clusters(grouped_values(), 0.3)
    assert adjusted_rand_score([0, 0, 0, 1, 1, 2, 3], clusters) == 1


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.8])
def test_clusters_are_those_of_scikit_learn(threshold):
    rng = np.random.default_rng(1)
    values = rng.normal(size=(50, 8)) @ rng.normal(size=(8, 40)) + rng.normal(size=(50, 40))
    theirs = AgglomerativeClustering(None, metric="precomputed", linkage="average", distance_threshold=threshold)
    expected = theirs.fit_predict(1 - np.abs(np.corrcoef(values, rowvar=False)))
    assert adjusted_rand_score(expected, correlation_clusters(values, threshold)) == 1


@dataclass(frozen=True)
class Given(RankingMethod):
    """Scores that are given: the same for all classes."""

    given: tuple[float, ...]

    @property
    def name(self):
        return "given"

    def scores(self, evidence):
        return for_every_class(evidence, np.array([self.given]))


def test_the_first_of_each_group_stands_before_all_others():
    found = evidence(grouped_values()[None], np.repeat([0, 1], 200), "ab")
    # by these the order is 3, 1, 4, 0, 2, 5, 6
    ranking = RedundancyFiltered(Given((4.0, 6.0, 3.0, 7.0, 5.0, 2.0, 1.0))).rank(found)
    for label in ("", "a", "b"):
        assert ranking.order(0, label).tolist() == [3, 1, 5, 6, 4, 0, 2]
    np.testing.assert_array_equal(ranking.scores[0, 0], [-2, 6, -3, 7, -1, 2, 1])


def test_of_repeated_neurons_the_lower_index_stands_for_all():
    values = grouped_values()[None, :, [0, 3, 0, 3]]
    ranking = RedundancyFiltered(Given((1.0, 1.0, 1.0, 1.0))).rank(evidence(values, np.repeat([0, 1], 200), "ab"))
    assert ranking.order(0).tolist() == [0, 1, 2, 3]


def test_each_class_has_a_representative_of_its_own_and_the_signs_stay():
    found = some_evidence()
    inner, filtered = CohenD().rank(found), RedundancyFiltered(CohenD()).rank(found)
    np.testing.assert_array_equal(filtered.signed, inner.signed)
    first = correlation_clusters(found.activations.values[1], 0.3)
    assert len(set(first)) == 6  # nothing to filter, so nothing moves
    np.testing.assert_array_equal(filtered.scores, inner.scores)


def test_what_the_other_method_needs_is_asked_for():
    with pytest.raises(SettingsError, match="The ranking 'linear' was given no probes; pass `probes=`."):
        RedundancyFiltered(LinearWeight()).rank(some_evidence())


def test_parameters_are_told_apart_by_name_and_checked():
    assert RedundancyFiltered().name == "redundancy-filtered"
    assert RedundancyFiltered(CohenD(), 0.5).name == "redundancy-filtered-cohen-d-0.5"
    assert [method.name for method in WEIGHTS] == ["l1", "svm", "k-sparse"]
    assert [L1Weight(1.0).name, SvmWeight(1.0).name, KSparse(8, 0.1).name] == ["l1-1", "svm-1", "k-sparse-8-0.1"]
    with pytest.raises(SettingsError, match="^The threshold of the clusters is 1.0; give a distance between 0 and 1"):
        RedundancyFiltered(threshold=1.0).rank(some_evidence())
    with pytest.raises(SettingsError, match="^k is 0; give a number above 0.$"):
        KSparse(k=0).rank(some_evidence())
    with pytest.raises(SettingsError, match="^inverse_penalty is -1.0; give a number above 0.$"):
        L1Weight(-1.0).rank(some_evidence())


def test_a_fit_that_stops_early_is_refused(monkeypatch):
    monkeypatch.setattr("synapse.ranking.selection.MOST_ITERATIONS", 1)
    with pytest.raises(ConvergenceError, match="^A LogisticRegression on layer 0 did not reach its optimum"):
        L1Weight().rank(some_evidence())
