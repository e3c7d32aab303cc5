from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from planted_activations import LABELS, planted
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from synapse.errors import DataError, SettingsError, SplitError
from synapse.probe.description import BLOCK_ENDS, description_length, learning_curve
from synapse.probe.probe import fit_probes


def constant(targets, labels=LABELS):
    """Activations that say nothing, so that a probe knows only how frequent the labels were."""
    targets = np.asarray(targets)
    logits = np.zeros((len(targets), len(labels)), dtype=np.float32)
    return replace(
        planted(3, labels=labels), values=np.ones((1, len(targets), 2), np.float32), logits=logits, targets=targets
    )


def test_blocks_end_where_the_paper_puts_them():
    found = description_length(planted(2000), penalty=0.1)[0]

    assert found.ends.tolist() == [2, 4, 8, 16, 32, 64, 125, 250, 500, 1000, 2000]
    assert found.bits[0] == pytest.approx(2 * np.log2(3))
    assert found.uniform == pytest.approx(2000 * np.log2(3))
    assert found.compression == found.uniform / found.online
    assert len(BLOCK_ENDS) == 11


def test_states_that_say_the_label_compress_and_noise_does_not():
    noise, clear = description_length(planted(600), penalty=0.01)

    assert noise.compression < 1.05
    assert clear.compression > 3


def test_the_code_of_states_that_say_nothing_is_that_of_the_label_counts():
    targets = np.random.default_rng(3).choice(3, size=200, p=[0.7, 0.2, 0.1])
    found = description_length(constant(targets), seed=4)[0]

    order = np.random.default_rng(4).permutation(200)
    labels, expected = targets[order], [np.log2(3)]
    for begin, end in [(1, 2), (2, 4), (4, 7), (7, 13), (13, 25), (25, 50), (50, 100), (100, 200)]:
        counts = np.bincount(labels[:begin], minlength=3)
        shares = counts / begin * (1 - (counts == 0).sum() / (begin + 3))
        shares[counts == 0] = 1 / (begin + 3)
        expected.append(-np.log2(shares[labels[begin:end]]).sum())
    np.testing.assert_allclose(found.bits, expected, atol=1e-5)


def test_a_block_is_coded_by_the_regression_on_all_blocks_before_it():
    train = planted(400)
    found = description_length(train, penalty=0.02, l1_ratio=0.0, seed=1)[1]

    order = np.random.default_rng(1).permutation(400)
    x, y = train.values[1][order].astype(np.float64), train.targets[order]
    scaler = StandardScaler().fit(x[:200])
    theirs = LogisticRegression(C=1 / (200 * 0.02), tol=1e-9, max_iter=10_000).fit(scaler.transform(x[:200]), y[:200])
    p = theirs.predict_proba(scaler.transform(x[200:]))[np.arange(200), y[200:]]

    assert found.ends[-2:].tolist() == [200, 400]
    assert found.bits[-1] == pytest.approx(-np.log2(p).sum(), rel=1e-4)


def test_labels_that_come_late_or_never_have_a_finite_code():
    labels = ("a", "b", "c", "late", "absent")
    train = planted(100, labels=labels)
    train.targets[5] = 3

    for seed in range(5):
        found = description_length(train, seed=seed)[1]
        assert np.isfinite(found.bits).all()
        assert found.uniform == pytest.approx(100 * np.log2(5))


def test_examples_of_one_label_are_coded_by_the_rule_of_succession():
    found = description_length(constant([1] * 10))[0]

    # n seen of three labels: (n + 1) / (n + 3) for the one that occurred
    ends = found.ends.tolist()
    expected = [(end - n) * np.log2((n + 3) / (n + 1)) for n, end in pairwise(ends)]
    np.testing.assert_allclose(found.bits[1:], expected, atol=1e-12)
    assert description_length(constant([1]))[0].compression == 1.0


def test_the_models_own_predictions_can_be_described():
    train = planted(300)
    said = replace(train, logits=np.eye(3, dtype=np.float32)[(train.targets + 1) % 3], targets=np.zeros(300, dtype=int))

    assert description_length(said, target="model")[1].compression > 3


def test_nothing_cannot_be_described():
    with pytest.raises(DataError) as caught:
        description_length(constant(np.array([], dtype=int)))

    assert str(caught.value) == "There are no activations to describe labels with: record at least one example."


def test_a_learning_curve_rises_where_there_is_something_to_learn():
    train, test = planted(480), planted(300, seed=1, source="test")
    train.values[1, :, 3] /= 10
    test.values[1, :, 3] /= 10

    noise, learned = learning_curve(train, test)

    assert learned.sizes.tolist() == [7, 15, 30, 60, 120, 240, 480]
    assert learned.accuracy[-1] > learned.accuracy[0]
    assert learned.accuracy[-1] > 0.75
    assert noise.accuracy[-1] < 0.45
    assert learned.correct.shape == (7, 300)


def test_the_end_of_a_learning_curve_is_the_regression_on_all_examples():
    train, test = planted(90), planted(60, seed=1, source="test")
    scaler = StandardScaler().fit(train.values[0])
    theirs = LogisticRegression(C=1 / (90 * 0.02), tol=1e-9, max_iter=10_000)
    theirs.fit(scaler.transform(train.values[0]), train.targets)

    curve = learning_curve(train, test, sizes=(90,), penalty=0.02, l1_ratio=0.0)[0]

    np.testing.assert_array_equal(curve.correct[0], theirs.predict(scaler.transform(test.values[0])) == test.targets)


def test_the_parts_of_a_learning_curve_are_nested_and_have_the_class_shares_of_the_whole(monkeypatch):
    train, test, parts = planted(120), planted(30, seed=1, source="test"), []

    def fit(part, **options):
        parts.append(part)
        return fit_probes(part, **options)

    monkeypatch.setattr("synapse.probe.description.fit_probes", fit)
    learning_curve(train, test, sizes=(30, 60))

    assert [np.bincount(part.targets).tolist() for part in parts] == [[10] * 3, [20] * 3]
    np.testing.assert_array_equal(parts[1].values[:, :30], parts[0].values)


@pytest.mark.parametrize("seed", range(3))
def test_a_part_of_one_label_predicts_it(seed):
    train, test = planted(90), planted(30, seed=1, source="test")

    curve = learning_curve(train, test, sizes=(1,), seed=seed)[0]

    # thirds of the test examples have each label, so one label is right on a third
    assert curve.accuracy.tolist() == [pytest.approx(1 / 3)]


def test_learning_curves_that_cannot_be_drawn_are_refused():
    train, test = planted(30), planted(30, seed=1, source="test")
    with pytest.raises(SplitError, match=r"^The probes are to be tested on the examples they learn from: "):
        learning_curve(train, train)
    with pytest.raises(SettingsError) as caught:
        learning_curve(train, test, sizes=(10, 31))
    assert str(caught.value) == "Sizes [10, 31] were asked for: give numbers of training examples between 1 and 30."
    with pytest.raises(DataError) as refused:
        learning_curve(train, planted(30, source="test", labels=("x", "y", "z")))
    assert str(refused.value) == (
        "Train has 2 layers of 8 units and the labels ('a', 'b', 'c'), test 2 of 8 and ('x', 'y', 'z'): "
        "give activations of the same classifier."
    )
