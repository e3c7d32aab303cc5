"""The effect of a single neuron is what plain hooks give, one neuron and one example at a time."""

import numpy as np
import pytest
import torch
from planted import (
    B_UNIT,
    C_UNIT,
    LABELS,
    planted_classifier,
    planted_examples,
    random_classifier,
    random_examples,
    token_preprocess,
)
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, recall_score
from test_gradients import hooks_of, mean_reader, named, ranked, unchecked

from synapse.errors import ModelError, SettingsError
from synapse.model.resume import run_logits
from synapse.probe.probe import Probe, Probes, fit_probes
from synapse.ranking import effects, rank
from synapse.ranking.effects import CausalEffect, ProbeRemoval
from synapse.recording import record
from synapse.types import Activations

METHODS = [CausalEffect(), CausalEffect("mean"), CausalEffect("resample", seed=3)]
ROW = {"bert": 0, "distilbert": 0, "deberta": 0, "gpt2": -1}


def margin(logits, label):
    return logits[label] - max(value for c, value in enumerate(logits) if c != label)


def lost_by_hand(classifier, examples, place, side, row, stand_ins):
    """Return (example, unit): what the margin of each example, alone and unpadded, loses without each unit.

    All neurons of an example are copies of it side by side in one pass of the plain module.
    """
    found = []
    for position, (text, name) in enumerate(zip(examples.inputs, examples.labels, strict=True)):
        label, values = LABELS.index(name), stand_ins[position]
        inputs = token_preprocess([text])
        copies = {key: value.expand(len(values), -1) for key, value in inputs.items()}

        def edited(states, values=values):
            states, units = states.clone(), torch.arange(len(values))
            if states.ndim == 3:
                states[units, row, units] = torch.from_numpy(values)
            else:
                states[units, units] = torch.from_numpy(values)
            return states

        def at_output(_module, _arguments, output, edited=edited):
            return (edited(output[0]), *output[1:]) if isinstance(output, tuple) else edited(output)

        def at_input(_module, arguments, edited=edited):
            return (edited(arguments[0]), *arguments[1:])

        with torch.no_grad():
            clean = classifier.module(**inputs).logits[0].numpy()
            handle = (
                place.register_forward_hook(at_output)
                if side == "output"
                else place.register_forward_pre_hook(at_input)
            )
            without = classifier.module(**copies).logits.numpy()
            handle.remove()
        found.append([margin(clean, label) - margin(logits, label) for logits in without])
    return np.array(found)


def assert_rows(ranking, layer, lost, examples, tolerance=1e-4):
    labels = np.array(examples.labels)
    np.testing.assert_allclose(ranking.signed[layer, 0], lost.mean(axis=0), atol=tolerance)
    for c, label in enumerate(LABELS):
        np.testing.assert_allclose(ranking.signed[layer, 1 + c], lost[labels == label].mean(axis=0), atol=tolerance)


@named(METHODS)
def test_the_planted_neurons_come_first(method):
    ranking = ranked(planted_classifier(), planted_examples(60, seed=1), method)
    for layer in (0, 1):
        assert ranking.order(layer, "b")[0] == B_UNIT
        assert ranking.order(layer, "c")[0] == C_UNIT
        assert set(ranking.order(layer)[:2]) == {B_UNIT, C_UNIT}


@pytest.mark.parametrize("architecture", ["bert", "distilbert", "deberta", "gpt2"])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_the_effect_of_zeroing_is_that_of_plain_hooks(architecture, layer, caplog):
    examples, classifier = random_examples(9, seed=4), random_classifier(architecture)
    ranking = ranked(classifier, examples, CausalEffect(layers=(layer,)))
    zeros = np.zeros((len(examples), classifier.width), dtype=np.float32)
    lost = lost_by_hand(classifier, examples, classifier.blocks[layer], "output", ROW[architecture], zeros)
    assert_rows(ranking, layer, lost, examples)
    assert not caplog.records
    assert not np.delete(ranking.scores, layer, axis=0).any()
    np.testing.assert_array_equal(ranking.scores, ranking.signed)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_the_effect_of_the_mean_is_that_of_plain_hooks_inside_a_block(layer):
    examples, classifier = random_examples(9, seed=4), random_classifier()
    recorded = record(classifier, examples, component="mlp")
    ranking = rank(recorded, method=CausalEffect("mean"), classifier=classifier, examples=examples)
    means = np.tile(recorded.values[layer].mean(axis=0), (len(examples), 1))
    place = classifier.blocks[layer].output.dense
    assert_rows(ranking, layer, lost_by_hand(classifier, examples, place, "input", 0, means), examples)


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_at_the_input_of_the_final_map_the_effect_has_a_closed_form(architecture, monkeypatch):
    examples, classifier = random_examples(12, seed=2), random_classifier(architecture)
    recorded = record(classifier, examples, component="pooler")

    def refuse(*_arguments):
        raise AssertionError("blocks or head were run")

    monkeypatch.setattr(effects, "run_logits", refuse)
    ranking = rank(recorded, method=CausalEffect(), classifier=classifier, examples=examples)
    weight = classifier.final.weight.detach().numpy()
    lost = [
        [margin(z, y) - margin(z - weight[:, j] * x[j], y) for j in range(len(x))]
        for x, z, y in zip(recorded.features, recorded.logits, recorded.targets, strict=True)
    ]
    assert_rows(ranking, 0, np.array(lost), examples)


