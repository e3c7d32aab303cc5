"""Watch one forward pass: every call of every submodule, in order, with what went in and what came out."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from synapse.errors import ModelError
from synapse.model.hooks import Edit, Site, edited_sites, standing_in, with_hidden_states

Inputs = Mapping[str, Tensor]
"""Keyword arguments of a model's forward, example first in every tensor."""


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a module; `started` and `ended` count the events of all calls, in order.

    `index` counts the calls of this module, from 0. `input` is the argument that has the shape of what came out, or the
    first tensor among them; `argument` is its position or name, and `n_tensors` how many tensors there were. Tensors of
    calls that were not to be kept have a shape and a type, but no values.
    """

    name: str
    index: int
    module: nn.Module
    input: Tensor | None
    argument: int | str
    n_tensors: int
    output: Any
    started: int
    ended: int

    def is_inside(self, other: "Call") -> bool:
        """Whether this call happened during the other one."""
        return other.started < self.started and self.ended < other.ended


@dataclass(frozen=True, eq=False)
class Trace:
    """All calls of a forward pass in order of their start, and the logits."""

    calls: tuple[Call, ...]
    logits: Float[Tensor, "example label"]

    def before(self, call: Call) -> list[Call]:
        """Return the outermost calls that had ended when the given one started."""
        return outermost([c for c in self.calls if c.ended < call.started])

    def after(self, call: Call) -> list[Call]:
        """Return the outermost calls that started after the given one had ended."""
        return outermost([c for c in self.calls if c.started > call.ended])

    def inside(self, call: Call) -> list[Call]:
        """Return the calls that happened during the given one."""
        return [c for c in self.calls if c.is_inside(call)]


def forward_logits(module: nn.Module, inputs: Inputs) -> Float[Tensor, "example label"]:
    """Return the logits of a forward pass, whether the module gives them alone, first in a tuple or by name.

    Raises:
        ModelError: it gives something else.
    """
    output = module(**inputs)
    logits = getattr(output, "logits", output[0] if isinstance(output, tuple) else output)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        seen = f"of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"{type(output).__name__}"
        raise ModelError(
            f"The model returned an output {seen}; logits of shape (example, label), alone, first in a tuple or as "
            "`.logits`, were expected. Load it with a single-label classification head."
        )
    return logits


def traced(root: nn.Module, inputs: Inputs, keep: Callable[[str], bool] = lambda _name: False) -> Trace:
    """Return the trace of one forward pass, with the tensors of the modules that are to be kept."""
    with ExitStack() as stack:
        tracer = _Tracer(keep)
        for name, module in root.named_modules():
            if name:
                started, ended = partial(tracer.started, name), partial(tracer.ended, name)
                stack.callback(module.register_forward_pre_hook(started, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(ended).remove)
        with torch.inference_mode():
            logits = forward_logits(root, inputs)
    return Trace(tuple(sorted(tracer.calls, key=lambda call: call.started)), logits)


class _Tracer:
    """Collects the calls of a pass; `running` holds the calls of every module that have not ended yet."""

    def __init__(self, keep: Callable[[str], bool]) -> None:
        self.keep = keep
        self.calls: list[Call] = []
        self.running: dict[str, list[tuple[int, dict[int | str, Tensor]]]] = defaultdict(list)
        self.counts: Counter[str] = Counter()
        self.events = 0

    def started(self, name: str, _module: nn.Module, arguments: Any, options: Any) -> None:
        given: dict[int | str, Any] = {**dict(enumerate(arguments)), **options}
        tensors = {where: self._kept(name, value) for where, value in given.items() if isinstance(value, Tensor)}
        self.running[name].append((self.events, tensors))
        self.events += 1

    def ended(self, name: str, module: nn.Module, _arguments: Any, output: Any) -> None:
        started, tensors = self.running[name].pop()
        returned = tensors_in(output)
        alike = [where for where, value in tensors.items() if returned and value.shape == returned[0].shape]
        argument = next(iter([*alike, *tensors]), 0)
        kept = with_tensors(output, [self._kept(name, tensor) for tensor in returned])
        call = Call(
            name,
            self.counts[name],
            module,
            tensors.get(argument),
            argument,
            len(tensors),
            kept,
            started,
            self.events,
        )
        self.calls.append(call)
        self.counts[name] += 1
        self.events += 1

    def _kept(self, name: str, tensor: Tensor) -> Tensor:
        # Copies: what works in place would change what was returned before it.
        return tensor.clone() if self.keep(name) else torch.empty_like(tensor, device="meta")


def outermost(calls: Sequence[Call]) -> list[Call]:
    """Return the calls that do not lie inside another one of the list."""
    kept: list[Call] = []
    for call in sorted(calls, key=lambda call: call.started):
        if not kept or call.started > kept[-1].ended:
            kept.append(call)
    return kept


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors in what a module returned: a tensor, or tuples, lists and mappings of them."""
    return list(_leaves(value))


