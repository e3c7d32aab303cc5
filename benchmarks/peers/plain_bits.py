"""All single flips scored as their definition stands: bit by bit, tensor by tensor, each as one whole tensor."""

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from peers.attack_tasks import BestBits, BitTask
from peers.side import Side
from synapse.perturb.bits import StoredWeight

FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class PlainBits(Side):
    """For each bit: the words of a tensor with it flipped, g * (w' - w), and `torch.topk`."""

    name: ClassVar[str] = "plain torch"
    package: ClassVar[str] = "torch"

    def __init__(self, task: BitTask) -> None:
        del task

    def prepare(self, task: BitTask) -> None:
        """Warm up on a small part."""
        self.run(task.small())

    def run(self, task: BitTask) -> BestBits:
        """Return the best flips of every bit."""
        n, offsets = task.each_bit, np.cumsum([0, *(g.numel() for g in task.gradients)])
        promise, places = np.empty((len(task.bits), n)), np.empty((len(task.bits), n), dtype=np.int64)
        for row, bit in enumerate(task.bits):
            tops = [self._of(s, g, bit, n) for s, g in zip(task.stored, task.gradients, strict=True)]
            promises = torch.cat([values for values, _ in tops])
            where = torch.cat([index + int(start) for (_, index), start in zip(tops, offsets, strict=False)])
            best, order = promises.topk(n)
            promise[row], places[row] = best.numpy(), where[order].numpy()
        return BestBits(promise, places)

    def _of(self, stored: StoredWeight, gradient: Tensor, bit: int, n: int) -> tuple[Tensor, Tensor]:
        width = stored.words.element_size() * 8
        mask = torch.tensor(1 << bit if bit < width - 1 else -(1 << bit), dtype=stored.words.dtype)
        change = self._values(stored, stored.words ^ mask) - self._values(stored, stored.words)
        promise = -gradient.flatten() * change
        promise = torch.where(torch.isfinite(change), promise, -torch.inf)
        return promise.topk(min(n, len(promise)))

    def _values(self, stored: StoredWeight, words: Tensor) -> Tensor:
        if stored.scale is None:
            return words.view(FLOATS[stored.number_format]).float()
        return (words.reshape(len(stored.scale), -1).float() * stored.scale[:, None]).flatten()
