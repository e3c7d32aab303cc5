import dataclasses
import json
import math
from functools import partial

import numpy as np
import pytest
import scipy.stats
import torch
from architecture_page import classifier_of
from architectures import TABLE
from planted import B_UNIT, C_UNIT, planted_classifier, planted_examples, random_classifier, random_examples

from synapse.errors import SettingsError
from synapse.model.hooks import hidden_states
from synapse.perturb.activations import (
    Clamp,
    ClassMean,
    Mean,
    Noise,
    Patch,
    Permute,
    Place,
    Quantise,
    Resample,
    Rotate,
    Scale,
    SignFlip,
    Steer,
    Zero,
    intervention_from_dict,
)
from synapse.recording import record
from synapse.types import Activations, Neurons

UNITS = (3, 17, 8)
RNG = np.random.default_rng(5)
MEANS = tuple(float(v) for v in RNG.normal(size=3))
LOW, HIGH = (-0.5, -1.0, 0.0), (0.25, 1.0, 0.0)


def the_axis():
    """The direction that a rotation of three neurons with seed 0 leaves alone, as its eigenvector of eigenvalue 1."""
    values, vectors = np.linalg.eig(Rotate(Neurons(0, UNITS), angle=90.0).matrix())
    return np.real(vectors[:, np.abs(values - 1).argmin()])


AXIS = the_axis()


def by_hand(classifier, examples, layers, rows, edit):
    """Predict one example at a time under hooks written here, without anything of the library's."""
    logits, units = [], list(UNITS)
    for text in examples.inputs:
        inputs = classifier.preprocess([text])
        n_tokens = inputs["input_ids"].shape[1]
        readout = 0 if classifier.anatomy.readout == "first" else n_tokens - 1

        def hook(_module, _inputs, output, readout=readout):
            states = (output[0] if isinstance(output, tuple) else output).clone()
            where = slice(None) if rows == "all" else slice(readout, readout + 1)
            part = states[0, where]
            part[:, units] = torch.as_tensor(edit(part[:, units].numpy()), dtype=torch.float32)
            return (states, *output[1:]) if isinstance(output, tuple) else states

        handles = [classifier.blocks[layer].register_forward_hook(hook) for layer in layers]
        with torch.inference_mode():
            logits.append(classifier.module(**inputs).logits[0].numpy())
        for handle in handles:
            handle.remove()
    return np.stack(logits)


def nearest_level(x, bits):
    levels = np.linspace(LOW, HIGH, 2**bits)  # (level, unit)
    nearest = np.abs(x[:, None, :] - levels).argmin(axis=1)
    return np.take_along_axis(levels, nearest, axis=0)


# kind -> how it is made, and what it does to (row, unit) by the formula
EDITS = {
    "zero": (partial(Zero), lambda x: 0 * x),
    "scale": (partial(Scale, factor=-0.5), lambda x: -0.5 * x),
    "sign-flip": (partial(SignFlip), lambda x: -x),
    "mean": (partial(Mean, means=MEANS), lambda x: np.tile(MEANS, (len(x), 1))),
    "class-mean": (partial(ClassMean, means=MEANS, label="b"), lambda x: np.tile(MEANS, (len(x), 1))),
    "patch": (partial(Patch, state=MEANS, example=4), lambda x: np.tile(MEANS, (len(x), 1))),
    "resample": (partial(Resample, donors=(MEANS,)), lambda x: np.tile(MEANS, (len(x), 1))),
    "clamp": (partial(Clamp, low=LOW, high=HIGH), lambda x: np.clip(x, LOW, HIGH)),
    "quantise": (partial(Quantise, bits=2, low=LOW, high=HIGH), lambda x: nearest_level(x, 2)),
    "steer": (partial(Steer, strength=2.0, vector=MEANS), lambda x: x + 2 * np.array(MEANS)),
    # of three neurons only the two cycles have no fixed point; seed 0 draws this one
    "permute": (partial(Permute), lambda x: x[:, [1, 2, 0]]),
    # two quarter turns in one plane turn that plane by half; the third direction stays: R = 2 a a^T - 1
    "rotate": (partial(Rotate, angle=180.0), lambda x: 2 * np.outer(x @ AXIS, AXIS) - x),
}
SCOPES = {"readout": ([1], "readout"), "readout-onward": ([1, 2], "readout"), "all": ([1], "all")}
ANY_LAYER = ("zero", "scale", "sign-flip", "permute", "rotate")

# The numbers of one layer are refused at later ones, so those pairs are not in the table.
PAIRS = [(kind, scope) for kind in EDITS for scope in SCOPES if scope != "readout-onward" or kind in ANY_LAYER]


