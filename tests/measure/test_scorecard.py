import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from handmade import NOT_RUN, cell, make_sweep
from scipy import stats
from sklearn.metrics import f1_score, recall_score

from synapse import measure
from synapse.types import Figure

TARGETS = [0] * 10 + [1] * 10
NOTHING = pd.DataFrame()


def probe_row(layer, name, value):
    row = {"layer": layer, "measure": name, "value": value, "low": 0.1, "high": 0.9}
    return row | {"n": 50, "unit": "accuracy"}


def attack_row(attack, measure, value, **columns):
    row = {"attack": attack, "location": "head", "source": "", "target": "", "arm": "attack"}
    row |= {"measure": measure, "value": value, "low": value, "high": value, "n": 7}
    row |= {"detail": "", "budget": np.nan, "budget_unit": "logit"}
    return row | columns


@pytest.fixture
def study():
    flipped = [1] * 10 + [0] * 10
    half = [1] * 5 + [0] * 5 + [0] * 2 + [1] * 8
    cells = []
    for scope in ("readout", "all"):
        cells.append(cell(flipped, scope=scope))
        for selection in ("top", "random", "bottom"):
            cells.append(cell(half, scope=scope, fraction=0.5, selection=selection))
        cells += [cell(half, scope=scope, fraction=0.5, label=label) for label in "ab"]
    ranking = [("cumulative-mass", 0, label, u, u, 0.0) for label in ("", "a", "b") for u in range(20)]
    return {
        "test_logits": np.eye(2)[[*TARGETS, 0]],
        "test_targets": np.array([*TARGETS, 1]),
        "probe_table": pd.DataFrame([probe_row(0, "accuracy", 0.7), probe_row(0, "penalty", 0.01)]),
        "ranking_table": pd.DataFrame(ranking, columns=["method", "layer", "label", "rank", "unit", "score"]),
        "sweep": make_sweep(cells, TARGETS),
        "attack_table": pd.DataFrame(
            [
                attack_row("logit-shift", "d50", 1.5, target="a"),
                attack_row("logit-shift", "d95", np.nan, target="a"),
                attack_row("logit-shift", "success", 0.4, target="a", budget=1.0),
                attack_row("head-edit", "d50", 0.2, source="a", target="b"),
                attack_row("head-edit", "d50", 0.9, source="a", target="b", arm="random"),
                attack_row("head-edit", "collateral", 0.03, source="a", target="b", budget=0.2),
                attack_row("head-edit", "d50", 0.4, source="b", target="a"),
                attack_row("head-edit", "success_at_d50", 0.6, source="a", target="b", arm="transfer", budget=0.1),
                attack_row("certificate", "d50", 0.1, source="a", target="b", arm="bound"),
                attack_row("row-swap", "flip_rate", 0.5, detail="a <-> b", budget=2.0),
                attack_row("row-swap", "flip_rate", 0.1, detail="a <-> b", budget=2.0, arm="random"),
                attack_row("row-swap", "flip_rate", 0.4, detail="b <-> c", budget=3.0),
                attack_row("weight-noise", "d50", 0.3, location="block 0", arm="random"),
            ]
        ),
    }


def scorecard_of(test_logits, test_targets, attack_table, seed=0, **component):
    figures = measure.component_figures(**component, seed=seed)
    return measure.scorecard(
        test_logits=test_logits,
        test_targets=test_targets,
        labels=component["sweep"].labels,
        attack_table=attack_table,
        component="residual",
        figures=figures,
        seed=seed,
    )


def test_the_scorecard_has_every_section_and_is_strict_json(study):
    card = json.loads(json.dumps(scorecard_of(**study, seed=0), allow_nan=False))
    assert {section: set(card[section]) for section in card if section not in ("format", "component")} == {
        "clean": {"accuracy", "macro_f1", "chance", "recall"},
        "probe": {"accuracy"},
        "stability": {*("headroom", "resupply", "commitment_depth", "area", "ordering_quality", "flip_rate", "kl")},
        "faithfulness": {"quality", "best", "overall", "best_overall"},
        "redundancy": {"removable", "sufficient"},
        "specialisation": {"overlap", "overlap_chance", "recall_drop", "specificity", "asymmetry"},
        "rank_stability": set(),
        "vulnerability": {
            "logit_shift",
            "head_edit",
            "head_edit_random",
            "head_edit_bound",
            "weight_noise",
            "cheapest",
        },
    }
    assert set(card["stability"]["area"]["all"]["0"]["top"]) == {"value", "low", "high", "n", "unit"}
    assert set(card["specialisation"]["recall_drop"]["all"]["0"]["a"]) == {"a", "b"}


def test_the_same_seed_gives_the_same_scorecard(study):
    assert scorecard_of(**study, seed=3) == scorecard_of(**study, seed=3)
    assert scorecard_of(**study, seed=3) != scorecard_of(**study, seed=4)


