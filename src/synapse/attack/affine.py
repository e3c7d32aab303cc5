"""The smallest edit of a state that the logits are a linear function of."""

from typing import Literal

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import linprog

from synapse.attack.head import least_distance

EditNorm = Literal["l2", "linf"]
"""How an edit is measured: its Euclidean length, or its largest entry."""


def affine_edits(
    logits: Float[np.ndarray, "example label"],
    slopes: Float[np.ndarray, "example label unit"],
    predicted: Int[np.ndarray, "example"],
    target: int | None,
    norm: EditNorm = "l2",
) -> Float[np.ndarray, "example unit"]:
    """Return the smallest d at which logits + slopes d leave the predicted class, or have the target as a maximum.

    Towards a rival c, with gap g and difference of slopes w, it is g w / ||w||_2^2, or g sign(w) / ||w||_1 in the
    largest entry (the dual norms). Without a target it is that of the nearest rival. With one, every other class is to
    be overtaken: that of the farthest if it overtakes all, else the solution of the quadratic or the linear program.
    NaN where no edit does it.
    """
    n_labels, example = logits.shape[1], np.arange(len(logits))
    if target is None:
        gap = logits[example, predicted][:, None] - logits
        towards = slopes - slopes[example, predicted][:, None]
    else:
        gap = logits - logits[:, [target]]
        towards = slopes[:, [target]] - slopes
    dual = np.linalg.norm(towards, ord=2 if norm == "l2" else 1, axis=2)
    with np.errstate(divide="ignore", invalid="ignore"):
        distance = np.where(dual > 0, gap / dual, np.inf)
    if target is None:
        distance[example, predicted] = np.inf
        chosen = np.abs(distance).argmin(axis=1)
    else:
        # A class that moves with the target and is behind it never matters; one that is ahead can never be overtaken.
        distance[(dual == 0) & (gap <= 0)] = distance[:, target] = -np.inf
        chosen = distance.argmax(axis=1)
    step, w = distance[example, chosen], towards[example, chosen]
    shape = w / np.maximum(np.linalg.norm(w, axis=1, keepdims=True), 1e-300) if norm == "l2" else np.sign(w)
    with np.errstate(invalid="ignore"):
        edits = np.where(np.isfinite(step)[:, None], step[:, None] * shape, np.nan)
    if target is not None:
        rivals = np.arange(n_labels) != target
        reached = np.einsum("elu,eu->el", towards, edits) >= gap - 1e-9 * (1 + np.abs(gap))
        for i in np.flatnonzero(~reached[:, rivals].all(axis=1) & np.isfinite(step)):
            edits[i] = _over_all(towards[i, rivals], gap[i, rivals], norm)
    return edits


def _over_all(
    towards: Float[np.ndarray, "rival unit"], gap: Float[np.ndarray, "rival"], norm: EditNorm
) -> Float[np.ndarray, "unit"]:
    """Return the smallest d with towards d >= gap, NaN where there is none."""
    nothing = np.full(towards.shape[1], np.nan)
    if norm == "l2":
        step = least_distance(towards, gap)
        return nothing if step is None else step
    # minimise t subject to -t <= d <= t, as a linear program in (d, t)
    n = towards.shape[1]
    cost = np.append(np.zeros(n), 1.0)
    box = np.vstack([np.column_stack([sign * np.eye(n), -np.ones(n)]) for sign in (1.0, -1.0)])
    limits = np.vstack([np.column_stack([-towards, np.zeros(len(towards))]), box])
    solved = linprog(cost, limits, np.append(-gap, np.zeros(2 * n)), bounds=[(None, None)] * n + [(0, None)])
    return np.asarray(solved.x[:n]) if solved.status == 0 else nothing
