from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from planted_activations import LABELS, planted
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from synapse.errors import ConvergenceError, DataError, SettingsError
from synapse.probe import probe as module
from synapse.probe.probe import fit_probes, refit_probes
from synapse.probe.solver import solve


def test_a_probe_reads_the_layer_that_carries_the_class_and_not_the_other():
    probes = fit_probes(planted())
    test = planted(seed=1)

    accuracies = [np.mean(probes[layer].predict(test.values[layer]) == test.targets) for layer in (0, 1)]

    assert accuracies[0] < 0.5
    assert accuracies[1] > 0.95
    assert np.argmax(np.abs(probes[1].weights).sum(axis=0)) == 3
    assert all(probe.converged and probe.gradient_norm <= 1e-7 for probe in probes.probes)
    assert (probes.labels, probes.source, probes.target, len(probes)) == (LABELS, "train", "gold", 2)


def test_a_probe_is_the_regression_of_scikit_learn_on_standardised_states():
    train, test = planted(), planted(seed=1)
    known, new = train.values[1].astype(np.float64), test.values[1].astype(np.float64)
    scaler = StandardScaler().fit(known)
    theirs = LogisticRegression(C=1 / (150 * 0.01), tol=1e-9, max_iter=10_000)
    theirs.fit(scaler.transform(known), train.targets)

    ours = fit_probes(train, penalties=(0.01,), l1_ratio=0.0)[1]

    expected = theirs.decision_function(scaler.transform(new))
    np.testing.assert_allclose(ours.predict_logits(test.values[1]), expected, atol=1e-4)


def test_folded_weights_give_the_same_logits_on_raw_states():
    train = planted()
    probe = fit_probes(train)[1]
    x = train.values[1]

    weights, intercept = probe.folded()

    np.testing.assert_allclose(x.astype(np.float64) @ weights.T + intercept, probe.predict_logits(x), atol=1e-9)


def test_a_constant_unit_has_no_weight_wherever_it_moves_later():
    train = planted()
    train.values[:, :, 5] = 0.1  # a value whose float64 deviation is not exactly 0
    probe = fit_probes(train)[1]
    moved = train.values[1].copy()
    moved[:, 5] = 1e6

    assert not probe.weights[:, 5].any()
    assert probe.scale[5] == 1.0
    np.testing.assert_array_equal(probe.predict_logits(moved), probe.predict_logits(train.values[1]))


def test_of_equally_good_penalties_the_strongest_is_chosen():
    train = planted()
    train.values[1, :, 3] *= 10  # separable: every penalty that leaves a weight is right everywhere

    assert fit_probes(train, penalties=(0.001, 0.05, 0.01))[1].penalty == 0.05


def test_a_penalty_that_leaves_no_weight_loses_against_one_that_does():
    assert fit_probes(planted(), penalties=(0.01, 100.0))[1].penalty == 0.01


def test_the_same_seed_gives_the_same_probes():
    one, two = fit_probes(planted(), seed=5), fit_probes(planted(), seed=5)

    np.testing.assert_array_equal(one[0].weights, two[0].weights)
    assert one[0].penalty == two[0].penalty


def test_a_probe_of_the_model_learns_what_the_model_says():
    train = planted()
    said = (train.targets + 1) % 3
    train = replace(train, logits=np.eye(3, dtype=np.float32)[said])

    probes = fit_probes(train, target="model")

    assert np.mean(probes[1].predict(train.values[1]) == said) > 0.95


def test_labels_that_are_rare_or_absent_in_train_do_no_harm():
    train = planted(labels=("a", "b", "c", "rare", "absent"))
    train.targets[0] = 3

    probe = fit_probes(train)[1]

    assert not probe.weights[4].any()
    assert np.isneginf(probe.intercept[4])
    assert 4 not in probe.predict(train.values[1])
    assert np.isneginf(probe.folded()[1][4])


def test_refitted_probes_keep_the_penalty_of_each_layer():
    train = planted()
    probes = fit_probes(train)

    same = refit_probes(probes, train)
    shifted = refit_probes(probes, train, (train.targets + 1) % 3)

    assert [p.penalty for p in shifted.probes] == [p.penalty for p in probes.probes]
    np.testing.assert_allclose(same[1].weights, probes[1].weights, atol=1e-4)
    np.testing.assert_allclose(shifted[1].weights, np.roll(probes[1].weights, 1, axis=0), atol=1e-4)


def test_a_probe_that_did_not_reach_its_optimum_is_an_error(monkeypatch):
    monkeypatch.setattr(module, "solve", partial(solve, max_iterations=2))

    with pytest.raises(ConvergenceError) as caught:
        fit_probes(planted(), penalties=(0.01,))

    message = str(caught.value)
    assert message.startswith("The probe of layer 0 stopped at a gradient norm of ")
    assert message.endswith(" with penalty 0.01, but 1e-07 is asked for: choose a stronger penalty.")


def test_states_that_are_not_finite_are_refused():
    train = planted()
    train.values[1, 7, 2] = np.nan

    with pytest.raises(DataError) as caught:
        fit_probes(train)

    assert str(caught.value) == (
        "Activations of layer 1 hold NaN or infinite values: look at the inputs, or run the classifier in float32."
    )


