import numpy as np
import pytest
from planted import B_UNIT, C_UNIT, planted_classifier, planted_examples
from scipy.special import logsumexp
from scipy.stats import entropy, multivariate_normal

from synapse.errors import DataError, SettingsError
from synapse.ranking import rank
from synapse.ranking.gaussian import GaussianProbe, greedy_gaussian
from synapse.recording import record
from synapse.types import Activations


def correlated(n, width, n_classes, *, seed, scale=1.0):
    """Gaussian classes of their own mean and covariance, units of very different scale."""
    random = np.random.default_rng(seed)
    targets = random.integers(0, n_classes, size=n)
    mixing = random.normal(size=(n_classes, width, width)) / np.sqrt(width) + np.eye(width)
    means = 0.5 * random.normal(size=(n_classes, width))
    values = np.einsum("nu,nuv->nv", random.normal(size=(n, width)), mixing[targets]) + means[targets]
    return scale * values * np.exp(random.normal(size=width)) + random.normal(size=width), targets


def recorded(values, targets, n_labels):
    logits = np.zeros((len(targets), n_labels), dtype=np.float32)
    return Activations(values[None].astype(np.float32), logits, targets, tuple("abcdefgh"[:n_labels]), "train")


def brute_force(values, targets, held_out, dimensions):
    """The published search: for each candidate set and class a new multivariate normal of scipy."""
    fitted, known, judged, truth = values[~held_out], targets[~held_out], values[held_out], targets[held_out]
    classes, width = np.unique(known), values.shape[1]
    means, covariances, priors = {}, {}, {}
    for c in classes:
        x = fitted[known == c]
        n, scatter = len(x), (len(x) - 1) * np.cov(x.T)
        means[c], priors[c] = x.mean(axis=0), n / len(known)
        covariances[c] = (np.diag(x.var(axis=0)) + scatter) / ((width + 2) + n + width + 2)
    bits = entropy(np.bincount(truth), base=2)

    def information(units):
        joint = np.stack(
            [
                np.log(priors[c])
                + multivariate_normal(means[c][units], covariances[c][np.ix_(units, units)]).logpdf(judged[:, units])
                for c in classes
            ]
        )
        own = joint[np.searchsorted(classes, truth), np.arange(len(truth))]
        return bits + np.mean(own - logsumexp(joint, axis=0)) / np.log(2)

    chosen, reached, alone = [], [], None
    for _ in range(dimensions):
        found = [-np.inf if j in chosen else information([*chosen, j]) for j in range(width)]
        alone = found if alone is None else alone
        chosen.append(int(np.argmax(found)))
        reached.append(max(found))
    return chosen, reached, alone, bits


@pytest.mark.parametrize(
    ("n", "width", "n_classes", "dimensions"), [(300, 12, 3, 12), (400, 30, 4, 6), (60, 30, 2, 8), (25, 30, 3, 5)]
)
def test_units_and_information_are_those_of_the_brute_force_search(n, width, n_classes, dimensions):
    values, targets = correlated(n, width, n_classes, seed=n)

    found = greedy_gaussian(values, targets, dimensions=dimensions)
    chosen, reached, alone, bits = brute_force(values, targets, found.held_out, dimensions)

    np.testing.assert_array_equal(found.units, chosen)
    np.testing.assert_allclose(found.information, reached, rtol=0, atol=1e-8)
    np.testing.assert_allclose(found.alone, alone, rtol=0, atol=1e-8)
    assert found.entropy == pytest.approx(bits, abs=1e-12)
    np.testing.assert_allclose(found.normalised, np.array(reached) / bits, atol=1e-8)


def test_a_class_row_is_the_search_for_the_class_against_the_rest():
    values, targets = correlated(200, 10, 3, seed=5)
    activations = recorded(values, targets, 4)

    ranking = rank(activations, method=GaussianProbe(dimensions=4))
    held_out = greedy_gaussian(activations.values[0], targets).held_out
    chosen, _, alone, _ = brute_force(activations.values[0].astype(float), (targets == 1).astype(int), held_out, 4)

    rest = [int(j) for j in np.argsort(-np.array(alone)) if j not in chosen]
    np.testing.assert_array_equal(ranking.order(0, "b"), chosen + rest)
    assert not ranking.scores[0, 4].any()  # no example of d


def test_the_order_is_the_selection_and_then_the_information_of_each_unit_alone():
    values, targets = correlated(200, 10, 3, seed=6)
    activations = recorded(values, targets, 3)

    scores = rank(activations, method=GaussianProbe(dimensions=3)).scores[0, 0]
    selection = greedy_gaussian(activations.values[0], targets, dimensions=3)

    np.testing.assert_array_equal(scores[selection.units], [3, 2, 1])
    others = np.setdiff1d(np.arange(10), selection.units)
    assert (scores[others] < 1).all()
    np.testing.assert_array_equal(np.argsort(-scores[others]), np.argsort(-selection.alone[others]))


def test_the_planted_neurons_come_first():
    train = record(planted_classifier(), planted_examples(300, seed=1))
    ranking = rank(train, method=GaussianProbe(dimensions=5))
    for layer in (0, 1):
        assert ranking.order(layer, "b")[0] == B_UNIT
        assert ranking.order(layer, "c")[0] == C_UNIT
        assert set(ranking.order(layer)[:2].tolist()) == {B_UNIT, C_UNIT}


