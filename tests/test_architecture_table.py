"""The table of architectures is an oracle for others: each of its statements is confirmed here with plain hooks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, get_args

import pytest
import torch
from architectures import LAST_VARIES, TABLE, Architecture, Family, Inputs, Readout, logits_of
from torch import Tensor, nn

N_EXAMPLES = 6
TAPPED = tuple(row for row in TABLE if row.refused is None)


@dataclass(frozen=True)
class Case:
    architecture: Architecture
    module: nn.Module
    raw: list[Any]
    inputs: Inputs
    logits: Tensor


@contextmanager
def plain_arithmetic() -> Iterator[None]:
    """No gradients, and torch's encoder without its fast path, which calls no module inside a block."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def run(module: nn.Module, inputs: Inputs) -> Tensor:
    with plain_arithmetic():
        return logits_of(module(**inputs))


def case_of(architecture: Architecture) -> Case:
    module, raw = architecture.build(), list(architecture.inputs(N_EXAMPLES, 0))
    inputs = architecture.preprocess(raw)
    return Case(architecture, module, raw, inputs, run(module, inputs))


@pytest.fixture(scope="module", params=TABLE, ids=lambda row: row.name)
def case(request) -> Case:
    return case_of(request.param)


@pytest.fixture(scope="module", params=TAPPED, ids=lambda row: row.name)
def tapped(request) -> Case:
    return case_of(request.param)


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


Hook = Callable[[str, Tensor | None, Tensor], Tensor | None]
"""(name, first argument, first output) -> what to put in the output's place, or None."""


