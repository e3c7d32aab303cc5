"""Rankings by statistics of the activations, without a probe."""

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int

from synapse.errors import SettingsError
from synapse.ranking.base import Evidence, RankingMethod, Scores, for_every_class, of_present, with_global

LARGEST = float(np.finfo(np.float32).max)
"""What stands for an infinite score, as where classes differ and no class has any spread: scores are finite."""


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
        means = ClassMoments.of(evidence).means
        by_class = [np.abs(means - means[:, [c]]).sum(axis=1) for c in range(means.shape[1])]
        # every pair was counted twice
        return Scores(with_global(of_present(evidence, by_class), np.sum(by_class, axis=0) / 2))


@dataclass(frozen=True)
class MeanDifference(RankingMethod):
    """Difference between the mean of a class and that of all other examples, |mu_c - mu_rest|, in raw units.

    The sign says whether the neuron is higher for the class; global is the mean of the magnitudes over the classes.
    Source: Gurnee et al. (2023), arXiv 2305.01610.
    """

    @property
    def name(self) -> str:
        """The method's name in tables."""
        return "mean-difference"

    def scores(self, evidence: Evidence) -> Scores:
        """Return the differences of means."""
        found = ClassMoments.of(evidence)
        return against_rest(evidence, found.means - found.rest_means)


@dataclass(frozen=True)
class CohenD(RankingMethod):
    """Difference between the mean of a class and that of all other examples, in units of their pooled deviation.

    d_c = (mu_c - mu_rest) / s with s^2 = (SS_c + SS_rest) / (N - 2), SS being the sum of squared distances from the
    mean of that side. The sign says whether the neuron is higher for the class; global is the mean of the magnitudes
    over the classes. Source: Cohen (1988), Statistical Power Analysis for the Behavioral Sciences, chapter 2.

    A neuron that tells a class apart and has no spread on either side has an infinite d, for which `LARGEST` stands.
    """

    @property
    def name(self) -> str:
        """The method's name in tables."""
        return "cohen-d"

    def scores(self, evidence: Evidence) -> Scores:
        """Return the standardised differences of means."""
        found = ClassMoments.of(evidence)
        return against_rest(evidence, quotient(found.means - found.rest_means, np.sqrt(found.variances_against_rest)))


@dataclass(frozen=True)
class AnovaF(RankingMethod):
    """The F statistic: variance between classes over variance within them.

    Global: [sum_c N_c (mu_c - mu)^2 / (C - 1)] / [sum_c SS_c / (N - C)] over the C classes that have an example.
    Class: the same for the two groups of the class and all other examples, which is the square of their t statistic.
    Source: Fisher (1925), Statistical Methods for Research Workers, chapter 7.

    A neuron that differs between classes and has no spread within any has an infinite F, for which `LARGEST` stands.
    """

    @property
    def name(self) -> str:
        """The method's name in tables."""
        return "anova-f"

    def scores(self, evidence: Evidence) -> Scores:
        """Return the F statistics."""
        found = ClassMoments.of(evidence)
        counts, n, n_classes = found.counts, found.n, len(found.counts)
        mean = (counts * found.means).sum(axis=1, keepdims=True) / n
        between = (counts * (found.means - mean) ** 2).sum(axis=1) / max(n_classes - 1, 1)
        within = found.squares.sum(axis=1) / max(n - n_classes, 1)
        apart = counts * (n - counts) / n * (found.means - found.rest_means) ** 2
        by_class = against_rest(evidence, quotient(apart, found.variances_against_rest)).values[:, 1:]
        return Scores(with_global(by_class, quotient(between, within)))


@dataclass(frozen=True)
class ClassSelectivity(RankingMethod):
    """How much more a neuron is active for a class than for the others, as a share of both.

    Class: (mu_c - mu_rest) / (mu_c + mu_rest) in [-1, 1], mu_rest being the mean over the means of the other classes;
    a neuron that is silent for a class alone is its last. Global: the index of the class with the highest mean, in
    [0, 1]. Source: Morcos et al. (2018), "On the importance of single directions for generalization", ICLR.

    The index means nothing where activations can be negative; `absolute` reads their magnitudes instead.
    """

    absolute: bool = False

    @property
    def name(self) -> str:
        """The method's name in tables."""
        return "class-selectivity-absolute" if self.absolute else "class-selectivity"

    def scores(self, evidence: Evidence) -> Scores:
        """Return the indices.

        Raises:
            SettingsError: an activation is negative, and `absolute` is not set.
        """
        activations = evidence.activations
        if self.absolute:
            evidence = replace(
                evidence, activations=replace(activations, values=np.abs(np.asarray(activations.values)))
            )
        elif (lowest := min(float(values.min()) for values in activations.values)) < 0:
            raise SettingsError(
                f"An activation of the component {activations.component!r} is {lowest:.3g}, and class selectivity is "
                "only defined where none is negative; use ClassSelectivity(absolute=True), which reads magnitudes, or "
                "another method."
            )
        means = ClassMoments.of(evidence).means
        others = (means.sum(axis=1, keepdims=True) - means) / max(means.shape[1] - 1, 1)
        index = quotient(means - others, means + others)
        if len(evidence.present) == 1:
            index = np.zeros_like(index)
        highest = np.take_along_axis(index, means.argmax(axis=1)[:, None], axis=1)[:, 0]
        return Scores(with_global(of_present(evidence, list(index.swapaxes(0, 1))), highest))


