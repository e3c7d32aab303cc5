"""Rankings by statistics of the activations, without a probe."""

from dataclasses import dataclass

import numpy as np

from synapse.ranking.base import Evidence, RankingMethod, Scores, of_present, with_global


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

    def scores(self, evidence: Evidence) -> Scores:
        """Return the differences of class means."""
        values, targets = evidence.activations.values, evidence.activations.targets
        means = np.stack([values[:, targets == c].mean(axis=1) for c in evidence.present], axis=1)
        # (layer, label, 1, unit) - (layer, 1, label, unit) -> sum over the other label
        pairs = np.abs(means[:, :, None] - means[:, None]).sum(axis=2)
        by_class = of_present(evidence, list(pairs.swapaxes(0, 1)))
        return Scores(with_global(by_class, pairs.sum(axis=1) / 2))  # every pair was counted twice


@dataclass(frozen=True)
class RandomOrder(RankingMethod):
    """A random order: what every other method is judged against."""

    seed: int = 0

    @property
    def name(self) -> str:
        """The method's name in tables."""
        return "random"

    def scores(self, evidence: Evidence) -> Scores:
        """Return uniform scores in [0, 1)."""
        shape = (evidence.activations.n_layers, evidence.n_rankings, evidence.activations.width)
        return Scores(np.random.default_rng(self.seed).random(shape))
