"""Measures what workers on a Ray cluster gain: the stages of a study by two of them, by one, and in this process.

Ends with status 1 where a side was not measured, or where its answer is not bitwise that of this process.
"""

import os
import platform
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np
import timing
import torch
import transformers
from command_line import Script, rounds
from results import Result, markdown_rows, place_of, summary, time_of, versions_of
from workloads import Place, Setting, minilm

import synapse as syn
from synapse.execute import Executor, SerialExecutor
from synapse.forecasting import Stage
from synapse.model.resume import clean_pass
from synapse.ranking import Ranking
from synapse.sweeping import KINDS, Grid, Reach, cost_of

OURS, ALONE, ONE = "synapse", "this process", "one worker"
WORKERS = 2


@dataclass(frozen=True, eq=False)
class Work:
    """Something that an executor runs: a stage, its size in items and forward passes, and in words."""

    run: Callable[[Executor | None], np.ndarray]
    stage: Stage
    seconds_per_pass: float
    description: str


def sweep_of_a_study(quick: bool) -> Work:
    """Return a sweep with the default grid of a study, cut to three sizes of sets and one kind."""
    setting = minilm(Place(quick=quick), 16 if quick else 48)
    classifier = setting.classifier
    recorded = syn.record(classifier, setting.examples)
    scores = np.random.default_rng(5).random((classifier.n_layers, 1 + len(classifier.labels), classifier.width))
    ranking = Ranking("order drawn at random", scores, classifier.labels, "no examples")
    grid = Grid(fractions=(0.1, 0.5, 0.9), bottom_fractions=(0.5,), kinds=KINDS[:1])
    cells = syn.plan(ranking, grid)
    first = next(iter(classifier.batches(setting.examples.inputs[:1])))
    reach = Reach.of(classifier, "residual", clean_pass(classifier, first, reuse="residual"))
    cost = cost_of(cells, len(setting.examples), reach)
    n_batches = len(classifier.buckets(setting.examples.inputs))
    passes = round(cost.block_passes / classifier.n_layers)
    stage = Stage("sweep", n_batches * cost.places, passes, 4 * len(classifier.labels) * cost.runs)

    def run(executor: Executor | None) -> np.ndarray:
        return syn.sweep(
            classifier, setting.examples, ranking, reference=recorded, cells=cells, executor=executor
        ).logits

    words = f"{len(cells)} cells of a study's grid; {setting.description}"
    return Work(run, stage, _pace(setting), words)


