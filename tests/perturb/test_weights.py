import numpy as np
import pytest
import torch
from planted import planted_classifier, planted_examples, random_classifier

from synapse.errors import RestoreError, SettingsError
from synapse.perturb.logits import LogitShift
from synapse.perturb.weights import HeadEdit, WeightNoise, places, weights_at


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
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, other: self)
    with pytest.raises(RestoreError, match="not what they were before WeightNoise"):  # noqa: SIM117
        with classifier.edited(WeightNoise("head", 0.1)):
            pass


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
