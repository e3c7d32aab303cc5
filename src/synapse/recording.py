"""Record the readout-row state of every block for every example."""

import numpy as np
import torch

from synapse.data.examples import Examples
from synapse.errors import ModelError
from synapse.model.classifier import Classifier
from synapse.model.resume import CleanPass, clean_pass
from synapse.types import Activations, Progress, silent


def record(classifier: Classifier, examples: Examples, *, progress: Progress = silent) -> Activations:
    """Return the readout-row states of all blocks, the logits and the features of every example.

    Each example is run once, in batches of like length; the result is in the order of the examples and depends on
    neither batch size nor padding beyond float tolerance.

    Raises:
        LabelError: the examples' labels are not those of the classifier.
        ModelError: a state or a logit is not finite.
    """
    targets = examples.targets(classifier.labels)
    values = np.empty((classifier.n_layers, len(examples), classifier.width), dtype=np.float32)
    logits = np.empty((len(examples), len(classifier.labels)), dtype=np.float32)
    features: np.ndarray | None = None
    rows = _RowMoments(classifier.n_layers, classifier.width)
    done = 0
    for batch in classifier.batches(examples.inputs):
        clean = clean_pass(classifier, batch)
        readout = classifier.readout_rows(batch, clean.n_tokens)
        example = torch.arange(len(readout), device=readout.device)
        for layer, states in enumerate(clean.states):
            values[layer, batch.index] = states[example, readout].float().cpu().numpy()
        logits[batch.index] = clean.logits.float().cpu().numpy()
        if clean.features is not None:
            if features is None:
                features = np.empty((len(examples), clean.features.shape[1]), dtype=np.float32)
            features[batch.index] = clean.features.float().cpu().numpy()
        rows.add(clean)
        done += len(batch.index)
        progress(done, len(examples))
    if not (np.isfinite(values).all() and np.isfinite(logits).all()):
        raise ModelError(
            "The model gave states or logits that are not finite (NaN or infinity) for some examples; load it in "
            "float32, or leave out the examples that cause it."
        )
    return Activations(
        values=values,
        logits=logits,
        features=features,
        targets=targets,
        labels=classifier.labels,
        row_mean=rows.mean(),
        row_deviation=rows.deviation(),
        source=examples.fingerprint,
    )


class _RowMoments:
    """Mean and deviation of every unit over all rows that are no padding, merged batch by batch.

    Source: Chan, Golub and LeVeque (1979), the pairwise update of means and sums of squares.
    """

    def __init__(self, n_layers: int, width: int) -> None:
        self.count = 0
        self.means = np.zeros((n_layers, width))
        self.squares = np.zeros((n_layers, width))

    def add(self, clean: CleanPass) -> None:
        mask = clean.batch.inputs.get("attention_mask")
        for layer, states in enumerate(clean.states):
            # (example, token, unit) -> (row, unit), padding rows left out
            keep = mask is not None and mask.shape == states.shape[:2]
            rows = (states[mask != 0] if keep and mask is not None else states.flatten(0, 1)).double()
            n, mean = len(rows), rows.mean(dim=0)
            shift = mean.cpu().numpy() - self.means[layer]
            self.squares[layer] += (rows - mean).square().sum(dim=0).cpu().numpy()
            self.squares[layer] += shift**2 * (self.count * n / (self.count + n))
            self.means[layer] += shift * (n / (self.count + n))
        self.count += n

    def mean(self) -> np.ndarray:
        return self.means.astype(np.float32)

    def deviation(self) -> np.ndarray:
        return np.sqrt(self.squares / max(self.count, 1)).astype(np.float32)
