"""What an edit did to each example, from logits and targets alone.

Logits may carry leading axes (cells, draws); the last axis is always the label. Predictions are the label
with the largest logit, the first of them in a tie.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int, Real
from scipy.special import log_softmax

from synapse.errors import DataError
from synapse.types import Sweep


def predictions(logits: Float[np.ndarray, "*lead label"]) -> Int[np.ndarray, "*lead"]:
    """Return the index of the largest logit of each example."""
    predicted: Int[np.ndarray, "*lead"] = np.argmax(logits, axis=-1)
    return predicted


def accuracy(logits: Float[np.ndarray, "example label"], targets: Int[np.ndarray, "example"]) -> float:
    """Return the share of examples whose prediction is their target, in [0, 1]."""
    return float(np.mean(predictions(logits) == targets))


def flip_rate(clean: Float[np.ndarray, "example label"], edited: Float[np.ndarray, "example label"]) -> float:
    """Return the share of examples whose prediction changed, in [0, 1]; targets play no part."""
    return float(np.mean(predictions(clean) != predictions(edited)))


def kl(
    clean: Float[np.ndarray, "*#lead label"], edited: Float[np.ndarray, "*#lead label"]
) -> Float[np.ndarray, "*lead"]:
    """Return KL(clean || edited) of the predicted distributions of each example, in nats, at least 0.

    *Source*: Kullback & Leibler 1951; sum_c p_c (log p_c - log q_c) with p, q the softmax of the logits.
    """
    log_p = log_softmax(np.asarray(clean, dtype=np.float64), axis=-1)
    log_q = log_softmax(np.asarray(edited, dtype=np.float64), axis=-1)
    divergence = np.sum(np.exp(log_p) * (log_p - log_q), axis=-1)
    # Zero or more by Gibbs' inequality; rounding can leave -1e-17.
    return np.asarray(np.maximum(divergence, 0.0))


def margins(logits: Float[np.ndarray, "*lead label"], targets: Int[np.ndarray, "*#lead"]) -> Float[np.ndarray, "*lead"]:
    """Return the target's logit minus the largest other one; positive where the target wins outright."""
    is_target = np.arange(logits.shape[-1]) == np.asarray(targets)[..., None]
    own = np.max(np.where(is_target, logits, -np.inf), axis=-1)
    rival = np.max(np.where(is_target, -np.inf, logits), axis=-1)
    return np.asarray(own - rival)


def confusion(
    targets: Int[np.ndarray, "example"], predicted: Int[np.ndarray, "example"], n_labels: int
) -> Int[np.ndarray, "target predicted"]:
    """Return how many examples of each target (row) got each prediction (column)."""
    pairs = np.asarray(targets) * n_labels + np.asarray(predicted)
    return np.bincount(pairs, minlength=n_labels**2).reshape(n_labels, n_labels)


def recall(counts: Real[np.ndarray, "*lead target predicted"]) -> Float[np.ndarray, "*lead target"]:
    """Return the share of each class's examples that were predicted as it; NaN for one without examples."""
    hits = np.diagonal(counts, axis1=-2, axis2=-1).astype(np.float64)
    support = counts.sum(axis=-1)
    return np.asarray(np.divide(hits, support, out=np.full_like(hits, np.nan), where=support > 0))


def macro_f1(counts: Real[np.ndarray, "*lead target predicted"]) -> Float[np.ndarray, "*lead"]:
    """Return the mean over classes of F1 = 2 TP / (2 TP + FP + FN), from confusion counts.

    A class that is neither a target nor a prediction anywhere has no F1 and is left out of the mean; one that
    is only predicted counts as 0 (the convention of scikit-learn's `f1_score(average="macro")`).
    """
    hits = np.diagonal(counts, axis1=-2, axis2=-1)
    either = counts.sum(axis=-1) + counts.sum(axis=-2)
    scores = 2 * hits / np.maximum(either, 1)
    return np.asarray(scores.sum(axis=-1) / np.maximum((either > 0).sum(axis=-1), 1))


@dataclass(frozen=True, eq=False)
class Outcomes:
    """What every cell of a sweep did to every example.

    `cells` is the plan, numbered from 0. `lost` is the paired outcome: 1 where the edit broke a right
    prediction, -1 where it repaired a wrong one, else 0. Where a cell did not run an example, `ran`, `right`
    and `flipped` are False and `lost` is 0.
    """

    cells: pd.DataFrame
    ran: Bool[np.ndarray, "cell example"]
    right: Bool[np.ndarray, "cell example"]
    lost: Int[np.ndarray, "cell example"]
    flipped: Bool[np.ndarray, "cell example"]
    clean_right: Bool[np.ndarray, "example"]
    targets: Int[np.ndarray, "example"]
    labels: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.clean_right)


def outcomes_of(sweep: Sweep) -> Outcomes:
    """Return what every cell of a sweep did to every example.

    Raises
    ------
    DataError
        Where the parts of the sweep do not fit each other, or where logits are not finite. (All logits of an
        example NaN is how a cell says that it did not run it.)
    """
    expected = (len(sweep.cells), *sweep.clean_logits.shape)
    if sweep.logits.shape != expected or sweep.targets.shape != expected[1:2]:
        raise DataError(
            f"The sweep has logits of shape {sweep.logits.shape} and {len(sweep.targets)} targets, but its "
            f"cells and clean logits ask for {expected}; pass the parts of one sweep."
        )
    finite = np.isfinite(sweep.logits)
    ran = finite.all(axis=-1)
    unsound = ~ran & ~np.isnan(sweep.logits).all(axis=-1)
    if unsound.any():
        cell, example = np.argwhere(unsound)[0]
        raise DataError(
            f"Cell {cell} gave example {example} logits that are not finite; expected numbers, or NaN for "
            "every label where it did not run. Repeat the sweep in float32."
        )
    predicted = predictions(sweep.logits)
    clean = predictions(sweep.clean_logits)
    right, clean_right = ran & (predicted == sweep.targets), clean == sweep.targets
    return Outcomes(
        cells=sweep.cells.reset_index(drop=True),
        ran=ran,
        right=right,
        lost=np.where(ran, clean_right.astype(np.int8) - right, 0).astype(np.int8),
        flipped=ran & (predicted != clean),
        clean_right=clean_right,
        targets=sweep.targets,
        labels=sweep.labels,
    )
