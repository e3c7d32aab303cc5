import math

import numpy as np
import pytest

from synapse.errors import SettingsError
from synapse.perturb.activations import (
    Clamp,
    ClassMean,
    Mean,
    Noise,
    Patch,
    Permute,
    Quantise,
    Resample,
    Rotate,
    Scale,
    SignFlip,
    Steer,
    Zero,
)
from synapse.sweeping.kinds import KINDS, RECIPES, ZERO, Kind
from synapse.types import Activations, Neurons

NEURONS = Neurons(1, (4, 0, 2))


def reference():
    rng = np.random.default_rng(8)
    return Activations(
        values=rng.normal(size=(2, 30, 6)).astype(np.float32),
        logits=rng.normal(size=(30, 3)).astype(np.float32),
        targets=np.arange(30) % 3,
        labels=("a", "b", "c"),
        source="some",
        row_mean=np.full((2, 6), 5.0, dtype=np.float32),
        row_deviation=np.full((2, 6), 0.5, dtype=np.float32),
    )


SOME = reference()
EXPECTED = [
    (Kind("zero"), Zero(NEURONS)),
    (Kind("mean"), Mean.of(NEURONS, SOME)),
    (Kind("class-mean", label="b"), ClassMean.of(NEURONS, SOME, label="b")),
    (Kind("resample"), Resample.of(NEURONS, SOME, seed=7)),
    (Kind("resample-other"), Resample.of(NEURONS, SOME, seed=7, other_class=True)),
    (Kind("noise", 1.5), Noise.of(NEURONS, SOME, strength=1.5, seed=7)),
    (Kind("scale", -2.0), Scale(NEURONS, factor=-2.0)),
    (Kind("sign-flip"), SignFlip(NEURONS)),
    (Kind("clamp", 0.05), Clamp.of(NEURONS, SOME, low=0.05, high=0.95)),
    (Kind("quantise", 4.0), Quantise.of(NEURONS, SOME, bits=4)),
    (Kind("steer", 2.0, "c"), Steer.of(NEURONS, SOME, target="c", strength=2.0)),
    (Kind("patch", 11.0), Patch.of(NEURONS, SOME, example=11)),
    (Kind("rotate", 30.0), Rotate(NEURONS, angle=30.0, seed=7)),
    (Kind("permute"), Permute(NEURONS, seed=7)),
]


@pytest.mark.parametrize(("kind", "intervention"), EXPECTED, ids=[kind.name for kind, _ in EXPECTED])
def test_a_kind_makes_the_intervention_of_its_name_with_its_strength(kind, intervention):
    assert kind.of(NEURONS, "readout", SOME, seed=7) == intervention


def test_every_kind_stands_in_that_table_and_what_a_study_sweeps_is_among_them():
    assert {kind.name for kind, _ in EXPECTED} == set(RECIPES)
    assert [kind.name for kind in KINDS] == ["zero", "mean", "scale", "noise"]
    assert KINDS[0] == ZERO


ONWARD = {"zero", "scale", "sign-flip", "rotate", "permute"}
"""Kinds that carry no numbers of a layer."""


@pytest.mark.parametrize("kind", [kind for kind, _ in EXPECTED], ids=lambda kind: kind.name)
def test_a_kind_says_which_scopes_its_numbers_fit_and_the_others_are_refused(kind):
    assert kind.fits_onward == (kind.name in ONWARD)
    assert kind.has_moments_of_all_rows == (kind.name in ("mean", "noise"))
    everywhere = kind.name in ONWARD or kind.has_moments_of_all_rows
    expected = {"readout": True, "readout-onward": kind.fits_onward, "all": everywhere, "non-padding": everywhere}
    for scope, fits in expected.items():
        assert kind.fits(scope) == fits
        if fits:
            made = kind.of(NEURONS, scope, SOME)
            assert made.scope == scope
            assert kind.fits_onward == made.fits_every_layer
        else:
            with pytest.raises(SettingsError, match=r"one layer, and 'readout-onward'|those of the readout row"):
                kind.of(NEURONS, scope, SOME)


def test_what_is_random_follows_the_seed_and_the_rest_does_not():
    for kind, _ in EXPECTED:
        same = kind.of(NEURONS, "readout", SOME, seed=0) == kind.of(NEURONS, "readout", SOME, seed=1)
        assert same != kind.is_random


def test_kinds_are_values_also_where_they_have_no_strength():
    assert Kind("zero", float("nan")) == ZERO
    assert hash(Kind("zero", float("nan"))) == hash(ZERO)
    assert len({Kind("scale", 0.5), Kind("scale", 0.5), Kind("scale", 0.25)}) == 2


@pytest.mark.parametrize(
    ("name", "strength", "label", "message"),
    [
        (
            "zeroo",
            math.nan,
            "",
            "There is no intervention 'zeroo'; the kinds are zero, mean, class-mean, resample, resample-other, noise, "
            "scale, sign-flip, clamp, quantise, steer, patch, rotate, permute. Did you mean 'zero'?",
        ),
        ("zero", 0.5, "", "The intervention 'zero' was given 0.5; it has no strength."),
        ("scale", math.nan, "", "The factor of 'scale' is nan; a number was expected: `Kind('scale', ...)`."),
        ("noise", math.inf, "", "The strength of 'noise' is inf; a number was expected: `Kind('noise', ...)`."),
        (
            "clamp",
            0.6,
            "",
            "The quantile of 'clamp' is 0.6; a number from 0 to 0.5 was expected: `Kind('clamp', ...)`.",
        ),
        (
            "quantise",
            2.5,
            "",
            "The bits of 'quantise' is 2.5; a whole number from 1 to 16 was expected: `Kind('quantise', ...)`.",
        ),
        (
            "patch",
            -1.0,
            "",
            "The example of 'patch' is -1.0; a whole number from 0 was expected: `Kind('patch', ...)`.",
        ),
        (
            "steer",
            1.0,
            "",
            "The intervention 'steer' was given the label ''; a class was expected: `Kind(..., label=...)`.",
        ),
        ("mean", math.nan, "b", "The intervention 'mean' was given the label 'b'; it takes none."),
    ],
)
def test_kinds_that_cannot_be_are_refused_in_one_sentence(name, strength, label, message):
    with pytest.raises(SettingsError) as caught:
        Kind(name, strength, label)
    assert str(caught.value) == message


def test_a_class_that_the_reference_examples_do_not_know_is_refused_by_its_near_name():
    with pytest.raises(SettingsError, match=r"There is no class 'bb'; the classes are a, b, c. Did you mean 'b'\?"):
        Kind("steer", 1.0, "bb").of(NEURONS, "readout", SOME)
