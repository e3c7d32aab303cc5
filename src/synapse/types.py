"""The words that every stage shares.

| word | meaning |
|---|---|
| layer | index of a block in call order, from 0; its *depth* is `(layer + 1) / n_blocks`, in (0, 1] |
| component | what of a layer: see `Component`; a component of a layer is a *site* |
| unit | index of a coordinate of a site |
| readout row | the token row that the head reads ([CLS], the last token that is no padding, ...), or several |
| label | a class name; the empty string stands for the global ranking (all classes) |
| scope | where an edit acts: see `Scope` |
| selection | which end of a ranking: `top`, `bottom`, or `random` units |
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from synapse.errors import SettingsError
from synapse.moments import Moments
from synapse.stored import StoredRows, StoredValues

Component = Literal["residual", "mlp", "attention", "heads", "pooler"]
"""What of a layer: `residual`, the block's output; `mlp`, the hidden units of its feed-forward network (the input of
the down projection); `attention`, the output of its attention sublayer; `heads`, the heads side by side (the input of
the attention's output projection). `pooler`, the input of the final linear map, stands alone: it is one layer."""
COMPONENTS: tuple[Component, ...] = get_args(Component)

Readout = Literal["first", "last", "first-two", "mean", "mean-but-first", "first-and-mean"]
"""The rows that the head reads, of those that are no padding.

`first`: row 0 ([CLS]); `last`; `first-two`: rows 0 and 1, alike; `mean`: all of them, alike; `mean-but-first`: all but
row 0, alike; `first-and-mean`: row 0, and all others alike.
"""
READOUTS: tuple[Readout, ...] = get_args(Readout)

Scope = Literal["readout", "readout-onward", "all", "non-padding"]
"""`readout`: the rows that the head reads, at the layer; `readout-onward`: these at the layer and at every later one;
`all`: all rows at the layer; `non-padding`: all but those that fill up a batch."""
SCOPES: tuple[Scope, ...] = get_args(Scope)

SWEPT_SCOPES: tuple[Scope, ...] = ("readout", "readout-onward", "all")
"""What a study compares: padding is nothing to a model that masks it, so `non-padding` would say `all` again."""

Selection = Literal["top", "bottom", "random"]

Progress = Callable[[int, int], None]
"""Called with the amount of work done and the amount there is."""

GLOBAL = ""
"""The label of the ranking over all classes."""

CELL_COLUMNS = (
    "component",
    "layer",
    "depth",
    "scope",
    "kind",
    "strength",
    "method",
    "label",
    "selection",
    "draw",
    "fraction",
    "k",
)
"""What says which intervention a cell of a sweep is; docs/run-folder.md explains each."""


def silent(_done: int, _total: int) -> None:
    """Report progress to nobody."""


@dataclass(frozen=True)
class Neurons:
    """Units of one component of one layer: what an intervention edits.

    `units` are distinct indices in `[0, width)`, in the order of the ranking they come from.
    """

    layer: int
    units: tuple[int, ...]
    component: Component = "residual"

    def __len__(self) -> int:
        return len(self.units)


@dataclass(frozen=True, eq=False)
class Activations:
    """Readout states of one component in every layer, with what the classifier said about each example.

    `values[l, i]` is the component's state in layer `l` at the readout row of example `i` (where the head reads several
    rows: their mean), in float32. `features` is the input of the final linear map, or None where the head does not end
    in one. `row_mean` and `row_deviation` are each unit's moments over all rows that are no padding; where the head
    `reads_several_rows`, an edit is made in them. `class_moments` are those of each class at the readout row, (layer,
    label, unit). `logits` are None where they were not recorded. `source` is the fingerprint of the examples: two
    splits are told apart by it.

    What was recorded into a folder is read from it when it is asked for: see `synapse.stored`.
    """

    values: Float[np.ndarray, "layer example unit"] | StoredValues
    logits: Float[np.ndarray, "example label"] | None
    targets: Int[np.ndarray, "example"]
    labels: tuple[str, ...]
    source: str
    features: Float[np.ndarray, "example feature"] | StoredRows | None = None
    row_mean: Float[np.ndarray, "layer unit"] | None = None
    row_deviation: Float[np.ndarray, "layer unit"] | None = None
    class_moments: Moments | None = None
    component: Component = "residual"
    reads_several_rows: bool = False

    @property
    def n_layers(self) -> int:
        """Number of layers recorded."""
        return int(self.values.shape[0])

    @property
    def width(self) -> int:
        """Number of units of the component in a layer."""
        return int(self.values.shape[2])

    def loaded(self) -> "Activations":
        """Return the same, all of it in memory."""
        features = None if self.features is None else np.asarray(self.features)
        return replace(self, values=np.asarray(self.values), features=features)

    def take(self, examples: Int[np.ndarray, "chosen"]) -> "Activations":
        """Return those of the chosen examples, in memory; moments are left out, since they are of all examples."""
        return replace(
            self,
            values=self.values[:, examples],
            logits=None if self.logits is None else self.logits[examples],
            targets=self.targets[examples],
            features=None if self.features is None else self.features[examples],
            row_mean=None,
            row_deviation=None,
            class_moments=None,
        )

    @property
    def predictions(self) -> Int[np.ndarray, "example"]:
        """The class that the classifier gives each example; errors are those of `known_logits`."""
        return np.asarray(self.known_logits.argmax(axis=1))

    @property
    def known_logits(self) -> Float[np.ndarray, "example label"]:
        """The logits.

        Raises:
            SettingsError: the logits were not recorded.
        """
        if self.logits is None:
            raise SettingsError(
                "These activations hold no logits, so what the classifier says is not known; record them with logits."
            )
        return self.logits

    @cached_property
    def unit_mean(self) -> Float[np.ndarray, "layer unit"]:
        """Each unit's mean over the examples, at the readout row."""
        return np.stack([values.mean(axis=0) for values in self.values])

    @cached_property
    def unit_deviation(self) -> Float[np.ndarray, "layer unit"]:
        """Each unit's standard deviation over the examples, at the readout row."""
        return np.stack([values.std(axis=0) for values in self.values])

    def quantiles(self, layer: int, shares: tuple[float, ...]) -> Float[np.ndarray, "share unit"]:
        """Return each unit's quantiles over the examples, at the readout row, interpolated linearly."""
        if (layer, shares) not in self._quantiles:
            self._quantiles[layer, shares] = np.asarray(np.quantile(self.values[layer], shares, axis=0))
        return self._quantiles[layer, shares]

    @cached_property
    def _quantiles(self) -> dict[tuple[int, tuple[float, ...]], Float[np.ndarray, "share unit"]]:
        return {}

    def __len__(self) -> int:
        return int(self.values.shape[1])


@dataclass(frozen=True, eq=False)
class Sweep:
    """Logits of every example under every cell of a plan.

    `cells` has one row a cell, in the order of `logits`, with the columns `CELL_COLUMNS`. Where a cell ran only some
    of the examples, the logits of the others are NaN. `reuse` says for every site and scope that was swept what its
    runs took over of a clean pass (see `synapse.model.resume.Reuse`), or `plain`, and `reasons` why it was not more,
    where more was tried. `agreement` is there where the sweep ran in reduced precision. `changes` is there where cells
    could stop early: the 95 % confidence sequence of each cell's change of accuracy over all examples of the sweep,
    which stays valid however a cell stopped; an interval for a fixed number of examples does not.
    """

    cells: pd.DataFrame
    logits: Float[np.ndarray, "cell example label"]
    clean_logits: Float[np.ndarray, "example label"]
    targets: Int[np.ndarray, "example"]
    labels: tuple[str, ...]
    reuse: Mapping[str, str] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)
    agreement: "Agreement | None" = None
    changes: Float[np.ndarray, "cell 2"] | None = None

    @property
    def run_plain(self) -> tuple[str, ...]:
        """The sites and scopes for which the whole model was run for every cell."""
        return tuple(place for place, reuse in self.reuse.items() if reuse in ("none", "plain"))