def with_tensors(value: Any, tensors: Sequence[Tensor]) -> Any:
    """Return the same structure with its tensors replaced, in order."""
    return _rebuilt(value, iter(tensors))


def _leaves(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for entry in value:
            yield from _leaves(entry)
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from _leaves(entry)


def _rebuilt(value: Any, tensors: Iterator[Tensor]) -> Any:
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*[_rebuilt(entry, tensors) for entry in value])
    if isinstance(value, (tuple, list)):
        return type(value)([_rebuilt(entry, tensors) for entry in value])
    if isinstance(value, Mapping):
        make: Callable[..., Any] = type(value)
        return make(**{name: _rebuilt(entry, tensors) for name, entry in value.items()})
    return value


class NoSuchRowsError(Exception):
    """What a module returned cannot be given for single rows: its axes are not known well enough."""


@dataclass(frozen=True)
class Replayable:
    """A call whose output can be given again for chosen examples, and for single rows of them.

    `axes` holds the example axis of every tensor in the output, None where a tensor is the same for all examples;
    `token_axes` those that count the rows.
    """

    module: str
    call: int
    axes: tuple[int | None, ...]
    token_axes: tuple[tuple[int, ...], ...]

    def take(self, output: Any, examples: Int[Tensor, "chosen"]) -> Any:
        """Return the output for the chosen examples."""
        return with_tensors(
            output,
            [
                # A copy of what all examples share: a block that works in place would change it for later passes.
                tensor.clone() if axis is None else tensor.index_select(axis, examples)
                for tensor, axis in zip(tensors_in(output), self.axes, strict=True)
            ],
        )

    def take_rows(self, output: Any, examples: Int[Tensor, "chosen"], rows: Int[Tensor, "chosen"]) -> Any:
        """Return the output for one row of each of the chosen examples.

        Raises:
            NoSuchRowsError: a tensor that is the same for all examples, which want different rows of it.
        """
        return with_tensors(
            output,
            [
                _at_rows(tensor, axis, token_axes, examples, rows)
                for tensor, axis, token_axes in zip(tensors_in(output), self.axes, self.token_axes, strict=True)
            ],
        )


def _at_rows(
    tensor: Tensor,
    example_axis: int | None,
    token_axes: tuple[int, ...],
    examples: Int[Tensor, "chosen"],
    rows: Int[Tensor, "chosen"],
) -> Tensor:
    if example_axis is not None and len(token_axes) == 1:  # at once, and no other row is copied
        axes = example_axis, token_axes[0]
        return tensor.movedim(axes, (0, 1))[examples, rows].unsqueeze(1).movedim((0, 1), axes).contiguous()
    tensor = tensor.clone() if example_axis is None else tensor.index_select(example_axis, examples)
    for axis in token_axes:
        if example_axis is not None:
            shape = [1] * tensor.ndim
            shape[example_axis] = len(rows)
            size = list(tensor.shape)
            size[axis] = 1
            tensor = tensor.gather(axis, rows.view(shape).expand(size))
        elif bool((rows == rows[0]).all()):
            tensor = tensor.narrow(axis, int(rows[0]), 1)
        elif axis > 0 and tensor.shape[0] == 1 and len(token_axes) == 1:
            # An axis of one that stands for the examples: (1, token, ...) -> (chosen, 1, ...).
            tensor = tensor.index_select(axis, rows).transpose(0, axis)
        else:
            raise NoSuchRowsError("something that is computed before or between the blocks is one for all examples")
    return tensor


