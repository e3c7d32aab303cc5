"""Find the parts of a Transformer classifier by structure and behaviour, and prove each with a few inputs.

No table of architectures. The blocks are the numbered modules of one class whose outputs keep one shape and that hold
the most weights; the rows that the head reads are those of the last block's output whose change moves the logits; the
head is what runs after the last block. Two forward passes, one with an example more, tell which axis runs over
examples.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from synapse.errors import AnatomyError, ModelError, SettingsError, near
from synapse.model.hooks import (
    Edit,
    Layout,
    Site,
    edited_sites,
    hidden_states,
    shaken,
    standing_in,
    with_hidden_states,
    without_hidden_states,
)
from synapse.model.inner import find_inner_sites
from synapse.model.readout import MASK, Mask, RowWeights, find_readout
from synapse.model.trace import Call, Inputs, Replay, Replayable, Trace, forward_logits, outermost, replayable, traced
from synapse.types import COMPONENTS, READOUTS, Component, Readout


@dataclass(frozen=True)
class Overrides:
    """Findings that are given by hand, by the names of `module.named_modules()`; None is found.

    `blocks` are names in call order, or one pattern such as `encoder.layer.*`; `mlp` and `attention` name the down and
    the output projection inside a block (`output.dense`); `final` is the linear map that gives the logits.
    """

    blocks: str | Sequence[str] | None = None
    readout: str | None = None
    mlp: str | None = None
    attention: str | None = None
    final: str | None = None

    def check(self, module: nn.Module) -> None:
        """Refuse names that the module does not have.

        Raises:
            SettingsError: the first of them.
        """
        known = [name for name, _ in module.named_modules() if name]
        if self.readout is not None and self.readout not in READOUTS:
            raise SettingsError(f"There is no readout {self.readout!r}; one of {', '.join(READOUTS)} was expected.")
        patterns = [self.blocks] if isinstance(self.blocks, str) else list(self.blocks or ())
        for pattern in [*patterns, *([self.final] if self.final else [])]:
            if not any(fnmatchcase(name, pattern) for name in known):
                raise SettingsError(f"The model has no module {pattern!r}.{near(pattern, known)}")


@dataclass(frozen=True)
class Anatomy:
    """Where a classifier computes what; names are those of `module.named_modules()`.

    `sites` holds the sites of every component that was found, in order of the layers, and `missing` says why another
    one was not. `before` are the outermost modules that run before the blocks and can be passed over; `replays` says
    how the outputs of the blocks are given again for chosen examples, and is empty where that is unclear. `head` lists
    what runs after the last block; `final` is the linear map that gives the logits, or None where the head does not end
    in one. `pads` says whether examples of unequal length may share a batch: padding leaves their logits alone, and
    which rows it fills is known. `n_tokens` is the number of rows of the longest example that the anatomy was proved
    on; `n_tokens_follow_length` says whether shorter examples have fewer.
    """

    sites: Mapping[Component, tuple[Site, ...]]
    missing: Mapping[Component, str]
    n_heads: int | None
    rows: RowWeights
    n_tokens: int
    n_tokens_follow_length: bool
    pads: bool
    before: tuple[Replayable, ...]
    replays: tuple[Replayable, ...]
    head: tuple[str, ...]
    final: str | None
    proofs: Mapping[str, str]

    @property
    def blocks(self) -> tuple[str, ...]:
        """The blocks in call order; one that is called several times stands there as often."""
        return tuple(site.module for site in self.sites["residual"])

    @property
    def width(self) -> int:
        """Number of units of a block's output."""
        return self.sites["residual"][0].width

    @property
    def readout(self) -> Readout:
        """The rows that the head reads."""
        return self.rows.readout


