from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
import pytest
from fabricated_run import CLEAN, build_run, change_json, figure
from scipy.stats import binomtest

from synapse.report import figures
from synapse.report.curves import ablation_curve, wilson
from synapse.report.run import open_run


def traces(figure: go.Figure | None, name: str) -> list[go.Scatter]:
    assert figure is not None
    return [trace for trace in figure.data if trace.name == name]


def test_headroom_stands_by_scope_and_block_with_hollow_marks_where_it_may_be_zero(run_folder: Path) -> None:
    shown = figures.headroom(open_run(run_folder)).shown

    (readout,) = traces(shown, "readout row, this block only")
    (everything,) = traces(shown, "all rows, this block")
    assert readout.y == (0.01, 0.01, 0.5)
    assert readout.marker.symbol == ("circle-open", "circle-open", "circle")
    assert everything.y == (0.6, 0.6, 0.6)
    assert everything.error_y.arrayminus == pytest.approx([0.04, 0.04, 0.04])


def test_an_ablation_curve_runs_from_the_clean_model_to_everything_removed(run_folder: Path) -> None:
    run = open_run(run_folder)

    curve = ablation_curve(run, layer=2, scope="readout", selection="top", method="cumulative-mass")

    assert list(curve["fraction"]) == [0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1]
    assert curve["accuracy"].iloc[0] == pytest.approx(CLEAN)
    assert curve["accuracy"].iloc[4] == pytest.approx(CLEAN - 0.5 * 0.5**1.2)
    assert curve["accuracy"].iloc[-1] == pytest.approx(CLEAN - 0.5)


def test_random_sets_are_pooled_by_the_examples_that_each_ran(run_folder: Path) -> None:
    path = run_folder / "tables" / "sweep.parquet"
    table = pd.read_parquet(path)
    here = (table["layer"] == 2) & (table["scope"] == "all") & (table["fraction"] == 0.5)
    for draw, (n, accuracy) in enumerate([(30, 0.8), (10, 0.4)]):
        cell = here & (table["selection"] == "random") & (table["draw"] == draw)
        table.loc[cell, ["n", "accuracy"]] = [n, accuracy]
    table.to_parquet(path)

    curve = ablation_curve(open_run(run_folder), layer=2, scope="all", selection="random", method="cumulative-mass")

    at_half = curve[curve["fraction"] == 0.5].iloc[0]
    expected = binomtest(28, 40).proportion_ci(method="wilson")  # 30 x 0.8 + 10 x 0.4 of 40 are right
    assert at_half["accuracy"] == pytest.approx(0.7)
    assert (at_half["low"], at_half["high"]) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_a_random_set_that_ran_nothing_does_not_count(run_folder: Path) -> None:
    path = run_folder / "tables" / "sweep.parquet"
    table = pd.read_parquet(path)
    idle = (table["selection"] == "random") & (table["draw"] == 1)
    table["accuracy"] = table["accuracy"].mask(idle)
    table["n"] = table["n"].mask(idle, 0)
    table.to_parquet(path)

    curve = ablation_curve(open_run(run_folder), layer=2, scope="all", selection="random", method="")

    assert not curve["accuracy"].isna().any()


@pytest.mark.parametrize(("hits", "n"), [(0, 20), (7, 20), (20, 20)])
def test_the_interval_of_pooled_sets_is_scipys_wilson_interval(hits: int, n: int) -> None:
    expected = binomtest(hits, n).proportion_ci(method="wilson")

    assert wilson(hits / n, n) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_small_multiples_show_every_block_on_equally_spaced_steps(run_folder: Path) -> None:
    panel = figures.ablation(open_run(run_folder))

    tops = traces(panel.figures[0, 0], "highest ranked first")
    assert len(tops) == 3
    assert tops[2].x == tuple(range(9))
    assert tops[2].y[-1] == pytest.approx(CLEAN - 0.5)
    assert panel.choices[0].options == ("readout row, this block only", "all rows, this block")


