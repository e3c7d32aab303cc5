"""Studies whose run folder lies elsewhere: made there, read from there, and gone on with after a kill."""

from pathlib import Path

import fsspec
import pandas as pd
import pytest
from planted import planted_classifier, planted_examples

from synapse.elsewhere import copied, here
from synapse.errors import RunFolderError, SettingsError
from synapse.integrity import flaws
from synapse.report import summary_lines
from synapse.report.compare import comparison_table, write_comparison
from synapse.report.html import write_report
from synapse.report.paper import paper_figures
from synapse.report.run import open_run, open_runs
from synapse.settings import make_settings, read_settings
from synapse.store import check_free
from synapse.study import run_study

QUICK = {
    "sites": ("residual", "pooler"),
    "examples": 30,
    "train_examples": 120,
    "methods": ("linear",),
    "rank_draws": 0,
    "fractions": (0.1, 1.0),
    "kinds": ("zero",),
    "attacks": ("head",),
}


@pytest.fixture(scope="module")
def memory():
    """The file system in memory of fsspec, empty again afterwards."""
    system = fsspec.filesystem("memory")
    yield system
    system.rm("/", recursive=True)


def study(out, *, progress=lambda *_: None, **changes):
    return run_study(
        planted_classifier(),
        planted_examples(150, seed=1),
        planted_examples(60, seed=2),
        settings=make_settings(**{**QUICK, **changes}),
        out=out,
        progress=progress,
    )


@pytest.fixture(scope="module")
def local_run(tmp_path_factory):
    return study(tmp_path_factory.mktemp("runs") / "planted")


@pytest.fixture(scope="module")
def run_elsewhere(memory):
    """The URL of the same run elsewhere."""
    return study("memory://bucket/runs/planted")


def test_a_run_elsewhere_is_the_same_run(local_run, run_elsewhere):
    copy = here(run_elsewhere)
    assert run_elsewhere == "memory://bucket/runs/planted"
    assert flaws(copied(run_elsewhere)) == []
    for name in ("scorecard.json", "tables/sweep.parquet", "tables/attack.parquet", "logits.zarr/zarr.json"):
        assert (copy / name).read_bytes() == (local_run / name).read_bytes()
    there, at_home = open_run(run_elsewhere, "pooler"), open_run(local_run, "pooler")
    pd.testing.assert_frame_equal(there.sweep, at_home.sweep)
    assert there.clean_margin == at_home.clean_margin
    assert (there.place, there.path.name, at_home.place) == (run_elsewhere, "planted", local_run)
    assert summary_lines(Path(run_elsewhere)) == summary_lines(local_run)


def test_its_report_lies_with_it_and_can_be_made_again_here(run_elsewhere, memory, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = memory.find("/bucket/runs/planted")

    assert write_report(run_elsewhere) == Path("planted-report.html")

    pages = ("planted-report.html", "planted-report-pooler.html")
    assert {path.name for path in tmp_path.iterdir()} == set(pages)
    assert 'href="planted-report-pooler.html"' in Path(pages[0]).read_text()
    assert memory.find("/bucket/runs/planted") == before
    again = write_report(run_elsewhere, tmp_path / "report.html").read_bytes()
    assert memory.cat_file("/bucket/runs/planted/report.html") == again


def test_runs_here_and_elsewhere_are_compared(local_run, run_elsewhere, tmp_path):
    runs = [local_run, run_elsewhere]
    assert [name for name, _ in open_runs(runs)] == [f"planted ({place})" for place in runs]
    table = comparison_table(runs)
    assert table.iloc[0].tolist() == table.iloc[1].tolist()
    assert write_comparison(runs, tmp_path).is_file()
    assert next(path.name for path in paper_figures(run_elsewhere, tmp_path)) == "headroom.svg"
    for page in (write_report, paper_figures):
        with pytest.raises(SettingsError, match="s3://bucket/pages is elsewhere"):
            page(local_run, "s3://bucket/pages")
    with pytest.raises(SettingsError, match="s3://bucket/pages is elsewhere, and a comparison can be written on"):
        write_comparison(runs, Path("s3://bucket/pages"))


def test_messages_about_a_run_elsewhere_name_its_url(memory, run_elsewhere, tmp_path):
    with pytest.raises(SettingsError, match="The run in memory://bucket/runs/planted has no component 'mlp'"):
        open_run(run_elsewhere, "mlp")
    with pytest.raises(RunFolderError) as caught:
        open_run("memory://bucket/runs")
    assert str(caught.value) == (
        "There is no finished run at memory://bucket/runs: no checksums.json is there, which is written last. Check "
        "the address; where a run was being written, wait for it or run it again."
    )


def test_a_study_asks_before_it_replaces_a_run_elsewhere(run_elsewhere, memory, monkeypatch):
    memory.copy("/bucket/runs/planted", "/one/run", recursive=True)
    with monkeypatch.context() as patch, pytest.raises(RunFolderError, match="'memory://one/run' already holds a run"):
        patch.setattr("synapse.study.record_components", lambda *_, **__: pytest.fail("something was computed"))
        study("memory://one/run", seed=5)
    before = open_run("memory://one/run").manifest["seed"]
    study("memory://one/run", seed=5, overwrite=True)
    assert (before, open_run("memory://one/run").manifest["seed"]) == (0, 5)


def test_a_study_that_was_killed_goes_on_from_the_cache_and_ends_as_an_unbroken_one(tmp_path, memory, local_run):
    steps = []

    def die(stage, done, total):
        if stage == "sweep residual" and total:
            steps.append(done)
            if done > total / 2:
                raise KeyboardInterrupt

    def watch(stage, done, total):
        if stage == "sweep residual" and total:
            steps.append(done)

    with pytest.raises(KeyboardInterrupt):
        study("memory://two/run", progress=die, cache=tmp_path)
    broken_at, first_step = steps[-1], steps[0]
    assert memory.find("/two") == []
    assert len(list(tmp_path.glob(".*-sweep"))) == 1
    steps.clear()
    study("memory://two/run/", progress=watch, cache=tmp_path)
    assert first_step < steps[0] <= broken_at
    assert memory.cat_file("/two/run/scorecard.json") == (local_run / "scorecard.json").read_bytes()
    assert list(tmp_path.glob(".*-sweep")) == []


def test_a_study_file_names_a_place_elsewhere_or_here(tmp_path):
    def out(line):
        (tmp_path / "study.yaml").write_text(f"out: {line}\n")
        return make_settings(**read_settings(tmp_path / "study.yaml")).out

    assert out("s3://bucket/run/") == "s3://bucket/run"
    assert out("run") == tmp_path / "run"
    assert out(f"file://{tmp_path}/run") == tmp_path / "run"
    assert make_settings(out=Path("s3://bucket/run")).model_dump(mode="json")["out"] == "s3://bucket/run"


def test_recordings_elsewhere_are_refused():
    with pytest.raises(SettingsError) as caught:
        make_settings(cache="s3://bucket/cache")
    assert str(caught.value) == (
        "s3://bucket/cache is elsewhere, and recordings can be written on this machine only: give a path here."
    )


def test_a_file_url_is_a_place_of_this_machine(tmp_path, local_run):
    assert open_run(f"file://{local_run}").path == local_run
    with pytest.raises(RunFolderError, match="already holds a run"):
        check_free(f"file://{local_run}", overwrite=False)
