import itertools
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from planted import B_UNIT, C_UNIT, planted_classifier, planted_examples

from synapse.errors import DataError, SettingsError
from synapse.probe.probe import Probe, Probes, fit_probes
from synapse.ranking import METHODS, Evidence, Ranking, RankingMethod, Scores, rank
from synapse.ranking.weights import CumulativeMass, LinearWeight
from synapse.recording import record
from synapse.testing import check_ranking
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


@pytest.fixture(scope="module")
def evidence():
    """What methods may ask for, of a model in which a neuron carries class b and another one class c."""
    classifier, examples = planted_classifier(), planted_examples(300, seed=1)
    train = record(classifier, examples)
    return {"activations": train, "probes": fit_probes(train), "classifier": classifier, "examples": examples}


@pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
def test_every_method_holds_the_contract_and_puts_the_planted_neurons_first(method, evidence):
    if method.name in POSITIVE:
        with pytest.raises(SettingsError, match="negative"):
            check_ranking(method, **evidence)
        return
    planted = None if method.name in NULLS else {"b": B_UNIT, "c": C_UNIT}
    check_ranking(method, **evidence, planted=planted)


@pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
def test_a_class_that_nobody_has_scores_nothing(method, evidence):
    if method.name in NULLS:
        return  # they know no classes
    classifier, examples = evidence["classifier"], evidence["examples"]
    examples = examples.take(np.flatnonzero(evidence["activations"].targets != 2))
    train = record(classifier, examples)
    if method.name in POSITIVE:
        train = replace(train, values=np.abs(train.values))
    check_ranking(method, train, probes=fit_probes(train), classifier=classifier, examples=examples)


@dataclass(frozen=True)
class Broken(RankingMethod):
    """Breaks one clause of the contract."""

    how: str

    @property
    def name(self):
        return "" if self.how == "name" else "broken"

    def scores(self, evidence):
        values = np.random.default_rng(None if self.how == "again" else 0).random((2, 4, 16))
        if self.how == "shape":
            values = values[:, :3]
        if self.how == "finite":
            values[0, 0, 0] = np.nan
        if self.how == "activations":
            evidence.activations.values[0, 0, 0] += 1
        if self.how == "model":
            with torch.no_grad():
                evidence.model[0].module.head.bias += 1
        return Scores(values)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("name", "Broken has no name."),
        ("shape", "Broken gives scores of shape (2, 3, 16); (2, 4, 16) was expected."),
        ("finite", "Broken gives scores that are not finite."),
        ("again", "Broken gives other scores when it is asked again: draw from a seed of its own."),
        ("activations", "Broken changes the activations in place."),
        ("model", "Broken does not leave the model as it was."),
        ("planted", "puts unit"),
    ],
)
def test_a_method_that_breaks_a_clause_is_told_which(how, message):
    classifier, examples = planted_classifier(), planted_examples(30, seed=1)
    with pytest.raises(AssertionError) as caught:
        check_ranking(
            Broken(how), record(classifier, examples), classifier=classifier, examples=examples, planted={"b": B_UNIT}
        )
    assert message in str(caught.value)


def test_what_a_method_needs_must_be_given(evidence):
    train, other = evidence["activations"], planted_examples(30, seed=9)
    with pytest.raises(SettingsError, match="The ranking 'linear' was given no probes; pass `probes=`"):
        rank(train, method="linear")
    with pytest.raises(SettingsError, match="was given no classifier; pass `classifier=` and `examples=`"):
        rank(train, method="head-weight")
    with pytest.raises(DataError, match="pass the examples that were recorded"):
        rank(train, method="head-weight", classifier=evidence["classifier"], examples=other)


def test_states_that_are_not_finite_are_refused_by_every_method(evidence):
    train = evidence["activations"]
    values = train.values.copy()
    values[1, 3, 2] = np.nan
    for method in METHODS:
        with pytest.raises(DataError, match="Activations of layer 1 hold NaN or infinite values"):
            rank(**{**evidence, "activations": replace(train, values=values)}, method=method)


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
