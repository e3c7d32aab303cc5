import json
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import pytest
from planted import B_UNIT, C_UNIT, planted_classifier, planted_examples

from synapse.attack.edits import HeadEdits
from synapse.attack.families import FAMILIES
from synapse.errors import ConvergenceError, RestoreError, RunFolderError, SettingsError, SplitError
from synapse.ranking import METHODS, RankingMethod, Scores
from synapse.ranking.gradients import Taylor
from synapse.ranking.weights import LinearWeight
from synapse.report import summary_lines
from synapse.report.run import open_run
from synapse.settings import make_settings, read_settings
from synapse.study import run_study

QUICK = {"examples": 30, "train_examples": 120, "fractions": (0.1, 0.5, 1.0), "kinds": ("zero", "noise")}


def study(out, *, classifier=None, train_seed=1, test_seed=2, progress=lambda *_: None, **changes):
    return run_study(
        classifier or planted_classifier(),
        planted_examples(150, seed=train_seed),
        planted_examples(60, seed=test_seed),
        settings=make_settings(**{**QUICK, **changes}),
        out=out,
        progress=progress,
    )


@pytest.fixture(scope="module")
def planted_run(tmp_path_factory):
    return study(tmp_path_factory.mktemp("runs") / "planted")


def test_a_run_folder_holds_what_it_promises(planted_run):
    names = {str(path.relative_to(planted_run)) for path in planted_run.rglob("*") if path.parent.name != "logits.zarr"}
    known = ("probe", "ranking", "rank_stability", "agreement", "sweep", "attack", "defence")
    tables = {f"tables/{name}.parquet" for name in known}
    assert {"manifest.json", "scorecard.json", "report.html", "logits.zarr", *tables} <= names
    manifest = json.loads((planted_run / "manifest.json").read_text())
    assert manifest["status"] == "complete"
    n_cells = len(pd.read_parquet(planted_run / "tables" / "sweep.parquet"))
    reuse = manifest["sweep"].pop("reuse")
    assert manifest["sweep"] == {
        "examples": 30,
        "cells": n_cells,
        "sampled": True,
        "run_plain": [],
        "reasons": {},
        "agreement": None,
    }
    assert {place.split(", ")[0] for place in reuse} == {"residual of layer 0", "residual of layer 1"}
    assert set(reuse.values()) <= {"rows", "prefix"}


def test_the_planted_neurons_come_first_by_every_method(planted_run):
    ranking = pd.read_parquet(planted_run / "tables" / "ranking.parquet")
    first = ranking[(ranking["rank"] == 0) & (ranking["method"] != "random")]
    assert set(first["method"]) == {"cumulative-mass", "linear", "probeless"}
    assert set(first[first["label"] == "b"]["unit"]) == {B_UNIT}
    assert set(first[first["label"] == "c"]["unit"]) == {C_UNIT}


@dataclass(frozen=True)
class Reversed(RankingMethod):
    """The opposite of what the weights of the probe say."""

    needs = ("probes",)

    @property
    def name(self):
        return "reversed"

    def scores(self, evidence):
        return Scores(-LinearWeight().scores(evidence).values)


def test_a_study_says_which_of_its_rankings_is_faithful(tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "reversed", Reversed())
    run = study(tmp_path / "run", methods=("reversed", "linear", "random"), kinds=("zero",))
    card = json.loads((run / "scorecard.json").read_text())
    best = card["faithfulness"]["best_overall"]["all"]
    assert (best["method"], best["second"]) == ("linear", "reversed")
    assert best["lead"]["low"] > 0
    assert set(card["faithfulness"]["quality"]["all"]["0"]) == {"linear", "reversed"}
    assert card["faithfulness"]["overall"]["all"]["reversed"]["high"] < 0
    # everything else is still about the first ranking, which was swept in full
    sweep = pd.read_parquet(run / "tables" / "sweep.parquet")
    assert set(sweep.loc[sweep["selection"] == "bottom", "method"]) == {"reversed"}
    assert open_run(run).method == "reversed"
    agreement = pd.read_parquet(run / "tables" / "agreement.parquet")
    pairs = agreement[(agreement["method"] == "reversed") & (agreement["other"] == "linear")]
    assert pairs["tau"].tolist() == pytest.approx([-1] * 8)  # two layers, all classes and each of three
    line = next(line for line in summary_lines(run) if "the most faithful" in line)
    assert line.startswith("Of 2 rankings linear is the most faithful: removing the units that it ranks highest costs")


def test_a_study_of_one_method_judges_none_beside_it(tmp_path):
    run = study(tmp_path / "run", methods=("linear", "random"), kinds=("zero",))
    assert json.loads((run / "scorecard.json").read_text())["faithfulness"]["quality"] == {}
    assert not [line for line in summary_lines(run) if "faithful" in line]


