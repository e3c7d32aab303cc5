"""Attributions are those that plain hooks, autograd and sums over many small steps give, one example at a time."""

import numpy as np
import pytest
import torch
from planted import (
    B_UNIT,
    C_UNIT,
    LABELS,
    planted_classifier,
    planted_examples,
    random_classifier,
    random_examples,
    token_preprocess,
)
from torch import nn

from synapse.errors import ModelError, SettingsError
from synapse.model.classifier import Classifier
from synapse.ranking import rank
from synapse.ranking.gradients import (
    AttributionPatching,
    Conductance,
    GradientXActivation,
    IntegratedGradients,
    InternalInfluence,
    Taylor,
)
from synapse.recording import record

METHODS = [
    GradientXActivation(),
    GradientXActivation(mean="magnitude"),
    Taylor(),
    AttributionPatching(),
    IntegratedGradients(),
    IntegratedGradients(baseline="zero"),
    Conductance(),
    InternalInfluence(),
]
ROW = {"bert": 0, "gpt2": -1}


def named(methods):
    return pytest.mark.parametrize("method", methods, ids=lambda method: method.name)


def ranked(classifier, examples, method, component="residual"):
    recorded = record(classifier, examples, component=component)
    return rank(recorded, method=method, classifier=classifier, examples=examples)


class Hooked:
    """Copies of one example side by side in the plain module: block outputs and gradients, by hooks written here."""

    def __init__(self, classifier, text, label):
        self.module, self.blocks = classifier.module, classifier.blocks
        self.text, self.label = text, LABELS.index(label)

    def logits(self, edits=(), copies=1):
        """Return the logits, with `edits` (module -> function of its hidden states) made on the way."""
        handles = []
        for module, edit in edits:

            def hook(_module, _arguments, output, edit=edit):
                first, rest = (output[0], output[1:]) if isinstance(output, tuple) else (output, None)
                return edit(first) if rest is None else (edit(first), *rest)

            handles.append(module.register_forward_hook(hook))
        logits = self.module(**token_preprocess([self.text] * copies)).logits
        for handle in handles:
            handle.remove()
        return logits

    def states_and_gradients(self, objective, edits=(), copies=1):
        """Return (layer, copy, token, unit) twice."""
        kept = []

        def keep(states):
            kept.append(states)
            return states

        logits = self.logits([*edits, *((block, keep) for block in self.blocks)], copies)
        gradients = torch.autograd.grad(objective(logits), kept, materialize_grads=True)
        return torch.stack(kept).detach(), torch.stack(gradients)

    def own_logit(self, logits):
        return logits[:, self.label].sum()

    def loss(self, logits):
        return -torch.log_softmax(logits, dim=1)[:, self.label].sum()


def by_hand(classifier, examples, of_example):
    """Return the mean over examples, and over those of each class, of (layer, unit) for each example."""
    found = []
    for text, label in zip(examples.inputs, examples.labels, strict=True):
        found.append(of_example(Hooked(classifier, text, label)).numpy())
    found, labels = np.array(found), np.array(examples.labels)
    rows = [found.mean(axis=0), *(found[labels == label].mean(axis=0) for label in LABELS)]
    return np.stack(rows, axis=1)


def assert_close(found, expected, tolerance=1e-4):
    np.testing.assert_allclose(found, expected, atol=tolerance * np.abs(expected).max())


