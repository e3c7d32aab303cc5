from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from planted_activations import LABELS, planted
from scipy.io import wavfile
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, adjusted_rand_score, f1_score
from sklearn.preprocessing import StandardScaler

from synapse.data.examples import Examples
from synapse.data.reading import read_examples
from synapse.errors import DataError, SettingsError, SplitError
from synapse.measure.probes import probe_rows
from synapse.probe.controls import (
    compare_with_control,
    control_targets,
    evaluate_probes,
    input_types,
    refit_on,
    shuffled_targets,
)
from synapse.probe.probe import fit_probes, refit_probes
from synapse.types import Activations, Neurons

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


def paired(n, seed, topics):
    """Pairs whose second text alone says the topic, with the topic."""
    texts, topic = spoken(n, seed, topics)
    return tuple(("what is this", text) for text in texts), topic


def called(n, seed, calls):
    """Token ids drawn from a few of their own for each kind, and from 0 and 1, with the kind."""
    random = np.random.default_rng(seed)
    kind = np.arange(n) % len(calls)
    return tuple(tuple(random.choice((0, 1, *calls[k]), size=40).tolist()) for k in kind), kind


@pytest.fixture
def painted(tmp_path):
    """Images of different size, mode and format, bright at the left, at the right or at the top, with the place."""

    def make(n, seed, _):
        random = np.random.default_rng(seed)
        place, paths = np.arange(n) % 3, []
        for i in range(n):
            side, most = random.integers(20, 60), 65535 if i % 2 else 255
            pixels = random.integers(0, most // 4, size=(side, side))
            bright = (np.s_[:, : side // 2], np.s_[:, side // 2 :], np.s_[: side // 2])[place[i]]
            pixels[bright] += most // 2
            paths.append(tmp_path / f"{seed}-{i}.{'png' if i % 4 else 'bmp'}")
            Image.fromarray((pixels // (most // 255)).astype(np.uint8)).convert("P" if i % 3 else "RGB").save(paths[-1])
        return tuple(paths), place

    return make


@pytest.fixture
def sounded(tmp_path):
    """Sounds of different length, rate and format: low, high, or low and then high; with the kind."""

    def make(n, seed, _):
        random = np.random.default_rng(seed)
        kind, paths = np.arange(n) % 3, []
        for i in range(n):
            rate = (8000, 16000)[i // 3 % 2]
            time = np.arange(int(rate * random.uniform(0.5, 1.0))) / rate
            low, high = (np.sin(2 * np.pi * f * time + random.uniform(0, 6)) for f in (200, 2000))
            sound = (low, high, np.where(time < time[-1] / 2, low, high))[kind[i]]
            sound = random.uniform(0.3, 0.5) * sound + 0.01 * random.normal(size=len(time))
            paths.append(tmp_path / f"{seed}-{i}.WAV")
            wavfile.write(paths[-1], rate, (sound * 2**15).astype(np.int16) if i % 2 else sound.astype(np.float32))
        return tuple(paths), kind

    return make


@pytest.mark.parametrize(
    ("make", "kinds"),
    [
        (paired, TOPICS),
        (called, [(5, 6, 7), (70_000, 8, 9), (10, 11, 12)]),
        ("painted", None),
        ("sounded", None),
    ],
    ids=["pairs", "token ids", "images", "sounds"],
)
def test_pairs_ids_images_and_sounds_have_their_types_too(make, kinds, request):
    make = request.getfixturevalue(make) if isinstance(make, str) else make
    train, truth = make(60, 0, kinds)
    test, test_truth = make(30, 1, kinds)

    train_types, test_types = input_types(examples(train), examples(test), types=3, seed=0)

    found, expected = np.concatenate([train_types, test_types]), np.concatenate([truth, test_truth])
    assert adjusted_rand_score(expected, found) == 1.0


def test_large_images_are_told_apart_by_their_coarse_content():
    random = np.random.default_rng(0)
    place = np.arange(40) % 2
    images = random.integers(0, 100, size=(40, 100, 101, 3), dtype=np.uint8)
    images[place == 1, :40] += 80

    train_types, test_types = input_types(examples(images[:30]), examples(images[30:]), types=2, seed=0)

    assert adjusted_rand_score(place, np.concatenate([train_types, test_types])) == 1.0


def test_heartbeats_of_one_type_share_their_label_more_often_than_by_chance(shared):
    train, test = (
        read_examples(shared / "data" / "ecg5000" / f"{part}.csv", signal="t*") for part in ("train", "test")
    )

    train_types, test_types = input_types(train, test, types=20, seed=0)

    # The commonest label of the type, learned in train; 88 of the 150 test beats are normal
    commonest = [Counter(np.array(train.labels)[train_types == t]).most_common(1)[0][0] for t in range(20)]
    assert np.mean([commonest[t] == label for t, label in zip(test_types, test.labels, strict=True)]) > 0.8


def test_a_file_that_is_no_image_is_told_by_its_name(painted, tmp_path):
    train, _ = painted(12, 0, None)
    train[7].write_bytes(b"no image")

    with pytest.raises(DataError) as caught:
        input_types(examples(train), examples(train[:2]))

    assert str(caught.value) == (
        f"{train[7]} could not be read as an image: cannot identify image file '{train[7]}'. "
        "Replace the file or remove its row; sounds end in .wav."
    )


def test_images_and_sounds_are_not_sorted_together(painted, sounded):
    with pytest.raises(DataError) as caught:
        input_types(examples(painted(12, 0, None)[0]), examples(sounded(3, 1, None)[0], "test.csv"))

    assert str(caught.value) == "train.csv and test.csv hold images as well as sounds: give files of one kind."


def test_arrays_of_several_shapes_are_not_sorted():
    with pytest.raises(DataError) as caught:
        input_types(examples([np.zeros(3), np.zeros(4), np.zeros(3)]), examples(np.zeros((2, 3))))

    assert str(caught.value) == ("train.csv has inputs of 2 shapes, such as (3,) and (4,): give examples of one shape.")


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
        (((1, 2),) * 9, TOPICS, 5, DataError, "Of train.csv and test.csv, one holds token ids and one texts: "),
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


def test_shuffled_targets_keep_their_number_and_lose_their_place():
    targets = np.repeat([0, 1, 2], [70, 20, 10])

    shuffled = shuffled_targets(targets, seed=1)

    np.testing.assert_array_equal(np.sort(shuffled), targets)
    np.testing.assert_array_equal(shuffled, shuffled_targets(targets, seed=1))
    assert (shuffled != shuffled_targets(targets, seed=2)).any()
    # Two labels agree by chance as often as 0.7^2 + 0.2^2 + 0.1^2 = 0.54
    assert np.mean(shuffled == targets) < 0.7


def of_layers(*units):
    return [Neurons(layer, chosen) for layer, chosen in enumerate(units)]


def test_a_refit_sees_only_the_units_that_it_was_given():
    train, test = planted(), planted(90, seed=1, source="test")
    probes = fit_probes(train)

    sparse = refit_on(probes, train, of_layers((0, 1), (3, 5)))

    theirs = LogisticRegression(C=1 / (150 * 0.01), tol=1e-9, max_iter=10_000)
    scaler = StandardScaler().fit(train.values[1][:, [3, 5]].astype(np.float64))
    theirs.fit(scaler.transform(train.values[1][:, [3, 5]].astype(np.float64)), train.targets)
    ridge = refit_on(fit_probes(train, penalties=(0.01,), l1_ratio=0.0), train, of_layers((0, 1), (3, 5)))
    expected = theirs.decision_function(scaler.transform(test.values[1][:, [3, 5]].astype(np.float64)))
    np.testing.assert_allclose(ridge[1].predict_logits(test.values[1]), expected, atol=1e-4)
    assert set(np.flatnonzero(np.abs(ridge[1].weights).sum(axis=0)).tolist()) == {3, 5}
    assert [probe.penalty for probe in sparse.probes] == [probe.penalty for probe in probes.probes]
    moved = test.values[1] + 1e6 * (~np.isin(np.arange(8), (3, 5)))
    np.testing.assert_array_equal(sparse[1].predict(moved), sparse[1].predict(test.values[1]))
    assert train.values[0].any(axis=0).all()  # the activations are as they were


def test_a_refit_on_no_unit_says_the_commonest_label():
    train = planted(100)  # 34 of a, 33 of b and of c
    sparse = refit_on(fit_probes(train), train, of_layers((), (3,)))
    assert set(sparse[0].predict(train.values[0]).tolist()) == {0}


@pytest.mark.parametrize(
    ("neurons", "message"),
    [
        (of_layers((0,)), "Units of residual 0 were given: give one set for each of the layers 0 to 1 of residual, in"),
        ([], "Units of no layer were given: give one set for each of the layers 0 to 1 of residual, in order."),
        ([Neurons(0, (1,), "mlp"), Neurons(1, (1,), "mlp")], "Units of mlp 0, mlp 1 were given: give one set for "),
        (of_layers((0,), (1, 8)), "Layer 1 has no unit 8: its units are 0 to 7."),
        (of_layers((-1,), (1,)), "Layer 0 has no unit -1: its units are 0 to 7."),
    ],
)
def test_units_that_are_not_there_are_refused(neurons, message):
    train = planted()
    with pytest.raises(SettingsError) as caught:
        refit_on(fit_probes(train, penalties=(0.1,)), train, neurons)
    assert str(caught.value).startswith(message)


def test_the_units_of_a_ranking_are_laid_beside_random_ones():
    train, test = planted(), planted(90, seed=1, source="test")
    probes, random = fit_probes(train), np.random.default_rng(0)
    top = refit_on(probes, train, of_layers((0,), (3,)))
    others = [refit_on(probes, train, of_layers((0,), (int(random.choice([0, 1, 2, 4, 5])),))) for _ in range(4)]

    noise, clear = compare_with_control("random-units", top, test, others)

    said = [draw[1].predict(test.values[1]) == test.targets for draw in others]
    outcomes = clear.outcomes()
    np.testing.assert_allclose(outcomes["random-units_accuracy"], np.mean(said, axis=0))
    assert outcomes["random-units_selectivity"].mean() == pytest.approx(
        accuracy_score(test.targets, top[1].predict(test.values[1])) - np.mean(said)
    )
    assert clear.outcomes()["random-units_selectivity"].mean() > 0.4
    assert (noise.layer, clear.layer, clear.control) == (0, 1, "random-units")


def test_shuffled_labels_are_worth_a_guess_and_selectivity_has_a_paired_interval():
    train, test = planted(300), planted(300, seed=1, source="test")
    probes = fit_probes(train)
    draws = [refit_probes(probes, train, shuffled_targets(train.targets, seed=seed)) for seed in range(3)]
    truth = np.stack([shuffled_targets(test.targets, seed=seed) for seed in range(3)])

    clear = compare_with_control("shuffled", probes, test, draws, control_targets=truth)[1]
    rows = probe_rows(
        layer=1,
        n_layers=2,
        outcomes=clear.outcomes(),
        predictions=probes[1].predict(test.values[1]),
        targets=test.targets,
        n_labels=3,
        settings={},
        seed=0,
    )

    assert clear.control_correct.mean() == pytest.approx(1 / 3, abs=0.08)
    selectivity = next(row for row in rows if row["measure"] == "shuffled_selectivity")
    values = clear.outcomes()["shuffled_selectivity"]
    normal = 1.96 * values.std() / np.sqrt(300)  # of the differences: paired by example
    assert selectivity["value"] == pytest.approx(values.mean())
    assert selectivity["high"] - selectivity["low"] == pytest.approx(2 * normal, rel=0.15)


def test_a_control_may_read_other_activations_of_the_same_examples():
    train, test = planted(), planted(90, seed=1, source="test")
    noise = {"values": train.values[[0, 0]]}, {"values": test.values[[0, 0]]}
    untrained_train, untrained_test = (replace(part, **new) for part, new in zip((train, test), noise, strict=True))

    clear = compare_with_control(
        "untrained", fit_probes(train), test, [fit_probes(untrained_train)], control_activations=untrained_test
    )[1]

    assert clear.correct.mean() > 0.95
    assert clear.control_correct.mean() < 0.5


def test_controls_that_do_not_fit_are_refused():
    train, test = planted(), planted(90, seed=1, source="test")
    probes = fit_probes(train, penalties=(0.1,))

    with pytest.raises(SettingsError) as caught:
        compare_with_control("shuffled", probes, test, [])
    assert str(caught.value) == "No probes of the control 'shuffled' were given: give at least one draw."
    with pytest.raises(DataError) as refused:
        compare_with_control("untrained", probes, test, [probes], control_activations=planted(90, source="else"))
    assert str(refused.value) == (
        "The activations of the control 'untrained' are of other examples than those of the probes: "
        "record the same examples."
    )
    with pytest.raises(SplitError, match=r"^The probes are to be evaluated on the examples that they were fitted on"):
        compare_with_control("shuffled", probes, train, [probes])


def test_a_probe_of_the_predictions_stands_beside_that_of_the_labels():
    train, test = planted(), planted(90, seed=1, source="test")
    probes, of_model = fit_probes(train), fit_probes(train, target="model")
    evaluations = evaluate_probes(probes, refit_probes(probes, train), test, test.targets, of_model)

    for layer, evaluation in enumerate(evaluations):
        said = of_model[layer].predict(test.values[layer])
        expected = accuracy_score(test.logits.argmax(axis=1), said)
        assert evaluation.values()["model_accuracy"] == pytest.approx(expected)
        assert evaluation.values()["accuracy"] == pytest.approx(
            accuracy_score(test.targets, probes[layer].predict(test.values[layer]))
        )