@dataclass(frozen=True)
class Agreement:
    """How reduced precision compares with float32 on a sample of runs.

    `same` is the share of equal predictions, `largest` the largest difference of a logit.
    """

    precision: str
    same: float
    largest: float
    runs: int


@dataclass(frozen=True, eq=False)
class Redirection:
    """One attack on the examples of `source` towards `target`, scored on examples it was not fitted on.

    `needed[d, i]` is the smallest budget at which draw d redirects example `examples[i]` (infinite: never); a fitted
    attack has one draw, its random control several. `others` are examples of other classes that the clean model gets
    right, and `broken_at[d, j]` the smallest budget at which other j is lost: the collateral. `share` is the share of
    fitting examples that the attack was made to redirect (NaN for attacks that are not fitted). `source` is empty for
    "every other class".
    """

    attack: str
    location: str
    source: str
    target: str
    arm: str
    unit: str
    share: float
    needed: Float[np.ndarray, "draw example"]
    examples: Int[np.ndarray, "example"]
    others: Int[np.ndarray, "other"]
    broken_at: Float[np.ndarray, "draw other"]


@dataclass(frozen=True, eq=False)
class Manipulation:
    """What one fixed change made of the logits: `logits[d, i]` is example i under draw d.

    A change that was chosen has one draw (arm `attack`), its random control several (arm `random`). `detail` says what
    was changed (`b <-> c`), `budget` how large the change is, by the name of the measure; the first is its main one.
    """

    attack: str
    location: str
    detail: str
    arm: str
    budget: Mapping[str, float]
    logits: Float[np.ndarray, "draw example label"]

    def flip_rate(self, clean: Activations) -> float:
        """Return the share of predictions that are not what they were, over all draws."""
        return float((self.predictions != clean.predictions).mean())

    def success(self, clean: Activations, source: int | None, target: int) -> float:
        """Return the share predicted as the target now, of the examples that were not; with a source, of its examples.

        NaN where there is no such example. Source: the attack success rate P(pred' = t | pred != t [, y = s]) of Rakin
        et al., T-BFA (2020).
        """
        asked = clean.predictions != target
        if source is not None:
            asked &= clean.targets == source
        return float((self.predictions[:, asked] == target).mean()) if asked.any() else float("nan")

    def collateral(self, clean: Activations, source: int | None = None) -> float:
        """Return the accuracy lost on the examples of all classes but the source; negative where it is gained."""
        others = np.ones(len(clean), dtype=bool) if source is None else clean.targets != source
        before = clean.predictions[others] == clean.targets[others]
        after = self.predictions[:, others] == clean.targets[others]
        return float(before.mean() - after.mean()) if others.any() else float("nan")

    @property
    def predictions(self) -> Int[np.ndarray, "draw example"]:
        """The class with the largest logit of every example, under every draw."""
        return np.asarray(self.logits.argmax(axis=2))


