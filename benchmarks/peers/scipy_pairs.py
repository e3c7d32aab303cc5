"""Head attacks pair by pair with scipy's general optimisers: min ||v||^2 subject to v . h_i >= r_i."""

from abc import abstractmethod
from typing import ClassVar

import numpy as np
from scipy.optimize import minimize

from peers.attack_tasks import Edits, PairTask
from peers.side import Side


class ScipyPairs(Side):
    """Each pair's problem for those examples of the source that need least, handed to `scipy.optimize.minimize`."""

    package: ClassVar[str] = "scipy"
    taken: ClassVar[int | None] = None
    """Cases that are solved, where all would take too long."""

    def __init__(self, task: PairTask) -> None:
        del task

    def prepare(self, task: PairTask) -> None:
        """Warm up on three classes."""
        self.run(task.small())

    def run(self, task: PairTask) -> Edits:
        """Return the edits."""
        found = {}
        for source, target, share in task.cases:
            chosen = task.fitting(source)
            h = np.asarray(task.train.features[chosen], dtype=np.float64)
            z = task.train.known_logits[chosen].astype(np.float64)
            # v raises the target's logit by v . h and lowers the source's by as much.
            lacking = z - z[:, [target]]
            lacking[:, source] /= 2
            required = np.delete(lacking, target, axis=1).max(axis=1)
            easiest = np.argsort(required, kind="stable")[: int(np.ceil(share * len(required)))]
            v = self.solve(h[easiest], required[easiest])
            edit = np.zeros(task.weight.shape)
            edit[target], edit[source] = v, -v
            found[source, target, share] = edit
        return Edits(found)

    @abstractmethod
    def solve(self, h: np.ndarray, required: np.ndarray) -> np.ndarray:
        """Return the shortest v with h v >= required."""


class Slsqp(ScipyPairs):
    """SLSQP on v itself, with a linear constraint an example."""

    name: ClassVar[str] = "scipy SLSQP"

    def solve(self, h: np.ndarray, required: np.ndarray) -> np.ndarray:
        """Return the shortest v with h v >= required."""
        constraint = {"type": "ineq", "fun": lambda v: h @ v - required, "jac": lambda _: h}
        start = np.zeros(h.shape[1])
        solved = minimize(
            lambda v: v @ v / 2,
            start,
            jac=lambda v: v,
            method="SLSQP",
            constraints=[constraint],
            options={"maxiter": 50},
        )
        return solved.x


class DualLbfgs(ScipyPairs):
    """L-BFGS-B on the dual: max r . u - ||h^T u||^2 / 2 over u >= 0, and v = h^T u."""

    name: ClassVar[str] = "scipy L-BFGS-B, dual"

    def solve(self, h: np.ndarray, required: np.ndarray) -> np.ndarray:
        """Return the shortest v with h v >= required."""
        products = h @ h.T

        def dual(u: np.ndarray) -> tuple[float, np.ndarray]:
            reach = products @ u
            return float(u @ reach / 2 - required @ u), reach - required

        n = len(required)
        solved = minimize(dual, np.zeros(n), jac=True, method="L-BFGS-B", bounds=[(0, None)] * n)
        return h.T @ solved.x
