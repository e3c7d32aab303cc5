"""The contract check holds for what is built in, and every clause of it is seen to fail."""

import json
import re
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from architecture_page import classifier_of
from architectures import TABLE
from planted import LABELS, planted_classifier, planted_examples, random_classifier, random_examples

from synapse.data.examples import Examples
from synapse.model.hooks import with_hidden_states
from synapse.perturb.activations import Intervention, Noise, Scale, Zero
from synapse.perturb.logits import LogitShift
from synapse.perturb.weights import HeadEdit, WeightNoise
from synapse.recording import record
from synapse.sweeping import kinds
from synapse.sweeping.kinds import RECIPES, Kind
from synapse.testing import check_perturbation
from synapse.types import SCOPES, Neurons

STRENGTHS = {"scale": -0.5, "noise": 1.0, "clamp": 0.1, "quantise": 6.0, "steer": 2.0, "patch": 3.0, "rotate": 40.0}
KINDS = [Kind(name, STRENGTHS.get(name, np.nan), "b" if recipe.label else "") for name, recipe in RECIPES.items()]


def labelled(row, n, seed):
    """Return inputs of a row of the table of architectures as examples of its three classes in turn."""
    return Examples(row.inputs(n, seed), tuple(LABELS[i % 3] for i in range(n)), f"{row.name}-{seed}")


@pytest.fixture(scope="module", params=["bert", "Llama, left padding", "T5 encoder, mean pooling"])
def studied(request):
    """A classifier, labelled examples of unequal length, and the activations of others."""
    if request.param == "bert":
        classifier, examples, reference = random_classifier(), random_examples(6, seed=1), random_examples(20, seed=2)
    else:
        row = next(row for row in TABLE if row.name == request.param)
        classifier, examples, reference = classifier_of(row), labelled(row, 6, 1), labelled(row, 20, 2)
    return classifier, examples, record(classifier, reference)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_kind_holds_the_contract_in_every_scope_that_it_fits(kind, scope, studied):
    classifier, examples, activations = studied
    if not kind.fits(scope):
        pytest.skip("no numbers for this scope")
    if activations.reads_several_rows and kind.name in ("clamp", "quantise"):
        pytest.skip("no quantiles of rows are recorded where the head reads several")
    intervention = kind.of(Neurons(1, (3, 17, 8, 2)), scope, activations, seed=4)
    check_perturbation(intervention, classifier, examples)


@pytest.mark.parametrize("component", ["mlp", "attention", "heads", "pooler"])
def test_interventions_inside_blocks_and_before_the_final_map_hold_the_contract(component):
    classifier, examples = random_classifier("bert"), random_examples(5, seed=1)
    layer = len(classifier.sites(component)) - 1
    whole = tuple(range(classifier.sites(component)[layer].width))
    for intervention in (
        Scale(Neurons(layer, whole, component), factor=0.5, scope="all"),
        Noise(Neurons(layer, (2, 5), component), strength=1.0, deviations=(1.0, 2.0)),
    ):
        check_perturbation(intervention, classifier, examples)


@pytest.mark.parametrize(
    "perturbation",
    [
        LogitShift("b", 2.0),
        WeightNoise("block 1", 0.2, seed=3),
        WeightNoise("head", 0.2),
        HeadEdit("head", np.ones((3, 32), dtype=np.float32)),
    ],
    ids=str,
)
def test_perturbations_of_weights_and_logits_hold_the_contract(perturbation):
    check_perturbation(perturbation, random_classifier("bert"), random_examples(5, seed=1).inputs)


def test_examples_that_are_arrays_are_checked_too():
    check_perturbation(Scale(Neurons(0, (1, 2)), factor=2.0), planted_classifier(), planted_examples(6, seed=1).inputs)


# --------------------------------------------------------------------------------------- perturbations that are broken


@dataclass(frozen=True)
class Doubling(Intervention):
    """What the broken ones are but for one thing."""

    def values(self, x, place, example):
        return 2 * x


class NoDataclass:
    @contextmanager
    def applied(self, classifier):
        yield


@dataclass
class NotFrozen(NoDataclass):
    amount: float = 0.0


@dataclass(frozen=True)
class HoldsAList(NoDataclass):
    amounts: list = field(default_factory=list)


@dataclass(frozen=True)
class HoldsATensor(Doubling):
    vector: torch.Tensor = field(default_factory=lambda: torch.ones(3))


