"""Attacks along a ray: the budget at which each example is redirected, in closed form."""

import numpy as np
from jaxtyping import Float, Int

from synapse.types import Activations

RANDOM_DRAWS = 10
"""Random changes that every attack stands beside."""


def needed_budget(
    logits: Float[np.ndarray, "example label"], slopes: Float[np.ndarray, "example label"], target: int
) -> Float[np.ndarray, "example"]:
    """Return the smallest budget s >= 0 at which `logits + s * slopes` is largest at `target`, or infinity.

    The target beats rival c where s * (slope_t - slope_c) >= z_c - z_t: a lower bound on s where the slope towards the
    target is positive, an upper one where it is negative, and never where it is zero and the rival is ahead.
    """
    behind = np.delete(logits - logits[:, [target]], target, axis=1).astype(np.float64)
    gain = np.delete(slopes[:, [target]] - slopes, target, axis=1).astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        crossing = behind / gain
    lower = np.where(gain > 0, crossing, np.where((gain == 0) & (behind > 0), np.inf, 0.0)).max(axis=1, initial=0.0)
    upper = np.where(gain < 0, crossing, np.inf).min(axis=1, initial=np.inf)
    needed: Float[np.ndarray, example] = np.where(lower <= upper, lower, np.inf)
    return needed


def broken_budget(
    logits: Float[np.ndarray, "example label"], slopes: Float[np.ndarray, "example label"]
) -> Float[np.ndarray, "example"]:
    """Return the smallest budget s >= 0 at which the clean prediction is no longer the largest logit, or infinity."""
    example = np.arange(len(logits))
    predicted = logits.argmax(axis=1)
    ahead = (logits[example, predicted][:, None] - logits).astype(np.float64)
    closing = (slopes - slopes[example, predicted][:, None]).astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        crossing = np.where(closing > 0, ahead / closing, np.inf)
    smallest: Float[np.ndarray, example] = crossing.min(axis=1)
    return smallest


def attacked(activations: Activations, source: int | None, target: int) -> Int[np.ndarray, "example"]:
    """Return the examples that an attack is about.

    With a source class, those of its examples that the clean model gets right; without one, every example of another
    class than the target that is not predicted as the target already.
    """
    predicted = activations.predictions
    if source is None:
        return np.flatnonzero((activations.targets != target) & (predicted != target))
    return np.flatnonzero((activations.targets == source) & (predicted == source))