def recording(quick: bool) -> Work:
    """Return the recording of all layers."""
    setting = minilm(Place(quick=quick), 16 if quick else 2048)
    n_windows = -(-len(setting.examples) // 1024)

    def run(executor: Executor | None) -> np.ndarray:
        return np.asarray(syn.record(setting.classifier, setting.examples, executor=executor).values)

    stage = Stage("record", n_windows, len(setting.examples))
    return Work(run, stage, _pace(setting), setting.description)


def _pace(setting: Setting) -> float:
    """Return the seconds of a forward pass of one example, in this process."""
    batches = list(setting.classifier.batches(setting.examples.inputs))[::4]
    setting.classifier.forward(batches[0])
    seconds, _ = timing.seconds(lambda: [setting.classifier.forward(batch) for batch in batches], torch.device("cpu"))
    return seconds / sum(len(batch.index) for batch in batches)


WORKLOADS = {"scale-sweep": sweep_of_a_study, "scale-record": recording}


@dataclass(frozen=True)
class ScaleResult(Result):
    """The figures of one workload; `predicted` is what the cost model says of each side, without starting workers."""

    predicted: dict[str, float] = field(default_factory=dict)

    def remarks(self) -> Sequence[str]:
        """Return what was predicted."""
        said = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.predicted.items())
        return [f"predicted by the cost model: {said}"]

    def doubts(self) -> Sequence[str]:
        """Return which answers are not bitwise equal."""
        wrong = [name for name, difference in self.peer_diffs.items() if difference != 0]
        return [f"the answer of {name} is not bitwise that of {ALONE}" for name in wrong]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is asked for, print it, write it, and return the exit status."""
    script = Script((__doc__ or "").split("\n")[0], WORKLOADS, (ALONE, ONE), "scale", ScaleResult, markdown_table)
    options = script.parser().parse_args(arguments)
    warnings.filterwarnings("ignore")
    transformers.utils.logging.disable_progress_bar()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # Workers import from here what a task on made-up inputs is built of.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    torch.set_num_threads(options.threads)

    def measure(name: str) -> ScaleResult:
        return measured(name, quick=options.quick, repeats=rounds(options), threads=options.threads)

    return script.run(options, options.workloads or list(WORKLOADS), measure, lambda _: (ALONE, ONE))


def measured(name: str, *, quick: bool, repeats: int, threads: int) -> ScaleResult:
    """Run all sides in turn, so many times, and return the figures."""
    work = WORKLOADS[name](quick)
    times: dict[str, list[float]] = {OURS: [], ALONE: [], ONE: []}
    differences: dict[str, float] = {}
    workers = {OURS: WORKERS, ONE: 1}
    # The workers of one side sleep while another one works.
    with (
        syn.RayExecutor(WORKERS, threads_per_worker=threads, cpus_per_worker=0.5) as two,
        syn.RayExecutor(1, threads_per_worker=threads, cpus_per_worker=0.0) as one,
    ):
        sides: dict[str, Executor] = {OURS: two, ONE: one, ALONE: SerialExecutor()}
        for executor in (two, one):
            work.run(executor)  # workers start, and load the model
        for _ in range(repeats):
            expected = None
            for side in (ALONE, OURS, ONE):
                seconds, answer = timing.seconds(lambda side=side: work.run(sides[side]), torch.device("cpu"))
                times[side].append(seconds)
                expected = answer if expected is None else expected
                if side != ALONE:
                    gap = 0.0 if np.array_equal(answer, expected, equal_nan=True) else 1.0
                    differences[side] = max(differences.get(side, 0.0), gap)
    middle = {side: summary(taken) for side, taken in times.items()}
    peers = {side: seconds for side, (seconds, _) in middle.items() if side != OURS}
    fastest = min(peers, key=lambda side: peers[side])
    return ScaleResult(
        workload=name,
        description=work.description,
        ours_s=middle[OURS][0],
        peers=peers,
        ratio_to_fastest_peer=peers[fastest] / middle[OURS][0],
        max_abs_diff=differences[OURS],
        peak_mb=None,
        fastest_peer=fastest,
        peer_diffs=differences,
        spread={side: ends for side, (_, ends) in middle.items()},
        repeats=dict.fromkeys(times, repeats),
        settings={OURS: f"{WORKERS} workers"},
        threads=threads,
        quick=quick,
        machine=timing.machine(torch.device("cpu")),
        versions={
            **{package: version(package) for package in ("ray", "torch", "numpy", "synapse")},
            "python": platform.python_version(),
        },
        predicted={side: work.stage.seconds(workers.get(side, 1), work.seconds_per_pass) for side in (OURS, ALONE)},
    )


def markdown_table(results: Sequence[ScaleResult]) -> str:
    """Return the figures as they stand in docs/benchmarks.md."""
    head = [
        "workload",
        "two workers",
        "predicted",
        ALONE,
        "predicted",
        ONE,
        f"{ALONE} / two workers",
        f"{ONE} / {ALONE}",
    ]
    rows = [
        [
            f"`{result.workload}`",
            time_of(result, OURS, result.ours_s),
            f"{result.predicted[OURS]:.1f} s",
            time_of(result, ALONE, result.peers[ALONE]),
            f"{result.predicted[ALONE]:.1f} s",
            time_of(result, ONE, result.peers[ONE]),
            f"**{result.peers[ALONE] / (result.ours_s or np.nan):.2f}**",
            f"{result.peers[ONE] / result.peers[ALONE]:.2f}",
        ]
        for result in results
    ]
    lines = markdown_rows(head, rows)
    places = dict.fromkeys(place_of(result) for result in results)
    lines += ["", f"{'; '.join(places)}, float32; {versions_of(results)}.", ""]
    lines += [f"- `{result.workload}`: {result.description}." for result in results]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
