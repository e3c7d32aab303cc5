"""nnsight: an edit in a trace, one cell a forward pass or several as invokes of one."""

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from nnsight import NNsight
from torch import Tensor

from peers.base import Peer, Task, TaskBatch, by_layer, seconds_of, units_of

TOGETHER = (1, 4)
"""Cells in one forward pass that are tried; the fastest is kept."""


class _Stacking(NNsight):
    """A wrapped module whose invokes are stacked: the same batch several times over."""

    def _batch_size(self, *inputs: Any, **options: Any) -> int:
        return len(next(iter(options.values()))) if options else 0

    def _batch(self, invokes: list[tuple[Any, dict[str, Tensor]]], fn: Any) -> tuple[tuple[()], dict[str, Tensor]]:
        names = invokes[0][1] if invokes else {}
        return (), {name: torch.cat([options[name] for _, options in invokes]) for name in names}


class NnsightTraces(Peer):
    """A trace for every batch and cell, or for every batch and several cells of a layer."""

    name: ClassVar[str] = "nnsight"
    package: ClassVar[str] = "nnsight"

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.model = _Stacking(task.module)
        self.envoys = [self.model.get(block) for block in task.blocks]
        one = {name: value[:1] for name, value in task.batches[0].inputs.items()}
        self.is_tuple = []
        for envoy in self.envoys:
            with torch.inference_mode(), self.model.trace(**one):
                output = envoy.output.save()
            self.is_tuple.append(isinstance(output, tuple))

    def prepare(self, task: Task) -> None:
        """Keep the faster number of cells in one forward pass."""
        seconds = {}
        for self.together in TOGETHER:
            seconds[self.together] = seconds_of(self, task)
        self.together = min(seconds, key=lambda each: seconds[each])

    def edited(self, task: Task, batch: TaskBatch) -> Iterator[tuple[Any, Tensor]]:
        """Yield a cell, or several of a layer, at a time."""
        units = units_of(task)
        example, rows = batch.rows.new_tensor(range(len(batch)))[:, None], batch.rows[:, None]
        for layer, positions in by_layer(task).items():
            for start in range(0, len(positions), self.together):
                chosen = positions[start : start + self.together]
                if len(chosen) == 1:
                    yield chosen[0], self._one(batch, layer, example, rows, units[chosen[0]])
                else:
                    several = self._several(batch, layer, example, rows, [units[each] for each in chosen])
                    yield torch.tensor(chosen, device=task.device)[:, None], several

    def _one(self, batch: TaskBatch, layer: int, example: Tensor, rows: Tensor, units: Tensor) -> Tensor:
        envoy, is_tuple = self.envoys[layer], self.is_tuple[layer]
        with self.model.trace(**batch.inputs):
            states = envoy.output[0] if is_tuple else envoy.output
            states[example, rows, units] = 0
            logits = self.model.output.logits.save()
        return logits  # noqa: RET504 (the block above is not run where it stands)

    def _several(self, batch: TaskBatch, layer: int, example: Tensor, rows: Tensor, units: list[Tensor]) -> Tensor:
        """Return the logits (cell, example, label)."""
        envoy, is_tuple = self.envoys[layer], self.is_tuple[layer]
        with self.model.trace() as tracer:
            for chosen in units:
                with tracer.invoke(**batch.inputs):
                    states = envoy.output[0] if is_tuple else envoy.output
                    states[example, rows, chosen] = 0
            with tracer.invoke():
                logits = self.model.output.logits.save()
        return logits.reshape(len(units), len(batch), -1)
