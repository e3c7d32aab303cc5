"""Rankings by what a neuron alone tells of the class: information, thresholds and the order of the examples.

Units with equal values for all examples get equal scores, and what a method says of ties is part of its definition:
activations after a rectifier, or of few distinct inputs, have many.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.special import rel_entr
from sklearn.feature_selection import mutual_info_classif

from synapse.errors import SettingsError
from synapse.ranking.base import Evidence, RankingMethod, Scores, of_present, with_global
from synapse.ranking.statistics import against_rest


@dataclass(frozen=True)
class MutualInformation(RankingMethod):
    """Mutual information of a neuron, cut into bins of equal frequency, and the class, in nats.

    Global: I(x; y); class: I(x; 1[y = c]). From the share of examples in bin b and class y, sum p_by log(p_by / p_b
    p_y), less its bias (B - 1)(C - 1) / 2N, where B bins and C classes have an example: an estimate can be below 0.
    Equal values share a bin, so a neuron with many of them has fewer bins.
    Source: Miller (1955), "Note on the bias of information estimates".
    """

    bins: int = 10

    @property
    def name(self) -> str:
        """The method's name in tables."""
        return "mutual-information" if self.bins == MutualInformation.bins else f"mutual-information-{self.bins}-bins"

    def scores(self, evidence: Evidence) -> Scores:
        """Return the estimates.

        Raises:
            SettingsError: fewer than two bins.
        """
        if self.bins < 2:
            raise SettingsError(
                f"{self.bins} bins were asked for; give 2 or more, for example {MutualInformation.bins}."
            )
        activations, present = evidence.activations, evidence.present
        classes = np.searchsorted(present, activations.targets)
        overall, by_class = [], []
        for values in activations.values:
            counts = self._counts(values, classes, len(present))
            overall.append(_information(counts))
            rest = counts.sum(axis=2, keepdims=True) - counts
            by_class.append(
                [_information(np.stack([counts[..., c], rest[..., c]], axis=2)) for c in range(len(present))]
            )
        rows = list(np.array(by_class).swapaxes(0, 1))
        return Scores(with_global(of_present(evidence, rows), np.array(overall)))

    def _counts(
        self, values: Float[np.ndarray, "example unit"], classes: Int[np.ndarray, "example"], n_classes: int
    ) -> Int[np.ndarray, "unit bin label"]:
        """Return how many examples of each class each bin of each unit holds."""
        found = Ordered.of(values)
        n_units, n = found.order.shape
        bins = found.smaller * self.bins // n
        cells = (np.arange(n_units)[:, None] * self.bins + bins) * n_classes + classes[found.order]
        counts = np.bincount(cells.ravel(), minlength=n_units * self.bins * n_classes)
        return counts.reshape(n_units, self.bins, n_classes)


def _information(counts: Int[np.ndarray, "unit bin label"]) -> Float[np.ndarray, "unit"]:
    """Return the mutual information of each unit's table of counts, in nats, less its bias."""
    of_bins, of_labels, n = counts.sum(axis=2), counts.sum(axis=1), counts[0].sum()
    expected = of_bins[:, :, None] * of_labels[:, None] / n
    bias = ((of_bins > 0).sum(axis=1) - 1) * ((of_labels > 0).sum(axis=1) - 1) / (2 * n)
    return np.asarray(rel_entr(counts, expected).sum(axis=(1, 2)) / n - bias)


