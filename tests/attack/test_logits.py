"""Changes of the logits: every number from a closed form, a brute-force grid or a general solver."""

from dataclasses import replace

import numpy as np
import pytest
from planted import planted_classifier, planted_examples, random_classifier, random_examples
from scipy.optimize import minimize
from scipy.stats import norm

from synapse.attack.logits import (
    LogitNoise,
    Permuted,
    PriorAdjustment,
    RoundedLogits,
    Temperature,
    away_attacks,
    gaps,
    noise_curve,
    noise_flips,
    noise_probabilities,
    prior_attacks,
    rotation_attacks,
    rounding_attacks,
    shift_attacks,
    smallest_changes,
    success_curve,
    swap_attacks,
    temperature_controls,
    tied,
)
from synapse.errors import SettingsError
from synapse.recording import record
from synapse.testing import check_perturbation

RNG = np.random.default_rng(7)


@pytest.fixture(scope="module")
def recorded():
    return record(planted_classifier(), planted_examples(60, seed=1))


def test_the_success_curve_is_the_share_that_a_shift_redirects():
    z = RNG.normal(size=(300, 4)) * 3
    asked = z[z.argmax(axis=1) != 1]
    budgets = np.linspace(0, 12, 60)
    shifted = [(asked + budget * np.eye(4)[1]).argmax(axis=1) == 1 for budget in budgets + 1e-12]
    np.testing.assert_allclose(success_curve(gaps(asked, 1), budgets), np.mean(shifted, axis=1))


def test_away_from_a_class_the_shift_is_the_margin(recorded):
    found = [one for one in away_attacks(recorded, seed=0) if one.arm == "attack"]
    assert [(one.source, one.target) for one in found] == [("a", ""), ("b", ""), ("c", "")]
    for label, one in enumerate(found):
        z = recorded.logits[one.examples].astype(float)
        margin = z[:, label] - np.delete(z, label, axis=1).max(axis=1)
        np.testing.assert_allclose(one.needed[0], margin)
        assert (recorded.targets[one.examples] == label).all()
    assert all(len(one.needed) == 10 for one in away_attacks(recorded, seed=0) if one.arm == "random")


def test_a_prior_adjustment_redirects_at_the_strength_that_was_said(recorded):
    priors = np.array([0.6, 0.3, 0.1])
    (found,) = [one for one in prior_attacks(recorded, priors, seed=0) if one.arm == "attack" and one.target == "c"]
    z = recorded.logits[found.examples].astype(float)
    assert np.isfinite(found.needed).sum() > 10
    for i in np.flatnonzero(np.isfinite(found.needed[0])):
        for factor, is_target in ((1.001, True), (0.999, False)):
            adjusted = z[i] - factor * found.needed[0, i] * np.log(priors)
            assert (adjusted.argmax() == 2) == is_target


def test_equal_priors_move_nothing_and_missing_ones_are_refused(recorded):
    for one in prior_attacks(recorded, np.full(3, 1 / 3), seed=0):
        assert np.isinf(one.needed).all() or one.arm == "random"
    with pytest.raises(SettingsError, match="one positive share for each of the 3 classes was expected"):
        prior_attacks(recorded, np.array([0.5, 0.5, 0.0]), seed=0)


@pytest.mark.parametrize("n_labels", [2, 3, 6])
def test_the_shortest_change_of_the_logits_is_that_of_a_general_solver(n_labels):
    for z in RNG.normal(size=(12, n_labels)):
        found = smallest_changes(z[None], 0, "l2")[0]
        rivals = [{"type": "ineq", "fun": lambda d, c=c, z=z: (z + d)[0] - (z + d)[c]} for c in range(1, n_labels)]
        general = minimize(lambda d: d @ d, np.zeros(n_labels), constraints=rivals, tol=1e-12)
        np.testing.assert_allclose(found, general.x, atol=1e-5)


def test_with_one_rival_near_the_lengths_are_the_gap_and_its_known_fractions():
    z = np.array([[0.0, 3.0, -20.0], [2.0, 1.0, -20.0]])
    sizes = [np.linalg.norm(smallest_changes(z, 0, one), ord, axis=1) for one, ord in (("one", 2), ("l2", 2))]
    sizes.append(np.abs(smallest_changes(z, 0, "linf")).max(axis=1))
    np.testing.assert_allclose(np.stack(sizes), [[3, 0], [3 / np.sqrt(2), 0], [1.5, 0]])


@pytest.mark.parametrize("kind", ["one", "l2", "linf"])
def test_after_the_smallest_change_the_target_ties_with_the_largest(kind):
    z = RNG.normal(size=(200, 5))
    moved = z + smallest_changes(z, 3, kind)
    np.testing.assert_allclose(moved.max(axis=1), moved[:, 3], atol=1e-12)


def test_under_noise_two_classes_follow_the_normal_distribution():
    z = np.array([[1.0, 0.0], [0.0, 4.0], [2.0, 2.0]])
    for strength in (0.3, 1.0, 20.0):
        expected = norm.cdf((z[:, 0] - z[:, 1]) / (strength * np.sqrt(2)))
        np.testing.assert_allclose(noise_probabilities(z, strength)[:, 0], expected, atol=1e-9)


def test_under_noise_many_classes_follow_what_sampling_shows():
    z = RNG.normal(size=(5, 6))
    found = noise_probabilities(z, 0.8)
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-9)
    sampled = (z + 0.8 * RNG.standard_normal((200_000, 5, 6))).argmax(axis=2)
    shares = np.stack([(sampled == label).mean(axis=0) for label in range(6)], axis=1)
    np.testing.assert_allclose(found, shares, atol=0.005)
    flips = noise_flips(z, np.array([0.01, 0.8, 1e6]))
    assert (np.diff(flips, axis=0) >= 0).all()
    np.testing.assert_allclose(flips[2], 5 / 6, atol=1e-4)


