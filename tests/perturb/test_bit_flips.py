import json
import struct

import numpy as np
import pytest
import torch
from planted import planted_classifier, planted_examples, random_classifier

from synapse.errors import RestoreError, SettingsError
from synapse.perturb.bits import FORMATS, BitFlips, Flip, StoredWeight, bit_positions, matrices, named_weights

HEAD = "head.weight"
VALUES = np.array([0.0, -0.0, 1.0, -1.5, 0.1, 3.14159, -1e-3, 7e4, 2**-20, 255.0, 1e-40, 65504.0], dtype=np.float32)


def every_flip(stored):
    """Every bit of every weight, flipped alone: (bit, weight)."""
    bits = torch.arange(len(bit_positions(stored.number_format)))[:, None]
    return stored.values_flipped(torch.arange(stored.words.numel())[None], bits).numpy()


def test_float32_words_and_every_flip_are_those_of_a_numpy_view():
    stored = StoredWeight.of(torch.from_numpy(VALUES), "float32")
    np.testing.assert_array_equal(stored.unsigned, VALUES.view(np.uint32))
    masks = (np.uint32(1) << np.arange(32, dtype=np.uint32))[:, None]
    expected = (VALUES.view(np.uint32) ^ masks).view(np.float32)
    np.testing.assert_array_equal(every_flip(stored).view(np.uint32), expected.view(np.uint32))
    assert not np.isfinite(expected).all()  # 1.0 with its highest exponent bit set is infinite


def test_float16_words_and_every_flip_are_those_of_a_numpy_view():
    with np.errstate(over="ignore"):
        halves = VALUES.astype(np.float16)
    stored = StoredWeight.of(torch.from_numpy(VALUES), "float16")
    np.testing.assert_array_equal(stored.unsigned, halves.view(np.uint16))
    masks = (np.uint16(1) << np.arange(16, dtype=np.uint16))[:, None]
    np.testing.assert_array_equal(
        every_flip(stored), (halves.view(np.uint16) ^ masks).view(np.float16).astype(np.float32)
    )


def test_bfloat16_words_are_the_upper_half_of_float32_and_every_flip_is_one_of_its_bits():
    values = (VALUES.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)  # what bfloat16 can hold
    stored = StoredWeight.of(torch.from_numpy(values), "bfloat16")
    np.testing.assert_array_equal(stored.unsigned, (values.view(np.uint32) >> 16).astype(np.uint16))
    masks = (np.uint32(1) << np.arange(16, 32, dtype=np.uint32))[:, None]
    np.testing.assert_array_equal(every_flip(stored), (values.view(np.uint32) ^ masks).view(np.float32))
    rounded = StoredWeight.of(torch.from_numpy(VALUES), "bfloat16").values()
    torch.testing.assert_close(rounded, torch.from_numpy(VALUES).bfloat16().float(), rtol=0, atol=0)


