"""`synapse whatif` on tiny random models that are saved and loaded."""

import json
from pathlib import Path

import numpy as np
import pytest
from test_commands import call, refused
from test_kinds import images, pairs

from synapse.model.classifier import Classifier
from synapse.perturb.activations import Scale, Zero
from synapse.ranking.base import Ranking
from test_edits import write_run

TEXT = "w1 w2 w3 w4"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A BERT of 2 layers and 16 units with the classes a and b."""
    return pairs(tmp_path_factory.mktemp("models"))[0]


@pytest.fixture(scope="module")
def classifier(model) -> Classifier:
    return Classifier.from_pretrained(model)


@pytest.fixture(scope="module")
def ranking(classifier) -> Ranking:
    return Ranking("probeless", np.random.default_rng(0).random((2, 3, 16)), ("a", "b"), source="train")


@pytest.fixture(scope="module")
def run(tmp_path_factory, classifier, ranking) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "tiny", classifier, [ranking])


def test_before_and_after_are_those_of_the_live_model(monkeypatch, tmp_path, capsys, model, classifier, ranking, run):
    edits = ["--zero", "layer=1,top=4,class=b", "--scale", "layer=0,bottom=50%,factor=3,scope=all"]
    out = tmp_path / "found.json"
    assert call(monkeypatch, "whatif", model, TEXT, *edits, "--run", run, "--json", out) == 0
    found = json.loads(out.read_text())
    zero, scale = Zero(ranking.top(4, layer=1, label="b")), Scale(ranking.bottom(8, layer=0), scope="all", factor=3.0)
    with classifier.edited(zero, scale):
        after = classifier.predict([TEXT])[0]
    assert list(found["before"]["logits"].values()) == pytest.approx(classifier.predict([TEXT])[0].tolist(), abs=1e-5)
    assert list(found["after"]["logits"].values()) == pytest.approx(after.tolist(), abs=1e-5)
    assert found["input"] == TEXT
    assert [row["word"] for row in sorted(found["words"]["rows"], key=lambda row: row["place"])] == TEXT.split()
    shown = capsys.readouterr().out
    assert "zero: 4 of 16 residual neurons of layer 1, ranked highest by probeless for b, in the readout row" in shown
    assert (
        "scale 3: 8 of 16 residual neurons of layer 0, ranked lowest by probeless over all classes, in all rows"
        in shown
    )
    assert "Random control, 20 draws" in shown
    assert "Words whose evidence for" in shown


def test_the_same_command_prints_the_same(monkeypatch, capsys, model):
    arguments = ("whatif", model, TEXT, "--zero", "layer=1,random=4", "--flip", "layer=0,units=1-3", "--words", "2")
    shown = []
    for _ in range(2):
        assert call(monkeypatch, *arguments) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]
    assert "2 more moved less" in shown[0]


def test_losing_one_row_before_the_last_layer_is_called_what_it_is(monkeypatch, capsys, model):
    for scope, is_noted in (("readout", True), ("readout-onward", False), ("all", False)):
        assert call(monkeypatch, "whatif", model, TEXT, "--scale", f"layer=0,units=1,factor=1.01,scope={scope}") == 0
        assert ("later layers can read what was taken again" in capsys.readouterr().out) == is_noted
    assert call(monkeypatch, "whatif", model, TEXT, "--scale", "layer=1,units=1,factor=1.01") == 0
    assert "later layers" not in capsys.readouterr().out


def test_pairs_and_token_ids_are_taken_too(monkeypatch, capsys, tmp_path, model):
    out = tmp_path / "found.json"
    edit = ("--zero", "layer=1,units=1-8")
    assert call(monkeypatch, "whatif", model, "w1 w2", "--pair", "w3 w4", *edit, "--json", out) == 0
    assert {row["part"] for row in json.loads(out.read_text())["words"]["rows"]} == {0, 1}
    capsys.readouterr()
    assert call(monkeypatch, "whatif", model, "2 7 9 3", "--ids", *edit) == 0
    shown = capsys.readouterr().out
    assert "Random control" in shown
    assert "of token ids nothing is" in shown


def test_an_image_is_shown_before_and_after_without_words(monkeypatch, tmp_path, capsys):
    model, _ = images(tmp_path)
    assert call(monkeypatch, "whatif", model, tmp_path / "test0.png", "--file", "--zero", "layer=1,units=all") == 0
    shown = capsys.readouterr().out
    assert "Prediction: " in shown
    assert "Words are left out of texts and pairs of texts; of files nothing is." in shown
    assert "There is no random control: all units are edited" in shown


def test_noise_and_means_come_from_the_reference_file(monkeypatch, capsys, tmp_path, model):
    (tmp_path / "train.csv").write_text("text,label\nw1 w2,a\nw3,b\nw5 w6,a\nw7,b\n")
    edits = ["--noise", "layer=0,random=50%,scope=all,strength=2", "--mean", "layer=1,units=1-4"]
    assert call(monkeypatch, "whatif", model, TEXT, *edits, "--reference", tmp_path / "train.csv") == 0
    assert "noise 2: 8 of 16 residual neurons of layer 0, random, in all rows" in capsys.readouterr().out
    assert "give a labelled file with --reference" in refused(monkeypatch, capsys, "whatif", model, TEXT, *edits)


def test_any_kind_can_be_named(monkeypatch, capsys, model):
    assert call(monkeypatch, "whatif", model, TEXT, "--edit", "kind=rotate,angle=90,layer=1,units=1-4") == 0
    assert "rotate 90: 4 of 16 residual neurons of layer 1" in capsys.readouterr().out


def test_what_is_missing_is_said_in_one_line(monkeypatch, capsys, tmp_path, model, run):
    def whatif(*options):
        return refused(monkeypatch, capsys, "whatif", model, TEXT, *options)

    assert "No edit is given; add one or more, such as --zero layer=5" in whatif()
    by_rank = whatif("--zero", "layer=1,top=4")
    assert "give the run folder of a study of this model with --run (`synapse run MODEL" in by_rank
    assert "is no folder" in whatif("--zero", "layer=1,top=4", "--run", tmp_path / "nowhere")
    assert "--zero layer=1: it names no neurons" in whatif("--zero", "layer=1")
    assert "knows no class 'B'; it has a, b." in whatif("--zero", "layer=1,top=1,class=B", "--run", run)
    assert "Unit 99 was asked for" in whatif("--zero", "layer=1,units=99")
    assert "3 random draws were asked for; 10 or more" in whatif("--zero", "layer=1,units=1", "--draws", "3")
    assert "one kind is needed, such as kind=clamp" in whatif("--edit", "layer=1,units=1")
    assert "There is no file" in whatif("--zero", "layer=1,units=1", "--file")
    assert "with --ids it is token ids" in whatif("--zero", "layer=1,units=1", "--ids")
    assert "one of a text, a pair" in whatif("--zero", "layer=1,units=1", "--ids", "--file")


def test_a_run_of_another_model_is_refused(monkeypatch, capsys, tmp_path, model, classifier, ranking):
    other = write_run(tmp_path / "other", classifier, [ranking], model={"hash": "f" * 64})
    message = refused(monkeypatch, capsys, "whatif", model, TEXT, "--zero", "layer=1,top=4", "--run", other)
    assert "is of a model whose weights hash to ffffffffffff" in message


def test_the_model_is_loaded_as_the_study_did(monkeypatch, capsys, tmp_path, model, classifier, ranking):
    """A study that cut texts at 4 tokens, [CLS] w1 w2 [SEP], saw none of the later words: they have no evidence."""
    short = write_run(tmp_path / "short", classifier, [ranking], settings={"max_length": 4, "labels": None})
    out = tmp_path / "found.json"
    arguments = ("--zero", "layer=1,top=4", "--run", short, "--json", out)
    assert call(monkeypatch, "whatif", model, TEXT, *arguments) == 0
    rows = sorted(json.loads(out.read_text())["words"]["rows"], key=lambda row: row["place"])
    assert [abs(row["before"]) > 1e-6 for row in rows[2:]] == [False, False]
    assert max(abs(row["before"]) for row in rows[:2]) > 1e-6
