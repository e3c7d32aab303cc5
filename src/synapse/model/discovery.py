"""Find the parts of a Transformer classifier by structure and behaviour, and prove each with a few inputs.

No table of architectures. The blocks are the numbered modules of one class whose outputs keep one shape and that hold
the most weights; the rows that the head reads are those of the last block's output whose change moves the logits; the
head is what runs after the last block. Two forward passes, one with an example more, tell which axis runs over
examples.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import cast

import torch
from torch import Tensor, nn

from synapse.errors import AnatomyError, ModelError
from synapse.model.anatomy import Anatomy, Overrides
from synapse.model.hooks import Layout, Site, hidden_states, shaken, without_hidden_states
from synapse.model.inner import find_inner_sites
from synapse.model.proofs import Laboratory
from synapse.model.readout import MASK, Mask, RowWeights
from synapse.model.trace import Call, Inputs, Replayable, Trace, outermost, replayable, traced
from synapse.types import COMPONENTS, Readout


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
    shorter = trace if alone is None else traced(module, alone)
    comparison = _Comparison(trace, one_more, shorter, _row_counts(residual[0], trace, shorter))
    before = comparison.replayable_ones(trace.before(blocks[0]))
    # Once more, with the values of what the proofs look at: those of all calls would fill the memory.
    behind = {call.name for call in trace.calls if call.started > blocks[-1].ended}
    wanted = behind | {call.name for call in blocks} | {part.module for part in before}
    with_values = traced(module, inputs, keep=wanted.__contains__)
    calls = {(call.name, call.index): call for call in with_values.calls}
    found = Anatomy(
        sites={"residual": residual},
        missing={},
        n_heads=None,
        rows=RowWeights("mean", None),
        readout_is_proved=True,
        n_tokens=residual[-1].rows_first(hidden_states(blocks[-1].output), len(trace.logits)).shape[1],
        n_tokens_follow_length=alone is not None and _shapes(alone) != _shapes(inputs),
        shapes=_shapes(inputs),
        inputs_with_rows=_inputs_with_rows(inputs, inputs if alone is None else alone, comparison.n_tokens),
        pads=True,
        before=before,
        replays=comparison.replays_of(blocks),
        inside={},
        unmixed=(),
        head=tuple(call.name for call in trace.after(blocks[-1])),
        final=None,
        proofs={},
    )
    blocks = [calls[call.name, call.index] for call in blocks]
    lab = Laboratory(module, found, inputs, with_values, blocks)
    lab.refuse_hooks_that_change()
    gap = lab.prove_blocks()
    rows = _find_rows(lab, cast(Readout | None, overrides.readout))
    lab = lab.with_anatomy(
        rows=rows,
        readout_is_proved=overrides.readout is None or lab.readout_trial(rows.mask).holds(rows.readout),
        pads=alone is None or not found.n_tokens_follow_length or _may_be_padded(lab, rows, alone),
    )
    final = _find_final(lab, overrides.final)
    inner = find_inner_sites(module, trace, inputs, blocks, residual, mlp=overrides.mlp, attention=overrides.attention)
    sites, missing = dict(inner.sites), dict(inner.missing)
    if final is None:
        missing["pooler"] = "the head does not end in a linear map with weights of its own"
    else:
        sites["pooler"] = (_pooler_site(final, lab),)
    ordered = {name: {"residual": residual, **sites}[name] for name in COMPONENTS if name in {"residual", *sites}}
    lab = lab.with_anatomy(
        sites=ordered,
        missing=missing,
        n_heads=inner.n_heads,
        final=None if final is None else final.name,
        inside={name: tuple(comparison.before_site(site) for site in found) for name, found in inner.sites.items()},
        unmixed=inner.unmixed,
    )
    return replace(lab.anatomy, proofs=lab.proofs(gap))


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
    chosen = max(heavy, key=lambda group: group[-1][0].ended)
    _refuse_parts_of_a_block(chosen, candidates)
    return chosen


def _refuse_parts_of_a_block(chosen: Sequence[_Candidate], candidates: Sequence[_Candidate]) -> None:
    """Refuse numbered modules that lie in one larger module of the same kind of output, and hold little of its weights.

    Blocks whose names carry no number leave such modules, two norms for example, as the only numbered ones.
    """
    own = sum(parameter.numel() for call, _ in chosen for parameter in call.module.parameters())
    around = [c for c, _ in candidates if all(call.is_inside(c) for call, _ in chosen)]
    for call in sorted(around, key=lambda call: call.ended - call.started)[:1]:
        every = sum(parameter.numel() for parameter in call.module.parameters())
        if own < every / 2:
            raise AnatomyError(
                f"The only numbered modules that keep one shape, {', '.join(c.name for c, _ in chosen)}, hold "
                f"{own / every:.0%} of the weights of {call.name!r} around them; whole blocks were expected. Keep the "
                "blocks in an nn.ModuleList, or name them with `blocks=`."
            )


def _row_counts(first: Site, trace: Trace, shorter: Trace) -> tuple[int, int]:
    """Return the number of rows that the blocks see in the two traces."""
    counts = []
    for each in (trace, shorter):
        call = next(c for c in each.calls if (c.name, c.index) == (first.module, first.call))
        counts.append(first.rows_first(hidden_states(call.output), len(each.logits)).shape[1])
    return counts[0], counts[1]


@dataclass(frozen=True, eq=False)
class _Comparison:
    """A trace beside that of one example more, and that of a single shorter example: they tell axes apart."""

    trace: Trace
    one_more: Trace
    shorter: Trace
    n_tokens: tuple[int, int]

    @cached_property
    def others(self) -> tuple[dict[tuple[str, int], Call], dict[tuple[str, int], Call]]:
        """The calls of the other two traces, by name and number."""
        one_more, shorter = ({(c.name, c.index): c for c in trace.calls} for trace in (self.one_more, self.shorter))
        return one_more, shorter

    def replayable(self, call: Call, *, without_states: bool = False) -> Replayable | None:
        """Return how the output of a call, or what a block returns beside its states, is given again."""
        one_more, shorter = (calls.get((call.name, call.index)) for calls in self.others)
        if one_more is None:
            return None
        outputs = [None if c is None else c.output for c in (call, one_more, shorter)]
        own, with_one_more, of_shorter = map(without_hidden_states, outputs) if without_states else outputs
        return replayable(call, own, with_one_more, of_shorter, self.n_tokens)

    def replays_of(self, blocks: Sequence[Call]) -> tuple[Replayable, ...]:
        """Return how the outputs of all blocks are given again; nothing where one is unclear."""
        found = [self.replayable(call, without_states=True) for call in blocks]
        return tuple(part for part in found if part is not None) if None not in found else ()

    def replayable_ones(self, calls: Sequence[Call]) -> tuple[Replayable, ...]:
        """Return those of the calls whose outputs can be given again."""
        found = [self.replayable(call) for call in calls]
        run = [call for call, part in zip(calls, found, strict=True) if part is None]
        # What runs calls its own parts: those are computed too, or the count of calls would be another.
        unclear = {call.name for call in run} | {inner.name for call in run for inner in self.trace.inside(call)}
        return tuple(part for part in found if part is not None and part.module not in unclear)

    def before_site(self, site: Site) -> tuple[Replayable, ...]:
        """Return what runs in the site's block before the site is reached, and can be given again."""
        assert site.within is not None
        block = next(call for call in self.trace.calls if (call.name, call.index) == site.within)
        inside = self.trace.inside(block)
        reached = [call for call in inside if call.name == site.module][site.call]
        is_output = site.side == "output"
        return self.replayable_ones(
            outermost([c for c in inside if c.ended < reached.started or (is_output and c is reached)])
        )