@dataclass(frozen=True)
class ForgetsAField(Doubling):
    factor: float = 2.0

    def to_dict(self):
        written = super().to_dict()
        del written["factor"]
        return written


@dataclass(frozen=True)
class LeavesWeights(NoDataclass):
    @contextmanager
    def applied(self, classifier):
        with torch.no_grad():
            classifier.final.weight.add_(0.1)
        yield


@dataclass(frozen=True)
class LeavesWeightsAfterAnError(NoDataclass):
    @contextmanager
    def applied(self, classifier):
        saved = classifier.final.weight.detach().clone()
        with torch.no_grad():
            classifier.final.weight.add_(0.1)
        yield
        with torch.no_grad():
            classifier.final.weight.copy_(saved)


@dataclass(frozen=True)
class LeavesAHook(NoDataclass):
    @contextmanager
    def applied(self, classifier):
        classifier.blocks[1].register_forward_hook(lambda *_: None)
        yield


@dataclass(frozen=True)
class LeavesAMethod(NoDataclass):
    @contextmanager
    def applied(self, classifier):
        module = classifier.blocks[1]
        module.forward = module.forward
        yield


@dataclass(frozen=True)
class LeavesLogits(NoDataclass):
    @contextmanager
    def applied(self, classifier):
        classifier._logit_edits.append(lambda logits: logits + 1)
        yield


@dataclass(frozen=True)
class SwallowsErrors(NoDataclass):
    @contextmanager
    def applied(self, classifier):
        with suppress(Exception):
            yield


@dataclass(frozen=True)
class ChangesInputs(NoDataclass):
    @contextmanager
    def applied(self, classifier):
        preprocess = classifier.preprocess

        def overwriting(inputs):
            for ids in inputs:
                ids[1] = 3
            return preprocess(inputs)

        classifier.preprocess = overwriting
        try:
            yield
        finally:
            classifier.preprocess = preprocess


@dataclass(frozen=True)
class ChangesStates(Doubling):
    def values(self, x, place, example):
        return x.mul_(2)


@dataclass(frozen=True)
class DrawsAnew(Doubling):
    def values(self, x, place, example):
        return x + torch.randn(x.shape)


@dataclass(frozen=True)
class KnowsItsPosition(Doubling):
    def values(self, x, place, example):
        return x + example[:, None]


@dataclass(frozen=True)
class KnowsItsNeighbours(Doubling):
    def values(self, x, place, example):
        return x - x.mean(dim=0)


@dataclass(frozen=True)
class CountsPasses(NoDataclass):
    @contextmanager
    def applied(self, classifier):
        passes = []

        def later(logits):
            passes.append(1)
            return logits + len(passes)

        with classifier.logits_edited(later):
            yield


@dataclass(frozen=True)
class EditsOtherRows(Doubling):
    def edited(self, states, place):
        edited = states.clone()
        edited[..., list(self.neurons.units)] *= 2
        return edited


@dataclass(frozen=True)
class EditsOtherNeurons(Doubling):
    def edited(self, states, place):
        edited = super().edited(states, place)
        edited[..., 0] += place.rows
        return edited


@dataclass(frozen=True)
class EditsOtherLayers(Doubling):
    @contextmanager
    def applied(self, classifier):
        def hook(_module, _inputs, output):
            return with_hidden_states(output, 2 * (output[0] if isinstance(output, tuple) else output))

        handle = classifier.blocks[2].register_forward_hook(hook)
        try:
            with super().applied(classifier):
                yield
        finally:
            handle.remove()


@dataclass(frozen=True)
class EditsBelow(Doubling):
    @contextmanager
    def applied(self, classifier):
        embedding = classifier.module.get_input_embeddings()
        handle = embedding.register_forward_hook(lambda _m, _i, output: 2 * output)
        try:
            with super().applied(classifier):
                yield
        finally:
            handle.remove()


NEURONS = Neurons(1, (3, 17, 8))
WHOLE = Neurons(1, tuple(range(32)))
EVERY_ROW = {"scope": "all"}