def find_anatomy(
    module: nn.Module,
    inputs: Inputs,
    n_labels: int,
    *,
    alone: Inputs | None = None,
    overrides: Overrides | None = None,
) -> Anatomy:
    """Return the anatomy of `module`, proved on `inputs` (two or more examples, best of unequal length, longest first).

    `alone` is the last of these examples, without padding: it tells whether padding moves the logits.

    Raises:
        ModelError: the output is no (example, label) matrix of logits.
        AnatomyError: a part was not found, or its proof failed; the message says what was seen and what to override.
        SettingsError: an override names what is not there.
    """
    overrides = overrides or Overrides()
    overrides.check(module)
    trace = traced(module, inputs)
    if trace.logits.shape[1] != n_labels:
        raise ModelError(
            f"The model returned an output of shape {tuple(trace.logits.shape)}; one row of {n_labels} logits for each "
            "example was expected. Use a model with a single-label classification head, and one label name per logit."
        )
    one_more = traced(module, {name: torch.cat([value, value[:1]]) for name, value in inputs.items()})
    blocks, residual = _find_blocks(trace, one_more, overrides.blocks)
    found = Anatomy(
        sites={"residual": residual},
        missing={},
        n_heads=None,
        rows=RowWeights("mean", None),
        n_tokens=residual[-1].rows_first(hidden_states(blocks[-1].output), len(trace.logits)).shape[1],
        n_tokens_follow_length=alone is not None and _shapes(alone) != _shapes(inputs),
        pads=True,
        before=_find_before(trace, one_more, blocks[0]),
        replays=_find_replays(blocks, one_more),
        head=tuple(call.name for call in trace.after(blocks[-1])),
        final=None,
        proofs={},
    )
    lab = Laboratory(module, found, inputs, trace, blocks)
    gap = lab.prove_blocks()
    rows = _find_rows(lab, cast(Readout | None, overrides.readout))
    lab = lab.with_anatomy(
        rows=rows,
        pads=alone is None or not found.n_tokens_follow_length or _may_be_padded(lab, rows, alone),
    )
    final = _find_final(trace, lab, overrides.final)
    inner = find_inner_sites(module, trace, inputs, blocks, residual, mlp=overrides.mlp, attention=overrides.attention)
    sites, missing = dict(inner.sites), dict(inner.missing)
    if final is None:
        missing["pooler"] = "the head does not end in a linear map"
    else:
        sites["pooler"] = (_pooler_site(final),)
    ordered = {name: {"residual": residual, **sites}[name] for name in COMPONENTS if name in {"residual", *sites}}
    lab = lab.with_anatomy(
        sites=ordered, missing=missing, n_heads=inner.n_heads, final=None if final is None else final.name
    )
    return replace(lab.anatomy, proofs=lab.proofs(gap))


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
        size = max(1, 2_000_000 // max(1, states[0].numel()))
        for start in range(0, len(states), size):
            chunk = states[start : start + size]
            copies = torch.full((len(chunk),), example, device=states.device)
            with torch.inference_mode(), self._passed_over(chunk, copies):
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
    def _passed_over(self, states: Tensor, examples: Int[Tensor, "copy"]) -> Iterator[None]:
        """Give the states for the last block's output, without running what can be passed over before it."""
        last = self.anatomy.sites["residual"][-1]
        replay = self.replay.take(examples)
        if replay.blocks:
            outputs = replay.up_to(len(self.blocks) - 1, last.as_it_was(states))
            with standing_in(self.module, outputs):
                yield
        else:
            with (
                standing_in(self.module, replay.up_to(-1, None)),
                edited_sites(self.module, [(last, lambda _: states)]),
            ):
                yield

    def prove_blocks(self) -> float:
        """Return how far the head is from the model's own logits when it has the last block's output alone.

        Raises:
            AnatomyError: too far; or the last block's output does not matter.
        """
        gap = self._gap_of_the_last_state()
        if gap > self.tolerance:
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

    @property
    def tolerance(self) -> float:
        """Largest difference of logits that rounding explains, in the precision of the logits."""
        eps = max(torch.finfo(self.trace.logits.dtype).eps, torch.finfo(self.states.dtype).eps)
        return max(1e-5, 64 * eps) * (1 + float(self.trace.logits.abs().max()))

    def proofs(self, gap: float) -> dict[str, str]:
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
            "readout": _READ[self.anatomy.readout],
            "head": f"last recorded state and head give the model's own logits (largest difference {gap:.0e})",
        }

    def _moved(self, sites: Sequence[tuple[Component, Site]]) -> list[bool]:
        """Return for every site whether its change moves the logits: a copy of one example for each, many in a pass."""
        example, moved = len(self.trace.logits) - 1, []
        for start in range(0, len(sites), 32):
            chunk = sites[start : start + 32]
            copies = {
                name: v[example : example + 1].expand(len(chunk), *v.shape[1:]) for name, v in self.inputs.items()
            }
            clean = self.logits(copies, [])
            edits = [(site, _shaken_copy(copy)) for copy, (_, site) in enumerate(chunk)]
            changed = self.logits(copies, edits)
            moved += (changed != clean).any(dim=1).tolist()
        return moved

    def _gap_of_the_last_state(self) -> float:
        """Return how far the logits are off when all blocks but the last have forgotten their states."""
        if not self.anatomy.replays:
            return 0.0
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


