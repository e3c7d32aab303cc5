"""nnsight: an edit in a trace, one cell a forward pass or several as invokes of one."""

from typing import Any, ClassVar

import torch
from nnsight import NNsight
from torch import Tensor

from peers.base import StackingPeer, Task, TaskBatch


class _Stacking(NNsight):
    """A wrapped module whose invokes are stacked: the same batch several times over."""

    def _batch_size(self, *inputs: Any, **options: Any) -> int:
        return len(next(iter(options.values()))) if options else 0

    def _batch(self, invokes: list[tuple[Any, dict[str, Tensor]]], fn: Any) -> tuple[tuple[()], dict[str, Tensor]]:
        names = invokes[0][1] if invokes else {}
        return (), {name: torch.cat([options[name] for _, options in invokes]) for name in names}


class NnsightTraces(StackingPeer):
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

    def stacked(self, batch: TaskBatch, layer: int, units: list[Tensor]) -> Tensor:
        """Return the logits of one trace, of several invokes where there are several cells."""
        example, rows = batch.rows.new_tensor(range(len(batch)))[:, None], batch.rows[:, None]
        if len(units) == 1:
            return self._one(batch, layer, example, rows, units[0])
        return self._several(batch, layer, example, rows, units)

    def _one(self, batch: TaskBatch, layer: int, example: Tensor, rows: Tensor, units: Tensor) -> Tensor:
        envoy, is_tuple = self.envoys[layer], self.is_tuple[layer]
        with self.model.trace(**batch.inputs):
            states = envoy.output[0] if is_tuple else envoy.output
            states[example, rows, units] = 0
            logits = self.model.output.logits.save()
        return logits  # noqa: RET504 (the block above is not run where it stands)

    def _several(self, batch: TaskBatch, layer: int, example: Tensor, rows: Tensor, units: list[Tensor]) -> Tensor:
        envoy, is_tuple = self.envoys[layer], self.is_tuple[layer]
        with self.model.trace() as tracer:
            for chosen in units:
                with tracer.invoke(**batch.inputs):
                    states = envoy.output[0] if is_tuple else envoy.output
                    states[example, rows, chosen] = 0
            with tracer.invoke():
                logits = self.model.output.logits.save()
        return logits
