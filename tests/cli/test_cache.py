"""`synapse verify`, `synapse cache` and the options and settings that say where recordings are kept."""

import json
import os
import shutil
import time

import pytest
from planted import planted_classifier, planted_examples, random_classifier, random_examples
from test_commands import QUICK, call, files, model_folder  # noqa: F401

from synapse.recording import Shelf, record
from synapse.settings import make_settings
from synapse.study import run_study


@pytest.fixture(scope="module")
def one_shelf(tmp_path_factory):
    """A folder with two recordings."""
    folder = tmp_path_factory.mktemp("shelf")
    classifier, examples = random_classifier("bert"), random_examples(12, seed=1)
    record(classifier, examples, keep=folder)
    record(classifier, examples, keep=folder, component="mlp", dtype="float16")
    return folder


@pytest.fixture
def shelf(one_shelf, tmp_path, monkeypatch):
    """A copy of it, which may be damaged."""
    shutil.copytree(one_shelf, tmp_path / "shelf")
    monkeypatch.setenv("SYNAPSE_CACHE", str(tmp_path / "elsewhere"))
    return tmp_path / "shelf"


@pytest.fixture(scope="module")
def one_run(tmp_path_factory):
    """A run folder as a study leaves it."""
    settings = make_settings(examples=30, train_examples=60, fractions=(0.5, 1.0), kinds=("zero",), rank_draws=0)
    out = tmp_path_factory.mktemp("runs") / "mine"
    train, test = planted_examples(90, seed=1), planted_examples(30, seed=2)
    return run_study(planted_classifier(), train, test, settings=settings, out=out, progress=lambda *_: None)


@pytest.fixture
def run(one_run, tmp_path):
    shutil.copytree(one_run, tmp_path / "run")
    return tmp_path / "run"


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def test_recordings_are_listed_with_what_they_hold(shelf, monkeypatch, capsys):
    assert call(monkeypatch, "cache", "ls", "--cache", shelf) == 0
    shown = capsys.readouterr().out
    for recording in Shelf(shelf).recordings():
        assert recording.folder.name in shown
    assert "residual 3 x 32" in shown
    assert "mlp 3 x 48" in shown
    assert "float16" in shown
    assert "2 recordings, " in shown


def test_what_was_not_finished_or_cannot_be_read_is_listed_as_that(shelf, monkeypatch, capsys):
    (shelf / f".{'a' * 32}.draft").mkdir()
    damaged = Shelf(shelf).recordings()[0].folder
    (damaged / "manifest.json").write_text("{")
    assert call(monkeypatch, "cache", "ls", "--cache", shelf) == 0
    shown = capsys.readouterr().out
    assert f"Not finished: {shelf}/.{'a' * 32}.draft" in shown
    assert "cannot be read" in shown


@pytest.mark.parametrize("command", ["ls", "verify", "prune"])
def test_the_folder_is_that_of_the_environment_unless_another_is_named(
    one_shelf, monkeypatch, capsys, command, tmp_path
):
    shutil.copytree(one_shelf, tmp_path / "mine")
    keys = [recording.folder.name for recording in Shelf(one_shelf).recordings()]
    monkeypatch.setenv("SYNAPSE_CACHE", str(tmp_path / "mine"))
    assert call(monkeypatch, "cache", command, "--cache", tmp_path / "other") == 0
    nothing = capsys.readouterr().out
    assert call(monkeypatch, "cache", command) == 0
    shown = capsys.readouterr().out
    for key in keys:
        assert key in shown
        assert key not in nothing


def test_whole_recordings_are_found_whole(shelf, monkeypatch, capsys):
    assert call(monkeypatch, "cache", "verify", "--cache", shelf) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sorted(lines) == sorted(f"{recording.folder}: whole" for recording in Shelf(shelf).recordings())


@pytest.mark.parametrize("damage", ["flip", "cut", "missing"])
def test_a_damaged_recording_is_named_with_the_file_and_ends_with_status_1(shelf, monkeypatch, capsys, damage):
    one, other = (recording.folder for recording in Shelf(shelf).recordings())
    (chunk, *_) = one.glob("values.zarr/*/01/c/0/0")
    if damage == "flip":
        flip(chunk)
    elif damage == "cut":
        chunk.write_bytes(chunk.read_bytes()[:-1])
    else:
        chunk.unlink()
    assert call(monkeypatch, "cache", "verify", "--cache", shelf) == 1
    shown = capsys.readouterr().out
    assert f"{one}: damaged\n  {chunk.relative_to(one)} " in shown
    assert f"{other}: whole" in shown
    assert call(monkeypatch, "verify", one) == 1
    assert call(monkeypatch, "verify", other) == 0


def test_pruning_removes_all_or_only_what_is_old_and_says_what(shelf, monkeypatch, capsys):
    old, new = (recording.folder for recording in Shelf(shelf).recordings())
    then = time.time() - 40 * 86_400
    os.utime(old, (then, then))
    assert call(monkeypatch, "cache", "prune", "--cache", shelf, "--older-than", "30") == 0
    assert capsys.readouterr().out == f"Removed {old}\n1 removed.\n"
    assert new.is_dir()
    assert call(monkeypatch, "cache", "prune", "--cache", shelf) == 0
    assert capsys.readouterr().out == f"Removed {new}\n1 removed.\n"
    assert Shelf(shelf).recordings() == []


