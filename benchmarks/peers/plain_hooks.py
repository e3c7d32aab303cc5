"""Plain forward hooks: what anybody writes who knows PyTorch, with nothing in the way."""

from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from peers.base import StackingPeer, TaskBatch


class PlainHooks(StackingPeer):
    """One forward pass for every batch and cell, or several cells of a layer, with a hook that writes zeros in place.

    Several cells are the batch several times over.
    """

    name: ClassVar[str] = "plain hooks"
    package: ClassVar[str] = "torch"

    def stacked(self, batch: TaskBatch, layer: int, units: list[Tensor]) -> Tensor:
        """Return the logits of one forward pass."""
        hook = partial(_zero, len(batch), batch.rows[:, None], units)
        handle = self.module.get_submodule(self.blocks[layer]).register_forward_hook(hook)
        n = len(units)
        inputs = batch.inputs if n == 1 else {name: torch.cat([each] * n) for name, each in batch.inputs.items()}
        try:
            return self.module(**inputs).logits
        finally:
            handle.remove()


def _zero(n: int, rows: Tensor, units: list[Tensor], _module: Any, _arguments: Any, output: Any) -> None:
    states = output[0] if isinstance(output, tuple) else output
    example = torch.arange(n, device=rows.device)[:, None]
    for copy, chosen in enumerate(units):
        states[copy * n + example, rows, chosen] = 0
