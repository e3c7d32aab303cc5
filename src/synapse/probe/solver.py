"""Multinomial logistic regression with an elastic net, solved to a certificate of optimality.

Over weights W (label, unit) and a free intercept b (label), with softmax probabilities p,

    minimise  mean_n -log p(y_n | x_n)  +  penalty * (l1_ratio * |W|_1 + (1 - l1_ratio) / 2 * |W|_2^2),

the model of Friedman, Hastie & Tibshirani (J. Stat. Softw. 33, 2010, section 4). scikit-learn's `C` is
`1 / (N * penalty)`. The columns of X should be standardised: the penalty treats them alike.

Where there is an l1 part, W is split into W = P - M with P, M >= 0 (Schmidt, Fung & Rosales, ECML 2007): the
objective becomes smooth, and the bounds give exact zeros. The bounded problem goes to L-BFGS-B (Byrd, Lu,
Nocedal & Zhu, SIAM J. Sci. Comput. 16, 1995), in rounds: each round sees only the units that carry a weight
or should, and between rounds all are looked at. What L-BFGS-B says of itself is not believed: the certificate
is worked out afresh from W and b, over all units.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import count

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import Bounds, minimize

from synapse.errors import SettingsError

TOLERANCE = 1e-7
"""Largest `gradient_norm` of a solution that counts as converged."""

_MOST_ROUNDS = 50


@dataclass(frozen=True, eq=False)
class Solution:
    """Weights and intercept where the solver stopped, with the proof of how good they are.

    A label without a training example has weights 0 and intercept -inf: probability 0 is its optimum.
    """

    weights: Float[np.ndarray, "label unit"]
    intercept: Float[np.ndarray, "label"]
    """Finite entries have mean 0: a softmax does not see a shift of all of them."""
    objective: float
    """Value of the objective, in nats."""
    gradient_norm: float
    """Largest coordinate of the distance from 0 to the subdifferential: 0 at the optimum, and only there."""
    iterations: int
    """Evaluations of the objective and its gradient."""
    converged: bool
    """Whether `gradient_norm` is within the tolerance."""


def solve(
    x: Float[np.ndarray, "example unit"],
    targets: Int[np.ndarray, "example"],
    *,
    n_labels: int,
    penalty: float,
    l1_ratio: float = 0.5,
    tolerance: float = TOLERANCE,
    max_iterations: int = 20_000,
    start: Solution | None = None,
) -> Solution:
    """Return the elastic-net solution for `targets` in `[0, n_labels)`, in float64.

    `start`, a solution of a nearby problem, saves time. An unconverged solution is returned as such.

    Raises:
        SettingsError: `penalty` is not above 0 (separable data would have no optimum), or `l1_ratio` is
            outside [0, 1].
    """
    check_penalty(penalty, l1_ratio)
    present, classes = np.unique(targets, return_inverse=True)
    weights, intercept = np.zeros((len(present), x.shape[1])), np.zeros(len(present))
    if start is not None:
        weights, intercept = start.weights[present], start.intercept[present]
        intercept = np.where(np.isfinite(intercept), intercept, 0.0)

    problem = _Problem(np.ascontiguousarray(x, dtype=np.float64), classes, penalty, l1_ratio)
    iterations = 0
    for rounds in count():
        value, gradient, slope = problem.smooth(weights, intercept)
        excess = problem.excess(weights, gradient)
        norm = float(max(excess.max(initial=0.0), np.abs(slope).max()))
        if norm <= tolerance or iterations >= max_iterations or rounds == _MOST_ROUNDS:
            break
        units = np.flatnonzero(((weights != 0.0) | (excess > 0.0)).any(axis=0))
        part = replace(problem, x=np.ascontiguousarray(problem.x[:, units]))
        # The first rounds find out which units matter; only the last needs to be exact.
        weights[:, units], intercept, evaluations = part.descend(
            weights[:, units], intercept, max(tolerance, 0.01 * norm), max_iterations - iterations
        )
        iterations += evaluations + 1

    all_weights, all_intercepts = np.zeros((n_labels, x.shape[1])), np.full(n_labels, -np.inf)
    all_weights[present], all_intercepts[present] = weights, intercept - intercept.mean()
    return Solution(
        weights=all_weights,
        intercept=all_intercepts,
        objective=value + problem.l1 * float(np.abs(weights).sum()),
        gradient_norm=norm,
        iterations=iterations,
        converged=norm <= tolerance,
    )


def check_penalty(penalty: float, l1_ratio: float) -> None:
    """Raise `SettingsError` unless `0 < penalty < inf` and `0 <= l1_ratio <= 1`."""
    if not 0.0 < penalty < np.inf:
        raise SettingsError(f"The penalty is {penalty}: give a number above 0, for example 0.01.")
    if not 0.0 <= l1_ratio <= 1.0:
        raise SettingsError(f"l1_ratio is {l1_ratio}: give a share between 0 (ridge) and 1 (lasso).")


def solve_path(
    x: Float[np.ndarray, "example unit"],
    targets: Int[np.ndarray, "example"],
    *,
    n_labels: int,
    penalties: Iterable[float],
    l1_ratio: float = 0.5,
    tolerance: float = TOLERANCE,
) -> dict[float, Solution]:
    """Return the solution of each penalty, from the strongest to the weakest, each started from the last."""
    path: dict[float, Solution] = {}
    last = None
    for penalty in sorted(set(penalties), reverse=True):
        last = path[penalty] = solve(
            x, targets, n_labels=n_labels, penalty=penalty, l1_ratio=l1_ratio, tolerance=tolerance, start=last
        )
    return path


@dataclass(frozen=True, eq=False)
class _Problem:
    """The objective on one data set, every class of which has an example."""

    x: Float[np.ndarray, "example unit"]
    classes: Int[np.ndarray, "example"]
    penalty: float
    l1_ratio: float

    @property
    def l1(self) -> float:
        return self.penalty * self.l1_ratio

    @property
    def l2(self) -> float:
        return self.penalty * (1.0 - self.l1_ratio)

    def smooth(
        self, weights: Float[np.ndarray, "label unit"], intercept: Float[np.ndarray, "label"]
    ) -> tuple[float, Float[np.ndarray, "label unit"], Float[np.ndarray, "label"]]:
        """Return cross-entropy plus the l2 part, with its gradient in weights and intercept."""
        rows = np.arange(len(self.x))
        logits = weights @ self.x.T + intercept[:, None]  # (label, example): softmax along contiguous rows
        logits -= logits.max(axis=0)
        chosen = logits[self.classes, rows]
        residual = np.exp(logits, out=logits)
        mass = residual.sum(axis=0)
        value = float(np.mean(np.log(mass) - chosen)) + 0.5 * self.l2 * float(np.vdot(weights, weights))
        residual /= mass
        residual[self.classes, rows] -= 1.0
        residual /= len(self.x)
        return value, residual @ self.x + self.l2 * weights, residual.sum(axis=1)

    def excess(
        self, weights: Float[np.ndarray, "label unit"], gradient: Float[np.ndarray, "label unit"]
    ) -> Float[np.ndarray, "label unit"]:
        """Return how far 0 is from the subdifferential in each weight, at least 0.

        The subgradient is `gradient + l1 * sign(w)`; at w = 0 what of `|gradient|` exceeds `l1` is left (the
        pseudo-gradient of Andrew & Gao, ICML 2007).
        """
        at_zero = np.maximum(np.abs(gradient) - self.l1, 0.0)
        elsewhere = np.abs(gradient + self.l1 * np.sign(weights))
        return np.asarray(np.where(weights == 0.0, at_zero, elsewhere))

    def descend(
        self,
        weights: Float[np.ndarray, "label unit"],
        intercept: Float[np.ndarray, "label"],
        tolerance: float,
        max_iterations: int,
    ) -> tuple[Float[np.ndarray, "label unit"], Float[np.ndarray, "label"], int]:
        """Return where L-BFGS-B comes to from this point, and the evaluations that it took."""
        # Without an l1 part the split would only add a flat direction (P and M growing together).
        signs = np.array([1.0, -1.0]) if self.l1 > 0.0 else np.array([1.0])
        parts = np.multiply.outer(signs, weights)  # (sign, label, unit)
        lower = np.full(parts.size + len(intercept), -np.inf)
        if self.l1 > 0.0:
            parts = np.maximum(parts, 0.0)
            lower[: parts.size] = 0.0
        shape, size = parts.shape, parts.size

        def unpack(point: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            return np.tensordot(signs, point[:size].reshape(shape), axes=1), point[size:]

        def evaluate(point: np.ndarray) -> tuple[float, np.ndarray]:
            value, gradient, slope = self.smooth(*unpack(point))
            if self.l1 > 0.0:
                value += self.l1 * float(point[:size].sum())
            return value, np.concatenate([(np.multiply.outer(signs, gradient) + self.l1).ravel(), slope])

        found = minimize(
            evaluate,
            np.concatenate([parts.ravel(), intercept]),
            jac=True,
            method="L-BFGS-B",
            bounds=Bounds(lower, np.inf),
            options={
                "maxcor": 20,
                "ftol": 0.0,  # stop by the gradient, not when the objective changes little
                "gtol": 0.5 * tolerance,
                "maxiter": max_iterations,
                "maxfun": max_iterations,
            },
        )
        weights, intercept = unpack(found.x)
        if self.l1 > 0.0:
            # L-BFGS-B also stops where a weight is within the tolerance of its bound: that weight is a zero.
            gradient = self.smooth(weights, intercept)[1]
            weights = np.where((np.abs(weights) <= tolerance) & (np.abs(gradient) < self.l1), 0.0, weights)
        return weights, intercept, int(found.nfev)
