"""Edits of the head that are kept: what the live model says of them, and what is said where something has changed."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from planted import (
    LABELS,
    planted_classifier,
    planted_examples,
    random_classifier,
    random_examples,
    random_module,
    random_texts,
    token_preprocess,
)

from synapse.attack.bits import BitSearch
from synapse.attack.bits.aim import Outcome
from synapse.attack.edits import BEYOND, HeadEdits, fit_head_edits
from synapse.attack.head import FittedStep, KeptMeans, MeanStep, MinimalDamage
from synapse.data.examples import Examples
from synapse.data.reading import read_examples
from synapse.errors import RunFolderError, SettingsError, SplitError
from synapse.model.classifier import Classifier
from synapse.perturb.weights import HeadEdit
from synapse.recording import record
from synapse.testing import check_perturbation

TRAIN, TEST = planted_examples(60, seed=2), planted_examples(61, seed=1)


@pytest.fixture
def classifier():
    return planted_classifier()


@pytest.fixture(scope="module")
def edits():
    classifier = planted_classifier()
    return fit_head_edits(FittedStep(), record(classifier, TRAIN), record(classifier, TEST), classifier)


def counted(classifier, examples, edits, source, target):
    """Return what an edit does in the live model, counted one by one."""
    truth, clean = np.array(examples.labels), np.array(classifier.labels)[classifier.predict(examples).argmax(axis=1)]
    with edits.applied(classifier, source, target):
        now = np.array(classifier.labels)[classifier.predict(examples).argmax(axis=1)]
    attacked, others = (truth == source) & (clean == truth), (truth != source) & (clean == truth)
    redirected, lost = attacked & (now == target), others & (now != truth)
    return Outcome(*(int(some.sum()) for some in (redirected, attacked, lost, others)), 0)


@pytest.mark.parametrize("rows", ["two", "target"])
@pytest.mark.parametrize("kind", [FittedStep, MeanStep, MinimalDamage, KeptMeans])
def test_every_edit_does_in_the_live_model_what_it_says(classifier, kind, rows):
    before, step = classifier.weights_hash(), kind(rows=rows)
    found = fit_head_edits(step, record(classifier, TRAIN), record(classifier, TEST), classifier)
    assert found.attack == step.name
    assert len(found) >= 4
    for pair, row in enumerate(found.to_frame().itertuples()):
        assert counted(classifier, TEST, found, row.source, row.target) == found.outcomes[pair]
        assert counted(classifier, TRAIN, found, row.source, row.target).success == found.shares[pair] >= 0.95
        edit = found.edit(row.source, row.target)
        assert row.budget == pytest.approx(np.linalg.norm(edit.change) / np.linalg.norm(classifier.head_weight()))
        assert (np.flatnonzero(edit.change.any(axis=1)).size) == (2 if rows == "two" else 1)
        assert (row.success, row.collateral) == (found.outcomes[pair].success, found.outcomes[pair].collateral)
    assert found.checked(classifier, TEST) == []
    assert classifier.weights_hash() == before


def test_a_little_less_of_an_edit_does_not_reach_the_share(classifier, edits):
    truth = np.array(TRAIN.labels)
    for row in edits.to_frame().itertuples():
        less = HeadEdit("head", edits.edit(row.source, row.target).change * np.float32(0.999))
        with classifier.edited(less):
            now = classifier.predict(TRAIN).argmax(axis=1)
        assert (now[truth == row.source] == LABELS.index(row.target)).mean() < 0.95


@pytest.mark.parametrize(
    ("architecture", "dtype"), [("bert", torch.float32), ("gpt2", torch.float32), ("bert", torch.bfloat16)]
)
def test_edits_of_heads_of_the_model_library_do_what_they_say(architecture, dtype):
    classifier = Classifier.from_module(
        random_module(architecture).to(dtype),
        preprocess=token_preprocess,
        labels=LABELS,
        sample=random_texts(4, seed=98),
    )
    splits = []
    for seed in (1, 2):  # labelled by what the model says, so that there is something to redirect
        drawn = random_examples(40, seed=seed)
        says = classifier.predict(drawn).argmax(axis=1)
        splits.append(Examples(drawn.inputs, tuple(LABELS[label] for label in says), drawn.name))
    found = fit_head_edits(FittedStep(), *(record(classifier, split) for split in splits), classifier)
    assert found.checked(classifier, splits[1]) == []
    for pair, row in enumerate(found.to_frame().itertuples()):
        assert counted(classifier, splits[1], found, row.source, row.target) == found.outcomes[pair]


def test_an_edit_is_a_perturbation_like_others(classifier, edits):
    check_perturbation(edits.edit("b", "c"), classifier, TEST)


def test_edits_are_kept_and_read_bit_for_bit(tmp_path, edits):
    edits.save(tmp_path / "edits")
    assert sorted(path.name for path in (tmp_path / "edits").iterdir()) == [
        *("attack.json", "checksums.json", "edits.safetensors")
    ]
    loaded = HeadEdits.load(tmp_path / "edits")
    for name in ("attack", "rows", "labels", "model", "examples", "outcomes"):
        assert getattr(loaded, name) == getattr(edits, name)
    for name in ("steps", "sources", "targets", "shares", "budgets"):
        assert getattr(loaded, name).dtype == getattr(edits, name).dtype
        np.testing.assert_array_equal(getattr(loaded, name), getattr(edits, name))
    told = json.loads((tmp_path / "edits" / "attack.json").read_text())
    assert (told["attack"], told["examples"], told["labels"]) == ("head-edit", TEST.fingerprint, list(LABELS))
    assert loaded.checked(planted_classifier(), TEST) == []


def test_a_folder_that_has_changed_or_holds_something_else_is_refused(tmp_path, classifier, edits):
    edits.save(tmp_path / "edits")
    path = tmp_path / "edits" / "edits.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    (tmp_path / "edits" / "attack.json").unlink()
    with pytest.raises(RunFolderError, match=r"no whole attack: attack.json is missing; edits.safetensors has changed"):
        HeadEdits.load(tmp_path / "edits")
    flips = BitSearch().find(classifier, record(classifier, TRAIN), record(classifier, TEST), source="b", target="c")
    flips.save(tmp_path / "flips")
    with pytest.raises(RunFolderError, match=r"holds no edits of a head: a folder with edits.safetensors was expected"):
        HeadEdits.load(tmp_path / "flips")


def test_counts_that_are_not_what_an_edit_does_are_named_with_the_pair(classifier, edits):
    (first, *others, last), truth = edits.outcomes, edits.outcomes[-1]
    wrong = replace(edits, outcomes=(first, *others, replace(last, redirected=3, lost=40)))
    assert wrong.checked(classifier, TEST) == [
        f"c -> b: 3 of {truth.attacked} redirected and 40 of {truth.others} others lost were stated, "
        f"{truth.redirected} of {truth.attacked} redirected and {truth.lost} of {truth.others} others lost were found"
    ]


def test_a_live_model_that_does_otherwise_than_its_features_say_is_named(classifier, edits, monkeypatch):
    predict = Classifier.predict
    monkeypatch.setattr(Classifier, "predict", lambda self, examples: predict(self, examples)[:, ::-1])
    (difference,) = edits.checked(classifier, TEST)
    assert difference.startswith("a -> b in the live model: ")


def test_an_example_that_ties_may_be_counted_either_way(classifier, edits):
    # at exactly its budget an edit leaves the last of the fitting examples at a tie
    steps = (edits.steps / (1 + BEYOND)).astype(np.float32)
    tied = replace(edits, examples=TRAIN.fingerprint, steps=steps)
    ends = [(row.source, row.target) for row in tied.to_frame().itertuples()]
    true = [counted(classifier, TRAIN, tied, *pair) for pair in ends]
    for fewer, differ in ((0, 0), (1, 0), (12, len(ends))):
        stated = tuple(replace(outcome, redirected=19 - fewer) for outcome in true)
        assert len(replace(tied, outcomes=stated).checked(classifier, TRAIN)) == differ


def test_another_model_and_other_examples_are_refused_with_both_named(classifier, edits):
    with pytest.raises(SettingsError, match=f"fingerprint {TEST.fingerprint[:12]}; that of planted-2 is "):
        edits.checked(classifier, TRAIN)
    with torch.no_grad():
        classifier.module.head.bias[0] += 1
    for use in (lambda: edits.checked(classifier, TEST), lambda: edits.applied(classifier, "b", "c").__enter__()):
        with pytest.raises(
            SettingsError, match=f"with the hash {edits.model[:12]}; that of 'planted' is [0-9a-f]{{12}}"
        ):
            use()
    renamed = replace(edits, labels=("a", "c", "b"))
    with pytest.raises(SettingsError, match=r"for the classes a, c, b; those of 'planted' are a, b, c\."):
        renamed.checked(planted_classifier(), TEST)


def test_what_is_asked_for_wrongly_is_refused(classifier, edits):
    train, test = record(classifier, TRAIN), record(classifier, TEST)
    with pytest.raises(SettingsError, match="There is no class 'd'; the classes are a, b, c"):
        edits.edit("b", "d")
    with pytest.raises(SettingsError, match="There is no edit from 'b' to 'b'"):
        edits.edit("b", "b")
    with pytest.raises(SplitError, match="scored on the examples that they are fitted to"):
        fit_head_edits(FittedStep(), train, train, classifier)
    with pytest.raises(SettingsError, match="all rows were asked for: use 'two'"):
        fit_head_edits(FittedStep(rows="all"), train, test, classifier)
    with pytest.raises(SettingsError, match="No pair of classes has examples of which 0.95 can be redirected"):
        fit_head_edits(FittedStep(), train, replace(test, targets=(test.predictions + 1) % 3), classifier)
    with pytest.raises(SettingsError, match="The activations hold no features of a final linear map"):
        fit_head_edits(FittedStep(), replace(train, features=None), test, classifier)
    with pytest.raises(SettingsError, match="do not give the recorded logits; record them with this classifier"):
        fit_head_edits(FittedStep(), train, record(random_classifier(), random_examples(9, seed=1)), classifier)


def test_edits_of_a_real_head_do_what_they_say_for_every_pair(shared, tmp_path):
    classifier = Classifier.from_pretrained(shared / "models" / "tiny-splice", device="cpu")
    train, test = (read_examples(shared / "data" / "splice" / f"{part}.csv") for part in ("train", "test"))
    train, test = train.take(range(200)), test.take(range(200))
    found = fit_head_edits(FittedStep(), record(classifier, train), record(classifier, test), classifier)
    found.save(tmp_path / "edits")
    table = found.to_frame()
    assert len(table) == 6
    assert table["success"].min() > 0.7
    assert (found.shares >= 0.95).all()
    assert HeadEdits.load(tmp_path / "edits").checked(classifier, test) == []