def test_the_planted_neurons_would_come_first_again(planted_run):
    card = json.loads((planted_run / "scorecard.json").read_text())["rank_stability"]
    table = pd.read_parquet(planted_run / "tables" / "rank_stability.parquet")
    assert card["settled"]["1"] == {
        "value": 2.0, "low": None, "high": None, "n": 100, "unit": "units", "note": "of 2"
    }  # fmt: skip
    assert card["kuncheva"]["1"]["value"] == 1.0
    assert set(card["nogueira_of_class"]["1"]) == {"a", "b", "c"}
    assert len(table) == 2 * 4 * 16
    assert set(table["method"]) == {"cumulative-mass"}
    planted = table[(table["label"] == "") & table["unit"].isin([B_UNIT, C_UNIT])]
    assert set(planted["top_probability"]) == {1.0}
    assert any(line.startswith("Ranked again by cumulative-mass on 100 draws") for line in summary_lines(planted_run))


def test_a_study_without_draws_has_no_table_of_them(tmp_path):
    run = study(tmp_path / "run", methods=("linear",), kinds=("zero",), rank_draws=0)
    assert not (run / "tables" / "rank_stability.parquet").exists()
    assert json.loads((run / "scorecard.json").read_text())["rank_stability"] == {}
    assert not [line for line in summary_lines(run) if "Ranked again" in line]


