"""Plain forward hooks: what anybody writes who knows PyTorch, with nothing in the way."""

from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from peers.base import Peer, Task, TaskBatch, by_layer, seconds_of, units_of

TOGETHER = (1, 4)
"""Cells in one forward pass that are tried; the fastest is kept."""


class PlainHooks(Peer):
    """One forward pass for every batch and cell, or several cells of a layer, with a hook that writes zeros in place.

    Several cells are the batch several times over.
    """

    name: ClassVar[str] = "plain hooks"
    package: ClassVar[str] = "torch"

    def prepare(self, task: Task) -> None:
        """Keep the fastest number of cells in one forward pass."""
        seconds = {}
        for self.together in TOGETHER:
            seconds[self.together] = seconds_of(self, task)
        self.together = min(seconds, key=lambda each: seconds[each])

    def edited(self, task: Task, batch: TaskBatch) -> Iterator[tuple[Any, Tensor]]:
        """Yield a cell, or several of a layer, at a time."""
        units = units_of(task)
        for layer, positions in by_layer(task).items():
            for start in range(0, len(positions), self.together):
                chosen = positions[start : start + self.together]
                logits = self._logits(batch, layer, [units[position] for position in chosen])
                yield torch.tensor(chosen, device=task.device)[:, None], logits.reshape(len(chosen), len(batch), -1)

    def _logits(self, batch: TaskBatch, layer: int, units: list[Tensor]) -> Tensor:
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
