import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from planted import B_UNIT, C_UNIT, hidden_classifier, planted_classifier, planted_examples

from synapse.errors import SettingsError
from synapse.probe.probe import Probe, Probes, fit_probes
from synapse.ranking.base import Evidence
from synapse.ranking.weights import CumulativeMass, HardThreshold, HeadWeight, LinearWeight
from synapse.recording import record
from synapse.types import Activations


def some_evidence(weights):
    """One layer, whose probe has these weights."""
    weights = np.asarray(weights, dtype=float)
    n_labels, n_units = weights.shape
    labels = tuple("abcdefgh"[:n_labels])
    values, logits = np.zeros((1, 2, n_units), dtype=np.float32), np.zeros((2, n_labels), dtype=np.float32)
    probe = Probe(
        0,
        weights,
        np.zeros(n_labels),
        np.zeros(n_units),
        np.ones(n_units),
        penalty=0.1,
        l1_ratio=0.5,
        gradient_norm=0.0,
        converged=True,
    )
    probes = Probes((probe,), labels, "source")
    return Evidence(Activations(values, logits, np.array([0, 1]), labels, "source"), probes)


def searched_blocks(weights, steps):
    """The published search: at each share of the mass, what the smallest prefix that reaches it adds."""
    weights = np.abs(weights)
    block = np.full(weights.shape[1], steps)
    for step in reversed(range(steps + 1)):
        for row in weights:
            covered = 0.0
            for unit in sorted(range(len(row)), key=lambda unit: -row[unit]):
                block[unit] = step
                covered += row[unit]
                if covered >= step / steps * row.sum():
                    break
    return block


def test_linear_max_is_the_largest_weight_of_any_class():
    ranking = LinearWeight("max").rank(some_evidence([[1.0, -5, 0], [-2, 3, 1]]))
    np.testing.assert_array_equal(ranking.scores[0], [[2, 5, 1], [1, 5, 0], [2, 3, 1]])
    np.testing.assert_array_equal(ranking.signed[0, 1:], [[1, -5, 0], [-2, 3, 1]])
    assert ranking.method == "linear-max"


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("steps", [7, 100])
def test_blocks_are_those_of_the_published_search(seed, steps):
    rng = np.random.default_rng(seed)
    found = some_evidence(rng.laplace(size=(rng.integers(2, 7), rng.integers(5, 200))))
    blocks = CumulativeMass().blocks(found.probes, steps)
    np.testing.assert_array_equal(blocks[0], searched_blocks(found.probes[0].weights, steps))
    order = CumulativeMass().rank(found).order(0)
    assert (np.diff(blocks[0][order]) >= 0).all()


NEUROX = json.loads(Path(__file__).with_name("neurox_blocks.json").read_text())
"""What `get_neuron_ordering` of NeuroX 1.0.9 gave for `neurox_weights`: the cut-off that each neuron came in with."""


def neurox_weights(case):
    return np.random.default_rng(case["seed"]).standard_t(3, size=(case["labels"], case["units"]))


@pytest.mark.parametrize("case", NEUROX["cases"], ids=lambda case: f"{case['labels']}x{case['units']}")
def test_blocks_are_those_that_neurox_gave(case):
    found = some_evidence(neurox_weights(case))
    np.testing.assert_array_equal(CumulativeMass().blocks(found.probes, case["steps"]), [case["blocks"]])


def test_the_order_of_neurox_s_own_test_comes_out():
    ranking = CumulativeMass().rank(some_evidence([[4.0, 1, 5], [1, 1, 10]]))
    assert ranking.order(0).tolist() == [2, 0, 1]


@pytest.mark.parametrize("case", NEUROX["cases"], ids=lambda case: f"{case['labels']}x{case['units']}")
def test_neurox_gives_what_was_kept_of_it(case):
    linear_probe = pytest.importorskip("neurox.interpretation.linear_probe", reason="NeuroX is not installed")
    probe = SimpleNamespace(parameters=lambda: iter([torch.from_numpy(neurox_weights(case))]))
    classes = {str(label): label for label in range(case["labels"])}
    order, cuts = linear_probe.get_neuron_ordering(probe, classes, search_stride=case["steps"])
    blocks = np.searchsorted(cuts, np.arange(case["units"]), side="right")
    assert np.array(case["blocks"])[np.array(order, dtype=int)].tolist() == blocks.tolist()


