"""Find the sites inside a block: the feed-forward network's hidden units, the attention's output, its heads.

By behaviour: the attention's output projection is the first map back to the block's width whose output at a row depends
on other rows; the feed-forward network's down projection is the last map back to it from another width. What is found
in the first block is looked up by its place in the others, which are of the same class.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from synapse.errors import AnatomyError
from synapse.model.hooks import Layout, Site, edited_sites, hidden_states, shaken, study_mode
from synapse.model.trace import Call, Inputs, Trace, forward_logits, traced
from synapse.types import Component


@dataclass(frozen=True)
class InnerSites:
    """The sites found inside the blocks, and why others are missing, each by component.

    `unmixed` holds for every block the outputs of the maps that see each row of the block's input alone.
    """

    sites: Mapping[Component, tuple[Site, ...]]
    missing: Mapping[Component, str]
    n_heads: int | None
    unmixed: tuple[tuple[Site, ...], ...]


@dataclass(frozen=True)
class _Map:
    """A module with weights that maps every row of a block: its name inside the block, and which of its calls there.

    `mixes` says whether its output at a row depends on other rows of the block's input, `mixed` whether its input does.
    """

    path: str
    call: int
    in_width: int
    out_width: int
    layout: Layout
    argument: int | str
    mixed: bool
    mixes: bool


def find_inner_sites(
    root: nn.Module,
    trace: Trace,
    inputs: Inputs,
    blocks: Sequence[Call],
    residual: Sequence[Site],
    *,
    mlp: str | None = None,
    attention: str | None = None,
) -> InnerSites:
    """Return the sites inside the blocks; `mlp` and `attention` name the projections inside a block by hand.

    Raises:
        AnatomyError: a projection that was named by hand is not there, or is no map back to the block's width.
    """
    maps, width = _maps(root, inputs, blocks[0], residual[0]), residual[0].width
    mixing = _named(attention, maps, blocks[0]) or _attention_output(maps, width)
    down = _named(mlp, maps, blocks[0]) or _down_projection(maps, mixing, width)
    sites: dict[Component, tuple[Site, ...]] = {}
    missing: dict[Component, str] = {}
    n_heads = None
    if down is None:
        missing["mlp"] = "no module inside the block maps hidden units back to its width"
    else:
        sites["mlp"] = tuple(_site(down, "input", block) for block in blocks)
    if mixing is None:
        missing["attention"] = "no module inside the block projects what was mixed between rows back to its width"
        missing["heads"] = missing["attention"]
    else:
        sites["attention"] = tuple(_site(mixing, "output", block) for block in blocks)
        heads = tuple(_site(mixing, "input", block) for block in blocks)
        n_heads = _count_heads(root, inputs, heads[0]) if mixing.mixed else None
        if not mixing.mixed:
            missing["heads"] = f"{mixing.path!r} attends and projects in one module, which calls none with the heads"
        elif n_heads is None:
            missing["heads"] = "the heads could not be told apart in the input of the attention's output projection"
        else:
            sites["heads"] = heads
    for component, found in list(sites.items()):
        absent = [site for site in found if not _is_in(site, trace)]
        if absent:
            del sites[component]
            missing[component] = (
                f"{absent[0].module!r} is not called in its block as in the first, or has another width"
            )
    rowwise = [found for found in maps if not found.mixed and not found.mixes and found.layout == "example token unit"]
    unmixed = tuple(
        tuple(site for found in rowwise if _is_in(site := _site(found, "output", block), trace)) for block in blocks
    )
    return InnerSites(sites, missing, n_heads if "heads" in sites else None, unmixed)


def _site(found: _Map, side: Literal["input", "output"], block: Call) -> Site:
    width = found.in_width if side == "input" else found.out_width
    name = f"{block.name}.{found.path}"
    inside = (block.name, block.index)
    return Site(name, width, found.layout, found.call, side, within=inside, argument=found.argument)


def _is_in(site: Site, trace: Trace) -> bool:
    assert site.within is not None
    block = next(c for c in trace.calls if (c.name, c.index) == site.within)
    calls = [call for call in trace.inside(block) if call.name == site.module]
    if len(calls) <= site.call:
        return False
    values = calls[site.call].input if site.side == "input" else hidden_states(calls[site.call].output)
    return values is not None and values.shape[-1] == site.width


def _maps(root: nn.Module, inputs: Inputs, block: Call, residual: Site) -> list[_Map]:
    """Return the maps of a block in call order, and whether rows further down notice a change of the first one."""
    one = {name: value[:1] for name, value in inputs.items()}  # the longest example: none of its rows is padding
    entrance = replace(residual, module=block.name, call=block.index, side="input", argument=block.argument)
    clean = _calls_inside(root, one, block)
    with edited_sites(root, [(entrance, _with_first_row_changed)]):
        changed = _calls_inside(root, one, block)
    states, found = hidden_states(clean["", 0].output), []
    for (path, index), call in _map_calls(clean, states, residual).items():
        assert call.input is not None
        output, layout, again = hidden_states(call.output), _layout(call.input, states, residual), changed[path, index]
        assert layout is not None
        found.append(
            _Map(
                path,
                index,
                int(call.input.shape[-1]),
                int(output.shape[-1]),
                layout,
                call.argument,
                mixed=_further_rows_differ(call.input, again.input),
                mixes=_further_rows_differ(output, hidden_states(again.output)),
            )
        )
    return found


def _map_calls(calls: Mapping[tuple[str, int], Call], states: Tensor, residual: Site) -> dict[tuple[str, int], Call]:
    """Return the calls that map every row: modules that call no other one, or wrappers that are linear as a whole."""
    rowwise = {
        key: call
        for key, call in calls.items()
        if key[0] and _maps_rows(call) and _layout(call.input, states, residual)
    }
    is_leaf = {key: not any(other.is_inside(call) for other in calls.values()) for key, call in rowwise.items()}
    # A low-rank addition to a linear map stands beside it in a module of its own; that module is the map.
    leaves = [call for key, call in rowwise.items() if is_leaf[key]]
    wrappers = [
        call
        for key, call in rowwise.items()
        if not is_leaf[key] and sum(leaf.is_inside(call) for leaf in leaves) > 1 and _is_linear(call)
    ]
    return {
        key: call
        for key, call in rowwise.items()
        if (is_leaf[key] or call in wrappers) and not any(call.is_inside(wrapper) for wrapper in wrappers)
    }


def _maps_rows(call: Call) -> bool:
    """Whether the call is one of a module with a matrix of weights that keeps all axes but the last."""
    weights = [parameter for parameter in call.module.parameters() if parameter.numel() > 1]
    is_elementwise = bool(weights) and all(weight.ndim < 2 for weight in weights)  # a norm or a scale
    output = call.output[0] if isinstance(call.output, tuple) and call.output else call.output
    return (
        not is_elementwise
        # Quantised maps keep their weights packed, as state that is no parameter.
        and bool(call.module.state_dict())
        and call.input is not None
        and call.input.is_floating_point()
        and isinstance(output, Tensor)
        and output.shape[:-1] == call.input.shape[:-1]
    )


def _is_linear(call: Call) -> bool:
    """Whether f(x + y) + f(0) = f(x) + f(y) for the module of a call that was given one tensor and nothing else."""
    if call.n_tensors != 1 or not isinstance(call.output, Tensor) or call.input is None:
        return False
    x = call.input
    y = shaken(x.flip(-1))
    try:
        with torch.inference_mode():
            both, nothing, first, second = (call.module(value) for value in (x + y, torch.zeros_like(x), x, y))
    except (TypeError, ValueError, RuntimeError, AttributeError):  # it wants more than the tensor
        return False
    scale = 1e-4 * (1 + float(both.abs().max()))
    return float((both + nothing - first - second).abs().max()) <= scale


def _calls_inside(root: nn.Module, inputs: Inputs, block: Call) -> dict[tuple[str, int], Call]:
    """Return the block's call, named "", and those inside it, by their name there and their number."""
    trace = traced(root, inputs, keep=lambda name: f"{name}.".startswith(f"{block.name}."))
    outer = next(call for call in trace.calls if (call.name, call.index) == (block.name, block.index))
    calls, counts = {("", 0): outer}, Counter[str]()
    for call in trace.inside(outer):
        path = call.name.removeprefix(f"{block.name}.")
        calls[path, counts[path]] = call
        counts[path] += 1
    return calls


