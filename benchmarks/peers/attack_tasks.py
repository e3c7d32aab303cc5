"""What every side of an attack benchmark is given, what it must give back, and how far that is off."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import permutations
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import synapse as syn
from peers.probe_tasks import OURS, ProbeTask
from synapse.perturb.bits import StoredWeight
from synapse.types import Activations

# ---------------------------------------------------------------------------------------------------------------- bits


@dataclass(frozen=True, eq=False)
class BestBits:
    """The best flips of every bit: `promise` (bit, rank), largest first, and their `places` (bit, rank) among all
    weights, counted tensor after tensor."""

    promise: np.ndarray
    places: np.ndarray


@dataclass(frozen=True, eq=False)
class BitTask(ProbeTask):
    """Stored weights and the gradient of a loss by each: which flips make the loss fall most, to first order?

    The `each_bit` best of every position in `bits` are asked for, none that makes a weight NaN or infinite.
    """

    stored: tuple[StoredWeight, ...]
    gradients: tuple[Tensor, ...]
    bits: tuple[int, ...]
    each_bit: int

    def small(self) -> "BitTask":
        """Return the last two tensors."""
        return replace(self, stored=self.stored[-2:], gradients=self.gradients[-2:])

    def differences(self, answers: Mapping[str, BestBits]) -> dict[str, float]:
        """Return how far promises are from the first peer's, relative to each; infinitely far where flips differ.

        Of flips that promise the same up to rounding, any may have been taken for the last places.
        """
        peers = [answer for name, answer in answers.items() if name != OURS]
        return {name: _difference(answer, peers[0]) for name, answer in answers.items() if peers}

    def remarks(self, answers: Mapping[str, BestBits]) -> Sequence[str]:
        """Return how many flips were scored."""
        del answers
        n = sum(gradient.numel() for gradient in self.gradients)
        return [f"{n * len(self.bits) / 1e6:.0f} million flips of {n / 1e6:.1f} million weights"]


def _difference(answer: BestBits, reference: BestBits, *, rounding: float = 1e-5) -> float:
    if answer.promise.shape != reference.promise.shape:
        return float("inf")
    for promise, places, known, theirs in zip(
        answer.promise, answer.places, reference.promise, reference.places, strict=True
    ):
        sure = known > known[-1] * (1 + rounding)
        if not set(theirs[sure].tolist()) <= set(places.tolist()) or len(set(places.tolist())) < len(promise):
            return float("inf")
    return float((np.abs(answer.promise - reference.promise) / np.abs(reference.promise)).max())


# ---------------------------------------------------------------------------------------------------------------- head


LONGER = 0.01
"""How much longer our edits may be than the shortest of any side."""

STRIDE = 0.01
"""How much longer than the one before it each length of an edit is that is tried."""


@dataclass(frozen=True, eq=False)
class Edits:
    """The direction of an edit of the head, of any length, (label, feature), for each (source, target, share).

    `said` are the norms that a side gives itself, relative to the head's, `seconds` its time for the edits, and
    `whole_s` that for scores and controls too, where it knows them.
    """

    of: Mapping[tuple[int, int, float], np.ndarray]
    said: Mapping[tuple[int, int, float], float] | None = None
    seconds: float | None = None
    whole_s: float | None = None


@dataclass(frozen=True, eq=False)
class PairTask(ProbeTask):
    """For every ordered pair of classes: the smallest edit of two rows of the head that redirects a share of one class.

    Fitted on one split; the norm is judged at which the edit redirects that share of the other's examples.
    """

    train: Activations
    test: Activations
    weight: np.ndarray
    shares: tuple[float, ...] = (0.5, 0.95)

    def small(self) -> "PairTask":
        """Return the examples of the first three classes, with their three rows."""
        keep = 3
        train, test = (_first_classes(split, keep) for split in (self.train, self.test))
        return replace(self, train=train, test=test, weight=self.weight[:keep], shares=self.shares[:1])

    @property
    def cases(self) -> list[tuple[int, int, float]]:
        """Every (source, target, share)."""
        return [(s, t, share) for s, t in permutations(range(len(self.weight)), 2) for share in self.shares]

    def fitting(self, source: int) -> np.ndarray:
        """Return the training examples of a class that the head gets right."""
        return np.flatnonzero((self.train.targets == source) & (self.train.predictions == source))

    def norms(self, answer: Edits) -> np.ndarray:
        """Return the norm at which each edit redirects its share of the test examples, relative to that of the head.

        By small steps, on the edited logits themselves; infinite where it never does.
        """
        found = []
        for (source, target, share), edit in sorted(answer.of.items()):
            chosen = np.flatnonzero((self.test.targets == source) & (self.test.predictions == source))
            logits = self.test.known_logits[chosen].astype(np.float64)
            slopes = self.test.features[chosen] @ (edit / np.linalg.norm(edit)).T
            found.append(_first_norm(logits, slopes, target, share) / np.linalg.norm(self.weight))
        return np.array(found)

    def differences(self, answers: Mapping[str, Edits]) -> dict[str, float]:
        """Return by how much a side's norms are above the least of any side, relative to it: the mean of all cases.

        Infinite where a side leaves a case out.
        """
        norms = {name: self.norms(answer) for name, answer in answers.items() if set(answer.of) == set(self.cases)}
        least = np.min(list(norms.values()), axis=0) if norms else np.empty(0)
        return {
            name: float((norms[name] / least - 1).mean()) if name in norms and len(answers) > 1 else float("inf")
            for name in answers
            if len(answers) > 1
        }

    def remarks(self, answers: Mapping[str, Edits]) -> Sequence[str]:
        """Return the mean norms."""
        said = []
        for share in self.shares:
            of = {
                name: np.mean([n for n, case in zip(self.norms(a), sorted(a.of), strict=True) if case[2] == share])
                for name, a in answers.items()
            }
            told = ", ".join(f"{name} {norm:.3f}" for name, norm in of.items())
            said.append(f"mean ||dW||/||W|| at which {share:.0%} of other examples are redirected: {told}")
        whole = {name: answer.whole_s for name, answer in answers.items() if answer.whole_s is not None}
        said += [
            f"{name} with scores and 10 random controls a pair: {seconds:.2f} s" for name, seconds in whole.items()
        ]
        right = (self.test.predictions == self.test.targets).mean()
        return [*said, f"accuracy of the head {right:.3f}"]

    def doubts(self, answers: Mapping[str, Edits]) -> Sequence[str]:
        """Refuse norms that a side says and the edited logits do not."""
        return [
            f"{name} says that {case} needs a norm of {answer.said[case]:.4f}, its edit needs {norm:.4f}"
            for name, answer in answers.items()
            if answer.said is not None
            for case, norm in zip(sorted(answer.of), self.norms(answer), strict=True)
            if not np.isclose(answer.said[case], norm, rtol=2 * STRIDE)
        ]


def _first_classes(split: Activations, n: int) -> Activations:
    chosen = split.take(np.flatnonzero(split.targets < n))
    return replace(chosen, logits=chosen.known_logits[:, :n], labels=chosen.labels[:n])


def _first_norm(logits: np.ndarray, slopes: np.ndarray, target: int, share: float) -> float:
    norms = np.exp(np.arange(np.log(1e-2), np.log(1e3), STRIDE))
    redirected = ((logits + norms[:, None, None] * slopes).argmax(axis=2) == target).mean(axis=1) >= share
    return float(norms[redirected.argmax()]) if redirected.any() else float("inf")


# --------------------------------------------------------------------------------------------------------- activations


@dataclass(frozen=True, eq=False)
class FoundEdits:
    """Edits of the readout state (example, unit); zero where none was found."""

    edits: np.ndarray


@dataclass(frozen=True, eq=False)
class EditTask(ProbeTask):
    """The smallest edit of [CLS] behind a block that changes the prediction, for every example of the batches."""

    classifier: syn.Classifier
    examples: syn.Examples
    layer: int
    block: nn.Module
    batches: tuple[tuple[np.ndarray, dict[str, Tensor]], ...]
    width: int

    def small(self) -> "EditTask":
        """Return the last batch."""
        index, inputs = self.batches[-1]
        renumbered = ((np.arange(len(index)), inputs),)
        return replace(self, examples=self.examples.take(index), batches=renumbered)

    def logits(self, inputs: Mapping[str, Tensor], edits: Tensor) -> Tensor:
        """Return the logits of the whole model with the edits added to row 0 of the block's output."""
        handle = self.block.register_forward_hook(partial(_add_to_first_row, edits))
        try:
            return self.classifier.module(**inputs).logits
        finally:
            handle.remove()

    def changed(self, edits: np.ndarray) -> np.ndarray:
        """Return which predictions the edits change, by the plain model with a hook; edits a thousandth longer.

        A thousandth, as an edit may end on the boundary itself.
        """
        found = np.zeros(len(edits), dtype=bool)
        with torch.inference_mode():
            for index, inputs in self.batches:
                given = torch.from_numpy(edits[index].astype(np.float32))
                before, after = (self.logits(inputs, factor * given).argmax(dim=1) for factor in (0.0, 1.001))
                found[index] = (before != after).numpy()
        return found

    def norms(self, answer: FoundEdits) -> np.ndarray:
        """Return the norm of each edit; infinite where it changes no prediction."""
        return np.where(self.changed(answer.edits), np.linalg.norm(answer.edits, axis=1), np.inf)

    def differences(self, answers: Mapping[str, FoundEdits]) -> dict[str, float]:
        """Return the share of predictions that a side's edits do not change."""
        return {name: float(np.isinf(self.norms(answer)).mean()) for name, answer in answers.items()}

    def doubts(self, answers: Mapping[str, FoundEdits]) -> Sequence[str]:
        """Refuse edits of ours that are longer than a peer's."""
        medians = {name: float(np.median(self.norms(answer))) for name, answer in answers.items()}
        longer = medians.get(OURS, 0.0) / min(medians.values(), default=1.0) - 1
        return [f"edits of synapse are {longer:.1%} longer than the shortest"] if longer > LONGER else []

    def remarks(self, answers: Mapping[str, Any]) -> Sequence[str]:
        """Return median norms, and how many predictions changed."""
        said = []
        for name, answer in answers.items():
            norms = self.norms(answer)
            said.append(
                f"median ||d|| of {name} {np.median(norms):.3f}, {np.isfinite(norms).mean():.0%} of predictions changed"
            )
        return said


def _add_to_first_row(edits: Tensor, _module: nn.Module, _arguments: Any, output: Any) -> Any:
    states = output[0] if isinstance(output, tuple) else output
    moved = torch.cat([states[:, :1] + edits[:, None], states[:, 1:]], dim=1)
    return (moved, *output[1:]) if isinstance(output, tuple) else moved
