"""Find the blocks, the readout row and the head of a Transformer classifier, by structure and behaviour.

No table of architectures: the blocks are the numbered modules of one class whose outputs keep one shape and that
hold the most weights; the readout row is the row of the last block's output whose change moves the logits; the head is
what runs after the last block. Each finding is proved with a few inputs before anything is measured.
"""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from synapse.errors import AnatomyError, ModelError
from synapse.model.hooks import edited_outputs, hidden_states, passed_over

Readout = Literal["first", "last"]
"""`first`: row 0 ([CLS]); `last`: the last row that is no padding."""


@dataclass(frozen=True)
class Anatomy:
    """Where a classifier computes what; names are those of `module.named_modules()`.

    `embedding` is the one module before the blocks whose output has their shape, or None where there are several.
    `head` lists what runs after the last block; `final` is the linear map that gives the logits, or None where the
    head does not end in one. `tuple_length` is the length of the tuple in which a block returns its
    states, the other entries being None; 0 where it returns the tensor alone.
    """

    embedding: str | None
    blocks: tuple[str, ...]
    width: int
    readout: Readout
    head: tuple[str, ...]
    final: str | None
    tuple_length: int
    proofs: Mapping[str, str]

    def block_output(self, states: Tensor) -> Tensor | tuple[Tensor | None, ...]:
        """Return states in the form in which a block returns them."""
        return (states, *[None] * (self.tuple_length - 1)) if self.tuple_length else states


@dataclass(frozen=True)
class _Call:
    """One module call of a traced forward pass; `started` and `ended` count all calls' events in order."""

    name: str
    module: nn.Module
    output: Any
    started: int
    ended: int


def find_anatomy(module: nn.Module, inputs: Mapping[str, Tensor], n_labels: int) -> Anatomy:
    """Return the anatomy of `module`, proved on `inputs` (two or more examples, best of unequal length).

    Raises:
        ModelError: the output is no (example, label) matrix of logits.
        AnatomyError: a part was not found, or its proof failed; the message says what was seen.
    """
    calls, logits = _trace(module, inputs)
    if logits.ndim != 2 or logits.shape[1] != n_labels:
        raise ModelError(
            f"The model returned an output of shape {tuple(logits.shape)}; one row of {n_labels} logits for each "
            "example was expected. Use a model with a single-label classification head, and one label name per logit."
        )
    blocks = _find_blocks(calls, n_examples=logits.shape[0])
    last = blocks[-1]
    readout = _find_readout(module, last.module, inputs, hidden_states(last.output), logits)
    head = _outermost([call for call in calls if call.started > last.ended])
    anatomy = Anatomy(
        embedding=_find_embedding(calls, blocks[0]),
        blocks=tuple(call.name for call in blocks),
        width=hidden_states(last.output).shape[2],
        readout=readout,
        head=tuple(call.name for call in sorted(head, key=lambda call: call.started)),
        final=_find_final(calls, logits, readout_rows(readout, inputs, hidden_states(last.output).shape[1])),
        tuple_length=_tuple_length(last),
        proofs={},
    )
    return Anatomy(**{**anatomy.__dict__, "proofs": _prove(module, anatomy, inputs, blocks, logits)})


def forward_logits(module: nn.Module, inputs: Mapping[str, Tensor]) -> Float[Tensor, "example label"]:
    """Return the logits of a forward pass, whether the module gives them alone, first in a tuple or by name."""
    output = module(**inputs)
    logits = getattr(output, "logits", output[0] if isinstance(output, tuple) else output)
    if not isinstance(logits, Tensor):
        raise ModelError(
            f"The model returned {type(output).__name__} without logits; a tensor of logits, or an output with "
            "`.logits`, was expected. Load it with a classification head."
        )
    return logits


def readout_rows(readout: Readout, inputs: Mapping[str, Tensor], n_tokens: int) -> Int[Tensor, "example"]:
    """Return the index of the readout row of every example."""
    first = next(iter(inputs.values()))
    mask = inputs.get("attention_mask")
    if readout == "first":
        return torch.zeros(len(first), dtype=torch.long, device=first.device)
    if mask is None:
        return torch.full((len(first),), n_tokens - 1, dtype=torch.long, device=first.device)
    position = torch.arange(mask.shape[1], device=mask.device)
    return (position * (mask != 0)).argmax(dim=1)


