"""Data at which methods break: every one of them has a defined answer there."""

from dataclasses import replace

import numpy as np
import pytest

from synapse.probe.probe import fit_probes
from synapse.ranking import METHODS, rank
from synapse.testing import check_ranking
from synapse.types import Activations

OF_STATES = sorted(name for name, method in METHODS.items() if "classifier" not in method.needs)
"""Methods that can be asked without a model."""

KNOW_NO_CLASSES = {"random", "variance", "mean-magnitude"}
ASK_FOR_POSITIVE = {"class-selectivity"}

CONSTANT, FIRST, TWIN = 0, 1, 2


def hard_activations():
    """Twelve examples of twenty neurons: one constant, two alike that separate class a, and class c of two examples."""
    rng = np.random.default_rng(0)
    targets = np.array([0] * 5 + [1] * 5 + [2] * 2)
    values = rng.normal(size=(1, 12, 20)).astype(np.float32)
    values[:, :, CONSTANT] = 0.1
    values[:, :, FIRST] = values[:, :, TWIN] = np.where(targets == 0, 5.0, -5.0) + 0.1 * values[:, :, FIRST]
    logits = rng.normal(size=(12, 4)).astype(np.float32)
    return Activations(values, logits, targets, ("a", "b", "c", "nobody"), "hard")


def asked(method):
    """Return what a method is asked about: magnitudes, where it refuses states with a sign."""
    train = hard_activations()
    return replace(train, values=np.abs(train.values)) if method in ASK_FOR_POSITIVE else train


@pytest.mark.parametrize("method", sorted(set(OF_STATES) - KNOW_NO_CLASSES))
def test_few_examples_of_many_neurons_hold_the_contract(method):
    train = asked(method)
    check_ranking(METHODS[method], train, probes=fit_probes(train))


# Magnitudes hide the sign that separates the classes; the L1 penalty leaves no weight at so few examples; and without
# one of two neurons that are alike a probe loses nothing.
SEE_NO_DIFFERENCE = {"class-selectivity", "class-selectivity-absolute", "l1", "probe-removal"}


@pytest.mark.parametrize("method", sorted(set(OF_STATES) - {"random", "mean-magnitude"} - SEE_NO_DIFFERENCE))
def test_a_neuron_that_never_changes_is_never_before_one_that_separates_the_classes(method):
    train = asked(method)
    ranking = rank(train, method=method, probes=fit_probes(train))
    for label in ("", "a"):
        order = ranking.order(0, label).tolist()
        assert order.index(CONSTANT) > order.index(FIRST)


@pytest.mark.parametrize("method", sorted(set(OF_STATES) - {"random"}))
def test_of_two_neurons_that_are_alike_the_first_is_not_behind_the_second(method):
    train = asked(method)
    ranking = rank(train, method=method, probes=fit_probes(train))
    for row in (0, 1):
        first, twin = ranking.scores[0, row, [FIRST, TWIN]]
        assert first >= twin - 1e-6 * abs(twin)


@pytest.mark.parametrize("method", OF_STATES)
def test_examples_of_a_single_class_have_finite_scores(method):
    train = asked(method)
    one = replace(train, targets=np.zeros(12, dtype=np.int64), values=np.abs(train.values))
    assert np.isfinite(rank(one, method=method, probes=fit_probes(train)).scores).all()
