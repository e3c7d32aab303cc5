import numpy as np
import pandas as pd
import pytest
from planted import B_UNIT, C_UNIT, planted_classifier, planted_examples
from sklearn.feature_selection import mutual_info_classif
from sklearn.metrics import average_precision_score, jaccard_score, mutual_info_score, roc_auc_score

from synapse.errors import SettingsError
from synapse.ranking.base import Evidence
from synapse.ranking.information import (
    AveragePrecision,
    IntersectionOverUnion,
    MutualInformation,
    NeighbourInformation,
    RocAuc,
)
from synapse.recording import record
from synapse.types import Activations

METHODS = [
    MutualInformation(),
    NeighbourInformation(),
    AveragePrecision(),
    RocAuc(),
    IntersectionOverUnion(),
]
PRESENT = (0, 1, 3)


def evidence(values, targets, labels="abcd"):
    values, targets = np.asarray(values, dtype=np.float32), np.asarray(targets)
    logits = np.zeros((len(targets), len(labels)), dtype=np.float32)
    return Evidence(Activations(values, logits, targets, tuple(labels), "source"))


def some_evidence(n=120, n_units=6, decimals=None):
    """Two layers, and four classes of which the third has no example; rounded values have ties."""
    rng = np.random.default_rng(0)
    targets = rng.choice(PRESENT, size=n, p=[0.2, 0.3, 0.5])
    values = rng.normal(size=(2, n, n_units)) + 0.5 * targets[:, None] * rng.normal(size=n_units)
    return evidence(values if decimals is None else values.round(decimals), targets)


def binned_information(column, groups, bins):
    cut = pd.qcut(column, bins, labels=False)
    return mutual_info_score(groups, cut) - (bins - 1) * (len(np.unique(groups)) - 1) / (2 * len(column))


@pytest.mark.parametrize("bins", [4, 10])
def test_mutual_information_is_that_of_scikit_learn_on_quantile_bins(bins):
    found = some_evidence()
    scores = MutualInformation(bins).rank(found).scores
    values, targets = found.activations.values[1], found.activations.targets
    for row, groups in [(0, targets), *((1 + c, targets == c) for c in PRESENT)]:
        expected = [binned_information(column, groups, bins) for column in values.T]
        np.testing.assert_allclose(scores[1, row], expected, atol=1e-12)


def test_equal_values_share_a_bin_and_only_bins_in_use_count_as_bias():
    # half of the values are 0, so of four bins the second stays empty
    values = np.array([0.0, 0, 0, 0, 1, 2, 3, 4])
    targets = [0, 0, 0, 1, 1, 1, 1, 1]
    score = MutualInformation(bins=4).rank(evidence(values[None, :, None], targets, "ab")).scores[0, 0, 0]
    assert score == pytest.approx(mutual_info_score(targets, [0, 0, 0, 0, 2, 2, 3, 3]) - 2 * 1 / (2 * 8))


def test_information_of_a_copy_of_the_class_is_its_entropy():
    targets = np.repeat([0, 1], [250, 750])
    score = MutualInformation().rank(evidence(targets[None, :, None], targets, "ab")).scores[0, :, 0]
    entropy = -(0.25 * np.log(0.25) + 0.75 * np.log(0.75))
    np.testing.assert_allclose(score, entropy - 1 / 2000, atol=1e-12)


def test_neighbour_information_is_that_of_scikit_learn():
    found = some_evidence(n=60)
    scores = NeighbourInformation(neighbours=4, seed=7).rank(found).scores
    values, targets = found.activations.values[0], found.activations.targets
    for row, groups in [(0, targets), *((1 + c, targets == c) for c in PRESENT)]:
        expected = mutual_info_classif(values, groups, discrete_features=False, n_neighbors=4, random_state=7)
        np.testing.assert_allclose(scores[0, row], expected, atol=1e-12)


@pytest.mark.parametrize("decimals", [None, 0])
def test_average_precision_is_that_of_scikit_learn_in_the_better_direction(decimals):
    found = some_evidence(decimals=decimals)
    ranking = AveragePrecision().rank(found)
    values, targets = found.activations.values[1], found.activations.targets
    for label in PRESENT:
        high = [average_precision_score(targets == label, column) for column in values.T]
        low = [average_precision_score(targets == label, -column) for column in values.T]
        np.testing.assert_allclose(ranking.scores[1, 1 + label], np.maximum(high, low), atol=1e-12)
        np.testing.assert_array_equal(ranking.signed[1, 1 + label] > 0, np.greater_equal(high, low))


