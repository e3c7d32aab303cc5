"""The benchmark of recording, with the sides that need no package but ours and the model library."""

import json
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
OURS_AND_THE_LIBRARY = {"bare forward", "pipeline"}


@pytest.fixture(scope="module")
def bench():
    """The modules of the benchmark, which are scripts and no part of the package."""
    sys.path.insert(0, str(BENCHMARKS))
    names = ("record", "record_workloads", "record_results", "results")
    yield SimpleNamespace(
        **{name: import_module(name) for name in names},
        tasks=import_module("peers.record_tasks"),
        library=import_module("peers.transformers_record"),
    )
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture
def task(bench, tmp_path):
    workload = bench.record_workloads.WORKLOADS["record-minilm"]
    return workload.first(workload.build(tmp_path, quick=True))


def quick(bench, file, monkeypatch, workload, *more):
    kept = {name: where for name, where in bench.record.SIDES.items() if name in OURS_AND_THE_LIBRARY | {"synapse"}}
    monkeypatch.setattr(bench.record, "SIDES", kept)
    known = bench.record_workloads.WORKLOADS[workload]
    peers = tuple(name for name in known.peers if name in kept)
    monkeypatch.setitem(bench.record_workloads.WORKLOADS, workload, replace(known, peers=peers))
    status = bench.record.main(
        ["--quick", "--workloads", workload, "--repeats", "1", "--no-memory", "--json", str(file), *more]
    )
    return status, json.loads(file.read_text())[0]


def test_a_run_writes_what_it_measured(bench, tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- record: begin -->\nold\n<!-- record: end -->\nafter\n")
    status, figures = quick(bench, tmp_path / "f.json", monkeypatch, "record-minilm", "--markdown", str(page))
    assert status == 0
    assert set(figures["peers"]) == OURS_AND_THE_LIBRARY
    assert figures["n_examples"] == 96
    assert figures["max_abs_diff"] <= 1e-4
    assert figures["peer_diffs"].keys() == {"pipeline"}  # the bare forward has no states to compare
    assert page.read_text().startswith("before\n<!-- record: begin -->\n| workload |")
    assert page.read_text().endswith("<!-- record: end -->\nafter\n")


def test_a_side_whose_states_are_others_does_not_count_as_measured(bench, tmp_path, monkeypatch, capsys):
    class Shuffled(bench.library.FeaturePipeline):
        def run(self, task):
            states = super().run(task).read()
            return bench.tasks.Recording(states[:, ::-1].copy, last_only=True)

    monkeypatch.setattr(bench.library, "FeaturePipeline", Shuffled)
    status, figures = quick(bench, tmp_path / "f.json", monkeypatch, "record-bert-base")
    assert status == 1
    assert set(figures["peers"]) == {"bare forward"}
    said = capsys.readouterr().err
    assert "record-bert-base: pipeline failed: its [CLS] states differ from those of plain hooks by" in said


def test_states_that_are_no_numbers_agree_with_nothing(bench):
    broken = bench.tasks.Recording(np.full((1, 2, 3), np.nan).copy)
    assert broken.difference(np.zeros((1, 2, 3))) == np.inf
    assert bench.tasks.Recording().difference(np.zeros((1, 2, 3))) is None


def test_every_text_is_run_once_and_its_words_are_the_ids_that_it_was_made_of(bench, task):
    assert sorted(np.concatenate(task.buckets).tolist()) == list(range(96))
    assert len(task.buckets) > 1
    for index, inputs in task.batches():
        rows = inputs["input_ids"]
        assert len(rows) == len(index)
        for position, row in zip(index, rows.tolist(), strict=True):
            text = task.examples.inputs[position].split()
            assert [f"w{token}" for token in row[1 : len(text) + 1]] == text


def test_memory_is_said_of_both_numbers_of_examples(bench):
    result = bench.record_results.RecordResult(
        "w", "", 2.0, {"bare forward": 1.9}, 0.95, 0.0, 500.0, n_examples=100, grown_examples=1000, grown_peak_mb=530.0
    )
    assert result.remarks() == [
        "50.0 examples a second",
        "0.95 of the throughput of the bare forward",
        "peak with 100 examples 500 MiB, with 1000 530 MiB: +30 MiB",
    ]


def test_a_workload_that_grows_times_every_nth_text(bench, tmp_path):
    workload = bench.record_workloads.WORKLOADS["record-memory"]
    grown = workload.build(tmp_path, quick=True)
    timed = workload.first(grown)
    assert (len(grown.examples), len(timed.examples)) == (1000, 100)
    assert timed.examples.inputs == grown.examples.inputs[::10]
