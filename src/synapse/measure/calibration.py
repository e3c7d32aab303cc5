"""Whether a classifier or a probe is as sure as it is right, and which classes it takes for which."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int
from scipy.special import softmax

from synapse.errors import DataError, SettingsError
from synapse.measure.intervals import ALPHA, clopper_pearson, figure, resample
from synapse.measure.outcomes import confusion, predictions
from synapse.types import Figure

BINS = 15
"""Number of bins of equal mass, unless told otherwise."""

_DRAWS = 1000


@dataclass(frozen=True, eq=False)
class Calibration:
    """How far confidence (the largest probability) and accuracy lie apart."""

    reliability: pd.DataFrame
    """A row a bin, see `reliability`."""
    error: float
    """Expected calibration error in [0, 1]; as it comes, not debiased: it is above 0 for every finite sample."""
    error_if_calibrated: Figure
    """The same for examples that are right as often as the confidences say: mean, and the range of 95 % of draws.
    An `error` within the range shows no miscalibration."""
    brier: Figure
    """Brier score in [0, 2], with the interval of resampled examples; 0 is best."""


def calibration(
    logits: Float[np.ndarray, "example label"],
    targets: Int[np.ndarray, "example"],
    *,
    bins: int = BINS,
    seed: int = 0,
) -> Calibration:
    """Return the calibration of logits against targets.

    Raises
    ------
    DataError
        Where there are no examples, or a logit is NaN or +inf.
    SettingsError
        Where `bins` is below 1.
    """
    confidence = probabilities(logits).max(axis=1)
    members = _bin_of(confidence, bins)
    rng = np.random.default_rng(seed)
    drawn = [_error(members, confidence, rng.random(len(targets)) < confidence) for _ in range(_DRAWS)]
    low, high = np.quantile(drawn, (ALPHA / 2, 1 - ALPHA / 2))
    scores = brier_scores(logits, targets)
    return Calibration(
        reliability=reliability(logits, targets, bins=bins),
        error=_error(members, confidence, predictions(logits) == targets),
        error_if_calibrated=Figure(float(np.mean(drawn)), float(low), float(high), len(targets), "probability"),
        brier=figure(
            resample(len(targets), seed=seed).mean(scores[None])[:, 0],
            n=len(targets),
            unit="Brier score",
            span=2.0,
            bounds=(0, 2),
        ),
    )


def probabilities(logits: Float[np.ndarray, "example label"]) -> Float[np.ndarray, "example label"]:
    """Return the softmax of the logits in float64; a logit of -inf is a probability of 0.

    Raises
    ------
    DataError
        Where there are no examples, or a logit is NaN or +inf.
    """
    if not len(logits):
        raise DataError("There are no logits to judge; pass those of at least one example.")
    unsound = ~(logits < np.inf).all(axis=1) | ~np.isfinite(logits).any(axis=1)
    if unsound.any():
        raise DataError(
            f"The logits of example {int(np.argmax(unsound))} are no probabilities; expected numbers, or -inf for "
            "labels that cannot be. Leave the example out, or predict in float32."
        )
    return np.asarray(softmax(logits.astype(np.float64), axis=1))


def brier_scores(
    logits: Float[np.ndarray, "example label"], targets: Int[np.ndarray, "example"]
) -> Float[np.ndarray, "example"]:
    """Return sum_c (p_c - [y = c])^2 of each example, in [0, 2]; their mean is the Brier score.

    *Source*: Brier, Monthly Weather Review 78, 1950. The form for two classes that scikit-learn gives, of one
    probability, is half of this.
    """
    error = probabilities(logits)
    error[np.arange(len(targets)), targets] -= 1.0
    return np.asarray(np.square(error).sum(axis=1))


def reliability(
    logits: Float[np.ndarray, "example label"], targets: Int[np.ndarray, "example"], *, bins: int = BINS
) -> pd.DataFrame:
    """Return `n`, mean `confidence` and `accuracy` of the examples in each bin, with its exact interval `low`, `high`.

    The confidence is the probability of the predicted label. Bins are of equal mass: their edges are quantiles of the
    confidences. Equal confidences are never parted, so there are fewer bins where many are equal; empty ones are left
    out.

    Raises
    ------
    DataError
        Where there are no examples, or a logit is NaN or +inf.
    SettingsError
        Where `bins` is below 1.
    """
    confidence = probabilities(logits).max(axis=1)
    members = _bin_of(confidence, bins)
    n = np.bincount(members)
    hits = np.bincount(members, weights=predictions(logits) == targets)
    low, high = clopper_pearson(hits.astype(np.int64), n)
    confidences = np.bincount(members, weights=confidence) / n
    return pd.DataFrame({"n": n, "confidence": confidences, "accuracy": hits / n, "low": low, "high": high})


def expected_calibration_error(
    logits: Float[np.ndarray, "example label"], targets: Int[np.ndarray, "example"], *, bins: int = BINS
) -> float:
    """Return the sum over bins of n_b / n * |accuracy_b - confidence_b|, in [0, 1], with the bins of `reliability`.

    It is not debiased: a perfectly calibrated classifier has one above 0, the more so the fewer examples a bin holds;
    `calibration` says what it would be. *Source*: Naeini, Cooper & Hauskrecht (AAAI 2015); bins of equal mass:
    Nixon et al. (2019), arXiv 1904.01685.
    """
    confidence = probabilities(logits).max(axis=1)
    return _error(_bin_of(confidence, bins), confidence, predictions(logits) == targets)


def _bin_of(confidence: Float[np.ndarray, "example"], bins: int) -> Int[np.ndarray, "example"]:
    """Return the bin of each example, counted from 0 without gaps."""
    if bins < 1:
        raise SettingsError(f"{bins} bins were asked for; ask for at least 1.")
    edges = np.quantile(confidence, np.linspace(0, 1, bins + 1)[1:-1])
    return np.asarray(np.unique(np.searchsorted(edges, confidence), return_inverse=True)[1])


def _error(
    members: Int[np.ndarray, "example"],
    confidence: Float[np.ndarray, "example"],
    right: Bool[np.ndarray, "example"],
) -> float:
    # n_b * |accuracy_b - confidence_b| is the absolute sum of what each example adds to the gap
    return float(np.abs(np.bincount(members, weights=right - confidence)).sum() / len(members))


def class_table(
    logits: Float[np.ndarray, "example label"], targets: Int[np.ndarray, "example"], labels: tuple[str, ...]
) -> pd.DataFrame:
    """Return a row a class: `support` and `predicted` (counts), `recall`, `precision` and `f1`.

    Recall and precision have exact intervals, `recall_low` and so on. Recall is NaN for a class without examples,
    precision for one that is never predicted, `f1` where both are so.
    """
    counts = confusion(targets, predictions(logits), len(labels))
    hits, support, predicted = np.diagonal(counts), counts.sum(axis=1), counts.sum(axis=0)
    columns = {"support": support, "predicted": predicted}
    for name, n in (("recall", support), ("precision", predicted)):
        columns[name] = _share(hits, n)
        columns[f"{name}_low"], columns[f"{name}_high"] = clopper_pearson(hits, n)
    columns["f1"] = _share(2 * hits, support + predicted)
    return pd.DataFrame(columns, index=pd.Index(labels, name="label"))


def _share(hits: Int[np.ndarray, "label"], n: Int[np.ndarray, "label"]) -> Float[np.ndarray, "label"]:
    return np.asarray(np.divide(hits, n, out=np.full(len(n), np.nan), where=n > 0))
