"""The Gaussian probe: units taken one after another by what they add to a Gaussian classifier of the states."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy import stats
from torch import Tensor

from synapse.errors import DataError, SettingsError
from synapse.ranking.base import Evidence, RankingMethod, Scores

FLOOR = 1e-4
"""Least variance of a unit within a class, as a share of its variance over all classes."""

TIE = 1e-9
"""Bits by which a unit must be better to come before one of lower index: equal units differ by rounding."""

_NUMBERS_AT_ONCE = 2**21
"""Densities (class, unit, example) that are worked out together, which bounds the memory."""


@dataclass(frozen=True, eq=False)
class GaussianSelection:
    """Units in the order in which the Gaussian probe took them, and what it knew after each.

    Information is measured on held-out examples: where the Gaussians mislead, it is negative.
    """

    units: Int[np.ndarray, "step"]
    information: Float[np.ndarray, "step"]
    """Mutual information of the units so far and the targets, in bits, at most `entropy`."""
    entropy: float
    """Entropy of the held-out targets, in bits."""
    alone: Float[np.ndarray, "unit"]
    """Mutual information of each unit alone, in bits; -inf where it is constant, so that it is never taken."""
    held_out: Bool[np.ndarray, "example"]
    """The examples that judged; the others fitted the Gaussians."""

    @property
    def normalised(self) -> Float[np.ndarray, "step"]:
        """Information as a share of the entropy, at most 1; 0 where there is no entropy to share."""
        return self.information / self.entropy if self.entropy > 0 else np.zeros_like(self.information)


@dataclass(frozen=True)
class GaussianProbe(RankingMethod):
    """Greedy forward selection by the held-out mutual information of a Gaussian classifier, see `greedy_gaussian`.

    Global: all classes at once; class: the class against the rest. `dimensions` units are taken, the rest follow by
    the information of each alone. Scores are places, not amounts: the unit taken first scores highest, the others
    score below 1.
    """

    dimensions: int = 50
    holdout: float = 0.2
    seed: int = 0

    @property
    def name(self) -> str:
        """The method's name in tables."""
        return "gaussian"

    def scores(self, evidence: Evidence) -> Scores:
        """Return the order of selection; all 0 where the examples are of one class."""
        activations, present = evidence.activations, evidence.present
        targets = activations.targets
        found = np.zeros((activations.n_layers, evidence.n_rankings, activations.width))
        if len(present) < 2:
            return Scores(found)
        held_out = _held_out(targets, self.holdout, self.seed)
        for values, rows in zip(activations.values, found, strict=True):
            rows[0] = _places(_greedy(values, targets, held_out, self.dimensions))
            # Of two classes, either is the rest of the other.
            rows[[1 + c for c in present]] = rows[0]
            for c in present if len(present) > 2 else ():
                rows[1 + c] = _places(_greedy(values, targets == c, held_out, self.dimensions))
        return Scores(found)


def greedy_gaussian(
    values: Float[np.ndarray, "example unit"],
    targets: Int[np.ndarray, "example"],
    *,
    dimensions: int = 50,
    holdout: float = 0.2,
    seed: int = 0,
) -> GaussianSelection:
    """Return the units that a Gaussian classifier takes one after another, and its information after each.

    Each class is a Gaussian, fitted to the examples that are not held out: the mode a posteriori under a
    normal-inverse-Wishart prior around the class's own mean and variances v, with D + 2 degrees of freedom,

        covariance = (diag(v) + scatter) / (N_c + 2 D + 4).

    It is fitted once, to all D units; a subset A takes its rows and columns, so what a unit says does not hang on how
    many were taken before it. Where D is not small beside N_c, the covariances are too small by that, the classifier is
    too sure, and its information falls again after the first units. Classes weigh as they occur. Each step takes the
    unit j with the largest

        I(y; A + j) = H(y) - mean_n -log2 p(y_n | x_n, A + j)

    on the held-out part: `holdout` of each class, at least one example and never all. Of equals the lowest index is
    taken.

    The published remedy for a covariance that is not positive definite, adding ten times its smallest eigenvalue, does
    nothing where that is 0, as it is where a unit is constant within a class. Here v is at least `FLOOR` of the unit's
    variance over all classes, in the scatter too; a class with one example has all of it. With that every covariance
    is positive definite. Units that are constant over the fitted examples are never taken.

    Cost: rank-one updates of each class's whitened residuals, O(C N D) a step; no matrix is built again.

    Raises:
        SettingsError: `dimensions` is below 1, or `holdout` outside (0, 1).
        DataError: no class has two examples.

    *Source*: Torroba Hennigen, Williams & Cotterell, "Intrinsic probing through dimension selection" (EMNLP 2020); the
    constants, and the fit to all units, are those of their program.
    """
    return _greedy(values, targets, _held_out(targets, holdout, seed), dimensions)


def _held_out(targets: Int[np.ndarray, "example"], share: float, seed: int) -> Bool[np.ndarray, "example"]:
    """Return which examples judge the Gaussians; every class keeps one for the fit."""
    if not 0.0 < share < 1.0:
        raise SettingsError(f"holdout is {share}: give a share between 0 and 1, for example 0.2.")
    random = np.random.default_rng(seed)
    held_out = np.zeros(len(targets), dtype=bool)
    for c in np.unique(targets):
        members = random.permutation(np.flatnonzero(targets == c))
        held_out[members[: min(max(1, round(share * len(members))), len(members) - 1)]] = True
    if not held_out.any():
        raise DataError(
            f"No class of the {len(targets)} examples occurs twice, so none can be held out: give more examples."
        )
    return held_out


