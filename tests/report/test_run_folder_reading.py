import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from fabricated_run import as_before_components, build_run, change_json

from synapse.errors import RunFolderError, SettingsError
from synapse.report.run import open_run, open_runs


def test_a_finished_run_opens_with_its_figures_and_tables(run_folder: Path) -> None:
    run = open_run(run_folder)

    headroom = run.figure("stability", "headroom", "all", 0)
    assert headroom is not None
    assert (headroom.value, headroom.n, headroom.unit) == (0.6, 200, "accuracy")
    assert run.scopes == ("readout", "all")
    assert run.depth(2) == 1.0
    assert set(run.ranking["method"]) == {"cumulative-mass"}
    assert run.clean_margin == pytest.approx(4.0)  # top logits 2, 4, 4, 6 against 0


def test_the_ranking_that_was_swept_in_full_is_the_one_that_is_judged(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run", methods=("linear", "cumulative-mass"))
    path = run / "tables" / "sweep.parquet"
    table = pd.read_parquet(path)
    is_rival = table["method"] == "cumulative-mass"
    table[~is_rival | ((table["scope"] == "all") & (table["selection"] == "top"))].to_parquet(path)

    opened = open_run(run)

    assert (opened.method, opened.swept_methods, opened.judged_scope) == ("linear", ("linear",), "all")


def test_a_figure_that_was_not_measured_is_none_and_an_unused_one_keeps_its_note(run_folder: Path) -> None:
    run = open_run(run_folder)

    unused = run.figure("redundancy", "removable", "readout", 0)

    assert run.figure("stability", "headroom", "readout", 99) is None
    assert unused is not None
    assert (unused.value, unused.note) == (None, "not used here")


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError) as caught:
        open_run(tmp_path / "nowhere")

    assert str(caught.value) == (
        f"{tmp_path / 'nowhere'} is no folder. Give the folder that a study wrote, with manifest.json in it."
    )


@pytest.mark.parametrize("missing", ["manifest.json", "scorecard.json"])
def test_a_folder_without_one_of_its_files_is_refused(run_folder: Path, missing: str) -> None:
    (run_folder / missing).unlink()

    with pytest.raises(RunFolderError) as caught:
        open_run(run_folder)

    assert str(caught.value) == f"{run_folder} has no {missing}: it is no finished run folder."


def test_a_study_that_did_not_finish_is_refused(run_folder: Path) -> None:
    change_json(run_folder / "manifest.json", ["status"], "running")

    with pytest.raises(RunFolderError, match="status is 'running', not 'complete'"):
        open_run(run_folder)


@pytest.mark.parametrize("name", ["manifest.json", "scorecard.json"])
def test_another_format_is_refused(run_folder: Path, name: str) -> None:
    change_json(run_folder / name, ["format"], 7)

    with pytest.raises(RunFolderError, match="has format 7; this version of SYNAPSE reads format 1"):
        open_run(run_folder)


def test_a_file_that_is_no_json_is_refused(run_folder: Path) -> None:
    (run_folder / "scorecard.json").write_text("{")

    with pytest.raises(RunFolderError, match=r"scorecard\.json is no JSON"):
        open_run(run_folder)


def test_a_missing_or_empty_table_reads_as_a_table_without_rows(run_folder: Path) -> None:
    (run_folder / "tables" / "attack.parquet").unlink()
    pd.DataFrame([]).to_parquet(run_folder / "tables" / "probe.parquet")

    run = open_run(run_folder)

    assert run.attack.empty
    assert run.probe.empty
    assert "budget" in run.attack
    assert "measure" in run.probe


def test_a_table_without_a_column_is_refused(run_folder: Path) -> None:
    path = run_folder / "tables" / "sweep.parquet"
    pd.read_parquet(path).drop(columns="fraction").to_parquet(path)

    with pytest.raises(RunFolderError, match="has no column 'fraction'"):
        _ = open_run(run_folder).sweep


def test_a_table_that_is_no_parquet_is_refused(run_folder: Path) -> None:
    (run_folder / "tables" / "sweep.parquet").write_text("layer,scope")

    with pytest.raises(RunFolderError, match="is no parquet file"):
        _ = open_run(run_folder).sweep


def test_runs_of_one_title_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    paths = [build_run(tmp_path / name, title="same") for name in ("first", "second")]

    assert [name for name, _ in open_runs(paths)] == ["same (first)", "same (second)"]


@pytest.fixture
def two_sites(tmp_path: Path) -> Path:
    return build_run(tmp_path / "two", components={"residual": (3, 64), "mlp": (2, 256)})