@pytest.mark.parametrize("decimals", [None, 0])
def test_roc_auc_is_that_of_scikit_learn_less_a_half(decimals):
    found = some_evidence(decimals=decimals)
    ranking = RocAuc().rank(found)
    values, targets = found.activations.values[0], found.activations.targets
    for label in PRESENT:
        expected = np.array([roc_auc_score(targets == label, column) for column in values.T]) - 0.5
        np.testing.assert_allclose(ranking.signed[0, 1 + label], expected, atol=1e-12)
        np.testing.assert_allclose(ranking.scores[0, 1 + label], np.abs(expected), atol=1e-12)


@pytest.mark.parametrize("quantile", [0.5, 0.9])
def test_iou_is_the_jaccard_score_of_high_values_and_class(quantile):
    found = some_evidence(decimals=1)
    scores = IntersectionOverUnion(quantile).rank(found).scores
    values, targets = found.activations.values[0], found.activations.targets
    for label in PRESENT:
        expected = [jaccard_score(targets == label, column >= np.quantile(column, quantile)) for column in values.T]
        np.testing.assert_allclose(scores[0, 1 + label], expected)


@pytest.mark.parametrize("method", [AveragePrecision(), RocAuc(), IntersectionOverUnion()])
def test_the_global_score_is_the_mean_over_the_classes_that_have_examples(method):
    scores = method.rank(some_evidence()).scores
    np.testing.assert_allclose(scores[:, 0], scores[:, [1, 2, 4]].mean(axis=1))


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_the_planted_neuron_comes_first_for_its_class(method):
    ranking = method.rank(Evidence(record(planted_classifier(), planted_examples(300, seed=1))))
    for layer in (0, 1):
        assert ranking.order(layer, "b")[0] == B_UNIT
        assert ranking.order(layer, "c")[0] == C_UNIT
        assert set(ranking.order(layer)[:2]) == {B_UNIT, C_UNIT}


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_repeated_neurons_score_alike_and_the_lower_index_comes_first(method):
    values = some_evidence(decimals=1).activations.values.copy()
    values[:, :, 4] = values[:, :, 1]
    ranking = method.rank(evidence(values, some_evidence().activations.targets))
    np.testing.assert_array_equal(ranking.scores[:, :, 4], ranking.scores[:, :, 1])
    order = ranking.order(0).tolist()
    assert order.index(4) == order.index(1) + 1


def test_a_constant_neuron_tells_nothing():
    found = some_evidence()
    targets = found.activations.targets
    constant = evidence(np.full((1, len(targets), 2), 0.1), targets)
    shares = np.array([(targets == c).mean() for c in range(4)])
    for method in (MutualInformation(), NeighbourInformation(), RocAuc(), IntersectionOverUnion()):
        assert (method.rank(constant).scores == 0).all()
    # every example is above any threshold: what is left is the share of the class
    np.testing.assert_allclose(AveragePrecision().rank(constant).scores[0, 1:, 0], shares)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("targets", [[0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 3], [0, 3], [0, 1, 2, 3]])
def test_classes_of_few_examples_and_more_units_than_examples_give_finite_scores(method, targets):
    values = np.random.default_rng(1).normal(size=(2, len(targets), 9))
    scores = method.rank(evidence(values, targets)).scores
    assert np.isfinite(scores).all()
    absent = [1 + c for c in range(4) if c not in targets]
    assert (scores[:, absent] == 0).all()


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_a_single_class_has_nothing_to_be_told_from(method):
    values = np.random.default_rng(1).normal(size=(2, 5, 9))
    assert (method.rank(evidence(values, [1] * 5)).scores == 0).all()


def test_parameters_are_told_apart_by_name_and_checked():
    assert MutualInformation(5).name == "mutual-information-5-bins"
    assert NeighbourInformation(5).name == "mutual-information-5nn"
    assert IntersectionOverUnion(0.995).name == "iou-0.995"
    with pytest.raises(SettingsError, match="^1 bins were asked for; give 2 or more, for example 10.$"):
        MutualInformation(1).rank(some_evidence())
    with pytest.raises(SettingsError, match="^0 neighbours were asked for; give 1 or more, for example 3.$"):
        NeighbourInformation(0).rank(some_evidence())
    with pytest.raises(SettingsError, match="^The quantile is 1.5; give a number between 0 and 1, for example 0.9.$"):
        IntersectionOverUnion(1.5).rank(some_evidence())
