"""Measures recording by synapse against the bare forward and the peers: the same model, texts and threads.

Ends with status 1 where a peer that can do a workload was not measured, or where [CLS] states differ.
"""

import gc
import os
import platform
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import timing
import torch
import transformers
from command_line import Script, rounds
from peers.record_tasks import Recording, RecordTask
from race import OURS, Race, without_ours
from record_results import TOLERANCE, RecordResult, markdown_table
from record_workloads import WORKLOADS, Workload

SIDES = {
    OURS: "peers.ours_record:Recorder",
    "bare forward": "peers.transformers_record:BareForward",
    "pipeline": "peers.transformers_record:FeaturePipeline",
    "nnsight": "peers.nnsight_cache:NnsightCache",
    "captum": "peers.captum_store:CaptumStore",
    "NeuroX": "peers.neurox_extract:NeuroxExtract",
    "NeuroX, JSON": "peers.neurox_extract:NeuroxJson",
}
"""Where the sides are; a workload names the peers that take part."""

ROUNDS = 5
"""Rounds of all sides at full size, where nothing else is asked for."""

FAR_BEHIND = 5.0
"""A peer that takes this many times as long as the fastest in the first round runs no more: later than elsewhere, so
that what is said of slow ones is a median too."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is asked for, print it, write it, and return the exit status."""
    peers = [name for name in SIDES if name != OURS]
    script = Script((__doc__ or "").split("\n")[0], WORKLOADS, peers, "record", RecordResult, markdown_table)
    options = script.parser().parse_args(arguments)
    warnings.filterwarnings("ignore")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # NeuroX loads a model without its head, and would be told so
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    repeats = rounds(options) if options.repeats or options.quick else ROUNDS

    def measure(name: str) -> RecordResult:
        workload = WORKLOADS[name]
        race = Measurement(
            workload=workload,
            peers=[peer for peer in workload.peers if not options.peers or peer in options.peers],
            quick=options.quick,
            threads=options.threads,
            repeats=repeats,
            memory=options.memory,
        )
        with tempfile.TemporaryDirectory() as folder:
            return race.result(Path(folder))

    return script.run(options, options.workloads or list(WORKLOADS), measure, lambda name: WORKLOADS[name].peers)


@dataclass(eq=False, kw_only=True)
class Measurement(Race):
    """One workload, measured; `differences` are those of the states from the plain hooks', by side."""

    workload: Workload
    peers: Sequence[str]
    quick: bool
    differences: dict[str, float] = field(default_factory=dict)
    reference: RecordTask | None = None

    def result(self, folder: Path) -> RecordResult:
        """Measure, and return the figures; sides may write into the folder."""
        # Memory is measured in forks, and a fork of a process with threads may never end.
        torch.set_num_threads(1)
        work = folder / "work"
        work.mkdir()
        grown = self.workload.build(work, quick=self.quick)
        task = self.reference = self.workload.first(grown)
        self.versions |= {name: version(name) for name in ("torch", "transformers", "numpy")}
        for name in (OURS, *self.peers):
            self.enter(name, SIDES[name], task.with_own_module)
        # What lives as long as the workload need not be looked through before every run.
        gc.collect()
        gc.freeze()
        grown_peak = self._measure_memory(task, grown) if self.memory else None
        torch.set_num_threads(self.threads)
        for name in list(self.sides):
            self.attempt(name, lambda side: side.prepare(task))
        self.run_rounds(task)
        for name, difference in self.differences.items():
            if name in self.times and not difference <= TOLERANCE:
                self.strike(name, f"its [CLS] states differ from those of plain hooks by {difference:.1e}")
        for side in self.sides.values():
            side.close()
        gc.unfreeze()
        return self._figures(task, grown, grown_peak)

    def note(self, name: str, answer: Recording) -> None:
        """Compare the states with the plain hooks', then forget them."""
        self.attempt(name, lambda _side: self._compare(name, answer))
        self.answers.pop(name)
        assert self.reference is not None
        self.reference.empty()

    def _compare(self, name: str, answer: Recording) -> None:
        assert self.reference is not None
        difference = answer.difference(self.reference.reference)
        if difference is not None:
            self.differences[name] = max(self.differences.get(name, 0.0), difference)

    def _is_far_behind(self, name: str) -> bool:
        others = [times[0] for peer, times in self.times.items() if peer != OURS]
        return name != OURS and self.times[name][0] > FAR_BEHIND * min(others)

    def _measure_memory(self, task: RecordTask, grown: RecordTask) -> float | None:
        """Measure every side's peak memory, and return ours on the grown task, where there is one."""
        for name in list(self.sides):
            peak = self.attempt(name, lambda side: side.peak_mb(task))
            if peak is not None:
                self.peaks[name] = peak
            task.empty()
        if self.workload.growth == 1 or OURS not in self.sides:
            return None
        peak = self.attempt(OURS, lambda side: side.peak_mb(grown))
        task.empty()
        return None if peak is None else float(peak)

    def _figures(self, task: RecordTask, grown: RecordTask, grown_peak: float | None) -> RecordResult:
        return RecordResult(
            **self.figures(),
            workload=self.workload.name,
            description=task.description,
            max_abs_diff=self.differences.get(OURS),
            peer_diffs=without_ours(self.differences),
            tolerance=TOLERANCE,
            n_examples=len(task.examples),
            grown_examples=None if grown_peak is None else len(grown.examples),
            grown_peak_mb=grown_peak,
            quick=self.quick,
            machine=timing.machine(task.device),
            versions=self.versions | {"python": platform.python_version()},
        )


if __name__ == "__main__":
    sys.exit(main())