@named(METHODS)
def test_the_planted_neurons_come_first(method):
    ranking = ranked(planted_classifier(), planted_examples(60, seed=1), method)
    for layer in (0, 1):
        assert ranking.order(layer, "b")[0] == B_UNIT
        assert ranking.order(layer, "c")[0] == C_UNIT
        assert set(ranking.order(layer)[:2]) == {B_UNIT, C_UNIT}


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_gradient_times_activation_is_that_of_autograd_for_each_example_alone(architecture):
    examples, classifier = random_examples(9, seed=3), random_classifier(architecture)
    ranking = ranked(classifier, examples, GradientXActivation())

    def of_example(one):
        x, gradients = one.states_and_gradients(one.own_logit)
        return (x * gradients)[:, 0, ROW[architecture]]

    assert_close(ranking.signed, by_hand(classifier, examples, of_example))
    np.testing.assert_array_equal(ranking.scores, np.abs(ranking.signed))


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_taylor_is_the_mean_magnitude_of_activation_times_gradient_of_the_loss(architecture):
    examples, classifier = random_examples(9, seed=3), random_classifier(architecture)
    ranking = ranked(classifier, examples, Taylor())

    def of_example(one):
        x, gradients = one.states_and_gradients(one.loss)
        return (x * gradients)[:, 0, ROW[architecture]].abs()

    assert_close(ranking.scores, by_hand(classifier, examples, of_example))
    assert ranking.signed is None


def recorded_means(classifier, examples):
    return torch.from_numpy(record(classifier, examples).values.mean(axis=1))


def test_attribution_patching_takes_the_distance_from_the_mean():
    examples, classifier = random_examples(9, seed=3), random_classifier()
    base = recorded_means(classifier, examples)
    ranking = ranked(classifier, examples, AttributionPatching())

    def of_example(one):
        x, gradients = one.states_and_gradients(one.own_logit)
        return (x[:, 0, 0] - base) * gradients[:, 0, 0]

    assert_close(ranking.signed, by_hand(classifier, examples, of_example))


def moved_to(base, alphas, row):
    """Return an edit that moves one row of each copy towards the base: base + alpha (x - base)."""

    def edit(states):
        states = states.detach().clone()
        states[:, row] = base + alphas[:, None] * (states[:, row] - base)
        return states.requires_grad_()

    return edit


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_integrated_gradients_add_up_to_what_the_path_changes(architecture):
    examples, classifier = random_examples(6, seed=5), random_classifier(architecture)
    base = recorded_means(classifier, examples)
    ranking = ranked(classifier, examples, IntegratedGradients(steps=64))

    for layer, block in enumerate(classifier.blocks):
        changes = []
        for text, label in zip(examples.inputs, examples.labels, strict=True):
            one = Hooked(classifier, text, label)
            edit = moved_to(base[layer], torch.tensor([0.0, 1.0]), ROW[architecture])
            at_base, at_state = one.logits([(block, edit)], copies=2)[:, one.label].tolist()
            changes.append(at_state - at_base)
        tolerance = 1e-4 * max(1, np.abs(changes).max())
        assert ranking.signed[layer, 0].sum() == pytest.approx(np.mean(changes), abs=tolerance)


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_integrated_gradients_are_the_sum_over_many_small_steps(architecture):
    examples, classifier = random_examples(3, seed=5), random_classifier(architecture)
    base, row = recorded_means(classifier, examples), ROW[architecture]
    ranking = ranked(classifier, examples, IntegratedGradients(steps=32))
    alphas = (torch.arange(300) + 0.5) / 300

    def of_example(one):
        x, _ = one.states_and_gradients(one.own_logit)
        found = []
        for layer, block in enumerate(one.blocks):
            path = [(block, moved_to(base[layer], alphas, row))]
            _, gradients = one.states_and_gradients(one.own_logit, path, copies=300)
            found.append((x[layer, 0, row] - base[layer]) * gradients[layer, :, row].mean(dim=0))
        return torch.stack(found)

    assert_close(ranking.signed, by_hand(classifier, examples, of_example), 1e-3)


def test_integrated_gradients_are_the_same_without_the_prefix(monkeypatch, caplog):
    examples, classifier = random_examples(5, seed=6), random_classifier()
    expected = ranked(classifier, examples, IntegratedGradients(steps=3))
    assert not caplog.records

    def refuse(*_arguments):
        raise NotImplementedError("no replay here")

    monkeypatch.setattr("synapse.ranking.gradients.passed_over", refuse)
    found = ranked(classifier, examples, IntegratedGradients(steps=3))
    assert_close(found.signed, expected.signed)
    assert "residual of layer 0: the whole model is run for each step" in caplog.text
    assert "no replay here" in caplog.text


