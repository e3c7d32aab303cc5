"""What every side of a probe benchmark is given, what it must give back, and how far that is off."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from scipy.special import logsumexp

import synapse as syn
from synapse.probe.solver import Solution
from synapse.types import Activations

OURS = "synapse"

LEAST_EFFECT = 1e-2
"""Logits that the largest effect of a neuron must reach: with less, neurons that were not touched would not show."""


@dataclass(frozen=True, eq=False)
class ProbeTask(ABC):
    """A task of the probe benchmark; `description` says in words what it is."""

    description: str
    device: ClassVar[torch.device] = torch.device("cpu")

    @abstractmethod
    def small(self) -> "ProbeTask":
        """Return a part of the task, to warm up on."""

    @abstractmethod
    def differences(self, answers: Mapping[str, Any]) -> dict[str, float]:
        """Return how far each side's answer is off, for those that can be compared."""

    def remarks(self, answers: Mapping[str, Any]) -> Sequence[str]:
        """Return what the answers say, a line each."""
        del answers
        return ()

    def doubts(self, answers: Mapping[str, Any]) -> Sequence[str]:
        """Return why the answers prove nothing, a sentence each."""
        del answers
        return ()


# ------------------------------------------------------------------------------------------------------------- probes


@dataclass(frozen=True, eq=False)
class Fits:
    """Weights (label, unit) and intercepts (label) of fitted probes, in the order of the task's problems."""

    solutions: tuple[tuple[np.ndarray, np.ndarray], ...]


@dataclass(frozen=True, eq=False)
class Problem:
    """A multinomial logistic regression with an elastic net, of three labels or more.

    The objective is that of `synapse.probe.solver`, with example n standing `counts[n]` times; no weights have one
    below `floor`, as a duality gap proves.
    """

    x: np.ndarray
    targets: np.ndarray
    n_labels: int
    penalty: float
    l1_ratio: float
    counts: np.ndarray | None = None
    floor: float = -np.inf

    def excess(self, weights: np.ndarray, intercept: np.ndarray) -> float:
        """Return how far weights are above the floor, in nats."""
        size = self.l1_ratio * np.abs(weights).sum() + (1 - self.l1_ratio) / 2 * np.square(weights).sum()
        loss = cross_entropy(self.x, self.targets, weights, intercept, self.counts)
        return float(loss + self.penalty * size - self.floor)


@dataclass(frozen=True, eq=False)
class FitTask(ProbeTask):
    """Problems to be solved, in chains: in each, a problem may start from the solution of the one before it.

    The first of a chain starts from `start`, or from 0. A side that takes on only some of the chains takes the first.
    """

    chains: tuple[tuple[Problem, ...], ...]
    start: Solution | None = None

    def small(self) -> "FitTask":
        """Return the first problem."""
        return replace(self, chains=(self.chains[0][:1],))

    @property
    def problems(self) -> list[Problem]:
        """All problems in order."""
        return [problem for chain in self.chains for problem in chain]

    def differences(self, answers: Mapping[str, Fits]) -> dict[str, float]:
        """Return how far the worst of each side's objectives is above what is certified to be the least."""
        return {
            name: max(p.excess(*solution) for p, solution in zip(self.problems, answer.solutions, strict=False))
            for name, answer in answers.items()
        }


@dataclass(frozen=True, eq=False)
class LossTask(ProbeTask):
    """States of layers, in float32: the mean cross-entropy of a probe on each is to come down to a peer's."""

    states: np.ndarray
    targets: np.ndarray
    n_labels: int
    reference: str

    def small(self) -> "LossTask":
        """Return the first layer."""
        return replace(self, states=self.states[:1])

    def losses(self, answer: Fits) -> list[float]:
        """Return the mean cross-entropy of each layer."""
        return [
            cross_entropy(x.astype(np.float64), self.targets, *solution)
            for x, solution in zip(self.states, answer.solutions, strict=True)
        ]

    def differences(self, answers: Mapping[str, Fits]) -> dict[str, float]:
        """Return by how much our cross-entropy is above the peer's, in the worst layer."""
        if not {OURS, self.reference} <= answers.keys():
            return {}
        ours, theirs = self.losses(answers[OURS]), self.losses(answers[self.reference])
        return {OURS: max(0.0, *(a - b for a, b in zip(ours, theirs, strict=True)))}

    def remarks(self, answers: Mapping[str, Fits]) -> Sequence[str]:
        """Return the cross-entropies."""
        return [
            f"cross-entropy of {name} in nats, by layer: {', '.join(f'{loss:.3f}' for loss in self.losses(answer))}"
            for name, answer in answers.items()
        ]


