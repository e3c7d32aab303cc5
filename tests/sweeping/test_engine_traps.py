"""Models that would mislead an engine that reuses what it should not: each caught one."""

import numpy as np
import pytest
import torch
import torch.nn.functional as functional
from torch import nn

from synapse.data.examples import Examples
from synapse.errors import ModelError, SettingsError
from synapse.model.classifier import Classifier
from synapse.ranking.base import Ranking
from synapse.recording import record
from synapse.sweeping import Cell, Kind, sweep
from synapse.types import Neurons

WIDTH, LABELS = 16, ("a", "b", "c")


class Block(nn.Module):
    """One block with two heads and no normalisation."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)

    def forward(self, hidden, mask):
        heads = [
            projected.unflatten(-1, (2, 8)).transpose(1, 2)
            for projected in (self.query(hidden), self.key(hidden), self.value(hidden))
        ]
        mixed = functional.scaled_dot_product_attention(*heads, attn_mask=mask)
        hidden = hidden + self.out(mixed.transpose(1, 2).flatten(2))
        return hidden + self.down(functional.gelu(self.up(hidden)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(40, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, ids, mask):
        hidden = self.tokens(ids)
        for block in self.blocks:
            hidden = block(hidden, mask[:, None, None].bool())
        return self.head(hidden[:, 0])


class Preprocess:
    def lengths(self, items):
        return np.array([len(item) for item in items])

    def __call__(self, items):
        longest = max(map(len, items))
        ids = torch.tensor([[*item, *[0] * (longest - len(item))] for item in items])
        there = torch.tensor([[1] * len(item) + [0] * (longest - len(item)) for item in items])
        return {"ids": ids, "mask": there}


def items(*lengths, seed=0):
    draw = np.random.default_rng(seed)
    return [tuple(int(token) for token in draw.integers(1, 40, length)) for length in lengths]


def swept(module, lengths, *, preprocess=None, cells=None, engine="auto", max_tokens=60):
    classifier = Classifier.from_module(
        module.eval(), preprocess=preprocess or Preprocess(), labels=LABELS, sample=items(20, 15, 9, 5, seed=9)
    )
    classifier.max_tokens = max_tokens
    examples = Examples(items(*lengths), tuple(LABELS[i % 3] for i in range(len(lengths))), "test")
    train = Examples(items(7, 8, 9, seed=1), LABELS, "train")
    ranking = Ranking("none", np.zeros((3, 4, WIDTH)), LABELS, "nowhere")
    cells = cells or [cell(layer, scope) for layer in range(3) for scope in ("readout", "all")]
    reference = record(classifier, train)
    return sweep(classifier, examples, ranking, reference=reference, cells=cells, engine=engine)


def cell(layer, scope="readout", units=(0, 3, 5, 8), kind=None, component="residual"):
    return Cell(Neurons(layer, units, component), scope, kind or Kind("zero"), "", "", "top", -1, len(units) / WIDTH)


def test_an_input_that_is_by_chance_as_wide_as_a_batch_is_long_is_not_cut_to_a_row():
    class Gated(Model):
        def forward(self, ids, mask, gate):
            hidden = self.tokens(ids)
            for block in self.blocks:
                hidden = block(hidden, mask[:, None, None].bool())
            return self.head(hidden[:, 0] * gate)

    class WithGate(Preprocess):
        def __call__(self, items):
            gates = [np.random.default_rng(sum(item)).random(WIDTH) for item in items]
            return {**super().__call__(items), "gate": torch.from_numpy(np.stack(gates)).float()}

    # The proof sees batches of 20 rows; a later one has 16, the width of the gate.
    lengths = [20, 20, 19, 16, 15, 14, 16]
    fast, plain = (swept(Gated(), lengths, preprocess=WithGate(), engine=engine) for engine in ("exact", "plain"))
    assert set(fast.reuse.values()) == {"rows"}
    np.testing.assert_allclose(fast.logits, plain.logits, atol=1e-5)


def test_what_all_examples_share_is_not_spoilt_by_blocks_that_work_in_place():
    class Slopes(nn.Module):
        def forward(self, n_tokens):
            place = torch.arange(n_tokens)
            return -(place[:, None] - place).abs().float() * 0.3

    class Sloping(Model):
        def __init__(self):
            super().__init__()
            self.slopes = Slopes()

        def forward(self, ids, mask):
            hidden, slopes = self.tokens(ids), self.slopes(ids.shape[1])
            for block in self.blocks:
                hidden = block(hidden, slopes[None, None].masked_fill(~mask[:, None, None].bool(), -1e9))
                slopes.mul_(0.5)
            return self.head(hidden[:, 0])

    lengths = [12] * 12
    cells = [cell(layer, "all", tuple(range(k))) for layer in range(3) for k in range(1, 12)]
    fast, plain = (swept(Sloping(), lengths, cells=cells, engine=engine) for engine in ("auto", "plain"))
    np.testing.assert_allclose(fast.logits, plain.logits, atol=1e-5)


def test_a_module_that_runs_only_where_there_is_padding_is_no_hindrance():
    class Bias(nn.Module):
        def forward(self, mask):
            return mask[:, None, None].bool()

    class SometimesMasked(Model):
        def __init__(self):
            super().__init__()
            self.bias = Bias()

        def forward(self, ids, mask):
            hidden, allowed = self.tokens(ids), None if bool(mask.all()) else self.bias(mask)
            for block in self.blocks:
                hidden = block(hidden, allowed)
            return self.head(hidden[:, 0])

    lengths = [12, 12, 12, 12, 12, 11, 9, 7]
    fast, plain = (swept(SometimesMasked(), lengths, engine=engine) for engine in ("auto", "plain"))
    np.testing.assert_allclose(fast.logits, plain.logits, atol=1e-5)


def test_cells_of_another_component_and_neurons_that_are_not_there_are_refused():
    with pytest.raises(SettingsError, match="A cell edits 'mlp', and the ranking is of 'residual'"):
        swept(Model(), [5, 6], cells=[cell(1), cell(1, component="mlp")])
    with pytest.raises(SettingsError, match="Unit 99 was asked for"):
        swept(Model(), [5, 6], cells=[cell(1, units=(99,))])
    with pytest.raises(SettingsError, match="Layer 7 was asked for"):
        swept(Model(), [5, 6], cells=[cell(7)])


def test_logits_that_are_no_numbers_are_refused_as_nan_stands_for_what_was_not_run():
    with pytest.raises(ModelError, match=r"layer 2, readout the logits of example \d are not finite"):
        swept(Model(), [5, 6], cells=[cell(2, kind=Kind("scale", 3e38), units=tuple(range(WIDTH)))])