def with_biases():
    """Return a model that also does something with nothing: without biases, all rows of embeddings 0 stay 0."""
    classifier = random_classifier()
    torch.manual_seed(1)
    for name, parameter in classifier.module.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.5)
    return classifier


def along_the_input(one, alphas):
    """Return states and gradients of row 0, (layer, point, unit), for the embeddings times each alpha."""
    scaled = (one.module.bert.embeddings, lambda states: states * alphas[:, None, None])
    states, gradients = one.states_and_gradients(one.own_logit, [scaled], copies=len(alphas))
    return states[:, :, 0], gradients[:, :, 0]


def test_conductance_is_the_sum_of_gradients_times_changes_over_many_small_steps():
    examples, classifier = random_examples(3, seed=7), with_biases()
    ranking = ranked(classifier, examples, Conductance(steps=200))

    def of_example(one):
        states, gradients = along_the_input(one, torch.linspace(0, 1, 501))
        middle = (gradients[:, 1:] + gradients[:, :-1]) / 2
        return (middle * states.diff(dim=1)).sum(dim=1)

    assert_close(ranking.signed, by_hand(classifier, examples, of_example), 2e-3)


def test_conductance_of_the_last_layer_adds_up_to_what_the_input_changes():
    examples, classifier = random_examples(4, seed=8), with_biases()
    ranking = ranked(classifier, examples, Conductance(steps=100))
    changes = []
    for text, label in zip(examples.inputs, examples.labels, strict=True):
        one = Hooked(classifier, text, label)
        nothing = one.logits([(classifier.module.bert.embeddings, torch.zeros_like)])
        changes.append((one.logits() - nothing)[0, one.label].item())
    assert ranking.signed[-1, 0].sum() == pytest.approx(np.mean(changes), abs=1e-3 * np.abs(changes).max())


def test_internal_influence_is_the_mean_gradient_along_the_input():
    examples, classifier = random_examples(3, seed=7), with_biases()
    ranking = ranked(classifier, examples, InternalInfluence(steps=100))

    def of_example(one):
        return along_the_input(one, (torch.arange(500) + 0.5) / 500)[1].mean(dim=1)

    assert_close(ranking.signed, by_hand(classifier, examples, of_example), 2e-3)


