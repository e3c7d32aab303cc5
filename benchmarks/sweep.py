"""Measures a sweep of synapse against plain hooks and against the peers: the same model, batches, cells and threads.

Ends with status 1 where a peer that can do a workload was not measured, where logits differ, or a prediction does.
"""

import argparse
import gc
import json
import os
import platform
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import timing
import torch
import transformers
from peers.base import Answer, RefusedError, Side, Task
from peers.ours import Ours
from results import (
    TOLERANCE,
    Result,
    changed_predictions,
    equal_predictions,
    largest_difference,
    markdown_table,
    problems,
    summary,
    text_table,
    with_table,
)
from workloads import WORKLOADS, Built, Place, Workload

PEERS = {
    "plain hooks": "peers.plain_hooks:PlainHooks",
    "nnsight": "peers.nnsight_traces:NnsightTraces",
    "pyvene": "peers.pyvene_model:PyveneModel",
    "captum": "peers.captum_ablation:CaptumAblation",
    "TransformerLens": "peers.transformer_lens:TransformerLens",
}
"""The peers and where their sides are; each is imported when it is needed, so that one that is missing is said so."""

PLAIN = "plain hooks"

FAR_BEHIND = 2.0
"""A peer that takes this many times as long as the fastest in the first round is out of the race: it runs no more."""

MARK = "sweep"
"""What stands around the table in docs/benchmarks.md."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is asked for, print it, write it, and return the exit status."""
    options = parser().parse_args(arguments)
    warnings.filterwarnings("ignore")
    transformers.utils.logging.disable_progress_bar()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if options.table_of:
        earlier = [Result(**entry) for file in options.table_of for entry in json.loads(file.read_text())]
        write_table(earlier, options.markdown)
        return 0
    device = "cuda" if options.device == "auto" and torch.cuda.is_available() else options.device
    device = "cpu" if device == "auto" else device
    place = Place(device, getattr(torch, options.dtype), options.quick)
    repeats = options.repeats or (2 if options.quick else 3)
    results, wrong = [], []
    for name in chosen(options.workloads, device):
        run = Measurement(WORKLOADS[name], place, options.peers, options.threads, repeats, options.memory)
        result = run.result()
        results.append(result)
        say(text_table([result]) + "\n")
        wrong += [f"{name}: {problem}." for problem in problems(result, list(PEERS))]
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps([each.to_dict() for each in results], indent=1) + "\n")
    write_table(results, options.markdown)
    stop_peers()
    for problem in wrong:
        sys.stderr.write(problem + "\n")
    return 1 if wrong else 0


def write_table(results: Sequence[Result], page: Path | None) -> None:
    """Write the table of results into a page, if there is one."""
    if page:
        before = page.read_text() if page.is_file() else ""
        page.write_text(with_table(before, markdown_table(results), MARK))


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    made = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    made.add_argument("--quick", action="store_true", help="small models of the same kinds: does everything work?")
    made.add_argument(
        "--workloads", type=partial(names_of, tuple(WORKLOADS)), help="by name or its beginning, with commas"
    )
    made.add_argument("--threads", type=int, default=1, help="threads of every side (default 1)")
    made.add_argument("--repeats", type=int, help="rounds of all sides (default 3; 2 with --quick)")
    made.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    made.add_argument("--markdown", type=Path, metavar="FILE", help="write the table into that page")
    made.add_argument(
        "--table-of", type=Path, nargs="+", metavar="FILE", help="no run: the table of earlier JSON files"
    )
    made.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    made.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights, on all sides"
    )
    made.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure peak memory too")
    made.add_argument(
        "--peers",
        type=partial(names_of, tuple(PEERS)),
        default=list(PEERS),
        help="only these; for work on the script, as the run then fails for want of the others",
    )
    return made


def names_of(known: Sequence[str], text: str) -> list[str]:
    """Return the names of a list with commas, each given in full or by its beginning."""
    found: dict[str, None] = {}
    for part in text.split(","):
        matching = [name for name in known if name.startswith(part.strip())]
        if not matching:
            raise argparse.ArgumentTypeError(f"nothing is called {part.strip()!r}; there are {', '.join(known)}")
        found |= dict.fromkeys([part.strip()] if part.strip() in known else matching)
    return list(found)


def chosen(asked: Sequence[str] | None, device: str) -> list[str]:
    """Return the workloads to run: those asked for, or all that fit the device."""
    return list(asked) if asked else [w.name for w in WORKLOADS.values() if device == "cuda" or not w.needs_gpu]


