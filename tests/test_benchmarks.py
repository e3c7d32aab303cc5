"""The benchmark refuses to call measured what was not: without any peer's package installed."""

import json
import sys
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_models import bert

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def bench():
    """The modules of the benchmark, which are scripts and no part of the package."""
    sys.path.insert(0, str(BENCHMARKS))
    yield SimpleNamespace(
        **{name: import_module(name) for name in ("sweep", "results", "timing", "workloads")},
        base=import_module("peers.base"),
        plain=import_module("peers.plain_hooks"),
    )
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture
def peers(bench, monkeypatch):
    """Two peers that stand in for the real ones: one that edits nothing, one that takes no model."""

    class Idle(bench.plain.PlainHooks):
        def edited(self, task, batch):
            yield from ((cell, self.clean(batch)) for cell in range(len(task.cells)))

    class Unwilling(bench.plain.PlainHooks):
        def __init__(self, task):
            raise bench.base.RefusedError("such a model is unknown here")

    monkeypatch.setitem(sys.modules, "stand_ins", SimpleNamespace(Idle=Idle, Unwilling=Unwilling))
    known = {"plain hooks": bench.sweep.PEERS["plain hooks"]}
    monkeypatch.setattr(bench.sweep, "PEERS", known)
    return known


def quick(bench, file, *more, workload="encoder-last-two"):
    options = ["--quick", "--workloads", workload, "--repeats", "1", "--no-memory", "--json", str(file), *more]
    status = bench.sweep.main(options)
    return status, json.loads(file.read_text())


