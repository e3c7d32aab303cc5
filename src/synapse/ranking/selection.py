"""Rankings that choose neurons against each other: sparse classifiers, and one neuron for all that say the same."""

import warnings
from dataclasses import dataclass, field

import numpy as np
import sklearn
from jaxtyping import Bool, Float, Int
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.svm import LinearSVC

from synapse.errors import ConvergenceError, SettingsError
from synapse.ranking.base import Evidence, RankingMethod, Scores
from synapse.ranking.statistics import MeanDifference, Probeless, against_rest

# Since scikit-learn 1.8 the share of the l1 part says what the penalty is; before, it was named.
_LASSO = {"l1_ratio": 1.0} if tuple(map(int, sklearn.__version__.split(".")[:2])) >= (1, 8) else {"penalty": "l1"}

MOST_ITERATIONS = 1000
"""Of a solver; the fits here take 10 to 50."""


@dataclass(frozen=True)
class RedundancyFiltered(RankingMethod):
    """Another method's ranking, with one neuron of every group of correlated ones first and the others after them all.

    Groups are the clusters of average linkage on the distance 1 - |correlation|, cut at `threshold`, in each layer by
    itself; a constant neuron is a group of its own. In each ranking the neuron that `method` puts first stands for its
    group and keeps its score; the others come after the last of these, in their own order, and their scores say no
    more than that: they count down from below 0.
    Source: Dalvi et al. (2020), "Analyzing redundancy in pretrained transformer models", EMNLP.
    """

    method: RankingMethod = field(default_factory=Probeless)
    threshold: float = 0.3

    @property
    def name(self) -> str:
        """The method's name in tables."""
        inner = "" if self.method == Probeless() else f"-{self.method.name}"
        cut = "" if self.threshold == RedundancyFiltered.threshold else f"-{self.threshold:g}"
        return f"redundancy-filtered{inner}{cut}"

    def scores(self, evidence: Evidence) -> Scores:
        """Return the scores of the other method, lowered for all but one neuron of a group.

        Raises:
            SettingsError: a threshold outside (0, 1), or the other method was not given what it needs.
        """
        if not 0 < self.threshold < 1:
            raise SettingsError(
                f"The threshold of the clusters is {self.threshold}; give a distance between 0 and 1, for example 0.3."
            )
        ranking = self.method.rank(evidence)
        scores = ranking.scores.copy()
        rows = [0, *(1 + c for c in evidence.present)]
        for layer, values in enumerate(evidence.activations.values):
            clusters = correlation_clusters(values, self.threshold)
            for row in rows:
                order = np.argsort(-scores[layer, row], kind="stable")
                _, representatives = np.unique(clusters[order], return_index=True)
                others = np.delete(order, representatives)
                below = min(float(scores[layer, row].min()), 0.0)
                scores[layer, row, others] = below - 1 - np.arange(len(others))
        return Scores(scores, ranking.signed)


def correlation_clusters(values: Float[np.ndarray, "example unit"], threshold: float) -> Int[np.ndarray, "unit"]:
    """Return a cluster number for every unit: average linkage on 1 - |correlation|, cut at a threshold below 1."""
    if values.shape[1] == 1:
        return np.zeros(1, dtype=np.int64)
    z = standardised(values)
    distances = np.clip(1 - np.abs(z.T @ z) / len(z), 0, 1)
    np.fill_diagonal(distances, 0)
    # A constant unit is 0 here, at distance 1 from every other and so from every cluster.
    tree = linkage(squareform(distances, checks=False), method="average")
    return np.asarray(fcluster(tree, threshold, criterion="distance"), dtype=np.int64)


@dataclass(frozen=True)
class L1Weight(RankingMethod):
    """Weight in a logistic regression of the class against all others with an l1 penalty, on standardised inputs.

    It minimises `inverse_penalty` * sum_n weight_n log(1 + exp(-y_n f(x_n))) + |w|_1, the examples of both sides
    weighing N / 2 in all; most weights are 0. The score is |w|; global is the mean over the classes.
    Source: Gurnee et al. (2023), arXiv 2305.01610; solver: liblinear (Fan et al., JMLR 9, 2008), which penalises the
    intercept too, here a hundredth as much as a weight.
    """

    inverse_penalty: float = 0.1

    @property
    def name(self) -> str:
        """The method's name in tables."""
        return "l1" if self.inverse_penalty == L1Weight.inverse_penalty else f"l1-{self.inverse_penalty:g}"

    def scores(self, evidence: Evidence) -> Scores:
        """Return the weights.

        Raises:
            SettingsError: an inverse penalty of 0 or below.
            ConvergenceError: a fit did not reach its optimum.
        """
        _check_positive("inverse_penalty", self.inverse_penalty)
        model = LogisticRegression(
            C=self.inverse_penalty,
            solver="liblinear",
            intercept_scaling=100.0,
            class_weight="balanced",
            tol=1e-6,
            max_iter=MOST_ITERATIONS,
            random_state=0,
            **_LASSO,
        )
        return _weights(evidence, model)


