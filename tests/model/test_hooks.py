import pytest
import torch
from planted import random_module
from torch import nn

from synapse.errors import AnatomyError
from synapse.model.hooks import edited_outputs, hidden_states, passed_over


def hook_count(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def test_an_edit_replaces_the_output_and_is_gone_afterwards():
    layer = nn.Linear(3, 3)
    x = torch.randn(2, 3)
    clean = layer(x)
    with edited_outputs([(layer, lambda out: out * 2)]):
        assert torch.equal(layer(x), clean * 2)
    assert torch.equal(layer(x), clean)


def test_hooks_are_removed_after_an_error_inside_the_edit():
    module = random_module("bert")

    def fail(_states):
        raise RuntimeError("inside the edit")

    with (
        pytest.raises(RuntimeError, match="inside the edit"),
        edited_outputs([(module.bert.encoder.layer[1], fail)]),
    ):
        module(input_ids=torch.ones(1, 4, dtype=torch.long))
    assert hook_count(module) == 0


def test_only_the_first_entry_of_a_tuple_is_replaced():
    class Pair(nn.Module):
        def forward(self, x):
            return x, "weights"

    pair = Pair()
    with edited_outputs([(pair, lambda out: out + 1)]):
        first, second = pair(torch.zeros(2))
    assert torch.equal(first, torch.ones(2))
    assert second == "weights"


def test_passing_over_a_module_puts_back_a_forward_that_was_wrapped_before():
    layer = nn.Linear(2, 2)
    original = layer.forward
    layer.forward = lambda x: original(x) + 10
    x = torch.zeros(1, 2)
    wrapped = layer(x)
    with pytest.raises(ZeroDivisionError), passed_over([layer], torch.full((1, 2), 7.0)):
        assert torch.equal(layer(x), torch.full((1, 2), 7.0))
        raise ZeroDivisionError
    assert torch.equal(layer(x), wrapped)


def test_a_block_without_hidden_states_is_refused():
    with pytest.raises(AnatomyError, match="A block returned dict"):
        hidden_states({"hidden": torch.zeros(1)})