@dataclass(frozen=True)
class Bound:
    """A budget that every change at a place exceeds, or meets, that redirects a share of a source's examples.

    A share of 0 means any example at all. `n` is the number of the examples.
    """

    location: str
    source: str
    target: str
    unit: str
    share: float
    budget: float
    n: int


@dataclass(frozen=True)
class Transfer:
    """An edit at the budget at which it redirects a share of its own examples, scored on others."""

    attack: str
    location: str
    source: str
    target: str
    unit: str
    share: float
    budget: float
    own_success: float
    """Share redirected of the examples that it was fitted on: `share`, or a little more."""
    success: float
    """Share redirected of the others at that budget."""
    needed: float
    """Budget that the others need for the share; infinite where it is not reached."""
    n: int
    """Number of the other examples."""


@dataclass(frozen=True, eq=False)
class StrengthCurve:
    """Logits while the weights of a place are changed ever more: `logits[b, d, i]` is example i under draw d of
    `budgets[b]`, `clean[i]` that without a change.

    A change that was chosen has one draw (arm `attack`), random ones several; what is random by nature has the arm
    `random` alone. `target` is empty where any other prediction will do. Logits may be infinite or no numbers.
    """

    attack: str
    location: str
    target: str
    arm: str
    unit: str
    budgets: tuple[float, ...]
    logits: Float[np.ndarray, "budget draw example label"]
    clean: Float[np.ndarray, "example label"]
    targets: Int[np.ndarray, "example"]


@dataclass(frozen=True, eq=False)
class FlipCurve:
    """What numbers of bit flips did: `redirected[d, i]` of `attacked` examples, `lost[d, i]` of `others`, in draw d.

    `flips[i]` bits were flipped, of weights in a `number_format`. The searched arm has one draw, the random several.
    """

    location: str
    number_format: str
    source: str
    target: str
    arm: str
    flips: tuple[int, ...]
    redirected: Int[np.ndarray, "draw budget"]
    attacked: int
    lost: Int[np.ndarray, "draw budget"]
    others: int


@dataclass(frozen=True, eq=False)
class Attacks:
    """What families of attacks found, by the form that it has."""

    redirections: Sequence[Redirection] = ()
    manipulations: Sequence[Manipulation] = ()
    curves: Sequence[StrengthCurve] = ()
    bounds: Sequence[Bound] = ()
    transfers: Sequence[Transfer] = ()
    flips: Sequence[FlipCurve] = ()

    def __add__(self, other: "Attacks") -> "Attacks":
        """Return what both hold, the other's behind one's own."""
        names = [field.name for field in fields(self)]
        return Attacks(**{name: [*getattr(self, name), *getattr(other, name)] for name in names})


@dataclass(frozen=True)
class Figure:
    """A measured number with its 95 % interval, the number of examples behind it, and its unit.

    `value` is None where there is nothing to report; `note` then says why (for example `not used here`).
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    unit: str
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the figure as it stands in `scorecard.json`; `note` only where there is one."""
        fields = asdict(self)
        if not self.note:
            del fields["note"]
        return fields