def _greedy(
    values: Float[np.ndarray, "example unit"],
    targets: Int[np.ndarray, "example"] | Bool[np.ndarray, "example"],
    held_out: Bool[np.ndarray, "example"],
    dimensions: int,
) -> GaussianSelection:
    if dimensions < 1:
        raise SettingsError(f"{dimensions} dimensions were asked for: ask for at least 1.")
    fitted, known = values[~held_out].astype(np.float64), targets[~held_out]
    by_class = np.argsort(targets[held_out], kind="stable")
    judged, truth = values[held_out][by_class].astype(np.float64), targets[held_out][by_class]

    # Standardised, which changes no mutual information, so that `FLOOR` is a share.
    free = np.ptp(fitted, axis=0) > 0.0
    centre, scale = fitted.mean(axis=0), np.where(free, fitted.std(axis=0), 1.0)
    fitted, judged = (fitted - centre) / scale, (judged - centre) / scale
    classes = np.unique(known)
    means = np.stack([fitted[known == c].mean(axis=0) for c in classes])
    covariances = np.stack([_covariance(fitted[known == c] - mean) for c, mean in zip(classes, means, strict=True)])
    ends = np.searchsorted(truth, classes, side="right")
    candidates = _Candidates(
        covariances=torch.from_numpy(covariances),
        residuals=torch.from_numpy(np.ascontiguousarray(judged.T - means[:, :, None])),
        densities=torch.from_numpy(np.log([[np.mean(known == c)] for c in classes]) + np.zeros(len(judged))),
        ends=ends.tolist(),
    )
    entropy = float(stats.entropy(np.diff(ends, prepend=0), base=2))

    units: list[int] = []
    reached: list[float] = []
    alone = np.full(len(free), -np.inf)
    for _ in range(min(dimensions, int(free.sum()))):
        information = np.where(free, entropy - candidates.losses() / np.log(2), -np.inf)
        if not units:
            alone = information
        best = int(np.flatnonzero(information >= information.max() - TIE)[0])
        units.append(best)
        reached.append(float(information[best]))
        free[best] = False
        candidates.take(best)
    return GaussianSelection(np.array(units, dtype=np.int64), np.array(reached), entropy, alone, held_out)


def _covariance(centred: Float[np.ndarray, "example unit"]) -> Float[np.ndarray, "unit unit"]:
    """Return a class's covariance from its examples less their mean, in deviations over all classes."""
    n, width = centred.shape
    scatter = centred.T @ centred
    least = FLOOR if n > 1 else 1.0
    np.fill_diagonal(scatter, (1 + n) * np.maximum(centred.var(axis=0), least))
    return np.asarray(scatter / (n + 2 * width + 4))


class _Candidates:
    """What each unit has left to say of the judged examples once the chosen units are known.

    For every class, with A the chosen units and L the Cholesky factor of their covariance: `rows` is L^-1 S_A,
    `residuals` and `variances` those of each unit given A, `densities` the log of prior times density of A, less what
    is alike in all classes. The judged examples come class by class, class c up to `ends[c]`. All is float64.
    """

    def __init__(
        self,
        covariances: Float[Tensor, "class unit unit"],
        residuals: Float[Tensor, "class unit example"],
        densities: Float[Tensor, "class example"],
        ends: list[int],
    ) -> None:
        self.covariances = covariances
        self.residuals = residuals
        self.densities = densities
        self.variances = covariances.diagonal(dim1=1, dim2=2).clone()
        self.rows = covariances[:, :0]
        self.own = [slice(begin, end) for begin, end in zip((0, *ends), ends, strict=False)]

    def losses(self) -> Float[np.ndarray, "unit"]:
        """Return the mean of -log p(y | x) in nats if the unit were taken."""
        n_classes, n_units, n_examples = self.residuals.shape
        logs, factors = -0.5 * self.variances.log(), -0.5 / self.variances
        losses = []
        at_once = max(1, _NUMBERS_AT_ONCE // (n_classes * n_examples))
        for begin in range(0, n_units, at_once):
            part = slice(begin, begin + at_once)
            joint = self.residuals[:, part].square()  # (class, unit, example)
            joint *= factors[:, part, None]
            joint += logs[:, part, None]
            joint += self.densities[:, None]
            own = torch.cat([of_class[:, examples] for of_class, examples in zip(joint, self.own, strict=True)], dim=1)
            losses.append((joint.logsumexp(dim=0) - own).mean(dim=1))
        return torch.cat(losses).numpy()

    def take(self, unit: int) -> None:
        """Condition everything on a unit."""
        deviations = self.variances[:, unit].sqrt()[:, None]
        known = (self.rows[:, :, unit, None] * self.rows).sum(dim=1)
        row = (self.covariances[:, unit] - known) / deviations
        white = self.residuals[:, unit] / deviations
        self.densities -= white.square() / 2 + deviations.log()
        self.variances -= row.square()
        self.residuals.baddbmm_(row[:, :, None], white[:, None], alpha=-1)
        self.rows = torch.cat([self.rows, row[:, None]], dim=1)
        # Nothing is left of the unit itself, but for rounding.
        self.variances[:, unit], self.residuals[:, unit] = 1.0, 0.0


def _places(selection: GaussianSelection) -> Float[np.ndarray, "unit"]:
    """Return scores that fall along the selection down to 1, and below 1 by the information of each unit alone."""
    width, taken = len(selection.alone), len(selection.units)
    # Rounded as the selection is, so that equal units stay equal.
    scores: Float[np.ndarray, "unit"] = stats.rankdata(np.round(selection.alone, 9), method="min") / (width + 1)
    scores[selection.units] = np.arange(taken, 0, -1)
    return scores