@named([GradientXActivation(), IntegratedGradients(baseline="zero", steps=2)])
def test_at_the_input_of_the_final_map_the_attribution_is_weight_times_feature(method):
    examples, classifier = random_examples(12, seed=2), random_classifier()
    recorded = record(classifier, examples, component="pooler")
    ranking = rank(recorded, method=method, classifier=classifier, examples=examples)
    weight = classifier.module.classifier.weight.detach().numpy()
    expected = recorded.features * weight[recorded.targets]
    np.testing.assert_allclose(ranking.signed[0, 0], expected.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(ranking.signed[0, 2], expected[recorded.targets == 1].mean(axis=0), atol=1e-5)


class MeanReader(nn.Module):
    """Two blocks and a head that reads the mean of the rows; the second block is followed by nothing but the head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(100, 8)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2)])
        self.head = nn.Linear(8, 3)

    def forward(self, input_ids, attention_mask):
        hidden = self.embedding(input_ids)
        for block in self.blocks:
            hidden = block(hidden)
        there = attention_mask[:, :, None]
        return self.head((hidden * there).sum(dim=1) / there.sum(dim=1))


def mean_reader():
    texts = random_examples(4, seed=9).inputs
    return Classifier.from_module(MeanReader().eval(), preprocess=token_preprocess, labels=LABELS, sample=texts)


@named([GradientXActivation(), IntegratedGradients(baseline="zero", steps=2)])
def test_where_the_head_reads_several_rows_their_attributions_are_summed(method):
    examples, classifier = random_examples(9, seed=1), mean_reader()
    recorded = record(classifier, examples)
    ranking = rank(recorded, method=method, classifier=classifier, examples=examples)
    # z_y = W_y . mean of the rows + b, so that the sum over rows of x dz/dx is W_y times the mean
    weight = classifier.module.head.weight.detach().numpy()
    expected = (recorded.values[1] * weight[recorded.targets]).mean(axis=0)
    np.testing.assert_allclose(ranking.signed[1, 0], expected, atol=1e-5)


def hooks_of(module):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(part, kind)) for part in module.modules() for kind in kinds)


@named(METHODS)
@pytest.mark.parametrize("component", ["residual", "mlp"])
def test_the_model_comes_back_and_no_parameter_has_a_gradient(method, component):
    examples, classifier = random_examples(5, seed=4), random_classifier()
    before, hooks = classifier.weights_hash(), hooks_of(classifier.module)
    ranking = ranked(classifier, examples, method, component)
    assert ranking.scores.any(axis=2).all()
    assert classifier.weights_hash() == before
    assert hooks_of(classifier.module) == hooks
    assert all(p.grad is None and p.requires_grad for p in classifier.module.parameters())


@named([GradientXActivation(), IntegratedGradients(steps=2), Conductance(steps=2)])
def test_the_model_comes_back_after_an_error(method):
    examples, classifier = random_examples(5, seed=4), random_classifier()
    recorded, before, hooks = record(classifier, examples), classifier.weights_hash(), hooks_of(classifier.module)

    def fail(*_arguments):
        if torch.is_grad_enabled():
            raise ValueError("broken head")

    handle = classifier.module.classifier.register_forward_hook(fail)
    with pytest.raises(ValueError, match="broken head"):
        rank(recorded, method=method, classifier=classifier, examples=examples)
    handle.remove()
    assert classifier.weights_hash() == before
    assert hooks_of(classifier.module) == hooks
    assert all(p.grad is None for p in classifier.module.parameters())


@named([GradientXActivation(), IntegratedGradients(steps=2), Conductance(steps=2)])
def test_neither_frozen_parameters_nor_inference_mode_nor_the_batches_make_a_difference(method):
    examples, classifier = random_examples(10, seed=4), random_classifier()
    expected = ranked(classifier, examples, method)
    other = random_classifier()
    other.module.requires_grad_(False)
    other.max_tokens = 20
    with torch.inference_mode():
        found = ranked(other, examples, method)
    assert_close(found.signed, expected.signed)
    assert not any(p.requires_grad for p in other.module.parameters())


def test_magnitudes_do_not_cancel_where_attributions_do():
    examples, classifier = random_examples(10, seed=4), random_classifier()
    signed = ranked(classifier, examples, GradientXActivation())
    magnitude = ranked(classifier, examples, GradientXActivation(mean="magnitude"))
    assert (magnitude.scores >= signed.scores - 1e-9).all()
    assert (magnitude.scores > signed.scores + 1e-6).any()
    assert (magnitude.method, magnitude.signed) == ("gradient-x-activation-magnitude", None)


@named(METHODS)
def test_a_class_without_an_example_scores_nothing_and_one_example_is_enough(method):
    every = planted_examples(30, seed=1)
    few = every.take([1, 4, 2])  # two of class b, one of class c
    ranking = ranked(planted_classifier(), few, method)
    assert not ranking.scores[:, 1].any()
    assert ranking.order(1, "b")[0] == B_UNIT
    assert ranking.order(1, "c")[0] == C_UNIT or isinstance(method, AttributionPatching)


def test_a_sample_is_drawn_from_every_class():
    classifier, examples = planted_classifier(), planted_examples(60, seed=1)
    some = ranked(classifier, examples, IntegratedGradients(examples=6, seed=2))
    assert some.signed[1, 2, B_UNIT] != 0
    assert some.signed[1, 3, C_UNIT] != 0
    np.testing.assert_array_equal(
        some.signed, ranked(classifier, examples, IntegratedGradients(examples=6, seed=2)).signed
    )


class WithoutGradient(MeanReader):
    def forward(self, input_ids, attention_mask):
        with torch.no_grad():
            return super().forward(input_ids, attention_mask)


def unchecked(method, **values):
    """Return the method with parameters of types that are refused while tests run."""
    for name, value in values.items():
        object.__setattr__(method, name, value)
    return method


def test_what_cannot_be_is_refused():
    examples, classifier = random_examples(5, seed=4), random_classifier()
    recorded = record(classifier, examples)
    refused = {
        r"^The mean is 'absolute'; one of signed, magnitude was expected\.$": unchecked(Taylor(), mean="absolute"),
        r"^The baseline is 'zeros'; one of mean, zero was expected\. Did you mean 'zero'\?$": unchecked(
            IntegratedGradients(), baseline="zeros"
        ),
        r"^0 steps were asked for; 1 or more were expected\.$": IntegratedGradients(steps=0),
        r"^A sample of 0 examples was asked for": Taylor(examples=0),
    }
    for message, method in refused.items():
        with pytest.raises(SettingsError, match=message):
            rank(recorded, method=method, classifier=classifier, examples=examples)
    with pytest.raises(
        SettingsError, match=r"^The classifier has 2 layers of 8 units, and the activations 3 of 32; pa"
    ):
        rank(recorded, method=Taylor(), classifier=mean_reader(), examples=examples)
    with pytest.raises(SettingsError, match="was given no classifier"):
        rank(recorded, method=Taylor())

    silent = WithoutGradient().eval()
    blind = Classifier.from_module(silent, preprocess=token_preprocess, labels=LABELS, sample=examples.inputs)
    with pytest.raises(ModelError, match=r"^The logits have no gradient: .* Rank by a method that needs none"):
        ranked(blind, examples, Taylor())


# --------------------------------------------------------------------------------------------------------------- captum


class FromRow(nn.Module):
    """The plain module as a function of the embeddings, for tools that want a tensor to differentiate by."""

    def __init__(self, module, mask):
        super().__init__()
        self.module, self.mask = module, mask

    def forward(self, embedded):
        handle = self.module.bert.embeddings.register_forward_hook(lambda *_: embedded)
        try:
            return self.module(
                input_ids=torch.zeros(embedded.shape[:2], dtype=torch.long),
                attention_mask=self.mask.expand(len(embedded), -1),
            ).logits
        finally:
            handle.remove()


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_captum_agrees(layer):
    attr = pytest.importorskip("captum.attr")
    examples, classifier = random_examples(1, seed=3), with_biases()
    inputs, label = token_preprocess(list(examples.inputs)), LABELS.index(examples.labels[0])
    embedded = classifier.module.bert.embeddings(inputs["input_ids"]).detach()
    model, block = FromRow(classifier.module, inputs["attention_mask"]), classifier.blocks[layer]
    asked = {"target": label, "attribute_to_layer_input": False}

    expected = attr.LayerGradientXActivation(model, block).attribute(embedded, **asked)
    found = ranked(classifier, examples, GradientXActivation())
    assert_close(found.signed[layer, 0], expected[0, 0].detach().numpy())

    expected = attr.LayerConductance(model, block).attribute(embedded, n_steps=1000, **asked)
    found = ranked(classifier, examples, Conductance(steps=100))
    assert_close(found.signed[layer, 0], expected[0, 0].detach().numpy(), 5e-3)

    expected = attr.InternalInfluence(model, block).attribute(embedded, n_steps=100, **asked)
    found = ranked(classifier, examples, InternalInfluence(steps=100))
    assert_close(found.signed[layer, 0], expected[0, 0].detach().numpy())
