import numpy as np
import pytest
import tiny_models
import torch
import transformers
from planted import B_UNIT, LABELS, planted_classifier, planted_examples, random_classifier, random_examples
from torch import nn

from synapse.errors import SettingsError
from synapse.probe.probe import fit_probes
from synapse.recording import record, record_untrained
from synapse.recording.untrained import reinitialised


def test_the_given_classifier_is_left_as_it_is():
    classifier, examples = random_classifier("bert"), random_examples(9, seed=1)
    before, states, random = classifier.weights_hash(), record(classifier, examples), torch.get_rng_state()

    untrained = record_untrained(classifier, examples)

    assert classifier.weights_hash() == before
    np.testing.assert_array_equal(record(classifier, examples).values, states.values)
    assert torch.equal(torch.get_rng_state(), random)
    assert (untrained.source, untrained.labels) == (states.source, states.labels)
    assert untrained.values.shape == states.values.shape
    assert not np.allclose(untrained.values, states.values, atol=0.1)


def test_weights_of_the_model_library_are_drawn_by_its_own_initialiser(tmp_path):
    tiny_models.bert(initializer_range=0.5).save_pretrained(tmp_path)
    loaded = transformers.BertForSequenceClassification.from_pretrained(tmp_path).eval()  # marks what was loaded
    for parameter in loaded.parameters():
        parameter.data.mul_(7)

    fresh = dict(reinitialised(loaded, seed=0).named_parameters())

    drawn = torch.cat([weight.detach().flatten() for name, weight in fresh.items() if "dense.weight" in name])
    assert drawn.std() == pytest.approx(0.5, rel=0.05)  # the model's initializer_range
    assert all((weight == 0).all() for name, weight in fresh.items() if name.endswith("bias"))
    assert all((weight == 1).all() for name, weight in fresh.items() if name.endswith("LayerNorm.weight"))


@pytest.mark.parametrize("make", [tiny_models.bert, tiny_models.gpt2, tiny_models.vit, tiny_models.wav2vec2])
def test_no_weight_matrix_of_any_model_stays(make):
    module = make()
    before = {name: weight.detach().clone() for name, weight in module.named_parameters()}

    fresh = dict(reinitialised(module, seed=3).named_parameters())

    assert set(fresh) == set(before)
    for name, weight in fresh.items():
        if weight.ndim >= 2 and before[name].unique().numel() > 1:
            assert not torch.equal(weight, before[name]), name


def test_weights_that_nothing_initialises_are_permuted_within_each_tensor():
    classifier = planted_classifier()

    fresh = reinitialised(classifier.module, seed=0)

    for weight, learned in zip(fresh.parameters(), classifier.module.parameters(), strict=True):
        assert torch.equal(weight.flatten().sort().values, learned.flatten().sort().values)
    assert not torch.equal(fresh.embedding.weight, classifier.module.embedding.weight)


def test_a_model_of_the_library_inside_another_module_is_initialised_too():
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.scale = tiny_models.bert(), nn.Linear(4, 4)

    wrapper = Wrapper()
    fresh = reinitialised(wrapper, seed=0)

    word = "bert.embeddings.word_embeddings.weight"
    assert not torch.allclose(
        fresh.inner.get_parameter(word).sort().values, wrapper.inner.get_parameter(word).sort().values
    )
    assert torch.equal(fresh.scale.weight.flatten().sort().values, wrapper.scale.weight.flatten().sort().values)


def test_a_seed_gives_the_same_weights_and_another_gives_others():
    classifier, examples = random_classifier("gpt2"), random_examples(6, seed=1)
    one, same, other = (record_untrained(classifier, examples, seed=seed).values for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert not np.allclose(one, other, atol=1e-3)


def test_what_training_planted_is_not_in_the_untrained_model():
    classifier, train, test = planted_classifier(), planted_examples(150, seed=1), planted_examples(90, seed=2)

    learned = fit_probes(record(classifier, train), penalties=(0.01,))[0]
    random = fit_probes(record_untrained(classifier, train), penalties=(0.01,))[0]

    known, unknown = record(classifier, test), record_untrained(classifier, test)
    assert np.abs(learned.weights[1]).argmax() == B_UNIT
    assert np.mean(learned.predict(known.values[0]) == test.targets(LABELS)) > 0.95
    assert np.mean(random.predict(unknown.values[0]) == test.targets(LABELS)) < 0.7


def test_components_and_progress_are_those_of_recording():
    classifier, examples, seen = random_classifier("bert"), random_examples(5, seed=1), []
    found = record_untrained(
        classifier, examples, component="mlp", progress=lambda done, total: seen.append((done, total))
    )
    assert found.component == "mlp"
    assert found.width == classifier.sites("mlp")[0].width
    assert seen[-1] == (5, 5)


def test_quantised_blocks_are_refused():
    classifier = random_classifier("bert")
    classifier.blocks = (nn.ReLU(), *classifier.blocks[1:])
    with pytest.raises(SettingsError) as caught:
        record_untrained(classifier, random_examples(3, seed=1))
    assert str(caught.value) == (
        "The block 'bert.encoder.layer.0' holds quantised weights, or none, so it cannot be given random ones; load "
        "the model as it was before quantisation."
    )
