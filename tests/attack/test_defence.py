"""What to protect: closed forms against brute force and a general solver, searches against exhaustive ones."""

from dataclasses import replace
from itertools import combinations, permutations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from test_bits import drawn_features, features_of, int8_heads_with_one_flip, small_classifier

from synapse.attack import defence
from synapse.attack.base import RANDOM_DRAWS
from synapse.attack.bits import BitSearch
from synapse.attack.bits.aim import nearest_pairs
from synapse.attack.defence import (
    FACTOR,
    defence_table,
    defend_head,
    protected_bits,
    protected_features,
    protected_rows,
)
from synapse.errors import SettingsError
from synapse.types import Activations


def drawn(n_labels, n_features, n=80, seed=0):
    """A head, and features of which it gets most right."""
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(n_labels, n_features)).astype(np.float32)
    features = (rng.normal(size=(n, n_features)) * np.geomspace(1, 0.05, n_features)).astype(np.float32)
    logits = features @ weight.T
    targets = np.where(rng.random(n) < 0.9, logits.argmax(axis=1), rng.integers(n_labels, size=n))
    values = np.zeros((1, n, n_features), dtype=np.float32)
    labels = tuple(f"class {c}" for c in range(n_labels))
    return weight, Activations(values, logits, targets, labels, f"drawn-{seed}", features=features)


def length_of_change(z, target, rows):
    """The smallest change of the logits in these rows, by a search over how far the target rises."""
    lacking = z - z[target]
    rivals = [c for c in rows if c != target]
    fixed = max([lacking[c] for c in range(len(z)) if c not in rows and c != target], default=0.0)

    def length(rise):
        return np.sqrt(rise**2 + sum(max(lacking[c] - rise, 0) ** 2 for c in rivals))

    if target not in rows:
        return length(0.0) if fixed <= 0 else np.inf
    low, high = max(fixed, 0.0), max(*lacking, 0.0)
    return min(length(low), minimize_scalar(length, bounds=(low, high + 1e-9), options={"xatol": 1e-9}).fun)


def cheapest_by_hand(weight, test, rows=None, features=None):
    """What the cheapest pair of classes needs, example by example."""
    n_labels, n_features = weight.shape
    rows = range(n_labels) if rows is None else rows
    features = range(n_features) if features is None else features
    budgets = {}
    for source, target in permutations(range(n_labels), 2):
        right = np.flatnonzero((test.targets == source) & (test.logits.argmax(axis=1) == source))
        if len(right):
            change = np.array([length_of_change(test.logits[i].astype(float), target, rows) for i in right])
            through = np.linalg.norm(test.features[right][:, list(features)].astype(float), axis=1)
            with np.errstate(divide="ignore"):
                needed = np.sort(change / through / np.linalg.norm(weight.astype(float)))
            budgets[source, target] = needed[int(np.ceil(0.95 * len(right))) - 1]
    ends = min(budgets, key=budgets.get)
    return budgets[ends], tuple(f"class {end}" for end in ends)


@pytest.mark.parametrize("seed", range(3))
def test_features_are_protected_until_every_pair_of_classes_needs_ten_times_the_norm(seed):
    weight, test = drawn(3, 6, seed=seed)
    _, train = drawn(3, 6, seed=seed + 10)
    before, _ = cheapest_by_hand(weight, test)
    orders = {"energy": np.argsort(-np.square(train.features).mean(axis=0)), "ranking": np.arange(6)[::-1].copy()}
    defences = protected_features(train, test, weight, orders["ranking"], seed=seed)
    for chosen, order in orders.items():
        costs = [cheapest_by_hand(weight, test, features=order[k:]) for k in range(6)]
        half, most, found = [one for one in defences if one.chosen == chosen]
        assert (half.protected, most.protected) == (3, 5)
        for one in (half, most):
            assert one.after == pytest.approx(costs[one.protected][0], rel=1e-5)
        enough = [k for k, (cost, _) in enumerate(costs) if cost >= FACTOR * before]
        assert (found.protected, found.of) == (min(enough, default=6), 6)
        assert found.before == pytest.approx(before, rel=1e-5)
        after, ends = costs[found.protected] if enough else (np.inf, ("", ""))
        assert found.after == pytest.approx(after, rel=1e-5)
        assert (found.source, found.target) == ends
        assert found.factor >= FACTOR
    at_random = [one for one in defences if one.draw >= 0]
    halves = [one.after for one in at_random if (one.chosen, one.protected) == ("random", 3)]
    every = [cheapest_by_hand(weight, test, features=free)[0] for free in combinations(range(6), 3)]
    assert len(halves) == len(at_random) / 3 == RANDOM_DRAWS
    assert min(every) * (1 - 1e-5) <= min(halves) <= max(halves) <= max(every) * (1 + 1e-5)
    assert all(one.factor >= FACTOR for one in at_random if one.chosen == "random order")