def _shaken_copy(copy: int) -> Edit:
    def changed(states: Tensor) -> Tensor:
        states = states.clone()
        states[copy] = shaken(states[copy])
        return states

    return changed


def _find_blocks(
    trace: Trace, one_more: Trace, given: str | Sequence[str] | None
) -> tuple[list[Call], tuple[Site, ...]]:
    """Return the calls of the blocks and their sites."""
    second = {(call.name, call.index): call for call in one_more.calls}
    candidates = [
        (call, site)
        for call in trace.calls
        if (call.name, call.index) in second
        for site in [_state_site(call, second[call.name, call.index])]
        if site is not None
    ]
    chosen = _named_blocks(candidates, given) if given is not None else _likely_blocks(candidates, trace)
    return [call for call, _ in chosen], tuple(site for _, site in chosen)


_Candidate = tuple[Call, Site]


def _state_site(call: Call, with_one_more: Call) -> Site | None:
    """Return the site of a call's output if these are hidden states, in either order of examples and tokens."""
    first, second = (
        c.output[0] if isinstance(c.output, (tuple, list)) and c.output else c.output for c in (call, with_one_more)
    )
    if not isinstance(first, Tensor) or first.ndim != 3 or not first.is_floating_point():
        return None
    layouts: tuple[Layout, ...] = ("example token unit", "token example unit")
    for axis, layout in enumerate(layouts):
        expected = list(first.shape)
        expected[axis] += 1
        if list(second.shape) == expected:
            return Site(call.name, int(first.shape[2]), layout, call.index)
    return None


def _named_blocks(candidates: Sequence[_Candidate], given: str | Sequence[str]) -> list[_Candidate]:
    patterns = [given] if isinstance(given, str) else list(given)
    chosen = [c for c in candidates if any(fnmatchcase(c[0].name, pattern) for pattern in patterns)]
    outer = {id(call) for call in outermost([call for call, _ in chosen])}
    chosen = [c for c in chosen if id(c[0]) in outer]
    shapes = {hidden_states(call.output).shape for call, _ in chosen}
    if not chosen:
        raise AnatomyError(
            f"No call of {patterns} gave hidden states, (example, token, unit) or (token, example, unit); these were "
            "expected. Name the modules that return them, first where they return several things."
        )
    if len(shapes) != 1:
        raise AnatomyError(
            f"The blocks {patterns} gave outputs of {len(shapes)} shapes; hidden states (example, token, unit) of one "
            "shape were expected. Name the modules that return these."
        )
    return chosen


def _likely_blocks(candidates: Sequence[_Candidate], trace: Trace) -> list[_Candidate]:
    """Return the outermost numbered siblings of one class and shape that hold the weights, the last of them to run."""
    sites = {id(call): site for call, site in candidates}
    siblings: dict[tuple[str, type], list[Call]] = defaultdict(list)
    for call in trace.calls:
        numbered = re.fullmatch(r"(.*?)\.?\d+", call.name)
        if numbered:
            siblings[numbered[1], type(call.module)].append(call)
    # Siblings of which one changes the shape of what goes in are stages: the blocks lie inside them.
    groups = [
        [(call, sites[id(call)]) for call in group]
        for group in siblings.values()
        if all(id(call) in sites and call.input is not None for call in group)
        and len({shape for c in group for shape in (hidden_states(c.input).shape, hidden_states(c.output).shape)}) == 1
    ]
    every = [call for group in groups for call, _ in group]
    outer = [g for g in groups if not any(call.is_inside(other) for call, _ in g for other in every)]
    if not outer:
        seen = sorted({type(call.module).__name__ for call in trace.calls})
        raise AnatomyError(
            "No Transformer blocks were found: numbered modules of one class whose outputs share one shape "
            f"(example, token, unit) were expected. Seen: {', '.join(seen)}. Keep the blocks in an nn.ModuleList, or "
            "name them with `blocks=`."
        )
    weights = [sum(p.numel() for call, _ in group for p in call.module.parameters()) for group in outer]
    # An encoder and a decoder, or stages of several widths: the head reads what runs last.
    heavy = [group for group, n in zip(outer, weights, strict=True) if n >= 0.1 * max(weights)]
    return max(heavy, key=lambda group: group[-1][0].ended)