def cross_entropy(
    x: np.ndarray, targets: np.ndarray, weights: np.ndarray, intercept: np.ndarray, counts: np.ndarray | None = None
) -> float:
    """Return the mean of -log p(target) in nats."""
    logits = x @ weights.T + intercept
    losses = logsumexp(logits, axis=1) - logits[np.arange(len(x)), targets]
    return float(np.average(losses, weights=counts))


# ------------------------------------------------------------------------------------------------------ Gaussian probe


@dataclass(frozen=True, eq=False)
class Selected:
    """Units in the order in which they were taken, and the mutual information after each, in bits."""

    units: tuple[int, ...]
    information: np.ndarray


@dataclass(frozen=True, eq=False)
class GaussianTask(ProbeTask):
    """Units to be taken one after another by the held-out mutual information of a Gaussian classifier."""

    values: np.ndarray
    targets: np.ndarray
    dimensions: int
    held_out: np.ndarray

    def small(self) -> "GaussianTask":
        """Return the choice of two units."""
        return replace(self, dimensions=2, values=self.values[:, :16])

    def differences(self, answers: Mapping[str, Selected]) -> dict[str, float]:
        """Return how far the information is from that of the first peer; infinitely far where the units differ."""
        peers = [answer for name, answer in answers.items() if name != OURS]
        return {
            name: float(np.abs(answer.information - peers[0].information).max())
            if answer.units == peers[0].units
            else float("inf")
            for name, answer in answers.items()
            if peers and answer is not peers[0]
        }

    def remarks(self, answers: Mapping[str, Selected]) -> Sequence[str]:
        """Return the units taken first."""
        first = {answer.units[:8] for answer in answers.values()}
        return [f"taken first: units {', '.join(map(str, units))}" for units in sorted(first)]


# -------------------------------------------------------------------------------------------------------- causal effect


@dataclass(frozen=True, eq=False)
class Effects:
    """Mean losses of margin (layer, ranking, unit): over all examples, then over those of each class."""

    scores: np.ndarray


@dataclass(frozen=True, eq=False)
class EffectTask(ProbeTask):
    """What the margin of an example's own class loses when a neuron is set to zero, for every neuron of some layers."""

    classifier: syn.Classifier
    examples: syn.Examples
    activations: Activations
    layers: tuple[int, ...]

    def small(self) -> "EffectTask":
        """Return two examples."""
        examples = self.examples.take(np.arange(2))
        return replace(self, examples=examples, activations=syn.record(self.classifier, examples))

    def differences(self, answers: Mapping[str, Effects]) -> dict[str, float]:
        """Return how far our scores are from the peers', in logits."""
        peers = [answer for name, answer in answers.items() if name != OURS]
        if OURS not in answers or not peers:
            return {}
        return {OURS: max(float(np.abs(answers[OURS].scores - peer.scores).max()) for peer in peers)}

    def remarks(self, answers: Mapping[str, Effects]) -> Sequence[str]:
        """Return the largest effect."""
        return [f"largest effect of a neuron, by {name}: {_largest(answer):.3f}" for name, answer in answers.items()]

    def doubts(self, answers: Mapping[str, Effects]) -> Sequence[str]:
        """Refuse effects that are all close to nothing."""
        return [
            f"no neuron moves a margin by more than {_largest(answer):.1e}, so that one left out would not show"
            for answer in answers.values()
            if _largest(answer) < LEAST_EFFECT
        ]


def _largest(answer: Effects) -> float:
    return float(np.abs(answer.scores).max())
