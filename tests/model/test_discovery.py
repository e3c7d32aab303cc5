"""Models that are written in other ways than most: what is found in them, and what is refused."""

import dataclasses
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
import torch
from architectures import TokenPreprocess, texts
from planted import LABELS, random_module
from torch import Tensor, nn

from synapse.errors import AnatomyError, SettingsError
from synapse.model.classifier import Classifier
from synapse.model.resume import clean_pass, resume
from synapse.perturb.activations import Zero
from synapse.perturb.weights import WeightNoise, places
from synapse.sweeping import Kind
from synapse.sweeping.plan import Reach
from synapse.types import Neurons

WIDTH = 16
SAMPLE = texts(6, 0)


def layer(cls=nn.TransformerEncoderLayer):
    return cls(WIDTH, 2, 32, batch_first=True)


def first_row(hidden):
    return hidden[:, 0]


class Encoder(nn.Module):
    """Three blocks over embedded tokens; `step` calls one of them, `read` gives what the head reads."""

    def __init__(self, block=layer, head=None, embedding=None, read=first_row):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = embedding or nn.Embedding(100, WIDTH)
        self.blocks = nn.ModuleList([block() for _ in range(3)])
        self.head = head or nn.Linear(WIDTH, 3)
        self.read = read

    def step(self, block, hidden, is_padding):
        return block(hidden, src_key_padding_mask=is_padding)

    def embedded(self, ids):
        return self.embedding(ids)

    def forward(self, ids, mask):
        hidden = self.embedded(ids)
        for block in self.blocks:
            hidden = self.step(block, hidden, mask == 0)
        return self.head(self.read(hidden))


def of(module, preprocess=None, sample=SAMPLE, **overrides):
    preprocess = preprocess or TokenPreprocess(before=(1,), ids="ids", mask="mask")
    return Classifier.from_module(module.eval(), preprocess=preprocess, labels=LABELS, sample=sample, **overrides)


def batch_of(classifier):
    return max(classifier.batches(SAMPLE), key=lambda batch: len(batch.index))


class MaskFirst(nn.TransformerEncoderLayer):
    def forward(self, mask, hidden):
        return super().forward(hidden, src_key_padding_mask=mask)


@pytest.mark.parametrize("by_name", [False, True])
def test_blocks_may_take_their_states_behind_other_tensors(by_name):
    class Model(Encoder):
        def step(self, block, hidden, is_padding):
            return block(mask=is_padding, hidden=hidden) if by_name else block(is_padding, hidden)

    anatomy = of(Model(block=partial(layer, MaskFirst))).anatomy
    assert anatomy.blocks == ("blocks.0", "blocks.1", "blocks.2")
    assert [site.module for site in anatomy.sites["mlp"]] == [f"blocks.{i}.linear2" for i in range(3)]
    assert anatomy.sites["attention"][0].module == "blocks.0.self_attn"


def test_blocks_whose_names_carry_no_number_are_not_taken_for_the_norms_inside_them():
    class Named(Encoder):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleDict({"one": layer(), "two": layer()})

        def forward(self, ids, mask):
            hidden = self.embedding(ids)
            for block in self.blocks.values():
                hidden = block(hidden, src_key_padding_mask=mask == 0)
            return self.head(hidden[:, 0])

    with pytest.raises(AnatomyError, match=r"hold .*% of the weights of 'blocks.two' around them; whole blocks"):
        of(Named())
    assert of(Named(), blocks=["blocks.one", "blocks.two"]).anatomy.blocks == ("blocks.one", "blocks.two")


