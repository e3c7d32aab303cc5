import numpy as np
import pytest
import torch
from planted import LABELS, random_classifier, random_examples, random_texts, token_preprocess
from torch import nn

from synapse.model.classifier import Classifier
from synapse.model.resume import clean_pass, resume


def rolled(_module, _inputs, output):
    """Give every unit the value of its neighbour, whatever else the block returns."""
    return (output[0].roll(1, dims=2), *output[1:]) if isinstance(output, tuple) else output.roll(1, dims=2)


@pytest.mark.parametrize("architecture", ["bert", "distilbert", "deberta", "gpt2"])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_resuming_from_an_edited_layer_equals_a_forward_pass_under_a_plain_hook(architecture, layer):
    classifier, examples = random_classifier(architecture), random_examples(9, seed=4)
    block = classifier.blocks[layer]
    for batch in classifier.batches(examples.inputs):
        handle = block.register_forward_hook(rolled)
        plain = classifier.forward(batch)
        handle.remove()
        clean = clean_pass(classifier, batch)
        twice = torch.tensor([*range(len(batch.index)), 0])
        resumed = resume(classifier, clean, layer, clean.states[layer][twice].roll(1, dims=2), twice)
        np.testing.assert_allclose(resumed[:-1], plain, atol=1e-5)
        np.testing.assert_allclose(resumed[-1], plain[0], atol=1e-5)
        assert not torch.allclose(plain, clean.logits, atol=1e-3)


def test_recorded_states_are_those_that_the_model_library_gives():
    classifier, examples = random_classifier("bert"), random_examples(5, seed=5)
    batch = next(iter(classifier.batches(examples.inputs)))
    own = classifier.module(**batch.inputs, output_hidden_states=True).hidden_states
    # entry 0 is the embedding; entry l + 1 the output of block l
    for states, expected in zip(clean_pass(classifier, batch).states, own[1:], strict=True):
        assert torch.equal(states, expected)


def test_a_block_that_works_in_place_does_not_change_what_was_recorded_before():
    class InPlace(nn.Module):
        def forward(self, hidden):
            hidden += 1
            return hidden

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(100, 8)
            self.blocks = nn.ModuleList([InPlace(), InPlace()])
            self.head = nn.Linear(8, 3)

        def forward(self, input_ids, attention_mask):
            hidden = self.embedding(input_ids)
            for block in self.blocks:
                hidden = block(hidden)
            return self.head(hidden[:, 0])

    texts = random_texts(3, seed=0)
    classifier = Classifier.from_module(Model().eval(), preprocess=token_preprocess, labels=LABELS, sample=texts)
    first, second = clean_pass(classifier, next(iter(classifier.batches(texts)))).states
    np.testing.assert_allclose(second - first, 1, atol=1e-6)


def test_features_and_final_map_give_the_logits():
    for architecture in ("bert", "gpt2"):
        classifier, examples = random_classifier(architecture), random_examples(5, seed=6)
        clean = clean_pass(classifier, next(iter(classifier.batches(examples.inputs))))
        with torch.inference_mode():
            np.testing.assert_allclose(classifier.final(clean.features), clean.logits, atol=1e-6)


def test_the_embedding_and_the_blocks_below_are_not_run_again():
    classifier, examples = random_classifier("bert"), random_examples(5, seed=7)
    clean = clean_pass(classifier, next(iter(classifier.batches(examples.inputs))))
    ran = []
    dense = [block.intermediate.dense for block in classifier.blocks]
    handles = [m.register_forward_hook(lambda m, _i, _o: ran.append(dense.index(m))) for m in dense]
    word = classifier.module.bert.embeddings.word_embeddings
    handles.append(word.register_forward_hook(lambda *_: ran.append("embedding")))
    resume(classifier, clean, 1, clean.states[1], torch.arange(len(clean.logits)))
    for handle in handles:
        handle.remove()
    assert ran == [2]
