"""Edits of the readout state: closed forms, general solvers, autograd, and the live model with its hooks."""

import numpy as np
import pytest
import torch
from planted import (
    B_UNIT,
    C_UNIT,
    planted_classifier,
    planted_examples,
    random_classifier,
    random_examples,
)
from scipy.optimize import linprog, minimize

import synapse.attack.activation as module
import synapse.attack.readout as readout
from synapse.attack.activation import ranked_edits, smallest_edits
from synapse.attack.affine import affine_edits
from synapse.attack.directions import direction_attacks, steering_directions, universal_directions
from synapse.data.reading import read_examples
from synapse.errors import SettingsError
from synapse.model.classifier import Classifier
from synapse.perturb.activations import Steer
from synapse.recording import record
from synapse.types import Attacks, Neurons

RNG = np.random.default_rng(11)

# --------------------------------------------------------------------------------------------------- the affine problem


@pytest.mark.parametrize("target", [None, 1])
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_the_closed_form_is_what_general_solvers_find(norm, target):
    logits, slopes = RNG.normal(size=(20, 4)), RNG.normal(size=(20, 4, 3))
    predicted = logits.argmax(axis=1)
    edits = affine_edits(logits, slopes, predicted, target, norm)
    for z, w, y, edit in zip(logits, slopes, predicted, edits, strict=True):
        if y == target:
            continue
        goals = [[(c, y)] for c in range(4) if c != y] if target is None else [[(1, c) for c in (0, 2, 3)]]
        sizes = [general(z, w, goal, norm) for goal in goals]
        assert np.linalg.norm(edit, 2 if norm == "l2" else np.inf) == pytest.approx(min(sizes), rel=1e-4)
        moved = z + w @ edit
        rivals = np.delete(moved, y) if target is None else moved
        assert (rivals.max() if target is None else moved[target]) == pytest.approx(moved.max())  # a tie
        less = (z + w @ edit * 0.999).argmax()
        assert less == y if target is None else less != target


def general(z, w, overtakes, norm):
    """Return the size of the smallest edit with z_a + w_a d >= z_b + w_b d for all pairs, or infinity."""
    lead = np.array([w[a] - w[b] for a, b in overtakes])
    gap = np.array([z[b] - z[a] for a, b in overtakes])
    if norm == "linf":  # min t, -t <= d <= t
        box = np.block([[np.eye(3), -np.ones((3, 1))], [-np.eye(3), -np.ones((3, 1))]])
        rows = np.vstack([np.column_stack([-lead, np.zeros(len(lead))]), box])
        found = linprog([0, 0, 0, 1], rows, [*-gap, *np.zeros(6)], bounds=[(None, None)] * 3 + [(0, None)])
        return found.fun if found.status == 0 else np.inf
    constraint = {"type": "ineq", "fun": lambda d: lead @ d - gap, "jac": lambda d: lead}
    found = minimize(lambda d: d @ d, np.zeros(3), jac=lambda d: 2 * d, constraints=[constraint], tol=1e-14)
    return np.linalg.norm(found.x) if found.success else np.inf


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_a_class_that_can_never_be_overtaken_has_no_edit(norm):
    slopes = np.zeros((1, 3, 2))
    slopes[0, 2] = 1.0
    logits = np.array([[5.0, 1.0, 0.0]])
    assert np.isnan(affine_edits(logits, slopes, np.array([0]), 1, norm)).all()  # 1 moves with 0
    assert np.isfinite(affine_edits(logits, slopes, np.array([0]), 2, norm)).all()
    assert np.isnan(affine_edits(logits, np.zeros((1, 3, 2)), np.array([0]), None, norm)).all()


# --------------------------------------------------------------------------------------------------- at the linear head


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_at_the_last_site_the_edit_is_the_gap_over_the_dual_norm(norm):
    classifier, examples = planted_classifier(), planted_examples(30, seed=1)
    found = smallest_edits(classifier, examples, layer=1, norm=norm)
    assert found.exact
    assert (found.needed == smallest_edits(classifier, examples, layer=0, component="pooler", norm=norm).needed).all()
    weight, z = classifier.head_weight().numpy().astype(float), classifier.predict(examples).astype(float)
    for i, y in enumerate(z.argmax(axis=1)):
        sizes = [
            (z[i, y] - z[i, c]) / np.linalg.norm(weight[y] - weight[c], 2 if norm == "l2" else 1)
            for c in range(3)
            if c != y
        ]
        assert found.needed[i] * found.scale == pytest.approx(min(sizes), rel=1e-5)
    assert (found.random >= found.needed * (1 - 1e-9)).all()
    assert (found.reached != found.predicted).all()


