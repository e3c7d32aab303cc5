"""The stages give bitwise the same wherever their items are run, and in whatever order these come in."""

import errno

import numpy as np
import pandas as pd
import pytest
from elsewhere import Elsewhere, travelled
from planted import random_classifier, random_examples

import synapse.recording.folder
from synapse.demo.domains import domains
from synapse.demo.study import load_domain
from synapse.errors import ModelError, ResourceError, SettingsError
from synapse.execute import Failed, SerialExecutor, ThreadExecutor
from synapse.model.replica import Replica
from synapse.probe.probe import fit_probes
from synapse.ranking import rank
from synapse.ranking.bootstrap import rank_stability
from synapse.recording import record
from synapse.recording.folder import Draft
from synapse.settings import make_settings
from synapse.study import run_study
from synapse.sweeping import KINDS, Grid, plan, sweep
from synapse.testing import check_executor

ZERO, _, _, NOISE = KINDS
SMALL = Grid(fractions=(0.5,), bottom_fractions=(), label_fractions=(), kinds=(ZERO, NOISE), kind_fractions=(0.9,))


@pytest.fixture(scope="module")
def loaded():
    """A classifier that was loaded from a folder, with some of its examples."""
    domain = next(domain for domain in domains() if hasattr(domain, "folder"))
    return load_domain(domain), domain.examples("train").take(range(60)), domain.examples("test").take(range(10))


@pytest.fixture(scope="module", params=["loaded from a folder", "a module of one's own"])
def subject(request, loaded):
    if request.param == "loaded from a folder":
        return loaded
    return random_classifier("gpt2"), random_examples(60, seed=1), random_examples(10, seed=2)


@pytest.fixture(scope="module")
def ranked(subject):
    classifier, train, _ = subject
    recorded = record(classifier, train)
    return recorded, rank(recorded, method="mean-difference")


def test_a_copy_of_a_classifier_gives_its_logits(subject):
    classifier, _, test = subject
    copy = travelled(Replica(classifier)).build()
    assert copy is not classifier
    assert copy.weights_hash() == classifier.weights_hash()
    np.testing.assert_array_equal(copy.predict(test), classifier.predict(test))


def test_in_its_own_process_a_replica_is_the_classifier_itself(loaded):
    assert Replica(loaded[0]).build() is loaded[0]


def test_a_process_keeps_the_replica_that_it_built(loaded):
    assert travelled(Replica(loaded[0])).build() is travelled(Replica(loaded[0])).build()


def test_other_weights_in_the_folder_than_those_at_hand_are_refused(loaded):
    classifier = loaded[0]
    weight = next(classifier.module.parameters())
    weight.data[0] += 1
    try:
        with pytest.raises(ModelError, match="are not those of the classifier that is studied"):
            travelled(Replica(classifier)).build()
    finally:
        weight.data[0] -= 1


