"""The shipped domains: their data, and classifiers that are as good as their metrics say."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.metrics import f1_score
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from synapse.data.examples import shared_inputs
from synapse.demo.domains import FolderDomain, ModuleDomain, domain, domains
from synapse.demo.tabular import TabularTransformer
from synapse.errors import SettingsError

NAMES = ("cybersecurity", "healthcare", "vision")


def logits_of(name: str) -> torch.Tensor:
    """Logits of the test part, by the libraries alone."""
    this = domain(name)
    test = this.examples("test")
    with torch.no_grad():
        if isinstance(this, ModuleDomain):
            output = this.module()(**this.preprocess(np.asarray(test.inputs)))
            return output if isinstance(output, torch.Tensor) else output.logits
        model = AutoModelForSequenceClassification.from_pretrained(this.folder).eval()
        tokenizer = AutoTokenizer.from_pretrained(this.folder)
        parts = [list(test.inputs[i : i + 100]) for i in range(0, len(test), 100)]
        options = {"padding": True, "truncation": True, "return_tensors": "pt"}
        return torch.cat([model(**tokenizer(part, **options)).logits for part in parts])


def test_there_are_three_domains_one_of_them_a_folder_and_two_modules():
    assert tuple(each.name for each in domains()) == NAMES
    assert [type(each) for each in domains()] == [FolderDomain, ModuleDomain, ModuleDomain]


def test_an_unknown_domain_or_split_is_refused_with_the_known_ones():
    with pytest.raises(SettingsError) as refusal:
        domain("visoin")
    assert str(refusal.value) == (
        "No demo domain 'visoin': use one of cybersecurity, healthcare, vision. Did you mean 'vision'?"
    )
    with pytest.raises(SettingsError, match=r"No split 'dev' in a demo domain: use 'train' or 'test'\."):
        domain("vision").examples("dev")


@pytest.mark.parametrize("name", NAMES)
def test_the_classifier_reaches_the_test_figures_beside_it(name):
    claimed = json.loads((domain(name).folder / "metrics.json").read_text())
    test = domain(name).examples("test")

    predicted = [domain(name).labels[i] for i in logits_of(name).argmax(dim=1)]

    # One example may tip over on another processor.
    assert np.mean(np.array(predicted) == test.labels) == pytest.approx(claimed["accuracy"], abs=1.01 / len(test))
    assert f1_score(test.labels, predicted, average="macro") == pytest.approx(claimed["macro_f1"], abs=0.01)
    assert claimed["n"] == len(test)


@pytest.mark.parametrize("name", NAMES)
def test_the_shipped_folder_is_small_and_in_safetensors_alone(name):
    files = [path for path in domain(name).folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 3_000_000
    assert {path.suffix for path in files} == {".safetensors", ".json"}
    weights = load_file(domain(name).folder / "model.safetensors")
    assert all(weight.isfinite().all() for weight in weights.values())


@pytest.mark.parametrize("name", NAMES)
def test_train_and_test_share_no_input_and_hold_every_class(name):
    train, test = domain(name).examples("train"), domain(name).examples("test")
    assert shared_inputs(train, test) == 0
    assert set(train.labels) == set(test.labels) == set(domain(name).labels)


def test_the_tumour_examples_are_the_published_table_with_its_own_class_names():
    table = load_breast_cancer()
    published = {row.tobytes(): table.target_names[t] for row, t in zip(table.data.astype("f4"), table.target)}  # noqa: B905
    for split, n in (("train", 398), ("test", 171)):
        part = domain("healthcare").examples(split)
        assert part.inputs.shape == (n, 30)
        assert [published[row.tobytes()] for row in part.inputs] == list(part.labels)


def test_the_digit_examples_are_the_published_images_with_their_digits():
    table = load_digits()
    published = {image.tobytes(): str(t) for image, t in zip(table.images.astype("f4"), table.target)}  # noqa: B905
    for split, n in (("train", 1257), ("test", 540)):
        part = domain("vision").examples(split)
        assert part.inputs.shape == (n, 8, 8)
        assert [published[image.tobytes()] for image in part.inputs] == list(part.labels)


def test_digits_reach_the_module_in_one_channel_between_minus_one_and_one():
    images = np.zeros((2, 8, 8), dtype=np.float32)
    images[1] = 16
    pixels = domain("vision").preprocess(images)["pixel_values"]
    assert pixels.shape == (2, 1, 8, 8)
    assert pixels[0].unique().tolist() == [-1]
    assert pixels[1].unique().tolist() == [1]


def test_loading_a_module_draws_no_random_numbers_and_leaves_it_in_evaluation_mode():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    for name in ("healthcare", "vision"):
        module = domain(name).module()
        assert not module.training
        assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert torch.equal(torch.get_rng_state(), before)


def test_the_tabular_module_standardises_with_the_mean_and_deviation_of_the_train_part():
    features = domain("healthcare").examples("train").inputs.astype(np.float64)
    module = domain("healthcare").module()
    np.testing.assert_allclose(module.mean.numpy(), features.mean(axis=0), rtol=1e-4)
    np.testing.assert_allclose(module.deviation.numpy(), features.std(axis=0), rtol=1e-4)


def test_the_tabular_attention_equals_that_of_the_published_encoder_layer():
    torch.manual_seed(0)
    ours = TabularTransformer(5, 2, width=8, n_blocks=1, n_heads=2).eval().blocks[0]
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, activation="gelu", batch_first=True, norm_first=True).eval()
    names = {
        "self_attn.in_proj_weight": "query_key_value.weight", "self_attn.in_proj_bias": "query_key_value.bias",
        "self_attn.out_proj.weight": "out.weight", "self_attn.out_proj.bias": "out.bias",
        "linear1.weight": "up.weight", "linear1.bias": "up.bias",
        "linear2.weight": "down.weight", "linear2.bias": "down.bias",
        "norm1.weight": "norm_attention.weight", "norm1.bias": "norm_attention.bias",
        "norm2.weight": "norm_mlp.weight", "norm2.bias": "norm_mlp.bias",
    }  # fmt: skip
    layer.load_state_dict({theirs: ours.state_dict()[name] for theirs, name in names.items()})
    x = torch.randn(3, 6, 8)
    torch.testing.assert_close(ours(x), layer(x), rtol=1e-5, atol=1e-6)
