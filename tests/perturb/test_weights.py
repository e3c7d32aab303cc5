import numpy as np
import pytest
import torch
from planted import planted_classifier, planted_examples, random_classifier, random_examples
from torch.nn.utils import prune

from synapse.errors import RestoreError, SettingsError
from synapse.perturb.bits import bit_positions
from synapse.perturb.logits import LogitShift
from synapse.perturb.random_bits import RandomFlips
from synapse.perturb.weights import HeadEdit, Pruning, WeightNoise, WeightStep, places, weights_at
from synapse.testing import check_perturbation


def test_the_places_are_the_blocks_and_a_linear_head():
    assert places(random_classifier("bert")) == ("block 0", "block 1", "block 2", "head")


@pytest.mark.parametrize("place", ["block 0", "block 2", "head"])
def test_weight_noise_has_exactly_its_budget_in_every_matrix_and_comes_off_bitwise(place):
    classifier = random_classifier("bert")
    before = classifier.weights_hash()
    clean = {name: weight.detach().clone() for name, weight in weights_at(classifier, place).items()}
    with classifier.edited(WeightNoise(place, 0.3, seed=2)):
        for name, weight in weights_at(classifier, place).items():
            change = weight.detach() - clean[name]
            relative = torch.linalg.norm(change) / torch.linalg.norm(clean[name])
            assert float(relative) == pytest.approx(0.3, rel=1e-4)
        assert classifier.weights_hash() != before
    assert classifier.weights_hash() == before


def test_weights_come_back_after_an_error():
    classifier = random_classifier("bert")
    before = classifier.weights_hash()
    with pytest.raises(ValueError, match="inside"), classifier.edited(WeightNoise("block 1", 0.5)):
        raise ValueError("inside")
    assert classifier.weights_hash() == before


def test_a_head_edit_moves_the_logits_by_its_product_with_the_features():
    classifier, examples = planted_classifier(), planted_examples(6, seed=2)
    change = np.zeros((3, 16), dtype=np.float32)
    change[2, 5] = 10.0
    clean = classifier.predict(examples)
    with classifier.edited(HeadEdit("head", change)):
        edited = classifier.predict(examples)
    unit = clean[:, 1] / 4  # the head reads unit 5 with weight 4 for class b
    np.testing.assert_allclose(edited[:, 2] - clean[:, 2], 10 * unit, atol=1e-5)


def test_weights_that_do_not_come_back_are_reported(monkeypatch):
    classifier = random_classifier("bert")
    with pytest.raises(RestoreError, match="not what they were before WeightNoise"):  # noqa: SIM117
        with classifier.edited(WeightNoise("head", 0.1)):
            monkeypatch.setattr(torch.Tensor, "copy_", lambda self, other: self)


def test_unknown_places_are_refused():
    with pytest.raises(SettingsError, match="no weights at 'block 7'; the places are block 0, block 1, head"):
        weights_at(planted_classifier(), "block 7")


def test_a_logit_shift_is_an_edit_of_the_bias():
    classifier, examples = planted_classifier(), planted_examples(6, seed=2)
    with classifier.edited(LogitShift("c", 2.5)):
        shifted = classifier.predict(examples)
    with torch.no_grad():
        classifier.module.head.bias[2] += 2.5
    np.testing.assert_allclose(shifted, classifier.predict(examples), atol=1e-6)
    with pytest.raises(SettingsError, match="There is no class 'd'"), classifier.edited(LogitShift("d", 1.0)):
        pass


# ------------------------------------------------------------------------------------------------------------- pruning


@pytest.mark.parametrize("place", ["block 1", "head"])
def test_the_smallest_weights_that_are_pruned_are_those_of_torch(place):
    classifier = random_classifier("bert")
    with classifier.edited(Pruning(place, 0.3)):
        found = {name: weight.detach().clone() for name, weight in weights_at(classifier, place).items()}
    for name, weight in weights_at(classifier, place).items():
        layer = torch.nn.Linear(*weight.shape[::-1])
        with torch.no_grad():
            layer.weight.copy_(weight)
        prune.l1_unstructured(layer, "weight", amount=0.3)
        assert torch.equal(found[name], layer.weight)


def test_the_largest_weights_are_the_others_and_random_ones_are_any():
    classifier = random_classifier("bert")
    (weight,) = weights_at(classifier, "head").values()
    size = weight.detach().abs()
    for share, which in ((0.25, "largest"), (0.25, "random"), (0.5, "random")):
        with classifier.edited(Pruning("head", share, which, seed=3)):
            gone = weight.detach() == 0
            assert gone.sum() == round(share * weight.numel())
        if which == "largest":
            assert size[gone].min() >= size[~gone].max()
        elif share == 0.25:
            few = gone
    assert gone[few].all()  # what goes first goes at a larger share too
    assert size[gone].min() < size[~gone].max()
    assert size[gone].max() > size[~gone].min()