def _with_first_row_changed(states: Tensor) -> Tensor:
    states = states.clone()
    states[:, 0] = shaken(states[:, 0])
    return states


def _further_rows_differ(clean: Tensor, changed: Tensor | None) -> bool:
    """Whether rows behind the first one differ; both are of one example."""
    assert changed is not None
    rows, other = clean.flatten(0, -2)[1:].float(), changed.flatten(0, -2)[1:].float()
    return not torch.allclose(rows, other, rtol=1e-4, atol=1e-6)


def _layout(values: Tensor | None, states: Tensor, residual: Site) -> Layout | None:
    assert values is not None
    if values.ndim == 3 and values.shape[:2] == states.shape[:2]:
        return residual.layout
    is_flat = values.ndim == 2 and len(values) == states.shape[0] * states.shape[1]
    return "example*token unit" if is_flat and residual.layout == "example token unit" else None


def _attention_output(maps: Sequence[_Map], width: int) -> _Map | None:
    """Return the first map back that gives mixed rows, unless it closes a feed-forward network.

    Back to the block's width, or to the width that it came from: blocks with a bottleneck work in a smaller one.
    """
    first = next((found for found in maps if found.mixes and found.out_width in (width, found.in_width)), None)
    if first is None:
        return None
    # Rows that were mixed without weights (a Fourier transform) reach a feed-forward network first: a map up before it.
    earlier = [found for found in maps[: maps.index(first)] if found.mixed]
    is_down = any(found.out_width in (first.in_width, 2 * first.in_width) for found in earlier)
    return None if is_down else first


