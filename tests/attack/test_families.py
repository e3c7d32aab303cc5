"""Every family that a study can be asked for, and the table of what it finds."""

import numpy as np
import pytest
from planted import B_UNIT, C_UNIT, planted_classifier, planted_examples

from synapse.attack.families import FAMILIES, Target, find_attacks
from synapse.attack.logits import Permuted
from synapse.measure.attacks import attack_table
from synapse.measure.vulnerability import vulnerability
from synapse.recording import record
from synapse.types import Attacks

FIXED = {
    *("logit-swap", "logit-permutation", "logit-rounding"),
    *("row-swap", "row-zero", "row-sign", "row-scale-0.5", "row-scale-2"),
}
BY_NATURE = {"weight-noise": "random", "logit-noise": "random", "logit-temperature": "control", "certificate": "bound"}
"""Attacks that have no control, and their one arm."""
FEW = np.arange(8)


@pytest.fixture(scope="module")
def target():
    classifier, examples, fitting = planted_classifier(), planted_examples(60, seed=1), planted_examples(90, seed=2)
    train, test = record(classifier, fitting), record(classifier, examples)
    planted_first = np.array([B_UNIT, C_UNIT, *(unit for unit in range(16) if unit not in (B_UNIT, C_UNIT))])
    orders = {"feature_order": np.arange(16), "neuron_order": np.stack([planted_first, planted_first])}
    few = (examples.take(FEW), test.take(FEW))
    return Target(classifier, train, test, *few, **orders, fitting=fitting.take(FEW), noise_draws=2)


@pytest.fixture(scope="module")
def found(target):
    before = target.classifier.weights_hash()
    attacks = {name: find_attacks(name, target) for name in FAMILIES}
    assert target.classifier.weights_hash() == before
    return attacks


@pytest.fixture(scope="module")
def table(found, target):
    return attack_table(sum(found.values(), Attacks()), target.test, seed=0)


def test_every_family_finds_something(found):
    weights = {"weight-noise", "pruning", "random-bits", "adversarial-weights"}
    assert set(found) == {"logits", "head", *weights, "bits", "activations"}
    for attacks in found.values():
        assert attacks.redirections or attacks.curves or attacks.flips


def test_every_attack_stands_beside_a_random_change(table):
    arms = table.groupby("attack")["arm"].agg(set)
    for attack, found in arms.drop(list(BY_NATURE)).items():
        assert {"attack", "random"} <= found, attack
    assert {attack: arms[attack] for attack in BY_NATURE} == {attack: {arm} for attack, arm in BY_NATURE.items()}


@pytest.mark.parametrize("family", ["pruning", "random-bits", "adversarial-weights"])
def test_every_change_of_weights_has_a_control_of_the_same_sizes_with_ten_draws(found, family):
    curves = found[family].curves
    assert {curve.location for curve in curves} == {"block 0", "block 1", "head"}
    for attack, control in zip(curves[::2], curves[1::2], strict=True):
        assert (attack.arm, control.arm) == ("attack", "random")
        for name in ("attack", "location", "target", "unit", "budgets"):
            assert getattr(attack, name) == getattr(control, name)
        assert control.logits.shape[1] == 10


def test_what_needs_an_order_or_training_examples_is_left_out_without_them(target, caplog):
    from dataclasses import replace

    without = replace(target, fitting=None, neuron_order=None)
    assert find_attacks("adversarial-weights", without).curves == ()
    assert "no training examples to follow the loss of" in caplog.text
    redirections = find_attacks("activations", without).redirections
    assert {one.attack for one in redirections} == {"activation-edit", "steering"}


def test_the_activations_are_also_edited_in_ranked_neurons_and_along_one_direction_for_all(found):
    redirections = found["activations"].redirections
    attacks = {one.attack for one in redirections}
    assert attacks == {"activation-edit", "activation-edit-ranked", "steering", "universal"}
    assert {one.location for one in redirections if one.attack == "activation-edit-ranked"} == {
        "residual 0, 2 of 16 neurons",
        "residual 1, 2 of 16 neurons",
    }


def test_a_temperature_moves_no_prediction(table):
    assert (table[table["attack"] == "logit-temperature"]["value"] == 0).all()


def test_no_head_edit_is_smaller_than_what_is_proved(table):
    budgets = table[table["measure"].isin(["d50", "d95"])].set_index(["source", "target", "measure"])
    proved = budgets[budgets["arm"] == "bound"]["value"]
    edits = budgets[budgets["attack"].isin(["head-edit", "head-mean", "head-rank-one", "head-multi-key"])][
        "value"
    ].dropna()
    assert len(edits) > 20
    assert (edits >= proved.reindex(edits.index) * (1 - 1e-9)).all()


def test_a_fixed_change_moves_as_many_predictions_as_it_does_by_hand(table, target):
    rows = table[(table["attack"] == "logit-swap") & (table["detail"] == "a <-> b")].set_index("measure")["value"]
    clean = target.test.logits
    swapped = Permuted.swap(0, 1, 3).changed(clean, range(len(clean))).argmax(axis=1)
    assert rows["flip_rate"] == (swapped != clean.argmax(axis=1)).mean()
    right = clean.argmax(axis=1) == target.test.targets
    assert rows["collateral"] == pytest.approx(right.mean() - (swapped == target.test.targets).mean())


def test_the_flips_of_the_table_are_those_of_the_search(table, found):
    for curve in found["bits"].flips:
        rows = table[(table["location"] == f"head, {curve.number_format}") & (table["arm"] == curve.arm)]
        success = rows[rows["measure"] == "success"].set_index("budget")["value"]
        assert success.index.tolist() == list(curve.flips)
        np.testing.assert_allclose(success, curve.redirected.mean(axis=0) / curve.attacked)


def test_the_cheapest_attack_is_the_smallest_budget_of_its_kind(table):
    cheapest = vulnerability(table).cheapest
    assert set(cheapest) == set(table[table["arm"] == "attack"]["attack"])
    for attack, places in cheapest.items():
        for place, best in places.items():
            rows = table[(table["attack"] == attack) & (table["location"] == place) & (table["arm"] == "attack")]
            if attack in FIXED:
                assert best.moved.value == rows[rows["measure"] == "flip_rate"]["value"].max()
            else:
                known = rows[(rows["measure"] == best.measure) & (rows["source"] != "")]["value"]
                assert best.budget.value == known.min() or best.source == ""


def test_a_head_that_is_not_linear_leaves_its_families_empty(target, monkeypatch):
    monkeypatch.setattr(type(target.classifier), "final", property(lambda self: None))
    for name in ("head", "bits"):
        found = find_attacks(name, target)
        assert [*found.redirections, *found.manipulations, *found.bounds, *found.flips] == []


def test_classes_of_one_size_have_no_prior_to_adjust_to(target):
    from dataclasses import replace

    equal = np.concatenate([np.flatnonzero(target.train.targets == label)[:10] for label in range(3)])
    attacks = {
        one.attack for one in find_attacks("logits", replace(target, train=target.train.take(equal))).redirections
    }
    assert attacks == {"logit-shift", "logit-shift-away"}