def test_where_the_head_reads_several_rows_all_of_them_are_replaced():
    examples, classifier = random_examples(9, seed=1), mean_reader()
    recorded = record(classifier, examples)
    ranking = rank(recorded, method=CausalEffect("mean"), classifier=classifier, examples=examples)
    weight, x = classifier.module.head.weight.detach().numpy(), recorded.values[1]
    lost = [
        [margin(z, y) - margin(z - weight[:, j] * (x[i, j] - recorded.row_mean[1, j]), y) for j in range(8)]
        for i, (z, y) in enumerate(zip(recorded.logits, recorded.targets, strict=True))
    ]
    assert_rows(ranking, 1, np.array(lost), examples)


def test_resampling_takes_the_value_of_a_recorded_example():
    examples, classifier = random_examples(9, seed=4), random_classifier()
    recorded = record(classifier, examples)
    method = CausalEffect("resample", layers=(1,), seed=5)
    ranking = rank(recorded, method=method, classifier=classifier, examples=examples)
    assert (ranking.signed[1] != ranked(classifier, examples, CausalEffect("mean")).signed[1]).any()

    # where all recorded examples agree, the donor is known
    alike = np.tile(recorded.values.mean(axis=1, keepdims=True), (1, len(examples), 1))
    fields = {"logits": recorded.logits, "targets": recorded.targets, "labels": LABELS, "source": recorded.source}
    ranking = rank(Activations(alike, **fields), method=method, classifier=classifier, examples=examples)
    lost = lost_by_hand(classifier, examples, classifier.blocks[1], "output", 0, alike[1])
    assert_rows(ranking, 1, lost, examples)


@named(METHODS)
def test_neither_batches_nor_the_order_of_the_examples_make_a_difference(method):
    examples, classifier = random_examples(10, seed=4), random_classifier()
    expected = ranked(classifier, examples, method)
    other = random_classifier()
    other.max_tokens = 20
    np.testing.assert_allclose(ranked(other, examples, method).signed, expected.signed, atol=1e-5)
    if method.value != "resample":  # whose donors are numbered
        turned = examples.take(np.arange(len(examples))[::-1])
        np.testing.assert_allclose(ranked(classifier, turned, method).signed, expected.signed, atol=1e-5)


@pytest.mark.parametrize("broken", ["wrong numbers", "an error", "an error later"])
def test_a_way_that_does_not_prove_itself_is_not_gone(monkeypatch, caplog, broken):
    examples, classifier = random_examples(10, seed=4), random_classifier()
    classifier.max_tokens = 20
    expected = ranked(classifier, examples, CausalEffect())
    calls = []

    def run(classifier, clean, runs, reuse):
        calls.append(reuse)
        found = run_logits(classifier, clean, runs, reuse)
        if reuse != "rows" or (broken == "an error later" and calls.count("rows") < 8):
            return found
        if broken == "wrong numbers":
            return found + 1e-3
        raise IndexError("no such row")

    monkeypatch.setattr(effects, "run_logits", run)
    found = ranked(classifier, examples, CausalEffect())
    np.testing.assert_allclose(found.signed, expected.signed, atol=1e-4)
    reason = "rows: logits differ by 1.0e-03" if broken == "wrong numbers" else "rows: IndexError: no such row"
    assert f"residual of layer 2 goes the way 'prefix' ({reason}" in caplog.text


def test_where_no_way_proves_itself_every_neuron_is_run_alone(monkeypatch, caplog):
    examples, classifier = random_examples(6, seed=4), random_classifier()
    expected = ranked(classifier, examples, CausalEffect(layers=(-1,)))
    monkeypatch.setattr(effects, "run_logits", lambda *given: run_logits(*given) * float("nan"))
    found = ranked(classifier, examples, CausalEffect(layers=(-1,)))
    np.testing.assert_allclose(found.signed, expected.signed, atol=1e-4)
    assert "residual of layer 2 goes the way 'plain'" in caplog.text


def test_the_model_comes_back():
    examples, classifier = random_examples(5, seed=4), random_classifier()
    before, hooks = classifier.weights_hash(), hooks_of(classifier.module)
    ranked(classifier, examples, CausalEffect())
    assert (classifier.weights_hash(), hooks_of(classifier.module)) == (before, hooks)

    recorded = record(classifier, examples)
    handle = classifier.module.classifier.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        rank(recorded, method=CausalEffect(), classifier=classifier, examples=examples)
    handle.remove()
    assert (classifier.weights_hash(), hooks_of(classifier.module)) == (before, hooks)


