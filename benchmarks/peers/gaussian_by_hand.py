"""The Gaussian probe as its formulas stand: every candidate's density is built anew, of all units chosen so far."""

from abc import abstractmethod
from typing import ClassVar

import numpy as np
import torch
from scipy.special import logsumexp
from scipy.stats import entropy, multivariate_normal
from torch.distributions import MultivariateNormal

from peers.probe_tasks import GaussianTask, Selected
from peers.side import Side

FLOOR = 1e-4
"""Least variance within a class, in deviations over all classes."""


class GaussianByHand(Side):
    """A greedy choice in three plain loops: over steps, over the units that are left, over classes."""

    def __init__(self, task: GaussianTask) -> None:
        del task

    def prepare(self, task: GaussianTask) -> None:
        """Warm up on two steps of a few units."""
        self.run(task.small())

    def run(self, task: GaussianTask) -> Selected:
        """Return the selection."""
        fitted, known = task.values[~task.held_out], task.targets[~task.held_out]
        judged, truth = task.values[task.held_out], task.targets[task.held_out]
        centre, scale = fitted.mean(axis=0), fitted.std(axis=0)
        fitted, judged = (fitted - centre) / scale, (judged - centre) / scale
        classes = [fitted[known == c] for c in np.unique(known)]
        priors = [np.log(len(x) / len(fitted)) for x in classes]
        means = [x.mean(axis=0) for x in classes]
        covariances = [_covariance(x) for x in classes]
        bits = entropy(np.bincount(truth), base=2)
        places = np.arange(len(judged))
        units: list[int] = []
        reached: list[float] = []
        for _ in range(task.dimensions):
            best, most = -1, -np.inf
            for unit in range(fitted.shape[1]):
                if unit in units:
                    continue
                chosen = [*units, unit]
                joint = np.stack(
                    [
                        prior + self.log_density(mean[chosen], covariance[np.ix_(chosen, chosen)], judged[:, chosen])
                        for prior, mean, covariance in zip(priors, means, covariances, strict=True)
                    ]
                )
                information = bits + np.mean(joint[truth, places] - logsumexp(joint, axis=0)) / np.log(2)
                if information > most + 1e-9:  # of equals the first
                    best, most = unit, information
            units.append(best)
            reached.append(float(most))
        return Selected(tuple(units), np.array(reached))

    @abstractmethod
    def log_density(self, mean: np.ndarray, covariance: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Return the log density at each row of values."""


class ScipyGaussian(GaussianByHand):
    """The densities are scipy's."""

    name: ClassVar[str] = "brute force, scipy"
    package: ClassVar[str] = "scipy"

    def log_density(self, mean: np.ndarray, covariance: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Return the log density at each row of values."""
        return multivariate_normal(mean, covariance).logpdf(values)


class TorchGaussian(GaussianByHand):
    """The densities are PyTorch's."""

    name: ClassVar[str] = "brute force, torch"
    package: ClassVar[str] = "torch"

    def log_density(self, mean: np.ndarray, covariance: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Return the log density at each row of values."""
        density = MultivariateNormal(torch.from_numpy(mean), torch.from_numpy(covariance))
        return density.log_prob(torch.from_numpy(values)).numpy()


def _covariance(x: np.ndarray) -> np.ndarray:
    """Return (diag(v) + scatter) / (N + 2 D + 4) of one class, v the variances but at least the floor."""
    n, width = x.shape
    centred = x - x.mean(axis=0)
    variances = np.maximum(x.var(axis=0), FLOOR)
    scatter = centred.T @ centred
    scatter[np.diag_indices(width)] = n * variances
    return (np.diag(variances) + scatter) / (n + 2 * width + 4)
