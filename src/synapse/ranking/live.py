"""What ranking methods share that run the model: means over the classes of a sample of the recorded examples."""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from synapse.data.examples import sample_examples
from synapse.errors import ModelError, SettingsError
from synapse.model.classifier import Batch, Classifier, in_halves
from synapse.ranking.base import Evidence, with_global
from synapse.types import Activations

OfBatch = Callable[[Batch], Float[Tensor, "layer example unit"]]
"""Gives a number to each neuron of every layer for each example of a batch, whose `labels` are known."""


def class_means(
    evidence: Evidence, of_batch: OfBatch, *, examples: int | None, seed: int
) -> Float[np.ndarray, "layer ranking unit"]:
    """Return the mean of what `of_batch` gives over all examples, and over those of each class.

    So many `examples` are drawn from the recorded ones with the seed, in the classes' own shares; None takes all. Where
    memory runs out, a batch is run in halves. A class without an example has 0 everywhere.

    Raises:
        SettingsError: fewer than one example, or a classifier that is not the one that was recorded.
        ModelError: some number is not finite.
        ResourceError: memory does not suffice for a single example.
    """
    classifier, recorded = evidence.model
    activations = evidence.activations
    check_recorded(classifier, activations)
    targets = activations.targets
    sample = np.arange(len(targets)) if examples is None else sample_examples(targets, examples, seed=seed)
    n_labels = len(activations.labels)
    sums = np.zeros((activations.n_layers, n_labels, activations.width))
    # What is made in inference mode, the caller's too, could not be part of a gradient.
    with torch.inference_mode(False), classifier.studied():
        for batch in classifier.batches(recorded.take(sample).inputs, targets[sample]):
            for part, found, _ in in_halves(batch, of_batch):
                assert part.labels is not None
                members = torch.nn.functional.one_hot(part.labels, n_labels).double()
                sums += torch.einsum("leu,ec->lcu", found.double(), members).cpu().numpy()
    if not np.isfinite(sums).all():
        raise ModelError(
            "The model gave numbers that are not finite (NaN or infinity) for some examples; load it in float32, or "
            "leave out the examples that cause it."
        )
    counts = np.bincount(targets[sample], minlength=n_labels)
    by_class = sums / np.maximum(counts, 1)[:, None]
    return with_global(by_class, sums.sum(axis=1) / len(sample))


def check_recorded(classifier: Classifier, activations: Activations) -> None:
    """Refuse a classifier of another shape than the one whose activations were recorded.

    Raises:
        SettingsError: its layers or units are not as many.
    """
    sites = classifier.sites(activations.component)
    if (len(sites), sites[0].width) != (activations.n_layers, activations.width):
        raise SettingsError(
            f"The classifier has {len(sites)} layers of {sites[0].width} units, and the activations "
            f"{activations.n_layers} of {activations.width}; pass the classifier that they were recorded from."
        )


def mean_states(activations: Activations) -> Float[np.ndarray, "layer unit"]:
    """Return the mean of every unit over the rows that the head reads: what stands for a neuron that says nothing."""
    if activations.reads_several_rows and activations.row_mean is not None:
        return activations.row_mean
    return activations.unit_mean
