"""scikit-learn: LogisticRegression, run as short as is enough to come within the tolerance of the optimum."""

import warnings
from typing import ClassVar

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from peers.ours_probe import COLD_FITS
from peers.probe_tasks import Fits, FitTask, Problem
from peers.side import Side

WITHIN = 1e-6
"""Nats above the least objective at which a fit is good enough."""

Weights = tuple[np.ndarray, np.ndarray]
"""Weights (label, unit) and intercepts (label)."""

REFITS = 3
"""Resamples that are fitted again; the time is given for one of them."""


class Saga(Side):
    """saga, each fit from the solution before it, for the least epochs on a ladder with which it is good enough.

    The epochs are found outside of the timing. One fit runs through, as saga forgets its gradients between fits: when
    it is stopped and continued it needs many times as long.
    """

    name: ClassVar[str] = "scikit-learn saga"
    package: ClassVar[str] = "scikit-learn"
    rungs: ClassVar[tuple[int, ...]] = tuple(sorted({round(1.1**k) for k in range(100)}))
    """Epochs that are tried."""
    tried_first: ClassVar[int] = 24
    """Place of the rung that the first problem begins with."""

    def __init__(self, task: FitTask) -> None:
        self.task = self.part(task)
        self.chosen: list[int] = []

    def part(self, task: FitTask) -> FitTask:
        """Return what of the task is taken on."""
        return task

    @property
    def setting(self) -> str:
        """How long it ran."""
        epochs = [self.rungs[rung] for rung in self.chosen]
        return f"{min(epochs)} to {max(epochs)} epochs" if epochs else ""

    def prepare(self, task: FitTask) -> None:
        """Find the epochs of every problem."""
        del task
        rung = self.tried_first
        for chain in self.task.chains:
            solution = self._start()
            for problem in chain:
                # What the same place of the last chain took is the best guess.
                guess = self.chosen[-len(chain)] if len(self.chosen) >= len(chain) else rung
                rung, solution = self._least(problem, solution, guess)
                self.chosen.append(rung)

    def run(self, task: FitTask) -> Fits:
        """Return the solutions."""
        del task
        rungs = iter(self.chosen)
        found = []
        for chain in self.task.chains:
            solution = self._start()
            for problem in chain:
                solution = self.fitted(problem, solution, next(rungs))
                found.append(solution)
        return Fits(tuple(found))

    def fitted(self, problem: Problem, start: Weights | None, rung: int) -> Weights:
        """Return weights and intercepts after one fit."""
        regression = LogisticRegression(solver="saga", max_iter=self.rungs[rung], tol=0.0, random_state=0)
        return _fit(regression, problem, start)

    def _start(self) -> Weights | None:
        start = self.task.start
        return None if start is None else (start.weights, start.intercept)

    def _least(self, problem: Problem, start: Weights | None, rung: int) -> tuple[int, Weights]:
        """Return the lowest rung that is good enough and its solution, looking from a rung on."""
        too_low, enough, stride = -1, None, 1
        while enough is None or enough[0] - too_low > 1:
            solution = self.fitted(problem, start, rung)
            if problem.excess(*solution) <= WITHIN:
                enough = rung, solution
            elif rung == len(self.rungs) - 1:
                raise RuntimeError(
                    f"the longest fit ({self.rungs[rung]}) does not come within {WITHIN:g} of the optimum"
                )
            else:
                too_low = rung
            if enough is None:
                rung = min(rung + stride, len(self.rungs) - 1)
            elif too_low < 0:
                rung = max(rung - stride, 0)
            else:
                rung = (too_low + enough[0]) // 2
            stride *= 2
        return enough


class SagaRefits(Saga):
    """The same on the first resamples, each from the solution on all examples, with the time given for one of them."""

    parts = REFITS

    def part(self, task: FitTask) -> FitTask:
        """Return the first resamples."""
        return FitTask(task.description, task.chains[:REFITS], task.start)

    @property
    def setting(self) -> str:
        """How long it ran."""
        return f"mean of {REFITS}, {super().setting}"


class SagaColdFits(Saga):
    """The first resamples, each from nothing: two of them, with the time scaled up to what ten cost."""

    taken: ClassVar[int] = 2
    parts = taken / COLD_FITS

    def part(self, task: FitTask) -> FitTask:
        """Return the first resamples, without a start."""
        return FitTask(task.description, task.chains[: self.taken])

    @property
    def setting(self) -> str:
        """How long it ran."""
        return f"scaled up from {self.taken}, {super().setting}"


class Lbfgs(Saga):
    """lbfgs, each fit from the solution before it, with the largest tolerance on a ladder that is good enough."""

    name: ClassVar[str] = "scikit-learn lbfgs"
    rungs: ClassVar[tuple[int, ...]] = tuple(range(1, 11))
    """Negative powers of ten."""
    tried_first: ClassVar[int] = 4

    @property
    def setting(self) -> str:
        """How far it ran."""
        powers = [self.rungs[rung] for rung in self.chosen]
        return f"tol 1e-{min(powers):02d} to 1e-{max(powers):02d}" if powers else ""

    def fitted(self, problem: Problem, start: Weights | None, rung: int) -> Weights:
        """Return weights and intercepts after one fit."""
        return _fit(LogisticRegression(solver="lbfgs", tol=10.0 ** -self.rungs[rung], max_iter=20_000), problem, start)


def _fit(regression: LogisticRegression, problem: Problem, start: Weights | None) -> Weights:
    regression.set_params(C=1 / (len(problem.x) * problem.penalty), l1_ratio=problem.l1_ratio, warm_start=True)
    if start is not None:
        regression.coef_, regression.intercept_ = start[0].copy(), start[1].copy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # it is stopped on purpose
        regression.fit(problem.x, problem.targets, sample_weight=problem.counts)
    return regression.coef_, regression.intercept_