BROKEN = [
    (NoDataclass(), "is no frozen dataclass: write `@dataclass(frozen=True)` above the class."),
    (NotFrozen(), "is no frozen dataclass: write `@dataclass(frozen=True)` above the class."),
    (HoldsAList(), "cannot be hashed (unhashable type: 'list'): use numbers, strings and tuples as fields"),
    (HoldsATensor(NEURONS), "does not serialise: its fields must be plain numbers, strings and tuples"),
    (ForgetsAField(NEURONS, factor=3.0), "is another one after `to_dict` and `intervention_from_dict`."),
    (LeavesWeights(), "leaves other weights behind after the block."),
    (LeavesWeightsAfterAnError(), "leaves other weights behind after an error inside the block."),
    (LeavesAHook(), "leaves a hook, a method or a mode behind on 'bert.encoder.layer.1' after the block."),
    (LeavesAMethod(), "leaves a hook, a method or a mode behind on 'bert.encoder.layer.1' after the block."),
    (LeavesLogits(), "leaves other logits behind after the block."),
    (SwallowsErrors(), "keeps an error inside the block from the caller: do not catch it, use `finally`."),
    (ChangesStates(WHOLE, **EVERY_ROW), "changes the 'residual' states of layer 1 in place: clone what you are given."),
    (DrawsAnew(NEURONS), "gives other logits when it is applied again: draw what is random from a seed of its own."),
    (KnowsItsPosition(NEURONS), "depends on the order of the examples: logits differ by"),
    (KnowsItsNeighbours(NEURONS), "depends on which examples share a batch, or their padding: logits differ by"),
    (CountsPasses(), "depends on the batch size: logits differ by"),
    (EditsOtherRows(NEURONS), "edits rows of the 'residual' states of layer 1 that it does not declare."),
    (EditsOtherNeurons(NEURONS), "edits neurons of the 'residual' states of layer 1 that it does not declare."),
    (EditsOtherLayers(NEURONS), "edits the 'residual' states of layer 2, which it does not declare."),
    (EditsBelow(NEURONS), "changes the 'residual' states of layer 0 before its own edit, where nothing was to change"),
]


@pytest.mark.parametrize(("broken", "clause"), BROKEN, ids=[type(broken).__name__ for broken, _ in BROKEN])
def test_every_clause_is_seen_to_fail(broken, clause):
    with pytest.raises(AssertionError) as caught:
        check_perturbation(broken, random_classifier("bert"), random_examples(5, seed=1))
    assert str(caught.value).startswith(f"{type(broken).__name__} {clause}")


def test_inputs_that_are_changed_in_place_are_seen():
    with pytest.raises(AssertionError, match="ChangesInputs changes the inputs in place"):
        check_perturbation(ChangesInputs(), planted_classifier(), list(planted_examples(6, seed=1).inputs))


def test_what_the_broken_ones_are_made_from_holds():
    check_perturbation(Doubling(NEURONS), random_classifier("bert"), random_examples(5, seed=1))
    assert json.dumps(Doubling(NEURONS).to_dict()).startswith('{"kind": "doubling"')


def test_a_clean_check_leaves_the_classifier_as_it_was():
    classifier = random_classifier("bert")
    before, most = classifier.weights_hash(), classifier.max_tokens
    check_perturbation(Zero(NEURONS, scope="all"), classifier, random_examples(5, seed=1))
    assert (classifier.weights_hash(), classifier.max_tokens) == (before, most)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in classifier.module.modules())


PAGE = Path(__file__).parents[1] / "docs" / "interventions.md"


def test_the_python_examples_of_the_page_of_interventions_run(monkeypatch):
    monkeypatch.setattr(kinds, "RECIPES", dict(RECIPES))  # the page adds a line to it
    classifier, examples = random_classifier("bert"), random_examples(6, seed=1)
    names = {"classifier": classifier, "examples": examples, "__name__": "page"}
    names["activations"] = record(classifier, random_examples(20, seed=2))
    for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL):
        exec(code, names)
    made = names["kind"].of(names["neurons"], "readout", names["activations"])
    assert made == names["SoftThreshold"](names["neurons"], thresholds=(0.2, 0.2, 0.2))


def test_the_page_of_interventions_lists_every_kind_with_its_scopes():
    rows = re.findall(r"^\| `([a-z-]+)` \| .* \| (.*) \|$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    words = {"any": SCOPES, "all but onward": ("readout", "all", "non-padding"), "`readout`": ("readout",)}
    assert {name: words[scopes] for name, scopes in rows} == {
        kind.name: tuple(scope for scope in SCOPES if kind.fits(scope)) for kind in KINDS
    }