def _inputs_with_rows(inputs: Inputs, shorter: Inputs, n_tokens: tuple[int, int]) -> frozenset[str]:
    """Return the inputs whose second axis is as long as there are rows, here and in the shorter example."""
    return frozenset(
        name
        for name, value in inputs.items()
        if value.ndim > 1 and (value.shape[1], shorter[name].shape[1]) == n_tokens
    )


def _shapes(inputs: Inputs) -> dict[str, torch.Size]:
    return {name: value.shape[1:] for name, value in inputs.items()}


def _may_be_padded(lab: Laboratory, rows: RowWeights, alone: Inputs) -> bool:
    """Whether the shortest example has the same logits alone as in the batch, where its padding rows are known."""
    own = lab.logits(alone, [])[0]
    gap = (lab.trace.logits[-1] - own).abs().max()
    return rows.mask is not None and bool(gap <= 1e-4 * (1 + own.abs().max()))


def _find_rows(lab: Laboratory, given: Readout | None) -> RowWeights:
    mask = _find_mask(lab)
    return RowWeights(lab.readout_trial(mask).find() if given is None else given, mask)


def _find_mask(lab: Laboratory) -> Mask | None:
    """Return the input that tells padding rows: changing those before the first block moves nothing."""
    n_tokens, first = lab.states.shape[1], lab.anatomy.sites["residual"][0]
    entrance = replace(first, side="input", argument=lab.blocks[0].argument)
    for mask in _possible_masks(lab.inputs, n_tokens):
        padding = ~RowWeights("mean", mask).rows(lab.inputs, n_tokens)

        def changed(states: Tensor, padding: Tensor = padding) -> Tensor:
            return torch.where(padding[..., None], shaken(states), states)

        moved = (lab.logits(lab.inputs, [(entrance, changed)]) - lab.trace.logits).abs().max()
        if not padding.all(dim=1).any() and moved <= lab.tolerance:
            return mask
    return None