@dataclass(frozen=True)
class SvmWeight(RankingMethod):
    """Weight in a linear support vector machine of the class against all others, on standardised inputs.

    It minimises |w|^2 / 2 + `inverse_penalty` * sum_n weight_n max(0, 1 - y_n f(x_n))^2, the examples of both sides
    weighing N / 2 in all: the squared hinge, whose optimum is unique and found without chance. The score is |w|;
    global is the mean over the classes. Source: Gurnee et al. (2023), arXiv 2305.01610; solver: liblinear (Fan et
    al., JMLR 9, 2008), which penalises the intercept too, here a ten-thousandth as much as a weight.
    """

    inverse_penalty: float = 0.1

    @property
    def name(self) -> str:
        """The method's name in tables."""
        return "svm" if self.inverse_penalty == SvmWeight.inverse_penalty else f"svm-{self.inverse_penalty:g}"

    def scores(self, evidence: Evidence) -> Scores:
        """Return the weights.

        Raises:
            SettingsError: an inverse penalty of 0 or below.
            ConvergenceError: a fit did not reach its optimum.
        """
        _check_positive("inverse_penalty", self.inverse_penalty)
        model = LinearSVC(
            C=self.inverse_penalty,
            dual=False,
            intercept_scaling=100.0,
            class_weight="balanced",
            tol=1e-6,
            max_iter=MOST_ITERATIONS,
        )
        return _weights(evidence, model)


@dataclass(frozen=True)
class KSparse(RankingMethod):
    """Weight in a logistic regression of the class against all others on the `k` neurons whose means differ most.

    The k neurons of a class are those with the largest `mean-difference`; on these, standardised, the fit minimises
    mean_n weight_n log(1 + exp(-y_n f(x_n))) + `penalty` / 2 * |w|^2 with a free intercept, the examples of both sides
    weighing N / 2 in all. The score is |w|, and 0 outside the k (all neurons of a layer that has fewer); global is
    the mean over the classes. Source: Gurnee et al. (2023), arXiv 2305.01610.
    """

    k: int = 16
    penalty: float = 0.01

    @property
    def name(self) -> str:
        """The method's name in tables."""
        size = "" if self.k == KSparse.k else f"-{self.k}"
        penalty = "" if self.penalty == KSparse.penalty else f"-{self.penalty:g}"
        return f"k-sparse{size}{penalty}"

    def scores(self, evidence: Evidence) -> Scores:
        """Return the weights.

        Raises:
            SettingsError: `k` or `penalty` is not above 0.
            ConvergenceError: a fit did not reach its optimum.
        """
        _check_positive("k", self.k)
        _check_positive("penalty", self.penalty)
        differences = MeanDifference().scores(evidence).values
        chosen = np.argsort(-differences, axis=2, kind="stable")[:, :, : self.k]
        model = LogisticRegression(
            C=1 / (self.penalty * len(evidence.activations)),
            solver="newton-cholesky",
            class_weight="balanced",
            tol=1e-8,
            max_iter=MOST_ITERATIONS,
        )
        return _weights(evidence, model, chosen[:, 1:])


def standardised(values: Float[np.ndarray, "example unit"]) -> Float[np.ndarray, "example unit"]:
    """Return the values less their mean, over their deviation; 0 where a unit is constant. In float64."""
    x = values.astype(np.float64)
    # Equal values can have a deviation of 1e-17 by rounding; only the range says that a unit is constant.
    varies = np.ptp(x, axis=0) > 0
    return np.asarray(np.where(varies, (x - x.mean(axis=0)) / np.where(varies, x.std(axis=0), 1.0), 0.0))


def _weights(
    evidence: Evidence,
    model: LogisticRegression | LinearSVC,
    chosen: Int[np.ndarray, "layer label chosen"] | None = None,
) -> Scores:
    """Return the weights of a two-class model fitted to each class against all others, on `chosen` units or on all."""
    activations, present = evidence.activations, evidence.present
    found = np.zeros((activations.n_layers, len(present), activations.width))
    for layer, values in enumerate(activations.values):
        z = standardised(values)
        for row, label in enumerate(present if len(present) > 1 else []):
            units = slice(None) if chosen is None else chosen[layer, label]
            found[layer, row, units] = _fitted(model, z[:, units], activations.targets == label, layer)
    return against_rest(evidence, found)


def _fitted(
    model: LogisticRegression | LinearSVC,
    z: Float[np.ndarray, "example unit"],
    members: Bool[np.ndarray, "example"],
    layer: int,
) -> Float[np.ndarray, "unit"]:
    """Return the weights of one fit, and refuse what did not converge."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        try:
            return np.asarray(model.fit(z, members).coef_[0])
        except ConvergenceWarning as warning:
            raise ConvergenceError(
                f"A {type(model).__name__} on layer {layer} did not reach its optimum ({warning}); choose a stronger "
                "penalty."
            ) from warning


def _check_positive(name: str, value: int | float) -> None:
    if not value > 0:
        raise SettingsError(f"{name} is {value}; give a number above 0.")
