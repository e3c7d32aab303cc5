"""Edit what passes a site in a forward pass, and stand in for modules; both undo themselves, also after an error."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from synapse.errors import AnatomyError

Edit = Callable[[Tensor], Tensor | None]
"""Takes the states of a site, (example, token, unit); returns what replaces them, or None to leave them."""

Layout = Literal["example token unit", "token example unit", "example*token unit", "example unit"]
"""The axes of a site's tensor as the model has it."""


@dataclass(frozen=True)
class Site:
    """One call of a module whose output (or input) is read or edited.

    `call` counts the module's calls in a forward pass, from 0; where `within` names a block and which of its calls, it
    counts those inside that call of the block, so that it stays true when blocks below are passed over.
    """

    module: str
    width: int
    layout: Layout = "example token unit"
    call: int = 0
    side: Literal["output", "input"] = "output"
    within: tuple[str, int] | None = None
    argument: int | str = 0
    """Which argument of the call a site at its input is, by position or name."""

    def rows_first(self, values: Tensor, n_examples: int) -> Tensor:
        """Return the model's tensor as (example, token, unit); a site without rows has one."""
        if self.layout == "token example unit":
            return values.transpose(0, 1)
        if self.layout == "example*token unit":
            return values.reshape(n_examples, -1, values.shape[-1])
        return values.unsqueeze(1) if self.layout == "example unit" else values

    def as_it_was(self, states: Tensor) -> Tensor:
        """Return (example, token, unit) in the axes that the model has."""
        if self.layout == "token example unit":
            return states.transpose(0, 1)
        if self.layout == "example*token unit":
            return states.flatten(0, 1)
        return states.squeeze(1) if self.layout == "example unit" else states


def hidden_states(output: Any) -> Tensor:
    """Return the hidden states in what a module returned: the tensor itself, or the first entry of a tuple."""
    first = output[0] if isinstance(output, (tuple, list)) and output else output
    if not isinstance(first, Tensor):
        raise AnatomyError(
            f"A block returned {type(first).__name__}; a tensor, or a tuple that begins with one, was expected. "
            "Wrap the block so that it returns its hidden states first."
        )
    return first


def with_hidden_states(output: Any, states: Any) -> Any:
    """Return the output with its hidden states replaced."""
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return type(output)(states, *output[1:])
    if isinstance(output, (tuple, list)):
        return type(output)([states, *output[1:]])
    return states


def without_hidden_states(output: Any) -> Any:
    """Return what else a module returned, with None in place of its hidden states."""
    return with_hidden_states(output, None) if isinstance(output, (tuple, list)) else None


def shaken(states: Tensor, strength: float | Tensor = 1.0) -> Tensor:
    """Return states that all differ from the given ones, also after a normalisation: what the proofs try on a site."""
    unit = torch.arange(states.shape[-1], device=states.device)
    # Uneven over the units, as a norm removes what is alike; a scale of its own, as states may be all zeros.
    direction = torch.cos(unit * unit + 1.0) * (3 * states.float().std() + 0.1)
    return states + (strength * direction).to(states.dtype)


@contextmanager
def edited_sites(root: nn.Module, edits: Sequence[tuple[Site, Edit]], *, before_others: bool = False) -> Iterator[None]:
    """Pass the values of every listed site through its function in each forward pass of `root`.

    Edits of one site act in the order in which they were applied; with `before_others`, before those there are.
    """
    with ExitStack() as stack:
        for site, edit in edits:
            stack.enter_context(_EditedSite(root, site, edit).applied(before_others))
        yield