def _possible_masks(inputs: Inputs, n_tokens: int) -> Iterator[Mask]:
    """Yield the readings of inputs that hold both zeros and ones; the usual mask comes first, even if all ones."""
    for name, value in sorted(inputs.items(), key=lambda item: item[0] != MASK):
        is_mask = value.ndim == 2 and value.shape[1] <= n_tokens and bool(((value == 0) | (value == 1)).all())
        if is_mask and (name == MASK or bool((value == 0).any() and (value == 1).any())):
            for there in (1, 0):
                yield Mask(name, there, "front")
                yield Mask(name, there, "back")


def _find_final(lab: Laboratory, given: str | None) -> Call | None:
    """Return the call of the linear map whose output is the logits, at the readout row if it maps every row."""
    logits, last = lab.trace.logits, lab.blocks[-1]
    for call in reversed(lab.trace.calls):
        # A weight that is computed anew in every pass (a parametrisation) cannot be edited, so it is none.
        weight = dict(call.module.named_parameters(recurse=False)).get("weight")
        is_linear = weight is not None and weight.ndim == 2 and weight.shape[0] == logits.shape[1]
        if call.started < last.ended or not is_linear or (given is not None and call.name != given):
            continue
        output = _at_readout(call, lab)
        if output is not None and output.shape == logits.shape and torch.equal(output, logits):
            return call
    if given is not None:
        raise AnatomyError(
            f"The output of {given!r} is not the logits; the linear map that gives them was expected. Name another "
            "one, or leave `final=` out."
        )
    return None


def _at_readout(call: Call, lab: Laboratory) -> Tensor | None:
    """Return the output of a map at the readout row, or None where that has no such row."""
    output = call.output
    if not isinstance(output, Tensor) or call.input is None or output.ndim not in (2, 3):
        return None
    if output.ndim == 2:
        return output
    n_examples, n_tokens = lab.states.shape[:2]
    if output.shape[:2] == (n_tokens, n_examples) and lab.anatomy.sites["residual"][-1].layout == "token example unit":
        output = output.transpose(0, 1)
    if output.shape[:2] != (n_examples, n_tokens):
        return None
    weights = lab.anatomy.rows(lab.inputs, n_tokens)
    is_one_row = bool(((weights == 0) | (weights == 1)).all())
    return output[weights == 1] if is_one_row else None


def _pooler_site(final: Call, lab: Laboratory) -> Site:
    assert final.input is not None
    layout: Layout = "example unit" if final.input.ndim == 2 else "example token unit"
    if final.input.ndim == 3 and len(final.input) != len(lab.states):
        layout = "token example unit"
    return Site(final.name, int(final.input.shape[-1]), layout, final.index, "input", argument=final.argument)
