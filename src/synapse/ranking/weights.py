"""Rankings by the weights of the linear probe."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float

from synapse.ranking.base import Evidence, Need, RankingMethod, Scores, with_global


@dataclass(frozen=True)
class LinearWeight(RankingMethod):
    """Absolute weight of the probe on standardised inputs; global is the mean over the classes.

    Source: Antverg and Belinkov (2022), arXiv 2110.07483. On standardised inputs |w| is the raw weight times the
    neuron's deviation, so that columns of unequal scale compare. The penalty leaves no freedom to shift the weights
    of all classes alike, which the softmax does not see.
    """

    needs: ClassVar[tuple[Need, ...]] = ("probes",)

    @property
    def name(self) -> str:
        """The method's name in tables."""
        return "linear"

    def scores(self, evidence: Evidence) -> Scores:
        """Return |w| of each class, and their mean; a class's w has a sign, a mean of magnitudes has none."""
        weights = evidence.probe_weights
        overall = np.abs(weights).mean(axis=1)
        return Scores(with_global(np.abs(weights), overall), with_global(weights, overall))


@dataclass(frozen=True)
class CumulativeMass(RankingMethod):
    """The ordering of linguistic correlation analysis: neurons enter as the share of covered weight mass grows.

    For a class, neurons are ordered by |w|. Globally, a neuron enters with the smallest share p of the weight mass at
    which some class needs it: e_c(j) is the mass of class c that stands *strictly before* j, over its total, and the
    order is ascending min_c e_c(j). Source: Dalvi et al. (2019), "What is one grain of sand in the desert?", AAAI 33;
    their search over p in steps gives blocks of neurons, of which this order is the limit of fine steps.

    The score is 1 - e(j), in [0, 1]. Ties (each class's own first neuron) go to the larger share of the mass.
    """

    needs: ClassVar[tuple[Need, ...]] = ("probes",)

    @property
    def name(self) -> str:
        """The method's name in tables."""
        return "cumulative-mass"

    def scores(self, evidence: Evidence) -> Scores:
        """Return 1 - mass before the neuron, for each class, and the largest of these over the classes."""
        before, share = _mass_before(np.abs(evidence.probe_weights))
        # Far below any difference of masses; it only decides between neurons that enter at the same mass.
        overall = 1 - before.min(axis=1) + 1e-9 * share.max(axis=1)
        return Scores(with_global(1 - before, overall))


def _mass_before(
    weights: Float[np.ndarray, "layer label unit"],
) -> tuple[Float[np.ndarray, "layer label unit"], Float[np.ndarray, "layer label unit"]]:
    """Return the share of a class's weight mass that stands strictly before each neuron, and the neuron's own share."""
    total = weights.sum(axis=2, keepdims=True)
    share = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
    order = np.argsort(-share, axis=2, kind="stable")
    ordered = np.take_along_axis(share, order, axis=2)
    before = np.empty_like(share)
    np.put_along_axis(before, order, np.cumsum(ordered, axis=2) - ordered, axis=2)
    # A neuron without weight is needed by no class: it enters when all mass is covered, whatever was rounded.
    return np.where(share > 0, np.clip(before, 0, 1), 1.0), share
