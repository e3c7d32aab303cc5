"""Measures a sweep of synapse against plain hooks and against the peers: the same model, batches, cells and threads.

Ends with status 1 where a peer that can do a workload was not measured, where logits differ, or a prediction does.
"""

import argparse
import gc
import os
import platform
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from typing import Any

import numpy as np
import timing
import torch
import transformers
from command_line import Script, rounds
from peers.base import Answer, Task
from peers.ours import Ours
from race import Race, without_ours
from results import summary
from sweep_results import (
    TOLERANCE,
    SweepResult,
    changed_predictions,
    equal_predictions,
    largest_difference,
    markdown_table,
)
from workloads import WORKLOADS, Built, Place, Workload

PEERS = {
    "plain hooks": "peers.plain_hooks:PlainHooks",
    "nnsight": "peers.nnsight_traces:NnsightTraces",
    "pyvene": "peers.pyvene_model:PyveneModel",
    "captum": "peers.captum_ablation:CaptumAblation",
    "TransformerLens": "peers.transformer_lens:TransformerLens",
}
"""The peers and where their sides are."""

PLAIN = "plain hooks"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is asked for, print it, write it, and return the exit status."""
    options = parser().parse_args(arguments)
    warnings.filterwarnings("ignore")
    transformers.utils.logging.disable_progress_bar()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    device = "cuda" if options.device == "auto" and torch.cuda.is_available() else options.device
    device = "cpu" if device == "auto" else device
    place = Place(device, getattr(torch, options.dtype), options.quick)

    def measure(name: str) -> SweepResult:
        race = Measurement(
            workload=WORKLOADS[name],
            place=place,
            peers=options.peers or list(PEERS),
            threads=options.threads,
            repeats=rounds(options),
            memory=options.memory,
        )
        return race.result()

    status = script().run(options, chosen(options.workloads, device), measure, lambda _: list(PEERS))
    stop_peers()
    return status


def script() -> Script:
    """Return what the command line is made from."""
    return Script((__doc__ or "").split("\n")[0], WORKLOADS, list(PEERS), "sweep", SweepResult, markdown_table)


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    made = script().parser()
    made.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    made.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights, on all sides"
    )
    return made


def chosen(asked: Sequence[str] | None, device: str) -> list[str]:
    """Return the workloads to run: those asked for, or all that fit the device."""
    return list(asked) if asked else [w.name for w in WORKLOADS.values() if device == "cuda" or not w.needs_gpu]


@dataclass(eq=False, kw_only=True)
class Measurement(Race):
    """One workload, measured; `differences` are those of the logits from the plain hooks', by side."""

    workload: Workload
    place: Place
    peers: Sequence[str]
    differences: dict[str, float] = field(default_factory=dict)

    def result(self) -> SweepResult:
        """Measure, and return the figures."""
        # Memory is measured in forks, and a fork of a process with threads may never end.
        torch.set_num_threads(1)
        built = self.workload.build(self.place)
        self._make_sides(built)
        # What lives as long as the workload need not be looked through before every run.
        gc.collect()
        gc.freeze()
        if self.memory:
            self._measure_memory(built.task)
        torch.set_num_threads(self.threads)
        for name in list(self.sides):
            self.attempt(name, lambda side: side.prepare(built.task.small()))
        self.run_rounds(built.task)
        reference32 = self._float32()
        tolerance = self._tolerance(reference32)
        self._compare(tolerance)
        result = self._figures(built, tolerance, reference32)
        for side in self.sides.values():
            side.close()
        gc.unfreeze()
        return result

    def _make_sides(self, built: Built) -> None:
        self.versions |= {name: version(name) for name in ("torch", "transformers")}
        self.sides["synapse"] = Ours(built.setting.classifier, built.ranking, built.reference)
        self.versions["synapse"] = Ours.version()
        for name in self.peers:
            self.enter(name, PEERS[name], built.task.with_own_module)

    def _measure_memory(self, task: Task) -> None:
        small = task.small()
        for name in list(self.sides):
            # A peer runs one cell after the other, so the longest batch under a few of them says it all.
            peak = self.attempt(name, lambda side, n=name: side.peak_mb(task if n == "synapse" else small))
            if peak is not None:
                self.peaks[name] = peak

    def note(self, name: str, answer: Answer) -> None:
        """Compare an answer with the plain hooks'."""
        reference = self.answers.get(PLAIN)
        if name != PLAIN and reference is not None:
            difference = largest_difference(answer, reference)
            self.differences[name] = max(self.differences.get(name, 0.0), difference)

    def _float32(self) -> tuple[float, Answer] | None:
        """Return time and answer of plain hooks in float32 where the sides ran in another precision."""
        if self.place.dtype == torch.float32 or PLAIN not in self.sides:
            return None
        task = self.workload.build(replace(self.place, dtype=torch.float32)).task
        side = type(self.sides[PLAIN])(task)  # type: ignore[call-arg]
        side.prepare(task.small())
        runs = [timing.seconds(partial(side.run, task), task.device) for _ in range(self.repeats)]
        return summary([took for took, _ in runs])[0], runs[0][1]

    def _tolerance(self, reference32: tuple[float, Answer] | None) -> float:
        """Return how far logits may be apart: in a coarser precision, twice what that precision itself does to them."""
        if reference32 is None or PLAIN not in self.answers:
            return TOLERANCE
        return max(TOLERANCE, 2 * largest_difference(self.answers[PLAIN], reference32[1]))

    def _compare(self, tolerance: float) -> None:
        """Strike out what does not agree with the plain hooks."""
        reference = self.answers.get(PLAIN)
        for name in list(self.times):
            if name == PLAIN:
                continue
            if reference is not None and name not in self.differences:
                self.differences[name] = largest_difference(self.answers[name], reference)
            difference = self.differences.get(name, float("inf"))
            if difference > tolerance:
                self.strike(name, f"its logits differ from those under plain hooks by {difference:.1e}")

    def _figures(self, built: Built, tolerance: float, reference32: tuple[float, Answer] | None) -> SweepResult:
        figures = self.figures()
        ours_s = figures["ours_s"]
        plain, ours = self.answers.get(PLAIN), self.answers.get("synapse")
        config: Any = built.task.module.config
        count = timing.flops(partial(self.sides["synapse"].run, built.task)) if ours_s else None
        rate = timing.matrix_rate(
            config.hidden_size,
            config.intermediate_size,
            built.task.device,
            self.place.dtype,
            spend=0.02 if self.place.quick else 0.15,
        )
        our_side = self.sides.get("synapse")
        return SweepResult(
            **figures,
            workload=self.workload.name,
            description=built.setting.description,
            max_abs_diff=self.differences.get("synapse"),
            peer_diffs=without_ours(self.differences),
            n_cells=len(built.task.cells),
            n_examples=built.task.n_examples,
            n_batches=len(built.task.batches),
            largest_effect=float(np.abs(plain.logits - plain.clean).max()) if plain is not None else 0.0,
            changed=changed_predictions(ours, plain, tolerance) if plain is not None and ours is not None else 0,
            tolerance=tolerance,
            equal_to_float32=equal_predictions(ours, reference32[1]) if reference32 and ours else None,
            float32_peer_s=reference32[0] if reference32 else None,
            ratio_to_float32_peer=reference32[0] / ours_s if reference32 and ours_s else None,
            run_plain=our_side.run_plain if isinstance(our_side, Ours) else (),
            flops=count,
            matrix_rate=rate,
            share_of_rate=count / ours_s / rate if count and ours_s else None,
            device=str(built.task.device),
            dtype=str(self.place.dtype).removeprefix("torch."),
            quick=self.place.quick,
            machine=timing.machine(built.task.device),
            versions=self.versions | {"python": platform.python_version()},
        )


def stop_peers() -> None:
    """End what a peer may have running beside this process."""
    found = sys.modules.get("peers.transformer_lens")
    if found is not None:
        found.stop()


if __name__ == "__main__":
    sys.exit(main())
