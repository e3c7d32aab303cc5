"""Recordings that are found again, those that must not be, and how they are removed."""

import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import tiny_models
import torch
from filelock import FileLock
from planted import (
    B_UNIT,
    C_UNIT,
    planted_classifier,
    planted_examples,
    random_classifier,
    random_examples,
    token_preprocess,
)
from recorder import LOOKED_AT, counted_calls, only_recording, small_windows

from synapse.data.examples import Examples
from synapse.errors import RunFolderError
from synapse.model.classifier import Classifier
from synapse.perturb.activations import Zero
from synapse.recording import Shelf, default_shelf, record, record_components
from synapse.types import Neurons

N = 20


@pytest.fixture(autouse=True)
def windows_of_a_few(monkeypatch):
    small_windows(monkeypatch)


@pytest.fixture
def subject():
    return random_classifier("bert"), random_examples(N, seed=1)


def n_run(classifier, examples, **options):
    """Record, and return how many examples the model was run on."""
    with counted_calls(classifier.blocks[0]) as calls:
        record(classifier, examples, **options)
    return sum(calls)


def test_an_equal_recording_is_not_made_twice(subject, tmp_path):
    classifier, examples = subject
    assert n_run(classifier, examples, keep=tmp_path) == LOOKED_AT + N
    assert n_run(classifier, examples, keep=str(tmp_path)) == LOOKED_AT
    assert n_run(random_classifier("bert"), random_examples(N, seed=1), keep=tmp_path) == LOOKED_AT
    only_recording(tmp_path)


def test_names_and_what_was_asked_before_make_no_difference(subject, tmp_path):
    classifier, examples = subject
    record(classifier, examples, keep=tmp_path)
    classifier.name = "another"
    torch.manual_seed(7)
    classifier.predict(random_examples(5, seed=9))
    assert n_run(classifier, replace(examples, name="another"), keep=tmp_path) == LOOKED_AT
    assert n_run(classifier, examples.take(range(N)), keep=tmp_path) == LOOKED_AT


def test_the_order_in_which_components_are_named_makes_no_difference(subject, tmp_path):
    record_components(*subject, ["residual", "mlp"], keep=tmp_path)
    record_components(*subject, ["mlp", "residual"], keep=tmp_path)
    only_recording(tmp_path)


CHANGES = {
    "one weight": lambda c, e: (c.module.bert.encoder.layer[2].output.dense.weight.data[0, 0].add_(1e-7), (c, e))[1],
    "a buffer": lambda c, e: (c.module.register_buffer("extra", torch.ones(1)), (c, e))[1],
    "a token of one example": lambda c, e: (c, _with(e, 7, inputs=e.inputs[7] + " 3")),
    "the order": lambda c, e: (c, e.take([1, 0, *range(2, N)])),
    "one example less": lambda c, e: (c, e.take(range(N - 1))),
    "a label": lambda c, e: (c, _with(e, 7, labels="a" if e.labels[7] != "a" else "b")),
    "the order of the class names": lambda c, e: (setattr(c, "labels", ("b", "a", "c")), (c, e))[1],
    "the preprocessing": lambda c, e: (setattr(c, "preprocess", cut), (c, e))[1],
}


def _with(examples, i, **changes):
    columns = {"inputs": list(examples.inputs), "labels": list(examples.labels)}
    for name, value in changes.items():
        columns[name][i] = value
    return Examples(columns["inputs"], tuple(columns["labels"]), examples.name)


def cut(texts):
    return token_preprocess([" ".join(text.split()[:6]) for text in texts])


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_is_changed_makes_another_recording(subject, tmp_path, change):
    record(*subject, keep=tmp_path)
    classifier, examples = CHANGES[change](*subject)
    found = record(classifier, examples, keep=tmp_path)
    assert len(Shelf(tmp_path).recordings()) == 2
    np.testing.assert_array_equal(np.asarray(found.values), record(classifier, examples).values)


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "float16"},
        {"dtype": "bfloat16"},
        {"depth": 2},
        {"logits": False},
        {"component": "mlp"},
        {"component": "attention"},
    ],
    ids=str,
)
def test_another_option_makes_another_recording(subject, tmp_path, options):
    record(*subject, keep=tmp_path)
    record(*subject, keep=tmp_path, **options)
    assert len(Shelf(tmp_path).recordings()) == 2
    assert n_run(*subject, keep=tmp_path, **options) == LOOKED_AT