@pytest.mark.parametrize("kept", [False, True])
def test_a_recording_is_the_same(subject, kept, tmp_path, monkeypatch):
    monkeypatch.setattr(synapse.recording.folder, "_WINDOW_BYTES", 1)  # as few examples in a window as there may be
    classifier, train, _ = subject
    here = record(classifier, train, keep=tmp_path / "here" if kept else None)
    there = record(classifier, train, keep=tmp_path / "there" if kept else None, executor=Elsewhere())
    for name in ("values", "logits", "features", "row_mean", "row_deviation"):
        np.testing.assert_array_equal(np.asarray(getattr(there, name)), np.asarray(getattr(here, name)))
    np.testing.assert_array_equal(there.class_moments.mean, here.class_moments.mean)
    if kept:
        files = [path for path in (tmp_path / "here").rglob("c/*/*") if path.is_file()]
        assert files
        for path in files:
            name = path.relative_to(tmp_path / "here")
            assert (tmp_path / "there" / name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("options", [{}, {"engine": "plain"}, {"precision": 0.4}], ids=str)
def test_a_sweep_is_the_same(subject, ranked, options):
    classifier, _, test = subject
    recorded, ranking = ranked
    given = {"reference": recorded, "cells": plan(ranking, SMALL), **options}
    here = sweep(classifier, test, ranking, **given)
    there = sweep(classifier, test, ranking, executor=Elsewhere(), **given)
    np.testing.assert_array_equal(there.logits, here.logits)
    np.testing.assert_array_equal(there.clean_logits, here.clean_logits)
    assert (there.reuse, there.reasons) == (here.reuse, here.reasons)
    pd.testing.assert_frame_equal(there.cells, here.cells)


def test_probes_and_their_refits_are_the_same(subject, ranked):
    recorded, _ = ranked
    here, there = fit_probes(recorded), fit_probes(recorded, executor=Elsewhere())
    for one, other in zip(here.probes, there.probes, strict=True):
        np.testing.assert_array_equal(one.weights, other.weights)
    given = {"probes": here, "draws": 4}
    drawn = [rank_stability(recorded, executor=executor, **given) for executor in (None, Elsewhere())]
    np.testing.assert_array_equal(drawn[0].ranks, drawn[1].ranks)


def test_a_study_has_the_same_scorecard(loaded, tmp_path):
    classifier, train, test = loaded
    settings = make_settings(
        examples=6,
        train_examples=40,
        fractions=(0.5,),
        kinds=("zero",),
        methods=("linear",),
        rank_draws=2,
        attacks=("logits", "head", "weight-noise"),
        attack_examples=4,
        noise_draws=2,
    )
    executors = {"here": None, "there": Elsewhere()}
    cards = {}
    for name, executor in executors.items():
        folder = run_study(classifier, train, test, settings=settings, out=tmp_path / name, executor=executor)
        cards[name] = (folder / "scorecard.json").read_text()
    assert executors["there"].maps > 4
    assert cards["there"] == cards["here"]


class _LostAt(Elsewhere):
    """Loses the first item of every map."""

    def map(self, work, items, **options):
        for outcome in super().map(work, items, **options):
            lost = Failed(outcome.position, "an item", MemoryError("the worker was lost"), 3)
            yield lost if outcome.position == 0 else outcome


def test_where_an_item_is_lost_the_rest_is_kept_and_the_next_call_runs_it_alone(subject, ranked, tmp_path):
    classifier, _, test = subject
    recorded, ranking = ranked
    given = {"reference": recorded, "cells": plan(ranking, SMALL)}
    with pytest.raises(MemoryError, match="the worker was lost"):
        sweep(classifier, test, ranking, executor=_LostAt(), keep=tmp_path, **given)
    done = []
    found = sweep(classifier, test, ranking, keep=tmp_path, progress=lambda *counts: done.append(counts), **given)
    (before, _), (through, total) = done[-2:]
    assert 0 < before < through == total  # what was there counts at once, and one item was left
    np.testing.assert_array_equal(found.logits, sweep(classifier, test, ranking, **given).logits)


def test_a_disk_that_is_full_loses_nothing_that_was_written(loaded, tmp_path, monkeypatch):
    monkeypatch.setattr(synapse.recording.folder, "_WINDOW_BYTES", 1)
    monkeypatch.setattr(synapse.recording.folder, "_MOST", 8)
    monkeypatch.setattr(synapse.recording.folder, "_FEWEST", 8)
    classifier, train, _ = loaded
    write, written = Draft.write, []

    def full_at_the_third(draft, window, found):
        if window == 2 and len(written) < 10:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(window)
        write(draft, window, found)

    monkeypatch.setattr(Draft, "write", full_at_the_third)
    with pytest.raises(ResourceError, match=r"No space left on device\); what was written stays"):
        record(classifier, train, keep=tmp_path, executor=Elsewhere())
    assert sorted(written) == [0, 1, 3, 4, 5, 6, 7]  # the rest was run, and is kept
    written += [-1, -1, -1]
    found = record(classifier, train, keep=tmp_path, executor=Elsewhere())
    assert written[-1:] == [2]
    np.testing.assert_array_equal(found.values[0], record(classifier, train).values[0])


def test_threads_that_would_share_a_model_are_refused(loaded):
    with pytest.raises(SettingsError, match=r"would mix; a SerialExecutor or a RayExecutor was expected\.$"):
        record(loaded[0], loaded[1], executor=ThreadExecutor(workers=2))


@pytest.mark.parametrize("executor", [ThreadExecutor(workers=1), ThreadExecutor(workers=3), SerialExecutor()], ids=repr)
def test_every_executor_of_this_process_holds_the_contract(executor):
    check_executor(executor)
