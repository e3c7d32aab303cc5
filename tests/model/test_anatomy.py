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


def test_the_encoder_of_torch_keeps_its_hooks_although_its_fused_path_would_skip_them():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
            self.embedding = nn.Embedding(100, 16)
            self.encoder = nn.TransformerEncoder(layer, 2)
            self.head = nn.Linear(16, 3)

        def forward(self, input_ids, attention_mask):
            hidden = self.encoder(self.embedding(input_ids), src_key_padding_mask=attention_mask == 0)
            return self.head(hidden[:, 0])

    module = Encoder().eval()
    classifier = Classifier.from_module(
        module, preprocess=token_preprocess, labels=LABELS, sample=random_texts(3, seed=0)
    )
    assert classifier.anatomy.blocks == ("encoder.layers.0", "encoder.layers.1")


class Pooling(nn.Module):
    """Mean over rows: a readout that is not supported."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(100, 8)
        self.blocks = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])
        self.head = nn.Linear(8, 3)

    def forward(self, input_ids, attention_mask):
        hidden = self.embedding(input_ids)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.head(hidden.mean(dim=1))


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


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Pooling(), "The head reads the rows"),
        (NoBlocks(), "No Transformer blocks were found"),
        (Skipping(), "The head seems to read something else than the last block's output"),
    ],
)
def test_a_model_that_is_not_understood_is_refused_with_what_was_seen(module, message):
    with pytest.raises(AnatomyError, match=message):
        Classifier.from_module(
            module.eval(), preprocess=token_preprocess, labels=LABELS, sample=random_texts(3, seed=0)
        )


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
