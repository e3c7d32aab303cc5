import json
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from planted import LABELS, planted_classifier, planted_examples, random_classifier, random_examples
from torch import nn

from synapse.attack.bits import REACHED, SPENT, STUCK, BitSearch, random_attacks
from synapse.attack.bits import candidates as scoring
from synapse.attack.bits.aim import Aim, Outcome
from synapse.attack.bits.candidates import Place, best_flips, random_flips
from synapse.attack.bits.flipping import Judge
from synapse.attack.bits.found import BitAttack
from synapse.attack.bits.runs import Aimed, LiveRuns, runs_of
from synapse.data.examples import Examples
from synapse.data.reading import read_examples
from synapse.errors import RunFolderError, SettingsError, SplitError
from synapse.model.classifier import Classifier
from synapse.perturb.bits import BitFlips, Flip, StoredWeight
from synapse.recording import record
from synapse.types import Activations

HEAD = "head.weight"
WIDTH = 8


class SmallBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden):
        return torch.cat([hidden[:, :1] + torch.tanh(self.mix(hidden[:, 1:].mean(dim=1)))[:, None], hidden[:, 1:]], 1)


class Small(nn.Module):
    """Two blocks of width 8 and a head whose rows are the labels."""

    def __init__(self, n_labels, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(20, WIDTH)
        self.blocks = nn.ModuleList([SmallBlock(), SmallBlock()])
        self.head = nn.Linear(WIDTH, n_labels)

    def forward(self, ids):
        hidden = self.embedding(ids)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden[:, 0])


def small_classifier(n_labels=4, seed=0):
    ids = np.random.default_rng(seed).integers(20, size=(4, 5))
    return Classifier.from_module(
        Small(n_labels, seed).eval(),
        preprocess=lambda ids: {"ids": torch.as_tensor(np.asarray(ids))},
        labels=[f"class {c}" for c in range(n_labels)],
        sample=ids,
    )


def features_of(classifier, features, targets, name):
    """Activations that hold these features, and the logits that the head gives them."""
    with torch.no_grad():
        logits = classifier.final(torch.from_numpy(features)).numpy()
    values = np.zeros((classifier.n_layers, len(features), classifier.width), dtype=np.float32)
    return Activations(values, logits, targets, classifier.labels, name, features=features)