def _trace(module: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[list[_Call], Tensor]:
    """Run the module once and return all calls of its submodules, in order of their start, with the logits."""
    calls: list[_Call] = []
    started: dict[str, int] = {}
    events = 0

    def before(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any) -> None:
            nonlocal events
            started[name] = events
            events += 1

        return hook

    def after(name: str) -> Any:
        def hook(submodule: nn.Module, _inputs: Any, output: Any) -> None:
            nonlocal events
            calls.append(_Call(name, submodule, output, started[name], events))
            events += 1

        return hook

    handles = []
    try:
        for name, submodule in module.named_modules():
            if name:
                handles.append(submodule.register_forward_pre_hook(before(name)))
                handles.append(submodule.register_forward_hook(after(name)))
        with torch.inference_mode():
            logits = forward_logits(module, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return sorted(calls, key=lambda call: call.started), logits


def _find_blocks(calls: list[_Call], n_examples: int) -> list[_Call]:
    """Return the calls of the blocks: the outermost numbered siblings of one class and shape with the most weights."""
    siblings: dict[tuple[str, type], list[_Call]] = defaultdict(list)
    for call in calls:
        numbered = re.fullmatch(r"(.*?)\.?\d+", call.name)
        output = call.output[0] if isinstance(call.output, tuple) and call.output else call.output
        is_states = isinstance(output, Tensor) and output.ndim == 3 and output.is_floating_point()
        if numbered and is_states and output.shape[0] == n_examples:
            siblings[numbered[1], type(call.module)].append(call)
    groups = {key: group for key, group in siblings.items() if len({_shape(call) for call in group}) == 1}
    outer = [group for group in groups.values() if len(_outermost(group, among=groups)) == len(group)]
    if not outer:
        seen = sorted({type(call.module).__name__ for call in calls})
        raise AnatomyError(
            "No Transformer blocks were found: numbered modules of one class whose outputs share one shape (example, "
            f"token, width) were expected. Seen: {', '.join(seen)}. Keep the blocks in an nn.ModuleList, batch first."
        )
    blocks = max(outer, key=lambda group: sum(p.numel() for call in group for p in call.module.parameters()))
    if len({call.name for call in blocks}) < len(blocks):
        raise AnatomyError(
            f"The block {blocks[0].name!r} is called {len(blocks)} times in one forward pass; blocks of their own were "
            "expected. Models that share one block between layers cannot be studied yet."
        )
    return blocks


def _shape(call: _Call) -> tuple[int, ...]:
    return tuple(hidden_states(call.output).shape)


def _outermost(calls: list[_Call], among: Mapping[Any, list[_Call]] | None = None) -> list[_Call]:
    """Return the calls that do not lie inside another call of the same list (or inside one of `among`)."""
    others = calls if among is None else [call for group in among.values() for call in group]
    return [call for call in calls if not any(o.started < call.started and call.ended < o.ended for o in others)]


def _tuple_length(block: _Call) -> int:
    if not isinstance(block.output, tuple):
        return 0
    if any(entry is not None for entry in block.output[1:]):
        raise AnatomyError(
            f"The block {block.name!r} returns more than its hidden states; these alone, or None beside them, were "
            "expected. Turn off what else it returns (attention weights, a cache for generation)."
        )
    return len(block.output)


def _find_embedding(calls: list[_Call], first_block: _Call) -> str | None:
    """Return the module that gives the first block its input, if one module does all of that."""
    before = _outermost([call for call in calls if call.ended < first_block.started])
    is_alone = len(before) == 1 and isinstance(before[0].output, Tensor)
    return before[0].name if is_alone and before[0].output.shape == _shape(first_block) else None


def _find_readout(
    module: nn.Module,
    last_block: nn.Module,
    inputs: Mapping[str, Tensor],
    states: Float[Tensor, "example token unit"],
    logits: Float[Tensor, "example label"],
) -> Readout:
    """Change one row of the last block's output at a time and see which of them move the logits."""
    mask = inputs.get("attention_mask")
    # The shortest example has padding rows, which tell "the last row" from "the last row that is no padding".
    example = 0 if mask is None else int(mask.sum(dim=1).argmin())
    n_tokens = states.shape[1]
    repeated = {name: value[example : example + 1].expand(n_tokens, *value.shape[1:]) for name, value in inputs.items()}

    def change_own_row(hidden: Tensor) -> Tensor:
        hidden = hidden.clone()
        own = torch.arange(n_tokens, device=hidden.device)
        # Alternating signs: a constant shift would be removed by a layer norm.
        shift = 3 * states[example].std() * (1 - 2 * (torch.arange(hidden.shape[2], device=hidden.device) % 2))
        hidden[own, own] += shift.to(hidden.dtype)
        return hidden

    with torch.inference_mode(), edited_outputs([(last_block, change_own_row)]):
        changed = forward_logits(module, repeated)
    moved = (changed - logits[example]).abs().amax(dim=1)
    rows = torch.nonzero(moved > 1e-4 * (1 + logits[example].abs().max())).flatten().tolist()
    last = int(readout_rows("last", {n: v[example : example + 1] for n, v in inputs.items()}, n_tokens)[0])
    if rows == [0]:
        return "first"
    if rows == [last]:
        return "last"
    raise AnatomyError(
        f"The head reads the rows {rows} of {n_tokens}; a head that reads the first row ([CLS]) or the last that is "
        "no padding was expected. Pooling over several rows cannot be studied yet."
    )


def _find_final(calls: list[_Call], logits: Tensor, rows: Tensor) -> str | None:
    """Return the name of the linear map whose output is the logits, at the readout row if it maps every row."""
    example = torch.arange(len(logits), device=logits.device)
    for call in reversed(calls):
        if not isinstance(call.module, nn.Linear) or not isinstance(call.output, Tensor):
            continue
        output = call.output[example, rows] if call.output.ndim == 3 else call.output
        if output.shape == logits.shape and torch.equal(output, logits):
            return call.name
    return None


def _prove(
    module: nn.Module, anatomy: Anatomy, inputs: Mapping[str, Tensor], blocks: list[_Call], logits: Tensor
) -> dict[str, str]:
    """Return what was proved, as sentences; raise AnatomyError for the first proof that fails."""
    modules = [call.module for call in blocks]
    with torch.inference_mode():
        with edited_outputs([(block, lambda hidden: hidden.clone()) for block in modules]):
            neutral = torch.equal(forward_logits(module, inputs), logits)
        if not neutral:
            raise AnatomyError(
                "Passing the block outputs through unchanged changed the logits; they were expected to stay bitwise "
                "equal. The model may be in training mode or random: call `module.eval()` first."
            )
        for call in blocks:
            with edited_outputs([(call.module, lambda hidden: -hidden)]):
                moved = not torch.equal(forward_logits(module, inputs), logits)
            if not moved:
                raise AnatomyError(
                    f"Changing the output of {call.name!r} did not move the logits; a block on the way to the head was "
                    "expected. A fused fast path may be skipping hooks, or the block is not used."
                )
        final_states = hidden_states(blocks[-1].output)
        embedding = [] if anatomy.embedding is None else [module.get_submodule(anatomy.embedding)]
        with passed_over(embedding, final_states), passed_over(modules, anatomy.block_output(final_states)):
            gap = float((forward_logits(module, inputs) - logits).abs().max())
    if gap > 1e-5:
        raise AnatomyError(
            f"The recorded output of the last block and the head give logits {gap:.1e} away from the model's own; at "
            "most 1e-5 was expected. The head seems to read something else than the last block's output."
        )
    return {
        "identity": "passing every block output through unchanged leaves the logits bitwise equal",
        "sensitivity": f"changing the output of any of the {len(blocks)} blocks moves the logits",
        "readout": f"of all rows of the last block's output only the {anatomy.readout} one moves the logits",
        "head": f"last recorded state and head give the model's own logits (largest difference {gap:.0e})",
    }