@pytest.mark.parametrize("seed", range(3))
def test_no_proper_set_of_rows_makes_the_cheapest_edit_ten_times_as_large_where_no_single_free_row_does(seed):
    weight, test = drawn(4, 5, seed=seed)
    before, _ = cheapest_by_hand(weight, test)
    all_rows, all_but_one, *each = protected_rows(test, weight, seed=0)
    assert (all_rows.protected, all_rows.after, all_rows.source) == (4, np.inf, "")
    singles = {row: cheapest_by_hand(weight, test, rows=[row]) for row in range(4)}
    best, ends = max(singles.values())
    assert all_but_one.after == pytest.approx(best, rel=1e-5)
    assert (all_but_one.source, all_but_one.target) == ends
    assert all_but_one.factor < FACTOR
    for size in (1, 2, 3, 4):
        for free in combinations(range(4), size):
            assert cheapest_by_hand(weight, test, rows=free)[0] < FACTOR * before
    assert sorted(one.after for one in each) == pytest.approx(sorted(cost for cost, _ in singles.values()), rel=1e-5)


def test_of_two_rows_the_second_costs_the_root_of_two():
    weight, test = drawn(2, 5)
    *_, all_but_one, first, second = protected_rows(test, weight, seed=0)
    for one in (all_but_one, first, second):
        assert one.factor == pytest.approx(np.sqrt(2))


def test_a_row_of_no_use_to_an_attacker_is_left_free():
    weight, test = drawn(4, 5)
    far = np.where(np.arange(4) == 2, -1000, test.logits).astype(np.float32)  # never said, and never near
    test = replace(test, logits=far, targets=far.argmax(axis=1))
    rows = [one for one in protected_rows(test, weight, seed=0) if one.chosen != "random"]
    assert [(one.protected, one.factor >= FACTOR) for one in rows] == [(4, True), (3, True), (2, False)]
    assert rows[1].target == "class 2"
    assert rows[1].after == pytest.approx(cheapest_by_hand(weight, test, rows=[2])[0], rel=1e-5)
    pairs = [cheapest_by_hand(weight, test, rows=[2, row])[0] for row in (0, 1, 3)]
    assert rows[2].after == pytest.approx(max(pairs), rel=1e-5)


# ------------------------------------------------------------------------------------------------------------ searches


def one_feature(n_labels, seed):
    """A head of which one feature vector is all there is, so that margins of flips of int8 words add up."""
    classifier = small_classifier(n_labels, seed)
    feature = np.random.default_rng(seed).normal(size=(1, 8)).astype(np.float32)
    with torch.no_grad():
        says = int(classifier.final(torch.from_numpy(feature)).argmax())
    fit = features_of(classifier, np.repeat(feature, 3, axis=0), np.full(3, says), "fit")
    return classifier, fit, features_of(classifier, feature, np.array([says]), "score")


def fewest_flips(classifier, score, target, allowed):
    """The fewest flips of allowed bits that bring the target level with the class that is said, all others ignored."""
    weight, bias = classifier.final.weight.detach().numpy(), classifier.final.bias.detach().numpy()
    stored, heads = int8_heads_with_one_flip(weight)
    h, source = score.features[0], int(score.targets[0])
    gap = (stored @ h + bias)[[source, target]] @ [1, -1]
    gains = np.array([((head - stored) @ h)[[target, source]] @ [1, -1] for head in heads])
    gains = np.sort(gains[allowed])[::-1]
    return int(np.argmax(np.cumsum(gains) > gap)) + 1


@pytest.mark.parametrize("seed", range(2))
def test_with_two_classes_the_search_needs_as_few_flips_as_there_can_be_without_and_with_protected_bits(
    seed, monkeypatch
):
    classifier, fit, score = one_feature(2, seed)
    monkeypatch.setattr(defence, "WEIGHTS", 2)
    search, bit = BitSearch("int8", each_bit=2, together=1, heats=(), most=40), np.arange(16 * 8) % 8
    found = protected_bits(search, classifier, fit, score, draws=1, seed=seed)
    target = 1 - int(score.targets[0])
    positions = [one for one in found if (one.what, one.chosen) == ("bits", "highest")]
    assert [one.protected for one in positions] == list(range(1, 1 + len(positions)))
    assert {one.before for one in found} == {fewest_flips(classifier, score, target, np.ones(128, dtype=bool))}
    for one in positions:
        if np.isfinite(one.after):
            assert one.after == fewest_flips(classifier, score, target, bit < 8 - one.protected)
            assert (one.source, one.target) == (f"class {1 - target}", f"class {target}")
    assert positions[-1].factor >= FACTOR or positions[-1].protected == 7