@pytest.mark.parametrize("architecture", ["bert", "distilbert", "gpt2"])
@pytest.mark.parametrize(("kind", "scope"), PAIRS)
def test_an_intervention_does_what_hooks_written_by_hand_do(architecture, scope, kind):
    classifier, examples = random_classifier(architecture), random_examples(8, seed=3)
    make, edit = EDITS[kind]
    layers, rows = SCOPES[scope]
    with classifier.edited(make(Neurons(1, UNITS), scope=scope)):
        edited = classifier.predict(examples)
    np.testing.assert_allclose(edited, by_hand(classifier, examples, layers, rows, edit), atol=5e-5)


def test_noise_has_the_asked_size_and_depends_on_the_example_alone():
    classifier, examples = planted_classifier(), planted_examples(400, seed=8)
    noise = Noise(Neurons(1, (B_UNIT,)), strength=2.0, deviations=(0.25,))
    clean = classifier.predict(examples)
    with classifier.edited(noise):
        first = classifier.predict(examples)
        order = np.random.default_rng(0).permutation(400)
        shuffled = classifier.predict(examples.take(order))
    np.testing.assert_array_equal(first[order], shuffled)
    # The head reads the unit with weight 4, so the logit of class b moves by 4 times the noise, the others not at all.
    moved = (first - clean)[:, 1] / 4
    assert moved.std() == pytest.approx(0.5, rel=0.1)
    assert abs(moved.mean()) < 0.08
    np.testing.assert_array_equal(first[:, [0, 2]], clean[:, [0, 2]])


def test_ablating_the_planted_neuron_flips_its_class_and_nothing_else():
    classifier, examples = planted_classifier(), planted_examples(60, seed=9)
    clean = classifier.predict(examples).argmax(axis=1)
    for unit, label in ((B_UNIT, 1), (C_UNIT, 2)):
        with classifier.edited(Zero(Neurons(1, (unit,)))):
            edited = classifier.predict(examples).argmax(axis=1)
        np.testing.assert_array_equal(edited, np.where(clean == label, 0, clean))


def test_interventions_compose_in_the_order_given_and_all_come_off():
    classifier, examples = planted_classifier(), planted_examples(6, seed=1)
    clean = classifier.predict(examples)
    scale, mean = Scale(Neurons(1, (B_UNIT,)), factor=3.0), Mean(Neurons(1, (B_UNIT,)), means=(2.0,))
    with classifier.edited(mean, scale):
        np.testing.assert_allclose(classifier.predict(examples)[:, 1], 4 * 3 * 2.0)
    with classifier.edited(scale, mean):
        np.testing.assert_allclose(classifier.predict(examples)[:, 1], 4 * 2.0)
    np.testing.assert_array_equal(classifier.predict(examples), clean)


def test_the_model_comes_back_after_an_error_inside_an_intervention():
    classifier, examples = random_classifier("bert"), random_examples(6, seed=1)
    before, clean = classifier.weights_hash(), classifier.predict(examples)
    neurons = Neurons(0, UNITS)
    with pytest.raises(KeyboardInterrupt), classifier.edited(Zero(neurons, scope="readout-onward")):
        classifier.predict(examples)
        raise KeyboardInterrupt
    assert classifier.weights_hash() == before
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in classifier.module.modules())
    np.testing.assert_array_equal(classifier.predict(examples), clean)


ONE, TWO, THREE = Neurons(0, (1,)), Neurons(0, (1, 2)), Neurons(0, (4, 1, 2))


