"""captum: its store of activation vectors, which TCAV uses."""

from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from captum._utils.av import AV
from torch import Tensor, nn

from peers.record_tasks import Recording, RecordSide, RecordTask, first_rows

_MODEL = "model"


class CaptumStore(RecordSide):
    """`AV.generate_dataset_activations` of all blocks: a file for every batch and layer, with the states of all tokens.

    captum makes no batches: it gets the buckets of synapse.
    """

    name: ClassVar[str] = "captum"
    package: ClassVar[str] = "captum"

    def run(self, task: RecordTask) -> Recording:
        """Return the states of all layers, which are read from the files."""
        folder = str(task.new_folder())
        names = tuple(next(task.batches())[1])
        model = _Positional(self.module, names)
        layers = [f"module.{block}" for block in task.blocks]
        with torch.inference_mode():
            AV.generate_dataset_activations(folder, model, _MODEL, layers, _batches(task, names))
        return Recording(partial(_read, task, folder, layers))


class _Positional(nn.Module):
    """A model that takes its arguments by position, as captum gives them."""

    def __init__(self, module: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.module = module
        self.names = names

    def forward(self, *inputs: Tensor) -> Tensor:
        logits: Tensor = self.module(**dict(zip(self.names, inputs, strict=True))).logits
        return logits


def _batches(task: RecordTask, names: tuple[str, ...]) -> Iterator[tuple[Any]]:
    """Yield what a data loader would: the inputs in front of everything else."""
    for _, inputs in task.batches():
        yield (tuple(inputs[name] for name in names),)


def _read(task: RecordTask, folder: str, layers: list[str]) -> np.ndarray:
    states = np.empty(task.shape, dtype=np.float32)
    for place, layer in enumerate(layers):
        files = AV.load(folder, _MODEL, "default", layer)
        for index, number in zip(task.buckets, range(len(files)), strict=True):
            states[place, index] = first_rows(files[number]).numpy()
    return states
