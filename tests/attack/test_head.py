"""Edits of the head: closed forms beside general solvers, optimality conditions, and the live model."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from planted import planted_classifier, planted_examples, random_classifier, random_examples
from scipy.optimize import minimize

from synapse.attack.base import attacked
from synapse.attack.head import (
    STEPS,
    KeptMeans,
    MeanStep,
    MinimalDamage,
    bias_attacks,
    edit_budget,
    key_covariance,
    minimal_damage_edit,
    one_sample_changes,
    one_sample_edits,
    ranked_head_attacks,
    redirect_head,
    row_attacks,
)
from synapse.errors import SettingsError
from synapse.perturb.weights import HeadEdit
from synapse.recording import record
from synapse.testing import check_perturbation

RNG = np.random.default_rng(5)


@pytest.fixture(scope="module")
def splits():
    classifier = planted_classifier()
    return record(classifier, planted_examples(60, seed=2)), record(classifier, planted_examples(60, seed=1))


@pytest.fixture(scope="module")
def weight():
    return planted_classifier().head_weight().numpy()


def test_the_budget_of_an_edit_is_told_in_every_measure():
    weight, edit = np.diag([3.0, 4.0]), np.array([[0.0, 0.5], [0.0, 0.0]])
    found = edit_budget(edit, weight)
    assert (found.frobenius, found.spectral, found.largest) == pytest.approx((0.5 / 5, 0.5 / 4, 0.5 / 4))
    assert (found.rows, found.entries) == (1, 1)


@pytest.mark.parametrize("rows", ["target", "two", "all"])
def test_the_smallest_edit_for_one_example_is_that_of_a_general_solver(rows):
    for _ in range(6):
        weight, h, target = RNG.normal(size=(4, 3)), RNG.normal(size=3), 2
        z = weight @ h
        predicted = np.delete(np.arange(4), target)[np.delete(z, target).argmax()]
        may = {"target": [target], "two": [target, predicted], "all": list(range(4))}[rows]
        edit = one_sample_edits(h[None], one_sample_changes(z[None], target, rows, margin=0.1))[0]
        if z[target] > np.delete(z, target).max() + 0.1:
            assert (edit == 0).all()
            continue

        def moved(flat, weight=weight, may=may, h=h, target=target):
            changed = weight.copy()
            changed[may] += flat.reshape(len(may), 3)
            z = changed @ h
            return z[target] - np.delete(z, target) - 0.1

        general = minimize(
            lambda v: v @ v, np.zeros(3 * len(may)), constraints=[{"type": "ineq", "fun": moved}], tol=1e-14
        )
        assert np.linalg.norm(edit) == pytest.approx(np.linalg.norm(general.x), rel=1e-4)
        np.testing.assert_allclose(edit[may].ravel(), general.x, atol=1e-3)
        assert set(np.flatnonzero(edit.any(axis=1))) <= set(may)


def test_the_norms_are_the_gap_over_the_features_and_over_root_two_of_it():
    z, h = np.array([[5.0, 1.0, -50.0]]), np.array([[3.0, 4.0]])
    norms = [np.linalg.norm(one_sample_edits(h, one_sample_changes(z, 1, rows))) for rows in ("target", "two", "all")]
    assert norms == pytest.approx([4 / 5, 4 / (np.sqrt(2) * 5), 4 / (np.sqrt(2) * 5)])


def test_an_example_without_features_cannot_be_moved():
    assert np.isnan(one_sample_edits(np.zeros((1, 3)), np.ones((1, 2)))).all()


@pytest.mark.parametrize("n_keys", [1, 3])
def test_minimal_damage_edits_meet_the_optimality_conditions_and_equal_a_general_solver(n_keys):
    weight, keys, values = RNG.normal(size=(3, 6)), RNG.normal(size=(6, n_keys)), RNG.normal(size=(3, n_keys))
    covariance = key_covariance(RNG.normal(size=(50, 6)) @ RNG.normal(size=(6, 6)), ridge=0.1)
    edit = minimal_damage_edit(weight, keys, values, covariance)
    # feasible, and stationary: the gradient dW C lies in the span of the keys
    np.testing.assert_allclose((weight + edit) @ keys, values, atol=1e-9)
    outside = np.eye(6) - keys @ np.linalg.pinv(keys)
    np.testing.assert_allclose(edit @ covariance @ outside, 0, atol=1e-9)
    given = {"type": "eq", "fun": lambda v: ((weight + v.reshape(3, 6)) @ keys - values).ravel()}
    general = minimize(
        lambda v: np.trace(v.reshape(3, 6) @ covariance @ v.reshape(3, 6).T) / 2,
        np.zeros(18),
        jac=lambda v: (v.reshape(3, 6) @ covariance).ravel(),
        constraints=[given],
        tol=1e-14,
        options={"maxiter": 500},
    )
    np.testing.assert_allclose(edit.ravel(), general.x, atol=1e-4)


def test_with_one_key_it_is_the_rank_one_formula_and_keys_that_repeat_are_refused():
    weight, u, v = RNG.normal(size=(3, 5)), RNG.normal(size=(5, 1)), RNG.normal(size=(3, 1))
    covariance = key_covariance(RNG.normal(size=(40, 5)))
    direct = (v - weight @ u) @ np.linalg.solve(covariance, u).T / (u.T @ np.linalg.inv(covariance) @ u)
    np.testing.assert_allclose(minimal_damage_edit(weight, u, v, covariance), direct)
    with pytest.raises(SettingsError, match="The 2 keys span 1 directions; independent ones were expected"):
        minimal_damage_edit(weight, np.hstack([u, 2 * u]), np.hstack([v, v]), covariance)


def test_the_covariance_of_keys_is_their_second_moment_and_a_ridge():
    h = RNG.normal(size=(30, 4)) + 1
    expected = np.mean([np.outer(row, row) for row in h], axis=0)
    np.testing.assert_allclose(key_covariance(h, ridge=0.5), expected + 0.5 * np.trace(expected) / 4 * np.eye(4))


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_every_step_redirects_the_live_model_at_the_predicted_budgets(step, splits, weight):
    train, test = splits
    classifier, examples, size = planted_classifier(), planted_examples(60, seed=1), np.linalg.norm(weight)
    before = classifier.weights_hash()
    found = redirect_head(step, train, test, weight, seed=0)
    (attack,) = [one for one in found if (one.source, one.target, one.arm) == ("b", "c", "attack")][:1]
    # the direction, read off what the scores say of the slopes: fit it again
    edit = _edit_of(step, train, 1, 2) * size
    for position in (0, 5):
        needed, i = attack.needed[0, position], attack.examples[[position]]
        for factor, predicted in ((1.001, 2), (0.999, 1)):
            with classifier.edited(HeadEdit("head", edit * needed * factor)):
                assert classifier.predict(examples.take(i)).argmax() == predicted
    assert classifier.weights_hash() == before


def _edit_of(step, train, source, target):
    from synapse.attack.head import Keys, required_step

    features = train.features.astype(float)
    of_source = attacked(train, source, target)
    required = required_step(train.logits[of_source], source, target)
    moment = features.T @ features / len(features)
    return step.edit(Keys(features, moment, train.targets, of_source, required, 0.5), source, target, 3)


def test_minimal_damage_moves_the_other_classes_least_of_all_that_move_the_mean_as_far(splits):
    train, _ = splits
    mean = train.features[attacked(train, 1, 2)].astype(float).mean(axis=0)
    damage = []
    for step in (MinimalDamage(ridge=1e-6), MeanStep()):
        v = _edit_of(step, train, 1, 2)[2]
        damage.append(np.mean((train.features @ (v / (v @ mean))) ** 2))
    assert damage[0] < damage[1]


def test_several_keys_keep_the_means_of_the_other_classes(splits):
    train, _ = splits
    v = _edit_of(KeptMeans(), train, 1, 2)[2]
    means = [train.features[train.targets == label].astype(float).mean(axis=0) for label in range(3)]
    assert v @ train.features[attacked(train, 1, 2)].mean(axis=0) > 0
    np.testing.assert_allclose([v @ means[0], v @ means[2]], 0, atol=1e-9)


def test_controls_have_the_same_rows_features_and_norm(splits, weight, monkeypatch):
    import synapse.attack.head.redirect as module

    seen, good = [], module._along

    def keep(test, edits, source, target, arm, share, **named):
        seen.append((arm, edits, target))
        return good(test, edits, source, target, arm, share, **named)

    monkeypatch.setattr(module, "_along", keep)
    redirect_head(MeanStep(rows="target", units=(3, 5, 9)), *splits, weight, seed=0)
    assert {arm for arm, _, _ in seen} == {"attack", "random"}
    for arm, edits, target in seen:
        assert len(edits) == (1 if arm == "attack" else 10)
        np.testing.assert_allclose(np.linalg.norm(edits, axis=(1, 2)), np.linalg.norm(weight))
        touched = np.argwhere(edits.any(axis=0))
        assert set(touched[:, 0]) == {target}
        assert set(touched[:, 1]) <= {3, 5, 9}


def test_the_planted_neuron_redirects_every_example_and_random_ones_do_not(splits, weight):
    order = np.array([5, 9, *(unit for unit in range(16) if unit not in (5, 9))])
    found = ranked_head_attacks(MeanStep(), *splits, weight, order, (1, 16), seed=0)
    few = [one for one in found if one.location == "head, 1 of 16 features" and (one.source, one.target) == ("b", "c")]
    top, random = few
    assert (top.arm, random.arm) == ("attack", "random")
    assert random.needed.shape == (10, len(top.examples))
    assert np.isfinite(top.needed).all()
    assert np.isinf(random.needed).any(axis=1).mean() >= 0.5
    whole = [one for one in found if one.location == "head, 16 of 16 features"]
    for top, random in zip(whole[::2], whole[1::2], strict=True):  # all features are all features
        np.testing.assert_allclose(random.needed, np.repeat(top.needed, 10, axis=0))


def test_rows_exchanged_scaled_and_emptied_do_what_the_edited_model_does(splits, weight):
    _, test = splits
    classifier, examples = planted_classifier(), planted_examples(60, seed=1)
    bias = classifier.final.bias.detach().numpy()
    found = row_attacks(test, weight, bias, seed=0)
    swap = next(one for one in found if (one.attack, one.detail, one.arm) == ("row-swap", "b <-> c", "attack"))
    np.testing.assert_allclose(swap.logits[0], test.logits[:, [0, 2, 1]], atol=1e-5)
    head = np.column_stack([weight, bias])
    expected = np.sqrt(2) * np.linalg.norm(head[1] - head[2]) / np.linalg.norm(head)
    assert swap.budget["frobenius"] == pytest.approx(expected)
    assert (swap.budget["rows"], swap.budget["entries"]) == (2, 4)
    for name, factor in (("row-zero", 0.0), ("row-sign", -1.0), ("row-scale-2", 2.0)):
        one = next(one for one in found if (one.attack, one.detail, one.arm) == (name, "b", "attack"))
        change, of_bias = np.zeros_like(weight), np.zeros_like(bias)
        change[1], of_bias[1] = (factor - 1) * weight[1], (factor - 1) * bias[1]
        with classifier.edited(HeadEdit("head", change, of_bias)):
            np.testing.assert_allclose(one.logits[0], classifier.predict(examples), atol=1e-5)
    assert all(len(one.logits) == 10 for one in found if one.arm == "random")


def test_a_change_of_the_bias_alone_needs_half_the_gap_twice(splits):
    train, test = splits
    bias = np.array([3.0, 4.0, 0.0])
    (one,) = [
        one
        for one in bias_attacks(train, test, bias, seed=0)
        if (one.source, one.target, one.arm) == ("b", "c", "attack")
    ]
    z = test.logits[one.examples].astype(float)
    expected = np.maximum((z[:, 1] - z[:, 2]) / 2, z[:, 0] - z[:, 2]) * np.sqrt(2) / 5
    np.testing.assert_allclose(one.needed[0], expected)
    assert one.unit == "||db||/||b||"


def test_what_cannot_be_is_refused(splits, weight):
    train, test = splits
    with pytest.raises(SettingsError, match="does not end in a linear map"):
        redirect_head(MeanStep(), replace(train, features=None), test, weight, seed=0)
    with pytest.raises(SettingsError, match="all rows were asked for: use 'two'"):
        redirect_head(MeanStep(rows="all"), train, test, weight, seed=0)


def test_a_class_with_no_example_on_one_side_is_left_out(splits, weight):
    train, test = splits
    no_c = train.take(np.flatnonzero(train.targets != 2))
    for step in STEPS:
        found = redirect_head(step, no_c, test, weight, seed=0)
        assert {one.source for one in found} == {"a", "b"}
        one_of_b = np.append(np.flatnonzero(train.targets == 0), attacked(train, 1, 2)[:1])
        assert all(
            np.isfinite(one.needed).any() for one in redirect_head(step, train.take(one_of_b), test, weight, seed=0)
        )


# ---------------------------------------------------------------------------------------------------- in the live model


def test_an_edit_of_matrix_and_bias_holds_what_every_perturbation_holds():
    edit = HeadEdit("head", np.full((3, 32), 0.5, dtype=np.float32), np.array([1.0, -1.0, 0.0], dtype=np.float32))
    check_perturbation(edit, random_classifier("bert"), random_examples(5, seed=1).inputs)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, torch.OutOfMemoryError, MemoryError])
def test_matrix_and_bias_come_back_bitwise_after_whatever_happens(error):
    classifier = planted_classifier()
    before = classifier.weights_hash()
    with pytest.raises(error), classifier.edited(HeadEdit("head", np.ones((3, 16)), np.ones(3))):
        assert classifier.weights_hash() != before
        raise error
    assert classifier.weights_hash() == before


def test_edits_of_another_shape_or_of_a_bias_that_is_not_there_are_refused():
    classifier = planted_classifier()
    with pytest.raises(SettingsError, match=r"weight has the shape \(1, 16\); \(3, 16\) was expected"):
        classifier.edited(HeadEdit("head", np.ones((1, 16)))).__enter__()
    classifier.module.head.bias = None
    with pytest.raises(SettingsError, match="has no bias to edit"):
        classifier.edited(HeadEdit("head", np.ones((3, 16)), np.ones(3))).__enter__()
