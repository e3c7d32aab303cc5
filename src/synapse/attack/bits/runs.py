"""Examples that are run again and again while weights change.

A flip in a block changes nothing below it, so that after one clean pass a trial starts at that block; in the head it
costs next to nothing. The first trial of every weight tensor is compared with the whole model, and beyond `TOLERANCE`
the tensor's trials are run whole. Memory: the outputs of all blocks for the fitting examples.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from synapse.attack.bits.aim import Aim, Loss, Outcome
from synapse.data.examples import Examples
from synapse.errors import ModelError
from synapse.model.classifier import Batch, Classifier
from synapse.model.resume import CleanPass, clean_pass, resume
from synapse.model.trace import forward_logits
from synapse.types import Activations

log = logging.getLogger(__name__)

TOLERANCE = 1e-4
"""Largest difference from the whole model's logits, relative to their size, at which the resumed ones are trusted."""


@dataclass(eq=False)
class Runs(ABC):
    """Examples of known classes, and their logits under the weights as they are at the moment."""

    classifier: Classifier
    targets: Int[np.ndarray, "example"]

    @abstractmethod
    def logits(self) -> Float[np.ndarray, "example label"]:
        """Return the logits of all examples, and keep what `logits_with` can take over."""

    @abstractmethod
    def logits_with(self, weight: str) -> Float[np.ndarray, "example label"]:
        """Return the logits where nothing but this weight tensor has changed since `logits`."""

    @abstractmethod
    def pieces(
        self, examples: Int[np.ndarray, "some"]
    ) -> Iterator[tuple[Int[np.ndarray, "piece"], Float[Tensor, "piece label"]]]:
        """Yield the logits of some examples, in pieces, ready for a gradient, with the positions of the examples."""

    def trusting(self, other: "Runs") -> "Runs":
        """Return these runs, with what was found out about short cuts by the other ones of the same model."""
        del other
        return self

    def gradients(self, loss: Loss, examples: Int[np.ndarray, "some"], weights: Sequence[Tensor]) -> list[Tensor]:
        """Return the gradient of the loss of some examples by each weight tensor, in float32.

        Raises:
            ModelError: the logits have no gradient.
        """
        sums = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
        with _wanting_gradients(weights):
            for index, logits in self.pieces(examples):
                if not logits.requires_grad:
                    raise ModelError("The logits have no gradient by the weights, so flips cannot be ranked by it.")
                parts = torch.autograd.grad(loss.of(logits, index), weights, materialize_grads=True)
                for so_far, part in zip(sums, parts, strict=True):
                    so_far.add_(part)
        return sums


@dataclass(eq=False)
class FeatureRuns(Runs):
    """Recorded features, which only the final linear map runs on."""

    features: Float[Tensor, "example feature"]

    def logits(self) -> Float[np.ndarray, "example label"]:
        """Return the product of the features with the final weights."""
        with torch.no_grad():
            return self._product(self.features).float().cpu().numpy()

    def logits_with(self, weight: str) -> Float[np.ndarray, "example label"]:
        """Return the same: there is nothing below the final map to take over."""
        del weight
        return self.logits()

    def pieces(
        self, examples: Int[np.ndarray, "some"]
    ) -> Iterator[tuple[Int[np.ndarray, "piece"], Float[Tensor, "piece label"]]]:
        """Yield the logits at once."""
        yield examples, self._product(self.features[torch.from_numpy(examples).to(self.features.device)])

    def _product(self, features: Float[Tensor, "some feature"]) -> Float[Tensor, "some label"]:
        final = self.classifier.final
        assert final is not None
        # Recorded in float32, whatever the model runs in.
        logits: Tensor = final(features.to(self.classifier.head_weight().dtype))
        return logits