def _find_before(trace: Trace, one_more: Trace, first_block: Call) -> tuple[Replayable, ...]:
    """Return the outermost modules before the blocks whose outputs can be given again."""
    second = {(call.name, call.index): call for call in one_more.calls}
    found: list[Replayable | None] = []
    calls = trace.before(first_block)
    for call in calls:
        other = second.get((call.name, call.index))
        found.append(None if other is None else replayable(call, call.output, other.output))
    unclear = {call.name for call, part in zip(calls, found, strict=True) if part is None}
    return tuple(part for part in found if part is not None and part.module not in unclear)


def _find_replays(blocks: Sequence[Call], one_more: Trace) -> tuple[Replayable, ...]:
    second = {(call.name, call.index): call for call in one_more.calls}
    found = [
        replayable(call, *(without_hidden_states(c.output) for c in (call, second[call.name, call.index])))
        for call in blocks
    ]
    return tuple(part for part in found if part is not None) if None not in found else ()


def _shapes(inputs: Inputs) -> dict[str, torch.Size]:
    return {name: value.shape[1:] for name, value in inputs.items()}


def _may_be_padded(lab: Laboratory, rows: RowWeights, alone: Inputs) -> bool:
    """Whether the shortest example has the same logits alone as in the batch, where its padding rows are known."""
    own = lab.logits(alone, [])[0]
    gap = (lab.trace.logits[-1] - own).abs().max()
    return rows.mask is not None and bool(gap <= 1e-4 * (1 + own.abs().max()))


def _find_rows(lab: Laboratory, given: Readout | None) -> RowWeights:
    mask = _find_mask(lab)
    if given is not None:
        return RowWeights(given, mask)
    # The shortest example has padding rows, which tell "the last row" from "the last row that is no padding". Where
    # padding is not known, the longest one has none.
    example = 0 if mask is None else len(lab.states) - 1
    there = RowWeights("mean", mask).rows(lab.inputs, lab.states.shape[1])[example]
    readout = find_readout(there, lab.states[example], lambda states: lab.head_logits(example, states))
    return RowWeights(readout, mask)


def _find_mask(lab: Laboratory) -> Mask | None:
    """Return the input that tells padding rows: changing those after the first block moves nothing."""
    n_tokens, first = lab.states.shape[1], lab.anatomy.sites["residual"][0]
    for mask in _possible_masks(lab.inputs, n_tokens):
        padding = ~RowWeights("mean", mask).rows(lab.inputs, n_tokens)

        def changed(states: Tensor, padding: Tensor = padding) -> Tensor:
            return torch.where(padding[..., None], shaken(states), states)

        moved = (lab.logits(lab.inputs, [(first, changed)]) - lab.trace.logits).abs().max()
        if not padding.all(dim=1).any() and moved <= lab.tolerance:
            return mask
    return None


def _possible_masks(inputs: Inputs, n_tokens: int) -> Iterator[Mask]:
    """Yield the readings of inputs of zeros and ones, of which both occur; the usual mask may be all ones."""
    for name, value in inputs.items():
        is_mask = value.ndim == 2 and value.shape[1] <= n_tokens and bool(((value == 0) | (value == 1)).all())
        if is_mask and (name == MASK or bool((value == 0).any() and (value == 1).any())):
            for there in (1, 0):
                yield Mask(name, there, "front")
                yield Mask(name, there, "back")


def _find_final(trace: Trace, lab: Laboratory, given: str | None) -> Call | None:
    """Return the call of the linear map whose output is the logits, at the readout row if it maps every row."""
    logits = trace.logits
    for call in reversed(trace.calls):
        output = call.output
        weight = getattr(call.module, "weight", None)
        is_linear = isinstance(weight, Tensor) and weight.ndim == 2 and weight.shape[0] == logits.shape[1]
        if not isinstance(output, Tensor) or call.input is None or call.input.ndim not in (2, 3) or not is_linear:
            continue
        if given is not None and call.name != given:
            continue
        if output.ndim == 3:
            weights = lab.anatomy.rows(lab.inputs, output.shape[1])
            output = output[weights == 1] if bool(((weights == 0) | (weights == 1)).all()) else output.new_empty(0)
        if output.shape == logits.shape and torch.equal(output, logits):
            return call
    if given is not None:
        raise AnatomyError(
            f"The output of {given!r} is not the logits; the linear map that gives them was expected. Name another "
            "one, or leave `final=` out."
        )
    return None


def _pooler_site(final: Call) -> Site:
    assert final.input is not None
    layout: Layout = "example unit" if final.input.ndim == 2 else "example token unit"
    return Site(final.name, int(final.input.shape[-1]), layout, final.index, "input")
