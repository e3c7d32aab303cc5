"""Weights of a place that are changed ever more: plain loops over saved copies, torch's own gradients, closed forms."""

import numpy as np
import pytest
import torch
from planted import planted_classifier, planted_examples, random_classifier, random_examples

import synapse.attack.trials as module
from synapse.attack.adversarial import adversarial_steps, adversarial_weights
from synapse.attack.damage import pruning, random_flips
from synapse.attack.noise import noise_cost, weight_noise
from synapse.attack.trials import Strengths, WeightTrials
from synapse.errors import ModelError
from synapse.perturb.weights import HEAD, Pruning, WeightStep, places, weights_at


def plain_logits(classifier, examples, change):
    """What the whole model says where the changed weights are written into a copy of its state."""
    saved = {name: value.clone() for name, value in classifier.module.state_dict().items()}
    with torch.no_grad():
        weights = weights_at(classifier, change.place)
        for name, value in change.changed({name: weight.detach().clone() for name, weight in weights.items()}).items():
            weights[name].copy_(value)
    logits = np.concatenate([classifier.predict(examples.take([i])) for i in range(len(examples))])
    classifier.module.load_state_dict(saved)
    return logits


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_a_curve_is_what_the_whole_model_says_of_every_change(architecture):
    classifier, examples = random_classifier(architecture), random_examples(7, seed=1)
    before, trials = classifier.weights_hash(), WeightTrials(classifier, examples)
    for place in places(classifier):
        for strengths in (
            pruning(place, "largest", (0.2, 0.6)),
            pruning(place, "random", (0.2, 0.6), draws=2, seed=1),
            random_flips(place, "sign", (20_000.0,), draws=2, seed=0),
        ):
            curve = trials.curve(strengths)
            assert (curve.location, curve.unit) == (place, strengths.unit)
            for b, draws in enumerate(strengths.changes):
                for d, change in enumerate(draws):
                    expected = plain_logits(classifier, examples, change)
                    np.testing.assert_allclose(curve.logits[b, d], expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(curve.clean, classifier.predict(examples), rtol=1e-4, atol=1e-5)
    assert curve.targets.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert classifier.weights_hash() == before


def test_logits_that_leave_the_numbers_are_an_outcome():
    classifier, examples = random_classifier("bert"), random_examples(5, seed=1)
    before = classifier.weights_hash()
    curve = WeightTrials(classifier, examples).curve(random_flips("block 0", "exponent", (1e5,), draws=3, seed=0))
    assert not np.isfinite(curve.logits).all()
    assert classifier.weights_hash() == before


def test_many_batches_are_held_a_few_at_a_time_and_say_the_same(monkeypatch):
    classifier, examples = random_classifier("bert"), random_examples(9, seed=1)
    strengths = pruning("block 1", "random", (0.5,), draws=2)
    together = WeightTrials(classifier, examples).curve(strengths)
    classifier.max_tokens = 16
    monkeypatch.setattr(module, "BATCHES_AT_ONCE", 2)
    trials = WeightTrials(classifier, examples)
    apart = trials.curve(strengths)
    np.testing.assert_allclose(apart.logits, together.logits, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(apart.clean, together.clean, rtol=1e-4, atol=1e-4)
    step = WeightStep("block 1", 0.1, {})
    whole = WeightTrials(random_classifier("bert"), examples).gradients(step)
    for name, gradient in trials.gradients(step).items():
        torch.testing.assert_close(gradient, whole[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("target", ["", "c"])
@pytest.mark.parametrize("place", ["block 0", "block 2", HEAD])
def test_the_gradient_is_that_of_torch_on_the_changed_model(place, target):
    classifier, examples = random_classifier("bert"), random_examples(6, seed=1)
    change = Pruning(place, 0.2)
    found = WeightTrials(classifier, examples).gradients(change, target)
    weights = weights_at(classifier, place)
    with classifier.edited(change):
        loss = 0.0
        for i, label in enumerate(examples.targets(classifier.labels)):
            if target and label == 2:
                continue
            (batch,) = classifier.batches(examples.take([i]).inputs)
            logits = classifier.module(**batch.inputs).logits[0].log_softmax(dim=0)
            loss = loss + (logits[2] if target else -logits[label])
        gradients = torch.autograd.grad(loss, list(weights.values()))
    for expected, gradient in zip(gradients, found.values(), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4)


def test_frozen_weights_stay_frozen_and_a_model_without_gradients_says_so(monkeypatch):
    classifier, examples = random_classifier("bert"), random_examples(3, seed=1)
    classifier.module.requires_grad_(False)
    trials = WeightTrials(classifier, examples)
    assert all(gradient.any() for gradient in trials.gradients(WeightStep(HEAD, 0.1, {})).values())
    assert not any(weight.requires_grad for weight in classifier.module.parameters())
    forward = module.forward_logits
    monkeypatch.setattr(module, "forward_logits", lambda *args: forward(*args).detach())
    with pytest.raises(ModelError, match="The logits have no gradient by the weights"):
        trials.gradients(WeightStep(HEAD, 0.1, {}))


# ---------------------------------------------------------------------------------------------------------- adversarial


def test_one_step_goes_straight_up_the_gradient_and_more_steps_raise_the_loss_more():
    classifier, examples = random_classifier("bert"), random_examples(9, seed=2)
    trials = WeightTrials(classifier, examples)
    (one,) = adversarial_steps(trials, "block 1", (0.1,), steps=1)
    for name, gradient in trials.gradients(WeightStep("block 1", 0.1, {})).items():
        torch.testing.assert_close(one.directions[name], gradient / gradient.norm())

    def loss(change):
        with classifier.edited(change):
            logits = torch.from_numpy(classifier.predict(examples))
        return float(torch.nn.functional.cross_entropy(logits, torch.from_numpy(examples.targets(classifier.labels))))

    (more,) = adversarial_steps(trials, "block 1", (0.1,), steps=4)
    assert loss(more) > loss(one) > loss(WeightStep("block 1", 0.1, {}))


def test_at_the_planted_head_it_needs_less_than_noise_and_works_on_other_examples():
    classifier, train, test = planted_classifier(), planted_examples(30, seed=2), planted_examples(30, seed=1)
    before, fit, score = classifier.weights_hash(), WeightTrials(classifier, train), WeightTrials(classifier, test)
    attack = score.curve(adversarial_weights(adversarial_steps(fit, HEAD, (0.5, 1.0), target="c"), "c"))
    noise = score.curve(weight_noise(HEAD, (0.5, 1.0), draws=10, seed=0))
    assert (attack.attack, attack.target, attack.arm) == ("adversarial-weights", "c", "attack")
    rest = attack.targets != 2
    followed, drawn = ((curve.logits[1][:, rest].argmax(axis=2) == 2).mean() for curve in (attack, noise))
    assert followed > 0.9
    assert drawn < 0.5
    assert classifier.weights_hash() == before


def test_a_loss_without_a_slope_moves_nothing():
    classifier = planted_classifier()
    with torch.no_grad():
        classifier.final.weight.zero_()  # no block matters now
    trials = WeightTrials(classifier, planted_examples(6, seed=1))
    (step,) = adversarial_steps(trials, "block 1", (0.5,))
    assert not any(direction.any() for direction in step.directions.values())


# ----------------------------------------------------------------------------------------------------------- in a study


def test_the_cost_is_counted_in_blocks_that_run():
    classifier, examples = random_classifier("bert"), random_examples(4, seed=1)
    calls = []
    inside = [block.attention.output.dense for block in classifier.blocks]  # not called where a block is given again
    hooks = [each.register_forward_hook(lambda *_: calls.append(1)) for each in inside]
    trials = WeightTrials(classifier, examples)
    for place in places(classifier):
        trials._whole[place] = False  # nothing is run to prove that it can be resumed
        trials.curve(weight_noise(place, (0.5, 1.0), draws=3, seed=0))
    for hook in hooks:
        hook.remove()
    n_batches = len(list(classifier.batches(examples.inputs)))
    assert noise_cost(classifier, 4, budgets=2, draws=3) == 4 * len(calls) // n_batches


def test_strengths_know_their_place():
    assert Strengths("x", "attack", "share", (0.5,), [[Pruning("block 1", 0.5)]]).place == "block 1"
