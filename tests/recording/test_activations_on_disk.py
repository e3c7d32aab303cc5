"""Activations that lie on disk: everything that reads activations gives what it gives of those in memory."""

import numpy as np
import pandas as pd
import pytest
from planted import LABELS, hidden_classifier, planted_classifier, planted_examples
from recorder import small_windows

from synapse.attack.head import FittedStep, redirect_head
from synapse.attack.logits import shift_attacks
from synapse.errors import SettingsError
from synapse.perturb.activations import Clamp, ClassMean, Mean, Noise, Patch, Quantise, Resample
from synapse.probe.controls import evaluate_probes, refit_on
from synapse.probe.description import description_length, learning_curve
from synapse.probe.probe import fit_joint_probes, fit_probes, refit_probes
from synapse.ranking import METHODS, rank
from synapse.ranking.bootstrap import rank_stability
from synapse.recording import record
from synapse.sweeping import sweep
from synapse.types import Activations, Neurons

TRAIN, TEST = planted_examples(90, seed=1), planted_examples(61, seed=2)


@pytest.fixture(scope="module", params=["residual", "mlp"])
def recorded(request, tmp_path_factory):
    """A classifier, and its activations of two splits: (in memory, on disk) each."""
    classifier = planted_classifier() if request.param == "residual" else hidden_classifier()
    with pytest.MonkeyPatch.context() as patch:
        small_windows(patch, 16)
        keep = tmp_path_factory.mktemp("kept")
        pairs = [
            tuple(record(classifier, examples, component=request.param, keep=folder) for folder in (None, keep))
            for examples in (TRAIN, TEST)
        ]
    assert not isinstance(pairs[0][1].values, np.ndarray)
    return classifier, *pairs


@pytest.fixture(scope="module")
def probes(recorded):
    return fit_probes(recorded[1][0], seed=0)


def assert_equal(one, other):
    """Assert that two results are the same to 1e-12, whatever they are made of."""
    if isinstance(one, Activations):
        return
    if isinstance(one, np.ndarray):
        np.testing.assert_allclose(np.asarray(other), one, rtol=1e-12, atol=1e-12)
    elif isinstance(one, pd.DataFrame):
        pd.testing.assert_frame_equal(one, other, rtol=1e-12)
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_equal(a, b)
    elif isinstance(one, dict):
        assert_equal(list(one.items()), list(other.items()))
    elif hasattr(one, "__dataclass_fields__"):
        assert type(one) is type(other)
        for name in one.__dataclass_fields__:
            assert_equal(getattr(one, name), getattr(other, name))
    elif isinstance(one, float):
        assert other == pytest.approx(one, rel=1e-12, abs=1e-12, nan_ok=True)
    else:
        assert one == other


@pytest.mark.parametrize("fit", [fit_probes, fit_joint_probes])
def test_probes_are_the_same(recorded, fit):
    _, (memory, disk), _ = recorded
    assert_equal(fit(memory, seed=0), fit(disk, seed=0))


def test_probes_of_what_the_model_says_are_the_same(recorded):
    _, (memory, disk), _ = recorded
    assert_equal(fit_probes(memory, target="model"), fit_probes(disk, target="model"))


@pytest.mark.parametrize("method", METHODS)
def test_rankings_are_the_same(recorded, probes, method):
    classifier, pair, _ = recorded
    assert_equal(*(ranked_or_refused(each, method, probes, classifier) for each in pair))


def ranked_or_refused(activations, method, probes, classifier):
    try:
        return rank(activations, method=method, probes=probes, classifier=classifier, examples=TRAIN)
    except SettingsError as error:  # values below 0, or another width than the head's
        return str(error)


@pytest.mark.parametrize("method", ["cumulative-mass", "probeless"])
def test_the_stability_of_rankings_is_the_same(recorded, probes, method):
    _, (memory, disk), _ = recorded
    one, other = (rank_stability(each, method=method, probes=probes, draws=3, seed=1) for each in (memory, disk))
    assert_equal(one, other)


def test_what_probes_are_worth_is_the_same(recorded, probes):
    _, (train, train_disk), (test, test_disk) = recorded
    shuffled = np.random.default_rng(1).permutation(train.targets)
    control = np.random.default_rng(2).permutation(test.targets)
    one = evaluate_probes(probes, refit_probes(probes, train, shuffled), test, control)
    other = evaluate_probes(probes, refit_probes(probes, train_disk, shuffled), test_disk, control)
    assert_equal(one, other)


def test_lengths_of_description_and_learning_curves_are_the_same(recorded):
    _, (train, train_disk), (test, test_disk) = recorded
    assert_equal(description_length(train), description_length(train_disk))
    assert_equal(learning_curve(train, test), learning_curve(train_disk, test_disk))


def test_probes_of_some_neurons_are_the_same(recorded, probes):
    _, (memory, disk), _ = recorded
    neurons = [Neurons(layer, (5, 9), memory.component) for layer in range(memory.n_layers)]
    assert_equal(refit_on(probes, memory, neurons), refit_on(probes, disk, neurons))


def test_attacks_are_the_same(recorded):
    classifier, (train, train_disk), (test, test_disk) = recorded
    weight = classifier.head_weight().numpy()
    in_memory, on_disk = (
        redirect_head(FittedStep(), *pair, weight, seed=0) for pair in ((train, test), (train_disk, test_disk))
    )
    assert_equal(in_memory, on_disk)
    assert_equal(shift_attacks(test, seed=0), shift_attacks(test_disk, seed=0))


def test_a_sweep_with_it_as_reference_is_the_same(recorded, probes):
    classifier, (memory, disk), _ = recorded
    ranking = rank(memory, method="linear", probes=probes)
    one, other = (
        sweep(classifier, TEST, ranking, reference=each, fractions=(0.1, 1.0), seed=3) for each in (memory, disk)
    )
    np.testing.assert_array_equal(one.logits, other.logits)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Mean, {}),
        (Noise, {"strength": 1.0}),
        (Resample, {"seed": 3}),
        (Clamp, {"low": 0.1, "high": 0.9}),
        (Quantise, {"bits": 3}),
        (ClassMean, {"label": LABELS[1]}),
        (Patch, {"example": 17}),
    ],
)
def test_interventions_with_its_numbers_are_the_same(recorded, kind, options):
    classifier, (memory, disk), _ = recorded
    neurons, predicted = Neurons(0, (5, 9, 2), memory.component), []
    for each in (memory, disk):
        with classifier.edited(kind.of(neurons, each, **options)):
            predicted.append(classifier.predict(TEST))
    np.testing.assert_array_equal(*predicted)


def test_the_values_derived_from_it_are_the_same(recorded):
    _, (memory, disk), _ = recorded
    for name in ("unit_mean", "unit_deviation", "predictions", "known_logits", "n_layers", "width"):
        np.testing.assert_array_equal(getattr(memory, name), getattr(disk, name))
    assert len(memory) == len(disk) == 90
    rows = np.array([3, 88, 3])
    one, other = memory.take(rows), disk.take(rows)
    assert_equal(one.values, other.values)
    assert_equal(one.features, other.features)
    assert isinstance(other.values, np.ndarray)
