"""What every side of a sweep benchmark is given, and what it must give back."""

from abc import abstractmethod
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import chain
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from peers.side import Side

TOGETHER = (1, 4)
"""Cells in one forward pass that are tried where a side has the choice; the fastest is kept."""


@dataclass(frozen=True, eq=False)
class TaskBatch:
    """Examples that share a forward pass: their positions, the model's arguments, and each one's readout row.

    `n_tokens` is the number of rows of a block's output.
    """

    index: Tensor
    inputs: dict[str, Tensor]
    rows: Tensor
    n_tokens: int

    def __len__(self) -> int:
        return len(self.index)


@dataclass(frozen=True, eq=False)
class Task:
    """A sweep: in every cell the block output `layer` is set to zero at the readout row, in these units.

    `examples` and `sweep_cells` say the same as `batches` and `cells` in the words of synapse; peers have no use for
    them.
    """

    module: nn.Module
    blocks: tuple[str, ...]
    batches: tuple[TaskBatch, ...]
    cells: tuple[tuple[int, tuple[int, ...]], ...]
    n_labels: int
    examples: Any = None
    sweep_cells: tuple[Any, ...] = ()

    @property
    def n_examples(self) -> int:
        """Number of examples."""
        return sum(len(batch) for batch in self.batches)

    @property
    def device(self) -> torch.device:
        """Where the batches are."""
        return self.batches[0].index.device

    def with_own_module(self) -> "Task":
        """Return the task on another module object with the very same weights.

        A peer may leave something on the modules that it wraps; whoever runs them after it would pay for that.
        """
        weights = chain(self.module.parameters(), self.module.buffers())
        return replace(self, module=deepcopy(self.module, {id(weight): weight for weight in weights}))

    def small(self) -> "Task":
        """Return the first batch (the longest examples) under a few cells of the first layer and of the last."""
        first, layers = self.batches[0], by_layer(self)
        each = 8 if len(layers) == 1 else 2
        chosen = sorted({cell for layer in (min(layers), max(layers)) for cell in layers[layer][:each]})
        return replace(
            self,
            batches=(replace(first, index=torch.arange(len(first), device=self.device)),),
            cells=tuple(self.cells[position] for position in chosen),
            examples=None if self.examples is None else self.examples.take(first.index.cpu().numpy()),
            sweep_cells=tuple(self.sweep_cells[position] for position in chosen) if self.sweep_cells else (),
        )


@dataclass(frozen=True, eq=False)
class Answer:
    """Logits (cell, example, label) under every cell, and the clean ones (example, label), in float32.

    `seconds` is how long it took where the side itself knows better than who asked.
    """

    logits: np.ndarray
    clean: np.ndarray
    seconds: float | None = None


class Peer(Side):
    """A side that runs the batches one after the other and keeps the logits on the device until the end."""

    def __init__(self, task: Task) -> None:
        self.module = task.module
        self.blocks = task.blocks

    def run(self, task: Task) -> Answer:
        """Return the logits: what is timed."""
        clean = torch.empty(task.n_examples, task.n_labels, device=task.device)
        logits = torch.empty(len(task.cells), task.n_examples, task.n_labels, device=task.device)
        with torch.inference_mode():
            for batch in task.batches:
                clean[batch.index] = self.clean(batch).float()
                for cells, edited in self.edited(task, batch):
                    logits[cells, batch.index] = edited.float()
        return Answer(logits.cpu().numpy(), clean.cpu().numpy())

    def clean(self, batch: TaskBatch) -> Tensor:
        """Return the clean logits of a batch."""
        return self.module(**batch.inputs).logits

    @abstractmethod
    def edited(self, task: Task, batch: TaskBatch) -> Iterator[tuple[Any, Tensor]]:
        """Yield positions of cells (an index, or several as a column) and the batch's logits under them."""


class StackingPeer(Peer):
    """A peer that can run several cells of a layer in one forward pass, as the batch several times over."""

    def prepare(self, task: Task) -> None:
        """Keep the fastest number of cells in one forward pass."""
        self.together = fastest_together(self, task)

    def edited(self, task: Task, batch: TaskBatch) -> Iterator[tuple[Any, Tensor]]:
        """Yield a cell, or several of a layer, at a time."""
        units = units_of(task)
        for layer, positions in by_layer(task).items():
            for start in range(0, len(positions), self.together):
                chosen = positions[start : start + self.together]
                logits = self.stacked(batch, layer, [units[position] for position in chosen])
                yield torch.tensor(chosen, device=task.device)[:, None], logits.reshape(len(chosen), len(batch), -1)

    @abstractmethod
    def stacked(self, batch: TaskBatch, layer: int, units: list[Tensor]) -> Tensor:
        """Return the logits of the batch with the units of each cell set to zero, one cell after the other."""


def seconds_of(side: Side, task: Task) -> float:
    """Return the time of a run after one that is not counted."""
    side.run(task)
    start = perf_counter()
    side.run(task)
    return perf_counter() - start


def fastest_together(side: Side, task: Task) -> int:
    """Return the number of cells in one forward pass at which a side is the fastest, of those that are tried."""
    seconds = {}
    for side.together in TOGETHER:
        seconds[side.together] = seconds_of(side, task)
    return min(seconds, key=lambda each: seconds[each])


def units_of(task: Task) -> list[Tensor]:
    """Return the units of every cell on the device, (unit,)."""
    return [torch.tensor(units, device=task.device) for _, units in task.cells]


def by_layer(task: Task) -> dict[int, list[int]]:
    """Return the positions of each layer's cells."""
    positions: dict[int, list[int]] = {}
    for position, (layer, _) in enumerate(task.cells):
        positions.setdefault(layer, []).append(position)
    return positions