@pytest.mark.parametrize("target", ["", "c"])
def test_the_edits_change_the_live_model_and_a_little_less_does_not(target):
    classifier, examples = planted_classifier(), planted_examples(12, seed=1)
    before = classifier.weights_hash()
    found = smallest_edits(classifier, examples, layer=1, target=target)
    assert live_predictions(classifier, examples, found, 1.001) == found.reached.tolist()
    less = live_predictions(classifier, examples, found, 0.999)
    assert less == found.predicted.tolist()
    if target:
        assert (found.reached == 2).all()
        assert (found.needed[found.predicted == 2] == 0).all()
    assert classifier.weights_hash() == before


def live_predictions(classifier, examples, found, factor):
    """What plain hooks on the whole model say, one example at a time."""
    whole = tuple(range(found.edits.shape[1]))
    neurons, predictions = Neurons(found.neurons.layer, whole, found.neurons.component), []
    for i, edit in enumerate(found.edits):
        with classifier.edited(Steer(neurons, strength=factor, vector=tuple(edit.tolist()))):
            predictions.append(int(classifier.predict(examples.take([i])).argmax()))
    return predictions


def test_only_the_neurons_that_may_be_are_edited():
    classifier, examples = planted_classifier(), planted_examples(12, seed=1)
    found = smallest_edits(classifier, examples, layer=1, units=(C_UNIT, 0))
    assert set(np.flatnonzero(found.edits.any(axis=0))) == {C_UNIT}
    useless = smallest_edits(classifier, examples, layer=1, units=(0, 1))  # the head does not read them
    assert np.isinf(useless.needed).all()
    assert (useless.edits == 0).all()
    assert np.isinf(useless.random).all()
    assert (useless.reached == useless.predicted).all()


# ------------------------------------------------------------------------------------------------------- below the head


def test_below_a_linear_block_the_search_finds_the_closed_form():
    # the second block of the planted model adds 1e-3 times other rows, so that the map from the first is linear too
    classifier, examples = planted_classifier(), planted_examples(12, seed=1)
    below = smallest_edits(classifier, examples, layer=0, draws=2)
    last = smallest_edits(classifier, examples, layer=1, draws=2)
    assert not below.exact
    np.testing.assert_allclose(below.needed * below.scale, last.needed * last.scale, rtol=1e-2)
    assert (below.random >= below.needed * 0.99).all()


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_in_a_transformer_found_edits_hold_in_the_live_model_and_their_rays_begin_there(architecture, norm):
    classifier, examples = random_classifier(architecture), random_examples(6, seed=1)
    before = classifier.weights_hash()
    for layer in range(3):
        found = smallest_edits(classifier, examples, layer=layer, norm=norm, draws=1, steps=6)
        assert np.isfinite(found.needed).all()
        assert live_predictions(classifier, examples, found, 1.002) == found.reached.tolist()
        assert live_predictions(classifier, examples, found, 0.99) == found.predicted.tolist()
    assert classifier.weights_hash() == before


def test_no_edit_on_a_fine_grid_of_two_neurons_is_much_smaller_than_the_one_found():
    classifier, examples = random_classifier("bert"), random_examples(3, seed=4)
    found = smallest_edits(classifier, examples, layer=1, units=(3, 8), draws=0)
    angles = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    for i in np.flatnonzero(np.isfinite(found.needed)):
        for angle in angles:
            vector = 0.9 * found.needed[i] * found.scale * np.array([np.cos(angle), np.sin(angle)])
            with classifier.edited(Steer(Neurons(1, (3, 8)), strength=1.0, vector=tuple(vector.tolist()))):
                assert classifier.predict(examples.take([i])).argmax() == found.predicted[i]


