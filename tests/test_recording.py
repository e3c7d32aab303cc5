import numpy as np
import pytest
import torch
from planted import planted_classifier, planted_examples, random_classifier, random_examples

from synapse.errors import LabelError, ModelError
from synapse.recording import record


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
