"""DeepFool on the readout state of a block, as attack libraries run it: the whole model for every step."""

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from peers.attack_tasks import EditTask, FoundEdits
from peers.side import Side

STEPS = 50
OVERSHOOT = 0.02


class DeepFool(Side):
    """Steps onto the nearest boundary of the map made linear, until the prediction changes; 2 % beyond it.

    Source: Moosavi-Dezfooli et al. (CVPR 2016), algorithm 2; steps and overshoot as the paper and foolbox have them.
    """

    name: ClassVar[str] = "DeepFool, plain torch"
    package: ClassVar[str] = "torch"

    def __init__(self, task: EditTask) -> None:
        del task

    def prepare(self, task: EditTask) -> None:
        """Warm up on a batch."""
        self.run(task.small())

    def run(self, task: EditTask) -> FoundEdits:
        """Return the edits."""
        found = np.zeros((len(task.examples), task.width))
        for index, inputs in task.batches:
            found[index] = self._batch(task, inputs).numpy()
        return FoundEdits(found)

    def _batch(self, task: EditTask, inputs: dict[str, Tensor]) -> Tensor:
        n = len(next(iter(inputs.values())))
        total, everyone = torch.zeros(n, task.width), torch.arange(n)
        clean = None
        for _ in range(STEPS):
            given = (total * (1 + OVERSHOOT)).requires_grad_()
            logits = task.logits(inputs, given)
            clean = logits.argmax(dim=1) if clean is None else clean
            still = logits.argmax(dim=1) == clean
            if not still.any():
                break
            slopes = [torch.autograd.grad(column.sum(), given, retain_graph=True)[0] for column in logits.T]
            slope = torch.stack(slopes, dim=1)  # (example, label, unit)
            gap = logits.detach()[everyone, clean][:, None] - logits.detach()
            towards = slope - slope[everyone, clean][:, None]
            norm = towards.norm(dim=2)
            distance = torch.where(norm > 0, gap.abs() / norm, torch.inf)
            distance[everyone, clean] = torch.inf
            nearest = distance.argmin(dim=1)
            w = towards[everyone, nearest]
            step = (distance[everyone, nearest] / w.norm(dim=1).clamp_min(1e-12))[:, None] * w
            total = torch.where(still[:, None], total + step, total)
        return (total * (1 + OVERSHOOT)).detach()
