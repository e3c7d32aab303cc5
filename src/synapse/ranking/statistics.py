"""Rankings by statistics of the activations, without a probe."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from synapse.probe.probe import Probes
from synapse.ranking.base import RankingMethod
from synapse.types import Activations


@dataclass(frozen=True)
class Probeless(RankingMethod):
    """Sum of the absolute differences between class means.

    Class: s_c(j) = sum_c' |mu_c(j) - mu_c'(j)|; global: the sum over all pairs of classes.
    Source: Antverg and Belinkov (2022), arXiv 2110.07483, section 3.
    """

    @property
    def name(self) -> str:
        """The method's name in tables."""
        return "probeless"

    def scores(self, activations: Activations, probes: Probes) -> Float[np.ndarray, "layer ranking unit"]:
        """Return the differences of class means, global first; a class without training examples scores 0."""
        present = [c for c in range(len(activations.labels)) if (activations.targets == c).any()]
        means = np.stack([activations.values[:, activations.targets == c].mean(axis=1) for c in present], axis=1)
        # (layer, label, 1, unit) - (layer, 1, label, unit) -> sum over the other label
        pairs = np.abs(means[:, :, None] - means[:, None]).sum(axis=2)
        scores = np.zeros((activations.n_layers, 1 + len(activations.labels), activations.width))
        scores[:, [1 + c for c in present]] = pairs
        scores[:, 0] = pairs.sum(axis=1) / 2  # every pair was counted twice
        return scores


@dataclass(frozen=True)
class RandomOrder(RankingMethod):
    """A random order: what every other method is judged against."""

    seed: int = 0

    @property
    def name(self) -> str:
        """The method's name in tables."""
        return "random"

    def scores(self, activations: Activations, probes: Probes) -> Float[np.ndarray, "layer ranking unit"]:
        """Return uniform scores in [0, 1)."""
        shape = (activations.n_layers, 1 + len(activations.labels), activations.width)
        return np.random.default_rng(self.seed).random(shape)
