from functools import partial

import numpy as np
import pytest
from planted import planted_classifier, planted_examples

from synapse.attack.head import FittedStep, MeanStep, redirect_head
from synapse.attack.transfer import halves, transferred, transfers
from synapse.recording import record
from synapse.types import Redirection


@pytest.fixture(scope="module")
def recorded():
    return record(planted_classifier(), planted_examples(121, seed=1))


def test_halves_share_no_example_and_split_every_class_evenly(recorded):
    first, second = halves(recorded, seed=3)
    assert len(first) + len(second) == 121
    counts = np.stack([np.bincount(half.targets, minlength=3) for half in (first, second)])
    assert np.abs(np.diff(counts, axis=0)).max() <= 1
    rows = {row.tobytes() for row in first.features} & {row.tobytes() for row in second.features}
    both = {row.tobytes() for row in recorded.features}
    assert len(both) < 121 or not rows  # but for examples that repeat


def test_an_edit_is_scored_on_others_at_its_own_budget():
    own, other = (
        Redirection(
            "a", "head", "x", "y", "attack", "u", np.nan, needed[None], np.arange(4), np.arange(0), np.empty((1, 0))
        )
        for needed in (np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.5, 2.5, np.inf, 9.0]))
    )
    found = transferred(own, other, 0.5)
    assert (found.budget, found.own_success, found.success, found.needed, found.n) == (2.0, 0.5, 0.25, 2.5, 4)
    assert transferred(own, other, 0.95).needed == np.inf


@pytest.mark.parametrize("step", [FittedStep(), MeanStep()], ids=lambda step: step.name)
def test_head_edits_of_one_half_work_on_the_other(step, recorded):
    weight = planted_classifier().head_weight().numpy()
    found = transfers(partial(_redirect, step, weight), *halves(recorded, seed=0))
    assert {(one.source, one.target, one.share) for one in found} >= {("b", "c", 0.5), ("c", "b", 0.95)}
    for one in found:
        assert one.own_success >= one.share
        assert abs(one.success - one.own_success) < 0.35


def _redirect(step, weight, train, test):
    return redirect_head(step, train, test, weight, seed=0)
