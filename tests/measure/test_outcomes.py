import re

import numpy as np
import pytest
from handmade import NOT_RUN, cell, make_sweep
from scipy import stats
from scipy.special import softmax
from sklearn import metrics

from synapse import measure
from synapse.errors import DataError


@pytest.fixture
def scored():
    rng = np.random.default_rng(3)
    return rng.normal(size=(60, 5)), rng.integers(0, 5, size=60)


def test_a_tie_goes_to_the_first_label():
    assert measure.predictions(np.array([[1.0, 2.0, 2.0]])).tolist() == [1]


def test_accuracy_recall_and_confusion_agree_with_scikit_learn(scored):
    logits, targets = scored
    predicted = logits.argmax(axis=1)
    counts = measure.confusion(targets, predicted, 5)
    assert measure.accuracy(logits, targets) == metrics.accuracy_score(targets, predicted)
    np.testing.assert_array_equal(counts, metrics.confusion_matrix(targets, predicted))
    np.testing.assert_allclose(measure.recall(counts), metrics.recall_score(targets, predicted, average=None))


def test_macro_f1_agrees_with_scikit_learn(scored):
    logits, targets = scored
    predicted = logits.argmax(axis=1)
    expected = metrics.f1_score(targets, predicted, average="macro")
    assert measure.macro_f1(measure.confusion(targets, predicted, 5)) == pytest.approx(expected)


def test_macro_f1_leaves_out_absent_classes_and_counts_those_only_predicted_as_zero():
    targets, predicted = np.array([0, 0, 1, 1]), np.array([0, 0, 1, 2])  # 2 only predicted, 3 and 4 nowhere
    expected = metrics.f1_score(targets, predicted, average="macro", zero_division=0)
    assert measure.macro_f1(measure.confusion(targets, predicted, 5)) == pytest.approx(expected)


def test_recall_of_a_class_without_examples_is_nan():
    assert np.isnan(measure.recall(np.array([[2, 0], [0, 0]]))[1])


def test_kl_agrees_with_scipy_and_keeps_its_direction(scored):
    clean, edited = scored[0], scored[0][::-1] * 2
    expected = [stats.entropy(softmax(p), softmax(q)) for p, q in zip(clean, edited, strict=True)]
    np.testing.assert_allclose(measure.kl(clean, edited), expected, rtol=1e-10)


def test_kl_of_equal_logits_is_zero_also_where_a_softmax_would_overflow():
    logits = np.array([[1e4, -1e4, 0.0]], dtype=np.float32)
    assert measure.kl(logits, logits).tolist() == [0.0]


def test_margins_are_the_target_logit_minus_the_best_other():
    logits = np.array([[3.0, 1.0, 2.0], [0.0, 4.0, 5.0]])
    assert measure.margins(logits, np.array([0, 1])).tolist() == [1.0, -1.0]


def test_flip_rate_counts_changed_predictions_whatever_the_target():
    clean, edited = np.eye(4), np.eye(4)[[0, 1, 3, 2]]
    assert measure.flip_rate(clean, edited) == 0.5


def test_examples_a_cell_did_not_run_count_as_nothing():
    sweep = make_sweep([cell([1, 0, NOT_RUN, 1])], targets=[0, 1, 0, 1], clean=[0, 0, 0, 0])
    outcomes = measure.outcomes_of(sweep)
    assert outcomes.ran.tolist() == [[True, True, False, True]]
    assert outcomes.lost.tolist() == [[1, 0, 0, -1]]  # broken, still wrong, not run, repaired
    assert outcomes.flipped.tolist() == [[True, False, False, True]]


def test_logits_that_overflowed_are_refused():
    sweep = make_sweep([cell([0, 1])], targets=[0, 1])
    sweep.logits[0, 1, 0] = np.inf
    message = (
        "Cell 0 gave example 1 logits that are not finite; expected numbers, or NaN for every label where it "
        "did not run. Repeat the sweep in float32."
    )
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        measure.outcomes_of(sweep)


def test_parts_of_different_sweeps_are_refused():
    sweep = make_sweep([cell([0, 1])], targets=[0, 1])
    sweep.cells.loc[1] = sweep.cells.loc[0]
    message = (
        "The sweep has logits of shape (1, 2, 2) and 2 targets, but its cells and clean logits ask for "
        "(2, 2, 2); pass the parts of one sweep."
    )
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        measure.outcomes_of(sweep)
