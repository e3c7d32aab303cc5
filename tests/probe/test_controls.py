import numpy as np
import pytest
from planted_activations import LABELS, planted
from sklearn.metrics import accuracy_score, adjusted_rand_score, f1_score

from synapse.data.examples import Examples
from synapse.errors import DataError, SettingsError, SplitError
from synapse.probe.controls import control_targets, evaluate_probes, input_types
from synapse.probe.probe import fit_probes, refit_probes
from synapse.types import Activations

TOPICS = (
    "the pitch and the striker scored a late goal",
    "shares and bonds fell as the market closed",
    "a protein folds while the enzyme binds",
)
MOTIFS = ("ACGACGACG", "TTGTTGTTG", "GGCGGCGGC")


def examples(inputs, name="train.csv"):
    return Examples(inputs, tuple("xy"[i % 2] for i in range(len(inputs))), name)


def spoken(n, seed, topics):
    """Texts of shuffled and repeated words of a topic each, with the topic."""
    random = np.random.default_rng(seed)
    topic = np.arange(n) % len(topics)
    return tuple(" ".join(random.choice(topics[t].split(), size=12)) for t in topic), topic


def spelled(n, seed, motifs):
    """Texts without a space, each a motif repeated and cut at a random place, with the motif."""
    random = np.random.default_rng(seed)
    motif = np.arange(n) % len(motifs)
    return tuple((motifs[m] * 5)[random.integers(0, 9) :][:30] for m in motif), motif


def recorded(n, seed, _):
    """Signals of three levels, one value of which is a loud noise, with the level."""
    random = np.random.default_rng(seed)
    level = np.arange(n) % 3
    signals = random.normal(size=(n, 5, 10)) + 8.0 * level[:, None, None]
    signals[:, 0, 0] = 1e6 * random.normal(size=n)
    return signals, level


@pytest.mark.parametrize(
    ("make", "kinds"), [(spoken, TOPICS), (spelled, MOTIFS), (recorded, None)], ids=["words", "letters", "arrays"]
)
def test_types_are_the_kinds_of_input_there_are_in_train_and_test_alike(make, kinds):
    train, truth = make(60, 0, kinds)
    test, test_truth = make(30, 1, kinds)

    train_types, test_types = input_types(examples(train), examples(test), types=3, seed=0)

    found, expected = np.concatenate([train_types, test_types]), np.concatenate([truth, test_truth])
    assert adjusted_rand_score(expected, found) == 1.0
    assert sorted(set(train_types.tolist())) == [0, 1, 2]


def test_equal_inputs_have_equal_types_and_every_type_recurs_from_train():
    texts, _ = spoken(80, 0, TOPICS)

    train_types, test_types = input_types(examples(texts), examples(texts[10:30]), types=12, seed=1)

    np.testing.assert_array_equal(test_types, train_types[10:30])
    assert sorted(set(train_types.tolist())) == list(range(12))


def test_there_are_no_more_types_than_a_quarter_of_the_examples_or_than_distinct_inputs():
    texts, _ = spoken(40, 0, TOPICS)

    assert len(set(input_types(examples(texts), examples(texts), types=50)[0].tolist())) == 10
    assert len(set(input_types(examples(TOPICS * 20), examples(TOPICS), types=50)[0].tolist())) == 3


@pytest.mark.parametrize(
    ("train", "test", "types", "error", "message"),
    [
        (("a b",) * 20, ("a b",), 5, DataError, "The 20 inputs of train.csv are too few or too much alike to be "),
        (np.ones((20, 4)), np.ones((2, 4)), 5, DataError, "The 20 inputs of train.csv are too few or too much "),
        (TOPICS, np.ones((2, 4)), 5, DataError, "Of train.csv and test.csv, one holds texts and one arrays: "),
        (np.ones((9, 4)), np.ones((2, 5)), 5, DataError, "train.csv has inputs of shape (4,), test.csv of (5,): "),
        (TOPICS, TOPICS, 1, SettingsError, "1 input types were asked for: ask for at least 2."),
    ],
)
def test_inputs_that_cannot_be_sorted_are_refused(train, test, types, error, message):
    with pytest.raises(error) as caught:
        input_types(examples(train), examples(test, "test.csv"), types=types)

    assert str(caught.value).startswith(message)


def test_a_control_label_belongs_to_the_type_and_not_to_the_example():
    train_types, test_types = np.repeat(np.arange(30), 5), np.arange(30)

    train, test = control_targets(train_types, test_types, np.array([0, 0, 2]), seed=0)

    np.testing.assert_array_equal(train, test.repeat(5))
    assert set(test.tolist()) == {0, 2}