def test_pruning_a_folder_of_something_else_removes_nothing(tmp_path, monkeypatch, capsys):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("years of work")
    assert call(monkeypatch, "cache", "prune", "--cache", tmp_path) == 0
    assert capsys.readouterr().out == "0 removed.\n"
    assert (tmp_path / "thesis" / "chapter").read_text() == "years of work"


def test_a_negative_age_is_refused(shelf, monkeypatch, capsys):
    assert call(monkeypatch, "cache", "prune", "--cache", shelf, "--older-than", "-1") != 0
    assert "--older-than is -1; a number of days, 0 or more, was expected." in capsys.readouterr().err
    assert len(Shelf(shelf).recordings()) == 2


# Run folders


def test_a_run_is_whole_also_after_its_report_was_drawn_again(run, monkeypatch, capsys):
    assert call(monkeypatch, "verify", run) == 0
    assert capsys.readouterr().out == f"{run}: whole\n"
    assert call(monkeypatch, "report", run) == 0
    capsys.readouterr()
    assert call(monkeypatch, "verify", run) == 0
    assert capsys.readouterr().out == f"{run}: whole\n"


def test_every_file_of_a_run_but_the_report_is_sealed(run):
    sealed = set(json.loads((run / "checksums.json").read_text()))
    there = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    assert there - sealed == {"checksums.json", "report.html"}
    assert sealed < there


@pytest.mark.parametrize("damage", ["flip", "cut", "missing"])
@pytest.mark.parametrize("name", ["manifest.json", "scorecard.json", "tables/sweep.parquet", "logits.zarr/zarr.json"])
def test_a_damaged_run_is_named_with_the_file(run, monkeypatch, capsys, name, damage):
    path = run / name
    size = path.stat().st_size
    if damage == "flip":
        flip(path)
        flaw = f"{name} has changed: its SHA-256 is not that of what was written"
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-3])
        flaw = f"{name} has {size - 3} bytes, and {size} were written"
    else:
        path.unlink()
        flaw = f"{name} is missing"
    assert call(monkeypatch, "verify", run) == 1
    assert capsys.readouterr().out == f"{run}: damaged\n  {flaw}\n"


def test_a_missing_chunk_of_the_logits_is_named(run, monkeypatch, capsys):
    (chunk, *_) = sorted(
        path for path in (run / "logits.zarr" / "cells").rglob("*") if "/c/" in str(path) and path.is_file()
    )
    chunk.unlink()
    assert call(monkeypatch, "verify", run) == 1
    assert f"{chunk.relative_to(run)} is missing" in capsys.readouterr().out


def test_several_are_verified_at_once_and_one_that_is_damaged_ends_with_status_1(run, shelf, monkeypatch, capsys):
    one = Shelf(shelf).recordings()[0].folder
    flip(run / "scorecard.json")
    assert call(monkeypatch, "verify", run, one) == 1
    shown = capsys.readouterr().out
    assert f"{run}: damaged" in shown
    assert f"{one}: whole" in shown


def test_a_run_of_an_older_version_says_that_it_has_no_seal(run, monkeypatch, capsys):
    (run / "checksums.json").unlink()
    assert call(monkeypatch, "verify", run) == 1
    assert (
        "checksums.json is missing: the folder was not finished, or is of an older version" in capsys.readouterr().out
    )


def test_what_is_no_folder_is_refused(run, monkeypatch, capsys):
    for path in (run / "manifest.json", run / "nowhere"):
        assert call(monkeypatch, "verify", path) != 0
        assert f"'{path}' is no folder; a run folder or a recording was expected." in capsys.readouterr().err


# `synapse run`


@pytest.mark.parametrize(
    ("options", "kept"),
    [([], "environment"), (["--cache", "off"], None), (["--cache", "DIR"], "DIR")],
    ids=["by default", "off", "named"],
)
def test_a_run_keeps_its_recordings_where_it_is_told(tmp_path, monkeypatch, capsys, model_folder, files, options, kept):  # noqa: F811
    monkeypatch.setenv("SYNAPSE_CACHE", str(tmp_path / "environment"))
    monkeypatch.chdir(tmp_path)
    options = [str(tmp_path / "DIR") if option == "DIR" else option for option in options]
    command = ["run", model_folder, "--train", files[0], "--test", files[1], *QUICK, "--threads", "1", *options]
    assert call(monkeypatch, *command, "--out", tmp_path / "first") == 0
    for name in ("environment", "DIR", "off"):
        assert len(Shelf(tmp_path / name).recordings()) == (2 if name == kept else 0)
        assert (tmp_path / name).exists() == (name == kept)
    assert call(monkeypatch, *command, "--out", tmp_path / "second") == 0
    if kept:
        assert len(Shelf(tmp_path / kept).recordings()) == 2
    one, other = (json.loads((tmp_path / out / "scorecard.json").read_text()) for out in ("first", "second"))
    assert one == other
    assert call(monkeypatch, "verify", tmp_path / "first", tmp_path / "second") == 0
