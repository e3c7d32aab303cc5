import numpy as np
import pytest
import torch
from architecture_page import classifier_of
from architectures import TABLE
from planted import B_UNIT, C_UNIT, planted_classifier, planted_examples, random_classifier, random_examples

from synapse.errors import SettingsError
from synapse.model.hooks import hidden_states
from synapse.perturb.activations import Mean, Noise, Scale, Zero
from synapse.types import Neurons

UNITS = (3, 17, 8)
RNG = np.random.default_rng(5)
MEANS = tuple(float(v) for v in RNG.normal(size=3))


def by_hand(classifier, examples, layers, rows, edit):
    """Predict one example at a time under hooks written here, without anything of the library's."""
    logits = []
    for text in examples.inputs:
        inputs = classifier.preprocess([text])
        n_tokens = inputs["input_ids"].shape[1]
        readout = 0 if classifier.anatomy.readout == "first" else n_tokens - 1

        def hook(_module, _inputs, output, readout=readout):
            states = (output[0] if isinstance(output, tuple) else output).clone()
            where = slice(None) if rows == "all" else slice(readout, readout + 1)
            for position, unit in enumerate(UNITS):
                states[:, where, unit] = edit(states[:, where, unit], position)
            return (states, *output[1:]) if isinstance(output, tuple) else states

        handles = [classifier.blocks[layer].register_forward_hook(hook) for layer in layers]
        with torch.inference_mode():
            logits.append(classifier.module(**inputs).logits[0].numpy())
        for handle in handles:
            handle.remove()
    return np.stack(logits)


EDITS = {
    "zero": (lambda neurons, scope: Zero(neurons, scope=scope), lambda value, _: 0 * value),
    "scale": (lambda neurons, scope: Scale(neurons, scope=scope, factor=-0.5), lambda value, _: -0.5 * value),
    "mean": (
        lambda neurons, scope: Mean(neurons, scope=scope, values=MEANS),
        lambda value, position: 0 * value + MEANS[position],
    ),
}
SCOPES = {"readout": ([1], "readout"), "readout-onward": ([1, 2], "readout"), "all": ([1], "all")}


# The means of one layer are refused at later ones, so that pair is not in the table.
PAIRS = [(kind, scope) for kind in EDITS for scope in SCOPES if (kind, scope) != ("mean", "readout-onward")]


@pytest.mark.parametrize("architecture", ["bert", "distilbert", "gpt2"])
@pytest.mark.parametrize(("kind", "scope"), PAIRS)
def test_an_intervention_does_what_hooks_written_by_hand_do(architecture, scope, kind):
    classifier, examples = random_classifier(architecture), random_examples(8, seed=3)
    make, edit = EDITS[kind]
    layers, rows = SCOPES[scope]
    with classifier.edited(make(Neurons(1, UNITS), scope)):
        edited = classifier.predict(examples)
    np.testing.assert_allclose(edited, by_hand(classifier, examples, layers, rows, edit), atol=2e-5)


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
    scale, mean = Scale(Neurons(1, (B_UNIT,)), factor=3.0), Mean(Neurons(1, (B_UNIT,)), values=(2.0,))
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


@pytest.mark.parametrize(
    ("intervention", "message"),
    [
        (Zero(Neurons(2, (0,))), "Layer 2 was asked for; the classifier has the layers 0 to 1 of 'residual'."),
        (
            Zero(Neurons(0, (16,))),
            "Unit 16 was asked for; the classifier has the units 0 to 15 in each layer of 'residual'.",
        ),
        (Zero(Neurons(0, (1, 1))), "Some units are listed twice"),
        (
            Mean(Neurons(0, (1, 2)), values=(0.0,)),
            "1 values were given for 2 neurons; one each was expected.",
        ),
        (Mean(Neurons(0, (1,)), values=(0.0,), scope="readout-onward"), "Mean carries numbers of one layer"),
    ],
)
def test_impossible_interventions_are_refused_in_one_sentence(intervention, message):
    classifier = planted_classifier()
    with pytest.raises(SettingsError) as caught, classifier.edited(intervention):
        classifier.predict(planted_examples(3, seed=0))
    assert str(caught.value).startswith(message)


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
        with classifier.edited(Mean(Neurons(1, (2, 5)), scope=scope, values=(7.0, 7.0))):
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