@pytest.mark.parametrize(
    ("neurons", "message"),
    [
        (Neurons(2, (0,)), "Layer 2 was asked for; the classifier has the layers 0 to 1 of 'residual'."),
        (
            Neurons(0, (16,)),
            "Unit 16 was asked for; the classifier has the units 0 to 15 in each layer of 'residual'.",
        ),
    ],
)
def test_neurons_that_the_classifier_does_not_have_are_refused(neurons, message):
    classifier = planted_classifier()
    with pytest.raises(SettingsError) as caught, classifier.edited(Zero(neurons)):
        classifier.predict(planted_examples(3, seed=0))
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            partial(Zero, Neurons(0, (1, 1))),
            "Some units are listed twice; each neuron can be edited once. Drop the repeats.",
        ),
        (
            partial(Zero, Neurons(0, (1, -1))),
            "Unit -1 was asked for; units are counted from 0.",
        ),
        (partial(Mean, TWO, means=(0.0,)), "1 means were given for 2 neurons; one each was expected."),
        (
            partial(Mean, ONE, means=(0.0,), scope="readout-onward"),
            "Mean carries numbers of one layer, and 'readout-onward' edits later ones too; apply one intervention a "
            "layer instead: `classifier.edited(first, second, ...)`.",
        ),
        (partial(Mean, ONE, means=(math.nan,)), "A number of means is not finite; finite numbers were expected."),
        (partial(Scale, ONE, factor=math.inf), "A number of factor is not finite; finite numbers were expected."),
        (
            partial(Noise, ONE, strength=1.0, deviations=(-2.0,)),
            "A deviation is -2.0; deviations of 0 or more were expected.",
        ),
        (partial(Noise, ONE, strength=1.0, deviations=(1.0,), seed=-1), "The seed is -1; 0 or more was expected."),
        (partial(Permute, ONE, seed=-3), "The seed is -3; 0 or more was expected."),
        (partial(Rotate, ONE, angle=math.nan), "A number of angle is not finite; finite numbers were expected."),
        (
            partial(Clamp, TWO, low=(0.0, 1.0), high=(1.0, 0.5)),
            "Unit 2 has the bounds 1.0 and 0.5; low <= high was expected.",
        ),
        (partial(Quantise, ONE, bits=0, low=(0.0,), high=(1.0,)), "0 bits were asked for; 1 to 16 were expected."),
        (
            partial(Quantise, ONE, bits=2, low=(0.0,), high=(1.0, 2.0)),
            "2 high were given for 1 neurons; one each was expected.",
        ),
        (partial(Resample, ONE, donors=()), "No donors were given; one or more were expected."),
        (
            partial(Resample, TWO, donors=((1.0, 2.0), (1.0,))),
            "A donor has 1 values for 2 neurons; one each was expected.",
        ),
        (
            partial(Resample, ONE, donors=((1.0,), (2.0,)), donor_labels=(0,)),
            "1 donor_labels were given for 2 donors; one each was expected.",
        ),
        (
            partial(Resample, ONE, donors=((1.0,), (2.0,)), donor_labels=(1, 1), other_class=True),
            "The donors are of 1 known classes; for `other_class` two or more were expected: give `donor_labels`, and "
            "donors of several classes.",
        ),
    ],
)
def test_impossible_parameters_are_refused_in_one_sentence_when_they_are_given(make, message):
    with pytest.raises(SettingsError) as caught:
        make()
    assert str(caught.value) == message


def architecture(name):
    return next(row for row in TABLE if row.name == name)


def test_every_scope_edits_the_rows_that_it_names_and_no_others():
    row = architecture("Llama, left padding")
    classifier = classifier_of(row)
    inputs = row.inputs(6, 4)
    batch = next(batch for batch in classifier.batches(inputs) if len(batch.index) > 1)
    mask = batch.inputs["attention_mask"].bool()
    last = torch.zeros_like(mask)
    last[:, -1] = True  # padded on the left: the last token stands at the end
    expected = {"readout": last, "all": torch.ones_like(mask), "non-padding": mask}
    assert not mask.all()
    for scope, rows in expected.items():
        states = []
        with classifier.edited(Mean(Neurons(1, (2, 5)), scope=scope, means=(7.0, 7.0))):
            handle = classifier.blocks[1].register_forward_hook(
                lambda _m, _i, output, to=states: to.append(hidden_states(output))
            )
            classifier.forward(batch)
            handle.remove()
        assert torch.equal((states[0][..., [2, 5]] == 7).all(dim=-1), rows)


def test_noise_of_an_example_is_the_same_on_whichever_side_its_batch_is_padded():
    row = architecture("Llama, left padding")
    classifier = classifier_of(row)
    inputs = row.inputs(6, 4)
    edit = Noise(Neurons(1, (2, 5)), scope="all", strength=1.0, deviations=(1.0, 2.0), seed=3)
    with classifier.edited(edit):
        together = classifier.predict(inputs)
        alone = np.concatenate([classifier.predict([one]) for one in inputs])
    np.testing.assert_allclose(together, alone, atol=1e-4)
    assert np.abs(together - classifier.predict(inputs)).max() > 1e-2


def test_a_head_that_reads_the_mean_is_edited_in_every_row_and_zeroing_all_leaves_the_bias():
    classifier = classifier_of(architecture("T5 encoder, mean pooling"))
    inputs = architecture("T5 encoder, mean pooling").inputs(5, 4)
    everything = tuple(range(classifier.width))
    with classifier.edited(Zero(Neurons(classifier.n_layers - 1, everything))):
        logits = classifier.predict(inputs)
    bias = classifier.final.bias.detach().numpy()
    np.testing.assert_allclose(logits, np.tile(bias, (5, 1)), atol=1e-6)


# ------------------------------------------------------------------------------------------------ the edit of states


