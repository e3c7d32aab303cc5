"""A tiny Transformer whose neurons have known roles, and others with random weights.

In the planted model an example is a row of token ids; row 0 is [CLS]. The token `B_TOKEN` carries a 1 in unit `B_UNIT`,
`C_TOKEN` in `C_UNIT`; every other token carries noise in the other units. The first block adds these two units of all
rows to [CLS]; the later ones pass it on, and add next to nothing. The head reads unit `B_UNIT` for class "b", `C_UNIT`
for class "c", and gives class "a" a constant.
"""

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from synapse.data.examples import Examples
from synapse.model.classifier import Classifier

WIDTH, N_TOKENS, VOCABULARY = 16, 6, 40
CLS, B_TOKEN, C_TOKEN = 0, 1, 2
B_UNIT, C_UNIT = 5, 9
LABELS = ("a", "b", "c")


class GatherBlock(nn.Module):
    """Adds the two planted units, summed over the other rows, to [CLS]."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH, bias=False)
        with torch.no_grad():
            self.mix.weight.zero_()
            for unit in (B_UNIT, C_UNIT):
                self.mix.weight[unit, unit] = gain

    def forward(self, hidden: Tensor) -> Tensor:
        gathered = self.mix(hidden[:, 1:].sum(dim=1))
        return torch.cat([hidden[:, :1] + gathered[:, None], hidden[:, 1:]], dim=1)


class PlantedClassifier(nn.Module):
    def __init__(self, n_blocks: int = 2) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList([GatherBlock(1.0 if layer == 0 else 1e-3) for layer in range(n_blocks)])
        self.head = nn.Linear(WIDTH, 3)
        with torch.no_grad():
            noise = torch.randn(VOCABULARY, WIDTH, generator=generator) * 0.3
            noise[:, [B_UNIT, C_UNIT]] = 0
            noise[CLS] = 0.1 * torch.arange(WIDTH)
            noise[CLS, [B_UNIT, C_UNIT]] = 0
            self.embedding.weight.copy_(noise)
            self.embedding.weight[B_TOKEN, B_UNIT] = 1
            self.embedding.weight[C_TOKEN, C_UNIT] = 1
            self.head.weight.zero_()
            self.head.weight[1, B_UNIT] = self.head.weight[2, C_UNIT] = 4
            self.head.bias.copy_(torch.tensor([1.0, 0.0, 0.0]))

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embedding(ids)
        # [CLS] sees one filler token, so that its other units vary from example to example
        hidden = torch.cat([hidden[:, :1] + hidden[:, -1:], hidden[:, 1:]], dim=1)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden[:, 0])


B_HIDDEN, C_HIDDEN = 7, 11
"""Hidden units of the planted feed-forward network that carry the classes b and c."""


class HiddenBlock(nn.Module):
    """Gathers as `GatherBlock` does, and writes through a feed-forward network to units that the head reads.

    Its hidden units `B_HIDDEN` and `C_HIDDEN` carry the two classes; the other hidden units write where nothing reads.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gather = GatherBlock(1.0)
        self.up, self.down = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH, bias=False)
        with torch.no_grad():
            self.up.weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(5))
            self.up.weight[:, [B_UNIT, C_UNIT]] = 0
            self.up.bias.zero_()
            self.down.weight.zero_()
            self.down.weight[12] = 0.1
            for hidden, unit, out in ((B_HIDDEN, B_UNIT, 2), (C_HIDDEN, C_UNIT, 3)):
                self.up.weight[hidden] = 0
                self.up.weight[hidden, unit] = 1
                self.down.weight[:, hidden] = 0
                self.down.weight[out, hidden] = 1

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.gather(hidden)
        return hidden + self.down(torch.relu(self.up(hidden)))