@dataclass(eq=False)
class _EditedSite:
    """One site under an edit; the counters are those of the running forward pass.

    `block_calls` and `calls` count the calls of the block around the site and, inside one of these, of its module.
    """

    root: nn.Module
    site: Site
    edit: Edit
    n_examples: int = 0
    block_calls: int = 0
    calls: int = 0
    is_inside: bool = False

    @contextmanager
    def applied(self, before_others: bool) -> Iterator[None]:
        site, module = self.site, self.root.get_submodule(self.site.module)
        with ExitStack() as stack:
            # First of all: a root that is its own site's module starts the pass before the site is reached.
            start = self.root.register_forward_pre_hook(self.start_pass, prepend=True, with_kwargs=True)
            stack.callback(start.remove)
            if site.within is not None:
                block = self.root.get_submodule(site.within[0])
                stack.callback(block.register_forward_pre_hook(self.enter_block).remove)
                stack.callback(block.register_forward_hook(self.leave_block).remove)
            if site.side == "input":
                hook = module.register_forward_pre_hook(self.at_input, prepend=before_others, with_kwargs=True)
            else:
                hook = module.register_forward_hook(self.at_output, prepend=before_others)
            stack.callback(hook.remove)
            yield

    def start_pass(self, _module: nn.Module, arguments: Any, options: Any) -> None:
        tensors = [value for value in (*arguments, *options.values()) if isinstance(value, Tensor)]
        self.n_examples = len(tensors[0]) if tensors else 0
        self.block_calls = self.calls = 0
        self.is_inside = self.site.within is None

    def enter_block(self, _module: nn.Module, _arguments: Any) -> None:
        assert self.site.within is not None
        self.is_inside = self.block_calls == self.site.within[1]
        self.block_calls += 1
        self.calls = 0

    def leave_block(self, _module: nn.Module, _arguments: Any, _output: Any) -> None:
        self.is_inside = False

    def at_input(self, _module: nn.Module, arguments: Any, options: Any) -> Any:
        if not self._is_reached():
            return None
        where = self.site.argument
        if isinstance(where, str):
            values = self._edited(options[where])
            return None if values is None else (arguments, {**options, where: values})
        values = self._edited(arguments[where])
        return None if values is None else ((*arguments[:where], values, *arguments[where + 1 :]), options)

    def at_output(self, _module: nn.Module, _arguments: Any, output: Any) -> Any:
        if not self._is_reached():
            return None
        values = self._edited(hidden_states(output))
        return None if values is None else with_hidden_states(output, values)

    def _is_reached(self) -> bool:
        self.calls += 1
        return self.is_inside and self.calls - 1 == self.site.call

    def _edited(self, values: Tensor) -> Tensor | None:
        states = self.edit(self.site.rows_first(values, self.n_examples))
        return None if states is None else self.site.as_it_was(states.to(values.dtype))


@contextmanager
def ended_at(root: nn.Module, site: Site) -> Iterator[list[Tensor]]:
    """End the forward pass at a site, and hold the states that reached it."""
    reached: list[Tensor] = []
    with suppress(_PassEndedError), edited_sites(root, [(site, partial(_end_with, reached))]):
        yield reached


class _PassEndedError(Exception):
    """What was wanted of a forward pass is there."""


def _end_with(reached: list[Tensor], states: Tensor) -> None:
    reached.append(states)
    raise _PassEndedError


@contextmanager
def standing_in(root: nn.Module, outputs: Mapping[str, Sequence[Any]]) -> Iterator[None]:
    """Let the first calls of the named modules return the given outputs, one a call, without computing.

    Later calls in the same forward pass compute. The modules' own hooks still run: only `forward` is stood in for.
    """
    with ExitStack() as stack:
        for name, values in outputs.items():
            given = [partial(_given, value) for value in values]
            stack.enter_context(_StandIn(root.get_submodule(name), given).applied(root))
        yield


@contextmanager
def shortened(root: nn.Module, name: str, shorter: Callable[..., Any]) -> Iterator[None]:
    """Let `shorter(forward, *arguments)` work out the first call of the named module in place of its own `forward`."""
    with _StandIn(root.get_submodule(name), [shorter]).applied(root):
        yield


def _given(value: Any, _forward: Any, *_arguments: Any, **_options: Any) -> Any:
    return value


@dataclass(eq=False)
class _StandIn:
    """A module whose `forward` is stood in for; `calls` counts those of the running forward pass."""

    module: nn.Module
    shorter: Sequence[Callable[..., Any]]
    calls: int = 0

    @contextmanager
    def applied(self, root: nn.Module) -> Iterator[None]:
        # An instance attribute hides the class's method; one that was there before (set by a wrapper) is put back.
        before, self.original = self.module.__dict__.get("forward"), self.module.forward
        start = root.register_forward_pre_hook(self.start_pass)
        try:
            self.module.forward = self.forward
            yield
        finally:
            start.remove()
            self.module.__dict__.pop("forward", None)
            if before is not None:
                self.module.forward = before

    def forward(self, *arguments: Any, **options: Any) -> Any:
        self.calls += 1
        if self.calls > len(self.shorter):
            return self.original(*arguments, **options)
        return self.shorter[self.calls - 1](self.original, *arguments, **options)

    def start_pass(self, _module: nn.Module, _arguments: Any) -> None:
        self.calls = 0


@contextmanager
def study_mode(root: nn.Module) -> Iterator[None]:
    """Turn off what would hide the blocks or waste memory, for the time being.

    PyTorch's fused encoder kernel skips hooks (pytorch/pytorch#128413), as compiled modules do, and decoders fill a
    cache for generation.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    configs: dict[int, Any] = {id(config): config for m in root.modules() if (config := getattr(m, "config", None))}
    cached = [config for config in configs.values() if getattr(config, "use_cache", False) is True]
    is_compiled = any(hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) for m in root.modules())
    torch.backends.mha.set_fastpath_enabled(False)
    for config in cached:
        config.use_cache = False
    try:
        with torch.compiler.set_stance("force_eager") if is_compiled else nullcontext():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for config in cached:
            config.use_cache = True