@pytest.mark.parametrize("layer", [0, 1])
def test_the_edits_are_no_longer_than_those_of_a_plain_deepfool(layer):
    classifier, examples = random_classifier("bert"), random_examples(6, seed=5)
    found = smallest_edits(classifier, examples, layer=layer, draws=0)
    lengths = []
    for i in range(len(examples)):
        (batch,) = classifier.batches(examples.take([i]).inputs)
        lengths.append(deepfool_length(classifier, batch.inputs, classifier.sites()[layer]))
    assert (found.needed * found.scale <= np.array(lengths) * 1.001).all()


def deepfool_length(classifier, inputs, site):
    """Moosavi-Dezfooli et al. (2016), algorithm 2: onto the nearest plane, again and again, until the class changes."""
    total, own = torch.zeros(site.width), None
    for _ in range(50):
        given = total.clone().requires_grad_()
        z = hooked_logits(classifier, inputs, site, given)[0]
        own = int(z.argmax()) if own is None else own
        if int(z.argmax()) != own:
            break
        steps = []
        for rival in set(range(3)) - {own}:
            (w,) = torch.autograd.grad(z[rival] - z[own], given, retain_graph=True)
            steps.append(w * (z[own] - z[rival]).detach() / w.square().sum())
        total = total + 1.02 * min(steps, key=torch.norm)
    return float(total.norm())


def test_calls_that_share_what_they_found_out_try_it_once(monkeypatch):
    classifier, examples = random_classifier("bert"), random_examples(4, seed=1)
    tried, proved = [], readout.ReadoutMap._proved
    monkeypatch.setattr(readout.ReadoutMap, "_proved", lambda self: tried.append(self.layer) or proved(self))
    reuse = {}
    for _ in range(2):
        smallest_edits(classifier, examples, layer=1, draws=0, steps=1, reuse=reuse)
        ranked_edits(classifier, examples, np.zeros(4, int), np.arange(32), (3,), layer=1, steps=1, reuse=reuse)
    assert (tried, reuse) == ([1], {1: "rows"})


@pytest.mark.parametrize(("layer", "component"), [(0, "residual"), (1, "residual"), (1, "mlp")])
def test_logits_and_slopes_are_those_of_plain_autograd_whatever_is_taken_over(layer, component):
    classifier, examples = random_classifier("bert"), random_examples(4, seed=1)
    (batch,) = classifier.batches(examples.inputs)
    reuse, site = {}, classifier.sites(component)[layer]
    with classifier.studied():
        state = readout.ReadoutMap(classifier, batch, component, layer, reuse)
        example, own = np.array([0, 3, 1, 1, 2]), np.array([0, 1, 2, 0, 1])
        offset = RNG.normal(size=(5, site.width)) * 0.1
        rivals = np.array([[1, 2], [2, 0], [0, 1], [2, 1], [2, 0]])
        logits, slopes = state.linearised(offset, example, own, rivals)
        np.testing.assert_allclose(state.logits(offset, example), logits, rtol=1e-4, atol=1e-4)
    assert reuse == {layer: "rows"}
    for run, (i, reference) in enumerate(zip(example, own, strict=True)):
        given = torch.tensor(offset[run], dtype=torch.float32, requires_grad=True)
        z = hooked_logits(classifier, {name: value[[i]] for name, value in batch.inputs.items()}, site, given)[0]
        np.testing.assert_allclose(logits[run], z.detach().numpy(), rtol=1e-4, atol=1e-4)
        for rival, slope in zip(rivals[run], slopes[run], strict=True):
            (gradient,) = torch.autograd.grad(z[rival] - z[reference], given, retain_graph=True)
            np.testing.assert_allclose(slope, gradient.numpy(), rtol=1e-3, atol=1e-5)


def hooked_logits(classifier, inputs, site, offset):
    """What the whole model gives when plain hooks add an offset to row 0 of a block's output, or of a map's input."""
    place = classifier.module.get_submodule(site.module)

    def add(states):
        return torch.cat([states[:, :1] + offset, states[:, 1:]], dim=1)

    def behind(_module, _arguments, output):
        return (add(output[0]), *output[1:]) if isinstance(output, tuple) else add(output)

    def ahead(_module, arguments):
        return (add(arguments[0]), *arguments[1:])

    register = place.register_forward_hook if site.side == "output" else place.register_forward_pre_hook
    hook = register(behind if site.side == "output" else ahead)
    logits = classifier.module(**inputs).logits
    hook.remove()
    return logits


