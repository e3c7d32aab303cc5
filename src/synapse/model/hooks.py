"""Read, edit and pass over blocks during a forward pass; each of them undoes itself, also after an error."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from synapse.errors import AnatomyError

Edit = Callable[[Tensor], Tensor | None]
"""Takes hidden states (example, token, unit); returns what replaces them, or None to leave them."""


def hidden_states(output: Any) -> Tensor:
    """Return the hidden states in what a block returned: the tensor itself, or the first entry of a tuple."""
    first = output[0] if isinstance(output, tuple) and output else output
    if not isinstance(first, Tensor):
        raise AnatomyError(
            f"A block returned {type(first).__name__}; a tensor, or a tuple that begins with one, was expected. "
            "Wrap the block so that it returns its hidden states first."
        )
    return first


@contextmanager
def edited_outputs(edits: Sequence[tuple[nn.Module, Edit]]) -> Iterator[None]:
    """Pass the output of every listed module through its function while the context is open."""

    def hook(edit: Edit) -> Callable[[nn.Module, Any, Any], Any]:
        def apply(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            replaced = edit(hidden_states(output))
            if replaced is None:
                return None
            return (replaced, *output[1:]) if isinstance(output, tuple) else replaced

        return apply

    handles = []
    try:
        for module, edit in edits:
            handles.append(module.register_forward_hook(hook(edit)))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def passed_over(modules: Sequence[nn.Module], output: Any) -> Iterator[None]:
    """Let every listed module return `output` at once, without computing, while the context is open.

    The modules' own hooks still run; only `forward` is stood in for.
    """
    # An instance attribute hides the class's method; one that was there before (set by a wrapper) is put back.
    before = [module.__dict__.get("forward") for module in modules]

    def forward(*_inputs: Any, **_options: Any) -> Any:
        return output

    try:
        for module in modules:
            module.forward = forward
        yield
    finally:
        for module, previous in zip(modules, before, strict=True):
            module.__dict__.pop("forward", None)
            if previous is not None:
                module.forward = previous