def _down_projection(maps: Sequence[_Map], mixing: _Map | None, width: int) -> _Map | None:
    """Return the last map from another width to the one that the attention gives, or the block has.

    Where the hidden width is that width itself, it is the last map behind the attention.
    """
    for working in dict.fromkeys((width if mixing is None else mixing.out_width, width)):
        others = [found for found in maps if found != mixing and found.out_width == working]
        wider = [found for found in others if found.in_width != working]
        after = [found for found in others if found.mixed]
        if wider or after:
            return (wider or after)[-1]
    return None


def _named(path: str | None, maps: Sequence[_Map], block: Call) -> _Map | None:
    if path is None:
        return None
    for found in maps:
        if found.path == path:
            return found
    known = ", ".join(found.path for found in maps) or "none"
    raise AnatomyError(
        f"Inside the block {block.name!r} no map over its rows is called {path!r}; there are: {known}. Name one of "
        "these."
    )


def _count_heads(root: nn.Module, inputs: Inputs, site: Site) -> int | None:
    """Return the number of heads, if each fills its own slice of the site's units: proved by weakening them in turn."""

    def values(copies: int, weakened: bool) -> tuple[list[Tensor], int | None]:
        repeated = {name: v[:1].expand(copies, *v.shape[1:]) for name, v in inputs.items()}
        kept: list[Tensor] = []
        mode = _WeakenedHeads(copies, weakened)
        keep = [(site, lambda states: kept.append(states.clone()))]
        with edited_sites(root, keep), _only_inside(root, site, mode), torch.no_grad(), suppress(_BlockEndedError):
            forward_logits(root, repeated)
        return kept, mode.n_heads

    with study_mode(root):
        _, n_heads = values(1, weakened=False)
        if n_heads is None or n_heads < 1 or site.width % n_heads:
            return None
        (clean,), _ = values(n_heads, weakened=False)
        (changed,), _ = values(n_heads, weakened=True)
    size = site.width // n_heads
    # (copy, token, unit) -> (copy, head)
    moved = (changed - clean).abs().reshape(*clean.shape[:2], n_heads, size).amax(dim=(1, 3))
    own = torch.eye(n_heads, dtype=torch.bool, device=moved.device)
    scale = 1e-5 * (1e-6 + clean.abs().max())
    return n_heads if bool((moved[own] > scale).all()) and bool((moved[~own] <= scale).all()) else None


class _BlockEndedError(Exception):
    """Nothing above the first block is of interest."""


class _WeakenedHeads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Halves head h of the attention in copy h of an example, and counts the heads.

    It sees the softmax over attention scores or the fused attention, whichever the model uses; axis 1 is that of heads.
    """

    def __init__(self, copies: int, weakened: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.copies, self.weakened = copies, weakened
        self.n_heads: int | None = None
        self.is_inside = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = func.name()
        if not self.is_inside or not ("softmax" in name or "scaled_dot_product" in name):
            return output
        first = output[0] if isinstance(output, tuple) else output
        if not isinstance(first, Tensor):
            return output
        # (copy, head, token, any), or (copy * head, token, any)
        is_flat = first.ndim == 3 and len(first) % self.copies == 0
        heads = first.view(self.copies, -1, *first.shape[1:]) if is_flat else first
        if heads.ndim != 4 or heads.shape[0] != self.copies:
            return output
        self.n_heads = int(heads.shape[1])
        if self.weakened and self.copies == self.n_heads:
            copy = torch.arange(self.copies, device=first.device)
            heads[copy, copy] *= 0.5
        return output


@contextmanager
def _only_inside(root: nn.Module, site: Site, mode: _WeakenedHeads) -> Iterator[None]:
    """Let the mode see the operations of the site's block, before its projection is called."""
    assert site.within is not None
    block, projection = root.get_submodule(site.within[0]), root.get_submodule(site.module)

    def enter(*_: Any) -> None:
        mode.is_inside = True

    def leave(*_: Any) -> None:
        mode.is_inside = False

    def end(*_: Any) -> None:
        raise _BlockEndedError

    handles = [
        block.register_forward_pre_hook(enter),
        projection.register_forward_pre_hook(leave),
        block.register_forward_hook(end),
    ]
    try:
        with mode:
            yield
    finally:
        for handle in handles:
            handle.remove()
