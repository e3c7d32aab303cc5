"""The benchmark of attacks: every side is plain code, scipy or ours, so that all of them run here."""

import json
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from synapse.perturb.bits import StoredWeight

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def bench():
    """The modules of the benchmark, which are scripts and no part of the package."""
    sys.path.insert(0, str(BENCHMARKS))
    yield SimpleNamespace(
        attack=import_module("attack"),
        workloads=import_module("attack_workloads"),
        **{name: import_module(f"peers.{name}") for name in ("attack_tasks", "ours_attack", "plain_bits")},
        scipy_pairs=import_module("peers.scipy_pairs"),
        deepfool=import_module("peers.plain_deepfool"),
    )
    sys.path.remove(str(BENCHMARKS))


def quick(bench, file, workload, *more):
    status = bench.attack.main(
        ["--quick", "--workloads", workload, "--repeats", "1", "--no-memory", "--json", str(file), *more]
    )
    return status, json.loads(file.read_text())[0]


def test_a_run_writes_what_it_measured(bench, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- attack: begin -->\nold\n<!-- attack: end -->\nafter\n")
    status, figures = quick(bench, tmp_path / "f.json", "attack-bits-scoring-int8", "--markdown", str(page))
    assert status == 0
    assert {"workload", "ours_s", "peers", "ratio_to_fastest_peer", "max_abs_diff", "peak_mb"} <= figures.keys()
    assert figures["ratio_to_fastest_peer"] == figures["peers"]["plain torch"] / figures["ours_s"]
    assert figures["max_abs_diff"] < 1e-4
    assert page.read_text().startswith("before\n<!-- attack: begin -->\n| workload |")
    assert page.read_text().endswith("<!-- attack: end -->\nafter\n")


def test_every_workload_begins_with_attack_and_knows_its_peers(bench):
    assert all(name.startswith("attack-") for name in bench.workloads.WORKLOADS)
    assert {peer for one in bench.workloads.WORKLOADS.values() for peer in one.peers} == set(bench.attack.PEERS)


def test_a_peer_that_finds_other_flips_does_not_count_as_measured(bench, tmp_path, monkeypatch, capsys):
    class Worst(bench.plain_bits.PlainBits):
        def run(self, task):
            return super().run(replace(task, gradients=tuple(-g for g in task.gradients)))

    monkeypatch.setitem(sys.modules, "stand_ins", SimpleNamespace(Worst=Worst))
    monkeypatch.setitem(bench.attack.PEERS, "plain torch", "stand_ins:Worst")
    status, figures = quick(bench, tmp_path / "f.json", "attack-bits-scoring-int8")
    assert status == 1
    assert figures["ours_s"] is None  # nobody knows which of the two is right
    assert "attack-bits-scoring-int8: synapse failed: its answer is off by inf" in capsys.readouterr().err


@pytest.mark.parametrize("number_format", ["float32", "float16", "bfloat16", "int8"])
def test_plain_scores_are_ours(bench, number_format):
    rng = np.random.default_rng(3)
    weights = [torch.from_numpy(rng.normal(size=shape).astype(np.float32)) for shape in ((6, 9), (4, 7))]
    gradients = tuple(torch.from_numpy(rng.normal(size=w.shape).astype(np.float32)) for w in weights)
    stored = tuple(StoredWeight.of(weight, number_format) for weight in weights)
    task = bench.attack_tasks.BitTask("", stored, gradients, (0, 5, 7), 4)
    answers = {"synapse": bench.ours_attack.BitScoring(task).run(task), "p": bench.plain_bits.PlainBits(task).run(task)}
    assert task.differences(answers)["synapse"] < 1e-5
    np.testing.assert_array_equal(answers["synapse"].places, answers["p"].places)


def test_both_solvers_find_the_shortest_step_of_one_example(bench):
    """It is r h / ||h||^2."""
    h = np.array([[3.0, 4.0]])
    for side in (bench.scipy_pairs.Slsqp, bench.scipy_pairs.DualLbfgs):
        np.testing.assert_allclose(side(None).solve(h, np.array([10.0])), [1.2, 1.6], atol=1e-4)


def test_edits_are_judged_by_the_norm_at_which_they_redirect_their_share_of_other_examples(bench, tmp_path):
    status, _ = quick(bench, tmp_path / "f.json", "attack-head-pairs")
    assert status == 0
    task = bench.workloads.pairs(True)
    edit = np.zeros(task.weight.shape)
    edit[1], edit[0] = task.train.features[0], -task.train.features[0]
    (norm,) = task.norms(bench.attack_tasks.Edits({(0, 1, 0.5): edit}))
    chosen = (task.test.targets == 0) & (task.test.predictions == 0)
    scaled = edit / np.linalg.norm(edit) * norm * np.linalg.norm(task.weight)
    logits = task.test.known_logits + task.test.features @ scaled.T
    assert (logits[chosen].argmax(axis=1) == 1).mean() == pytest.approx(0.5, abs=0.05)
    assert bench.attack_tasks.PairTask.doubts(task, {"a": bench.attack_tasks.Edits({(0, 1, 0.5): edit})}) == []
    wrong = bench.attack_tasks.Edits({(0, 1, 0.5): edit}, {(0, 1, 0.5): 2 * norm})
    assert "says that (0, 1, 0.5) needs a norm of" in task.doubts({"a": wrong})[0]


def test_edits_of_states_that_change_nothing_are_infinitely_long(bench):
    task = bench.workloads.edits(True).small()
    found = bench.deepfool.DeepFool(task).run(task)
    assert task.changed(found.edits).all()
    idle = bench.attack_tasks.FoundEdits(np.zeros_like(found.edits))
    assert np.isinf(task.norms(idle)).all()
    assert task.differences({"synapse": found, "idle": idle}) == {"synapse": 0.0, "idle": 1.0}
    longer = bench.attack_tasks.FoundEdits(1.5 * found.edits)
    (said,) = task.doubts({"synapse": longer, "p": found})
    assert said == "edits of synapse are 50.0% longer than the shortest"
