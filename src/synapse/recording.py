"""Record the readout state of every layer for every example."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from itertools import chain

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from synapse.data.examples import Examples
from synapse.errors import ModelError, SettingsError
from synapse.model.classifier import Classifier
from synapse.model.resume import clean_pass
from synapse.types import Activations, Component, Progress, silent


def record(
    classifier: Classifier, examples: Examples, *, component: Component = "residual", progress: Progress = silent
) -> Activations:
    """Return the readout states of a component in all layers, the logits and the features of every example.

    Each example is run once, in batches of like length; the result is in the order of the examples and depends on
    neither batch size nor padding beyond float tolerance.

    Raises:
        LabelError: the examples' labels are not those of the classifier.
        SettingsError: the classifier has no such component; the message says why.
        ModelError: a state or a logit is not finite.
    """
    return record_components(classifier, examples, [component], progress=progress)[component]


def record_components(
    classifier: Classifier, examples: Examples, components: Sequence[Component], *, progress: Progress = silent
) -> Mapping[Component, Activations]:
    """Return the activations of several components from one pass over the examples; otherwise as `record`."""
    targets = examples.targets(classifier.labels)
    taken = {component: _Taken(classifier, component, len(examples)) for component in components}
    logits = np.empty((len(examples), len(classifier.labels)), dtype=np.float32)
    features: np.ndarray | None = None
    done = 0
    for batch in classifier.batches(examples.inputs):
        clean = clean_pass(classifier, batch, [name for name in components if name != "residual"])
        for component, part in taken.items():
            for layer, (site, states) in enumerate(zip(part.sites, clean.of(component), strict=True)):
                state = classifier.readout_state(batch, site, states)
                part.values[layer, batch.index] = state.cpu().numpy()
                one_row = site.layout == "example unit"
                there = None if one_row else classifier.anatomy.rows.rows(batch.inputs, states.shape[1])
                part.moments.add(layer, states, there)
        logits[batch.index] = clean.logits.float().cpu().numpy()
        if clean.features is not None:
            if features is None:
                features = np.empty((len(examples), clean.features.shape[1]), dtype=np.float32)
            features[batch.index] = clean.features.cpu().numpy()
        done += len(batch.index)
        progress(done, len(examples))
    if not (all(np.isfinite(part.values).all() for part in taken.values()) and np.isfinite(logits).all()):
        raise ModelError(
            "The model gave states or logits that are not finite (NaN or infinity) for some examples; load it in "
            "float32, or leave out the examples that cause it."
        )
    return {
        component: Activations(
            values=part.values,
            logits=logits,
            features=features,
            targets=targets,
            labels=classifier.labels,
            row_mean=part.moments.mean(),
            row_deviation=part.moments.deviation(),
            source=examples.fingerprint,
            component=component,
            reads_several_rows=classifier.anatomy.readout not in ("first", "last"),
        )
        for component, part in taken.items()
    }


def record_untrained(
    classifier: Classifier,
    examples: Examples,
    *,
    component: Component = "residual",
    seed: int = 0,
    progress: Progress = silent,
) -> Activations:
    """Return what `record` would, had the classifier learned nothing: the control of what training put into a state.

    The model is of the same architecture with random weights, drawn by the architecture's own initialiser where it is
    of the model library. Weights that no initialiser changes are permuted, each tensor within itself, which keeps their
    distribution. The given classifier is left as it is. Its anatomy is taken over, not proved again.

    The logits are those of the random model: give probes the gold labels, or the given classifier's predictions.

    Raises:
        SettingsError: a block holds quantised weights only, which cannot be drawn anew; or as `record`.
        LabelError, ModelError: as `record`.

    *Source*: Zhang & Bowman (BlackboxNLP 2018), arXiv 1809.10040.
    """
    for name, block in zip(classifier.anatomy.blocks, classifier.blocks, strict=True):
        if not any(weight.ndim >= 2 and weight.is_floating_point() for weight in block.parameters()):
            raise SettingsError(
                f"The block {name!r} holds quantised weights, or none, so it cannot be given random ones; load the "
                "model as it was before quantisation."
            )
    untrained = Classifier(
        reinitialised(classifier.module, seed).to(classifier.device),
        classifier.preprocess,
        classifier.labels,
        classifier.anatomy,
        name=f"{classifier.name}, untrained",
        device=classifier.device,
        longest_sample=classifier.longest_sample,
        notes=classifier.notes,
    )
    untrained.max_tokens = classifier.max_tokens
    return record(untrained, examples, component=component, progress=progress)


def reinitialised(module: nn.Module, seed: int) -> nn.Module:
    """Return a copy of a module, on the CPU, with random weights, as `record_untrained` says."""
    fresh = deepcopy(module).cpu()
    for part in chain(fresh.modules(), fresh.parameters(), fresh.buffers()):
        # The model library marks what it has loaded, and leaves that alone.
        vars(part).pop("_is_hf_initialized", None)
    learned = dict(module.named_parameters())
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for part in _library_models(fresh):
            part.init_weights()
        for name, weight in fresh.named_parameters():
            if torch.equal(weight, learned[name].cpu()):
                weight.copy_(weight.flatten()[torch.randperm(weight.numel())].view_as(weight))
    return fresh


def _library_models(module: nn.Module) -> list[PreTrainedModel]:
    """Return the outermost models of the model library: each initialises all that is in it."""
    if isinstance(module, PreTrainedModel):
        return [module]
    return [model for child in module.children() for model in _library_models(child)]


class _Taken:
    """What has been taken of one component so far."""

    def __init__(self, classifier: Classifier, component: Component, n_examples: int) -> None:
        self.sites = classifier.sites(component)
        width = self.sites[0].width
        self.values = np.empty((len(self.sites), n_examples, width), dtype=np.float32)
        self.moments = _RowMoments(len(self.sites), width)


class _RowMoments:
    """Mean and deviation of every unit over all rows that are no padding, merged batch by batch.

    Source: Chan, Golub and LeVeque (1979), the pairwise update of means and sums of squares.
    """

    def __init__(self, n_layers: int, width: int) -> None:
        self.counts = np.zeros(n_layers, dtype=np.int64)
        self.means = np.zeros((n_layers, width))
        self.squares = np.zeros((n_layers, width))

    def add(
        self, layer: int, states: Float[Tensor, "example token unit"], there: Bool[Tensor, "example token"] | None
    ) -> None:
        # (example, token, unit) -> (row, unit), padding rows left out
        rows = (states.flatten(0, 1) if there is None else states[there]).double()
        count, n, mean = self.counts[layer], len(rows), rows.mean(dim=0)
        shift = mean.cpu().numpy() - self.means[layer]
        self.squares[layer] += (rows - mean).square().sum(dim=0).cpu().numpy()
        self.squares[layer] += shift**2 * (count * n / (count + n))
        self.means[layer] += shift * (n / (count + n))
        self.counts[layer] += n

    def mean(self) -> np.ndarray:
        return self.means.astype(np.float32)

    def deviation(self) -> np.ndarray:
        return np.sqrt(self.squares / np.maximum(self.counts, 1)[:, None]).astype(np.float32)
