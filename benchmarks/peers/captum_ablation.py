"""captum: LayerFeatureAblation on the block, with the units of a cell as one feature."""

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from captum.attr import LayerFeatureAblation
from torch import Tensor

from peers.base import Peer, Task, TaskBatch, by_layer, fastest_together


class CaptumAblation(Peer):
    """A call of `attribute` for every set of cells that share no unit, with a mask that makes each a feature.

    captum ablates every feature of the mask, so what is in no cell makes one more, and what it returns are differences
    of one output: the logits are taken down on their way through the function that it is given.
    """

    name: ClassVar[str] = "captum"
    package: ClassVar[str] = "captum"

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.names = tuple(task.batches[0].inputs)
        self.seen: list[Tensor] = []
        self.ablations = {
            layer: LayerFeatureAblation(self._forward, task.module.get_submodule(task.blocks[layer]))
            for layer in sorted({layer for layer, _ in task.cells})
        }

    def prepare(self, task: Task) -> None:
        """Keep the fastest number of ablations in one forward pass (`perturbations_per_eval`)."""
        self.together = fastest_together(self, task)

    def edited(self, task: Task, batch: TaskBatch) -> Iterator[tuple[Any, Tensor]]:
        """Yield a cell at a time."""
        for layer, positions in by_layer(task).items():
            for group in _disjoint(task, positions):
                yield from self._ablated(task, batch, layer, group)

    def _ablated(self, task: Task, batch: TaskBatch, layer: int, group: list[int]) -> Iterator[tuple[int, Tensor]]:
        # One mask for all examples where their readout rows agree: captum then has less to add up.
        rows = batch.rows[:1] if bool((batch.rows == batch.rows[0]).all()) else batch.rows
        width = self.module.config.hidden_size
        mask = torch.full((len(rows), batch.n_tokens, width), len(group), device=task.device)  # last: in no cell
        example = torch.arange(len(rows), device=task.device)[:, None]
        for feature, position in enumerate(group):
            units = torch.tensor(task.cells[position][1], device=task.device)
            mask[example, rows[:, None], units] = feature
        first, *others = batch.inputs.values()
        self.seen.clear()
        self.ablations[layer].attribute(
            first,
            target=0,
            additional_forward_args=tuple(others) or None,
            layer_mask=mask,
            perturbations_per_eval=self.together,
        )
        # Two clean passes come first: one to read the layer, one for the output to compare with.
        ablated = torch.cat(self.seen[2:]).reshape(-1, len(batch), task.n_labels)
        yield from zip(group, ablated, strict=False)

    def _forward(self, *tensors: Tensor) -> Tensor:
        logits = self.module(**dict(zip(self.names, tensors, strict=True))).logits
        self.seen.append(logits)
        return logits


def _disjoint(task: Task, positions: list[int]) -> list[list[int]]:
    """Return the cells of a layer in as few groups as come of putting each where no unit of it is yet."""
    groups: list[tuple[list[int], set[int]]] = []
    for position in positions:
        units = set(task.cells[position][1])
        for members, taken in groups:
            if not taken & units:
                members.append(position)
                taken |= units
                break
        else:
            groups.append(([position], set(units)))
    return [members for members, _ in groups]
