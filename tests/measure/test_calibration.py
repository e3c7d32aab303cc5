import numpy as np
import pytest
from scipy import stats
from scipy.special import softmax
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, confusion_matrix, precision_recall_fscore_support

from synapse.errors import DataError, SettingsError
from synapse.measure.calibration import (
    brier_scores,
    calibration,
    class_table,
    expected_calibration_error,
    probabilities,
    reliability,
)
from synapse.measure.outcomes import confusion


def predicted(n=500, n_labels=3, *, seed=0, sharpness=1.0):
    """Logits, and targets drawn from their softmax; a sharpness above 1 makes the logits over-confident."""
    random = np.random.default_rng(seed)
    logits = 1.5 * random.normal(size=(n, n_labels))
    targets = np.array([random.choice(n_labels, p=p) for p in softmax(logits, axis=1)])
    return (sharpness * logits).astype(np.float32), targets


@pytest.mark.parametrize("bins", [1, 5, 15])
def test_reliability_is_the_calibration_curve_of_scikit_learn(bins):
    logits, targets = predicted()
    chances = softmax(logits.astype(np.float64), axis=1)
    right = chances.argmax(axis=1) == targets
    accuracy, confidence = calibration_curve(right, chances.max(axis=1), n_bins=bins, strategy="quantile")

    table = reliability(logits, targets, bins=bins)

    np.testing.assert_allclose(table["accuracy"], accuracy)
    np.testing.assert_allclose(table["confidence"], confidence)
    assert table["n"].sum() == 500
    assert np.ptp(table["n"]) <= 1
    gaps = np.abs(accuracy - confidence)
    assert expected_calibration_error(logits, targets, bins=bins) == pytest.approx(np.sum(table["n"] * gaps) / 500)


def test_accuracy_of_a_bin_has_the_exact_interval_of_scipy():
    row = reliability(*predicted(), bins=10).iloc[3]
    expected = stats.binomtest(round(row["accuracy"] * row["n"]), int(row["n"])).proportion_ci(method="exact")
    assert (row["low"], row["high"]) == pytest.approx((expected.low, expected.high))


def test_the_brier_score_is_that_of_scikit_learn_summed_over_the_labels():
    logits, targets = predicted(n_labels=4)
    chances = softmax(logits.astype(np.float64), axis=1)
    expected = sum(brier_score_loss(targets == c, chances[:, c], pos_label=True) for c in range(4))

    assert brier_scores(logits, targets).mean() == pytest.approx(expected)
    found = calibration(logits, targets).brier
    assert found.value == pytest.approx(expected)
    assert found.low < expected < found.high


def test_a_calibrated_classifier_is_told_from_one_that_is_too_sure():
    calm, sure = (calibration(*predicted(2000, sharpness=sharpness)) for sharpness in (1.0, 3.0))

    assert calm.error_if_calibrated.low <= calm.error <= calm.error_if_calibrated.high
    assert sure.error > 2 * sure.error_if_calibrated.high
    # Above 0 even so: what is drawn from the confidences differs from them by chance
    assert calm.error_if_calibrated.low > 0


def test_calibrated_classifiers_are_within_the_range_about_as_often_as_promised():
    found = [calibration(*predicted(200, seed=seed)) for seed in range(40)]
    within = [f.error_if_calibrated.low <= f.error <= f.error_if_calibrated.high for f in found]
    assert np.mean(within) > 0.84  # 0.95 less three deviations of 0.034


def test_an_error_worked_out_by_hand():
    # two bins: 0.6 sure and right half of the time, 0.9 sure and always right
    logits = np.log([[0.6, 0.4]] * 4 + [[0.9, 0.1]] * 4)
    targets = np.array([0, 0, 1, 1, 0, 0, 0, 0])

    assert expected_calibration_error(logits, targets, bins=2) == pytest.approx((0.1 + 0.1) / 2)
    assert brier_scores(logits, targets)[[0, 2]] == pytest.approx([2 * 0.4**2, 2 * 0.6**2])


def test_equal_confidences_are_never_parted():
    table = reliability(np.zeros((50, 2)), np.arange(50) % 2, bins=10)

    assert len(table) == 1
    assert table.iloc[0][["n", "confidence", "accuracy"]].tolist() == [50, 0.5, 0.5]


def test_certainty_that_is_always_right_is_no_error():
    logits, targets = np.where(np.eye(3, dtype=bool)[[0, 1, 2, 1]], 0.0, -np.inf), np.array([0, 1, 2, 1])

    found = calibration(logits, targets)

    assert (found.error, found.error_if_calibrated.value, found.brier.value) == (0.0, 0.0, 0.0)
    assert found.brier.high > 0  # four examples prove little


def test_the_class_table_is_the_report_of_scikit_learn():
    logits, targets = predicted(n_labels=4)
    said = logits.argmax(axis=1)
    precision, recall, f1, support = precision_recall_fscore_support(targets, said)

    table = class_table(logits, targets, ("a", "b", "c", "d"))

    np.testing.assert_array_equal(confusion(targets, said, 4), confusion_matrix(targets, said))
    for name, expected in {"precision": precision, "recall": recall, "f1": f1, "support": support}.items():
        np.testing.assert_allclose(table[name], expected)
    assert table.index.tolist() == ["a", "b", "c", "d"]
    hits = np.sum((said == 2) & (targets == 2))
    expected = stats.binomtest(hits, np.sum(said == 2)).proportion_ci(method="exact")
    assert table.loc["c", ["precision_low", "precision_high"]].tolist() == pytest.approx([expected.low, expected.high])


def test_classes_that_do_not_occur_have_no_recall_and_those_never_predicted_no_precision():
    logits = np.eye(4)[[0, 0, 2]]
    table = class_table(logits, np.array([0, 1, 0]), ("a", "b", "c", "d"))

    assert table["recall"].isna().tolist() == [False, False, True, True]
    assert table["precision"].isna().tolist() == [False, True, False, True]
    assert table.loc["d", ["recall_low", "recall_high"]].tolist() == [0, 1]
    assert table["f1"].fillna(-1).tolist() == pytest.approx([0.5, 0, 0, -1])


def test_logits_of_minus_infinity_are_impossible_labels():
    np.testing.assert_allclose(probabilities(np.array([[0.0, -np.inf, np.log(3)]])), [[0.25, 0, 0.75]])


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_logits_that_are_no_probabilities_are_refused(wrong):
    logits = np.zeros((5, 2))
    logits[3, 1] = wrong
    with pytest.raises(DataError) as caught:
        calibration(logits, np.zeros(5, dtype=int))
    assert str(caught.value) == (
        "The logits of example 3 are no probabilities; expected numbers, or -inf for labels that cannot be. "
        "Leave the example out, or predict in float32."
    )


def test_no_examples_and_no_bins_are_refused():
    with pytest.raises(DataError, match=r"^There are no logits to judge; pass those of at least one example\.$"):
        calibration(np.zeros((0, 2)), np.zeros(0, dtype=int))
    with pytest.raises(SettingsError, match=r"^0 bins were asked for; ask for at least 1\.$"):
        reliability(np.zeros((2, 2)), np.zeros(2, dtype=int), bins=0)
