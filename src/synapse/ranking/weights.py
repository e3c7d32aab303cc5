"""Rankings by the weights of the linear probe."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from jaxtyping import Float, Int

from synapse.errors import SettingsError
from synapse.probe.probe import Probes
from synapse.ranking.base import Evidence, Need, RankingMethod, Scores, for_every_class, with_global


@dataclass(frozen=True)
class LinearWeight(RankingMethod):
    """Absolute weight of the probe on standardised inputs; global is the mean or the maximum over the classes.

    Source: Antverg and Belinkov (2022), arXiv 2110.07483. On standardised inputs |w| is the raw weight times the
    neuron's deviation, so that columns of unequal scale compare. The penalty leaves no freedom to shift the weights
    of all classes alike, which the softmax does not see.
    """

    over_classes: Literal["mean", "max"] = "mean"

    needs: ClassVar[tuple[Need, ...]] = ("probes",)

    @property
    def name(self) -> str:
        """The method's name in tables."""
        return "linear" if self.over_classes == "mean" else "linear-max"

    def scores(self, evidence: Evidence) -> Scores:
        """Return |w| of each class, and their mean or maximum; a class's w has a sign, the global number has none."""
        weights = evidence.probe_weights
        magnitudes = np.abs(weights)
        overall = magnitudes.mean(axis=1) if self.over_classes == "mean" else magnitudes.max(axis=1)
        return Scores(with_global(magnitudes, overall), with_global(weights, overall))


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

    def blocks(self, probes: Probes, steps: int = 100) -> Int[np.ndarray, "layer unit"]:
        """Return the block of the published search that each neuron enters with, in [0, `steps`].

        The search covers the shares p = 0, 1 / steps, ..., 1 of the mass, and adds at each the neurons that the
        smallest prefix of some class's order needs; at p = 0 that is each class's first neuron. So a neuron enters
        with block floor(min_c e_c(j) * steps) + 1, or 0 where it is a class's first; neurons without weight enter
        last. The order of the scores never contradicts that of the blocks.

        Raises:
            SettingsError: fewer than one step.
        """
        if steps < 1:
            raise SettingsError(f"The share of the mass was to grow in {steps} steps; give 1 or more, for example 100.")
        before, _ = _mass_before(np.abs(np.stack([probe.weights for probe in probes.probes])))
        least = before.min(axis=1)
        return np.where(least == 0, 0, np.minimum(np.floor(least * steps).astype(np.int64) + 1, steps))


@dataclass(frozen=True)
class HardThreshold(RankingMethod):
    """The neurons whose |w| is above a share of the largest of their class: {j: |w_cj| > max_j |w_cj| / fraction}.

    The score of a chosen neuron is |w| over the largest of its class, in (1 / fraction, 1]; globally, where the chosen
    are those of any class, the maximum of these over the classes. The rule says nothing of the neurons it leaves out:
    they score less than 1e-9, in the order of the same number, so that a longer list goes on where the set ends.
    Source: Dalvi, Sajjad and Durrani (2023), "NeuroX library for neuron analysis of deep NLP models", ACL.
    """

    fraction: float = 2.0

    needs: ClassVar[tuple[Need, ...]] = ("probes",)

    @property
    def name(self) -> str:
        """The method's name in tables."""
        default = self.fraction == HardThreshold.fraction
        return "hard-threshold" if default else f"hard-threshold-{self.fraction:g}"

    def scores(self, evidence: Evidence) -> Scores:
        """Return the shares of the largest weight.

        Raises:
            SettingsError: a fraction of 1 or below, above which no neuron stands.
        """
        if not self.fraction > 1:
            raise SettingsError(
                f"The fraction is {self.fraction}, so no weight is above the largest one over it; give a number above "
                "1, for example 2."
            )
        weights = np.abs(evidence.probe_weights)
        largest = weights.max(axis=2, keepdims=True)
        shares = np.divide(weights, largest, out=np.zeros_like(weights), where=largest > 0)
        # Far below any chosen neuron; it only decides between those that are not chosen.
        scores = np.where(shares > 1 / self.fraction, shares, 1e-9 * shares)
        return Scores(with_global(scores, scores.max(axis=1)))


@dataclass(frozen=True)
class HeadWeight(RankingMethod):
    """Norm of a neuron's weights in the final linear map, the same for every class: it has seen no example.

    Score: ||W_:j||_2 over the labels. It reads a neuron as if the head took it as it stands, so it is only there where
    the component is as wide as what the head reads.
    """

    needs: ClassVar[tuple[Need, ...]] = ("classifier",)

    @property
    def name(self) -> str:
        """The method's name in tables."""
        return "head-weight"

    def scores(self, evidence: Evidence) -> Scores:
        """Return the norms.

        Raises:
            SettingsError: the head does not end in a linear map, or it reads another width than the component's.
        """
        classifier, _ = evidence.model
        activations, weight = evidence.activations, classifier.head_weight().double().cpu().numpy()
        if weight.shape[1] != activations.width:
            raise SettingsError(
                f"The component {activations.component!r} has {activations.width} units and the head reads "
                f"{weight.shape[1]}, so no weight of the head belongs to a unit; use a component of that width, or "
                "another method."
            )
        return for_every_class(evidence, np.tile(np.linalg.norm(weight, axis=0), (activations.n_layers, 1)))


def _mass_before(
    weights: Float[np.ndarray, "layer label unit"],
) -> tuple[Float[np.ndarray, "layer label unit"], Float[np.ndarray, "layer label unit"]]:
    """Return the share of a class's weight mass that stands strictly before each neuron, and the neuron's own share."""
    total = weights.sum(axis=2, keepdims=True)
    share = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
    # Weights that agree to a billionth of the mass are ties: a solver does not tell equal neurons apart by more.
    order = np.argsort(-np.round(share, 9), axis=2, kind="stable")
    ordered = np.take_along_axis(share, order, axis=2)
    before = np.empty_like(share)
    np.put_along_axis(before, order, np.cumsum(ordered, axis=2) - ordered, axis=2)
    # A neuron without weight is needed by no class: it enters when all mass is covered, whatever was rounded.
    return np.where(share > 0, np.clip(before, 0, 1), 1.0), share
