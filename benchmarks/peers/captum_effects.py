"""captum: LayerFeatureAblation of single neurons, with the margin of an example's own class as its output."""

from time import perf_counter
from typing import Any, ClassVar

import numpy as np
import torch
from captum.attr import LayerFeatureAblation
from torch import Tensor

from peers.probe_tasks import Effects, EffectTask
from peers.side import Side

TOGETHER = (1, 4, 16)
"""Ablations in one forward pass that are tried; the fastest is kept."""

TRIED_UNITS = 31
"""Neurons that they are tried on; what is in no feature makes one more."""


class CaptumEffects(Side):
    """A call of `attribute` for every layer and batch, with a mask that makes each unit of the readout row a feature.

    captum ablates every feature of the mask, so what is in none makes one more.
    """

    name: ClassVar[str] = "captum"
    package: ClassVar[str] = "captum"

    def __init__(self, task: EffectTask) -> None:
        self.classifier = task.classifier
        self.targets = task.activations.targets
        self.batches = list(task.classifier.batches(task.examples.inputs))
        self.names = tuple(self.batches[0].inputs)
        self.ablations = {
            layer: LayerFeatureAblation(self._margins, task.classifier.blocks[layer]) for layer in task.layers
        }

    def prepare(self, task: EffectTask) -> None:
        """Keep the fastest number of ablations in one forward pass (`perturbations_per_eval`)."""
        seconds = {}
        for self.together in TOGETHER:
            self._lost(self.batches[0], task.layers[0], TRIED_UNITS)
            start = perf_counter()
            self._lost(self.batches[0], task.layers[0], TRIED_UNITS)
            seconds[self.together] = perf_counter() - start
        self.together = min(seconds, key=lambda each: seconds[each])

    def run(self, task: EffectTask) -> Effects:
        """Return the mean losses of margin."""
        width, n_labels = task.activations.width, len(task.activations.labels)
        lost = np.zeros((len(task.layers), len(task.examples), width))
        for place, layer in enumerate(task.layers):
            for batch in self.batches:
                lost[place, batch.index] = self._lost(batch, layer, width)
        by_class = [
            lost[:, self.targets == c].mean(axis=1) if (self.targets == c).any() else np.zeros((len(lost), width))
            for c in range(n_labels)
        ]
        return Effects(np.stack([lost.mean(axis=1), *by_class], axis=1))

    def _lost(self, batch: Any, layer: int, n_units: int) -> np.ndarray:
        """Return what the margin of each example of a batch loses without each of the first units."""
        site = self.classifier.sites("residual")[layer]
        shape = (1, next(iter(batch.inputs.values())).shape[1], site.width)
        mask = torch.full(shape, n_units)
        mask[0, 0, :n_units] = torch.arange(n_units)
        labels = torch.from_numpy(self.targets[batch.index])
        first, *others = batch.inputs.values()
        with torch.inference_mode():
            found = self.ablations[layer].attribute(
                first,
                additional_forward_args=(*others, labels),
                layer_mask=mask,
                perturbations_per_eval=self.together,
            )
        return (found[0] if isinstance(found, tuple) else found)[:, 0].double().numpy()

    def _margins(self, *tensors: Tensor) -> Tensor:
        *inputs, labels = tensors
        logits = self.classifier.module(**dict(zip(self.names, inputs, strict=True))).logits
        others = logits.scatter(1, labels[:, None], -torch.inf).amax(dim=1)
        return logits.gather(1, labels[:, None])[:, 0] - others
