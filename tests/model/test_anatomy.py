import numpy as np
import pytest
import torch
from planted import (
    LABELS,
    planted_classifier,
    random_classifier,
    random_module,
    random_texts,
    token_preprocess,
)
from torch import nn

from synapse.errors import AnatomyError, ModelError, SettingsError
from synapse.model.classifier import Classifier
from synapse.model.discovery import find_anatomy
from synapse.perturb.weights import places

EXPECTED = {
    "bert": ("bert.encoder.layer.", "first", ("bert.pooler", "dropout", "classifier"), "classifier"),
    "distilbert": (
        "distilbert.transformer.layer.",
        "first",
        ("pre_classifier", "dropout", "classifier"),
        "classifier",
    ),
    "gpt2": ("transformer.h.", "last", ("transformer.ln_f", "score"), "score"),
    "deberta": ("deberta.encoder.layer.", "first", ("pooler", "dropout", "classifier"), "classifier"),
}


@pytest.mark.parametrize("architecture", EXPECTED)
def test_blocks_readout_head_and_final_map_are_found_without_knowing_the_architecture(architecture):
    anatomy = random_classifier(architecture).anatomy
    prefix, readout, head, final = EXPECTED[architecture]
    assert anatomy.blocks == tuple(f"{prefix}{layer}" for layer in range(3))
    assert (anatomy.width, anatomy.readout, anatomy.head, anatomy.final) == (32, readout, head, final)
    assert set(anatomy.proofs) == {"identity", "sensitivity", "readout", "head"}


def test_a_plain_module_is_understood_too():
    anatomy = planted_classifier().anatomy
    assert anatomy.blocks == ("blocks.0", "blocks.1")
    assert (anatomy.width, anatomy.readout, anatomy.final) == (16, "first", "head")


def of(module, texts=None, **overrides):
    sample = random_texts(4, seed=0) if texts is None else texts
    return Classifier.from_module(module.eval(), preprocess=token_preprocess, labels=LABELS, sample=sample, **overrides)


class TorchEncoder(nn.Module):
    """PyTorch's own encoder, whose fused kernel skips hooks."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.embedding = nn.Embedding(100, 16)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(16, 3)

    def forward(self, input_ids, attention_mask):
        hidden = self.encoder(self.embedding(input_ids), src_key_padding_mask=attention_mask == 0)
        return self.head(hidden[:, 0])


def test_the_encoder_of_torch_is_studied_with_its_fused_kernel_off_for_the_time_being():
    classifier = of(TorchEncoder())
    assert classifier.anatomy.blocks == ("encoder.layers.0", "encoder.layers.1")
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_with_the_fused_kernel_on_the_proof_on_load_refuses_the_encoder():
    assert torch.backends.mha.get_fastpath_enabled()
    with pytest.raises((AnatomyError, RuntimeError)):
        find_anatomy(TorchEncoder().eval(), token_preprocess(random_texts(4, seed=0)), 3)


class MixingBlock(nn.Module):
    """Adds the mean over all rows, padding included, to each of them."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, hidden):
        return hidden + self.linear(hidden) + hidden.mean(dim=1, keepdim=True)


class Stack(nn.Module):
    """Blocks over embedded tokens; `pool` gives what the head reads."""

    def __init__(self, pool):
        super().__init__()
        torch.manual_seed(1)
        self.embedding = nn.Embedding(100, 8)
        self.blocks = nn.ModuleList([MixingBlock() for _ in range(2)])
        self.head = nn.Linear(8, 3)
        self.pool = pool

    def forward(self, input_ids, attention_mask):
        hidden = self.embedding(input_ids)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(self.pool(hidden))


class NoBlocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(100, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, input_ids, attention_mask):
        return self.head(self.embedding(input_ids).mean(dim=1))