def test_blocks_of_exact_shares():
    # masses before the units: 0, 1/2, 3/4 and 0, 3/4, 7/8 (in the order 2, 0, 1)
    found = some_evidence([[2.0, 1, 1], [1, 1, 6]])
    np.testing.assert_array_equal(CumulativeMass().blocks(found.probes, 4), [[0, 3, 0]])


def test_neurons_without_weight_enter_with_the_last_block():
    found = some_evidence([[1.0, 0, 1], [0, 0, 0]])
    np.testing.assert_array_equal(CumulativeMass().blocks(found.probes, 10), [[0, 10, 6]])
    with pytest.raises(SettingsError, match="^The share of the mass was to grow in 0 steps; give 1 or more"):
        CumulativeMass().blocks(found.probes, 0)


def test_hard_threshold_scores_what_is_above_a_share_of_the_largest_weight():
    ranking = HardThreshold().rank(some_evidence([[4.0, -3, 2, 1], [0, 1, 0, 10]]))
    chosen = np.where(ranking.scores[0] > 1e-9, ranking.scores[0], 0)
    np.testing.assert_array_equal(chosen, [[1, 0.75, 0, 1], [1, 0.75, 0, 0], [0, 0, 0, 1]])
    # beyond the set, the list goes on by weight
    assert ranking.top(4, layer=0, label="a").units == (0, 1, 2, 3)
    assert ranking.top(4, layer=0, label="b").units == (3, 1, 0, 2)


@pytest.mark.parametrize("fraction", [1.5, 2.0, 10.0])
def test_hard_threshold_chooses_the_published_set(fraction):
    weights = np.random.default_rng(0).normal(size=(3, 40))
    ranking = HardThreshold(fraction).rank(some_evidence(weights))
    sets = [{unit for unit in range(40) if abs(row[unit]) > max(abs(row)) / fraction} for row in weights]
    for row, expected in enumerate([set.union(*sets), *sets]):
        assert set(np.flatnonzero(ranking.scores[0, row] > 1 / fraction)) == expected


def test_a_class_without_weights_scores_nothing():
    assert (HardThreshold().rank(some_evidence([[1.0, 2], [0, 0]])).scores[0, 2] == 0).all()
    with pytest.raises(SettingsError, match="^The fraction is 1.0, so no weight is above the largest one over it"):
        HardThreshold(1.0).rank(some_evidence([[1.0, 2], [0, 0]]))


@pytest.mark.parametrize("method", [LinearWeight("max"), HardThreshold()])
def test_the_planted_neuron_comes_first_for_its_class(method):
    train = record(planted_classifier(), planted_examples(300, seed=1))
    ranking = method.rank(Evidence(train, fit_probes(train)))
    for layer in (0, 1):
        assert ranking.order(layer, "b")[0] == B_UNIT
        assert ranking.order(layer, "c")[0] == C_UNIT
        assert set(ranking.order(layer)[:2]) == {B_UNIT, C_UNIT}


def test_head_weight_is_the_norm_of_what_the_head_reads_of_a_neuron():
    # the head reads unit B for class b and unit C for class c, each times 4, and nothing else
    classifier, examples = planted_classifier(), planted_examples(20, seed=1)
    ranking = HeadWeight().rank(Evidence(record(classifier, examples), classifier=classifier, examples=examples))
    expected = [4.0 if unit in (B_UNIT, C_UNIT) else 0.0 for unit in range(16)]
    np.testing.assert_array_equal(ranking.scores, np.tile(expected, (2, 4, 1)))


def test_head_weight_takes_the_norm_over_the_labels():
    classifier, examples = planted_classifier(), planted_examples(20, seed=1)
    activations = record(classifier, examples)
    weight = classifier.head_weight()  # shares its memory with the module, which is this test's own
    weight[:, 2] = weight.new_tensor([1.0, -2.0, 2.0])
    ranking = HeadWeight().rank(Evidence(activations, classifier=classifier, examples=examples))
    assert math.isclose(ranking.scores[1, 0, 2], 3.0)


def test_head_weight_is_refused_for_a_component_of_another_width():
    classifier, examples = hidden_classifier(), planted_examples(20, seed=1)
    hidden = record(classifier, examples, component="mlp")
    with pytest.raises(SettingsError) as caught:
        HeadWeight().rank(Evidence(hidden, classifier=classifier, examples=examples))
    assert str(caught.value) == (
        "The component 'mlp' has 24 units and the head reads 16, so no weight of the head belongs to a unit; use a "
        "component of that width, or another method."
    )
    with pytest.raises(SettingsError, match="'head-weight' was given no classifier"):
        HeadWeight().rank(Evidence(hidden))
