"""Rankings: an order of the neurons of every layer, over all classes and for each class.

A method of your own is a frozen dataclass of its parameters with a `name` and `scores`:

```python
@dataclass(frozen=True)
class Spread(RankingMethod):
    @property
    def name(self) -> str:
        return "spread"

    def scores(self, evidence: Evidence) -> Scores:
        return for_every_class(evidence, np.ptp(evidence.activations.values, axis=1))

ranking = syn.rank(activations, method=Spread())
```
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from synapse.data.examples import Examples
from synapse.errors import DataError, SettingsError, near
from synapse.model.classifier import Classifier
from synapse.probe.probe import Probes
from synapse.types import GLOBAL, Activations, Component, Neurons


@dataclass(frozen=True, eq=False)
class Ranking:
    """Scores of every neuron of a component, higher is more important; ties go to the lower index.

    `scores[l, 0]` is the global ranking of layer l, `scores[l, 1 + c]` that of class c. `source` is the fingerprint of
    the examples that it was made from: neurons chosen on a split may not be measured on it. Where a method's numbers
    have a direction, `signed`, of the same shape, holds the numbers themselves.
    """

    method: str
    scores: Float[np.ndarray, "layer ranking unit"]
    labels: tuple[str, ...]
    source: str
    component: Component = "residual"
    signed: Float[np.ndarray, "layer ranking unit"] | None = None

    def order(self, layer: int, label: str = GLOBAL) -> Int[np.ndarray, "unit"]:
        """Return the units of a layer, most important first; `label` names a class, or is empty for all of them.

        Raises:
            SettingsError: an unknown layer or class.
        """
        if not 0 <= layer < len(self.scores):
            raise SettingsError(f"Layer {layer} was asked for; the ranking has the layers 0 to {len(self.scores) - 1}.")
        return np.argsort(-self.scores[layer, self.row(label)], kind="stable")

    def row(self, label: str = GLOBAL) -> int:
        """Return where the scores of a class stand; `label` is empty for all classes.

        Raises:
            SettingsError: an unknown class.
        """
        if label != GLOBAL and label not in self.labels:
            raise SettingsError(
                f"The ranking knows no class {label!r}; it has {', '.join(self.labels)}.{near(label, self.labels)}"
            )
        return 0 if label == GLOBAL else 1 + self.labels.index(label)

    def top_of_all_layers(self, size: int | float, *, label: str = GLOBAL) -> tuple[Neurons, ...]:
        """Return the most important neurons among those of all layers: `size` of them, or that share of all.

        They come as one set for each layer that has any, most important first; equal scores go to the earlier layer.
        Scores of several layers compare where the method's numbers do: differences of logits, correlations and weights
        of joint probes; shares of a layer's own weight (`cumulative-mass`) do not.
        """
        layers, width = len(self.scores), self.width
        scores = self.scores[:, self.row(label)].ravel()
        chosen = np.argsort(-scores, kind="stable")[: count_of(size, layers * width)]
        found = [(layer, chosen[chosen // width == layer] % width) for layer in range(layers)]
        return tuple(self._neurons(layer, units) for layer, units in found if len(units))

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
                            "signed": np.nan if self.signed is None else self.signed[layer, row, order],
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


Need = Literal["probes", "classifier"]
"""What a method asks for beside the recorded activations: `classifier` stands for the model and the examples."""


@dataclass(frozen=True, eq=False)
class Evidence:
    """What rankings are made from: the recorded training examples, and what some methods ask for beside them.

    `examples` are the ones that were recorded, in the same order.
    """

    activations: Activations
    probes: Probes | None = None
    classifier: Classifier | None = None
    examples: Examples | None = None

    @property
    def n_rankings(self) -> int:
        """Number of rankings of a layer: the global one, and one for each class."""
        return 1 + len(self.activations.labels)

    @property
    def present(self) -> list[int]:
        """The classes that have a training example."""
        return [int(c) for c in np.unique(self.activations.targets)]

    @property
    def probe_weights(self) -> Float[np.ndarray, "layer label unit"]:
        """Weights of the probes, on standardised inputs."""
        assert self.probes is not None
        return np.stack([probe.weights for probe in self.probes.probes])

    @property
    def model(self) -> tuple[Classifier, Examples]:
        """The classifier and the examples."""
        assert self.classifier is not None
        assert self.examples is not None
        return self.classifier, self.examples


@dataclass(frozen=True, eq=False)
class Scores:
    """What a method says: `values`, higher is more important, and `signed` as in `Ranking`."""

    values: Float[np.ndarray, "layer ranking unit"]
    signed: Float[np.ndarray, "layer ranking unit"] | None = None


@dataclass(frozen=True)
class RankingMethod(ABC):
    """A way of scoring neurons from the recorded training examples; `needs` says what else it asks for."""

    needs: ClassVar[tuple[Need, ...]] = ()

    @property
    @abstractmethod
    def name(self) -> str:
        """The method's name in tables, with what tells it from its siblings."""

    @abstractmethod
    def scores(self, evidence: Evidence) -> Scores:
        """Return the scores: the global row first, then one row a class.

        A class without a training example scores 0 everywhere. Scores are finite.
        """

    def rank(self, evidence: Evidence) -> Ranking:
        """Return the ranking of all layers.

        Raises:
            SettingsError: what the method needs is missing.
            DataError: an activation is not finite, or the examples are not those that were recorded.
        """
        self._check(evidence)
        found, activations = self.scores(evidence), evidence.activations
        return Ranking(
            self.name, found.values, activations.labels, activations.source, activations.component, found.signed
        )

    def _check(self, evidence: Evidence) -> None:
        missing = {
            "probes": evidence.probes is None,
            "classifier": evidence.classifier is None or evidence.examples is None,
        }
        asked = {"probes": "`probes=`", "classifier": "`classifier=` and `examples=`"}
        for need in self.needs:
            if missing[need]:
                raise SettingsError(f"The ranking {self.name!r} was given no {need}; pass {asked[need]}.")
        activations, examples = evidence.activations, evidence.examples
        if examples is not None and examples.fingerprint != activations.source:
            raise DataError(
                f"The activations are not those of {examples.name}; pass the examples that were recorded, in the same "
                "order."
            )
        for layer, values in enumerate(activations.values):
            if not np.isfinite(values).all():
                raise DataError(
                    f"Activations of layer {layer} hold NaN or infinite values: look at the inputs, or run the "
                    "classifier in float32."
                )


def with_global(
    by_class: Float[np.ndarray, "layer label unit"], overall: Float[np.ndarray, "layer unit"]
) -> Float[np.ndarray, "layer ranking unit"]:
    """Return the rows of all classes under the global one."""
    return np.concatenate([overall[:, None], by_class], axis=1).astype(np.float64)


def for_every_class(evidence: Evidence, overall: Float[np.ndarray, "layer unit"]) -> Scores:
    """Return scores of a method that knows no classes: every row is the global one."""
    return Scores(np.repeat(overall[:, None].astype(np.float64), evidence.n_rankings, axis=1))


def of_present(
    evidence: Evidence, rows: Sequence[Float[np.ndarray, "layer unit"]]
) -> Float[np.ndarray, "layer label unit"]:
    """Return rows for all classes from those of the classes that have an example, 0 for the others."""
    activations = evidence.activations
    found = np.zeros((activations.n_layers, len(activations.labels), activations.width))
    found[:, evidence.present] = np.stack(rows, axis=1)
    return found