def test_the_depth_of_the_whole_model_is_no_depth(subject, tmp_path):
    record(*subject, keep=tmp_path)
    assert n_run(*subject, keep=tmp_path, depth=3) == LOOKED_AT


def test_a_type_is_part_of_what_is_found(subject, tmp_path):
    exact = record(*subject, keep=tmp_path)
    coarse = record(*subject, keep=tmp_path, dtype="bfloat16")
    again = record(*subject, keep=tmp_path)
    np.testing.assert_array_equal(np.asarray(again.values), np.asarray(exact.values))
    assert not np.array_equal(np.asarray(again.values), np.asarray(coarse.values))


def test_an_intervention_makes_another_recording_and_leaves_the_plain_one(subject, tmp_path):
    classifier, examples = subject
    plain = record(classifier, examples, keep=tmp_path)
    with classifier.edited(Zero(Neurons(0, (1, 2, 3)), scope="all")):
        edited = record(classifier, examples, keep=tmp_path)
        expected = record(classifier, examples)
    np.testing.assert_array_equal(np.asarray(edited.values), expected.values)
    assert not edited.values[0][:, 1:4].any()
    np.testing.assert_array_equal(record(classifier, examples, keep=tmp_path).values[0], plain.values[0])


def test_a_shift_of_logits_makes_another_recording(subject, tmp_path):
    classifier, examples = subject
    plain = record(classifier, examples, keep=tmp_path)
    with classifier.logits_edited(lambda logits: logits + 1):
        shifted = record(classifier, examples, keep=tmp_path)
    assert not np.array_equal(shifted.logits, plain.logits)
    np.testing.assert_array_equal(shifted.values[2], plain.values[2])


def test_an_intervention_that_moves_no_logit_that_is_looked_at_makes_another_recording(tmp_path):
    classifier, examples = planted_classifier(), planted_examples(10, seed=1)
    record(classifier, examples, keep=tmp_path)
    with classifier.edited(Zero(Neurons(0, (B_UNIT,)), scope="all")):
        edited = record(classifier, examples, keep=tmp_path)
    assert not edited.values[0][:, B_UNIT].any()


def test_two_interventions_that_move_no_logit_that_is_looked_at_make_two_recordings(tmp_path):
    classifier, examples = planted_classifier(), planted_examples(10, seed=1)
    for unit in (B_UNIT, C_UNIT):
        with classifier.edited(Zero(Neurons(0, (unit,)), scope="all")):
            edited = record(classifier, examples, keep=tmp_path)
    assert not edited.values[0][:, C_UNIT].any()


def test_an_intervention_in_rows_that_the_head_does_not_read_makes_another_recording(subject, tmp_path):
    classifier, examples = subject
    record(classifier, examples, keep=tmp_path)
    handle = classifier.blocks[2].register_forward_hook(_without_later_rows)
    edited, expected = record(classifier, examples, keep=tmp_path), record(classifier, examples)
    handle.remove()
    np.testing.assert_array_equal(edited.row_mean, expected.row_mean)


def _without_later_rows(_module, _given, output):
    states = output[0] if isinstance(output, tuple) else output
    states = torch.cat([states[:, :1], torch.zeros_like(states[:, 1:])], dim=1)
    return (states, *output[1:]) if isinstance(output, tuple) else states


# A model folder, whose tokenizer is a file


@pytest.fixture
def model_folder(tmp_path):
    torch.manual_seed(0)
    folder = tmp_path / "model"
    tiny_models.bert().save_pretrained(folder)
    tiny_models.word_tokenizer(model_max_length=16).save_pretrained(folder)
    return folder


TEXTS = ["the cat sat on a mat and then it slept", "it slept", "the mat", "a cat and a mat sat on it then"] * 3
WORDS = Examples(TEXTS, ("good", "bad", "ugly") * 4, "texts")


def test_a_changed_tokenizer_file_makes_another_recording(model_folder, tmp_path):
    record(Classifier.from_pretrained(model_folder, device="cpu"), WORDS, keep=tmp_path / "kept")
    assert n_run(Classifier.from_pretrained(model_folder, device="cpu"), WORDS, keep=tmp_path / "kept") == LOOKED_AT
    tokenizer = model_folder / "tokenizer.json"
    text = tokenizer.read_text().replace('"mat": 9', '"mat": 8').replace('"a": 8', '"a": 9')
    assert text != tokenizer.read_text()
    tokenizer.write_text(text)
    record(Classifier.from_pretrained(model_folder, device="cpu"), WORDS, keep=tmp_path / "kept")
    assert len(Shelf(tmp_path / "kept").recordings()) == 2