def test_a_peer_that_is_not_installed_fails_the_run(bench, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(bench.sweep.PEERS, "absent", "no_such_module:Side")
    status, _ = quick(bench, tmp_path / "figures.json", "--peers", "plain hooks,absent")
    assert status == 1
    said = capsys.readouterr().err
    assert "encoder-last-two: absent failed: ModuleNotFoundError: No module named 'no_such_module'." in said
    assert "encoder-last-two: captum was not measured." in said  # not asked for is not measured either


def test_a_run_writes_what_it_measured(bench, peers, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- sweep: begin -->\nold\n<!-- sweep: end -->\nafter\n")
    status, (figures,) = quick(bench, tmp_path / "new" / "figures.json", "--markdown", str(page))
    assert status == 0
    assert {"workload", "ours_s", "peers", "ratio_to_fastest_peer", "max_abs_diff", "peak_mb"} <= figures.keys()
    assert figures["workload"] == "encoder-last-two"
    assert figures["ratio_to_fastest_peer"] == figures["peers"]["plain hooks"] / figures["ours_s"]
    assert figures["share_of_rate"] == pytest.approx(figures["flops"] / figures["ours_s"] / figures["matrix_rate"])
    assert figures["max_abs_diff"] < 1e-4 < figures["largest_effect"]
    assert page.read_text().startswith("before\n<!-- sweep: begin -->\n| workload |")
    assert "old" not in page.read_text()
    assert page.read_text().endswith("<!-- sweep: end -->\nafter\n")


def test_a_peer_that_edits_nothing_does_not_count_as_measured(bench, peers, tmp_path, capsys):
    peers["idle"] = "stand_ins:Idle"
    status, (figures,) = quick(bench, tmp_path / "figures.json")
    assert status == 1
    assert list(figures["peers"]) == ["plain hooks"]
    assert "idle failed: its logits differ from those under plain hooks by" in capsys.readouterr().err


def test_a_peer_that_refuses_the_model_is_listed_with_its_reason(bench, peers, tmp_path, capsys):
    peers["unwilling"] = "stand_ins:Unwilling"
    status, (figures,) = quick(bench, tmp_path / "figures.json")
    assert status == 0
    assert figures["refused"] == {"unwilling": "such a model is unknown here"}
    assert "unwilling cannot: such a model is unknown here" in capsys.readouterr().out


def test_edits_that_move_nothing_prove_nothing(bench):
    result = bench.results.Result("w", "", 1.0, {"a": 2.0}, 2.0, 0.0, None, largest_effect=1e-3)
    (said,) = bench.results.problems(result, ["a"])
    assert said == "the edits move no logit by more than 1.0e-03, so that an edit left out would not show"


def test_predictions_count_as_changed_only_above_the_tolerance(bench):
    clean = np.zeros((2, 2), dtype=np.float32)
    reference = bench.base.Answer(np.array([[[1.0, 0.0], [1e-5, 0.0]]], dtype=np.float32), clean)
    answer = bench.base.Answer(np.array([[[0.0, 1.0], [0.0, 1e-5]]], dtype=np.float32), clean)
    assert bench.results.changed_predictions(answer, reference, 1e-4) == 1
    assert bench.results.equal_predictions(answer, reference) == 0


def test_logits_that_are_no_numbers_agree_with_nothing(bench):
    clean = np.zeros((1, 2), dtype=np.float32)
    whole = bench.base.Answer(np.zeros((1, 1, 2), dtype=np.float32), clean)
    broken = bench.base.Answer(np.full((1, 1, 2), np.nan, dtype=np.float32), clean)
    assert bench.results.largest_difference(broken, whole) == np.inf


def test_workloads_are_named_by_their_beginnings(bench):
    known = tuple(bench.workloads.WORKLOADS)
    assert bench.sweep.names_of(known, "decoder,encoder-minilm") == [
        *(name for name in known if name.startswith("decoder")),
        "encoder-minilm",
    ]
    assert {name.split("-")[0] for name in known} == {"encoder", "decoder", "vision", "single"}
    with pytest.raises(SystemExit):
        bench.sweep.parser().parse_args(["--workloads", "none"])


@pytest.mark.parametrize("name", ["encoder-minilm", "decoder-6", "vision-vit-base", "single-neuron-middle"])
def test_every_side_runs_the_batches_and_rows_of_the_sweep(bench, name):
    built = bench.workloads.WORKLOADS[name].build(bench.workloads.Place(quick=True))
    task, classifier = built.task, built.setting.classifier
    assert sorted(torch.cat([batch.index for batch in task.batches]).tolist()) == list(range(task.n_examples))
    assert [units for _, units in task.cells] == [cell.neurons.units for cell in task.sweep_cells]
    layers = {layer for layer, _ in task.cells}
    assert layers == ({classifier.n_layers // 2 - 1} if name.startswith("single") else set(range(classifier.n_layers)))
    ours = bench.sweep.Ours(classifier, built.ranking, built.reference).run(task)
    plain = bench.plain.PlainHooks(task.with_own_module()).run(task)
    assert bench.results.largest_difference(ours, plain) < 1e-5


def test_a_module_of_its_own_shares_the_weights(bench):
    task = bench.workloads.WORKLOADS["encoder-minilm"].build(bench.workloads.Place(quick=True)).task
    own = task.with_own_module().module
    assert own is not task.module
    assert all(a is b for a, b in zip(own.parameters(), task.module.parameters(), strict=True))


def test_the_arithmetic_of_a_model_is_counted_as_on_paper(bench):
    """A BERT of width d, inner width f, on e examples of t tokens: 2etd(4d + 2f) + 4ettd a block, then the head."""
    module, e, t, d, f = bert(), 3, 7, 16, 24
    with torch.inference_mode():
        counted = bench.timing.flops(partial(module, input_ids=torch.ones(e, t, dtype=torch.int64)))
    block = 2 * e * t * d * (4 * d + 2 * f) + 4 * e * t * t * d
    assert counted == 2 * block + 2 * e * d * d + 2 * e * d * 3


def test_the_rate_of_products_is_a_positive_number(bench):
    assert 1e8 < bench.timing.matrix_rate(16, 24, torch.device("cpu"), torch.float32, spend=0.001) < 1e15


def test_peak_memory_is_that_of_the_call_alone(bench):
    """The one fills 64 MiB more than the other."""
    cpu = torch.device("cpu")
    nothing = bench.timing.peak_mb(int, cpu)
    filled = bench.timing.peak_mb(partial(torch.ones, 2**24), cpu)
    assert filled - nothing == pytest.approx(64, abs=8)


def test_a_failure_while_memory_is_measured_is_said(bench):
    with pytest.raises(RuntimeError, match="measure with --no-memory"):
        bench.timing.peak_mb(partial(int, "no number"), torch.device("cpu"))