def test_a_ranking_that_runs_the_model_is_not_made_again(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(METHODS, "taylor", Taylor())
    with caplog.at_level("INFO", logger="synapse.study"):
        run = study(tmp_path / "run", methods=("taylor", "linear"), kinds=("zero",))
    assert json.loads((run / "scorecard.json").read_text())["rank_stability"] == {}
    assert set(open_run(run).ranking["method"]) == {"taylor", "linear"}
    assert "Rankings by taylor are not made again: every draw would run the model." in caplog.messages


def test_a_draw_that_does_not_converge_costs_a_study_its_draws_only(tmp_path, monkeypatch, caplog):
    def stop(*_, **__):
        raise ConvergenceError("The probe of layer 0 stopped.")

    monkeypatch.setattr("synapse.study.rank_stability", stop)
    run = study(tmp_path / "run", methods=("linear",), kinds=("zero",))
    assert json.loads((run / "scorecard.json").read_text())["rank_stability"] == {}
    assert "The probe of layer 0 stopped. The study goes on without draws." in caplog.messages


def test_ablating_a_class_own_neurons_takes_that_class_and_no_other(planted_run):
    card = json.loads((planted_run / "scorecard.json").read_text())
    sweep = pd.read_parquet(planted_run / "tables" / "sweep.parquet")
    tenth = sweep[(sweep["kind"] == "zero") & (sweep["label"] == "b") & (sweep["k"] == 2) & (sweep["layer"] == 1)]
    # a tenth of 16 units is 2: unit 5 and, at best, one that does not matter or unit 9
    assert (tenth["accuracy"] <= 2 / 3 + 1e-9).all()
    drops = card["specialisation"]["recall_drop"]["readout"]["1"]
    assert drops["b"]["b"]["value"] == 1.0
    assert drops["c"]["c"]["value"] == 1.0
    assert drops["b"]["a"]["value"] == 0.0


def test_headroom_is_what_losing_the_planted_neurons_costs(planted_run):
    headroom = json.loads((planted_run / "scorecard.json").read_text())["stability"]["headroom"]
    # All classes fall to the constant class a, which a third of the examples are. After the first block the second
    # passes [CLS] on and adds a thousandth of the other rows, too little to bring the decision back.
    for scope in ("readout", "readout-onward", "all"):
        for layer in ("0", "1"):
            assert headroom[scope][layer]["value"] == pytest.approx(2 / 3)


def test_the_same_seed_gives_the_same_scorecard(planted_run, tmp_path):
    again = study(tmp_path / "again")
    assert (again / "scorecard.json").read_bytes() == (planted_run / "scorecard.json").read_bytes()
    first, second = (json.loads((run / "manifest.json").read_text()) for run in (planted_run, again))
    for manifest in (first, second):
        del manifest["timings"], manifest["created"]
    assert first == second


def test_another_seed_gives_another_sample(planted_run, tmp_path):
    other = study(tmp_path / "other", seed=5)
    assert (other / "scorecard.json").read_bytes() != (planted_run / "scorecard.json").read_bytes()


def test_a_study_that_dies_inside_an_intervention_leaves_the_model_as_it_was(tmp_path):
    classifier = planted_classifier()
    before = {name: value.clone() for name, value in classifier.module.state_dict().items()}

    def die(stage, done, total):
        if stage == "sweep" and done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_study(
            classifier,
            planted_examples(150, seed=1),
            planted_examples(60, seed=2),
            settings=make_settings(**QUICK),
            out=tmp_path / "run",
            progress=die,
        )
    assert all(value.equal(before[name]) for name, value in classifier.module.state_dict().items())
    modules = list(classifier.module.modules())
    assert all(not m._forward_hooks and not m._forward_pre_hooks and "forward" not in m.__dict__ for m in modules)
    assert [path.name for path in tmp_path.iterdir()] == [".run-sweep"]


def test_a_study_that_was_killed_in_its_sweep_goes_on_there_and_ends_as_an_unbroken_one(tmp_path, planted_run):
    steps = []

    def die(stage, done, total):
        if stage == "sweep" and total:
            steps.append(done)
            if done > total / 2:
                raise KeyboardInterrupt

    def watch(stage, done, total):
        if stage == "sweep" and total:
            steps.append(done)

    with pytest.raises(KeyboardInterrupt):
        study(tmp_path / "planted", progress=die)
    broken_at, first_step = steps[-1], steps[0]
    steps.clear()
    finished = study(tmp_path / "planted", progress=watch)
    assert first_step < steps[0] <= broken_at
    assert (finished / "scorecard.json").read_bytes() == (planted_run / "scorecard.json").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["planted"]


def test_a_model_that_did_not_come_back_is_not_reported_on(tmp_path, monkeypatch):
    classifier = planted_classifier()
    honest = FAMILIES["weight-noise"]

    def careless(target, place):
        classifier.module.head.bias.data[0] += 1e-6
        return honest.find(target, place)

    monkeypatch.setitem(FAMILIES, "weight-noise", replace(honest, find=careless))
    with pytest.raises(RestoreError, match="not what they were before the study"):
        study(tmp_path / "run", classifier=classifier)
    assert list(tmp_path.iterdir()) == []


def test_a_study_keeps_the_edits_that_it_found_and_they_still_do_what_they_say(planted_run):
    edits, test = HeadEdits.load(planted_run / "attacks" / "head-edit"), planted_examples(60, seed=2)
    assert edits.checked(planted_classifier(), test) == []
    source, target = edits.labels[edits.sources[0]], edits.labels[edits.targets[0]]
    classifier = planted_classifier()
    clean = classifier.predict(test).argmax(axis=1)
    with edits.applied(classifier, source, target):
        redirected = classifier.predict(test).argmax(axis=1)
    asked = (clean == edits.sources[0]) & (test.targets(classifier.labels) == edits.sources[0])
    assert (redirected[asked] == edits.targets[0]).mean() > 0.5


def test_the_same_examples_twice_and_a_taken_place_are_refused_before_any_work(tmp_path):
    def never(*_):
        raise AssertionError("no stage should have begun")

    same = planted_examples(30, seed=1)
    with pytest.raises(SplitError, match="hold the same examples"):
        run_study(planted_classifier(), same, same, settings=make_settings(), out=tmp_path / "run", progress=never)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("x")
    with pytest.raises(RunFolderError, match="is no run folder"):
        run_study(
            planted_classifier(),
            planted_examples(30, seed=1),
            planted_examples(30, seed=2),
            settings=make_settings(),
            out=tmp_path / "taken",
            progress=never,
        )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"exmaples": 10}, "There is no setting 'exmaples'. Did you mean 'examples'"),
        ({"examples": 1}, "The setting 'examples' is 1: 2 or more examples, or 'all', are needed."),
        ({"methods": ("lineer",)}, "there is no ranking method 'lineer'"),
        ({"kinds": ()}, "one or more different interventions are needed"),
        ({"kinds": ("mean", "zero")}, "zero must come first"),
        ({"methods": ("random",)}, "the first method is the one that is swept"),
        ({"random_sets": 3}, "The setting 'random_sets' is 3"),
        ({"rank_draws": 1}, "The setting 'rank_draws' is 1: two or more rankings can be compared, or 0 to draw none."),
        ({"scopes": ("cls",)}, "The setting 'scopes' is 'cls'"),
    ],
)
def test_settings_that_cannot_be_are_refused_in_a_sentence(values, message):
    with pytest.raises(SettingsError) as caught:
        make_settings(**values)
    assert message in str(caught.value)


def test_a_study_file_is_read_relative_to_itself(tmp_path):
    (tmp_path / "study.yaml").write_text("model: some/hub-id\ntrain: a.csv\nexamples: all\nfractions: [0.5, 1.0]\n")
    settings = make_settings(**read_settings(tmp_path / "study.yaml"))
    assert (settings.model, settings.train, settings.examples) == ("some/hub-id", tmp_path / "a.csv", "all")
    assert settings.grid().fractions == (0.5, 1.0)
    (tmp_path / "list.yaml").write_text("- a\n- b\n")
    with pytest.raises(SettingsError, match="holds no settings"):
        read_settings(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1")
    with pytest.raises(SettingsError, match="is no readable YAML"):
        read_settings(tmp_path / "broken.yaml")
    with pytest.raises(SettingsError, match="There is no study file"):
        read_settings(tmp_path / "none.yaml")


def test_grids_that_cannot_be_are_refused_as_settings():
    with pytest.raises(SettingsError, match="outside"):
        make_settings(fractions=(0.5, 2.0)).grid()
    assert np.isclose(make_settings(scale=0.25).grid().kinds[2].strength, 0.25)
