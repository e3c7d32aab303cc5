import numpy as np
import pandas as pd
import pytest
from planted import B_UNIT, C_UNIT, planted_classifier, planted_examples
from scipy.stats import ttest_ind
from sklearn.feature_selection import f_classif

from synapse.errors import SettingsError
from synapse.ranking.base import Evidence
from synapse.ranking.statistics import (
    LARGEST,
    AnovaF,
    ClassSelectivity,
    CohenD,
    MeanDifference,
    MeanMagnitude,
    Probeless,
    Variance,
)
from synapse.recording import record
from synapse.types import Activations

# The nulls know no labels, so no neuron is planted for them.
METHODS = [Probeless(), MeanDifference(), CohenD(), AnovaF(), ClassSelectivity(absolute=True)]
NULLS = [Variance(), MeanMagnitude()]


def evidence(values, targets, labels="abcd"):
    values, targets = np.asarray(values, dtype=np.float32), np.asarray(targets)
    logits = np.zeros((len(targets), len(labels)), dtype=np.float32)
    return Evidence(Activations(values, logits, targets, tuple(labels), "source"))


def some_evidence(n=60, n_units=7):
    """Two layers, and four classes of which the third has no example."""
    rng = np.random.default_rng(0)
    targets = rng.choice([0, 1, 3], size=n, p=[0.2, 0.3, 0.5])
    return evidence(rng.normal(size=(2, n, n_units)) + 0.3 * targets[:, None] * rng.normal(size=n_units), targets)


def by(method, found):
    ranking = method.rank(found)
    assert ranking.scores.shape == (found.activations.n_layers, found.n_rankings, found.activations.width)
    return ranking


def test_mean_difference_is_that_of_the_groups_of_a_table():
    found = some_evidence()
    ranking = by(MeanDifference(), found)
    frame = pd.DataFrame(found.activations.values[1]).astype(float)
    means = frame.groupby(found.activations.targets == 3).mean()
    np.testing.assert_allclose(ranking.signed[1, 4], means.loc[True] - means.loc[False], atol=1e-12)
    np.testing.assert_array_equal(ranking.scores[:, 1:], np.abs(ranking.signed[:, 1:]))


def test_cohen_d_is_the_t_statistic_over_the_root_of_the_group_sizes():
    found = some_evidence()
    values, members = found.activations.values[0].astype(float), found.activations.targets == 1
    t = ttest_ind(values[members], values[~members]).statistic
    expected = t * np.sqrt(1 / members.sum() + 1 / (~members).sum())
    np.testing.assert_allclose(by(CohenD(), found).signed[0, 2], expected, atol=1e-10)


@pytest.mark.parametrize("method", [MeanDifference(), CohenD()])
def test_the_global_score_is_the_mean_over_the_classes_that_have_examples(method):
    scores = by(method, some_evidence()).scores
    np.testing.assert_allclose(scores[:, 0], scores[:, [1, 2, 4]].mean(axis=1))


def test_anova_f_is_that_of_scikit_learn_globally_and_for_each_class():
    found = some_evidence()
    values, targets = found.activations.values.astype(float), found.activations.targets
    scores = by(AnovaF(), found).scores
    for layer in range(2):
        np.testing.assert_allclose(scores[layer, 0], f_classif(values[layer], targets)[0], rtol=1e-9)
        for label in (0, 1, 3):
            expected = f_classif(values[layer], targets == label)[0]
            np.testing.assert_allclose(scores[layer, 1 + label], expected, rtol=1e-9)


def test_means_far_from_zero_cost_no_precision():
    found = some_evidence()
    far = evidence(found.activations.values + 10_000, found.activations.targets)
    values, members = far.activations.values[0].astype(float), far.activations.targets == 3
    t = ttest_ind(values[members], values[~members]).statistic
    np.testing.assert_allclose(by(AnovaF(), far).scores[0, 4], t**2, rtol=1e-9)


