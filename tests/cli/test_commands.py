import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from planted import random_module

from synapse.cli.app import main

WORDS = [f"w{i}" for i in range(95)]
QUICK = ["--examples", "12", "--train-examples", "60", "--fractions", "0.5,1", "--kinds", "zero"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    """A tiny BERT with random weights and the classes a, b, c."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    module = random_module("bert")
    module.config.id2label = {0: "a", 1: "b", 2: "c"}
    module.config.label2id = {"a": 0, "b": 1, "c": 2}
    module.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def write_examples(path: Path, n: int, *, seed: int, labels=("a", "b", "c"), **columns) -> Path:
    rng = np.random.default_rng(seed)
    texts = [" ".join(rng.choice(WORDS, size=rng.integers(3, 9))) for _ in range(n)]
    table = pd.DataFrame({"text": texts, "label": [labels[i % len(labels)] for i in range(n)], **columns})
    if path.suffix == ".csv":
        table.to_csv(path, index=False)
    elif path.suffix == ".jsonl":
        table.to_json(path, orient="records", lines=True)
    else:
        table.to_parquet(path)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return write_examples(folder / "train.csv", 90, seed=1), write_examples(folder / "test.jsonl", 30, seed=2)


def call(monkeypatch, *arguments) -> int:
    """Run the command line in this process and return its exit status."""
    monkeypatch.setattr(sys, "argv", ["synapse", *map(str, arguments)])
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model_folder, files):
    """A finished run of the command in a process of its own, with nothing installed that a terminal would have."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    command = [sys.executable, "-m", "synapse.cli", "run", model_folder, "--train", files[0], "--test", files[1]]
    done = subprocess.run(
        [*map(str, command), "--out", str(out), "--threads", "1", *QUICK],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    return out, done


def test_a_run_says_what_is_planned_and_shows_what_was_found(finished):
    out, done = finished
    assert "Planned: 60 training and 30 test examples" in done.stderr
    assert "full forward passes" in done.stderr
    assert "accuracy" in done.stdout.lower()
    assert str(out / "report.html") in done.stdout


def test_a_run_is_quiet_when_nobody_watches(finished):
    assert "\x1b" not in finished[1].stdout + finished[1].stderr
    assert "━" not in finished[1].stderr


def test_the_report_needs_no_network(finished):
    import re

    html = (finished[0] / "report.html").read_text()
    assert not re.findall(r"""<(?:script|img|link|iframe)[^>]*(?:src|href)=["']?(?:https?:)?//""", html)


def test_the_report_is_made_again_from_the_folder_alone(monkeypatch, finished, tmp_path):
    assert call(monkeypatch, "report", finished[0], "--out", tmp_path / "again.html") == 0
    assert (tmp_path / "again.html").read_text() == (finished[0] / "report.html").read_text()


def test_runs_are_compared(monkeypatch, finished, tmp_path, capsys):
    assert call(monkeypatch, "compare", finished[0], finished[0], "--out", tmp_path / "both") == 0
    assert (tmp_path / "both" / "comparison.html").exists()
    assert "tiny" in capsys.readouterr().out


def test_one_file_alone_is_split_and_a_study_file_does_the_same(monkeypatch, model_folder, files, tmp_path):
    arguments = ["--train", files[0], *QUICK, "--seed", "3"]
    assert call(monkeypatch, "run", model_folder, *arguments, "--out", tmp_path / "one") == 0
    (tmp_path / "study.yaml").write_text(
        f"model: {model_folder}\ntrain: {files[0]}\nseed: 3\nexamples: 12\ntrain_examples: 60\n"
        "fractions: [0.5, 1]\nkinds: [zero]\nout: two\n"
    )
    assert call(monkeypatch, "run", tmp_path / "study.yaml") == 0
    first, second = ((tmp_path / name / "scorecard.json").read_bytes() for name in ("one", "two"))
    assert first == second
    manifest = json.loads((tmp_path / "one" / "manifest.json").read_text())
    assert manifest["data"]["train"]["n"] + manifest["data"]["test"]["n"] <= 90


def test_inspect_gives_the_anatomy_as_json(monkeypatch, model_folder, capsys):
    assert call(monkeypatch, "inspect", model_folder, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["n_blocks"], found["width"], found["readout"]) == (3, 32, "first")
    assert found["head"] == ["bert.pooler", "dropout", "classifier"]
    assert {name: len(modules) for name, modules in found["sites"].items()} == {
        **dict.fromkeys(("residual", "mlp", "attention", "heads"), 3),
        "pooler": 1,
    }
    assert set(found["proofs"]) == {"identity", "sensitivity", "readout", "head"}


def refused(monkeypatch, capsys, *arguments) -> str:
    """Return the one line that a wrong call prints."""
    capsys.readouterr()  # what was printed while the test prepared its files
    assert call(monkeypatch, *arguments) == 1
    printed = capsys.readouterr()
    lines = printed.err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("Error: ")
    assert printed.out == ""
    return lines[0]


def test_wrong_files_get_one_clear_line(monkeypatch, capsys, model_folder, files, tmp_path):
    def run(train):
        arguments = ("run", model_folder, "--train", train, "--test", files[1], "--out", tmp_path / "run")
        return refused(monkeypatch, capsys, *arguments)

    assert "trian.csv" in run(files[0].with_name("trian.csv"))
    assert "'train.csv'" in run(files[0].with_name("trian.csv"))
    empty = tmp_path / "empty.csv"
    empty.write_text("")
    assert "empty" in run(empty)
    blank = tmp_path / "blank.csv"
    blank.write_text("text,label\nw1 w2,a\n,b\nw3,c\n")
    assert "blank.csv" in run(blank)
    assert "one class" in run(write_examples(tmp_path / "one.csv", 9, seed=1, labels=("a",)))
    unknown = run(write_examples(tmp_path / "unknown.csv", 9, seed=1, labels=("a", "b", "zebra")))
    assert "zebra" in unknown
    other_columns = tmp_path / "columns.csv"
    other_columns.write_text("texts,label\nw1,a\nw2,b\n")
    assert "'texts'" in run(other_columns)
    assert not (tmp_path / "run").exists()


def test_wrong_models_get_one_clear_line(monkeypatch, capsys, files, tmp_path, model_folder):
    def run(model):
        arguments = ("run", model, "--train", files[0], "--test", files[1], "--out", tmp_path / "run")
        return refused(monkeypatch, capsys, *arguments)

    (tmp_path / "no-model").mkdir()
    assert "has no config.json" in run(tmp_path / "no-model")
    assert "no model folder" in run(tmp_path / "nowhere")
    headless = tmp_path / "headless"
    random_module("bert").bert.save_pretrained(headless)
    transformers.AutoTokenizer.from_pretrained(model_folder).save_pretrained(headless)
    assert "has no classification head" in run(headless)


def test_wrong_options_get_one_clear_line(monkeypatch, capsys, model_folder, files, tmp_path):
    def run(*options):
        return refused(monkeypatch, capsys, "run", model_folder, "--train", files[0], *options)

    assert "no list of numbers" in run("--fractions", "half")
    assert "--examples is 'many'" in run("--examples", "many")
    assert "no ranking method 'lineer'" in run("--methods", "lineer")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "data").write_text("")
    assert "is no run folder" in run("--out", tmp_path / "precious")
    assert "two or more are needed" in refused(monkeypatch, capsys, "compare", tmp_path)
    assert "no model is named" in refused(monkeypatch, capsys, "run", empty_study(tmp_path)).lower()
    assert "precious" in refused(monkeypatch, capsys, "report", tmp_path / "precious")


def empty_study(folder: Path) -> Path:
    (folder / "study.yaml").write_text("seed: 1\n")
    return folder / "study.yaml"


def test_the_device_that_is_not_there_is_named(monkeypatch, capsys, model_folder, files, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    arguments = ("run", model_folder, "--train", files[0], "--device", "cuda", "--out", tmp_path / "run")
    assert "no CUDA device is there" in refused(monkeypatch, capsys, *arguments)