def test_a_run_of_several_components_opens_as_the_first_of_them(two_sites: Path) -> None:
    run = open_run(two_sites)

    assert (run.component, run.components, run.is_first) == ("residual", ("residual", "mlp"), True)
    assert (run.n_layers, run.width) == (3, 64)
    assert set(run.sweep["layer"]) == {0, 1, 2}


def test_a_further_component_has_its_own_shape_tables_and_figures(two_sites: Path) -> None:
    run = open_run(two_sites, "mlp")

    assert (run.component, run.n_layers, run.width, run.is_first) == ("mlp", 2, 256, False)
    for table in (run.probe, run.ranking, run.sweep):
        assert set(table["component"]) == {"mlp"}
        assert set(table["layer"]) == {0, 1}
    assert run.sweep["k"].max() == 256
    assert run.sweep["cell"].min() == (open_run(two_sites).sweep["cell"].max() + 1)
    headroom = run.figure("stability", "headroom", "all", 1)
    assert headroom is not None
    assert headroom.value == pytest.approx(0.3)  # half of what the blocks' outputs carry
    assert run.figure("stability", "headroom", "all", 2) is None


def test_what_is_of_the_whole_model_is_the_same_for_every_component(two_sites: Path) -> None:
    first, further = open_run(two_sites), open_run(two_sites, "mlp")

    assert further.figure("clean", "accuracy") == first.figure("clean", "accuracy") is not None
    assert further.section("vulnerability") == first.section("vulnerability") != {}
    assert len(further.attack) == len(first.attack) > 0


def test_a_component_that_was_not_studied_is_refused_with_near_names(two_sites: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        open_run(two_sites, "mpl")

    assert str(caught.value) == (
        f"The run in {two_sites} has no component 'mpl'; it has residual, mlp. Did you mean 'mlp'?"
    )


def test_a_component_without_a_shape_is_refused(two_sites: Path) -> None:
    change_json(two_sites / "manifest.json", ["components", "mlp"], {"width": 256})

    with pytest.raises(RunFolderError, match="does not say how many layers and units 'mlp' has"):
        open_run(two_sites)


def test_a_folder_from_before_components_opens_as_the_blocks_output(run_folder: Path) -> None:
    now = open_run(run_folder)
    shape, sweep, scopes = (now.n_layers, now.width), now.sweep, now.scopes

    before = open_run(as_before_components(run_folder))

    assert before.components == ("residual",)
    assert ((before.n_layers, before.width), before.scopes) == (shape, scopes)
    pd.testing.assert_frame_equal(before.sweep, sweep)
    with pytest.raises(SettingsError, match="it has residual"):
        open_run(run_folder, "mlp")


def test_tables_of_a_folder_with_components_must_name_them(run_folder: Path) -> None:
    path = run_folder / "tables" / "probe.parquet"
    pd.read_parquet(path).drop(columns="component").to_parquet(path)

    with pytest.raises(RunFolderError, match="has no column 'component'"):
        _ = open_run(run_folder).probe


@pytest.mark.parametrize(
    ("component", "readout", "distinct"),
    [
        ("residual", "first", ("readout", "readout-onward", "all", "non-padding")),
        ("residual", "mean-but-first", ("readout", "readout-onward", "all", "non-padding")),
        ("mlp", "mean", ("readout", "readout-onward")),
        ("residual", "first-and-mean", ("readout", "readout-onward")),
        ("pooler", "last", ("readout",)),
    ],
)
def test_scopes_that_come_to_the_same_edit_stand_once(
    tmp_path: Path, component: str, readout: str, distinct: tuple[str, ...]
) -> None:
    scopes = ("readout", "readout-onward", "all", "non-padding")
    shape = {component: (1 if component == "pooler" else 3, 64)}

    run = open_run(build_run(tmp_path / "run", components=shape, scopes=scopes, model={"readout": readout}))

    assert run.scopes == run.swept_scopes == run.scopes_of("specialisation", "recall_drop") == distinct


def test_reading_a_run_needs_neither_torch_nor_a_stage() -> None:
    stages = "model recording probe ranking perturb attack sweeping execute study"
    code = (
        "import sys, synapse.report\n"
        f"stages = {['synapse.' + stage for stage in stages.split()]!r}\n"
        "print([m for m in sys.modules if m.split('.')[0] == 'torch' or m.startswith(tuple(stages))])"
    )

    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert loaded.stdout.strip() == "[]"