class Skipping(nn.Module):
    """Its head adds what the first row was before the last block."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(100, 8)
        self.blocks = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])
        self.head = nn.Linear(8, 3)

    def forward(self, input_ids, attention_mask):
        first = self.blocks[0](self.embedding(input_ids))
        return self.head(self.blocks[1](first)[:, 0] + first[:, 0])


def weighted(hidden):
    """Read the rows by weights of their place: neither one row nor rows alike."""
    weights = torch.arange(1.0, hidden.shape[1] + 1)[None, :, None]
    return (hidden * weights).mean(dim=1)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (
            Stack(weighted),
            "The head reads the rows .* not all of them alike; the first row .* was expected. Name the one that comes "
            "nearest with `readout=`",
        ),
        (
            NoBlocks(),
            "No Transformer blocks were found: .* Seen: Embedding, Linear. Keep the blocks in an nn.ModuleList, or "
            "name them with `blocks=`",
        ),
        (
            Skipping(),
            "The head seems to read something else than the last block's output .*blocks.0, blocks.1.* name the "
            "blocks with `blocks=`",
        ),
    ],
)
def test_a_model_that_is_not_understood_is_refused_with_what_was_found_what_is_missing_and_the_override(
    module, message
):
    with pytest.raises(AnatomyError, match=message):
        of(module)


def test_findings_can_be_given_by_hand():
    module = Stack(weighted)
    assert of(module, readout="mean").anatomy.readout == "mean"
    module = random_module("bert")
    first_two = of(module, blocks=[f"bert.encoder.layer.{layer}.output" for layer in range(3)])
    assert first_two.anatomy.blocks == tuple(f"bert.encoder.layer.{layer}.output" for layer in range(3))
    assert of(module, blocks="bert.encoder.layer.*").anatomy.blocks == of(module).anatomy.blocks
    named = of(module, mlp="attention.output.dense", attention="output.dense", final="classifier").anatomy
    assert named.sites["mlp"][1].module == "bert.encoder.layer.1.attention.output.dense"
    assert named.sites["attention"][1].module == "bert.encoder.layer.1.output.dense"


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        ({"blocks": "bert.encoder.layers.*"}, SettingsError, r"no module 'bert.encoder.layers.\*'"),
        ({"readout": "middle"}, SettingsError, "no readout 'middle'; one of first, last"),
        ({"mlp": "output.dens"}, AnatomyError, "no map over its rows is called 'output.dens'; there are: attention"),
        ({"final": "bert.pooler.dense"}, AnatomyError, "The output of 'bert.pooler.dense' is not the logits"),
        ({"blocks": "bert.pooler"}, AnatomyError, r"No call of \['bert.pooler'\] gave hidden states"),
    ],
)
def test_an_override_that_cannot_be_is_refused(overrides, error, message):
    with pytest.raises(error, match=message):
        of(random_module("bert"), **overrides)


def test_padding_is_known_by_behaviour_whatever_the_mask_is_called_and_means():
    class Renamed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = TorchEncoder()

        def forward(self, tokens, is_padding):
            return self.inner(tokens, (~is_padding).long())

    def preprocess(texts):
        made = token_preprocess(texts)
        return {"tokens": made["input_ids"], "is_padding": made["attention_mask"] == 0}

    classifier = Classifier.from_module(
        Renamed().eval(), preprocess=preprocess, labels=LABELS, sample=random_texts(4, seed=0)
    )
    mask = classifier.anatomy.rows.mask
    assert (mask.name, mask.there) == ("is_padding", 0)
    assert classifier.anatomy.pads


def test_rows_that_are_averaged_with_their_padding_never_share_a_batch_with_longer_ones():
    assert not of(Stack(lambda hidden: hidden.mean(dim=1))).anatomy.pads


class LengthPreprocess:
    """The tokens of a text, with their number."""

    def __call__(self, texts):
        return token_preprocess(texts)

    def lengths(self, texts):
        return np.array([len(text.split()) for text in texts])


def test_samples_of_one_length_tell_nothing_of_padding_so_lengths_never_share_a_batch():
    module, even = Stack(lambda hidden: hidden[:, 0]).eval(), ["5 6 7", "8 9 5", "6 6 8"]
    texts = random_texts(20, seed=3)
    alone = np.concatenate(
        [module(**token_preprocess([text])).detach().numpy() for text in texts]
    )  # its blocks mix padding in
    classifier = Classifier.from_module(module, preprocess=LengthPreprocess(), labels=LABELS, sample=even)
    assert classifier.notes == ("the samples are of one length, so examples of different lengths never share a batch",)
    np.testing.assert_allclose(classifier.predict(texts), alone, atol=1e-5)
    blind = Classifier.from_module(module, preprocess=token_preprocess, labels=LABELS, sample=even)
    with pytest.raises(ModelError, match="what varies in size must vary in the samples too.*Pass `sample=`"):
        blind.predict(texts)


def test_weights_in_half_precision_and_quantised_maps_are_studied_as_they_are():
    half = of(random_module("bert").to(torch.bfloat16))
    assert half.notes == ("the model runs in bfloat16, so its numbers are coarser than those of float32",)
    assert half.predict(random_texts(3, seed=1)).dtype.name == "float32"
    assert half.sites("mlp")[0].width == 48
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library announces that this module of torch will move
        quantised = torch.ao.quantization.quantize_dynamic(random_module("bert"), {nn.Linear}, torch.qint8)
    classifier = of(quantised)
    assert classifier.anatomy.blocks == of(random_module("bert")).anatomy.blocks
    assert classifier.sites("mlp")[0].module == "bert.encoder.layer.0.output.dense"
    assert classifier.notes == ("blocks hold quantised weights, or none: weight noise leaves them out",)
    assert places(classifier) == ()
    before = classifier.weights_hash()
    classifier.predict(random_texts(3, seed=1))
    assert classifier.weights_hash() == before


def test_a_site_that_is_not_there_is_refused_with_the_reason():
    with pytest.raises(SettingsError, match="no site 'mlp': no module inside the block maps hidden units back"):
        planted_classifier().sites("mlp")
    with pytest.raises(SettingsError, match="no component 'neurons'; there are residual, mlp"):
        planted_classifier().sites("neurons")


def test_wrong_numbers_of_labels_and_training_mode_are_refused():
    def make(module, labels=LABELS, sample=None):
        return Classifier.from_module(
            module, preprocess=token_preprocess, labels=labels, sample=sample or random_texts(3, seed=0)
        )

    with pytest.raises(ModelError, match="one row of 2 logits"):
        make(random_module("bert"), labels=("a", "b"))
    with pytest.raises(ModelError, match="training mode"):
        make(random_module("bert").train())
    with pytest.raises(SettingsError, match="two or more distinct"):
        make(random_module("bert"), labels=("a",))
    with pytest.raises(SettingsError, match="1 sample inputs"):
        make(random_module("bert"), sample=["1 2 3"])


def test_finding_the_anatomy_leaves_weights_and_hooks_as_they_were():
    module = random_module("bert")
    before = {name: value.clone() for name, value in module.state_dict().items()}
    Classifier.from_module(module, preprocess=token_preprocess, labels=LABELS, sample=random_texts(3, seed=0))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in module.modules())
    assert all("forward" not in m.__dict__ for m in module.modules())
