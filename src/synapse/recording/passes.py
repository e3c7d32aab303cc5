"""What one window of examples gives: the states of every site asked for, the logits and the features."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from synapse.data.examples import Examples
from synapse.errors import ModelError
from synapse.model.classifier import Batch, Classifier, in_halves
from synapse.model.hooks import Edit, Site, edited_sites
from synapse.moments import Moments, moments_by_class
from synapse.types import Component

Item = TypeVar("Item")


@dataclass(frozen=True)
class Wanted:
    """What is to be recorded: components, in their first `depth` layers, and whether the logits are."""

    components: tuple[Component, ...]
    depth: int
    logits: bool

    def sites(self, classifier: Classifier) -> dict[Component, tuple[Site, ...]]:
        """Return the sites of every component."""
        return {name: classifier.sites(name)[: self.depth] for name in self.components}

    def n_features(self, classifier: Classifier) -> int | None:
        """Return the width of what the final linear map reads; None where it is not recorded."""
        if not self.logits or classifier.anatomy.final is None:
            return None
        return classifier.sites("pooler")[0].width


@dataclass(frozen=True, eq=False)
class Window:
    """What was recorded of some examples; moments of rows are (layer, unit), those of classes (layer, label, unit)."""

    values: Mapping[Component, Float[np.ndarray, "layer example unit"]]
    logits: Float[np.ndarray, "example label"] | None
    features: Float[np.ndarray, "example feature"] | None
    rows: Mapping[Component, Moments]
    classes: Mapping[Component, Moments]

    @property
    def moments(self) -> dict[str, Moments]:
        """The moments by their names in a layout."""
        named = {f"{name}/rows": moments for name, moments in self.rows.items()}
        return named | {f"{name}/classes": moments for name, moments in self.classes.items()}


def run_window(
    classifier: Classifier,
    examples: Examples,
    targets: Int[np.ndarray, "example"],
    wanted: Wanted,
    *,
    first: int,
    progress: Callable[[int], None],
) -> Window:
    """Return what the examples give.

    `first` is the position of the first of them, for messages; `progress` is told how many each pass was about.

    Raises:
        ModelError: a state or a logit is not finite.
    """
    sites, n, n_features = wanted.sites(classifier), len(examples), wanted.n_features(classifier)
    values = {name: np.empty((len(places), n, places[0].width), dtype=np.float32) for name, places in sites.items()}
    rows = {name: Moments.none(len(places), places[0].width) for name, places in sites.items()}
    logits = np.empty((n, len(classifier.labels)), dtype=np.float32) if wanted.logits else None
    features = None if n_features is None else np.empty((n, n_features), dtype=np.float32)
    with classifier.studied():
        for batch in _ahead(classifier.batches(examples.inputs)):
            for part, found, _ in in_halves(batch, partial(_pass, classifier, sites=sites, wanted=wanted)):
                for name, places in sites.items():
                    states = [found.states[name, layer] for layer in range(len(places))]
                    values[name][:, part.index] = np.stack([state.readout for state in states])
                    rows[name] = rows[name].merged(_moments([state.rows for state in states if state.rows is not None]))
                if logits is not None and found.logits is not None:
                    logits[part.index] = found.logits.float().cpu().numpy()
                if features is not None:
                    features[part.index] = found.states["features", 0].readout
                progress(len(part.index))
    for array in (*(np.moveaxis(each, 1, 0) for each in values.values()), logits):
        if array is not None and not np.isfinite(array).all():
            broken = np.flatnonzero(~np.isfinite(array.reshape(n, -1)).all(axis=1))
            raise ModelError(
                f"The model gave states or logits that are not finite (NaN or infinity) for {len(broken)} "
                f"examples, the first of them example {first + int(broken[0])}; load it in float32, or leave them out."
            )
    classes = {name: moments_by_class(each, targets, len(classifier.labels)) for name, each in values.items()}
    return Window(values, logits, features, rows, classes)


RowMoments = tuple[int, np.ndarray, np.ndarray]
"""Count, mean and sum of squared distances of rows, by unit."""


@dataclass(frozen=True, eq=False)
class _States:
    """What is kept of the states of a site: those at the readout row, and the moments of all rows where wanted."""

    readout: Float[np.ndarray, "example unit"]
    rows: RowMoments | None


@dataclass(frozen=True, eq=False)
class _Found:
    """What one pass gave by component and layer (`features`: what the final map reads), and the logits."""

    states: Mapping[tuple[str, int], _States]
    logits: Float[Tensor, "example label"] | None


class _Enough(Exception):  # noqa: N818
    """All that is wanted of a pass has been seen."""


def _pass(
    classifier: Classifier, batch: Batch, *, sites: Mapping[Component, tuple[Site, ...]], wanted: Wanted
) -> _Found:
    """Return what is wanted of one forward pass, which ends with the deepest site where no logits are."""
    kept: dict[tuple[str, int], _States] = {}
    places: list[tuple[tuple[str, int], Site]] = [
        ((name, layer), site) for name, found in sites.items() for layer, site in enumerate(found)
    ]
    if wanted.n_features(classifier) is not None:
        places.append((("features", 0), classifier.sites("pooler")[0]))
    last, rows_of = None if wanted.logits else len(places), cache(partial(_Rows, classifier, batch))
    edits: list[tuple[Site, Edit]] = [
        (site, partial(_keep, kept, place, site, rows_of, last)) for place, site in places
    ]
    try:
        with edited_sites(classifier.module, edits):
            return _Found(kept, classifier.forward(batch))
    except _Enough:
        return _Found(kept, None)


def _keep(
    kept: dict[tuple[str, int], _States],
    place: tuple[str, int],
    site: Site,
    rows_of: Callable[[int], "_Rows"],
    last: int | None,
    states: Tensor,
) -> None:
    # While the states are there: a block that works in place would change what the one before it returned, and a copy
    # of every layer costs more than what is kept of it.
    rows = rows_of(states.shape[1])
    moments = None if place[0] == "features" else rows.moments(site, states)
    kept[place] = _States(rows.readout_state(site, states).cpu().numpy(), moments)
    if len(kept) == last:
        raise _Enough


@dataclass(frozen=True, eq=False)
class _Rows:
    """Which rows of a batch are there, and which the head reads, for states of so many rows an example.

    Worked out once a batch: what is done in every layer counts beside a forward pass.
    """

    classifier: Classifier
    batch: Batch
    n_tokens: int

    @cached_property
    def there(self) -> Int[Tensor, "row"]:
        """Positions of the rows that are no padding, the examples one after the other."""
        return self.classifier.anatomy.rows.rows(self.batch.inputs, self.n_tokens).flatten().nonzero()[:, 0]

    @cached_property
    def read(self) -> Int[Tensor, "example"] | None:
        """The one row of every example that the head reads; None where it reads several."""
        return self.classifier.readout_row(self.batch, self.n_tokens)

    def readout_state(self, site: Site, states: Float[Tensor, "example token unit"]) -> Tensor:
        """Return the readout state of every example, (example, unit)."""
        if site.layout == "example unit" or self.read is None:
            return self.classifier.readout_state(self.batch, site, states)
        return states[torch.arange(len(states), device=states.device), self.read].float()

    def moments(self, site: Site, states: Float[Tensor, "example token unit"]) -> RowMoments:
        """Return the moments of all rows that are no padding."""
        rows = states.flatten(0, 1)
        if site.layout == "example unit":
            rows = rows.float()
            mean = rows.mean(dim=0)
            distances = rows - mean
        else:
            rows = rows.index_select(0, self.there).float()
            mean = rows.mean(dim=0)
            distances = rows.sub_(mean)  # these are a copy
        squares = distances.square_().sum(dim=0)
        return len(rows), mean.double().cpu().numpy(), squares.double().cpu().numpy()


def _moments(layers: Sequence[RowMoments]) -> Moments:
    counts, means, squares = zip(*layers, strict=True)
    return Moments(np.array(counts), np.stack(means), np.stack(squares))


def _ahead(items: Iterator[Item]) -> Iterator[Item]:
    """Yield the items, each made while the one before it is used: tokenising does not wait for the model."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item
