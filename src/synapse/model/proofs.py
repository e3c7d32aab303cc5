"""Proofs of an anatomy: what is tried on one traced batch, and what each trial says."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from synapse.errors import AnatomyError
from synapse.model.anatomy import Anatomy
from synapse.model.hooks import (
    Edit,
    Site,
    edited_sites,
    hidden_states,
    shaken,
    standing_in,
    with_hidden_states,
    without_hidden_states,
)
from synapse.model.readout import Mask, ReadoutTrial, RowWeights
from synapse.model.trace import Call, Inputs, Replay, Trace, forward_logits, passed_over, tensors_in
from synapse.types import Component, Readout

_NUMBERS = 3_000_000
"""Numbers in one block output of copies that share a pass, at most."""


@dataclass(frozen=True, eq=False)
class Laboratory:
    """A module, what is known of its anatomy, and one traced batch: what the proofs are tried on."""

    module: nn.Module
    anatomy: Anatomy
    inputs: Inputs
    trace: Trace
    blocks: Sequence[Call]

    def with_anatomy(self, **findings: Any) -> "Laboratory":
        """Return the same with further findings."""
        return replace(self, anatomy=replace(self.anatomy, **findings))

    @property
    def states(self) -> Float[Tensor, "example token unit"]:
        """The last block's output."""
        last = self.anatomy.sites["residual"][-1]
        return last.rows_first(hidden_states(self.blocks[-1].output), len(self.trace.logits))

    def logits(self, inputs: Inputs, edits: Sequence[tuple[Site, Edit]]) -> Float[Tensor, "example label"]:
        """Return the logits of a whole forward pass under edits."""
        with torch.inference_mode(), edited_sites(self.module, edits):
            return forward_logits(self.module, inputs)

    def head_logits(self, example: int, states: Float[Tensor, "copy token unit"]) -> Float[Tensor, "copy label"]:
        """Return what the head says of copies of an example, with these states after the last block."""
        found = []
        size = max(1, _NUMBERS // states[0].numel())
        for start in range(0, len(states), size):
            chunk = states[start : start + size]
            copies = torch.full((len(chunk),), example, device=states.device)
            with torch.inference_mode(), self._passed_over(len(self.blocks) - 1, chunk, copies):
                found.append(forward_logits(self.module, {n: v[copies] for n, v in self.inputs.items()}))
        return torch.cat(found)

    @property
    def replay(self) -> Replay:
        """What the traced pass has computed, to be given again."""
        calls = {(call.name, call.index): call.output for call in self.trace.calls}
        before = tuple((part, calls[part.module, part.call]) for part in self.anatomy.before)
        blocks = tuple((part, without_hidden_states(calls[part.module, part.call])) for part in self.anatomy.replays)
        return Replay(before, blocks)

    @contextmanager
    def _passed_over(self, layer: int, states: Tensor | None, examples: Int[Tensor, "copy"]) -> Iterator[None]:
        """Give the states for a block's output, without running what can be passed over before it; -1 is no block."""
        site = self.anatomy.sites["residual"][max(layer, 0)]
        with passed_over(self.module, self.replay.take(examples), layer, site, states):
            yield

    def prove_blocks(self) -> float | None:
        """Return how far the head is from the model's own logits when it has the last block's output alone.

        None where that cannot be tried, since what the blocks return beside their states cannot be given again.

        Raises:
            AnatomyError: too far; or the last block's output does not matter.
        """
        gap = self._gap_of_the_last_state()
        if gap is not None and gap > self.tolerance:
            raise AnatomyError(
                f"The last block's output and the head give logits {gap:.1e} away from the model's own; at most "
                f"{self.tolerance:.0e} was expected. The head seems to read something else than the last block's "
                f"output (the blocks found: {', '.join(self.anatomy.blocks)}): name the blocks with `blocks=`, the "
                "last of them all that the head reads."
            )
        changed = self.logits(self.inputs, [(self.anatomy.sites["residual"][-1], shaken)])
        if torch.equal(changed, self.trace.logits):
            raise AnatomyError(
                f"Changing the output of {self.anatomy.blocks[-1]!r} did not move the logits; a block on the way to "
                "the head was expected. A fused fast path may be skipping hooks, or these are not the blocks: name "
                "them with `blocks=`."
            )
        return gap

    def refuse_hooks_that_change(self) -> None:
        """Refuse hooks of the user's on what is recorded and given again: it would pass them twice.

        Raises:
            AnatomyError: what a module returns is another thing before its hooks than behind them.
        """
        names = dict.fromkeys((*self.anatomy.blocks, *(part.module for part in self.anatomy.before)))
        seen: dict[tuple[str, bool], list[Tensor]] = defaultdict(list)
        with ExitStack() as stack:
            for name in names:
                for is_first in (True, False):
                    look = partial(_look, seen[name, is_first])
                    hook = self.module.get_submodule(name).register_forward_hook(look, prepend=is_first)
                    stack.callback(hook.remove)
            self.logits({key: value[-1:] for key, value in self.inputs.items()}, [])
        for name in names:
            pairs = zip(seen[name, True], seen[name, False], strict=True)
            if not all(torch.equal(before.nan_to_num(), behind.nan_to_num()) for before, behind in pairs):
                raise AnatomyError(
                    f"A hook on {name!r} changes what it returns; what is recorded there and given again would pass "
                    "the hook twice. Remove the hook, or put what it does into the module's forward."
                )

    @property
    def tolerance(self) -> float:
        """Largest difference of logits that rounding explains, in the precision of the logits."""
        return max(1e-5, 8 * self._eps) * (1 + float(self.trace.logits.abs().max()))

    @property
    def _eps(self) -> float:
        return max(torch.finfo(self.trace.logits.dtype).eps, torch.finfo(self.states.dtype).eps)

    @property
    def _is_coarse(self) -> bool:
        """Whether the model runs in half precision."""
        return self._eps > 1e-4

    def proofs(self, gap: float | None) -> dict[str, str]:
        """Return what was proved, as sentences; `gap` is what `prove_blocks` found.

        Raises:
            AnatomyError: the first proof that fails.
        """
        every = [(component, site) for component, sites in self.anatomy.sites.items() for site in sites]
        untouched = self.logits(self.inputs, [(site, lambda states: states.clone()) for _, site in every])
        if not torch.equal(untouched, self.trace.logits):
            raise AnatomyError(
                "Passing the values of the sites through unchanged changed the logits; they were expected to stay "
                "bitwise equal. The model may be in training mode or random: call `module.eval()` first."
            )
        still = [site.module for (_, site), moved in zip(every, self._moved(every), strict=True) if not moved]
        if still:
            raise AnatomyError(
                f"Changing what passes {still[0]!r} did not move the logits; a site on the way to the head was "
                "expected. A fused fast path may be skipping hooks, or the module is not used: name another with "
                "`blocks=`, `mlp=` or `attention=`."
            )
        counted = {name: len(sites) for name, sites in self.anatomy.sites.items()}
        return {
            "identity": "passing the values of every site through unchanged leaves the logits bitwise equal",
            "sensitivity": "changing the values of any site moves the logits ("
            + ", ".join(f"{n} {name}" for name, n in counted.items())
            + ")",
            "readout": _READ[self.anatomy.readout]
            if self.anatomy.readout_is_proved
            else f"given by hand as {self.anatomy.readout}; the head was seen to read otherwise",
            "head": "not tried: what the blocks return beside their states cannot be given again"
            if gap is None
            else f"last recorded state and head give the model's own logits (largest difference {gap:.0e})",
        }

    def readout_trial(self, mask: Mask | None) -> ReadoutTrial:
        """Return the trial of readouts on one example, given what tells its padding."""
        # The shortest example has padding rows, which tell "the last row" from "the last row that is no padding". Where
        # padding is not known, the longest one has none.
        example = 0 if mask is None else len(self.states) - 1
        there = RowWeights("mean", mask).rows(self.inputs, self.states.shape[1])[example]
        return ReadoutTrial(there, self.states[example], partial(self.head_logits, example))

    def _moved(self, sites: Sequence[tuple[Component, Site]]) -> list[bool]:
        """Return for every site whether its change moves the logits: a copy of one example for each, from its block on.

        What lies below is given again, and the copies that start at one block share a pass.
        """
        by_block: dict[int, list[int]] = defaultdict(list)
        for position, (component, site) in enumerate(sites):
            by_block[self._block_before(component, site)].append(position)
        moved = [False] * len(sites)
        size = max(1, min(32, _NUMBERS // self.states[0].numel()))
        for below, positions in by_block.items():
            for chunk in (positions[start : start + size] for start in range(0, len(positions), size)):
                edits = [(sites[position][1], _shaken_copy(copy)) for copy, position in enumerate(chunk)]
                changed = self._from_block(below, len(chunk), edits)
                # In low precision only a pass of the same shape rounds alike, and tells a small effect from none.
                clean = self._from_block(below, len(chunk), []) if self._is_coarse else self.trace.logits[-1]
                gaps = (changed - clean).abs().amax(dim=1)
                for position, gap in zip(chunk, gaps, strict=True):
                    moved[position] = bool(gap > (0 if self._is_coarse else 0.1 * self.tolerance))
        return moved

    def _block_before(self, component: Component, site: Site) -> int:
        """Return the last block that a change of the site leaves as it was, or runs before it acts on its output."""
        residual = self.anatomy.sites["residual"]
        if component == "pooler":
            return len(residual) - 1
        if component == "residual":
            return residual.index(site)
        return [(block.module, block.call) for block in residual].index(site.within or ("", 0)) - 1

    def _from_block(self, layer: int, copies: int, edits: Sequence[tuple[Site, Edit]]) -> Float[Tensor, "copy label"]:
        """Return the logits of copies of the last example under edits, with the block's output and all below given."""
        example = torch.full((copies,), len(self.trace.logits) - 1, device=self.trace.logits.device)
        states = None
        if layer >= 0:
            site, output = self.anatomy.sites["residual"][layer], hidden_states(self.blocks[layer].output)
            states = site.rows_first(output, len(self.trace.logits))[example]
        inputs = {name: value[example] for name, value in self.inputs.items()}
        with torch.inference_mode(), edited_sites(self.module, edits), self._passed_over(layer, states, example):
            return forward_logits(self.module, inputs)

    def _gap_of_the_last_state(self) -> float | None:
        """Return how far the logits are off when all blocks but the last have forgotten their states."""
        if not self.anatomy.replays:
            return None
        replay, last = self.replay, self.anatomy.sites["residual"][-1]
        outputs = replay.up_to(len(self.blocks) - 1, torch.zeros_like(last.as_it_was(self.states)))
        # a block that is called several times gives its last output last
        outputs[last.module][-1] = with_hidden_states(outputs[last.module][-1], last.as_it_was(self.states))
        with torch.inference_mode(), standing_in(self.module, outputs):
            return float((forward_logits(self.module, self.inputs) - self.trace.logits).abs().max())


_READ: Mapping[Readout, str] = {
    "first": "of all rows of the last block's output only the first one moves the logits",
    "last": "of all rows of the last block's output only the last one that is no padding moves the logits",
    "first-two": "of all rows of the last block's output only the first two move the logits",
    "mean": "every row of the last block's output that is no padding moves the logits, and their order does not",
    "mean-but-first": "every row of the last block's output but the first moves the logits, and their order does not",
    "first-and-mean": "every row of the last block's output moves the logits; the order of all but the first does not",
}


def _look(seen: list[Tensor], _module: nn.Module, _arguments: Any, output: Any) -> None:
    seen.extend(tensor.clone() for tensor in tensors_in(output))


def _shaken_copy(copy: int) -> Edit:
    def changed(states: Tensor) -> Tensor:
        states = states.clone()
        states[copy] = shaken(states[copy])
        return states

    return changed
