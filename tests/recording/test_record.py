import numpy as np
import pytest
import torch
from planted import (
    B_HIDDEN,
    C_HIDDEN,
    LABELS,
    hidden_classifier,
    planted_classifier,
    planted_examples,
    random_classifier,
    random_examples,
)

from synapse.errors import LabelError, ModelError
from synapse.perturb.activations import Zero
from synapse.probe.probe import fit_probes
from synapse.ranking import rank
from synapse.recording import record
from synapse.types import Neurons


def test_recorded_states_are_the_readout_rows_of_every_block():
    classifier, examples = random_classifier("gpt2"), random_examples(12, seed=1)
    activations = record(classifier, examples)
    for i, text in enumerate(examples.inputs):
        hidden = classifier.module(**classifier.preprocess([text]), output_hidden_states=True).hidden_states
        # the library's last entry is taken after the final norm, so it is no block output
        for layer in (0, 1):
            np.testing.assert_allclose(activations.values[layer, i], hidden[layer + 1][0, -1].detach(), atol=1e-4)
    np.testing.assert_allclose(activations.logits, classifier.predict(examples), atol=1e-5)


def test_moments_over_all_rows_leave_padding_out():
    classifier, examples = random_classifier("bert"), random_examples(15, seed=2)
    activations = record(classifier, examples)
    rows = [
        classifier.module(**classifier.preprocess([text]), output_hidden_states=True).hidden_states[2][0].detach()
        for text in examples.inputs
    ]
    together = torch.cat(rows).double().numpy()
    np.testing.assert_allclose(activations.row_mean[1], together.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(activations.row_deviation[1], together.std(axis=0), atol=1e-5)


def test_recording_does_not_depend_on_batch_size():
    classifier, examples = random_classifier("bert"), random_examples(15, seed=3)
    reference = record(classifier, examples)
    classifier.max_tokens = 1
    single = record(classifier, examples)
    np.testing.assert_allclose(single.values, reference.values, atol=1e-5)
    np.testing.assert_allclose(single.row_deviation, reference.row_deviation, atol=1e-5)


def test_foreign_labels_and_states_that_are_not_finite_are_refused():
    classifier = planted_classifier()
    with pytest.raises(LabelError, match="'x'"):
        record(classifier, random_examples(6, seed=1, labels=("a", "x")))
    with torch.no_grad():
        classifier.module.embedding.weight[10] = torch.nan
    with pytest.raises(ModelError, match="not finite"):
        record(classifier, planted_examples(60, seed=1))


def test_planted_hidden_units_are_recorded_ranked_first_and_take_their_class_with_them():
    classifier, train, test = hidden_classifier(), planted_examples(90, seed=1), planted_examples(60, seed=2)
    activations = record(classifier, train, component="mlp")
    tokens = torch.as_tensor(train.inputs)
    hidden = classifier.module.blocks[0].gather(classifier.module.embedding(tokens))
    expected = torch.relu(classifier.module.blocks[0].up(hidden))
    np.testing.assert_allclose(activations.values[0], expected[:, 0].detach(), atol=1e-6)
    np.testing.assert_allclose(activations.row_mean[0], expected.detach().mean(dim=(0, 1)), atol=1e-6)
    ranking = rank(activations, probes=fit_probes(activations, seed=0), method="cumulative-mass")
    clean = classifier.predict(test).argmax(axis=1)
    for label, unit in (("b", B_HIDDEN), ("c", C_HIDDEN)):
        neurons = ranking.top(1, layer=0, label=label)
        assert neurons == Neurons(0, (unit,), "mlp")
        with classifier.edited(Zero(neurons)):
            edited = classifier.predict(test).argmax(axis=1)
        lost = np.array(test.labels) == label
        assert (clean[lost] == LABELS.index(label)).all()
        assert (edited[lost] == LABELS.index("a")).all()
        np.testing.assert_array_equal(edited[~lost], clean[~lost])