def test_a_model_that_cannot_be_resumed_is_run_whole_and_says_so(monkeypatch, caplog):
    classifier, examples = random_classifier("bert"), random_examples(3, seed=1)
    right = smallest_edits(classifier, examples, layer=0, draws=0, steps=3)

    def broken(*_):
        raise RuntimeError("no rows")

    monkeypatch.setattr(readout, "passed_over", broken)
    plain = smallest_edits(classifier, examples, layer=0, draws=0, steps=3)
    np.testing.assert_allclose(plain.needed, right.needed, rtol=1e-2)
    assert "the whole model is run for each edit, which is slow (RuntimeError: no rows)" in caplog.text


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_the_model_comes_back_after_an_error_in_the_middle(monkeypatch, error):
    classifier, examples = random_classifier("bert"), random_examples(4, seed=1)
    before, clean = classifier.weights_hash(), classifier.predict(examples)

    def failing(*_):
        raise error

    monkeypatch.setattr(module, "affine_edits", failing)
    with pytest.raises(error):
        smallest_edits(classifier, examples, layer=0)
    assert classifier.weights_hash() == before
    assert (classifier.predict(examples) == clean).all()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in classifier.module.modules())
    assert not any(p.grad is not None for p in classifier.module.parameters())


# ---------------------------------------------------------------------------------------------------------- one for all


def test_the_steering_direction_is_the_difference_of_means_and_its_budget_is_exact_at_the_head():
    classifier, examples = planted_classifier(), planted_examples(30, seed=1)
    train, test = record(classifier, planted_examples(30, seed=2)), record(classifier, examples)
    directions = steering_directions(train, 1)
    means = [train.values[1][train.targets == label].astype(float).mean(axis=0) for label in range(3)]
    np.testing.assert_allclose(directions[1, 2], means[2] - means[1])
    found = direction_attacks(classifier, examples, test, {"steering": {(1, 2): directions[1, 2]}}, layer=1)
    attack, control = found
    assert (attack.source, attack.target, attack.arm, attack.location) == ("b", "c", "attack", "residual 1")
    assert control.needed.shape == (10, len(attack.examples))
    scale = np.linalg.norm(test.values[1].astype(float), axis=1).mean() / np.linalg.norm(directions[1, 2])
    vector = tuple((directions[1, 2] * scale).tolist())
    for position in (0, 4):
        i = attack.examples[[position]]
        for factor, label in ((1.001, 2), (0.999, 1)):
            steer = Steer(Neurons(1, tuple(range(16))), strength=attack.needed[0, position] * factor, vector=vector)
            with classifier.edited(steer):
                assert (classifier.predict(examples.take(i)).argmax() == 2) == (label == 2)
    assert np.median(control.needed) > np.median(attack.needed)


def test_below_the_head_the_budgets_are_the_first_of_the_grid_in_the_live_model():
    classifier, examples = random_classifier("bert"), random_examples(9, seed=1)
    test, grid = record(classifier, examples), (0.1, 0.4, 1.6, 6.4)
    vector = RNG.normal(size=32)
    scale = np.linalg.norm(test.values[0].astype(float), axis=1).mean() / np.linalg.norm(vector)
    attack, _ = direction_attacks(classifier, examples, test, {"steering": {(None, 1): vector}}, layer=0, grid=grid)
    expected = np.full(len(attack.examples), np.inf)
    for budget in reversed(grid):
        steer = Steer(Neurons(0, tuple(range(32))), strength=budget, vector=tuple((vector * scale).tolist()))
        with classifier.edited(steer):
            expected[classifier.predict(examples)[attack.examples].argmax(axis=1) == 1] = budget
    assert (attack.needed[0] == expected).all()


