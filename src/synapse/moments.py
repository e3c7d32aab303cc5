"""Means and deviations that are gathered piece by piece, and come out the same however the pieces are cut."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int


@dataclass(frozen=True, eq=False)
class Moments:
    """Of groups of rows: how many there are, their mean, and the sum of squared distances from it, in float64.

    Source of `merged`: Chan, Golub and LeVeque (1979), the pairwise update of means and sums of squares, which unlike
    sums of squares loses nothing where the mean is large beside the deviation.
    """

    count: Int[np.ndarray, "*group"]
    mean: Float[np.ndarray, "*group unit"]
    squares: Float[np.ndarray, "*group unit"]

    @classmethod
    def none(cls, *shape: int) -> "Moments":
        """Return those of no rows: `shape` is that of the groups, and the number of units last."""
        return cls(np.zeros(shape[:-1], dtype=np.int64), np.zeros(shape), np.zeros(shape))

    def merged(self, other: "Moments") -> "Moments":
        """Return the moments of the rows of both."""
        count = self.count + other.count
        share = (other.count / np.maximum(count, 1))[..., None]
        shift = other.mean - self.mean
        return Moments(
            count,
            self.mean + shift * share,
            self.squares + other.squares + shift**2 * (share * self.count[..., None]),
        )

    @property
    def deviation(self) -> Float[np.ndarray, "*group unit"]:
        """The standard deviation of every unit; 0 for a group without rows."""
        return np.asarray(np.sqrt(self.squares / np.maximum(self.count, 1)[..., None]))


def moments_by_class(
    values: Float[np.ndarray, "layer example unit"], targets: Int[np.ndarray, "example"], n_labels: int
) -> Moments:
    """Return the moments of every class in every layer, (layer, label, unit)."""
    n_layers, _, width = values.shape
    found = Moments.none(n_layers, n_labels, width)
    for label in range(n_labels):
        mine = values[:, targets == label].astype(np.float64)
        if mine.shape[1]:
            found.count[:, label] = mine.shape[1]
            found.mean[:, label] = mine.mean(axis=1)
            found.squares[:, label] = np.square(mine - found.mean[:, label, None]).sum(axis=1)
    return found