def replayable(
    call: Call, output: Any, with_one_more: Any, shorter: Any, n_tokens: tuple[int, int]
) -> Replayable | None:
    """Return how to replay an output of a call; None if unclear.

    It is compared with that for one example more, and with that for a single `shorter` example, where there is one:
    `n_tokens` are the numbers of rows here and there.
    """
    first, second = tensors_in(output), tensors_in(with_one_more)
    if len(first) != len(second) or not _is_plain(output):
        return None
    axes = [example_axis(a, b) for a, b in zip(first, second, strict=True)]
    if -1 in axes:
        return None
    others = tensors_in(shorter)
    if len(others) != len(first):
        others = first
    token_axes = [_token_axes(a, b, axis, n_tokens) for a, b, axis in zip(first, others, axes, strict=True)]
    return Replayable(call.name, call.index, tuple(axes), tuple(token_axes))


def _token_axes(
    tensor: Tensor, shorter: Tensor, example_axis: int | None, n_tokens: tuple[int, int]
) -> tuple[int, ...]:
    """Return the axes that count rows: as many as there are rows, here and in the shorter example."""
    if tensor.ndim != shorter.ndim:
        return ()
    return tuple(
        axis
        for axis in range(tensor.ndim)
        if axis != example_axis and (tensor.shape[axis], shorter.shape[axis]) == n_tokens
    )


@dataclass(frozen=True, eq=False)
class Replay:
    """What a forward pass has computed up to the end of its blocks, to be given again instead of being computed.

    `before` holds the outputs of the modules before the blocks, `blocks` those of the blocks without their states.
    """

    before: tuple[tuple[Replayable, Any], ...]
    blocks: tuple[tuple[Replayable, Any], ...]

    def take(self, examples: Int[Tensor, "chosen"]) -> "Replay":
        """Return the outputs for the chosen examples."""
        return Replay(
            tuple((part, part.take(output, examples)) for part, output in self.before),
            tuple((part, part.take(output, examples)) for part, output in self.blocks),
        )

    def take_rows(self, examples: Int[Tensor, "chosen"], rows: Int[Tensor, "chosen"]) -> "Replay":
        """Return the outputs for one row of each of the chosen examples."""
        return Replay(
            tuple((part, part.take_rows(output, examples, rows)) for part, output in self.before),
            tuple((part, part.take_rows(output, examples, rows)) for part, output in self.blocks),
        )

    def up_to(self, layer: int, states: Tensor | None) -> dict[str, list[Any]]:
        """Return the outputs, by module and in call order, up to the block whose states (in the model's axes) are
        given.

        The blocks below get these states too: nobody but the next block looks at them. Layer -1 stands for no block.
        """
        outputs: dict[str, list[Any]] = {}
        for part, output in self.before:
            outputs.setdefault(part.module, []).append(output)
        for part, output in self.blocks[: layer + 1]:
            assert states is not None
            outputs.setdefault(part.module, []).append(with_hidden_states(output, states))
        return outputs


@contextmanager
def passed_over(root: nn.Module, replay: Replay, layer: int, site: Site, states: Tensor | None) -> Iterator[None]:
    """Give the states for the output of the block at `site`, the given layer, without running what lies below it.

    Layer -1, which needs no states, stands for no block. Where the blocks cannot be replayed the whole model runs, and
    what else is applied to the site acts on the given states.
    """
    if layer < 0 or not replay.blocks:
        edits: list[tuple[Site, Edit]] = [] if layer < 0 else [(site, lambda _: states)]
        with standing_in(root, replay.up_to(-1, None)), edited_sites(root, edits, before_others=True):
            yield
        return
    assert states is not None
    with standing_in(root, replay.up_to(layer, site.as_it_was(states))):
        yield


def _is_plain(value: Any) -> bool:
    """Whether all that a value holds is seen: an object of another kind may hide tensors."""
    if isinstance(value, (tuple, list)):
        return all(_is_plain(entry) for entry in value)
    if isinstance(value, Mapping):
        return all(_is_plain(entry) for entry in value.values())
    return value is None or isinstance(value, (Tensor, bool, int, float, str))


def example_axis(tensor: Tensor, with_one_more: Tensor) -> int | None:
    """Return the axis that grows by one with one example more; None if none grows, -1 if something else does."""
    if tensor.shape == with_one_more.shape:
        return None
    if tensor.ndim != with_one_more.ndim:
        return -1
    grown = [axis for axis in range(tensor.ndim) if tensor.shape[axis] != with_one_more.shape[axis]]
    one_more = len(grown) == 1 and with_one_more.shape[grown[0]] == tensor.shape[grown[0]] + 1
    return grown[0] if one_more else -1
