"""Rankings: an order of the neurons of every layer, over all classes and for each class."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from synapse.errors import SettingsError, near
from synapse.probe.probe import Probes
from synapse.types import GLOBAL, Activations, Component, Neurons


@dataclass(frozen=True, eq=False)
class Ranking:
    """Scores of every neuron of a component, higher is more important; ties go to the lower index.

    `scores[l, 0]` is the global ranking of layer l, `scores[l, 1 + c]` that of class c. `source` is the fingerprint of
    the examples that it was made from: neurons chosen on a split may not be measured on it.
    """

    method: str
    scores: Float[np.ndarray, "layer ranking unit"]
    labels: tuple[str, ...]
    source: str
    component: Component = "residual"

    def order(self, layer: int, label: str = GLOBAL) -> Int[np.ndarray, "unit"]:
        """Return the units of a layer, most important first; `label` names a class, or is empty for all of them.

        Raises:
            SettingsError: an unknown layer or class.
        """
        if not 0 <= layer < len(self.scores):
            raise SettingsError(f"Layer {layer} was asked for; the ranking has the layers 0 to {len(self.scores) - 1}.")
        if label != GLOBAL and label not in self.labels:
            raise SettingsError(
                f"The ranking knows no class {label!r}; it has {', '.join(self.labels)}.{near(label, self.labels)}"
            )
        row = 0 if label == GLOBAL else 1 + self.labels.index(label)
        return np.argsort(-self.scores[layer, row], kind="stable")

    def top(self, size: int | float, *, layer: int, label: str = GLOBAL) -> Neurons:
        """Return the most important neurons of a layer: `size` of them, or that share of the width if it is a float."""
        return self._neurons(layer, self.order(layer, label)[: self._count(size)])

    def bottom(self, size: int | float, *, layer: int, label: str = GLOBAL) -> Neurons:
        """Return the least important neurons of a layer, the very last first."""
        return self._neurons(layer, self.order(layer, label)[::-1][: self._count(size)])

    def random(self, size: int | float, *, layer: int, seed: int) -> Neurons:
        """Return a random set of neurons of a layer; sets of one seed are nested in each other as they grow."""
        order = np.random.default_rng((seed, layer)).permutation(self.width)
        return self._neurons(layer, order[: self._count(size)])

    @property
    def width(self) -> int:
        """Number of neurons in a layer."""
        return int(self.scores.shape[2])

    def overlap(self, other: "Ranking", size: int | float, *, layer: int, label: str = GLOBAL) -> float:
        """Return the Jaccard index of the two rankings' top neurons, in [0, 1]."""
        mine = set(self.top(size, layer=layer, label=label).units)
        theirs = set(other.top(size, layer=layer, label=label).units)
        return len(mine & theirs) / len(mine | theirs)

    def to_frame(self) -> pd.DataFrame:
        """Return one row for each (layer, label, rank): the `ranking` table of a run."""
        frames = []
        for layer in range(len(self.scores)):
            for row, label in enumerate((GLOBAL, *self.labels)):
                order = self.order(layer, label)
                frames.append(
                    pd.DataFrame(
                        {
                            "component": self.component,
                            "method": self.method,
                            "layer": layer,
                            "label": label,
                            "rank": np.arange(self.width),
                            "unit": order,
                            "score": self.scores[layer, row, order],
                        }
                    )
                )
        return pd.concat(frames, ignore_index=True)

    def _count(self, size: int | float) -> int:
        return count_of(size, self.width)

    def _neurons(self, layer: int, units: Int[np.ndarray, "unit"]) -> Neurons:
        return Neurons(layer, tuple(int(unit) for unit in units), self.component)


def count_of(size: int | float, width: int) -> int:
    """Return a number of neurons from a count or a share of the width; a share above 0 gives at least one.

    Raises:
        SettingsError: a share outside [0, 1] or a count outside [0, width].
    """
    share = isinstance(size, float)
    if not 0 <= size <= (1 if share else width):
        raise SettingsError(
            f"{size} neurons were asked for; a share between 0.0 and 1.0 or a count between 0 and {width} was expected."
        )
    return max(round(size * width), 1 if size > 0 else 0) if share else int(size)


@dataclass(frozen=True)
class RankingMethod(ABC):
    """A way of scoring neurons from the recorded activations of the training examples and the probes on them."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The method's name in tables."""

    @abstractmethod
    def scores(self, activations: Activations, probes: Probes) -> Float[np.ndarray, "layer ranking unit"]:
        """Return the scores, higher is more important: the global row first, then one row a class."""

    def rank(self, activations: Activations, probes: Probes) -> Ranking:
        """Return the ranking of all layers."""
        scores = self.scores(activations, probes)
        return Ranking(self.name, scores, activations.labels, activations.source, activations.component)
