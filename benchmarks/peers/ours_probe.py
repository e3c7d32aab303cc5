"""synapse itself, through the functions that its probes and rankings are made with."""

from typing import ClassVar

import numpy as np

import synapse as syn
from peers.probe_tasks import Effects, EffectTask, Fits, FitTask, GaussianTask, LossTask, ProbeTask, Selected
from peers.side import Side
from synapse.probe.solver import Solution, solve, solve_path, solve_resamples
from synapse.ranking.effects import CausalEffect
from synapse.ranking.gaussian import greedy_gaussian

COLD_FITS = 10
"""Single fits that a bootstrap is measured against."""


class OurSide(Side):
    """A side of synapse, which prepares nothing."""

    name: ClassVar[str] = "synapse"
    package: ClassVar[str] = "synapse"

    def __init__(self, task: ProbeTask) -> None:
        del task

    def prepare(self, task: ProbeTask) -> None:
        """Warm up on a small part."""
        self.run(task.small())


class Paths(OurSide):
    """`solve_path` for every chain, at its own tolerance."""

    def run(self, task: FitTask) -> Fits:
        """Return the solutions."""
        found: list[Solution] = []
        for chain in task.chains:
            first = chain[0]
            path = solve_path(
                first.x,
                first.targets,
                n_labels=first.n_labels,
                penalties=[problem.penalty for problem in chain],
                l1_ratio=first.l1_ratio,
            )
            found += [path[problem.penalty] for problem in chain]
        return _fits(found)


class LooseRidge(OurSide):
    """`solve` for every layer, a ridge that stops early: the loss it is compared by has no penalty."""

    penalty: ClassVar[float] = 0.01
    tolerance: ClassVar[float] = 0.01

    @property
    def setting(self) -> str:
        """How it was run."""
        return f"l2 penalty {self.penalty:g}, gradient norm {self.tolerance:g}"

    def run(self, task: LossTask) -> Fits:
        """Return the solutions."""
        return _fits(
            [
                solve(
                    x.astype(np.float64),
                    task.targets,
                    n_labels=task.n_labels,
                    penalty=self.penalty,
                    l1_ratio=0.0,
                    tolerance=self.tolerance,
                )
                for x in task.states
            ]
        )


class Resamples(OurSide):
    """One call of `solve_resamples`, from the solution on all examples."""

    def run(self, task: FitTask) -> Fits:
        """Return the solutions."""
        first = task.problems[0]
        return _fits(
            solve_resamples(
                first.x,
                first.targets,
                np.stack([problem.counts for problem in task.problems]),
                n_labels=first.n_labels,
                penalty=first.penalty,
                l1_ratio=first.l1_ratio,
                start=task.start,
            )
        )


class EachResample(Resamples):
    """The same, with the time given for one resample."""

    def __init__(self, task: FitTask) -> None:
        super().__init__(task)
        self.parts = len(task.chains)

    @property
    def setting(self) -> str:
        """How it was run."""
        return f"{self.parts} together"


class ColdFits(OurSide):
    """`solve` for the first resamples, each from nothing."""

    def run(self, task: FitTask) -> Fits:
        """Return the solutions."""
        return _fits(
            [
                solve(
                    problem.x,
                    problem.targets,
                    n_labels=problem.n_labels,
                    penalty=problem.penalty,
                    l1_ratio=problem.l1_ratio,
                    example_weights=problem.counts.astype(np.float64),
                )
                for problem in task.problems[:COLD_FITS]
            ]
        )


class Gaussian(OurSide):
    """`greedy_gaussian`."""

    def run(self, task: GaussianTask) -> Selected:
        """Return the selection."""
        found = greedy_gaussian(task.values, task.targets, dimensions=task.dimensions)
        return Selected(tuple(found.units.tolist()), found.information)


class SingleEffects(OurSide):
    """The ranking method `causal-zero` on all examples."""

    def run(self, task: EffectTask) -> Effects:
        """Return its numbers in the layers that were asked for."""
        method = CausalEffect("zero", layers=task.layers, examples=None)
        ranking = syn.rank(task.activations, method=method, classifier=task.classifier, examples=task.examples)
        assert ranking.signed is not None
        return Effects(ranking.signed[list(task.layers)])


def _fits(solutions: list[Solution]) -> Fits:
    return Fits(tuple((solution.weights, solution.intercept) for solution in solutions))