def test_examples_of_one_label_are_refused():
    train = planted()
    train.targets[:] = 1

    with pytest.raises(DataError) as caught:
        fit_probes(train)

    assert str(caught.value) == (
        "A probe needs examples of at least two labels, but the 150 given have only ['b']: add examples of the others."
    )


def test_examples_whose_labels_are_all_different_cannot_choose_a_penalty():
    with pytest.raises(DataError) as caught:
        fit_probes(planted(3))

    assert str(caught.value) == (
        "No label of the 3 examples occurs twice, so no penalty can be chosen: give more examples, or a single penalty."
    )
    assert len(fit_probes(planted(3), penalties=(0.01,))) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"penalties": ()}, "No penalty was given: give at least one number above 0, for example 0.01."),
        ({"penalties": (0.1, -1.0)}, "The penalty is -1.0: give a number above 0, for example 0.01."),
        ({"holdout": 1.0}, "holdout is 1.0: give a share between 0 and 1, for example 0.2."),
        ({"l1_ratio": -0.1}, "l1_ratio is -0.1: give a share between 0 (ridge) and 1 (lasso)."),
        ({"rule": "first"}, "The rule is 'first': give one of 'best', 'one-standard-error'."),
        ({"class_weight": "equal"}, "class_weight is 'equal': give None or 'balanced'."),
        ({"folds": 1}, "1 folds were asked for: give 2 or more, and no more than there are examples."),
        ({"solver": "newtn"}, "There is no solver 'newtn': give one of 'newton', 'first-order', 'sklearn'."),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(SettingsError) as caught:
        fit_probes(planted(), **options)

    assert str(caught.value) == message


def overlapping(n=300, seed=0):
    """Two layers whose classes overlap, class c three times as rare as the others."""
    random = np.random.default_rng(seed)
    targets = random.choice(3, size=n, p=[3 / 7, 3 / 7, 1 / 7])
    values = random.normal(size=(2, n, 8)).astype(np.float32)
    values[1] += random.normal(size=(3, 8))[targets]
    return replace(planted(n, seed=seed), values=values.astype(np.float32), targets=targets)


def test_balanced_probes_are_the_balanced_regression_of_scikit_learn():
    train = overlapping()
    z = StandardScaler().fit_transform(train.values[1].astype(np.float64))
    # All example weights times N / sum(weights) is what scikit-learn calls balanced, so C stays 1 / (N penalty).
    theirs = LogisticRegression(C=1 / (300 * 0.01), tol=1e-9, max_iter=10_000, class_weight="balanced")
    theirs.fit(z, train.targets)

    ours = fit_probes(train, penalties=(0.01,), l1_ratio=0.0, class_weight="balanced")[1]

    np.testing.assert_allclose(ours.weights, theirs.coef_, atol=1e-4)


def test_folds_choose_the_penalty_that_scikit_learn_finds_best_over_the_same_parts():
    train, penalties = overlapping(), (0.3, 0.1, 0.03, 0.01, 0.001)
    z = StandardScaler().fit_transform(train.values[1].astype(np.float64))
    parts = module._held_out(train.targets, 0.2, 5, 0)
    correct = []
    for penalty in penalties:
        hits = 0
        for part in parts:
            rest = np.setdiff1d(np.arange(300), part)
            theirs = LogisticRegression(C=1 / (len(rest) * penalty), tol=1e-8, max_iter=10_000)
            hits += int((theirs.fit(z[rest], train.targets[rest]).predict(z[part]) == train.targets[part]).sum())
        correct.append(hits)

    chosen = fit_probes(train, penalties=penalties, l1_ratio=0.0, folds=5)[1].penalty

    assert correct[penalties.index(chosen)] >= max(correct) - 1  # a tie broken by the last digit of a logit
    assert sorted(np.concatenate(parts).tolist()) == list(range(300))
    for c in range(3):
        counts = [int((train.targets[part] == c).sum()) for part in parts]
        assert max(counts) - min(counts) <= 1


def test_the_rule_of_one_standard_error_takes_a_penalty_at_least_as_strong():
    train = overlapping()
    best = fit_probes(train, folds=5)[1]
    sparse = fit_probes(train, folds=5, rule="one-standard-error")[1]
    noise = fit_probes(train, folds=5, rule="one-standard-error")[0]  # nothing to read: all penalties are alike

    assert sparse.penalty >= best.penalty
    assert noise.penalty == max(module.PENALTIES)


def test_a_joint_probe_is_one_regression_on_the_neurons_of_all_layers():
    train = overlapping()
    side_by_side = np.concatenate(list(train.values), axis=1).astype(np.float64)
    scaler = StandardScaler().fit(side_by_side)
    theirs = LogisticRegression(C=1 / (300 * 0.01), tol=1e-9, max_iter=10_000)
    theirs.fit(scaler.transform(side_by_side), train.targets)

    joint = module.fit_joint_probes(train, penalties=(0.01,), l1_ratio=0.0)

    weights = np.concatenate([probe.weights for probe in joint.probes], axis=1)
    np.testing.assert_allclose(weights, theirs.coef_, atol=1e-4)
    logits = joint.predict_logits(train.values)
    assert logits.shape == (1, 300, 3)
    np.testing.assert_allclose(logits[0], theirs.decision_function(scaler.transform(side_by_side)), atol=1e-3)
    with pytest.raises(SettingsError, match="A joint probe cannot be fitted again layer by layer"):
        refit_probes(joint, train)
