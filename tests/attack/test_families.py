"""Every family that a study can be asked for, and the table of what it finds."""

import numpy as np
import pytest
from planted import planted_classifier, planted_examples

from synapse.attack.families import FAMILIES, Target
from synapse.attack.logits import Permuted
from synapse.measure.attacks import attack_table
from synapse.measure.vulnerability import vulnerability
from synapse.recording import record
from synapse.types import Attacks, silent

FIXED = {"logit-swap", "logit-rounding", "row-swap", "row-zero", "row-sign", "row-scale-0.5", "row-scale-2"}
FEW = np.arange(8)


@pytest.fixture(scope="module")
def target():
    classifier, examples = planted_classifier(), planted_examples(60, seed=1)
    train, test = record(classifier, planted_examples(90, seed=2)), record(classifier, examples)
    return Target(classifier, train, test, examples.take(FEW), test.take(FEW), np.arange(16), noise_draws=2)


@pytest.fixture(scope="module")
def found(target):
    before = target.classifier.weights_hash()
    attacks = {name: family(target, silent) for name, family in FAMILIES.items()}
    assert target.classifier.weights_hash() == before
    return attacks


@pytest.fixture(scope="module")
def table(found, target):
    return attack_table(sum(found.values(), Attacks()), target.test, target.test.logits[FEW], seed=0)


def test_every_family_finds_something(found):
    assert set(found) == {"logits", "head", "weight-noise", "bits", "activations"}
    for attacks in found.values():
        assert attacks.redirections or attacks.noise or attacks.flips


def test_every_attack_stands_beside_a_random_change(table):
    arms = table.groupby("attack")["arm"].agg(set)
    for attack, found in arms.drop(["weight-noise", "certificate"]).items():
        assert {"attack", "random"} <= found, attack
    assert arms["weight-noise"] == {"random"}
    assert arms["certificate"] == {"bound"}


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
        found = FAMILIES[name](target, silent)
        assert [*found.redirections, *found.manipulations, *found.bounds, *found.flips] == []


def test_classes_of_one_size_have_no_prior_to_adjust_to(target):
    from dataclasses import replace

    equal = np.concatenate([np.flatnonzero(target.train.targets == label)[:10] for label in range(3)])
    attacks = {
        one.attack for one in FAMILIES["logits"](replace(target, train=target.train.take(equal)), silent).redirections
    }
    assert attacks == {"logit-shift", "logit-shift-away"}