def test_class_selectivity_compares_the_class_means():
    # means of the three units for class a: 3, 0, 1; for class b: 1, 0, 1; for class c: 0, 0, 4
    values = [[[2, 0, 1], [4, 0, 1], [1, 0, 1], [1, 0, 1], [0, 0, 3], [0, 0, 5]]]
    ranking = by(ClassSelectivity(), evidence(values, [0, 0, 1, 1, 2, 2], "abc"))
    np.testing.assert_allclose(ranking.scores[0, 0], [2.5 / 3.5, 0, 3 / 5])
    np.testing.assert_allclose(ranking.scores[0, 2], [-0.5 / 2.5, 0, -1.5 / 3.5])


def test_class_selectivity_is_refused_where_activations_are_negative():
    found = evidence([[[1.0], [-2.5]]], [0, 1], "ab")
    with pytest.raises(SettingsError) as caught:
        ClassSelectivity().rank(found)
    assert str(caught.value) == (
        "An activation of the component 'residual' is -2.5, and class selectivity is only defined where none is "
        "negative; use ClassSelectivity(absolute=True), which reads magnitudes, or another method."
    )
    magnitudes = evidence([[[1.0], [2.5]]], [0, 1], "ab")
    absolute = ClassSelectivity(absolute=True).rank(found)
    np.testing.assert_array_equal(absolute.scores, ClassSelectivity().rank(magnitudes).scores)


def test_the_nulls_are_the_moments_of_a_table_whatever_the_class():
    found = some_evidence()
    frame = pd.DataFrame(found.activations.values[1]).astype(float)
    for row in range(5):
        np.testing.assert_allclose(by(Variance(), found).scores[1, row], frame.var(ddof=0), rtol=1e-9)
        np.testing.assert_allclose(by(MeanMagnitude(), found).scores[1, row], frame.mean().abs(), atol=1e-12)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_the_planted_neuron_comes_first_for_its_class(method):
    ranking = method.rank(Evidence(record(planted_classifier(), planted_examples(300, seed=1))))
    for layer in (0, 1):
        assert ranking.order(layer, "b")[0] == B_UNIT
        assert ranking.order(layer, "c")[0] == C_UNIT
        assert set(ranking.order(layer)[:2]) == {B_UNIT, C_UNIT}


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_constant_and_repeated_neurons_have_defined_scores(method):
    found = some_evidence()
    values = found.activations.values.copy()
    values[:, :, 2], values[:, :, 5] = 0.1, values[:, :, 1]
    ranking = by(method, evidence(values, found.activations.targets))
    assert (ranking.scores[:, :, 2] == 0).all()
    np.testing.assert_array_equal(ranking.scores[:, :, 5], ranking.scores[:, :, 1])
    order = ranking.order(0).tolist()
    assert order.index(5) == order.index(1) + 1


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("targets", [[0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 3], [0, 3], [0, 1, 2, 3]])
def test_classes_of_few_examples_and_more_units_than_examples_give_finite_scores(method, targets):
    values = np.random.default_rng(1).normal(size=(2, len(targets), 9))
    scores = by(method, evidence(values, targets)).scores
    assert np.isfinite(scores).all()
    assert (scores[:, 0] > 0).all()
    absent = [1 + c for c in range(4) if c not in targets]
    assert (scores[:, absent] == 0).all()


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_a_single_class_has_nothing_to_be_told_from(method):
    values = np.random.default_rng(1).normal(size=(2, 5, 9))
    assert (by(method, evidence(values, [1] * 5)).scores == 0).all()


@pytest.mark.parametrize("method", [CohenD(), AnovaF()], ids=lambda method: method.name)
def test_neurons_without_spread_in_any_class_get_the_largest_score(method):
    # the second unit is the class itself, the third varies within the classes
    values = [[[0.1, 0.0, 0.0], [0.1, 0.0, 1.0], [0.1, 0.7, 1.0], [0.1, 0.7, 2.0]]]
    scores = by(method, evidence(values, [0, 0, 1, 1], "ab")).scores[0]
    np.testing.assert_array_equal(scores[:, :2], [[0, LARGEST]] * 3)
    assert (scores[:, 2] > 0).all()
    assert (scores[:, 2] < 10).all()


@pytest.mark.parametrize("method", METHODS + NULLS, ids=lambda method: method.name)
def test_the_ranking_is_known_by_the_name_of_its_method(method):
    assert by(method, some_evidence()).method == method.name
