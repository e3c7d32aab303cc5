import numpy as np
import pytest
import torch
from planted import (
    planted_classifier,
    planted_examples,
    random_classifier,
    random_examples,
    random_module,
    token_preprocess,
)

from synapse.errors import ModelError, SettingsError
from synapse.model.classifier import Classifier, choose_device


def test_predictions_are_the_modules_own_logits_in_the_order_given():
    classifier, examples = random_classifier("bert"), random_examples(20, seed=1)
    module = random_module("bert")
    one_by_one = torch.cat([module(**token_preprocess([text])).logits for text in examples.inputs]).detach().numpy()
    np.testing.assert_allclose(classifier.predict(examples), one_by_one, atol=1e-5)


@pytest.mark.parametrize("architecture", ["bert", "distilbert", "gpt2"])
def test_batch_size_and_row_order_do_not_change_predictions(architecture):
    classifier, examples = random_classifier(architecture), random_examples(30, seed=2)
    reference = classifier.predict(examples)
    shuffled = np.random.default_rng(0).permutation(30)
    np.testing.assert_allclose(classifier.predict(examples.take(shuffled)), reference[shuffled], atol=1e-5)
    for max_tokens in (1, 30, 10_000):
        classifier.max_tokens = max_tokens
        np.testing.assert_allclose(classifier.predict(examples), reference, atol=1e-5)


def test_the_weights_hash_sees_one_changed_bit_and_nothing_else():
    classifier = planted_classifier()
    before = classifier.weights_hash()
    classifier.predict(planted_examples(6, seed=1))
    assert classifier.weights_hash() == before
    bits = classifier.module.head.weight.data.view(torch.int32)
    bits[0, 0] ^= 1
    assert classifier.weights_hash() != before


def test_a_direct_call_under_an_intervention_is_refused():
    with pytest.raises(SettingsError, match="called directly"):
        _ = planted_classifier().current_batch


def test_devices_that_are_not_there_are_refused():
    with pytest.raises(SettingsError, match="No device is called 'abacus'"):
        choose_device("abacus")
    if not torch.cuda.is_available():
        with pytest.raises(SettingsError, match="no CUDA device is there"):
            choose_device("cuda")


def test_a_folder_without_a_model_is_refused_with_near_names(tmp_path):
    (tmp_path / "minilm").mkdir()
    with pytest.raises(ModelError, match=r"no model folder .*Did you mean 'minilm'"):
        Classifier.from_pretrained(tmp_path / "minilmm")
    with pytest.raises(ModelError, match=r"is no model: it has no config.json"):
        Classifier.from_pretrained(tmp_path / "minilm")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ModelError, match="is a file"):
        Classifier.from_pretrained(tmp_path / "file")


def test_a_model_without_a_classification_head_is_refused(tmp_path):
    random_module("bert").bert.save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    with pytest.raises(ModelError, match=r"has no classification head: the weights classifier.bias"):
        Classifier.from_pretrained(tmp_path)


def test_a_regression_model_is_refused(tmp_path):
    module = random_module("bert")
    module.config.problem_type = "regression"
    module.save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    with pytest.raises(ModelError, match="is a regression model"):
        Classifier.from_pretrained(tmp_path)


def test_a_real_model_predicts_as_its_record_says(shared):
    import json

    from synapse.data.reading import read_examples

    folder = shared / "models" / "tiny-splice"
    classifier = Classifier.from_pretrained(folder)
    test = read_examples(shared / "data" / "splice" / "test.csv")
    accuracy = (classifier.predict(test).argmax(axis=1) == test.targets(classifier.labels)).mean()
    assert accuracy == pytest.approx(
        json.loads((folder / "metrics.json").read_text())["accuracy_after_reload"], abs=1e-4
    )


def write_tokenizer(folder):
    import transformers

    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "word"]))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