@dataclass(eq=False)
class Measurement:
    """One workload, measured: what was found so far about each side, by name."""

    workload: Workload
    place: Place
    peers: Sequence[str]
    threads: int
    repeats: int
    memory: bool
    sides: dict[str, Side] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    peaks: dict[str, float] = field(default_factory=dict)
    times: dict[str, list[float]] = field(default_factory=dict)
    answers: dict[str, Answer] = field(default_factory=dict)
    differences: dict[str, float] = field(default_factory=dict)

    def result(self) -> Result:
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
            self._try(name, lambda side: side.prepare(built.task.small()))
        for round_number in range(self.repeats):
            self._run_round(built.task, first=round_number == 0)
        reference32 = self._float32()
        tolerance = self._tolerance(reference32)
        self._compare(tolerance)
        result = self._figures(built, tolerance, reference32)
        for side in self.sides.values():
            side.close()
        gc.unfreeze()
        return result

    def _make_sides(self, built: Built) -> None:
        self.versions["torch"] = version("torch")
        self.versions["transformers"] = version("transformers")
        self.sides["synapse"] = Ours(built.setting.classifier, built.ranking, built.reference)
        self.versions["synapse"] = Ours.version()
        for name in self.peers:
            module, _, kind = PEERS[name].partition(":")
            try:
                side = getattr(import_module(module), kind)
                self.versions[side.package] = side.version()
                self.sides[name] = side(built.task.with_own_module())
            except RefusedError as reason:
                self.refused[name] = str(reason)
            except Exception as error:  # any failure of a peer is reported, and fails the run
                self.failed[name] = f"{type(error).__name__}: {error}"

    def _try(self, name: str, work: Callable[[Side], Any]) -> Any:
        """Return what the work gives; a side that fails is left out from now on, and the run fails at its end."""
        try:
            return work(self.sides[name])
        except Exception as error:
            self.failed[name] = f"{type(error).__name__}: {error}"
            self.sides.pop(name).close()
            self.times.pop(name, None)
            return None

    def _measure_memory(self, task: Task) -> None:
        small = task.small()
        for name in list(self.sides):
            # A peer runs one cell after the other, so the longest batch under a few of them says it all.
            peak = self._try(name, lambda side, n=name: side.peak_mb(task if n == "synapse" else small))
            if peak is not None:
                self.peaks[name] = peak

    def _run_round(self, task: Task, *, first: bool) -> None:
        racing = [name for name in self.sides if first or name == "synapse" or not self._is_far_behind(name)]
        for name in racing:
            measured = self._try(name, lambda side: timing.seconds(partial(side.run, task), task.device))
            if measured is None:
                continue
            took, answer = measured
            self.times.setdefault(name, []).append(took if answer.seconds is None else answer.seconds)
            reference = self.answers.get(PLAIN)
            if name != PLAIN and reference is not None:
                difference = largest_difference(answer, reference)
                self.differences[name] = max(self.differences.get(name, 0.0), difference)
            self.answers[name] = answer

    def _is_far_behind(self, name: str) -> bool:
        others = [times[0] for peer, times in self.times.items() if peer != "synapse"]
        return self.times[name][0] > FAR_BEHIND * min(others)

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
                self.failed[name] = f"its logits differ from those under plain hooks by {difference:.1e}"
                del self.times[name]

    def _figures(self, built: Built, tolerance: float, reference32: tuple[float, Answer] | None) -> Result:
        measured = {name: summary(times) for name, times in self.times.items()}
        ours_s = measured["synapse"][0] if "synapse" in measured else None
        peers = {name: middle for name, (middle, _) in measured.items() if name != "synapse"}
        fastest = min(peers, key=lambda name: peers[name]) if peers else None
        plain, ours = self.answers.get(PLAIN), self.answers.get("synapse")
        both = plain is not None and ours is not None
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
        return Result(
            workload=self.workload.name,
            description=built.setting.description,
            ours_s=ours_s,
            peers=peers,
            ratio_to_fastest_peer=peers[fastest] / ours_s if fastest and ours_s else None,
            max_abs_diff=self.differences.get("synapse"),
            peak_mb=self.peaks.get("synapse"),
            fastest_peer=fastest,
            refused=self.refused,
            failed=self.failed,
            peer_diffs={name: value for name, value in self.differences.items() if name != "synapse"},
            peers_peak_mb={name: value for name, value in self.peaks.items() if name != "synapse"},
            spread={name: spread for name, (_, spread) in measured.items()},
            repeats={name: len(times) for name, times in self.times.items()},
            settings={
                name: f"{together} at once" for name, side in self.sides.items() if (together := side.together) > 1
            },
            n_cells=len(built.task.cells),
            n_examples=built.task.n_examples,
            n_batches=len(built.task.batches),
            largest_effect=float(np.abs(plain.logits - plain.clean).max()) if plain is not None else 0.0,
            changed=changed_predictions(ours, plain, tolerance) if both else 0,
            tolerance=tolerance,
            equal_to_float32=equal_predictions(ours, reference32[1]) if reference32 and ours else None,
            float32_peer_s=reference32[0] if reference32 else None,
            ratio_to_float32_peer=reference32[0] / ours_s if reference32 and ours_s else None,
            run_plain=our_side.run_plain if isinstance(our_side, Ours) else (),
            flops=count,
            matrix_rate=rate,
            share_of_rate=count / ours_s / rate if count and ours_s else None,
            threads=self.threads,
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


def say(text: str) -> None:
    """Print, at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
