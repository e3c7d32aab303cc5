import itertools

import numpy as np
import pytest
from planted import B_UNIT, C_UNIT, planted_classifier, planted_examples

from synapse.errors import SettingsError
from synapse.probe.probe import Probe, Probes, fit_probes
from synapse.ranking import METHODS, Evidence, Ranking, rank
from synapse.ranking.weights import CumulativeMass, LinearWeight
from synapse.recording import record
from synapse.types import Activations


def some_activations(n_units=3):
    values = np.zeros((1, 2, n_units), dtype=np.float32)
    return Activations(values, np.zeros((2, 2), dtype=np.float32), np.array([0, 1]), ("a", "b"), "source")


def order(method, weights):
    """Return the global order that a method gives one layer whose probe has these weights."""
    weights = np.asarray(weights, dtype=float)
    n_labels, n_units = weights.shape
    zeros, ones = np.zeros(n_units), np.ones(n_units)
    probe = Probe(
        0,
        weights,
        np.zeros(n_labels),
        zeros,
        ones,
        penalty=0.1,
        l1_ratio=0.5,
        gradient_norm=0.0,
        converged=True,
    )
    probes = Probes((probe,), tuple("abcdefgh"[:n_labels]), "source")
    return method.rank(Evidence(some_activations(n_units), probes)).order(0)


def blocks_by_search(weights, steps=100):
    """The published rule: sweep the share p of the mass, and add the union over classes of their top neurons."""
    weights = np.abs(weights)
    block = np.full(weights.shape[1], steps)
    for step in range(steps - 1, -1, -1):
        for row in weights:
            ranked = np.argsort(-row, kind="stable")
            before = np.cumsum(row[ranked]) - row[ranked]
            chosen = ranked[before <= step / steps * row.sum() + 1e-12]
            block[chosen] = step
    return block


def test_cumulative_mass_gives_the_published_example():
    # Fixture of the ordering's first implementation.
    np.testing.assert_array_equal(order(CumulativeMass(), [[4.0, 1, 5], [1, 1, 10]]), [2, 0, 1])


@pytest.mark.parametrize("seed", range(20))
def test_cumulative_mass_never_contradicts_the_search_over_shares(seed):
    rng = np.random.default_rng(seed)
    weights = rng.laplace(size=(rng.integers(2, 7), rng.integers(5, 300)))
    block = blocks_by_search(weights)
    assert (np.diff(block[order(CumulativeMass(), weights)]) >= 0).all()


def test_linear_is_the_mean_absolute_weight():
    weights = np.random.default_rng(0).normal(size=(3, 50))
    np.testing.assert_array_equal(order(LinearWeight(), weights), np.argsort(-np.abs(weights).mean(axis=0)))


def test_probeless_is_the_sum_over_pairs_of_class_means():
    train = record(planted_classifier(), planted_examples(30, seed=1))
    ranking = rank(train, probes=fit_probes(train), method="probeless")
    means = [train.values[1][train.targets == c].mean(axis=0) for c in range(3)]
    pairs = [np.abs(means[a] - means[b]) for a, b in itertools.combinations(range(3), 2)]
    np.testing.assert_allclose(ranking.scores[1, 0], np.sum(pairs, axis=0), atol=1e-6)
    np.testing.assert_allclose(ranking.scores[1, 2], pairs[0] + pairs[2], atol=1e-6)


NULLS = {"random", "variance", "mean-magnitude", "head-weight"}
"""They know no classes."""

POSITIVE = {"class-selectivity"}
"""Refuses states with a sign; its sibling that reads magnitudes stands in."""


@pytest.mark.parametrize("method", sorted(METHODS.keys() - NULLS - POSITIVE))
def test_the_planted_neuron_comes_first_for_its_class(method):
    classifier, examples = planted_classifier(), planted_examples(300, seed=1)
    train = record(classifier, examples)
    ranking = rank(train, probes=fit_probes(train), method=method, classifier=classifier, examples=examples)
    for layer in (0, 1):
        assert ranking.order(layer, "b")[0] == B_UNIT
        assert ranking.order(layer, "c")[0] == C_UNIT
        assert set(ranking.order(layer)[:2]) == {B_UNIT, C_UNIT}


def some_ranking():
    return Ranking("made-up", np.random.default_rng(1).random((2, 4, 20)), ("a", "b", "c"), "source")


def test_top_bottom_and_random_sets():
    ranking = some_ranking()
    full = ranking.order(1, "b")
    assert ranking.top(3, layer=1, label="b").units == tuple(full[:3])
    assert ranking.top(0.1, layer=1, label="b").units == tuple(full[:2])
    assert ranking.bottom(3, layer=1, label="b").units == tuple(full[::-1][:3])
    assert set(ranking.top(15, layer=0).units) | set(ranking.bottom(5, layer=0).units) == set(range(20))
    assert ranking.random(5, layer=0, seed=1) == ranking.random(5, layer=0, seed=1)
    assert ranking.random(5, layer=0, seed=1) != ranking.random(5, layer=0, seed=2)
    assert len(ranking.top(0.001, layer=0)) == 1


def test_overlap_is_the_jaccard_index():
    ranking = some_ranking()
    assert ranking.overlap(ranking, 5, layer=0) == 1
    reverse = Ranking("reverse", -ranking.scores, ranking.labels, "source")
    assert ranking.overlap(reverse, 10, layer=0) == 0
    assert ranking.overlap(reverse, 12, layer=0) == pytest.approx(4 / 20)


def test_the_frame_lists_every_rank_of_every_layer_and_class():
    frame = some_ranking().to_frame()
    assert len(frame) == 2 * 4 * 20
    row = frame[(frame["layer"] == 1) & (frame["label"] == "c") & (frame["rank"] == 0)].iloc[0]
    assert row["unit"] == some_ranking().order(1, "c")[0]


def test_unknown_names_and_sizes_are_refused():
    ranking = some_ranking()
    with pytest.raises(SettingsError, match="no class 'bb'.*Did you mean 'b'"):
        ranking.order(0, "bb")
    with pytest.raises(SettingsError, match="Layer 2 was asked for"):
        ranking.order(2)
    with pytest.raises(SettingsError, match="21 neurons were asked for"):
        ranking.top(21, layer=0)
    with pytest.raises(SettingsError, match="1.5 neurons were asked for; a share"):
        ranking.top(1.5, layer=0)
    with pytest.raises(SettingsError, match="no ranking method 'probles'.*Did you mean 'probeless'"):
        rank(some_activations(), probes=Probes((), ("a", "b"), "source"), method="probles")