def test_the_heat_map_has_a_row_for_each_block_and_a_column_for_each_share(run_folder: Path) -> None:
    shown = figures.layer_by_fraction(open_run(run_folder)).figures[1, 0]

    (cells,) = shown.data
    assert [len(row) for row in cells.z] == [9, 9, 9]
    assert cells.z[0][-1] == pytest.approx(CLEAN - 0.6)  # all rows of block 0


def test_class_drops_are_shown_where_used_and_greyed_where_not(run_folder: Path) -> None:
    panel = figures.recall_drop(open_run(run_folder))

    (used,) = panel.figures[0, 2].data
    (unused,) = panel.figures[0, 0].data
    assert [used.z[i][i] for i in range(3)] == pytest.approx([0.42, 0.37, 0.32])
    assert {value for row in unused.z for value in row} == {None}
    assert panel.figures[0, 0].layout.annotations[0].text == "not used here"


THREE = ("cumulative-mass", "probeless", "linear")


def test_rankings_are_drawn_by_their_quality_at_each_block_and_random_sets_as_a_level(tmp_path: Path) -> None:
    run = open_run(build_run(tmp_path / "run", methods=THREE))

    panel = figures.faithfulness(run)

    (first,), (second,), (third,) = (traces(panel.shown, method) for method in THREE)
    assert (first.y, second.y, third.y) == ((0.2, 0.1, 0.1), (0.1, 0.3, 0.3), (-0.2, -0.2, -0.2))
    assert first.error_y.array == pytest.approx([0.05, 0.05, 0.05])
    assert panel.shown is not None
    assert [shape.name for shape in panel.shown.layout.shapes] == ["random sets"]
    assert "all rows, this block" in panel.caption


def test_one_ranking_alone_and_blocks_without_anything_to_lose_have_no_faithfulness(tmp_path: Path) -> None:
    alone = open_run(build_run(tmp_path / "alone"))
    idle = build_run(tmp_path / "idle", methods=THREE)
    unused = {"value": None, "low": None, "high": None, "n": 9, "unit": "", "note": "not used here"}
    faithfulness = {"quality": {"all": {"0": dict.fromkeys(THREE, unused)}}, "best": {}, "overall": {}}
    change_json(idle / "scorecard.json", ["faithfulness"], faithfulness)

    assert figures.faithfulness(alone).missing.startswith("No two rankings were judged beside each other.")
    assert figures.faithfulness(open_run(idle)).missing.startswith("No block has anything to lose.")
    assert figures.agreement(alone).missing.startswith("The run folder has no table of the agreement between rankings.")


def test_agreement_is_a_map_of_every_pair_with_what_chance_gives_in_brackets(tmp_path: Path) -> None:
    run = open_run(build_run(tmp_path / "run", methods=THREE))

    panel = figures.agreement(run)

    (tau,), (sure,), (by_chance,) = (panel.figures[place].data for place in ((0, 2), (2, 0), (2, 2)))
    assert tau.z[0] == pytest.approx([None, 0.1, 0.1])
    assert tau.z[2][0] == tau.z[0][2]
    assert (sure.text[0][1], by_chance.text[0][1]) == ("0.20", "(0.20)")  # adjusted p of 0.04 and 0.08
    assert "by chance 0.05, adjusted p 0.08" in by_chance.customdata[1][0]
    assert panel.choices[1].options[panel.choices[1].chosen] == "block 2"


def test_a_pair_without_an_order_is_left_blank(tmp_path: Path) -> None:
    path = build_run(tmp_path / "run", methods=THREE)
    table = pd.read_parquet(path / "tables" / "agreement.parquet")
    table.loc[:, ["tau", "rbo", "jaccard", "p", "p_adjusted"]] = float("nan")
    table.to_parquet(path / "tables" / "agreement.parquet")

    (cells,) = figures.agreement(open_run(path)).figures[2, 0].data

    assert (cells.z[0][1], cells.text[0][1]) == (None, "")