def hooked(case: Case, names: tuple[str, ...], hook: Hook) -> Tensor:
    """Return the logits of a pass in which `hook` sees every call of the named modules."""

    def register(name: str) -> Any:
        def call(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
            new = hook(name, arguments[0] if arguments else None, first(output))
            return (new, *output[1:]) if new is not None and isinstance(output, tuple) else new

        return case.module.get_submodule(name).register_forward_hook(call)

    handles = [register(name) for name in dict.fromkeys(names)]
    try:
        return run(case.module, case.inputs)
    finally:
        for handle in handles:
            handle.remove()


def calls(case: Case, names: tuple[str, ...]) -> list[tuple[str, Tensor | None, Tensor]]:
    """Return (name, first argument, first output) of every call of the named modules, in order."""
    seen: list[tuple[str, Tensor | None, Tensor]] = []
    logits = hooked(case, names, lambda name, argument, output: seen.append((name, argument, output)))
    assert torch.equal(logits, case.logits)
    return seen


def noise(*shape: int, size: Tensor) -> Tensor:
    return 2 * size * torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def n_hooks(module: nn.Module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules())


def test_the_table_covers_every_family_and_every_kind_of_readout():
    assert len({row.name for row in TABLE}) == len(TABLE) >= 45
    assert {row.family for row in TABLE} == set(get_args(Family))
    assert {row.readout for row in TAPPED} == set(get_args(Readout))


def test_the_logits_are_example_by_label_finite_and_differ_between_examples(case):
    assert case.logits.shape == (N_EXAMPLES, 3)
    assert case.logits.isfinite().all()
    assert (case.logits.std(dim=0) > 1e-2).all()


def test_a_model_is_built_the_same_each_time_and_in_evaluation_mode(case):
    again = case.architecture.build()
    assert not any(module.training for module in again.modules())
    assert torch.equal(run(again, case.inputs), case.logits)


def test_lengths_are_those_of_the_inputs_alone(case):
    preprocess = case.architecture.preprocess
    widths = [next(iter(preprocess([raw]).values())).shape[1] for raw in case.raw]
    if hasattr(preprocess, "lengths"):
        assert preprocess.lengths(case.raw).tolist() == widths
        assert len(set(widths)) > 1
    else:
        assert len(set(widths)) == 1


def test_padding_changes_answers_exactly_where_the_table_says_so(case):
    alone = torch.cat([run(case.module, case.architecture.preprocess([raw])) for raw in case.raw])
    assert torch.allclose(alone, case.logits, atol=1e-4) != case.architecture.padding_changes_answers


def test_blocks_run_in_the_stated_order_and_give_example_row_unit(tapped):
    row = tapped.architecture
    seen = calls(tapped, row.block_names)
    shapes = {output.shape for _, _, output in seen}
    n_rows = seen[0][2].shape[0 if row.row_first else 1]
    assert tuple(name for name, _, _ in seen) == row.block_names
    assert len(row.block_names) == row.n_blocks
    assert shapes == {(n_rows, N_EXAMPLES, row.width) if row.row_first else (N_EXAMPLES, n_rows, row.width)}


def test_the_rows_of_the_last_block_that_move_the_logits_are_the_readout(tapped):
    row = tapped.architecture
    last = calls(tapped, row.block_names)[-1][2]
    n_rows = last.shape[0 if row.row_first else 1]
    shift = noise(row.width, size=last.std())  # random, for a constant one is lost in a normalisation
    moved = torch.zeros(N_EXAMPLES, n_rows, dtype=torch.bool)
    for index in range(n_rows):
        countdown = row.block_names.count(row.block_names[-1])  # a shared block is edited in its last call only

        def edit(name: str, argument: Tensor | None, output: Tensor, at: int = index) -> Tensor | None:
            nonlocal countdown
            countdown -= 1
            if countdown > 0:
                return None
            edited = output.clone()
            edited.select(0 if row.row_first else 1, at).add_(shift)
            return edited

        logits = hooked(tapped, row.block_names[-1:], edit)
        moved[:, index] = (logits - tapped.logits).abs().amax(dim=1) > 1e-7
    assert torch.equal(moved, row.readout_rows(tapped.inputs, n_rows))


@pytest.mark.parametrize("component", ["mlp", "attention"])
def test_sublayers_run_in_the_stated_order_with_the_stated_widths(tapped, component):
    row = tapped.architecture
    names = row.mlp if component == "mlp" else row.attention
    if names is None:
        pytest.skip("the table states none")
    seen = calls(tapped, names)
    assert tuple(name for name, _, _ in seen) == names
    assert len(names) == row.n_blocks
    for name, argument, output in seen:
        if component == "mlp":
            assert argument is not None
            assert argument.shape[-1] == row.mlp_width != row.width
            assert output.shape[-1] == row.attention_width  # what a sublayer adds; some blocks work at a smaller width
            assert argument.shape[:-1] == output.shape[:-1]
        else:
            block = calls(tapped, (row.block_names[0],))[0][2]
            assert output.shape == (*block.shape[:2], row.attention_width)
        assert name.startswith(tuple(row.block_names))


@pytest.mark.parametrize("component", ["mlp", "attention"])
def test_an_edit_of_the_last_sublayer_moves_the_logits_of_every_example(tapped, component):
    row = tapped.architecture
    names = row.mlp if component == "mlp" else row.attention
    if names is None:
        pytest.skip("the table states none")
    logits = hooked(tapped, names[-1:], lambda name, argument, output: output + noise(*output.shape, size=output.std()))
    assert ((logits - tapped.logits).abs().amax(dim=1) > 1e-7).all()


def test_the_final_linear_map_gives_the_logits_at_the_readout_row(tapped):
    row = tapped.architecture
    if row.final is None:
        pytest.skip("two heads are averaged")
    ((_, _, output),) = calls(tapped, (row.final,))
    assert isinstance(tapped.module.get_submodule(row.final), nn.Linear)
    if output.ndim == 3:
        output = output[row.readout_rows(tapped.inputs, output.shape[1])]
    assert torch.equal(output, tapped.logits)


def test_the_library_s_hidden_states_are_block_outputs_as_far_as_the_table_says(tapped):
    row = tapped.architecture
    if row.hidden_states is None:
        assert row.n_comparable == 0
        pytest.skip("the library gives none")
    outputs = [output for _, _, output in calls(tapped, row.block_names)]
    before = n_hooks(tapped.module)
    states = row.hidden_states(tapped.module, tapped.inputs)
    assert len(states) == row.n_blocks
    for index, (state, output) in enumerate(zip(states, outputs, strict=True)):
        output = output.transpose(0, 1) if row.row_first else output
        # Some libraries cut off the rows that they padded themselves.
        if index < row.n_comparable or row.hidden_states_note != LAST_VARIES:
            assert torch.equal(state, output[:, : state.shape[1]]) == (index < row.n_comparable)
    assert n_hooks(tapped.module) == before


def test_swin_s_blocks_are_those_of_its_last_stage():
    case = case_of(next(row for row in TABLE if row.name == "Swin"))
    with torch.no_grad():
        last = case.module(**case.inputs, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(last, calls(case, case.architecture.block_names)[-1][2])


def test_a_refused_row_states_nothing_inside_the_model():
    refused = [row for row in TABLE if row.refused is not None]
    assert {row.name for row in refused} == {"ConvNeXt", "SqueezeBERT"}
    for row in refused:
        assert (row.block_names, row.mlp, row.attention) == ((), None, None)


def test_squeezebert_s_blocks_are_never_called_as_modules():
    case = case_of(next(row for row in TABLE if row.name == "SqueezeBERT"))
    assert calls(case, tuple(f"transformer.encoder.layers.{block}" for block in range(3))) == []