@dataclass(frozen=True)
class NeighbourInformation(RankingMethod):
    """Mutual information of a neuron and the class by its nearest neighbours, in nats: no bins, at a price.

    Global: I(x; y); class: I(x; 1[y = c]). The estimate compares how far the nearest examples of the own class are
    with how many examples of any class are as near; scikit-learn's `mutual_info_classif` makes it. An estimate below 0
    is given as 0, examples that are alone in their class are left out, and constant neurons score 0.
    Source: Ross (2014), "Mutual information between discrete and continuous data sets", PLoS ONE 9(2).

    It costs a tree and two searches for every neuron, class and layer: minutes where the other estimate takes seconds.
    """

    neighbours: int = 3
    seed: int = 0
    """Equal values are told apart by tiny noise drawn from this seed."""

    @property
    def name(self) -> str:
        """The method's name in tables."""
        default = self.neighbours == NeighbourInformation.neighbours
        return "mutual-information-knn" if default else f"mutual-information-{self.neighbours}nn"

    def scores(self, evidence: Evidence) -> Scores:
        """Return the estimates.

        Raises:
            SettingsError: fewer than one neighbour.
        """
        if self.neighbours < 1:
            raise SettingsError(f"{self.neighbours} neighbours were asked for; give 1 or more, for example 3.")
        activations, targets = evidence.activations, evidence.activations.targets
        overall = np.stack([self._information(values, targets) for values in activations.values])
        by_class = [
            np.stack([self._information(values, targets == c) for values in activations.values])
            for c in evidence.present
        ]
        return Scores(with_global(of_present(evidence, by_class), overall))

    def _information(
        self,
        values: Float[np.ndarray, "example unit"],
        groups: Int[np.ndarray, "example"] | Bool[np.ndarray, "example"],
    ) -> Float[np.ndarray, "unit"]:
        """Return the estimate for each unit of a layer."""
        # The noise would tell equal neurons apart: each is looked at once.
        _, first, same = np.unique(values, axis=1, return_index=True, return_inverse=True)
        varying = np.sort(first[np.ptp(values[:, first], axis=0) > 0])
        _, members, sizes = np.unique(groups, return_inverse=True, return_counts=True)
        found = np.zeros(values.shape[1])
        if (sizes > 1).sum() > 1 and len(varying):
            kept = sizes[members] > 1
            found[varying] = mutual_info_classif(
                values[np.ix_(kept, varying)],
                groups[kept],
                discrete_features=False,
                n_neighbors=self.neighbours,
                random_state=self.seed,
            )
        return np.asarray(found[first[same]])


@dataclass(frozen=True)
class AveragePrecision(RankingMethod):
    """Average precision of a neuron as a detector of the class, of its high values or of its low ones.

    AP = sum_k (R_k - R_(k-1)) P_k over all thresholds, with precision P and recall R of {x >= threshold}; the score is
    max(AP(x), AP(-x)), in (0, 1], and its sign is minus where the low values are the better detector. A neuron that
    tells nothing scores about the share of the class. Equal values are one threshold. Global is the mean over the
    classes. Source: Suau, Zappella and Apostoloff (2022), "Self-conditioning pre-trained language models", ICML,
    arXiv 2110.02802.
    """

    @property
    def name(self) -> str:
        """The method's name in tables."""
        return "average-precision"

    def scores(self, evidence: Evidence) -> Scores:
        """Return the average precisions."""
        return _by_order(evidence, _average_precision)


@dataclass(frozen=True)
class RocAuc(RankingMethod):
    """How far the area under a neuron's ROC curve is from chance, |AUC - 1/2|, in [0, 1/2].

    AUC is the probability that the neuron is higher for an example of the class than for one of another class, equal
    values counting half; the sign is that of AUC - 1/2. It does not depend on the shares of the classes. Global is
    the mean over the classes. Source: Hanley and McNeil (1982), Radiology 143, from the Mann-Whitney rank sum.
    """

    @property
    def name(self) -> str:
        """The method's name in tables."""
        return "roc-auc"

    def scores(self, evidence: Evidence) -> Scores:
        """Return the distances from chance."""
        return _by_order(evidence, _auc_above_chance)


