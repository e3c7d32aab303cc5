import pytest
import torch
from planted import random_module
from torch import nn

from synapse.errors import AnatomyError
from synapse.model.hooks import Site, edited_sites, hidden_states, standing_in, study_mode


def hook_count(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


class Twice(nn.Module):
    """Calls one layer twice, inside a block that it also calls twice."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, hidden):
            return self.layer(self.layer(hidden))

    def __init__(self):
        super().__init__()
        self.block = self.Block()

    def forward(self, x):
        return self.block(self.block(x))


def test_an_edit_replaces_the_output_of_one_call_and_is_gone_afterwards():
    torch.manual_seed(0)
    model, x = Twice(), torch.randn(2, 5, 3)
    layer, clean = model.block.layer, model(x)
    for call in range(4):
        expected = x
        for step in range(4):
            expected = layer(expected) * (2 if step == call else 1)
        for site in (
            Site("block.layer", 3, call=call),
            Site("block.layer", 3, call=call % 2, within=("block", call // 2)),
        ):
            with edited_sites(model, [(site, lambda states: states * 2)]):
                for _ in range(2):  # calls are counted anew in every pass
                    torch.testing.assert_close(model(x), expected)
    assert torch.equal(model(x), clean)


def test_an_inner_call_is_told_by_its_block_although_blocks_below_are_passed_over():
    torch.manual_seed(0)
    model, x = Twice(), torch.randn(2, 5, 3)
    given = torch.randn(2, 5, 3)
    expected = model.block.layer(model.block.layer(given) + 1)
    site = Site("block.layer", 3, call=0, within=("block", 1))
    with standing_in(model, {"block": [given]}), edited_sites(model, [(site, lambda states: states + 1)]):
        torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        ("example token unit", (2, 5, 3)),
        ("token example unit", (5, 2, 3)),
        ("example*token unit", (10, 3)),
        ("example unit", (2, 3)),
    ],
)
def test_edits_see_examples_first_whatever_the_axes_of_the_model(layout, shape):
    values = torch.arange(30.0 if len(shape) > 1 and shape != (2, 3) else 6.0).reshape(shape)
    site = Site("layer", 3, layout)
    states = site.rows_first(values, 2)
    assert states.shape == ((2, 1, 3) if layout == "example unit" else (2, 5, 3))
    assert torch.equal(site.as_it_was(states), values)
    if layout == "token example unit":
        assert torch.equal(states[1, 4], values[4, 1])
    if layout == "example*token unit":
        assert torch.equal(states[1, 4], values[9])


def test_the_input_of_a_module_can_be_edited_wherever_it_stands_among_the_arguments():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x):
            return self.layer(x) + self.layer(input=x)

    model, x = Model(), torch.randn(2, 3)
    for call, argument in ((0, 0), (1, "input")):
        site = Site("layer", 3, "example unit", call, "input", argument=argument)
        with edited_sites(model, [(site, lambda states: states * 2)]):
            torch.testing.assert_close(model(x), model.layer(x) + model.layer(2 * x))


def test_hooks_are_removed_after_an_error_inside_the_edit():
    module = random_module("bert")

    def fail(_states):
        raise RuntimeError("inside the edit")

    with (
        pytest.raises(RuntimeError, match="inside the edit"),
        edited_sites(module, [(Site("bert.encoder.layer.1", 32), fail)]),
    ):
        module(input_ids=torch.ones(1, 4, dtype=torch.long))
    assert hook_count(module) == 0


def test_only_the_first_entry_of_a_tuple_is_replaced():
    class Pair(nn.Module):
        def forward(self, x):
            return x, "weights"

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.pair = Pair()

        def forward(self, x):
            return self.pair(x)

    model = Model()
    with edited_sites(model, [(Site("pair", 2), lambda out: out + 1)]):
        first, second = model(torch.zeros(1, 1, 2))
    assert torch.equal(first, torch.ones(1, 1, 2))
    assert second == "weights"


def test_standing_in_puts_back_a_forward_that_was_wrapped_before():
    model = nn.Sequential(nn.Linear(2, 2))
    layer = model[0]
    original = layer.forward
    layer.forward = lambda x: original(x) + 10
    x = torch.zeros(1, 2)
    wrapped = layer(x)
    with pytest.raises(ZeroDivisionError), standing_in(model, {"0": [torch.full((1, 2), 7.0)]}):
        assert torch.equal(model(x), torch.full((1, 2), 7.0))
        raise ZeroDivisionError
    assert torch.equal(layer(x), wrapped)


def test_the_fused_kernel_and_the_generation_cache_are_off_for_the_time_being_and_come_back_after_an_error():
    module = random_module("gpt2")
    assert module.config.use_cache
    with pytest.raises(ZeroDivisionError), study_mode(module):
        assert not module.config.use_cache
        assert not torch.backends.mha.get_fastpath_enabled()
        raise ZeroDivisionError
    assert module.config.use_cache
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_block_without_hidden_states_is_refused():
    with pytest.raises(AnatomyError, match="A block returned dict"):
        hidden_states({"hidden": torch.zeros(1)})