def states_and_place(*, scope="rows", dtype=torch.float32):
    """Random states of 4 examples, 5 rows and 8 units, and a place that edits rows 0 and 3, or all."""
    states = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(2)).to(dtype)
    rows = None
    if scope == "rows":
        rows = torch.zeros(4, 5, dtype=torch.bool)
        rows[:, [0, 3]] = True
    noise = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(3))
    return states, Place(1, rows, (11, 12, 13, 14), torch.tensor([0, 1, 2, 0]), lambda seed: noise)


def every_kind(units):
    neurons, n = Neurons(1, units), len(units)
    numbers = tuple(np.random.default_rng(1).normal(size=n).tolist())
    wide = tuple(abs(number) + 0.1 for number in numbers)
    donors = tuple(tuple(row) for row in np.random.default_rng(2).normal(size=(6, n)).tolist())
    return [
        Zero(neurons),
        Scale(neurons, factor=1.0),
        SignFlip(neurons),
        Permute(neurons, seed=3),
        Rotate(neurons, angle=40.0, seed=3),
        Mean(neurons, means=numbers),
        Noise(neurons, strength=0.7, deviations=wide, seed=3),
        ClassMean(neurons, means=numbers, label="b"),
        Patch(neurons, state=numbers, example=5, source="somewhere"),
        Resample(neurons, donors=donors, donor_labels=(0, 1, 2, 0, 1, 2), other_class=True, seed=3),
        Clamp(neurons, low=tuple(-number for number in wide), high=wide),
        Quantise(neurons, bits=3, low=tuple(-number for number in wide), high=wide),
        Steer(neurons, strength=-1.5, vector=numbers, source="a", target="b"),
    ]


@pytest.mark.parametrize("scope", ["rows", "all"])
@pytest.mark.parametrize("units", [tuple(range(8)), (2, 3, 4), (6, 1, 4), (5,), ()], ids=str)
def test_only_the_neurons_of_the_rows_change_and_nothing_is_shared_with_what_was_given(units, scope):
    for intervention in every_kind(units):
        states, place = states_and_place(scope=scope)
        before = states.clone()
        first = intervention.edited(states, place)
        kept = first.clone()
        untouched = torch.ones(8, dtype=torch.bool)
        untouched[list(units)] = False
        assert torch.equal(first[..., untouched], before[..., untouched])
        if scope == "rows":
            assert torch.equal(first[:, [1, 2, 4]], before[:, [1, 2, 4]])
        first.fill_(7.0)  # what is returned is the caller's own
        assert torch.equal(states, before)
        assert torch.equal(intervention.edited(states, place), kept)


@pytest.mark.parametrize("scope", ["rows", "all"])
def test_the_order_of_the_units_is_that_of_the_numbers_whichever_way_they_are_reached(scope):
    """Once in order (a view), once shuffled (a gather): the same neurons with the same numbers."""
    shuffled, in_order = (6, 2, 5, 3, 4), (2, 3, 4, 5, 6)
    by_unit = {unit: float(unit) / 3 for unit in in_order}
    states, place = states_and_place(scope=scope)
    for make in (
        lambda units: Mean(Neurons(1, units), means=tuple(by_unit[u] for u in units)),
        lambda units: Steer(Neurons(1, units), strength=2.0, vector=tuple(by_unit[u] for u in units)),
        lambda units: Noise(Neurons(1, units), strength=2.0, deviations=tuple(by_unit[u] for u in units)),
    ):
        assert torch.equal(make(shuffled).edited(states, place), make(in_order).edited(states, place))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_arithmetic_is_done_in_float32_or_better_and_the_type_of_the_states_is_kept(dtype):
    states, place = states_and_place(dtype=dtype)
    exact = states.to(torch.promote_types(dtype, torch.float32))
    edited = Scale(Neurons(1, (6, 1)), factor=0.3).edited(states, place)
    assert edited.dtype == dtype
    assert torch.equal(edited[:, [0, 3]][..., [6, 1]], (exact[:, [0, 3]][..., [6, 1]] * 0.3).to(dtype))
    for intervention in every_kind(tuple(range(8))):
        assert intervention.edited(states, place).dtype == dtype


def test_states_that_lie_in_memory_in_another_order_are_edited_alike():
    states, place = states_and_place(scope="all")
    across = states.transpose(0, 1).contiguous().transpose(0, 1)
    assert not across.is_contiguous()
    for units in (tuple(range(8)), (6, 1)):
        for intervention in every_kind(units):
            assert torch.equal(intervention.edited(across, place), intervention.edited(states, place))