@dataclass(frozen=True)
class IntersectionOverUnion(RankingMethod):
    """Overlap of the examples on which a neuron is high with those of the class, in [0, 1].

    A neuron is high where x >= T, T being its `quantile` over the examples; the score is |high and class| / |high or
    class|. Global is the mean over the classes. Only high values count: a neuron that is low for a class, and only for
    it, scores 0. One that is at its lowest value for more than that share of examples is high on none: it would be on
    all of them, which tells nothing.
    Source: Bau et al. (2017), "Network dissection", CVPR; Mu and Andreas (2020), NeurIPS, arXiv 2006.14032.
    The published quantile of 0.995 is one over pixels, of which an image has thousands.
    """

    quantile: float = 0.9

    @property
    def name(self) -> str:
        """The method's name in tables."""
        return "iou" if self.quantile == IntersectionOverUnion.quantile else f"iou-{self.quantile:g}"

    def scores(self, evidence: Evidence) -> Scores:
        """Return the overlaps.

        Raises:
            SettingsError: a quantile outside (0, 1).
        """
        if not 0 < self.quantile < 1:
            raise SettingsError(f"The quantile is {self.quantile}; give a number between 0 and 1, for example 0.9.")
        activations = evidence.activations
        rows = []
        for layer, values in enumerate(activations.values):
            threshold = activations.quantiles(layer, (self.quantile,))[0]
            high = (values >= threshold) & (threshold > values.min(axis=0))
            shared = np.stack([high[activations.targets == c].sum(axis=0) for c in evidence.present])
            sizes = np.bincount(activations.targets)[evidence.present][:, None]
            rows.append(shared / (high.sum(axis=0) + sizes - shared))
        return Scores(against_rest(evidence, np.stack(rows)).values)


@dataclass(frozen=True, eq=False)
class Ordered:
    """The examples in ascending order of each unit's value: one sort, from which every threshold can be read.

    `smaller` and `up_to` say of each place in the order how many examples have a smaller value, and how many a smaller
    or the same.
    """

    order: Int[np.ndarray, "unit example"]
    smaller: Int[np.ndarray, "unit example"]
    up_to: Int[np.ndarray, "unit example"]

    @classmethod
    def of(cls, values: Float[np.ndarray, "example unit"]) -> "Ordered":
        """Return the order of a layer's examples."""
        by_unit = np.ascontiguousarray(values.T)
        order = by_unit.argsort(axis=1)
        ascending = np.take_along_axis(by_unit, order, axis=1)
        rises = ascending[:, 1:] != ascending[:, :-1]
        edge, places = np.ones((len(rises), 1), dtype=bool), np.arange(len(values))
        begins, ends = np.hstack([edge, rises]), np.hstack([rises, edge])
        smaller = np.maximum.accumulate(np.where(begins, places, 0), axis=1)
        up_to = np.minimum.accumulate(np.where(ends, places + 1, len(values))[:, ::-1], axis=1)[:, ::-1]
        return cls(order, smaller, up_to)


def _by_order(
    evidence: Evidence, score: Callable[[Ordered, Bool[np.ndarray, "unit example"]], Float[np.ndarray, "unit"]]
) -> Scores:
    """Return the signed scores of a function of the order and of which places belong to the class."""
    rows = []
    for values in evidence.activations.values:
        found = Ordered.of(values)
        classes = evidence.activations.targets[found.order]
        rows.append([score(found, classes == c) for c in evidence.present])
    return against_rest(evidence, np.array(rows))


def _average_precision(found: Ordered, member: Bool[np.ndarray, "unit example"]) -> Float[np.ndarray, "unit"]:
    """Return the average precision of the high values, or minus that of the low ones where it is larger."""
    n, members = member.shape[1], member[0].sum()
    hits = member.cumsum(axis=1)
    hits_up_to = np.take_along_axis(hits, found.up_to - 1, axis=1)
    hits_from = members - np.take_along_axis(hits - member, found.smaller, axis=1)
    # Recall rises by 1 / members at every member, to which the precision of its threshold belongs.
    low = np.where(member, hits_up_to / found.up_to, 0.0).sum(axis=1) / members
    high = np.where(member, hits_from / (n - found.smaller), 0.0).sum(axis=1) / members
    return np.asarray(np.where(high >= low, high, -low))


def _auc_above_chance(found: Ordered, member: Bool[np.ndarray, "unit example"]) -> Float[np.ndarray, "unit"]:
    """Return AUC - 1/2, by the sum of the ranks of the members; equal values share their mean rank."""
    n, members = member.shape[1], int(member[0].sum())
    ranks = np.where(member, (found.smaller + found.up_to + 1) / 2, 0.0).sum(axis=1)
    pairs_won = ranks - members * (members + 1) / 2
    return np.asarray(pairs_won / max(members * (n - members), 1) - 0.5)