class HiddenClassifier(nn.Module):
    """One `HiddenBlock`, whose feed-forward network the head reads: the planted neurons are hidden units."""

    def __init__(self) -> None:
        super().__init__()
        planted = PlantedClassifier(1)
        self.embedding = planted.embedding
        self.blocks = nn.ModuleList([HiddenBlock()])
        self.head = nn.Linear(WIDTH, 3)
        with torch.no_grad():
            self.embedding.weight[:, [2, 3]] = 0
            self.head.weight.zero_()
            self.head.weight[1, 2] = self.head.weight[2, 3] = 4
            self.head.bias.copy_(torch.tensor([1.0, 0.0, 0.0]))

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embedding(ids)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden[:, 0])


def hidden_classifier() -> Classifier:
    return Classifier.from_module(
        HiddenClassifier().eval(),
        preprocess=lambda ids: {"ids": torch.as_tensor(np.asarray(ids))},
        labels=LABELS,
        sample=planted_examples(4, seed=99).inputs,
    )


def planted_examples(n: int, *, seed: int) -> Examples:
    """Return n examples: a third carries no signal token (class a), a third each `B_TOKEN` and `C_TOKEN`."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(3, VOCABULARY, size=(n, N_TOKENS))
    ids[:, 0] = CLS
    kinds = np.arange(n) % 3
    place = rng.integers(1, N_TOKENS - 1, size=n)
    for kind, token in ((1, B_TOKEN), (2, C_TOKEN)):
        rows = np.flatnonzero(kinds == kind)
        ids[rows, place[rows]] = token
    return Examples(ids, tuple(LABELS[kind] for kind in kinds), f"planted-{seed}")


def planted_classifier(n_blocks: int = 2) -> Classifier:
    return Classifier.from_module(
        PlantedClassifier(n_blocks).eval(),
        preprocess=lambda ids: {"ids": torch.as_tensor(np.asarray(ids))},
        labels=LABELS,
        sample=planted_examples(4, seed=99).inputs,
        name="planted",
    )


def token_preprocess(texts: list[str]) -> dict[str, Tensor]:
    """Turn 'ids separated by blanks' into padded ids and their mask."""
    ids = [[int(token) for token in text.split()] for text in texts]
    longest = max(map(len, ids))
    padded = torch.tensor([row + [0] * (longest - len(row)) for row in ids])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])
    return {"input_ids": padded, "attention_mask": mask}


def random_texts(n: int, *, seed: int, shortest: int = 4, longest: int = 12) -> list[str]:
    rng = np.random.default_rng(seed)
    return [
        " ".join(str(token) for token in rng.integers(3, 90, size=rng.integers(shortest, longest + 1)))
        for _ in range(n)
    ]


def random_examples(n: int, *, seed: int, labels: tuple[str, ...] = LABELS) -> Examples:
    return Examples(random_texts(n, seed=seed), tuple(labels[i % len(labels)] for i in range(n)), f"random-{seed}")


_SIZE = {"vocab_size": 100, "num_labels": 3, "pad_token_id": 0}
_BERT = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}


def random_module(architecture: str) -> nn.Module:
    """Return a tiny model of the model library with random, rather large weights, in evaluation mode."""
    torch.manual_seed(11)
    builders = {
        "bert": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**_SIZE, **_BERT)),
        "distilbert": lambda: transformers.DistilBertForSequenceClassification(
            transformers.DistilBertConfig(**_SIZE, dim=32, n_layers=3, n_heads=4, hidden_dim=48)
        ),
        # its blocks return a tuple, and the encoder unpacks two entries of it
        "deberta": lambda: transformers.DebertaV2ForSequenceClassification(
            transformers.DebertaV2Config(**_SIZE, **_BERT, relative_attention=True, pos_att_type=["p2c", "c2p"])
        ),
        "gpt2": lambda: transformers.GPT2ForSequenceClassification(
            transformers.GPT2Config(**_SIZE, n_embd=32, n_layer=3, n_head=4, bos_token_id=1, eos_token_id=2)
        ),
    }
    module = builders[architecture]().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(3)  # the library's initial weights hardly move the logits
    return module


def random_classifier(architecture: str = "bert") -> Classifier:
    return Classifier.from_module(
        random_module(architecture),
        preprocess=token_preprocess,
        labels=LABELS,
        sample=random_texts(4, seed=98),
        name=f"random-{architecture}",
    )