def test_what_cannot_be_is_refused():
    examples, classifier = random_examples(5, seed=4), random_classifier()
    recorded = record(classifier, examples)
    refused = {
        r"^The value is 'means'; one of zero, mean, resample was expected\. Did you mean 'mean'\?$": unchecked(
            CausalEffect(), value="means"
        ),
        r"^Layer 3 was asked for; the activations have the layers 0 to 2\.$": CausalEffect(layers=(0, 3)),
        r"^A sample of 0 examples was asked for": CausalEffect(examples=0),
    }
    for message, method in refused.items():
        with pytest.raises(SettingsError, match=message):
            rank(recorded, method=method, classifier=classifier, examples=examples)
    handle = classifier.blocks[2].register_forward_hook(
        lambda _m, _a, output: output[0] / 0 if isinstance(output, tuple) else output / 0
    )
    with pytest.raises(ModelError, match=r"^Without a neuron of residual of layer 0 some logits are not finite"):
        rank(recorded, method=CausalEffect(), classifier=classifier, examples=examples)
    handle.remove()


def test_a_class_without_an_example_scores_nothing():
    few = planted_examples(30, seed=1).take([1, 4, 2])  # two of class b, one of class c
    ranking = ranked(planted_classifier(), few, CausalEffect())
    assert not ranking.scores[:, 1].any()
    assert ranking.order(1, "b")[0] == B_UNIT
    assert ranking.order(1, "c")[0] == C_UNIT


def test_captum_agrees():
    attr = pytest.importorskip("captum.attr")
    examples, classifier = random_examples(2, seed=4, labels=("a", "a")), random_classifier()
    ranking = ranked(classifier, examples, CausalEffect())
    found = []
    for text in examples.inputs:
        inputs = token_preprocess([text])
        with torch.no_grad():
            z = classifier.module(**inputs).logits[0].numpy()

        def of_margin(ids, mask):
            logits = classifier.module(input_ids=ids, attention_mask=mask).logits
            return logits[:, 0] - logits[:, 1:].amax(dim=1)

        # every unit of row 0 is a feature, all else one more
        shape = (1, inputs["input_ids"].shape[1], 32)
        features = torch.full(shape, 32)
        features[0, 0] = torch.arange(32)
        ablation = attr.LayerFeatureAblation(of_margin, classifier.blocks[1])
        lost = ablation.attribute(tuple(inputs.values()), layer_mask=features, perturbations_per_eval=1)
        found.append((lost[0] if isinstance(lost, tuple) else lost)[0, 0].detach().numpy())
        assert np.isfinite(z).all()
    np.testing.assert_allclose(ranking.signed[1, 1], np.mean(found, axis=0), atol=1e-4)


# --------------------------------------------------------------------------------------------------------- in the probe


def recorded_values(values, targets, labels=LABELS):
    logits = np.zeros((len(targets), len(labels)), dtype=np.float32)
    return Activations(values[None].astype(np.float32), logits, targets, labels, "source")


@pytest.mark.parametrize("n_units", [6, 90])
def test_probe_removal_is_the_drop_of_accuracy_and_recall_with_the_column_at_its_mean(n_units, monkeypatch):
    monkeypatch.setattr(effects, "MARGINS", 2000)  # several chunks
    rng = np.random.default_rng(n_units)
    targets = rng.permutation(np.arange(80) % 3)
    x = (rng.normal(size=(80, n_units)) + np.eye(3, n_units)[targets] * 1.5).astype(np.float32)
    x[:, 4] = 2.0  # constant
    model = LogisticRegression(C=10).fit(x, targets)
    probe = Probe(
        0,
        model.coef_,
        model.intercept_ + model.coef_ @ x.mean(axis=0).astype(float),
        x.mean(axis=0).astype(float),
        np.ones(n_units),
        penalty=0.1,
        l1_ratio=0.5,
        gradient_norm=0.0,
        converged=True,
    )
    ranking = rank(recorded_values(x, targets), method=ProbeRemoval(), probes=Probes((probe,), LABELS, "source"))
    clean = model.predict(x)
    for unit in range(n_units):
        without = x.copy()
        without[:, unit] = x[:, unit].mean()
        found = model.predict(without)
        expected = [accuracy_score(targets, clean) - accuracy_score(targets, found)]
        expected += list(recall_score(targets, clean, average=None) - recall_score(targets, found, average=None))
        np.testing.assert_allclose(ranking.signed[0, :, unit], expected, atol=1e-12)
    assert not ranking.scores[0, :, 4].any()


def test_probe_removal_puts_the_planted_neurons_first_and_scores_no_absent_class():
    recorded = record(planted_classifier(), planted_examples(300, seed=1))
    ranking = rank(recorded, method=ProbeRemoval(), probes=fit_probes(recorded))
    for layer in (0, 1):
        assert ranking.order(layer, "b")[0] == B_UNIT
        assert ranking.order(layer, "c")[0] == C_UNIT
        assert set(ranking.order(layer)[:2]) == {B_UNIT, C_UNIT}

    few = record(planted_classifier(), planted_examples(300, seed=1).take(np.flatnonzero(np.arange(300) % 3 > 0)))
    ranking = rank(few, method=ProbeRemoval(), probes=fit_probes(few))
    assert not ranking.scores[:, 1].any()
    assert np.isfinite(ranking.scores).all()