def test_the_scorecard_names_the_best_of_several_rankings(study):
    sweep = study["sweep"]
    columns = ["kind", "strength", "scope", "layer", "method", "label", "selection", "draw", "fraction"]
    cells = [cell([1] * 2 + [0] * 8 + [1] * 10, scope="all", fraction=0.5, method="linear")]
    cells += [
        row | {"predicted": logits.argmax(axis=1).tolist()}
        for row, logits in zip(sweep.cells[columns].to_dict("records"), sweep.logits, strict=True)
    ]
    card = json.loads(json.dumps(scorecard_of(**study | {"sweep": make_sweep(cells, TARGETS)}), allow_nan=False))
    best = card["faithfulness"]["best"]["all"]["0"]
    assert (best["method"], best["second"], best["lead"]["unit"]) == ("cumulative-mass", "linear", "share of headroom")
    assert set(card["faithfulness"]["quality"]["all"]["0"]) == {"linear", "cumulative-mass"}


def test_the_scorecard_takes_over_the_figures_of_the_draws(study):
    index = Figure(0.5, 0.4, 0.6, 50, "stability")
    card = scorecard_of(**study, rank_stability={"kuncheva": {0: index}, "noise": index})
    assert card["rank_stability"] == {"kuncheva": {"0": index.to_dict()}, "noise": index.to_dict()}


def test_clean_figures_agree_with_scikit_learn(study):
    clean = scorecard_of(**study)["clean"]
    predicted, targets = study["test_logits"].argmax(axis=1), study["test_targets"]
    assert clean["macro_f1"]["value"] == pytest.approx(f1_score(targets, predicted, average="macro"))
    recalls = [clean["recall"][label]["value"] for label in "ab"]
    assert recalls == pytest.approx(recall_score(targets, predicted, average=None).tolist())
    assert clean["chance"]["value"] == 11 / 21  # the more frequent class


def test_a_class_missing_from_the_test_set_has_a_null_recall(study):
    study |= {"test_targets": np.zeros(21, dtype=int)}
    assert scorecard_of(**study)["clean"]["recall"]["b"] == {
        "value": None, "low": None, "high": None, "n": 0, "unit": "recall", "note": "no examples"
    }  # fmt: skip


def test_probe_figures_are_those_of_the_table(study):
    probe = scorecard_of(**study)["probe"]
    assert probe == {"accuracy": {"0": {"value": 0.7, "low": 0.1, "high": 0.9, "n": 50, "unit": "accuracy"}}}


def test_attack_budgets_are_arranged_by_what_was_attacked(study):
    found = measure.vulnerability(study["attack_table"])
    assert found.logit_shift["d50"] == {"a": Figure(1.5, 1.5, 1.5, 7, "logit")}
    assert found.logit_shift["d95"]["a"].value is None
    assert found.logit_shift["d95"]["a"].note == "not reached"
    assert found.head_edit["d50"]["a"]["b"].value == 0.2
    assert found.head_edit_random["d50"]["a"]["b"].value == 0.9
    assert found.weight_noise["block 0"]["d50"].value == 0.3


def test_tables_without_rows_leave_their_sections_empty(study):
    study |= {"probe_table": NOTHING, "ranking_table": NOTHING, "attack_table": NOTHING}
    card = scorecard_of(**study)
    assert card["probe"] == card["specialisation"]["overlap"] == {}
    assert card["vulnerability"] == {
        "logit_shift": {},
        "head_edit": {},
        "head_edit_random": {},
        "head_edit_bound": {},
        "cheapest": {},
        "weight_noise": {},
    }


def test_the_sweep_table_measures_each_cell_on_the_examples_it_ran():
    cells = [cell([1] * 4 + [0] * 6 + [1] * 10), cell([NOT_RUN] * 8 + [0] * 12), cell([NOT_RUN] * 20)]
    table = measure.sweep_table(make_sweep(cells, TARGETS, clean=[0] * 11 + [1] * 9))
    assert table["cell"].tolist() == [0, 1, 2]
    assert table["n"].tolist() == [20, 12, 0]
    np.testing.assert_array_equal(table["accuracy"], [16 / 20, 2 / 12, np.nan])
    np.testing.assert_array_equal(table["drop"], [3 / 20, 9 / 12, np.nan])  # 4 broken, 1 repaired; 9 broken
    np.testing.assert_array_equal(table["flip_rate"], [5 / 20, 9 / 12, np.nan])
    exact = stats.binomtest(16, 20).proportion_ci(method="exact")
    assert (table["accuracy_low"][0], table["accuracy_high"][0]) == pytest.approx((exact.low, exact.high))
    low, high = measure.paired_score(4, 1, 20)
    assert (table["drop_low"][0], table["drop_high"][0]) == (low, high)


def test_the_sweep_table_keeps_the_columns_of_the_plan():
    sweep = make_sweep([cell([0] * 20)], TARGETS)
    table = measure.sweep_table(sweep)
    pd.testing.assert_frame_equal(table[sweep.cells.columns], sweep.cells)
    measured = ["cell", "n", "accuracy", "accuracy_low", "accuracy_high", "drop", "drop_low", "drop_high"]
    assert table.columns.tolist() == [*sweep.cells.columns, *measured, "flip_rate", "kl"]


def test_measuring_needs_no_torch():
    code = "import sys, synapse.measure; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
