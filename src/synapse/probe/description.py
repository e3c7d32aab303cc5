"""How hard the labels are to read from the states: description length, and accuracy by number of examples.

Accuracy says whether a probe can read the labels at all; a description length also says with how much effort.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.special import log_softmax

from synapse.errors import DataError, SettingsError, SplitError
from synapse.probe.probe import Target, fit_probes, probe_targets
from synapse.types import Activations

BLOCK_ENDS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.0625, 0.125, 0.25, 0.5, 1.0)
"""Shares of the examples at which a block of the online code ends."""

PENALTY = 0.01
"""Penalty of every probe here: it is fixed, as a choice would have to be paid for too."""


@dataclass(frozen=True, eq=False)
class DescriptionLength:
    """Bits that transmit the labels of all examples to someone who has the states of one layer.

    Invariant: `compression == uniform / online`.
    """

    layer: int
    ends: Int[np.ndarray, "block"]
    """Number of examples up to the end of each block."""
    bits: Float[np.ndarray, "block"]
    """Length of each block; the first is coded uniformly."""
    n_labels: int

    @property
    def online(self) -> float:
        """Length of the online code, in bits, above 0."""
        return float(self.bits.sum())

    @property
    def uniform(self) -> float:
        """Length of a code that knows nothing but the number of labels, in bits."""
        return float(self.ends[-1] * np.log2(self.n_labels))

    @property
    def compression(self) -> float:
        """How many times shorter the online code is than the uniform one; below 1 where the probes mislead."""
        return self.uniform / self.online


def description_length(
    activations: Activations,
    *,
    penalty: float = PENALTY,
    l1_ratio: float = 0.5,
    target: Target = "gold",
    seed: int = 0,
) -> tuple[DescriptionLength, ...]:
    """Return the online (prequential) description length of the labels given the states of each layer.

    The examples are shuffled and cut at `BLOCK_ENDS`. The labels of the first block are coded uniformly over all labels
    of the classifier; those of a later block with the probabilities of a probe fitted on all blocks before it.

    To a label that none of the n examples before had, a probe gives probability 0, an infinite code. It gets
    1 / (n + C) instead, as by Laplace's rule of succession, and the probe's probabilities share what is left. Once all
    labels have occurred the code is the probe's own.

    Raises:
        DataError: there are no examples, or an activation is not finite.
        ConvergenceError, SettingsError: as `fit_probes`.

    *Source*: Voita & Titov (EMNLP 2020), arXiv 2003.12298, the online code.
    """
    if not len(activations):
        raise DataError("There are no activations to describe labels with: record at least one example.")
    # Not stratified: the order may not depend on the labels, which the receiver does not have.
    shuffled = activations.take(np.random.default_rng(seed).permutation(len(activations)))
    targets, n_labels = probe_targets(shuffled, target), len(activations.labels)
    ends = np.unique(np.ceil(np.multiply(BLOCK_ENDS, len(activations))).astype(np.int64))
    bits = np.empty((activations.n_layers, len(ends)))
    bits[:, 0] = ends[0] * np.log2(n_labels)
    for block, (begin, end) in enumerate(pairwise(ends.tolist()), start=1):
        logits = _logits(shuffled.take(np.arange(begin)), shuffled.values[:, begin:end], penalty, l1_ratio, target)
        logs = _with_unseen(log_softmax(logits, axis=2), targets[:begin])
        bits[:, block] = -logs[:, np.arange(end - begin), targets[begin:end]].sum(axis=1) / np.log(2)
    return tuple(DescriptionLength(layer, ends, of_layer, n_labels) for layer, of_layer in enumerate(bits))


def _with_unseen(
    logs: Float[np.ndarray, "layer example label"], known: Int[np.ndarray, "known"]
) -> Float[np.ndarray, "layer example label"]:
    """Return log-probabilities in which labels that are not among the known targets have their share."""
    n_labels = logs.shape[2]
    unseen = np.bincount(known, minlength=n_labels) == 0
    whole = len(known) + n_labels
    return np.asarray(np.where(unseen, -np.log(whole), logs + np.log1p(-unseen.sum() / whole)))


@dataclass(frozen=True, eq=False)
class LearningCurve:
    """What the probes of one layer, fitted on more and more examples, get right of the same test examples."""

    layer: int
    sizes: Int[np.ndarray, "size"]
    """Numbers of training examples, ascending; each set holds the smaller ones."""
    correct: Bool[np.ndarray, "size example"]

    @property
    def accuracy(self) -> Float[np.ndarray, "size"]:
        """Share of the test examples that each probe gets right."""
        return np.asarray(self.correct.mean(axis=1))


def learning_curve(
    train: Activations,
    test: Activations,
    *,
    sizes: Sequence[int] | None = None,
    penalty: float = PENALTY,
    l1_ratio: float = 0.5,
    target: Target = "gold",
    seed: int = 0,
) -> tuple[LearningCurve, ...]:
    """Return the accuracy on test of probes fitted on nested, stratified parts of train, for each layer.

    Without `sizes` they are all examples, half of them, a quarter and so on, down to two for each label. A part whose
    examples are all of one label predicts that label.

    Raises:
        SplitError: train and test are the same examples.
        DataError: train and test are not of one classifier, or an activation is not finite.
        SettingsError: a size is below 1 or above the number of examples, or as `fit_probes`.
        ConvergenceError: as `fit_probes`.
    """
    if train.source == test.source:
        raise SplitError("The probes are to be tested on the examples they learn from: give activations of others.")
    if train.labels != test.labels or train.values.shape[::2] != test.values.shape[::2]:
        raise DataError(
            f"Train has {train.n_layers} layers of {train.width} units and the labels {train.labels}, test "
            f"{test.n_layers} of {test.width} and {test.labels}: give activations of the same classifier."
        )
    chosen = _halvings(len(train), 2 * len(train.labels)) if sizes is None else sorted(set(sizes))
    if not chosen or not 1 <= chosen[0] <= chosen[-1] <= len(train):
        raise SettingsError(
            f"Sizes {chosen} were asked for: give numbers of training examples between 1 and {len(train)}."
        )
    order = _stratified_order(probe_targets(train, target), seed)
    truth = probe_targets(test, target)
    parts = [_logits(train.take(order[:size]), np.asarray(test.values), penalty, l1_ratio, target) for size in chosen]
    correct = np.stack([logits.argmax(axis=2) == truth for logits in parts], axis=1)
    return tuple(LearningCurve(layer, np.array(chosen), of_layer) for layer, of_layer in enumerate(correct))


def _halvings(n: int, least: int) -> list[int]:
    sizes = [n]
    while sizes[0] // 2 >= least:
        sizes.insert(0, sizes[0] // 2)
    return sizes


def _stratified_order(targets: Int[np.ndarray, "example"], seed: int) -> Int[np.ndarray, "example"]:
    """Return a random order of the examples in which every beginning has about the class shares of the whole.

    The i-th example of a class of N stands at (i + 1/2) / N of the way.
    """
    shuffled = np.random.default_rng(seed).permutation(len(targets))
    place = np.empty(len(targets))
    for c in np.unique(targets):
        members = np.flatnonzero(targets[shuffled] == c)
        place[members] = (np.arange(len(members)) + 0.5) / len(members)
    return np.asarray(shuffled[np.argsort(place, kind="stable")])


def _logits(
    known: Activations,
    values: Float[np.ndarray, "layer example unit"],
    penalty: float,
    l1_ratio: float,
    target: Target,
) -> Float[np.ndarray, "layer example label"]:
    """Return what probes fitted on the known examples say of other states; -inf for labels that did not occur."""
    labels = np.unique(probe_targets(known, target))
    if len(labels) == 1:
        logits = np.full((*values.shape[:2], len(known.labels)), -np.inf)
        logits[:, :, labels] = 0.0
        return logits
    probes = fit_probes(known, penalties=(penalty,), l1_ratio=l1_ratio, target=target)
    return np.stack([probe.predict_logits(values[probe.layer]) for probe in probes.probes])
