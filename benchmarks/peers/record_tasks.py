"""What every side of the recording benchmark is given, and what it must give back."""

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import synapse as syn
from peers.base import Task
from peers.side import Side


@dataclass(frozen=True, eq=False)
class RecordTask:
    """Texts whose block outputs are wanted at row 0, [CLS].

    `buckets` are the positions of the texts that synapse runs together, the longest first. `reference` is what plain
    hooks give, (layer, example, unit). Sides write into `folder`.
    """

    description: str
    module: nn.Module
    classifier: syn.Classifier
    examples: syn.Examples
    tokenizer: Any
    buckets: tuple[np.ndarray, ...]
    folder: Path
    reference: np.ndarray | None = None

    with_own_module = Task.with_own_module

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.classifier.device

    @property
    def blocks(self) -> tuple[str, ...]:
        """Names of the blocks."""
        return self.classifier.anatomy.blocks

    @property
    def shape(self) -> tuple[int, int, int]:
        """(layer, example, unit) of the states that are wanted."""
        return self.classifier.n_layers, len(self.examples), self.classifier.width

    @property
    def batch_size(self) -> int:
        """Texts in a batch of synapse's, on average: for whoever makes batches of one size."""
        return max(1, round(len(self.examples) / len(self.buckets)))

    def batches(self) -> Iterator[tuple[np.ndarray, Mapping[str, Tensor]]]:
        """Yield the positions and the tensors of every bucket, tokenised when it is asked for."""
        for index in self.buckets:
            yield index, self.classifier.preprocess([self.examples.inputs[i] for i in index])

    def small(self) -> "RecordTask":
        """Return the longest texts alone, to warm up."""
        first = self.buckets[0][:8]
        return replace(self, examples=self.examples.take(first), buckets=(np.arange(len(first)),), reference=None)

    def new_folder(self) -> Path:
        """Return an empty folder."""
        return Path(tempfile.mkdtemp(dir=self.folder))

    def empty(self) -> None:
        """Remove what sides have written."""
        for path in self.folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def by_hooks(self) -> np.ndarray:
        """Return the states that plain forward hooks see, (layer, example, unit)."""
        states, seen = np.empty(self.shape, dtype=np.float32), [torch.empty(0)] * len(self.blocks)
        handles = [
            self.module.get_submodule(block).register_forward_hook(partial(_take_first_row, seen, layer))
            for layer, block in enumerate(self.blocks)
        ]
        with torch.inference_mode():
            for index, inputs in self.batches():
                self.module(**inputs)
                states[:, index] = torch.stack(seen).numpy()
        for handle in handles:
            handle.remove()
        return states


@dataclass(frozen=True, eq=False)
class Recording:
    """What a side has recorded: `read` gives its [CLS] states, where it has any, of all layers or of the last only.

    Reading is not timed, so that what is written to disk need not be read again at once.
    """

    read: Callable[[], np.ndarray] | None = None
    last_only: bool = False

    def difference(self, reference: np.ndarray) -> float | None:
        """Return the largest difference from a reference; infinite where a state is no number."""
        if self.read is None:
            return None
        expected = reference[-1:] if self.last_only else reference
        largest = float(np.abs(self.read() - expected).max())
        return largest if np.isfinite(largest) else float("inf")


class RecordSide(Side):
    """A side that warms up on the longest batch."""

    def __init__(self, task: RecordTask) -> None:
        self.module = task.module

    def prepare(self, task: RecordTask) -> None:
        """Warm up."""
        self.run(task.small())


def first_rows(output: Any) -> Tensor:
    """Return row 0 of a block's output, (example, unit)."""
    return (output[0] if isinstance(output, tuple) else output)[:, 0]


def _take_first_row(seen: list[Tensor], layer: int, _module: nn.Module, _arguments: Any, output: Any) -> None:
    seen[layer] = first_rows(output).clone()
