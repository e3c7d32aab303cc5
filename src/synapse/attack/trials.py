"""A few examples that are run again and again while the weights of a place are changed.

What lies below the first changed block is given again, not computed. At each place the first batch is compared with the
whole model under noise, and beyond `TOLERANCE` (relative to the logits) the place is run whole.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from synapse.data.examples import Examples
from synapse.errors import ModelError
from synapse.model.classifier import Classifier
from synapse.model.resume import CleanPass, clean_pass, resume
from synapse.model.trace import forward_logits, passed_over
from synapse.perturb.weights import HEAD, WeightNoise, WeightPerturbation, weights_at
from synapse.types import GLOBAL, StrengthCurve

log = logging.getLogger(__name__)

TOLERANCE = 1e-4
"""Largest difference from the whole model's logits, relative to their size, at which the resumed ones are trusted."""

BATCHES_AT_ONCE = 8
"""Batches whose clean block outputs are held at once: what bounds the memory."""


@dataclass(frozen=True, eq=False)
class Strengths:
    """Changes of the weights of one place: `changes[b][d]` is draw d of size `budgets[b]`.

    The other fields are those of the curve that they give, see `synapse.types.StrengthCurve`.
    """

    attack: str
    arm: str
    unit: str
    budgets: tuple[float, ...]
    changes: Sequence[Sequence[WeightPerturbation]]
    target: str = GLOBAL

    @property
    def place(self) -> str:
        """Where the weights are that are changed."""
        return self.changes[0][0].place


class WeightTrials:
    """Examples, and what the model says of them under changes of its weights."""

    def __init__(self, classifier: Classifier, examples: Examples) -> None:
        self.classifier, self.examples = classifier, examples
        self.targets = examples.targets(classifier.labels)
        self._kept: list[CleanPass] | None = None
        self._whole: dict[str, bool] = {}

    def curve(self, strengths: Strengths) -> StrengthCurve:
        """Return the logits of the examples under every change."""
        place, n_draws = strengths.place, len(strengths.changes[0])
        shape = (len(self.examples), len(self.classifier.labels))
        logits = np.empty((len(strengths.budgets), n_draws, *shape), dtype=np.float32)
        clean_logits = np.empty(shape, dtype=np.float32)
        for group in self._clean_groups():
            runs_whole = self._runs_whole(group[0], place)
            for clean in group:
                clean_logits[clean.batch.index] = clean.logits.float().cpu().numpy()
            for b, draws in enumerate(strengths.changes):
                for d, change in enumerate(draws):
                    with self.classifier.edited(change):
                        for clean in group:
                            found = self._logits(clean, place, runs_whole=runs_whole)
                            logits[b, d, clean.batch.index] = found.float().cpu().numpy()
        return StrengthCurve(
            strengths.attack,
            place,
            strengths.target,
            strengths.arm,
            strengths.unit,
            strengths.budgets,
            logits,
            clean_logits,
            self.targets,
        )

    def gradients(self, change: WeightPerturbation, target: str = GLOBAL) -> dict[str, Tensor]:
        """Return the gradient by each changed matrix of the cross-entropy of the right classes, over the examples.

        With a target: that of minus the cross-entropy of this class, over the examples of all others.

        Raises:
            ModelError: the logits have no gradient.
        """
        weights = weights_at(self.classifier, change.place)
        sums = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        wanted, counts = torch.from_numpy(self.targets), torch.ones(len(self.targets))
        if target != GLOBAL:
            label = self.classifier.labels.index(target)
            wanted, counts = torch.full_like(wanted, label), -(wanted != label).float()
        for group in self._clean_groups():
            runs_whole = self._runs_whole(group[0], change.place)
            with self.classifier.edited(change), _wanting_gradients(list(weights.values())):
                for clean in group:
                    logits = self._graph(clean, change.place, runs_whole=runs_whole)
                    if not logits.requires_grad:
                        raise ModelError("The logits have no gradient by the weights, so it cannot be followed.")
                    index = torch.from_numpy(clean.batch.index)
                    each = cross_entropy(logits, wanted[index].to(logits.device), reduction="none")
                    loss = (each * counts[index].to(each)).sum()
                    parts = torch.autograd.grad(loss, list(weights.values()), materialize_grads=True)
                    for name, part in zip(sums, parts, strict=True):
                        sums[name].add_(part)
        return sums

    def _clean_groups(self) -> Iterator[list[CleanPass]]:
        """Yield the clean passes of several batches at a time; they are kept where that is all of them."""
        if self._kept is not None:
            yield self._kept
            return
        batches = list(self.classifier.batches(self.examples.inputs))
        for start in range(0, len(batches), BATCHES_AT_ONCE):
            group = [clean_pass(self.classifier, batch) for batch in batches[start : start + BATCHES_AT_ONCE]]
            if len(group) == len(batches):
                self._kept = group
            yield group

    def _runs_whole(self, clean: CleanPass, place: str) -> bool:
        """Return whether the whole model is to be run when the weights at a place are changed."""
        if place not in self._whole:
            with self.classifier.edited(WeightNoise(place, 1.0)):
                whole = self._logits(clean, place, runs_whole=True)
                gap = float((self._logits(clean, place, runs_whole=False) - whole).abs().max())
            # true for NaN, which agrees with nothing
            self._whole[place] = not gap <= TOLERANCE * (1 + float(whole.abs().max()))
            if self._whole[place]:
                log.warning(
                    "Weights at %s: resumed logits are %.1e from the plain forward; it is run plain.", place, gap
                )
        return self._whole[place]

    def _logits(self, clean: CleanPass, place: str, *, runs_whole: bool) -> Float[Tensor, "example label"]:
        """Return the logits of the batch under the present weights, run from the place on that has changed."""
        if runs_whole:
            return self.classifier.forward(clean.batch)
        layer = last_clean(self.classifier, place)
        return resume(self.classifier, clean, layer, None if layer < 0 else clean.states[layer], _everyone(clean))

    def _graph(self, clean: CleanPass, place: str, *, runs_whole: bool) -> Float[Tensor, "example label"]:
        """Return the same, ready for a gradient."""
        classifier = self.classifier
        layer = -1 if runs_whole else last_clean(classifier, place)
        # Copies: what the clean pass kept was made in inference mode, and can be part of no gradient.
        replay = clean.replay.take(_everyone(clean))
        states = None if layer < 0 else clean.states[layer].clone()
        with classifier.studied(), classifier.running(clean.batch):
            if runs_whole:
                return forward_logits(classifier.module, clean.batch.inputs).float()
            with passed_over(classifier.module, replay, layer, classifier.sites()[max(layer, 0)], states):
                return forward_logits(classifier.module, clean.batch.inputs).float()


def last_clean(classifier: Classifier, place: str) -> int:
    """Return the last block whose output the weights of the place leave as it was, or -1."""
    return classifier.n_layers - 1 if place == HEAD else int(place.split()[1]) - 1


def _everyone(clean: CleanPass) -> Tensor:
    return torch.arange(len(clean.logits), device=clean.logits.device)


@contextmanager
def _wanting_gradients(weights: Sequence[Tensor]) -> Iterator[None]:
    """Ask for gradients of these parameters, and put back whether they were asked for."""
    wanted = [weight.requires_grad for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for weight, before in zip(weights, wanted, strict=True):
            weight.requires_grad_(before)
