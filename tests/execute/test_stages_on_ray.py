"""The stages of a study on a cluster of this machine give bitwise what they give here, also where workers are lost."""

import os
import signal
import threading
import time
from importlib.util import find_spec

import numpy as np
import pytest

from synapse.demo.domains import domains
from synapse.demo.study import load_domain
from synapse.execute import RayExecutor
from synapse.ranking import rank
from synapse.recording import record
from synapse.settings import make_settings
from synapse.study import run_study
from synapse.sweeping import Grid, plan, sweep

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")


SMALL = Grid(fractions=(0.5,), bottom_fractions=(), label_fractions=(), kind_fractions=(0.9,))


@pytest.fixture(scope="module")
def subject():
    domain = next(domain for domain in domains() if hasattr(domain, "folder"))
    return load_domain(domain), domain.examples("train").take(range(100)), domain.examples("test").take(range(30))


@pytest.fixture(scope="module")
def swept_here(subject):
    classifier, train, test = subject
    recorded = record(classifier, train)
    ranking = rank(recorded, method="mean-difference")
    return recorded, ranking, sweep(classifier, test, ranking, reference=recorded, cells=plan(ranking, SMALL))


def killed_soon(seconds, logs, signals):
    """End the process of the first worker after a while."""
    time.sleep(seconds)
    for line in (logs / "worker-0.log").read_text().splitlines():
        if " begins in process " in line:
            signals.append(int(line.rsplit(" ", 1)[1].rstrip(".")))
    os.kill(signals[-1], signal.SIGKILL)


def test_a_sweep_by_two_workers_of_which_one_is_killed_is_that_of_this_process(subject, swept_here, tmp_path, caplog):
    classifier, _, test = subject
    recorded, ranking, here = swept_here
    began, killed = [], []

    def progress(_done, _total):
        if not began:  # now both work, or are about to
            began.append(threading.Thread(target=killed_soon, args=(0.3, tmp_path, killed)))
            began[0].start()

    with RayExecutor(workers=2, logs=tmp_path) as executor:
        given = {"reference": recorded, "cells": plan(ranking, SMALL)}
        there = sweep(classifier, test, ranking, executor=executor, progress=progress, **given)
        began[0].join()
    assert len(killed) == 1
    np.testing.assert_array_equal(there.logits, here.logits)
    assert there.reuse == here.reuse


@pytest.mark.cluster
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_a_study_by_so_many_workers_has_the_scorecard_of_this_process(subject, workers, tmp_path):
    classifier, train, test = subject
    settings = make_settings(cache=tmp_path / "cache", rank_draws=20)
    here = run_study(classifier, train, test, settings=settings, out=tmp_path / "here")
    settings = make_settings(cache=tmp_path / "another", rank_draws=20)
    with RayExecutor(workers=workers, cpus_per_worker=2 / workers) as executor:
        there = run_study(classifier, train, test, settings=settings, out=tmp_path / "there", executor=executor)
    assert (there / "scorecard.json").read_text() == (here / "scorecard.json").read_text()