def test_a_row_of_each_example_is_edited_alone_as_among_the_others():
    states, whole = states_and_place(scope="all")
    alone = dataclasses.replace(whole, noise=lambda seed: whole.noise(seed)[:, 2:3])
    for intervention in every_kind((6, 1, 3)):
        expected = intervention.edited(states, whole)[:, 2:3]
        torch.testing.assert_close(intervention.edited(states[:, 2:3], alone), expected, rtol=1e-6, atol=1e-6)


def test_gradients_flow_through_an_edit_also_after_it_was_made_in_inference_mode():
    states, place = states_and_place(scope="all")
    for intervention in every_kind((6, 1, 3)):
        with torch.inference_mode():
            intervention.edited(states, place)
    steer = Steer(Neurons(1, (6, 1)), strength=1.0, vector=(2.0, 3.0))
    scale = Scale(Neurons(1, (6, 1)), factor=0.25)
    wanted = states.clone().requires_grad_()
    scale.edited(steer.edited(wanted, place), place).sum().backward()
    expected = torch.ones(8)
    expected[[6, 1]] = 0.25
    assert torch.equal(wanted.grad, expected.expand(4, 5, 8))
    rotated = states.clone().requires_grad_()
    rotate = Rotate(Neurons(1, (6, 1, 3)), angle=20.0)
    with torch.inference_mode():
        rotate.edited(states, place)
    rotate.edited(rotated, place).square().sum().backward()
    torch.testing.assert_close(rotated.grad, 2 * states)  # a rotation keeps the sum of squares


def test_an_intervention_is_the_same_value_before_and_after_it_was_used():
    for intervention in every_kind((6, 1, 3)):
        twin = dataclasses.replace(intervention)
        before = (hash(intervention), repr(intervention), intervention.to_dict())
        intervention.edited(*states_and_place())
        assert (hash(intervention), repr(intervention), intervention.to_dict()) == before
        assert intervention == twin


# ------------------------------------------------------------------------------------------------- kinds of their own


def values_of(intervention, x, keys=(1,), labels=None):
    """Return what the intervention makes of (row, unit) values, each row an example of its own."""
    states = torch.as_tensor(np.asarray(x), dtype=torch.float64)[:, None]
    keys = keys if len(keys) == len(states) else tuple(range(len(states)))
    return intervention.edited(states, Place(0, None, keys, labels))[:, 0].numpy()