def test_noise_without_strength_is_refused():
    with pytest.raises(SettingsError, match=r"The strength of the noise is 0.0; a positive number was expected"):
        noise_probabilities(np.zeros((1, 2)), 0.0)


@pytest.mark.parametrize(
    "change",
    [
        PriorAdjustment((0.2, 0.3, 0.5), 2.0),
        Temperature(3.0),
        LogitNoise(2.0, seed=4),
        Permuted((2, 0, 1)),
        RoundedLogits(3, -4.0, 4.0),
    ],
    ids=str,
)
def test_changes_of_the_logits_hold_what_every_perturbation_holds(change):
    check_perturbation(change, random_classifier("bert"), random_examples(5, seed=1).inputs)


def test_a_temperature_changes_no_prediction_and_a_permutation_permutes_them(recorded):
    classifier, examples = planted_classifier(), planted_examples(60, seed=1)
    with classifier.edited(Temperature(7.0)):
        assert (classifier.predict(examples).argmax(axis=1) == recorded.predictions).all()
    order = (1, 2, 0)  # class 0 gets the logit of class 1
    with classifier.edited(Permuted(order)):
        found = classifier.predict(examples).argmax(axis=1)
    assert (np.array(order)[found] == recorded.predictions).all()


def test_what_a_swap_does_follows_from_the_clean_predictions(recorded):
    *swaps, control = swap_attacks(recorded, seed=0)
    assert [one.detail for one in swaps] == ["a <-> b", "a <-> c", "b <-> c"]
    predicted = recorded.predictions
    for one, (a, b) in zip(swaps, ((0, 1), (0, 2), (1, 2)), strict=True):
        assert one.flip_rate(recorded) == pytest.approx(np.isin(predicted, (a, b)).mean())
        of_a = (recorded.targets == a) & (predicted != b)
        assert one.success(recorded, a, b) == pytest.approx((predicted[of_a] == a).mean())
    assert control.arm == "random"
    assert len(control.logits) == 10


def test_where_each_class_is_named_as_the_next_every_prediction_changes(recorded):
    attack, control = rotation_attacks(recorded, seed=0)
    assert (attack.predictions[0] == (recorded.predictions + 1) % 3).all()
    assert attack.budget == control.budget == {"classes": 3.0}
    assert len(control.logits) == 10
    assert (control.predictions != recorded.predictions).all()
    two = replace(recorded, labels=("a", "b"), logits=recorded.logits[:, :2])
    assert rotation_attacks(two, seed=0) == []


def test_temperatures_change_all_logits_and_no_prediction(recorded):
    for one, temperature in zip(temperature_controls(recorded, (0.1, 10.0)), (0.1, 10.0), strict=True):
        assert one.arm == "control"
        np.testing.assert_allclose(one.logits[0] * temperature, recorded.logits, rtol=1e-6)
        assert one.flip_rate(recorded) == one.collateral(recorded) == 0


def test_the_noise_curve_is_sampled_from_the_exact_one(recorded):
    strengths = (0.5, 2.0, 8.0)
    curve = noise_curve(recorded, strengths, seed=3, draws=60)
    flips = (curve.logits.argmax(axis=3) != recorded.predictions).mean(axis=(1, 2))
    np.testing.assert_allclose(flips, noise_flips(recorded.logits, np.array(strengths)).mean(axis=1), atol=0.02)
    assert (curve.attack, curve.arm, curve.location, curve.unit) == ("logit-noise", "random", "logits", "logit")


def test_rounding_stays_within_half_a_step_and_one_bit_ties(recorded):
    for attack, control in zip(*[iter(rounding_attacks(recorded, recorded, (1, 4, 16), seed=0))] * 2, strict=True):
        step = np.ptp(recorded.logits) / (2 ** attack.budget["bits"] - 1)
        moved = attack.logits[0] - recorded.logits
        assert np.abs(moved).max() <= step / 2 + 1e-5
        assert attack.budget["rms"] == pytest.approx(np.sqrt((moved**2).mean()))
        noise = control.logits - recorded.logits
        assert np.sqrt((noise**2).mean()) == pytest.approx(attack.budget["rms"], rel=0.1)
    assert attack.flip_rate(recorded) == 0  # 16 bits
    assert len(tied(RoundedLogits.of(recorded, 1).changed(recorded.logits.astype(float), range(60)))) > 0


def test_what_cannot_be_is_refused():
    z = np.zeros((1, 3))
    with pytest.raises(SettingsError, match=r"The temperature is 0.0"):
        Temperature(0.0).changed(z, [1])
    with pytest.raises(SettingsError, match=r"The order is \[0, 0, 1\]; each of the classes 0 to 2 was expected once"):
        Permuted((0, 0, 1)).changed(z, [1])
    with pytest.raises(SettingsError, match="0 bits between"):
        RoundedLogits(0, 0.0, 1.0).changed(z, [1])


def test_a_class_without_examples_has_no_budgets():
    recorded = record(planted_classifier(), planted_examples(60, seed=1))
    none_of_c = recorded.take(np.flatnonzero(recorded.targets != 2))
    empty = [one for one in (*shift_attacks(none_of_c, seed=0), *away_attacks(none_of_c, seed=0)) if one.source == "c"]
    assert empty
    assert all(one.needed.shape[1] == 0 for one in empty)