def test_rank_stability_is_drawn_for_all_classes_and_each_beside_what_noise_would_give(tmp_path: Path) -> None:
    panel = figures.rank_stability(open_run(build_run(tmp_path / "run", labels=("ham", "spam"), rank_draws=50)))

    tenth, by_score = panel.figures[0,], panel.figures[1,]
    assert [trace.name for trace in tenth.data] == ["all classes", "ham", "spam"]
    assert [trace.y for trace in tenth.data] == [
        pytest.approx((0.4, 0.5, 0.6)),
        pytest.approx((0.3, 0.4, 0.5)),
        pytest.approx((0.25, 0.35, 0.45)),
    ]
    assert by_score.data[0].y == pytest.approx((0.7, 0.8, 0.9))
    assert [shape.y0 for shape in tenth.layout.shapes] == [0.16]
    assert panel.choices[0].options == ("the highest tenth", "those of it by their score alone")
    assert panel.numbers is not None
    assert panel.numbers.rows[2] == ("2", "0.600 [0.570, 0.630], n = 50", "0.900 [0.870, 0.930], n = 50", "4 of 6")


def test_a_run_without_draws_says_so(run_folder: Path) -> None:
    panel = figures.rank_stability(open_run(run_folder))

    assert panel.missing.startswith("The ranking was not made again on other draws of the examples.")


def test_searched_and_random_redirects_stand_side_by_side(run_folder: Path) -> None:
    shown = figures.redirect(open_run(run_folder)).shown

    assert shown is not None
    searched, random = shown.data
    assert searched.text[0][1] == "0.13"  # ham into spam
    assert searched.text[0][0] == ""
    assert list(random.text[0]) == ["", "1.50", ""]
    assert random.customdata[0][2] == "not reached"


def test_a_classes_shift_curve_is_the_tables_and_its_control_is_dashed(run_folder: Path) -> None:
    run = open_run(run_folder)

    attacked, control = traces(figures.logit_shift(run).shown, "ham")

    table = run.attack[(run.attack["attack"] == "logit-shift") & (run.attack["target"] == "ham")]
    assert attacked.y == tuple(table[table["arm"] == "attack"]["value"])
    assert (attacked.line.dash, control.line.dash) == ("solid", "dash")


def test_noise_curves_have_one_line_a_part(run_folder: Path) -> None:
    shown = figures.weight_noise(open_run(run_folder)).shown

    assert shown is not None
    assert [trace.name for trace in shown.data] == ["block 0", "block 1", "block 2", "head"]


def test_class_names_are_escaped_in_every_figure(run_folder: Path) -> None:
    for panel in figures.panels(open_run(run_folder)):
        for drawn in panel.figures.values():
            assert "<script" not in drawn.to_json()


@pytest.mark.parametrize(
    "section",
    [
        *("clean", "probe", "stability", "faithfulness", "redundancy", "specialisation"),
        "rank_stability",
        "vulnerability",
    ],
)
def test_a_missing_section_of_the_scorecard_breaks_no_figure(tmp_path: Path, section: str) -> None:
    run = build_run(tmp_path / "run", methods=THREE, rank_draws=50)
    change_json(run / "scorecard.json", [section], ...)

    panels = figures.panels(open_run(run))

    assert all(bool(panel.figures) != bool(panel.missing) for panel in panels)


@pytest.mark.parametrize(
    ("table", "lost"),
    [
        ("sweep", {"ablation", "heat"}),
        ("attack", {"shift", "noise"}),
        ("agreement", {"agreement"}),
        ("ranking", set()),
    ],
)
def test_a_missing_table_costs_its_figures_only(tmp_path: Path, table: str, lost: set[str]) -> None:
    run = build_run(tmp_path / "run", methods=THREE, rank_draws=50)
    (run / "tables" / f"{table}.parquet").unlink()

    panels = figures.panels(open_run(run))

    assert {panel.key for panel in panels if panel.missing} == lost


def test_seven_classes_and_twelve_blocks_fit(tmp_path: Path) -> None:
    labels = [f"class {i} with quite a long name" for i in range(7)]
    run = open_run(build_run(tmp_path / "run", n_layers=12, labels=labels, methods=THREE, rank_draws=50))

    titles = [note.text for note in figures.ablation(run).figures[0, 0].layout.annotations]

    assert titles == [f"block {i}" for i in range(12)]
    assert all(panel.figures for panel in figures.panels(run))