@pytest.mark.parametrize("size", [2, 3, 6, 7])
def test_a_rotation_keeps_norms_and_turns_by_its_angle_in_pairs_of_directions(size):
    rotate = Rotate(Neurons(0, tuple(range(size))), angle=50.0, seed=4)
    matrix, theta = rotate.matrix(), math.radians(50)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), atol=1e-12)
    angles = np.sort(np.angle(np.linalg.eigvals(matrix)))
    np.testing.assert_allclose(angles, np.sort([-theta, theta] * (size // 2) + [0.0] * (size % 2)), atol=1e-7)
    x = np.random.default_rng(0).normal(size=(9, size))
    turned = values_of(rotate, x)
    np.testing.assert_allclose(np.linalg.norm(turned, axis=1), np.linalg.norm(x, axis=1))
    if size % 2 == 0:
        cosine = (x * turned).sum(axis=1) / (x * x).sum(axis=1)
        np.testing.assert_allclose(cosine, math.cos(theta))
    back = values_of(Rotate(Neurons(0, tuple(range(size))), angle=-50.0, seed=4), turned)
    np.testing.assert_allclose(back, x)


def test_rotations_and_permutations_depend_on_the_seed_and_leave_a_set_of_one_alone():
    x = np.random.default_rng(0).normal(size=(3, 6))
    for kind in (partial(Rotate, angle=30.0), Permute):
        first, other = (values_of(kind(Neurons(0, tuple(range(6))), seed=seed), x) for seed in (0, 1))
        assert np.abs(first - other).max() > 0.1
        np.testing.assert_array_equal(values_of(kind(Neurons(0, (0,))), x[:, :1]), x[:, :1])


def test_the_planes_of_a_rotation_favour_no_neuron():
    """Turned by half, x' = -x along the planes: what stays is one direction, uniform on the sphere."""
    axes = [Rotate(Neurons(0, (0, 1, 2)), angle=180.0, seed=seed).matrix().diagonal() for seed in range(400)]
    # R = 2 a a^T - 1, so a_i^2 = (1 + R_ii) / 2, whose mean is 1/3; a coordinate of the sphere is uniform (Archimedes)
    coordinates = np.sqrt(np.clip((1 + np.array(axes)) / 2, 0, 1))
    for unit in range(3):
        assert scipy.stats.kstest(coordinates[:, unit], "uniform").pvalue > 0.01


def test_permutations_have_no_fixed_point_and_all_of_them_are_drawn_alike():
    orders = [tuple(Permute(Neurons(0, (0, 1, 2, 3)), seed=seed).order().tolist()) for seed in range(900)]
    assert all(place != unit for order in orders for place, unit in enumerate(order))
    counts = [orders.count(order) for order in set(orders)]
    assert len(counts) == 9  # derangements of 4
    assert scipy.stats.chisquare(counts).pvalue > 0.01


@pytest.mark.parametrize("bits", [1, 2, 5, 16])
def test_quantised_values_are_the_nearest_of_as_many_levels_as_the_bits_allow(bits):
    low, high = (-2.0, 0.1, 3.0), (2.0, 0.7, 3.0)
    x = np.random.default_rng(1).normal(size=(300, 3)) * 3
    levels = np.linspace(low, high, 2**bits)
    expected = np.stack([levels[np.abs(x[:, [u]] - levels[:, u]).argmin(axis=1), u] for u in range(3)], axis=1)
    quantise = Quantise(Neurons(0, (0, 1, 2)), bits=bits, low=low, high=high)
    np.testing.assert_allclose(values_of(quantise, x), expected, atol=1e-12)
    np.testing.assert_allclose(values_of(quantise, expected), expected, atol=1e-12)  # levels stay
    coarse = quantise.edited(torch.tensor(x, dtype=torch.float32)[:, None], Place(0, None, tuple(range(300))))
    assert coarse.min() >= -2
    assert len(coarse[:, 0, 1].unique()) <= 2**bits


def test_a_donor_depends_on_the_seed_and_the_content_alone_and_every_donor_is_taken():
    donors = tuple((float(d), 10.0 * d) for d in range(8))
    resample = Resample(Neurons(0, (0, 1)), donors=donors, seed=5)
    keys = tuple(range(1000, 1800))
    x = np.zeros((800, 2))
    taken = values_of(resample, x, keys)
    np.testing.assert_array_equal(taken[:, 1], 10 * taken[:, 0])
    backwards = values_of(resample, x, keys[::-1])
    np.testing.assert_array_equal(backwards[::-1], taken)
    alone = values_of(resample, x[:1], keys[7:8])
    np.testing.assert_array_equal(alone[0], taken[7])
    assert scipy.stats.chisquare(np.bincount(taken[:, 0].astype(int), minlength=8)).pvalue > 0.01
    other = values_of(dataclasses.replace(resample, seed=6), x, keys)
    assert 0.05 < (other[:, 0] == taken[:, 0]).mean() < 0.25  # 1 in 8 by chance
    elsewhere = Resample(Neurons(3, (9, 4)), donors=donors, seed=5)
    states = torch.zeros(800, 1, 12, dtype=torch.float64)
    at_once = elsewhere.edited(states, Place(3, None, keys))[:, 0, [9, 4]]
    np.testing.assert_array_equal(at_once, taken)  # one example, one donor, in every set and layer


def test_a_donor_of_another_class_is_of_another_class_and_all_of_these_are_taken():
    classes = np.array([0, 0, 0, 1, 2, 2])
    resample = Resample(
        Neurons(0, (0,)),
        donors=tuple((float(d),) for d in range(6)),
        donor_labels=tuple(classes.tolist()),
        other_class=True,
    )
    labels = torch.arange(600) % 3
    taken = values_of(resample, np.zeros((600, 1)), tuple(range(600)), labels)[:, 0].astype(int)
    assert (classes[taken] != labels.numpy()).all()
    for label in range(3):
        assert set(taken[labels == label]) == set(np.flatnonzero(classes != label))
    with pytest.raises(SettingsError, match="The classes of the examples are not known here"):
        values_of(resample, np.zeros((3, 1)))


def test_in_the_live_form_donors_of_another_class_need_labelled_examples():
    classifier, examples = planted_classifier(), planted_examples(9, seed=2)
    resample = Resample(
        Neurons(1, (B_UNIT,)), donors=((0.0,), (3.0,), (0.0,)), donor_labels=(0, 1, 2), other_class=True
    )
    with classifier.edited(resample):
        logits = classifier.predict(examples)
        with pytest.raises(SettingsError, match="The classes of the examples are not known here"):
            classifier.predict(examples.inputs)
    assert (logits[1::3, 1] == 0).all()  # class b may not have the donor of class b
    assert set(logits[:, 1].tolist()) == {0.0, 12.0}


# --------------------------------------------------------------------------------------------- numbers of activations


def some_activations(**changes):
    rng = np.random.default_rng(8)
    values = rng.normal(size=(2, 30, 6)).astype(np.float32)
    targets = np.arange(30) % 3
    plain = {
        "values": values,
        "logits": rng.normal(size=(30, 4)).astype(np.float32),
        "targets": targets,
        "labels": ("a", "b", "c", "never"),
        "source": "some",
        "row_mean": np.full((2, 6), 5.0, dtype=np.float32),
        "row_deviation": np.full((2, 6), 0.5, dtype=np.float32),
    }
    return Activations(**(plain | changes))


SOME, CHOSEN = some_activations(), Neurons(1, (4, 0, 2))
RECORDED = SOME.values[1][:, [4, 0, 2]].astype(float)


def test_means_and_deviations_are_those_of_the_rows_that_the_scope_edits():
    np.testing.assert_allclose(Mean.of(CHOSEN, SOME).means, RECORDED.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(Noise.of(CHOSEN, SOME, strength=1.0).deviations, RECORDED.std(axis=0), rtol=1e-6)
    several = some_activations(reads_several_rows=True)
    for activations, scope in ((SOME, "all"), (SOME, "non-padding"), (several, "readout")):
        assert Mean.of(CHOSEN, activations, scope=scope).means == (5.0, 5.0, 5.0)
        assert Noise.of(CHOSEN, activations, scope=scope, strength=1.0).deviations == (0.5, 0.5, 0.5)


def test_the_constructors_take_the_numbers_that_they_name():
    of_b, of_c, rest = (RECORDED[np.isin(SOME.targets, which)].mean(axis=0) for which in ([1], [2], [0, 2]))
    np.testing.assert_allclose(ClassMean.of(CHOSEN, SOME, label="b").means, of_b)
    np.testing.assert_allclose(Steer.of(CHOSEN, SOME, target="b", source="c").vector, of_b - of_c)
    np.testing.assert_allclose(Steer.of(CHOSEN, SOME, target="b").vector, of_b - rest)
    patch = Patch.of(CHOSEN, SOME, example=17)
    np.testing.assert_array_equal(patch.state, RECORDED[17])
    assert (patch.example, patch.source) == (17, "some")
    clamp = Clamp.of(CHOSEN, SOME, low=0.1, high=0.8)
    # R's default, type 7: linear between the order statistics around 0.1 * 29 and 0.8 * 29
    ordered = np.sort(RECORDED, axis=0)
    np.testing.assert_allclose(clamp.low, 0.1 * ordered[2] + 0.9 * ordered[3])
    np.testing.assert_allclose(clamp.high, 0.8 * ordered[23] + 0.2 * ordered[24])
    quantise = Quantise.of(CHOSEN, SOME, bits=4)
    assert quantise.low == tuple(RECORDED.min(axis=0))
    assert quantise.high == tuple(RECORDED.max(axis=0))
    resample = Resample.of(CHOSEN, SOME, donors=7, seed=1)
    rows = [tuple(row) for row in RECORDED]
    assert [SOME.targets[rows.index(donor)] for donor in resample.donors] == list(resample.donor_labels)
    assert len(set(resample.donors)) == 7
    assert len(Resample.of(CHOSEN, SOME).donors) == 30
    assert Resample.of(CHOSEN, SOME, donors=7, seed=2).donors != resample.donors


def test_donors_of_other_classes_hold_every_class_however_rare():
    targets = np.zeros(30, dtype=int)
    targets[13] = 2
    resample = Resample.of(CHOSEN, some_activations(targets=targets), donors=4, other_class=True)
    assert sorted(resample.donor_labels) == [0, 0, 0, 2]


def test_steering_by_the_difference_of_two_classes_moves_one_to_the_other():
    classifier, train, examples = planted_classifier(), planted_examples(90, seed=4), planted_examples(30, seed=5)
    activations = record(classifier, train)
    neurons = Neurons(1, tuple(range(16)))
    clean = classifier.predict(examples).argmax(axis=1)
    with classifier.edited(Steer.of(neurons, activations, source="b", target="c")):
        steered = classifier.predict(examples).argmax(axis=1)
    np.testing.assert_array_equal(steered[clean == 1], 2)
    np.testing.assert_array_equal(steered[clean == 2], 2)


def test_setting_the_whole_row_to_an_examples_own_gives_that_examples_logits():
    classifier, train = random_classifier("bert"), random_examples(12, seed=4)
    activations = record(classifier, train)
    last = Neurons(classifier.n_layers - 1, tuple(range(classifier.width)))
    with classifier.edited(Patch.of(last, activations, example=5)):
        patched = classifier.predict(random_examples(4, seed=9))
    np.testing.assert_allclose(patched, np.tile(activations.logits[5], (4, 1)), atol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            partial(ClassMean.of, CHOSEN, SOME, label="d"),
            "There is no class 'd'; the classes are a, b, c, never.",
        ),
        (
            partial(Steer.of, CHOSEN, SOME, target="nevr"),
            "There is no class 'nevr'; the classes are a, b, c, never. Did you mean 'never'?",
        ),
        (
            partial(ClassMean.of, CHOSEN, SOME, label="never"),
            "None of the recorded examples is of the class 'never'; record some that are.",
        ),
        (
            partial(Steer.of, CHOSEN, some_activations(targets=np.ones(30, dtype=int)), target="b"),
            "All recorded examples are of the class 'b'; others were expected too.",
        ),
        (
            partial(Patch.of, CHOSEN, SOME, example=30),
            "Example 30 was asked for; the activations hold 0 to 29.",
        ),
        (
            partial(Clamp.of, CHOSEN, SOME, low=0.9, high=0.1),
            "The quantiles are 0.9 and 0.1; shares of the examples, 0 <= low <= high <= 1, were expected.",
        ),
        (
            partial(Clamp.of, CHOSEN, SOME, scope="all"),
            "The recorded values are those of the readout row, and Clamp was to edit the rows of 'all'; use the scope "
            "'readout', or give numbers of your own.",
        ),
        (
            partial(Quantise.of, CHOSEN, some_activations(reads_several_rows=True), bits=4),
            "The head reads several rows, and only quantiles of their mean are recorded, while Quantise bounds every "
            "row; give bounds of your own: `low=` and `high=`, one each a neuron.",
        ),
        (partial(Resample.of, CHOSEN, SOME, donors=0), "0 donors were asked for; 1 or more were expected."),
        (
            partial(Mean.of, Neurons(1, (4,), "mlp"), SOME),
            "The neurons are of 'mlp', the activations of 'residual'; record them with `component='mlp'`.",
        ),
        (
            partial(Mean.of, Neurons(2, (4,)), SOME),
            "Layer 2 was asked for; the activations have the layers 0 to 1.",
        ),
        (
            partial(Patch.of, Neurons(1, (6,)), SOME, example=0),
            "Unit 6 was asked for; the activations have the units 0 to 5.",
        ),
        (
            partial(Mean.of, CHOSEN, some_activations(row_mean=None, row_deviation=None), scope="all"),
            "The activations carry no moments over all rows; record them again with `record`.",
        ),
    ],
)
def test_numbers_that_the_activations_do_not_hold_are_refused_in_one_sentence(make, message):
    with pytest.raises(SettingsError) as caught:
        make()
    assert str(caught.value) == message


# ------------------------------------------------------------------------------------------------------ serialisation


def test_every_kind_survives_json():
    for intervention in every_kind((6, 1, 3)):
        written = json.dumps(intervention.to_dict(), allow_nan=False)
        again = intervention_from_dict(json.loads(written))
        assert again == intervention
        assert type(again) is type(intervention)
        assert hash(again) == hash(intervention)
        assert torch.equal(again.edited(*states_and_place()), intervention.edited(*states_and_place()))


def test_the_written_form_is_plain():
    clamp = Clamp(Neurons(3, (7, 2), "mlp"), scope="all", low=(0.0, 1.0), high=(2.0, 1.5))
    assert clamp.to_dict() == {
        "kind": "clamp",
        "neurons": {"layer": 3, "units": [7, 2], "component": "mlp"},
        "scope": "all",
        "low": [0.0, 1.0],
        "high": [2.0, 1.5],
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "clmp"}, "There is no intervention 'clmp'; the kinds are .*Did you mean 'clamp'"),
        (
            {"factor": 2.0},
            "The intervention 'clamp' was given kind, neurons, scope, low, high, factor; kind, neurons, scope, "
            "low, high were expected.",
        ),
        (
            {"neurons": None},
            "The intervention 'clamp' was given kind, neurons, scope, low, high; kind, neurons, .*expected.",
        ),
        ({"low": [3.0, 1.0]}, "Unit 7 has the bounds 3.0 and 2.0"),
    ],
)
def test_a_written_form_that_cannot_be_is_refused(changes, message):
    clamp = Clamp(Neurons(3, (7, 2), "mlp"), scope="all", low=(0.0, 1.0), high=(2.0, 1.5))
    with pytest.raises(SettingsError, match=message):
        intervention_from_dict(clamp.to_dict() | changes)


def test_a_written_form_without_its_numbers_is_refused():
    with pytest.raises(
        SettingsError, match="The intervention 'scale' was given kind, neurons; kind, neurons, scope, factor"
    ):
        intervention_from_dict({"kind": "scale", "neurons": {"layer": 0, "units": [1]}})