def drawn_features(classifier, n, seed):
    """Features of which the stored head gets most right: their class is what it says of them without a little noise."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(n, WIDTH)).astype(np.float32)
    with torch.no_grad():
        targets = classifier.final(torch.from_numpy(features)).argmax(dim=1).numpy()
    return features_of(classifier, features, targets, f"drawn-{seed}")


def int8_heads_with_one_flip(weight):
    """Every head that one flip of an int8 word makes, in order of (weight, bit), by a loop over bytes."""
    scale = np.abs(weight).max(axis=1, keepdims=True) / np.float32(127)
    words = np.round(weight / scale).astype(np.int8)
    heads = []
    for place in range(words.size):
        for bit in range(8):
            flipped = words.copy().view(np.uint8).ravel()
            flipped[place] ^= 1 << bit
            heads.append(flipped.view(np.int8).reshape(words.shape) * scale)
    return words * scale, np.array(heads)


def hinge(logits, wanted, margin):
    """What the wanted class of each example is less than a margin ahead of the best other one."""
    rows = np.arange(len(logits))
    rivals = logits.copy()
    rivals[rows, wanted] = -np.inf
    return np.maximum(0, margin - (logits[rows, wanted] - rivals.max(axis=1)))


def loss_of(logits, targets, source, target, clean, margin):
    """The objective by its definition, for the logits of one head."""
    right = clean.argmax(axis=1) == targets
    attacked, others = right & (targets == source), right & (targets != source)
    ordered = np.sort(clean[attacked | others], axis=1)
    usual = np.median(ordered[:, -1] - ordered[:, -2])
    each = np.minimum(hinge(logits, np.where(attacked, target, targets), margin * usual), (margin + 2) * usual)
    return each[attacked].mean() + (each[others].mean() if others.any() else 0.0)


# ----------------------------------------------------------------------------------------------------------- candidates


@pytest.mark.parametrize("number_format", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("chunk", [7, 1 << 14])
def test_the_best_flips_of_every_bit_are_those_that_sorting_all_of_them_gives(monkeypatch, number_format, chunk):
    monkeypatch.setattr(scoring, "CHUNK", chunk)
    rng = np.random.default_rng(4)
    weights = [torch.from_numpy(rng.normal(size=shape).astype(np.float32)) for shape in ((5, 9), (3, 4))]
    gradients = [torch.from_numpy(rng.normal(size=w.shape).astype(np.float32)) for w in weights]
    stored = [StoredWeight.of(w, number_format) for w in weights]
    found = best_flips(stored, gradients, (0, 3, 7), each_bit=5)
    places = list(found.places)
    assert places == sorted(places)
    for bit in (0, 3, 7):
        promises = {}
        for t, (s, g) in enumerate(zip(stored, gradients, strict=True)):
            for i in range(g.numel()):
                value = s.flipped(torch.tensor([i]), torch.tensor([bit])).values().flatten()[i]
                promises[t, i] = -float(g.flatten()[i]) * float(value - s.values().flatten()[i])
        expected = sorted(promises, key=lambda place: (-promises[place], place))[:5]
        assert sorted(expected) == [(t, i) for t, i, b in places if b == bit]
        promised = [p for p, place in zip(found.promise, places, strict=True) if place.bit == bit]
        np.testing.assert_allclose(promised, [promises[p] for p in sorted(expected)], rtol=1e-4)


def test_among_equal_promises_the_lower_place_is_taken_and_made_flips_are_left_out():
    stored, gradient = StoredWeight.of(torch.ones(6, 6), "int8"), torch.full((6, 6), -1.0)
    found = best_flips([stored], [gradient], (7,), each_bit=3, without=[Place(0, 1, 7)])
    assert [place.weight for place in found.places] == [0, 2, 3]


def test_flips_to_infinity_are_left_out_or_promise_everything():
    stored, gradient = StoredWeight.of(torch.tensor([1.0, 0.5]), "float32"), torch.tensor([-1e-6, -1.0])
    assert best_flips([stored], [gradient], (30,), each_bit=2).places == (Place(0, 1, 30),)  # 1.0 becomes infinite
    found = best_flips([stored], [gradient], (30,), each_bit=1, finite=False)
    assert (found.places, found.promise.tolist()) == ((Place(0, 0, 30),), [np.inf])


def test_every_tensor_has_its_best_weights_however_little_they_promise():
    rng = np.random.default_rng(4)
    weights = [torch.from_numpy(rng.normal(size=(4, 6)).astype(np.float32)) for _ in range(3)]
    gradients = [torch.from_numpy(rng.normal(size=(4, 6)).astype(np.float32)) * 10.0**-t for t in range(3)]
    stored, made = [StoredWeight.of(w, "int8") for w in weights], Place(1, 5, 7)
    found = best_flips(stored, gradients, range(8), each_bit=0, each_tensor=2, without=[made])
    for t, (s, g) in enumerate(zip(stored, gradients, strict=True)):
        promises = {
            Place(t, i, b): -float(
                g.flatten()[i] * (s.flipped(*torch.tensor([[i], [b]])).values() - s.values()).flatten()[i]
            )
            for i in range(24)
            for b in range(8)
            if Place(t, i, b) != made
        }
        best_of_weight = [max((p for p in promises if p.weight == i), key=promises.get) for i in range(24)]
        expected = sorted(best_of_weight, key=promises.get, reverse=True)[:2]
        assert sorted(expected) == [place for place in found.places if place.tensor == t]


def test_of_flips_that_may_not_be_made_none_is_among_the_best():
    rng = np.random.default_rng(5)
    weights = [torch.from_numpy(rng.normal(size=(4, 6)).astype(np.float32)) for _ in range(2)]
    stored, gradients = [StoredWeight.of(w, "int8") for w in weights], [w.flip(0) for w in weights]
    every = [Place(t, i, b) for t in range(2) for i in range(24) for b in range(8)]
    without = {every[i] for i in rng.permutation(len(every))[:300]} | {Place(0, 3, b) for b in range(8)}
    promises = {
        p: -float(
            gradients[p.tensor].flatten()[p.weight]
            * (
                stored[p.tensor].values_flipped(torch.tensor(p.weight), torch.tensor(p.bit))
                - stored[p.tensor].values().flatten()[p.weight]
            )
        )
        for p in every
        if p not in without
    }
    found = best_flips(stored, gradients, range(1, 8), each_bit=2, each_tensor=1, without=without)
    of_bit = [sorted((p for p in promises if p.bit == b), key=promises.get)[-2:] for b in range(1, 8)]
    of_tensor = [max((p for p in promises if p.tensor == t and p.bit), key=promises.get) for t in range(2)]
    assert set(found.places) == {*of_tensor, *(p for best in of_bit for p in best)}
    names = ("a", "b")
    random = random_flips(dict(zip(names, stored, strict=True)), range(1, 8), 40, without=without, seed=0)
    assert not {Place(names.index(f.weight), f.index, f.bit) for f in random} & without


def test_random_flips_are_distinct_seeded_and_of_the_kind_asked_for():
    stored = {"a": StoredWeight.of(torch.ones(4, 5), "float16"), "b": StoredWeight.of(torch.ones(3), "float16")}
    every = random_flips(stored, (14, 15), 23, finite=True, seed=1)  # 1.0 with bit 14 set is infinite
    assert {flip.bit for flip in every} == {15}
    assert {(flip.weight, flip.index) for flip in every} == {("a", i) for i in range(20)} | {("b", i) for i in range(3)}
    assert random_flips(stored, (15,), 5, seed=1) == random_flips(stored, (15,), 5, seed=1)
    assert random_flips(stored, (15,), 5, seed=1) != random_flips(stored, (15,), 5, seed=2)
    with pytest.raises(SettingsError, match="24 random flips were asked for, and only 23 can be made"):
        random_flips(stored, (14, 15), 24, finite=True, seed=1)


# ---------------------------------------------------------------------------------------------------- the search: heads


@pytest.mark.parametrize("seed", range(6))
def test_the_first_flip_is_the_best_of_all_where_all_are_tried(seed):
    classifier = small_classifier(4, seed)
    fit, score = drawn_features(classifier, 80, seed), drawn_features(classifier, 40, seed + 100)
    weight, bias = classifier.final.weight.detach().numpy(), classifier.final.bias.detach().numpy()
    stored, heads = int8_heads_with_one_flip(weight)
    clean = fit.features @ stored.T + bias
    source = int(np.bincount(clean.argmax(axis=1)).argmax())
    target = (source + 1) % 4
    losses = [loss_of(fit.features @ h.T + bias, fit.targets, source, target, clean, 0.5) for h in heads]
    search = BitSearch("int8", each_bit=48, heats=(), most=1, share=1.0)
    names = (f"class {source}", f"class {target}")
    attack = search.find(classifier, fit, score, source=names[0], target=names[1])
    best = int(np.argmin(losses))
    start = loss_of(clean, fit.targets, source, target, clean, 0.5)
    assert losses[best] < start
    assert attack.flips == (Flip(HEAD, best // 8, best % 8),)
    assert attack.stopped in (SPENT, REACHED)
    for cheaper in (replace(search, each_bit=3), replace(search, heats=(24, 48))):
        (flip,) = cheaper.find(classifier, fit, score, source=names[0], target=names[1]).flips
        assert losses[best] <= losses[flip.index * 8 + flip.bit] < start


@pytest.mark.parametrize("seed", range(4))
def test_the_first_flip_is_the_best_of_those_that_are_not_protected(seed):
    classifier = small_classifier(4, seed)
    fit, score = drawn_features(classifier, 80, seed), drawn_features(classifier, 40, seed + 100)
    weight, bias = classifier.final.weight.detach().numpy(), classifier.final.bias.detach().numpy()
    stored, heads = int8_heads_with_one_flip(weight)
    clean = fit.features @ stored.T + bias
    source = int(np.bincount(clean.argmax(axis=1)).argmax())
    target = (source + 1) % 4
    losses = np.array([loss_of(fit.features @ h.T + bias, fit.targets, source, target, clean, 0.5) for h in heads])
    barred = {int(losses.argmin()), *np.random.default_rng(seed).permutation(256)[:100].tolist()}
    protected = frozenset(Flip(HEAD, place // 8, place % 8) for place in barred)
    search = BitSearch("int8", protected=protected, each_bit=48, heats=(), most=1, share=1.0)
    attack = search.find(classifier, fit, score, source=f"class {source}", target=f"class {target}")
    losses[list(barred)] = np.inf
    best = int(losses.argmin())
    assert losses[best] < loss_of(clean, fit.targets, source, target, clean, 0.5)
    assert attack.flips == (Flip(HEAD, best // 8, best % 8),)
    flips = {flip for draw in random_attacks(search, attack, classifier, score, seed=0) for flip in draw.flips}
    assert not flips & protected


@pytest.mark.parametrize("seed", range(3))
def test_two_flips_are_the_best_pair_where_their_gains_add_up(seed):
    """With two classes and one feature the loss falls with the margin, and margins of int8 flips add up."""
    classifier = small_classifier(2, seed)
    feature = np.random.default_rng(seed).normal(size=(1, WIDTH)).astype(np.float32)
    weight, bias = classifier.final.weight.detach().numpy(), classifier.final.bias.detach().numpy()
    stored, heads = int8_heads_with_one_flip(weight)
    source = int((feature @ stored.T + bias).argmax())
    fit = features_of(classifier, np.repeat(feature, 3, axis=0), np.full(3, source), "fit")
    score = features_of(classifier, feature, np.array([source]), "score")
    changes = heads - stored
    margins = ((changes @ feature[0]) * np.where(np.arange(2) == source, -1, 1)).sum(axis=1)
    best = max(combinations(range(len(heads)), 2), key=lambda pair: margins[pair[0]] + margins[pair[1]])
    search = BitSearch("int8", each_bit=16, most=2, share=1.1, margin=100.0)  # beyond the reach of two flips
    attack = search.find(classifier, fit, score, source=f"class {source}", target=f"class {1 - source}")
    chosen = [flip.index * 8 + flip.bit for flip in attack.flips]
    assert margins[chosen].sum() == pytest.approx(margins[list(best)].sum(), rel=1e-5)


def test_the_gradient_of_the_head_is_its_closed_form_and_due_to_those_that_lack_something():
    classifier = small_classifier(3)
    fit = drawn_features(classifier, 50, 1)
    loss = Aim.of(fit.targets, fit.logits, 0, 1).loss(0.5, 0.3)
    attacked, others = fit.targets == 0, fit.targets != 0
    wanted = np.where(attacked, 1, fit.targets)
    lacking = np.flatnonzero(hinge(fit.logits, wanted, 0.3) > 0)
    assert 0 < len(lacking) < 50
    np.testing.assert_array_equal(loss.lacking(fit.logits), lacking)
    rivals = fit.logits.copy()
    rivals[np.arange(50), wanted] = -np.inf
    towards = np.eye(3)[rivals.argmax(axis=1)] - np.eye(3)[wanted]
    weights = (attacked / attacked.sum() + 0.5 * others / others.sum())[lacking]
    expected = (towards[lacking] * weights[:, None]).T @ fit.features[lacking]
    for examples in (lacking, np.arange(50)):
        (gradient,) = runs_of(classifier, fit).gradients(loss, examples, [classifier.final.weight])
        np.testing.assert_allclose(gradient.numpy(), expected, atol=1e-6)
    assert classifier.final.weight.requires_grad  # as it was


def test_the_gradient_of_some_examples_is_that_of_the_whole_loss_where_the_others_lack_nothing():
    classifier, examples = random_classifier("bert"), random_examples(12, seed=5)
    runs = runs_of(classifier, examples)
    clean = runs.logits()
    loss = Aim.of(runs.targets, np.eye(clean.shape[1], dtype=np.float32)[runs.targets], 0, 1).loss(1.0, 0.0)
    lacking, weights = loss.lacking(clean), [p for p in classifier.module.parameters() if p.ndim >= 2]
    assert 0 < len(lacking) < 12
    with torch.inference_mode(False):
        some, whole = (runs.gradients(loss, which, weights) for which in (lacking, np.arange(12)))
    for a, b in zip(some, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_heat_sees_the_few_that_matter_and_its_loss_is_that_of_all_where_kinds_are_alike():
    classifier = small_classifier(3)
    features = np.repeat(np.random.default_rng(0).normal(size=(4, WIDTH)).astype(np.float32), [30, 2, 20, 8], axis=0)
    with torch.no_grad():
        targets = classifier.final(torch.from_numpy(features)).argmax(dim=1).numpy()
    fit = features_of(classifier, features, targets, "fit")
    source = int(targets[0])
    aimed = Aimed.of(classifier, fit, source, (source + 1) % 3)
    judge = Judge(aimed, aimed.aim.loss(1.0, 0.2))
    logits = aimed.runs.logits()
    heat = judge.heat(logits, 12)
    assert len(heat.aimed.chosen) == 12
    assert {tuple(features[i]) for i in heat.aimed.chosen} == {tuple(row) for row in features}
    assert heat.loss.value(heat.aimed.runs.logits()) == pytest.approx(judge.loss.value(logits), rel=1e-5)


@pytest.mark.parametrize("number_format", ["float32", "float16", "bfloat16", "int8"])
def test_an_attack_on_the_head_does_in_the_live_model_what_its_outcomes_say(number_format):
    classifier, examples = planted_classifier(), planted_examples(60, seed=1)
    fit, score = record(classifier, planted_examples(60, seed=2)), record(classifier, examples)
    before = classifier.weights_hash()
    # 46 of the 48 weights are 0 and promise alike, so that few candidates would hold none of unit B_UNIT
    attack = BitSearch(number_format, each_bit=16).find(classifier, fit, score, source="b", target="c")
    assert classifier.weights_hash() == before
    assert attack.stopped == REACHED
    assert attack.scoring[0] == Outcome(0, 20, 0, 40, 0)
    assert attack.after == tuple(range(len(attack.flips) + 1))
    with classifier.edited(attack):
        predicted = classifier.predict(examples).argmax(axis=1)
    assert (predicted[score.targets == 1] == 2).mean() == attack.scoring[-1].success >= 0.95
    assert (predicted != score.targets)[score.targets != 1].mean() == attack.scoring[-1].collateral <= 0.02
    assert attack.flips_for(0.95) == len(attack.flips)
    assert classifier.weights_hash() == before


def test_with_stealth_fewer_others_are_lost_and_the_search_goes_on_until_they_are_few_enough():
    classifier = small_classifier(4, 3)
    fit, score = drawn_features(classifier, 120, 3), drawn_features(classifier, 60, 30)
    source, target = (f"class {c}" for c in np.argsort(-np.bincount(fit.targets, minlength=4))[:2])
    free = BitSearch("int8", stealth=0.0, bound=1.0).find(classifier, fit, score, source=source, target=target)
    held = BitSearch("int8", stealth=4.0, bound=0.2).find(classifier, fit, score, source=source, target=target)
    assert free.stopped == REACHED
    assert held.fitting[-1].collateral < free.fitting[-1].collateral
    if held.stopped == REACHED:
        assert held.fitting[-1].success >= 0.95
        assert held.fitting[-1].collateral <= 0.2
    assert not any(now.success >= 0.95 and now.collateral <= 0.2 for now in held.fitting[:-1])


def test_flips_are_counted_up_to_where_enough_are_redirected_and_few_enough_lost():
    outcomes = (Outcome(0, 10, 0, 10, 0), Outcome(9, 10, 5, 10, 0), Outcome(8, 10, 0, 10, 0), Outcome(9, 10, 1, 10, 0))
    plain = BitFlips("int8", ("w",))
    attack = BitAttack(plain, "a", "b", "attack", (0, 1, 2, 3), (), outcomes, SPENT, "", "", "")
    assert (attack.flips_for(0.9), attack.flips_for(0.9, bound=0.1), attack.flips_for(0.95)) == (1, 3, None)


def test_a_search_without_a_target_breaks_the_classes_and_one_that_may_do_nothing_stops():
    classifier = small_classifier(3, 1)
    fit, score = drawn_features(classifier, 90, 1), drawn_features(classifier, 60, 2)
    attack = BitSearch("int8", share=0.6).find(classifier, fit, score)
    assert attack.stopped == REACHED
    assert attack.scoring[0].success == 0
    assert attack.scoring[-1].success > 0.3
    assert np.isnan(attack.scoring[-1].collateral)  # nobody was to be spared
    nothing = np.zeros((5, WIDTH), dtype=np.float32)  # of which no weight makes anything
    says = int(classifier.final.bias.argmax())
    empty = [features_of(classifier, nothing, np.full(5, says), name) for name in ("fit", "score")]
    idle = BitSearch("int8").find(classifier, *empty, source=f"class {says}", target=f"class {(says + 1) % 3}")
    assert (idle.stopped, idle.flips) == (STUCK, ())


# ---------------------------------------------------------------------------------------------- the search: live models


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_a_trial_that_starts_at_its_block_gives_the_logits_of_the_whole_model(architecture):
    classifier, examples = random_classifier(architecture), random_examples(12, seed=5)
    runs = runs_of(classifier, examples, keeps=True)
    with torch.inference_mode(False):
        runs.logits()
        for name, weight in classifier.module.named_parameters():
            if weight.ndim >= 2:
                with torch.no_grad():
                    weight[1, 1] += 2.0
                trial = runs.logits_with(name)
                np.testing.assert_allclose(trial, classifier.predict(examples), rtol=1e-3, atol=1e-3)
                with torch.no_grad():
                    weight[1, 1] -= 2.0
    assert isinstance(runs, LiveRuns)
    assert not any(runs._whole.values())
    assert len(runs._whole) >= 5


def test_trials_that_do_not_agree_with_the_whole_model_are_run_whole(monkeypatch):
    classifier, examples = random_classifier("bert"), random_examples(6, seed=5)
    runs = runs_of(classifier, examples, keeps=True)
    clean = runs.logits()
    resumed = LiveRuns._resumed
    monkeypatch.setattr(LiveRuns, "_resumed", lambda self, clean, layer: resumed(self, clean, layer) + 1)
    np.testing.assert_allclose(runs.logits_with("classifier.weight"), clean, atol=1e-5)


def test_the_whole_model_is_searched_by_the_gradient_and_comes_back():
    classifier = planted_classifier()
    fit, score = planted_examples(45, seed=2), planted_examples(60, seed=1)
    before, flags = classifier.weights_hash(), [p.requires_grad for p in classifier.module.parameters()]
    attack = BitSearch("int8", each_bit=2).find(classifier, fit, score, source="b", target="a")
    assert attack.stopped == REACHED
    assert attack.scoring[-1].success >= 0.95
    assert attack.scoring[-1].collateral <= 0.05
    assert set(attack.perturbation.weights) == {"embedding.weight", "blocks.0.mix.weight", "blocks.1.mix.weight", HEAD}
    with classifier.edited(attack):
        predicted = classifier.predict(score).argmax(axis=1)
    assert (predicted == 0)[np.array(score.labels) == "b"].mean() == attack.scoring[-1].success
    assert classifier.weights_hash() == before
    assert [p.requires_grad for p in classifier.module.parameters()] == flags


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, MemoryError])
def test_the_weights_come_back_where_the_search_breaks_off(error):
    classifier = planted_classifier()
    before, fit, score = classifier.weights_hash(), planted_examples(30, seed=2), planted_examples(30, seed=1)

    def stop(done, total):
        raise error

    with pytest.raises(error):
        BitSearch("float16", share=1.1).find(classifier, fit, score, source="b", target="c", progress=stop)
    assert classifier.weights_hash() == before


def test_logits_that_are_no_numbers_are_counted():
    logits = np.array([[2, 1, 0], [np.nan, 1, 0], [0, np.inf, 0], [0, 0, 1]], dtype=np.float32)
    targets = np.array([0, 0, 1, 2])
    aim = Aim.of(targets, np.eye(3, dtype=np.float32)[targets], 0, None)
    assert aim.outcome(logits) == Outcome(redirected=1, attacked=2, lost=1, others=2, nonfinite=2)
    towards = replace(aim, target=1)
    assert towards.outcome(logits) == Outcome(redirected=0, attacked=2, lost=1, others=2, nonfinite=2)
    assert towards.loss(1.0, 1.0).value(logits) == np.inf
    assert Aim.of(targets, np.eye(3, dtype=np.float32)[targets], None, None).loss(1.0, 1.0).value(logits) == -np.inf


# ------------------------------------------------------------------------------------------------ controls, and keeping


def test_random_flips_of_equal_number_are_scored_beside_the_attack():
    classifier = planted_classifier()
    fit, score = record(classifier, planted_examples(60, seed=2)), record(classifier, planted_examples(60, seed=1))
    before, search = classifier.weights_hash(), BitSearch("int8")
    attack = search.find(classifier, fit, score, source="b", target="c")
    draws = random_attacks(search, attack, classifier, score, seed=3)
    assert len(draws) == 10
    assert len({draw.flips for draw in draws}) == 10
    assert {(draw.arm, len(draw.flips), draw.scoring[0]) for draw in draws} == {
        ("random", len(attack.flips), attack.scoring[0])
    }
    assert np.mean([draw.scoring[-1].success for draw in draws]) < attack.scoring[-1].success
    changed = []
    for draw in draws:
        with classifier.edited(draw):
            changed.append(classifier.weights_hash() != before)
    assert any(changed)  # what stands in a row of zeros stays zero
    assert classifier.weights_hash() == before
    assert random_attacks(search, attack, classifier, score, seed=3, draws=2) == draws[:2]


def test_an_attack_is_kept_read_and_applied_and_a_changed_file_is_refused(tmp_path):
    classifier = planted_classifier()
    fit, score = record(classifier, planted_examples(60, seed=2)), record(classifier, planted_examples(60, seed=1))
    attack = BitSearch("int8").find(classifier, fit, score, source="b", target="c")
    attack.save(tmp_path / "attack")
    assert sorted(path.name for path in (tmp_path / "attack").iterdir()) == [
        *("attack.json", "checksums.json", "flips.safetensors")
    ]
    loaded = BitAttack.load(tmp_path / "attack")
    assert loaded == attack
    told = json.loads((tmp_path / "attack" / "attack.json").read_text())
    assert (told["source"], told["target"], told["number_format"]) == ("b", "c", "int8")
    assert told["examples"] == planted_examples(60, seed=1).fingerprint
    with torch.no_grad():
        classifier.module.head.weight[0, 0] += 1
    with (
        pytest.raises(SettingsError, match="found for other weights than those of 'planted'"),
        loaded.applied(classifier),
    ):
        pass
    (tmp_path / "attack" / "attack.json").write_text(json.dumps(told | {"target": "a"}))
    with pytest.raises(RunFolderError, match="is no whole attack: attack.json has"):
        BitAttack.load(tmp_path / "attack")


def test_flips_that_do_otherwise_than_they_say_are_named():
    classifier, fit, score = planted_classifier(), planted_examples(60, seed=2), planted_examples(61, seed=1)
    attack = BitSearch().find(classifier, fit, score, source="b", target="a")
    before, truth = classifier.weights_hash(), attack.scoring[-1]
    assert attack.checked(classifier, score) == []
    wrong = replace(attack, scoring=(*attack.scoring[:-1], replace(truth, lost=truth.lost + 7)))
    assert wrong.checked(classifier, score) == [
        f"b -> a: {truth.redirected} of {truth.attacked} redirected and {truth.lost + 7} of {truth.others} others lost "
        f"were stated, {truth.redirected} of {truth.attacked} redirected and {truth.lost} of {truth.others} others "
        "lost were found"
    ]
    assert classifier.weights_hash() == before


@pytest.mark.parametrize("recorded", [False, True])
def test_flips_are_checked_on_the_examples_the_weights_and_the_classes_that_they_were_scored_on(recorded, tmp_path):
    classifier, fit, score = planted_classifier(), planted_examples(60, seed=2), planted_examples(61, seed=1)
    splits = [record(classifier, split) for split in (fit, score)] if recorded else [fit, score]
    BitSearch(weights=(HEAD,)).find(classifier, *splits, source="b", target="a").save(tmp_path / "flips")
    attack = BitAttack.load(tmp_path / "flips")
    assert attack.checked(classifier, score) == []
    stated, given = score.fingerprint[:12], fit.fingerprint[:12]
    with pytest.raises(SettingsError) as refused:
        attack.checked(classifier, fit)
    assert str(refused.value) == (
        f"What these flips do is stated for examples with the fingerprint {stated}; that of planted-2 is {given}. Give "
        "the examples that they were scored on."
    )
    with pytest.raises(SettingsError, match="about the class 'd'; the classes of 'planted' are a, b, c"):
        replace(attack, target="d").checked(classifier, score)
    with torch.no_grad():
        classifier.module.head.weight[0, 0] += 1
    with pytest.raises(SettingsError, match="found for other weights than those of 'planted'"):
        attack.checked(classifier, score)


def test_what_cannot_be_attacked_is_refused():
    classifier = planted_classifier()
    fit, score = planted_examples(30, seed=2), planted_examples(30, seed=1)
    search = BitSearch("int8")
    with pytest.raises(SplitError, match="scored on the examples that they are fitted to"):
        search.find(classifier, fit, fit, source="b", target="c")
    with pytest.raises(SettingsError, match="There is no class 'd'; the classes are a, b, c."):
        search.find(classifier, fit, score, source="b", target="d")
    with pytest.raises(SettingsError, match="Source and target are both 'b'"):
        search.find(classifier, fit, score, source="b", target="b")
    with pytest.raises(SettingsError, match="One split is activations and the other examples"):
        search.find(classifier, record(classifier, fit), score, source="b", target="c")
    with pytest.raises(SettingsError, match="blocks.0.mix.weight does not act on recorded features"):
        BitSearch(weights=("blocks.*",)).find(
            classifier, record(classifier, fit), record(classifier, score), source="b", target="c"
        )
    for flip in (Flip("mine", 0, 0), Flip(HEAD, 48, 0), Flip(HEAD, 0, 8)):
        with pytest.raises(SettingsError, match=f"Bit {flip.bit} of weight {flip.index} in '{flip.weight}' was to be"):
            BitSearch(weights=(HEAD,), protected=frozenset([flip])).find(classifier, fit, score, source="b", target="c")
    with pytest.raises(SettingsError, match="positions from 0 to 7 of int8 were expected"):
        BitSearch(bits=(8,)).find(classifier, fit, score, source="b", target="c")
    only_a = Examples(fit.inputs, ("a",) * len(fit), "all a")
    with pytest.raises(SettingsError, match="No fitting example of b can be redirected to c"):
        search.find(classifier, only_a, score, source="b", target="c")
    assert classifier.labels == LABELS


def test_one_bit_of_a_real_head_redirects_a_class_in_float16_and_in_int8_it_takes_many(shared):
    classifier = Classifier.from_pretrained(shared / "models" / "tiny-splice", device="cpu")
    train, test = (read_examples(shared / "data" / "splice" / f"{part}.csv") for part in ("train", "test"))
    fit, score = record(classifier, train.take(range(150))), record(classifier, test.take(range(150)))
    before = classifier.weights_hash()
    search = BitSearch("float16", bound=0.05)
    attack = search.find(classifier, fit, score, source="exon-intron", target="neither")
    draws = random_attacks(search, attack, classifier, score, seed=0)
    assert len(attack.flips) == 1
    assert attack.scoring[-1].attacked > 20
    assert attack.scoring[-1].success > 0.9
    # one bit in 16 is the highest of the exponent, so that a random flip in many does as much
    assert np.mean([draw.scoring[-1].success for draw in draws]) < 0.5
    many = BitSearch("int8", bound=0.05, most=12).find(classifier, fit, score, source="exon-intron", target="neither")
    assert many.stopped == SPENT
    assert many.fitting[-1].success < 0.95
    assert classifier.weights_hash() == before
