"""The benchmark refuses to call measured what was not: without any peer's package installed."""

import json
import sys
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_models import bert

from synapse.probe.solver import solve
from synapse.ranking.gaussian import greedy_gaussian

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
MODULES = (
    *("command_line", "probe", "probe_workloads", "race", "results"),
    *("sweep", "sweep_results", "timing", "workloads"),
)


@pytest.fixture(scope="module")
def bench():
    """The modules of the benchmark, which are scripts and no part of the package."""
    sys.path.insert(0, str(BENCHMARKS))
    yield SimpleNamespace(
        **{name: import_module(name) for name in MODULES},
        base=import_module("peers.base"),
        side=import_module("peers.side"),
        plain=import_module("peers.plain_hooks"),
        tasks=import_module("peers.probe_tasks"),
        scikit_learn=import_module("peers.scikit_learn"),
        ours_probe=import_module("peers.ours_probe"),
        by_hand=import_module("peers.gaussian_by_hand"),
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
            raise bench.side.RefusedError("such a model is unknown here")

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
    result = bench.sweep_results.SweepResult("w", "", 1.0, {"a": 2.0}, 2.0, 0.0, None, largest_effect=1e-3)
    (said,) = bench.results.problems(result, ["a"])
    assert said == "the edits move no logit by more than 1.0e-03, so that an edit left out would not show"


def test_predictions_count_as_changed_only_above_the_tolerance(bench):
    clean = np.zeros((2, 2), dtype=np.float32)
    reference = bench.base.Answer(np.array([[[1.0, 0.0], [1e-5, 0.0]]], dtype=np.float32), clean)
    answer = bench.base.Answer(np.array([[[0.0, 1.0], [0.0, 1e-5]]], dtype=np.float32), clean)
    assert bench.sweep_results.changed_predictions(answer, reference, 1e-4) == 1
    assert bench.sweep_results.equal_predictions(answer, reference) == 0


def test_logits_that_are_no_numbers_agree_with_nothing(bench):
    clean = np.zeros((1, 2), dtype=np.float32)
    whole = bench.base.Answer(np.zeros((1, 1, 2), dtype=np.float32), clean)
    broken = bench.base.Answer(np.full((1, 1, 2), np.nan, dtype=np.float32), clean)
    assert bench.sweep_results.largest_difference(broken, whole) == np.inf


def test_workloads_are_named_by_their_beginnings(bench):
    known = tuple(bench.workloads.WORKLOADS)
    assert bench.command_line.names_of(known, "decoder,encoder-minilm") == [
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
    assert bench.sweep_results.largest_difference(ours, plain) < 1e-5


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


# ------------------------------------------------------------------------------------------------------------- probes


def quick_probe(bench, file, workload, *more):
    options = ["--quick", "--workloads", workload, "--repeats", "1", "--no-memory", "--json", str(file), *more]
    status = bench.probe.main(options)
    return status, json.loads(file.read_text())[0]


@pytest.fixture(scope="module")
def problem(bench):
    random = np.random.default_rng(0)
    x, targets = random.normal(size=(60, 5)), random.integers(0, 3, 60)
    return bench.tasks.Problem(x, targets, 3, 0.05, 0.5, random.integers(0, 3, 60))


def test_scikit_learn_comes_within_the_tolerance_of_the_certified_optimum(bench, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- probe: begin -->\nold\n<!-- probe: end -->\nafter\n")
    status, figures = quick_probe(bench, tmp_path / "f.json", "probe-penalties-layer", "--markdown", str(page))
    assert status == 0
    assert {"workload", "ours_s", "peers", "ratio_to_fastest_peer", "max_abs_diff", "peak_mb"} <= figures.keys()
    assert figures["ratio_to_fastest_peer"] == figures["peers"]["scikit-learn saga"] / figures["ours_s"]
    assert figures["max_abs_diff"] < figures["peer_diffs"]["scikit-learn saga"] <= 1e-6
    assert figures["settings"]["scikit-learn saga"].endswith(" epochs")
    assert page.read_text().startswith("before\n<!-- probe: begin -->\n| workload |")
    assert page.read_text().endswith("<!-- probe: end -->\nafter\n")


def test_a_fit_that_is_not_at_the_optimum_does_not_count_as_measured(bench, tmp_path, monkeypatch, capsys):
    class Idle(bench.ours_probe.Paths):
        def run(self, task):
            first = task.problems[0]
            zeros = np.zeros((first.n_labels, first.x.shape[1])), np.zeros(first.n_labels)
            return bench.tasks.Fits((zeros,) * len(task.problems))

    monkeypatch.setitem(sys.modules, "stand_ins", SimpleNamespace(Idle=Idle))
    monkeypatch.setitem(bench.probe.PEERS, "scikit-learn lbfgs", "stand_ins:Idle")
    status, figures = quick_probe(bench, tmp_path / "f.json", "probe-penalties-ridge")
    assert status == 1
    assert figures["peers"] == {}
    said = capsys.readouterr().err
    assert "probe-penalties-ridge: scikit-learn lbfgs failed: its answer is off by" in said
    assert "(nats above the certified optimum)." in said


def test_a_probe_library_that_is_not_installed_fails_the_run(bench, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(bench.probe.PEERS, "NeuroX", "no_such_module:Side")
    status, figures = quick_probe(bench, tmp_path / "f.json", "probe-neurox")
    assert status == 1
    assert figures["ours_s"] > 0
    assert figures["max_abs_diff"] is None  # there is nothing to compare with
    said = capsys.readouterr().err
    assert said == "probe-neurox: NeuroX failed: ModuleNotFoundError: No module named 'no_such_module'.\n"


def test_a_bootstrap_is_measured_against_cold_fits_of_the_same_resamples(bench, tmp_path):
    status, figures = quick_probe(bench, tmp_path / "f.json", "probe-bootstrap")
    assert status == 0
    assert list(figures["peers"]) == ["synapse, 10 cold fits", "scikit-learn saga, 10 cold fits"]
    assert max(figures["max_abs_diff"], *figures["peer_diffs"].values()) < 1e-6


def test_a_workload_without_peers_is_ours_alone(bench, tmp_path):
    status, figures = quick_probe(bench, tmp_path / "f.json", "single-neuron-effects-512")
    assert (status, figures["peers"], figures["ratio_to_fastest_peer"]) == (0, {}, None)


def test_the_excess_is_measured_by_the_objective_of_the_solver(bench, problem):
    found = solve(
        problem.x, problem.targets, n_labels=3, penalty=0.05, example_weights=problem.counts.astype(np.float64)
    )
    assert problem.excess(np.zeros((3, 5)), np.zeros(3)) == np.inf  # nothing is known of the floor
    floored = replace(problem, floor=0.0)
    assert floored.excess(found.weights, found.intercept) == pytest.approx(found.objective, abs=1e-12)


@pytest.mark.parametrize("enough", [0, 1, 17, 24, 60])
@pytest.mark.parametrize("first", [0, 24, 30, 80])
def test_the_least_epochs_that_are_enough_are_found_from_anywhere(bench, problem, monkeypatch, enough, first):
    saga = bench.scikit_learn.Saga(bench.tasks.FitTask("", ((problem,),)))
    monkeypatch.setattr(saga, "fitted", lambda _problem, _start, rung: (rung,))
    monkeypatch.setattr(bench.tasks.Problem, "excess", lambda _problem, rung: 0.0 if rung >= enough else 1.0)
    assert saga._least(problem, None, first) == (enough, (enough,))


def test_every_way_to_a_gaussian_probe_takes_the_same_units(bench):
    random = np.random.default_rng(4)
    targets = random.integers(0, 3, 150)
    values = random.normal(size=(150, 7)) + random.normal(size=(3, 7))[targets]
    held_out = greedy_gaussian(values, targets, dimensions=1).held_out
    task = bench.tasks.GaussianTask("", values, targets, 4, held_out)
    sides = {"synapse": bench.ours_probe.Gaussian, "a": bench.by_hand.ScipyGaussian, "b": bench.by_hand.TorchGaussian}
    answers = {name: side(task).run(task) for name, side in sides.items()}
    assert answers["synapse"].units == answers["a"].units
    assert max(task.differences(answers).values()) < 1e-12
    other = replace(answers["synapse"], units=(0, 1, 2, 3))
    assert task.differences(answers | {"synapse": other})["synapse"] == np.inf


def test_effects_that_are_all_nothing_prove_nothing(bench):
    answers = {"captum": bench.tasks.Effects(np.full((1, 2, 3), 1e-3))}
    (said,) = bench.tasks.EffectTask.doubts(None, answers)
    assert said == "no neuron moves a margin by more than 1.0e-03, so that one left out would not show"


def test_a_time_may_be_given_for_a_part(bench):
    class Halves(bench.side.Side):
        parts = 2

        def run(self, task):
            return SimpleNamespace(seconds=3.0)

    race = bench.race.Race(threads=1, repeats=1, memory=False, sides={"halves": Halves()})
    race.run_rounds(SimpleNamespace(device=torch.device("cpu")))
    assert race.figures()["peers"] == {"halves": 1.5}


def test_synthetic_states_are_as_ill_conditioned_as_recorded_ones(bench):
    made = bench.probe_workloads.synthetic(1, 2000, 40)
    correlation = np.corrcoef(made.standardised(0), rowvar=False)
    values = np.linalg.eigvalsh(correlation)[::-1]
    assert values[0] / values[-1] > 300
    assert np.linalg.matrix_rank(correlation) == 40