def test_int8_has_one_scale_a_row_and_every_flip_is_that_of_a_signed_byte():
    weight = torch.tensor([[1.27, -0.5, 0.004], [0.0, 0.0, 0.0], [-254.0, 1.0, 3.0]])
    stored = StoredWeight.of(weight, "int8")
    np.testing.assert_allclose(stored.scale.numpy(), [0.01, 0, 2], rtol=1e-6)
    # halves go to the even word: 0.5 to 0, 1.5 to 2
    np.testing.assert_array_equal(stored.unsigned.view(np.int8), [[127, -50, 0], [0, 0, 0], [-127, 0, 2]])
    for place, word in enumerate(stored.words.tolist()):
        for bit in range(8):
            (signed,) = struct.unpack("b", bytes([(word & 0xFF) ^ (1 << bit)]))
            assert every_flip(stored)[bit, place] == np.float32(signed) * stored.scale.numpy()[place // 3]


@pytest.mark.parametrize("number_format", FORMATS)
def test_the_budget_is_the_popcount_of_the_xor(number_format):
    rng = np.random.default_rng(3)
    stored = StoredWeight.of(torch.from_numpy(rng.normal(size=(4, 6)).astype(np.float32)), number_format)
    n_bits = len(bit_positions(number_format))
    drawn = rng.choice(24 * n_bits, 40, replace=False)
    flipped = stored.flipped(torch.from_numpy(drawn // n_bits), torch.from_numpy(drawn % n_bits))
    xor = stored.unsigned ^ flipped.unsigned
    assert stored.distance(flipped) == sum(bin(word).count("1") for word in xor.ravel().tolist()) == 40
    again = flipped.flipped(torch.from_numpy(drawn // n_bits), torch.from_numpy(drawn % n_bits))
    np.testing.assert_array_equal(again.unsigned, stored.unsigned)


def test_kinds_of_bits_change_the_sign_alone_the_size_by_powers_of_two_and_the_rest_by_less():
    stored = StoredWeight.of(torch.tensor([0.3]), "float16")
    values = every_flip(stored)[:, 0] / float(stored.values())
    np.testing.assert_array_equal(values[list(bit_positions("float16", "sign"))], [-1])
    # 0.3 = 1.2 * 2**(13 - 15): exponent 01101
    np.testing.assert_array_equal(np.log2(values[list(bit_positions("float16", "exponent"))]), [-1, 2, -4, -8, 16])
    assert (np.abs(values[list(bit_positions("float16", "mantissa"))] - 1) <= 0.5).all()
    assert bit_positions("int8", "sign") == (7,)
    with pytest.raises(SettingsError, match="'int8' has no exponent bits; choose 'all', 'sign' or 'mantissa'."):
        bit_positions("int8", "exponent")


@pytest.mark.parametrize("number_format", FORMATS)
def test_flips_hold_in_the_model_and_come_off_bitwise(number_format):
    classifier = random_classifier("bert")
    before, names = classifier.weights_hash(), matrices(classifier, ("*.query.weight", "classifier.weight"))
    flips = (Flip("classifier.weight", 5, 6), Flip("classifier.weight", 5, 2), Flip(names[0], 70, 7))
    clean = classifier.module.classifier.weight.detach().clone()
    stored = StoredWeight.of(clean, number_format)
    expected = stored.flipped(torch.tensor([5, 5]), torch.tensor([6, 2])).values()
    with classifier.edited(BitFlips(number_format, names, flips)):
        assert torch.equal(classifier.module.classifier.weight, expected)
        assert classifier.weights_hash() != before
    assert classifier.weights_hash() == before
    assert len(names) == 4


def test_float32_without_flips_is_the_model_itself():
    classifier = random_classifier("bert")
    before = classifier.weights_hash()
    with classifier.edited(BitFlips("float32", matrices(classifier))):
        assert classifier.weights_hash() == before


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, MemoryError])
def test_weights_come_back_after_an_error_also_where_a_flip_made_them_infinite(error):
    classifier = planted_classifier()
    before = classifier.weights_hash()
    # 4 in float16 has the exponent 10001; with its zeros set it is infinite
    flips = tuple(Flip(HEAD, 21, bit) for bit in (11, 12, 13))
    with pytest.raises(error), classifier.edited(BitFlips("float16", (HEAD,), flips)):
        assert torch.isinf(classifier.module.head.weight[1, 5])
        raise error
    assert classifier.weights_hash() == before


def test_a_flip_to_infinity_is_an_outcome_that_the_logits_show():
    classifier, examples = planted_classifier(), planted_examples(6, seed=1)
    with torch.no_grad():
        classifier.module.head.weight[1, 5] = 1.0  # 0x3f800000: with bit 30 set, infinity
    with classifier.edited(BitFlips("float32", (HEAD,), (Flip(HEAD, 21, 30),))):
        assert torch.isinf(classifier.module.head.weight[1, 5])
        assert not np.isfinite(classifier.predict(examples)).all()
    assert np.isfinite(classifier.predict(examples)).all()


def test_weights_that_do_not_come_back_are_reported(monkeypatch):
    classifier = planted_classifier()
    perturbation = BitFlips("int8", (HEAD,), (Flip(HEAD, 21, 7),))
    with pytest.raises(RestoreError, match="not what they were before BitFlips"), classifier.edited(perturbation):
        monkeypatch.setattr(torch.Tensor, "copy_", lambda self, other: self)


def test_it_serialises_and_comes_back_equal():
    flips = BitFlips("bfloat16", (HEAD, "blocks.0.mix.weight"), (Flip(HEAD, 3, 15), Flip("blocks.0.mix.weight", 0, 7)))
    assert BitFlips.from_dict(json.loads(json.dumps(flips.to_dict()))) == flips
    with pytest.raises(SettingsError, match="number_format, weights and flips"):
        BitFlips.from_dict({"number_format": "int8"})


def test_matrices_are_found_by_pattern_and_vectors_only_by_name():
    classifier = planted_classifier()
    assert matrices(classifier) == ("embedding.weight", "blocks.0.mix.weight", "blocks.1.mix.weight", HEAD)
    assert matrices(classifier, ("blocks.*", "head.bias")) == (
        "blocks.0.mix.weight",
        "blocks.1.mix.weight",
        "head.bias",
    )
    with pytest.raises(SettingsError, match="No weight is called 'heads.weight'. Did you mean 'head.weight'"):
        matrices(classifier, ("heads.weight",))


def test_what_cannot_be_flipped_is_refused():
    classifier = planted_classifier()
    with pytest.raises(SettingsError, match="Bit 8 of weight 0 in 'head.weight' was to be flipped; bits 0 to 7"):
        BitFlips("int8", (HEAD,), (Flip(HEAD, 0, 8),))
    with pytest.raises(SettingsError, match="flipped twice"):
        BitFlips("int8", (HEAD,), (Flip(HEAD, 0, 1), Flip(HEAD, 0, 1)))
    beyond = classifier.edited(BitFlips("int8", (HEAD,), (Flip(HEAD, 48, 1),)))
    with pytest.raises(SettingsError, match="Weight 48 of head.weight was to be flipped; it has 0 to 47."), beyond:
        pass
    with pytest.raises(SettingsError, match="0 weights are named"):
        BitFlips("int8", ())
    classifier.module.head.bfloat16()
    with pytest.raises(SettingsError, match="head.weight is computed with in bfloat16, which cannot hold what int8"):
        named_weights(classifier, (HEAD,), "int8")
