"""pyvene: an intervenable model with a zero intervention for each block."""

import logging
import re
from collections.abc import Iterator
from typing import Any, ClassVar

import pyvene
from torch import Tensor

from peers.base import Peer, Task, TaskBatch


class PyveneModel(Peer):
    """One call of an `IntervenableModel` for every batch and cell; its units are pyvene's subspaces."""

    name: ClassVar[str] = "pyvene"
    package: ClassVar[str] = "pyvene"

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        # Its faster indexing takes one row for all examples of a batch; that it is on is logged as a warning.
        one_row = all(bool((batch.rows == batch.rows[0]).all()) for batch in task.batches)
        logging.disable(logging.WARNING)
        self.models = {
            layer: pyvene.IntervenableModel(
                {"component": f"{_path(task.blocks[layer])}.output", "intervention": pyvene.ZeroIntervention()},
                model=task.module,
                use_fast=one_row,
            )
            for layer in sorted({layer for layer, _ in task.cells})
        }
        logging.disable(logging.NOTSET)

    def edited(self, task: Task, batch: TaskBatch) -> Iterator[tuple[Any, Tensor]]:
        """Yield a cell at a time."""
        # One intervention; for each example the list of its positions, and of its units.
        places = {"base": [[[row] for row in batch.rows.tolist()]]}
        for position, (layer, units) in enumerate(task.cells):
            _, output = self.models[layer](
                base=batch.inputs, unit_locations=places, subspaces=[[list(units)] * len(batch)]
            )
            yield position, output.logits


def _path(block: str) -> str:
    """Return a module's name as pyvene writes it: a number is an index of what stands before it."""
    return re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", block)