def test_a_universal_direction_lies_in_the_planted_neurons_and_works_on_new_examples():
    classifier, examples = planted_classifier(), planted_examples(30, seed=1)
    directions = universal_directions(classifier, planted_examples(30, seed=2), layer=1)
    towards_c = directions[None, 2]
    assert set(np.flatnonzero(np.abs(towards_c) > 1e-9)) == {B_UNIT, C_UNIT}
    test = record(classifier, examples)
    found = direction_attacks(classifier, examples, test, {"universal": directions}, layer=1)
    for attack, control in zip(found[::2], found[1::2], strict=True):
        if attack.target != "a":
            assert np.isfinite(attack.needed).all()
            assert np.median(attack.needed) < np.quantile(control.needed, 0.5, method="inverted_cdf") / 2


def test_the_planted_neurons_need_smaller_edits_than_random_ones():
    classifier, examples = planted_classifier(), planted_examples(12, seed=1)
    test = record(classifier, examples)
    order = np.array([B_UNIT, C_UNIT, *(unit for unit in range(16) if unit not in (B_UNIT, C_UNIT))])
    found = ranked_edits(classifier, examples, test.targets, order, (2,), layer=1)
    top, random = found[:2]
    assert (top.arm, random.arm, top.location) == ("attack", "random", "residual 1, 2 of 16 neurons")
    assert np.isfinite(top.needed).all()
    assert random.needed.shape == (10, len(top.examples))
    assert np.isinf(random.needed).mean() > 0.5


def test_results_hang_together_as_redirections_for_a_table():
    from synapse.measure.attacks import attack_table

    classifier, examples = planted_classifier(), planted_examples(30, seed=1)
    test = record(classifier, examples)
    found = smallest_edits(classifier, examples, layer=1, target="c").redirections(test.targets)
    assert [(one.source, one.arm) for one in found if one.arm == "attack"] == [(s, "attack") for s in ("", "a", "b")]
    table = attack_table(Attacks(found), test, seed=0)
    half = table[(table["measure"] == "d50") & (table["source"] == "b")].set_index("arm")["value"]
    assert np.isnan(half["random"]) or half["attack"] < half["random"]


def test_edits_depend_on_the_example_and_not_on_its_neighbours():
    classifier, examples = random_classifier("bert"), random_examples(5, seed=1)
    together = smallest_edits(classifier, examples, layer=1, draws=1, steps=4)
    alone = smallest_edits(classifier, examples.take([3]), layer=1, draws=1, steps=4)
    assert alone.needed[0] * alone.scale == pytest.approx(together.needed[3] * together.scale, rel=0.01)
    assert alone.random[0, 0] * alone.scale == pytest.approx(together.random[0, 3] * together.scale, rel=0.1)


def test_what_cannot_be_is_refused():
    classifier, examples = planted_classifier(), planted_examples(3, seed=1)
    for options, message in (
        ({"layer": 2}, "Layer 2 was asked for; the classifier has the layers 0 to 1 of 'residual'"),
        ({"layer": 0, "target": "d"}, "There is no class 'd'; the classes are a, b, c"),
        ({"layer": 0, "units": ()}, r"The units are \[\]; one or more distinct ones from 0 to 15 were expected"),
        ({"layer": 0, "units": (1, 1)}, r"The units are \[1, 1\]"),
        ({"layer": 0, "units": (16,)}, r"The units are \[16\]"),
    ):
        with pytest.raises(SettingsError, match=message):
            smallest_edits(classifier, examples, **options)


def test_one_class_alone_has_no_pairs_to_steer_between():
    train = record(planted_classifier(), planted_examples(30, seed=2))
    assert steering_directions(train.take(np.flatnonzero(train.targets == 1)), 1) == {}


def test_a_real_model_is_moved_by_less_the_nearer_the_head(shared):
    classifier = Classifier.from_pretrained(shared / "models" / "tiny-http", device="cpu")
    examples = read_examples(shared / "data" / "http_attacks" / "test.csv").take(np.arange(12))
    before = classifier.weights_hash()
    last = classifier.n_layers - 1
    found = smallest_edits(classifier, examples, layer=last, draws=3, steps=5)
    assert np.isfinite(found.needed).all()
    assert live_predictions(classifier, examples, found, 1.003) == found.reached.tolist()
    assert (np.median(found.random, axis=0) > 2 * found.needed).mean() > 0.8
    assert classifier.weights_hash() == before