@dataclass(eq=False)
class LiveRuns(Runs):
    """Examples in batches that the model runs on. With `keeps`, `logits` keeps the outputs of the blocks."""

    batches: tuple[Batch, ...]
    keeps: bool = False
    _clean: list[CleanPass] = field(default_factory=list)
    _whole: dict[str, bool] = field(default_factory=dict)

    def logits(self) -> Float[np.ndarray, "example label"]:
        """Return the logits of a pass of the whole model."""
        if not self.keeps:
            return self._gathered([self.classifier.forward(batch) for batch in self.batches])
        self._clean = [clean_pass(self.classifier, batch) for batch in self.batches]
        return self._gathered([clean.logits for clean in self._clean])

    def logits_with(self, weight: str) -> Float[np.ndarray, "example label"]:
        """Return the logits, run from the block on that the weight stands in."""
        layer = _last_unchanged(self.classifier, weight)
        if layer is None or not self._clean:
            return self._gathered([self.classifier.forward(batch) for batch in self.batches])
        if weight not in self._whole:
            self._whole[weight] = not self._agrees(self._clean[0], layer, weight)
        if self._whole[weight]:
            return self._gathered([self.classifier.forward(batch) for batch in self.batches])
        return self._gathered([self._resumed(clean, layer) for clean in self._clean])

    def pieces(
        self, examples: Int[np.ndarray, "some"]
    ) -> Iterator[tuple[Int[np.ndarray, "piece"], Float[Tensor, "piece label"]]]:
        """Yield the logits batch by batch, without the examples that are not asked for."""
        for whole in self.batches:
            asked = np.flatnonzero(np.isin(whole.index, examples))
            if len(asked) == 0:
                continue
            batch = whole if len(asked) == len(whole.index) else whole.take(torch.from_numpy(asked))
            with self.classifier.running(batch):
                yield batch.index, forward_logits(self.classifier.module, batch.inputs)

    def trusting(self, other: Runs) -> Runs:
        """Return these runs, which share what they find out with the other ones."""
        return replace(self, _whole=other._whole) if isinstance(other, LiveRuns) else self

    def _gathered(self, logits: Sequence[Float[Tensor, "_ label"]]) -> Float[np.ndarray, "example label"]:
        found = np.empty((len(self.targets), len(self.classifier.labels)), dtype=np.float32)
        for batch, some in zip(self.batches, logits, strict=True):
            found[batch.index] = some.float().cpu().numpy()
        return found

    def _resumed(self, clean: CleanPass, layer: int) -> Float[Tensor, "batch label"]:
        everyone = torch.arange(len(clean.logits), device=clean.logits.device)
        return resume(self.classifier, clean, layer, clean.states[layer], everyone)

    def _agrees(self, clean: CleanPass, layer: int, weight: str) -> bool:
        whole, resumed = self.classifier.forward(clean.batch).float(), self._resumed(clean, layer).float()
        size = 1 + float(clean.logits.abs().max())
        agrees = torch.allclose(resumed, whole, rtol=TOLERANCE, atol=TOLERANCE * size, equal_nan=True)
        if not agrees:
            log.warning("Flips in %s: resumed logits differ from the plain forward's; it is run plain.", weight)
        return agrees


def _last_unchanged(classifier: Classifier, weight: str) -> int | None:
    """Return the last block whose output does not depend on the weight, or None where all must be run."""
    for layer, block in enumerate(classifier.anatomy.blocks):
        if weight.startswith(f"{block}."):
            return layer - 1 if layer else None
    is_head = any(weight.startswith(f"{name}.") for name in classifier.anatomy.head)
    return classifier.n_layers - 1 if is_head else None


def runs_of(
    classifier: Classifier,
    examples: Examples | Activations,
    *,
    chosen: Int[np.ndarray, "chosen"] | None = None,
    keeps: bool = False,
) -> Runs:
    """Return the chosen examples, or all, ready to run: by the model, or recorded features by its final map."""
    if isinstance(examples, Activations):
        assert examples.features is not None
        rows = np.arange(len(examples)) if chosen is None else chosen
        features = torch.from_numpy(np.asarray(examples.features[rows])).to(classifier.device)
        return FeatureRuns(classifier, examples.targets[rows], features)
    some = examples if chosen is None else examples.take(chosen)
    targets = some.targets(classifier.labels)
    return LiveRuns(classifier, targets, tuple(classifier.batches(some.inputs, targets)), keeps)


@contextmanager
def _wanting_gradients(weights: Sequence[Tensor]) -> Iterator[None]:
    """Ask for gradients of these parameters, and put back whether they were asked for."""
    wanted = [weight.requires_grad for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for weight, before in zip(weights, wanted, strict=True):
            weight.requires_grad_(before)


@dataclass(frozen=True, eq=False)
class Aimed:
    """The examples that an attack is about, attacked ones and others, and which are which: `chosen` ones of `given`."""

    given: Examples | Activations
    chosen: Int[np.ndarray, "example"]
    runs: Runs
    aim: Aim

    @classmethod
    def of(
        cls,
        classifier: Classifier,
        given: Examples | Activations,
        source: int | None,
        target: int | None,
        *,
        keeps: bool = False,
    ) -> "Aimed":
        """Return those examples that count, judged under the present weights."""
        everyone = runs_of(classifier, given)
        aim = Aim.of(everyone.targets, everyone.logits(), source, target)
        concerned = np.flatnonzero(aim.attacked | aim.others)
        return cls(given, concerned, runs_of(classifier, given, chosen=concerned, keeps=keeps), aim.take(concerned))

    def take(self, examples: Int[np.ndarray, "some"]) -> "Aimed":
        """Return some of the examples, ready to run."""
        chosen = self.chosen[examples]
        runs = runs_of(self.runs.classifier, self.given, chosen=chosen, keeps=True)
        return Aimed(self.given, chosen, runs.trusting(self.runs), self.aim.take(examples))

    def outcome(self) -> Outcome:
        """Return what the examples say under the present weights."""
        return self.aim.outcome(self.runs.logits())