def test_control_labels_are_as_frequent_as_the_labels_of_train():
    types = np.arange(20_000)

    control, _ = control_targets(types, types, np.array([0, 1, 1, 1]), seed=0)

    # The standard deviation of the share is sqrt(0.75 * 0.25 / 20000) = 0.003
    assert np.mean(control == 1) == pytest.approx(0.75, abs=0.012)


@pytest.mark.parametrize("seed", range(20))
def test_at_least_two_control_labels_occur_in_train_however_skewed_the_labels_are(seed):
    train_types, targets = np.array([0, 0, 1]), np.array([1] * 1000 + [2])

    train, _ = control_targets(train_types, np.array([2]), targets, seed=seed)

    assert set(train.tolist()) == {1, 2}


@pytest.mark.parametrize(
    ("types", "targets", "seen"),
    [([0, 0], [0, 1], "1 types of input and 2 labels"), ([0, 1], [1, 1], "2 types of input and 1 labels")],
)
def test_a_control_task_without_a_choice_is_refused(types, targets, seen):
    with pytest.raises(DataError) as caught:
        control_targets(np.array(types), np.array(types), np.array(targets), seed=0)

    assert str(caught.value) == (
        f"Train has {seen}: a control task needs at least two of each, so give examples that differ."
    )


def types_in_layer_zero(n, source):
    """States whose first layer holds the type (0 to 3) and whose second holds the class, without noise."""
    types, targets = np.arange(n) % 4, np.arange(n) // 4 % 2
    values = np.zeros((2, n, 4), dtype=np.float32)
    values[0] = np.eye(4)[types]
    values[1, :, :2] = np.eye(2)[targets]
    logits = np.eye(2, dtype=np.float32)[1 - targets]  # a classifier that is always wrong
    return Activations(values, logits, targets, ("no", "yes"), source), types


def test_selectivity_tells_a_layer_that_holds_the_class_from_one_that_holds_the_type():
    train, train_types = types_in_layer_zero(80, "train")
    test, test_types = types_in_layer_zero(40, "test")
    # Types 0 and 1 are labelled 0, types 2 and 3 are labelled 1
    control_train, control_test = train_types // 2, test_types // 2
    probes = fit_probes(train)
    controls = refit_probes(probes, train, control_train)

    by_type, by_class = evaluate_probes(probes, controls, test, control_test)

    # The type says nothing of the class, nor the class of the type: a probe then says one label throughout
    assert by_type.values()["accuracy"] == 0.5
    assert by_type.values()["control_accuracy"] == 1.0
    assert by_type.values()["selectivity"] == -0.5
    assert by_class.values()["accuracy"] == 1.0
    assert by_class.values()["control_accuracy"] == 0.5
    assert by_class.values()["selectivity"] == 0.5
    assert by_class.values()["model_agreement"] == 0.0
    assert by_class.values()["nonzero_units"] == 2.0


def test_values_are_those_of_scikit_learn_and_outcomes_average_to_them():
    train, test = planted(), planted(90, seed=1, source="test")
    probes = fit_probes(train)
    evaluations = evaluate_probes(probes, refit_probes(probes, train), test, test.targets)

    for layer, evaluation in enumerate(evaluations):
        said = probes[layer].predict(test.values[layer])
        values = evaluation.values()
        assert evaluation.layer == layer
        assert values["accuracy"] == pytest.approx(accuracy_score(test.targets, said))
        assert values["macro_f1"] == pytest.approx(f1_score(test.targets, said, average="macro"))
        assert values["model_agreement"] == pytest.approx(accuracy_score(test.logits.argmax(axis=1), said))
        assert values["penalty"] == probes[layer].penalty
        for name, outcome in evaluation.outcomes().items():
            assert outcome.shape == (90,)
            assert outcome.mean() == values[name]


def test_probes_of_the_model_are_judged_by_what_the_model_says():
    train, test = types_in_layer_zero(80, "train")[0], types_in_layer_zero(40, "test")[0]
    probes = fit_probes(train, target="model")

    evaluation = evaluate_probes(probes, probes, test, test.targets)[1]

    assert evaluation.values()["accuracy"] == evaluation.values()["model_agreement"] == 1.0


def test_probes_are_not_evaluated_on_their_own_examples():
    train = planted()
    probes = fit_probes(train)

    with pytest.raises(SplitError) as caught:
        evaluate_probes(probes, probes, train, train.targets)

    assert str(caught.value) == (
        "The probes are to be evaluated on the examples that they were fitted on: give activations of other examples."
    )


def test_activations_of_another_classifier_are_refused():
    probes = fit_probes(planted())
    other = planted(seed=1, source="test", labels=("x", "y", "z"))

    with pytest.raises(DataError) as caught:
        evaluate_probes(probes, probes, other, other.targets)

    assert str(caught.value) == (
        f"The activations have 2 layers and the labels ('x', 'y', 'z'), the probes 2 and {LABELS}: "
        "give activations of the same classifier."
    )
