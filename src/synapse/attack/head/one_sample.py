"""The smallest edit of the head for one example, in closed form."""

import numpy as np
from jaxtyping import Float

from synapse.attack.head.steps import Rows
from synapse.attack.logits import gaps, smallest_changes


def one_sample_changes(
    logits: Float[np.ndarray, "example label"], target: int, rows: Rows = "all", *, margin: float = 0.0
) -> Float[np.ndarray, "example label"]:
    """Return the shortest change of each example's logits that puts the target `margin` ahead of all other classes.

    With two rows the target rises by a = max(g_p / 2, g_rest) and the predicted class p falls by max(g_p - a, 0), where
    g_rest is what the target lacks to the others. With `all` see `synapse.attack.logits.smallest_changes`.
    """
    z = logits.astype(np.float64)
    z[:, target] -= margin  # to be ahead by the margin is to tie from that much further back
    if rows != "two":
        return smallest_changes(z, target, "one" if rows == "target" else "l2")
    example, predicted = np.arange(len(z)), np.delete(z, target, axis=1).argmax(axis=1)
    predicted += predicted >= target
    lacking = np.maximum(gaps(z, target), 0.0)
    rest = z - z[:, [target]]
    rest[example, predicted] = rest[:, target] = -np.inf
    changes = np.zeros(z.shape)
    changes[:, target] = np.maximum(lacking / 2, rest.max(axis=1))
    changes[example, predicted] = -np.maximum(lacking - changes[:, target], 0.0)
    return changes


def one_sample_edits(
    features: Float[np.ndarray, "example feature"], changes: Float[np.ndarray, "example label"]
) -> Float[np.ndarray, "example label feature"]:
    """Return for each example the smallest dW with dW h = d: d h^T / ||h||^2, of norm ||d|| / ||h||.

    It is of rank one, so that its Frobenius and its spectral norm are the same. Source: least squares; as an attack Liu
    et al. (ICCAD 2017). An example without a feature (h = 0) cannot be moved: its entries are NaN.
    """
    h = features.astype(np.float64)
    length = np.square(h).sum(axis=1)[:, None, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        edits: Float[np.ndarray, "example label feature"] = changes[:, :, None] * h[:, None, :] / length
    return np.where(length > 0, edits, np.nan)
