import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from fabricated_run import build_run, change_json

from synapse.errors import RunFolderError
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


def test_reading_a_run_needs_neither_torch_nor_a_stage() -> None:
    stages = "model recording probe ranking perturb attack sweeping execute study"
    code = (
        "import sys, synapse.report\n"
        f"stages = {['synapse.' + stage for stage in stages.split()]!r}\n"
        "print([m for m in sys.modules if m.split('.')[0] == 'torch' or m.startswith(tuple(stages))])"
    )

    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert loaded.stdout.strip() == "[]"