def test_a_unit_that_says_the_class_has_all_of_its_entropy():
    random = np.random.default_rng(0)
    targets = np.repeat(np.arange(4), 50)
    values = random.normal(size=(200, 3)) + np.array([0.0, 100.0, 0.0]) * targets[:, None]

    found = greedy_gaussian(values, targets, dimensions=1)

    assert found.units.tolist() == [1]
    assert found.entropy == pytest.approx(2.0)  # four classes, ten held out of each
    assert found.normalised[0] == pytest.approx(1.0, abs=1e-6)
    assert np.bincount(targets[found.held_out]).tolist() == [10, 10, 10, 10]


def test_shift_and_scale_of_units_change_nothing():
    values, targets = correlated(150, 8, 3, seed=2)
    factors = np.array([1e-6, 1e6, 1, -2, 3, 1e3, -1e-3, 5])

    one, two = (greedy_gaussian(x, targets, dimensions=8) for x in (values, values * factors + 7 * factors))

    np.testing.assert_array_equal(one.units, two.units)
    np.testing.assert_allclose(one.information, two.information, atol=1e-8)


def test_of_duplicated_units_the_lower_index_comes_first():
    values, targets = correlated(150, 70, 3, seed=3)
    best = int(greedy_gaussian(values, targets, dimensions=1).units[0])
    doubled = np.concatenate([values, values], axis=1)
    activations = recorded(doubled, targets, 3)

    found = greedy_gaussian(doubled, targets, dimensions=20)
    order = rank(activations, method=GaussianProbe(dimensions=5)).order(0)

    assert found.units[0] == best
    place = np.argsort(order)
    assert (place[:70] < place[70:]).all()


def test_constant_units_are_never_taken_and_come_last():
    values, targets = correlated(150, 6, 3, seed=4)
    values[:, [1, 4]] = 0.1

    found = greedy_gaussian(values, targets, dimensions=6)
    activations = recorded(values, targets, 3)

    assert sorted(found.units.tolist()) == [0, 2, 3, 5]
    assert np.isneginf(found.alone[[1, 4]]).all()
    assert rank(activations, method=GaussianProbe(dimensions=2)).order(0)[-2:].tolist() == [1, 4]
    assert greedy_gaussian(np.ones((9, 2)), np.arange(9) % 3).units.tolist() == []


def test_a_unit_that_is_constant_within_a_class_is_worth_what_it_says():
    # as a hidden unit behind a ReLU that is silent in all classes but one
    random = np.random.default_rng(1)
    targets = np.arange(120) % 2
    values = random.normal(size=(120, 4))
    values[:, 2] = targets * (1 + random.random(120))

    found = greedy_gaussian(values, targets, dimensions=4)

    assert found.units[0] == 2
    assert found.normalised[0] == pytest.approx(1.0, abs=1e-6)
    assert np.isfinite(found.information).all()


def test_classes_of_few_examples_and_fewer_examples_than_units_are_ranked():
    random = np.random.default_rng(2)
    targets = np.array([0] * 10 + [1] * 8 + [2] * 2 + [3])
    values = random.normal(size=(21, 40))
    values[:, 7] += 30 * targets

    ranking = rank(recorded(values, targets, 5), method=GaussianProbe(dimensions=10))
    held_out = greedy_gaussian(values, targets).held_out

    assert np.isfinite(ranking.scores).all()
    assert ranking.order(0)[0] == ranking.order(0, "a")[0] == 7
    assert np.bincount(targets[held_out]).tolist() == [2, 2, 1]  # the only example of d is needed for the fit
    assert not ranking.scores[0, 5].any()


def test_two_classes_share_one_order():
    values, targets = correlated(100, 9, 2, seed=7)

    scores = rank(recorded(values, targets, 2), method=GaussianProbe(dimensions=4)).scores

    np.testing.assert_array_equal(scores[0, 1:], scores[0, [0, 0]])


def test_one_class_has_nothing_to_say():
    values, targets = np.random.default_rng(0).normal(size=(20, 5)), np.ones(20, dtype=int)

    found = greedy_gaussian(values, targets, dimensions=2)

    assert not rank(recorded(values, targets, 2), method=GaussianProbe()).scores.any()
    np.testing.assert_allclose(found.information, 0, atol=1e-12)
    np.testing.assert_array_equal(found.normalised, 0)


def test_what_cannot_be_judged_is_refused():
    values = np.random.default_rng(0).normal(size=(3, 5))
    with pytest.raises(DataError) as caught:
        greedy_gaussian(values, np.arange(3))
    assert str(caught.value) == (
        "No class of the 3 examples occurs twice, so none can be held out: give more examples."
    )
    with pytest.raises(SettingsError, match=r"^0 dimensions were asked for: ask for at least 1\.$"):
        greedy_gaussian(values, np.zeros(3, dtype=int), dimensions=0)
    with pytest.raises(SettingsError, match=r"^holdout is 1\.0: give a share between 0 and 1, for example 0\.2\.$"):
        greedy_gaussian(values, np.zeros(3, dtype=int), holdout=1.0)
