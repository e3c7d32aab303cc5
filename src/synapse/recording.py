"""Record the readout state of every layer for every example."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor

from synapse.data.examples import Examples
from synapse.errors import ModelError
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