def test_shares_are_from_nothing_to_everything():
    classifier, examples = random_classifier("bert"), random_examples(4, seed=1)
    clean = classifier.predict(examples)
    with classifier.edited(Pruning("head", 0.0)):
        assert (classifier.predict(examples) == clean).all()
    with classifier.edited(Pruning("head", 1.0, "random")):
        bias = classifier.final.bias.detach().numpy()
        np.testing.assert_array_equal(classifier.predict(examples), np.tile(bias, (4, 1)))
    with pytest.raises(SettingsError, match=r"The share of weights is 1.5; a number from 0 to 1 was expected"):
        Pruning("head", 1.5)


# --------------------------------------------------------------------------------------------------------- random flips


@pytest.mark.parametrize("kind", ["sign", "exponent", "mantissa", "all"])
def test_so_many_bits_of_the_kind_are_flipped_and_no_others(kind):
    classifier = random_classifier("bert")
    weights = weights_at(classifier, "block 1")
    before = {name: words(weight) for name, weight in weights.items()}
    n = sum(weight.numel() for weight in weights.values())
    with classifier.edited(RandomFlips("block 1", 0.1, kind, seed=4)):
        flipped = {name: before[name] ^ words(weight) for name, weight in weights.items()}
    assert sum(int(np.bitwise_count(each).sum()) for each in flipped.values()) == round(0.1 * n)
    allowed = sum(1 << bit for bit in bit_positions("float32", kind))
    assert not any((each & np.uint32(~allowed & 0xFFFFFFFF)).any() for each in flipped.values())
    assert sum(each.any() for each in flipped.values()) == len(weights)  # in every matrix


def words(weight):
    return weight.detach().numpy().view(np.uint32).copy()


def test_a_flipped_sign_is_the_weight_times_minus_one():
    classifier = random_classifier("bert")
    (weight,) = weights_at(classifier, "head").values()
    clean = weight.detach().clone()
    with classifier.edited(RandomFlips("head", 1.0, "sign")):
        assert torch.equal(weight.detach(), -clean)


def test_what_exponents_make_of_the_logits_may_be_no_number_and_the_weights_come_back_from_it():
    classifier, examples = random_classifier("bert"), random_examples(6, seed=1)
    before, clean = classifier.weights_hash(), classifier.predict(examples)
    with classifier.edited(RandomFlips("block 0", 0.2, "exponent", seed=1)):
        assert not np.isfinite(classifier.predict(examples)).all()
    assert classifier.weights_hash() == before
    assert (classifier.predict(examples) == clean).all()


def test_flips_that_cannot_be_are_refused():
    with pytest.raises(SettingsError, match=r"The rate of flips is 2.0; a number from 0 to 1 was expected"):
        RandomFlips("head", 2.0, "sign")
    doubled = random_classifier("bert")
    doubled.module.double()
    with pytest.raises(SettingsError, match="held in float64; bits are flipped in one of float32, float16"):
        RandomFlips("head", 0.1).changed(weights_at(doubled, "head"))


# ---------------------------------------------------------------------------------------------------------------- steps


def test_a_step_moves_each_matrix_along_its_direction_by_the_budget():
    classifier = random_classifier("bert")
    weights = weights_at(classifier, "block 0")
    clean = {name: weight.detach().clone() for name, weight in weights.items()}
    first, second, *others = weights
    directions = {first: torch.ones_like(clean[first]), second: torch.zeros_like(clean[second])}
    with classifier.edited(WeightStep("block 0", 0.5, directions)):
        moved = {name: weight.detach() - clean[name] for name, weight in weights.items()}
    step = 0.5 * clean[first].norm() / clean[first].numel() ** 0.5
    torch.testing.assert_close(moved[first], step.expand_as(moved[first]), rtol=1e-4, atol=1e-6)
    assert not any(moved[name].any() for name in (second, *others))
    with pytest.raises(SettingsError, match=r"no weight matrix 'weigth' at 'head'; there are weight.*'weight'"):
        WeightStep("head", 0.5, {"weigth": torch.ones(3, 32)}).changed(weights_at(classifier, "head"))


@pytest.mark.parametrize(
    "change",
    [
        Pruning("block 1", 0.5),
        Pruning("head", 0.5, "random", seed=3),
        RandomFlips("block 1", 1e-2, "sign", seed=3),
        RandomFlips("head", 1e-1, "mantissa"),
        WeightStep("head", 0.2, {"weight": torch.arange(96.0).reshape(3, 32)}),
    ],
    ids=lambda change: type(change).__name__,
)
def test_changes_of_weights_hold_what_every_perturbation_holds(change):
    check_perturbation(change, random_classifier("bert"), random_examples(5, seed=1).inputs)