class LowRank(nn.Module):
    """A linear map with a low-rank addition, as adapters have it."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(base.in_features, 4, bias=False), nn.Linear(4, base.out_features, bias=False)

    def forward(self, values):
        return self.base(values) + self.up(self.down(values))


def test_a_linear_map_with_a_low_rank_addition_is_one_map():
    module = random_module("bert")
    for block in module.bert.encoder.layer:
        block.output.dense = LowRank(block.output.dense)
        block.attention.output.dense = LowRank(block.attention.output.dense)
    classifier = of(module, preprocess=TokenPreprocess())
    assert classifier.sites("mlp")[1].module == "bert.encoder.layer.1.output.dense"
    assert classifier.sites("mlp")[1].width == 48
    assert classifier.sites("attention")[1].module == "bert.encoder.layer.1.attention.output.dense"
    assert classifier.anatomy.n_heads == 4


@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm"])
def test_a_head_whose_weights_are_computed_anew_in_each_pass_is_no_place_for_noise(name):
    wrap = getattr(torch.nn.utils.parametrizations, name)
    classifier = of(Encoder(head=wrap(nn.Linear(WIDTH, 3))))
    assert classifier.final is None
    assert places(classifier) == ("block 0", "block 1", "block 2")
    for place in places(classifier):
        with classifier.edited(WeightNoise(place, 1.0)):
            noisy = classifier.predict(SAMPLE)
        assert np.abs(noisy - classifier.predict(SAMPLE)).max() > 1e-3


def test_a_readout_given_by_hand_that_does_not_hold_is_reported_so_and_merges_no_scopes():
    module = Encoder(read=lambda hidden: hidden[:, [0, 2]].flatten(1), head=nn.Linear(2 * WIDTH, 3))
    classifier = of(module, readout="first")
    assert classifier.anatomy.proofs["readout"] == "given by hand as first; the head was seen to read otherwise"
    assert Reach.of(classifier, "residual").scope(2, "all", Kind("zero")) == "all"
    held = of(Encoder(), readout="first")
    assert held.anatomy.proofs["readout"].startswith("of all rows")
    assert Reach.of(held, "residual").scope(2, "all", Kind("zero")) == "readout"


@dataclasses.dataclass
class Hidden:
    states: Tensor


class EmbeddingInObject(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Embedding(100, WIDTH)

    def forward(self, ids):
        return Hidden(self.inner(ids))


class FromObject(Encoder):
    def embedded(self, ids):
        return self.embedding(ids).states


class CalledTwice(Encoder):
    """An outer module whose output cannot be replayed calls the embedding, and so does the model itself."""

    def __init__(self):
        super().__init__()
        self.outer = EmbeddingInObject()
        self.outer.inner = self.embedding

    def embedded(self, ids):
        return self.outer(ids).states + 0.5 * self.embedding(ids.flip(1))


@pytest.mark.parametrize("make", [lambda: FromObject(embedding=EmbeddingInObject()), CalledTwice])
def test_what_cannot_be_given_again_is_computed(make):
    classifier = of(make())
    batch = batch_of(classifier)
    clean, order = clean_pass(classifier, batch), torch.arange(len(batch.index)).flip(0)
    for start in (-1, 0, 2):
        states = None if start < 0 else clean.states[start][order]
        torch.testing.assert_close(resume(classifier, clean, start, states, order), clean.logits[order])


class Pairs:
    """Two segments a text: token_type_ids are zeros and ones as the mask is."""

    def __call__(self, inputs):
        made = TokenPreprocess()(inputs)
        half = torch.arange(made["input_ids"].shape[1]) >= 3
        return {"token_type_ids": (half & (made["attention_mask"] == 1)).long(), **made}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_blocks", [1, 3])
def test_the_second_segment_of_a_pair_is_not_taken_for_padding(dtype, n_blocks):
    module = random_module("bert").to(dtype)
    module.bert.encoder.layer = module.bert.encoder.layer[:n_blocks]
    mask = of(module, preprocess=Pairs()).anatomy.rows.mask
    assert (mask.name, mask.there) == ("attention_mask", 1)


class Output(NamedTuple):
    states: Tensor
    norm: Tensor


class NamedBlock(nn.TransformerEncoderLayer):
    def forward(self, hidden, **options):
        hidden = super().forward(hidden, **options)
        return Output(hidden, hidden.mean())


def test_blocks_may_return_named_tuples_whose_other_entries_have_no_examples():
    class Model(Encoder):
        def step(self, block, hidden, is_padding):
            return block(hidden, src_key_padding_mask=is_padding).states

    classifier = of(Model(block=partial(layer, NamedBlock)))
    clean = classifier.predict(SAMPLE)
    with classifier.edited(Zero(Neurons(1, (2,)))):
        assert np.abs(classifier.predict(SAMPLE) - clean).max() > 1e-3


def test_a_final_map_on_every_row_may_see_rows_before_examples():
    class TimeFirst(Encoder):
        def forward(self, ids, mask):
            hidden = self.embedding(ids).transpose(0, 1)
            for block in self.blocks:
                hidden = block(hidden, src_key_padding_mask=mask == 0)
            return self.head(hidden)[0]

    classifier = of(TimeFirst(block=lambda: nn.TransformerEncoderLayer(WIDTH, 2, 32)))
    assert classifier.anatomy.final == "head"
    clean = clean_pass(classifier, batch_of(classifier))
    torch.testing.assert_close(classifier.final(clean.features), clean.logits)


# torch's own compiler is built on parts that it announces to leave
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_compiled_modules_are_run_as_they_were_written():
    module = Encoder()
    plain = of(module).predict(SAMPLE)
    classifier = of(torch.compile(module))
    assert classifier.n_layers == 3
    np.testing.assert_allclose(classifier.predict(SAMPLE), plain, atol=1e-6)


@pytest.mark.parametrize("name", ["blocks.1", "blocks.2", "embedding"])
def test_hooks_of_the_users_that_change_what_is_given_again_are_refused_and_others_are_not(name):
    module, seen = Encoder(), []
    looking = module.get_submodule(name).register_forward_hook(lambda *_: seen.append(None))
    assert of(module).n_layers == 3
    assert seen
    looking.remove()
    module.get_submodule(name).register_forward_hook(lambda _module, _inputs, output: output + torch.arange(WIDTH))
    with pytest.raises(AnatomyError, match=f"A hook on '{name}' changes what it returns.*Remove the hook"):
        of(module)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda made: tuple(made.values()), "`preprocess` returned a tuple; a dictionary of tensors"),
        (lambda made: made | {"mask": made["mask"].numpy()}, "returned a ndarray as 'mask' for 4 examples"),
        (lambda made: made | {"mask": made["mask"][:1]}, r"returned a tensor of shape \(1, .*\) as 'mask'"),
    ],
)
def test_what_a_preprocess_should_not_return_is_refused(change, message):
    good = TokenPreprocess(before=(1,), ids="ids", mask="mask")

    class Bad:
        lengths = staticmethod(good.lengths)

        def __call__(self, inputs):
            return change(good(inputs))

    with pytest.raises(SettingsError, match=message):
        of(Encoder(), preprocess=Bad())


def test_labels_are_names_in_a_list():
    module, preprocess = Encoder().eval(), TokenPreprocess(before=(1,), ids="ids", mask="mask")
    make = partial(Classifier.from_module, module, preprocess=preprocess, sample=SAMPLE)
    assert make(labels=[0, 1, 2]).labels == ("0", "1", "2")
    with pytest.raises(SettingsError, match="The labels are the text 'abc'; a list of names"):
        make(labels="abc")
    with pytest.raises(SettingsError, match="names no classes of its own"):
        make()


def test_a_long_sample_is_tried_on_four_of_its_examples():
    seen = []

    class Counting(TokenPreprocess):
        def __call__(self, inputs):
            seen.append(len(inputs))
            return super().__call__(inputs)

    of(Encoder(), preprocess=Counting(before=(1,), ids="ids", mask="mask"), sample=texts(200, 1))
    assert max(seen) == 4