def test_a_figure_without_an_interval_is_drawn_without_one(run_folder: Path) -> None:
    bare = figure(0.3) | {"low": None, "high": None}
    change_json(run_folder / "scorecard.json", ["specialisation", "overlap", "0"], bare)

    (drawn,) = traces(figures.overlap(open_run(run_folder)).shown, "top tenths of two classes")

    assert (drawn.error_y.array[0], drawn.error_y.arrayminus[0]) == (0, 0)


def test_the_probe_panel_says_how_near_the_fits_are_to_their_optimum(run_folder: Path) -> None:
    assert "converged" not in figures.probe(open_run(run_folder)).caption
    path = run_folder / "tables" / "probe.parquet"
    table = pd.read_parquet(path)
    certificates = table.iloc[:2].assign(measure="gradient_norm", value=[3e-8, 1e-9])
    pd.concat([table, certificates]).to_parquet(path)
    assert "no entry of its gradient is above 3e-08" in figures.probe(open_run(run_folder)).caption


COMPONENTS = ("residual", "mlp", "attention", "heads", "pooler")
READOUTS = ("first", "last", "first-two", "mean", "mean-but-first", "first-and-mean")


@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("component", COMPONENTS)
def test_every_component_and_readout_has_all_figures_and_names_no_rows_that_it_has_not(
    tmp_path: Path, component: str, readout: str
) -> None:
    shape = {component: (1 if component == "pooler" else 2, 32)}
    scopes = ("readout", "readout-onward", "all")
    model = {"readout": readout}
    path = build_run(tmp_path / "run", components=shape, scopes=scopes, methods=THREE, rank_draws=50, model=model)
    run = open_run(path)

    panels = {panel.key: panel for panel in figures.panels(run)}

    assert not [panel.key for panel in panels.values() if panel.missing]
    said = " ".join(panels[key].caption for key in ("headroom", "ablation", "heat", "faithfulness", "probe"))
    one_row = readout in ("first", "last") and component != "pooler"
    assert ("readout row " in said or "readout row," in said) == one_row
    assert ("block" in said) == (component != "pooler")


def test_two_scopes_that_are_one_edit_are_drawn_once(tmp_path: Path) -> None:
    scopes = ("readout", "readout-onward", "all")
    run = open_run(build_run(tmp_path / "run", scopes=scopes, model={"readout": "mean"}))

    shown, ablation = figures.headroom(run).shown, figures.ablation(run)

    assert shown is not None
    names = ("all rows, this block only", "all rows, this block and later")
    assert tuple(trace.name for trace in shown.data) == names
    assert (ablation.choices[0].options, ablation.choices[0].chosen) == (names, 0)


def test_rows_that_are_no_padding_can_be_swept_too_and_all_rows_are_shown_first(tmp_path: Path) -> None:
    scopes = ("readout", "all", "non-padding")
    run = open_run(build_run(tmp_path / "run", scopes=scopes))

    choice = figures.ablation(run).choices[0]

    assert choice.options[choice.chosen] == "all rows, this block"
    assert traces(figures.headroom(run).shown, "all rows that are no padding, this block")


def test_figures_of_a_further_component_are_drawn_from_its_own_numbers(tmp_path: Path) -> None:
    shapes = {"residual": (3, 64), "mlp": (2, 256)}
    run = open_run(build_run(tmp_path / "run", components=shapes), "mlp")

    panels = {panel.key: panel for panel in figures.panels(run)}

    (everything,) = traces(panels["headroom"].shown, "all rows, this block")
    assert everything.y == pytest.approx((0.3, 0.3))
    assert "hidden units of that block's feed-forward network" in panels["headroom"].caption
    assert not {"redirect", "shift", "noise"} & set(panels)


def test_a_narrow_axis_names_the_steps_nearest_to_its_ends_and_middle() -> None:
    from synapse.report.curves import few_steps

    assert few_steps([0.0, 1 / 64, 3 / 64, 6 / 64, 0.25, 0.5, 0.75, 58 / 64, 61 / 64, 63 / 64, 1.0]) == [0, 2, 5, 8, 10]
    assert few_steps([0.0, 0.5, 1.0]) == [0, 1, 2]
