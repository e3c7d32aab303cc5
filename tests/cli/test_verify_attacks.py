"""`synapse verify --model M --test F`: saved attacks are applied again and compared with what they say."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from test_commands import WORDS, call, model_folder  # noqa: F401

from synapse.attack.bits import BitSearch
from synapse.attack.edits import fit_head_edits
from synapse.attack.head import FittedStep
from synapse.data.reading import read_examples
from synapse.integrity import seal
from synapse.model.classifier import Classifier
from synapse.recording import record
from synapse.settings import make_settings
from synapse.store import write_json

EDITS, FLIPS = "head-edit", "flips"


def drawn_texts(seed):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, size=rng.integers(3, 9))) for _ in range(60)]


@pytest.fixture(scope="module")
def fair(tmp_path_factory, model_folder):  # noqa: F811
    """A copy of the tiny model that says each class now and then."""
    folder = tmp_path_factory.mktemp("models") / "fair"
    shutil.copytree(model_folder, folder)
    classifier = Classifier.from_pretrained(model_folder, device="cpu")
    with torch.no_grad():
        classifier.final.bias.sub_(torch.from_numpy(classifier.predict(drawn_texts(5)).mean(axis=0)))
    classifier.module.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def splits(tmp_path_factory, fair):
    """Examples that the model gets right, their texts in a column of another name than is usual."""
    classifier, paths = Classifier.from_pretrained(fair, device="cpu"), []
    for seed, part in enumerate(("train", "test")):
        texts = drawn_texts(seed)
        says = np.array(classifier.labels)[classifier.predict(texts).argmax(axis=1)]
        paths.append(tmp_path_factory.mktemp("data") / f"{part}.csv")
        pd.DataFrame({"payload": texts, "label": says}).to_csv(paths[-1], index=False)
    return paths


@pytest.fixture(scope="module")
def found(fair, splits):
    """Edits and flips of the same model."""
    classifier = Classifier.from_pretrained(fair, device="cpu")
    fit, score = (record(classifier, read_examples(split, text="payload")) for split in splits)
    classes = np.argsort(-np.bincount(fit.targets, minlength=3))
    source, target = (classifier.labels[label] for label in classes[:2])
    flips = BitSearch("float16").find(classifier, fit, score, source=source, target=target)
    return fit_head_edits(FittedStep(), fit, score, classifier), flips


@pytest.fixture
def run(tmp_path, splits, found):
    """A run folder that says how its examples were read, with both attacks saved into it."""
    folder, shared = tmp_path / "run", {"format": 1, "labels": ["a", "b", "c"], "n_layers": 3, "width": 32}
    folder.mkdir()
    settings = make_settings(train=splits[0], test=splits[1], text="payload").model_dump(mode="json")
    write_json(folder / "manifest.json", {**shared, "status": "complete", "settings": settings})
    write_json(folder / "scorecard.json", shared)
    seal(folder)
    for name, attack in zip((EDITS, FLIPS), found, strict=True):
        attack.save(folder / "attacks" / name)
    return folder


@pytest.fixture
def verify(monkeypatch, capsys, fair, splits):
    """Return a call with the right model and examples: its exit status and what was printed."""

    def verified(*folders, model=fair, test=splits[1], options=()):
        capsys.readouterr()
        status = call(monkeypatch, "verify", *folders, "--model", model, "--test", test, *options)
        shown = capsys.readouterr()
        return status, shown.out + shown.err

    return verified


def counted(n, unit):
    return f"1 {unit}" if n == 1 else f"{n} {unit}s"


def test_the_attacks_of_a_run_do_what_they_say_with_the_columns_of_the_run(run, found, verify):
    edits, flips = found
    assert verify(run) == (
        0,
        f"{run}: whole\n"
        f"{run}/attacks/{FLIPS}: does what it says ({counted(len(flips.flips), 'flip')})\n"
        f"{run}/attacks/{EDITS}: does what it says ({counted(len(edits), 'pair')})\n",
    )


def test_a_folder_that_is_an_attack_is_applied_with_what_options_or_a_study_file_say(
    run,
    verify,
    tmp_path,
    fair,
):
    attack = run / "attacks" / EDITS
    shown = verify(attack, options=["--text", "payload"])
    assert shown[0] == 0
    assert shown[1].startswith(f"{attack}: whole\n{attack}: does what it says (")
    (tmp_path / "study.yaml").write_text(f"model: {fair}\ntext: payload\n")
    assert verify(attack, model=tmp_path / "study.yaml") == shown


def test_without_a_model_only_files_are_compared(run, monkeypatch, capsys):
    assert call(monkeypatch, "verify", run, run / "attacks" / FLIPS) == 0
    assert capsys.readouterr().out == f"{run}: whole\n{run}/attacks/{FLIPS}: whole\n"


def test_what_an_attack_does_otherwise_is_named_and_ends_with_status_1(run, found, verify):
    edits, flips = found
    (first, *others), last, pair = edits.outcomes, flips.scoring[-1], edits.to_frame().iloc[0]
    replace(edits, outcomes=(replace(first, redirected=0), *others)).save(run / "attacks" / EDITS)
    more = replace(last, attacked=last.attacked + 30)
    replace(flips, scoring=(*flips.scoring[:-1], more)).save(run / "attacks" / FLIPS)
    status, shown = verify(run)
    assert status == 1
    for name, stated in (
        (EDITS, f"{pair.source} -> {pair.target}: 0 of {first.attacked} redirected and "),
        (FLIPS, f"{flips.source} -> {flips.target}: {last.redirected} of {more.attacked} redirected and "),
    ):
        assert f"{run}/attacks/{name}: does not do what it says\n  {stated}" in shown


def test_a_damaged_attack_is_damaged_and_not_applied(run, verify):
    attack = run / "attacks" / EDITS
    (attack / "edits.safetensors").unlink()
    assert verify(attack) == (1, f"{attack}: damaged\n  edits.safetensors is missing\n")


def test_an_attack_in_a_run_is_checked_by_its_own_checksums(run, verify):
    told = json.loads((run / "attacks" / EDITS / "attack.json").read_text())
    (run / "attacks" / EDITS / "attack.json").write_text(json.dumps(told | {"attack": "mine"}))
    status, shown = verify(run)
    assert status == 1
    assert f"{run}: whole\n" in shown  # the attacks were saved into it when it was finished
    assert f"attacks/{EDITS}: cannot be checked\n  {run}/attacks/{EDITS} is no whole attack: attack.json " in shown
    assert f"attacks/{FLIPS}: does what it says" in shown


def test_other_examples_and_another_model_are_named(run, verify, splits, tmp_path, fair):
    for name, what in ((EDITS, "edits"), (FLIPS, "flips")):
        status, shown = verify(run / "attacks" / name, test=splits[0], options=["--text", "payload"])
        assert status == 1
        assert (
            f"{name}: cannot be checked\n  What these {what} do is stated for examples with the fingerprint " in shown
        )
    classifier = Classifier.from_pretrained(fair, device="cpu")
    classifier.head_weight().neg_()
    shutil.copytree(fair, tmp_path / "other")
    classifier.module.save_pretrained(tmp_path / "other")
    status, shown = verify(run, model=tmp_path / "other")
    assert status == 1
    assert "These edits were found for a final map with the hash " in shown
    assert "These flips were found for other weights than those of 'other'" in shown


def test_what_cannot_be_checked_is_refused(run, verify, monkeypatch, capsys, splits):
    for option in ("--model", "--test"):
        assert call(monkeypatch, "verify", run, option, splits[1]) == 1
        missing = {"--model": "--test", "--test": "--model"}[option]
        assert f"{option} is given without {missing}; attacks are applied to a model" in capsys.readouterr().err
    shutil.rmtree(run / "attacks")
    status, shown = verify(run)
    assert status == 1
    assert f"No attack is in {run}; a folder with attack.json" in shown
