"""Measures probes and rankings of synapse against the peers: the same states, objectives, examples and threads.

Ends with status 1 where a peer that can do a workload was not measured, or where a side's answer is not good enough.
"""

import gc
import os
import platform
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version

import timing
import torch
import transformers
from command_line import Script, rounds
from peers.probe_tasks import ProbeTask
from probe_results import ProbeResult, markdown_table
from probe_workloads import WORKLOADS, Workload
from race import OURS, Race, without_ours
from threadpoolctl import threadpool_limits

PEERS = {
    "scikit-learn saga": "peers.scikit_learn:Saga",
    "scikit-learn saga, refits": "peers.scikit_learn:SagaRefits",
    "scikit-learn saga, 10 cold fits": "peers.scikit_learn:SagaColdFits",
    "scikit-learn lbfgs": "peers.scikit_learn:Lbfgs",
    "NeuroX": "peers.neurox_probe:NeuroxProbe",
    "synapse, 10 cold fits": "peers.ours_probe:ColdFits",
    "brute force, scipy": "peers.gaussian_by_hand:ScipyGaussian",
    "brute force, torch": "peers.gaussian_by_hand:TorchGaussian",
    "captum": "peers.captum_effects:CaptumEffects",
}
"""The peers and where their sides are; a workload names those that can do it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is asked for, print it, write it, and return the exit status."""
    script = Script((__doc__ or "").split("\n")[0], WORKLOADS, list(PEERS), "probe", ProbeResult, markdown_table)
    options = script.parser().parse_args(arguments)
    warnings.filterwarnings("ignore")
    transformers.utils.logging.disable_progress_bar()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

    def measure(name: str) -> ProbeResult:
        workload = WORKLOADS[name]
        race = Measurement(
            workload=workload,
            peers={peer: PEERS[peer] for peer in workload.peers if not options.peers or peer in options.peers},
            quick=options.quick,
            threads=options.threads,
            repeats=rounds(options),
            memory=options.memory,
        )
        return race.result()

    return script.run(options, options.workloads or list(WORKLOADS), measure, lambda name: WORKLOADS[name].peers)


@dataclass(eq=False, kw_only=True)
class Measurement(Race):
    """One workload, measured."""

    workload: Workload
    peers: Mapping[str, str]
    quick: bool

    def result(self) -> ProbeResult:
        """Measure, and return the figures."""
        # Memory is measured in forks, and a fork of a process with threads may never end.
        torch.set_num_threads(1)
        with threadpool_limits(1):
            task = self.workload.build(self.quick)
            self._make_sides(task)
            # What lives as long as the workload need not be looked through before every run.
            gc.collect()
            gc.freeze()
            if self.memory and OURS in self.sides:
                peak = self.attempt(OURS, lambda side: side.peak_mb(task))
                self.peaks |= {} if peak is None else {OURS: peak}
        with threadpool_limits(self.threads):
            torch.set_num_threads(self.threads)
            for name in list(self.sides):
                self.attempt(name, lambda side: side.prepare(task))
            self.run_rounds(task)
        differences = task.differences(self.answers)
        for name, difference in differences.items():
            if not difference <= self.workload.tolerance:
                self.strike(name, f"its answer is off by {difference:.1e} ({self.workload.compared})")
        for side in self.sides.values():
            side.close()
        gc.unfreeze()
        return self._figures(task, differences)

    def _make_sides(self, task: ProbeTask) -> None:
        self.versions |= {name: version(name) for name in ("torch", "numpy", "scipy")}
        for name, where in {OURS: self.workload.ours, **self.peers}.items():
            self.enter(name, where, lambda: task)

    def _figures(self, task: ProbeTask, differences: dict[str, float]) -> ProbeResult:
        return ProbeResult(
            **self.figures(),
            workload=self.workload.name,
            description=task.description,
            max_abs_diff=differences.get(OURS),
            peer_diffs=without_ours(differences),
            tolerance=self.workload.tolerance,
            compared=self.workload.compared,
            said=tuple(task.remarks(self.answers)),
            doubted=tuple(task.doubts(self.answers)),
            dtype=self.workload.dtype,
            quick=self.quick,
            machine=timing.machine(task.device),
            versions=self.versions | {"python": platform.python_version()},
        )


if __name__ == "__main__":
    sys.exit(main())