@pytest.mark.parametrize("seed", range(2))
def test_no_search_needs_fewer_flips_than_an_exhaustive_one(seed):
    """On a head of 4 x 8 int8 words all single flips and all pairs are tried, with and without protected bits."""
    classifier, fit, score = one_feature(4, seed)
    weight, bias = classifier.final.weight.detach().numpy(), classifier.final.bias.detach().numpy()
    stored, heads = int8_heads_with_one_flip(weight)
    h, source = score.features[0], int(score.targets[0])
    changes, clean = (heads - stored) @ h, stored @ h + bias
    for protected in (0, 2):
        search = BitSearch("int8", bits=tuple(range(8 - protected)), each_bit=8, heats=(), most=6)
        allowed = changes[np.arange(256) % 8 < 8 - protected]
        pairs = (allowed[:, None] + allowed[None])[~np.eye(len(allowed), dtype=bool)]
        for target in (c for c in range(4) if c != source):
            reached = [((clean + some).argmax(axis=1) == target).any() for some in (allowed, pairs)]
            least = 1 if reached[0] else 2 if reached[1] else 3
            attack = search.find(classifier, fit, score, source=f"class {source}", target=f"class {target}")
            assert (attack.flips_for(0.95) or np.inf) >= least
            if least == 1:
                assert attack.flips_for(0.95) == 1


SMALL = BitSearch("int8", stealth=0.0, share=0.98, heats=(), each_bit=1, most=30)


@pytest.fixture(scope="module")
def small():
    return one_feature(2, 0)


@pytest.fixture(scope="module")
def found(small):
    classifier, train, test = small
    before = classifier.weights_hash()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(defence, "SEARCH", SMALL)
        patch.setattr(defence, "WEIGHTS", 4)
        defences = defend_head(classifier, train, test, np.arange(8), formats=("int8",))
    assert classifier.weights_hash() == before
    return defence_table(defences)


def test_the_table_has_every_protection_beside_random_ones_of_the_same_size(found):
    assert set(found["what"]) == {"features", "rows", "bits", "weights"}
    assert set(found["location"]) == {"head", "head, int8"}
    for (what, location), rows in found.groupby(["what", "location"]):
        drawn, chosen = rows[rows["draw"] >= 0], rows[rows["draw"] < 0]
        assert set(drawn["chosen"]) <= {"random", "random order"}
        # of two rows, one can be left free in two ways; of features shares are protected too
        assert len(drawn) == {"rows": 2, "features": 30}.get(what, 10)
        assert len(chosen) >= 1
        if what != "features":
            assert set(drawn["protected"]) == {chosen["protected"].iloc[-1]}
        assert (rows["searched"] == (SMALL.most if "," in location else np.inf)).all()
        assert (rows["unit"] == ("bits" if "," in location else "||dW||/||W||")).all()
    np.testing.assert_allclose(found["factor"], found["after"] / found["before"])


def test_what_the_cheapest_pair_needs_is_what_the_search_of_it_says(small, found):
    classifier, train, test = small
    flips = found[found["location"] == "head, int8"]
    first = flips[flips["what"] == "bits"].iloc[0]
    # flips that are found beside a larger protection do as well
    larger = flips[flips["chosen"] == "highest"]["after"]
    for protected, stated, known in ((0, first["before"], flips["after"]), (1, first["after"], larger)):
        needed = []
        for source, target in nearest_pairs(train)[:3]:
            ends = {"source": test.labels[source], "target": test.labels[target]}
            attack = replace(SMALL, bits=tuple(range(8 - protected))).find(classifier, train, test, **ends)
            needed.append(attack.flips_for(0.95) or np.inf)
        assert stated == min(*needed, *known)


def test_pairs_are_in_the_order_of_what_their_sources_lack():
    train = drawn_features(small_classifier(3, 1), 80, 1)
    right = train.targets == train.logits.argmax(axis=1)
    lacking = []
    for source, target in nearest_pairs(train):
        z = train.logits[right & (train.targets == source)]
        lacking.append(np.quantile(z.max(axis=1) - z[:, target], 0.95))
    assert len(lacking) == 6
    assert lacking == pytest.approx(sorted(lacking), rel=1e-6)


def test_where_there_is_nothing_to_protect_nothing_is_said(small, monkeypatch):
    classifier, train, test = small
    wrong = replace(test, targets=1 - test.predictions)
    assert defend_head(classifier, train, wrong) == []
    assert defence_table([]).empty
    with pytest.raises(SettingsError, match="carry no features of the final linear map"):
        protected_rows(replace(test, features=None), classifier.head_weight().numpy(), seed=0)
    monkeypatch.setattr(type(classifier), "final", property(lambda self: None))
    assert defend_head(classifier, train, test) == []