def test_texts_that_are_cut_shorter_make_another_recording(model_folder, tmp_path):
    for max_length in (None, 5, 5):
        classifier = Classifier.from_pretrained(model_folder, device="cpu", max_length=max_length)
        record(classifier, WORDS, keep=tmp_path / "kept")
    assert len(Shelf(tmp_path / "kept").recordings()) == 2


# The shelf itself


def test_the_folder_is_that_of_the_environment_and_otherwise_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for given, cache, expected in (
        ("/somewhere", None, "/somewhere"),
        ("~/mine", "/cache", tmp_path / "mine"),
        (None, "/cache", "/cache/synapse"),
        ("", "", tmp_path / ".cache" / "synapse"),
        (None, None, tmp_path / ".cache" / "synapse"),
    ):
        for name, value in (("SYNAPSE_CACHE", given), ("XDG_CACHE_HOME", cache)):
            monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
        assert str(default_shelf()) == str(expected)


def test_a_shelf_that_is_not_there_is_empty(tmp_path):
    shelf = Shelf(tmp_path / "none")
    assert (shelf.recordings(), shelf.drafts(), shelf.prune(), shelf.find("0" * 32)) == ([], [], [], None)
    assert not (tmp_path / "none").exists()


def aged(path, days):
    then = time.time() - days * 86_400
    os.utime(path, (then, then))


def test_those_used_last_come_first_and_finding_is_using(subject, tmp_path):
    record(*subject, keep=tmp_path)
    record(*subject, keep=tmp_path, depth=1)
    plain, shallow = _by_depth(tmp_path)
    aged(plain.folder, 3)
    aged(shallow.folder, 2)
    assert [found.folder for found in Shelf(tmp_path).recordings()] == [shallow.folder, plain.folder]
    record(*subject, keep=tmp_path)
    assert [found.folder for found in Shelf(tmp_path).recordings()] == [plain.folder, shallow.folder]


def _by_depth(shelf):
    return sorted(Shelf(shelf).recordings(), key=lambda found: -found.layout.components["residual"][0])


def test_pruning_removes_what_was_not_used_for_so_long(subject, tmp_path):
    record(*subject, keep=tmp_path)
    record(*subject, keep=tmp_path, depth=1)
    plain, shallow = _by_depth(tmp_path)
    aged(plain.folder, 3)
    draft = tmp_path / f".{'a' * 32}.draft"
    draft.mkdir()
    (draft / "x").write_text("half")
    aged(draft, 3)
    assert Shelf(tmp_path).prune(older_than=4.0) == []
    assert sorted(Shelf(tmp_path).prune(older_than=2.0)) == sorted([plain.folder, draft])
    assert [found.folder for found in Shelf(tmp_path).recordings()] == [shallow.folder]
    assert Shelf(tmp_path).prune() == [shallow.folder]
    assert n_run(*subject, keep=tmp_path) == LOOKED_AT + N


def test_pruning_leaves_alone_what_is_no_recording(subject, tmp_path):
    record(*subject, keep=tmp_path)
    for name in ("documents", ".hidden", ".other.draft", "deadbeef"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("years of work")
    (tmp_path / ("f" * 32)).write_text("a file")
    assert [found.folder for found in Shelf(tmp_path).recordings()] == Shelf(tmp_path).prune()
    for name in ("documents", ".hidden", ".other.draft", "deadbeef"):
        assert (tmp_path / name / "thesis.txt").read_text() == "years of work"


HOLD = """
import sys
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_pruning_leaves_alone_what_another_process_is_making(subject, tmp_path):
    record(*subject, keep=tmp_path)
    folder = only_recording(tmp_path)
    lock = tmp_path / f".{folder.name}.lock"
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "held\n"
    assert Shelf(tmp_path).prune() == []
    other.communicate("")
    assert Shelf(tmp_path).prune() == [folder]


def test_the_place_is_free_again_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), Shelf(tmp_path).recording("0" * 32):
        raise ZeroDivisionError
    with FileLock(tmp_path / f".{'0' * 32}.lock", timeout=0):
        pass


def test_a_recording_that_is_moved_with_its_shelf_is_found(subject, tmp_path):
    record(*subject, keep=tmp_path / "one")
    shutil.move(tmp_path / "one", tmp_path / "two")
    assert n_run(*subject, keep=tmp_path / "two") == LOOKED_AT


def test_a_shelf_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(RunFolderError, match="is a file; a folder for recordings was expected"),
        Shelf(tmp_path / "file").recording("0" * 32),
    ):
        pass