@dataclass(frozen=True)
class Variance(RankingMethod):
    """Variance of a neuron over the examples, the same for every class: it knows no labels, so others must beat it."""

    @property
    def name(self) -> str:
        """The method's name in tables."""
        return "variance"

    def scores(self, evidence: Evidence) -> Scores:
        """Return the variances, in squared raw units."""
        values = evidence.activations.values
        return for_every_class(evidence, np.stack([layer.var(axis=0, dtype=np.float64) for layer in values]))


@dataclass(frozen=True)
class MeanMagnitude(RankingMethod):
    """|mean| of a neuron over the examples, the same for every class: it knows no labels, so others must beat it."""

    @property
    def name(self) -> str:
        """The method's name in tables."""
        return "mean-magnitude"

    def scores(self, evidence: Evidence) -> Scores:
        """Return the magnitudes of the means, in raw units."""
        values = evidence.activations.values
        return for_every_class(evidence, np.abs(np.stack([layer.mean(axis=0, dtype=np.float64) for layer in values])))


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


@dataclass(frozen=True, eq=False)
class ClassMoments:
    """Counts, means and sums of squared distances from the mean, of each class that has an example, in float64."""

    counts: Int[np.ndarray, "label 1"]
    means: Float[np.ndarray, "layer label unit"]
    squares: Float[np.ndarray, "layer label unit"]

    @classmethod
    def of(cls, evidence: Evidence) -> "ClassMoments":
        """Return the moments of the recorded activations."""
        activations, present = evidence.activations, evidence.present
        counts = np.bincount(activations.targets)[present][:, None]
        shape = (activations.n_layers, len(present), activations.width)
        means, squares = np.empty(shape), np.empty(shape)
        for layer, values in enumerate(activations.values):
            for row, label in enumerate(present):
                # A sum of equal float32 values is exact in float64: a constant unit has a sum of squares of 0.
                own = values[activations.targets == label].astype(np.float64)
                means[layer, row] = own.mean(axis=0)
                squares[layer, row] = np.square(own - means[layer, row]).sum(axis=0)
        return cls(counts, means, squares)

    @property
    def n(self) -> int:
        """Number of examples."""
        return int(self.counts.sum())

    @property
    def rest_means(self) -> Float[np.ndarray, "layer label unit"]:
        """For each class, the mean of all examples of the others; 0 where there are none."""
        sums = self.counts * self.means
        return np.asarray((sums.sum(axis=1, keepdims=True) - sums) / np.maximum(self.n - self.counts, 1))

    @property
    def variances_against_rest(self) -> Float[np.ndarray, "layer label unit"]:
        """For each class, the pooled variance of its examples and of all others, with N - 2 degrees of freedom."""
        total, rest_means = self.squares.sum(axis=1, keepdims=True), self.rest_means
        found = np.repeat(total, len(self.counts), axis=1)
        for label in range(len(self.counts)):
            # what the means of the other classes differ by; taken directly, as a difference of sums would cancel
            spread = self.counts * (self.means - rest_means[:, [label]]) ** 2
            found[:, label] += np.delete(spread, label, axis=1).sum(axis=1)
        return found / max(self.n - 2, 1)


def against_rest(evidence: Evidence, by_class: Float[np.ndarray, "layer present unit"]) -> Scores:
    """Return signed scores of every class that has an example against all others, scored by their magnitudes.

    The global score is the mean of the magnitudes over these classes. Where there is only one such class there is
    nothing to tell it from, and all scores are 0.
    """
    if by_class.shape[1] == 1:
        by_class = np.zeros_like(by_class)
    signed = of_present(evidence, list(by_class.swapaxes(0, 1)))
    overall = np.abs(by_class).mean(axis=1)
    return Scores(with_global(np.abs(signed), overall), with_global(signed, overall))


def quotient(over: Float[np.ndarray, "*shape"], under: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Return `over / under`: 0 where both are 0, and never beyond `LARGEST`."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return np.asarray(np.clip(np.nan_to_num(over / under, nan=0.0), -LARGEST, LARGEST))
