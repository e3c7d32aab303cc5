"""What every intervention is: an edit of neurons in a scope, made row by row during a forward pass.

To write one, subclass `Intervention` as a frozen dataclass of plain numbers and define `values`; docs/interventions.md
shows how, `synapse.testing.check_perturbation` says whether it holds what the others hold.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import KW_ONLY, MISSING, asdict, dataclass, fields
from functools import cached_property, partial
from inspect import isabstract
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from synapse.errors import SettingsError, near
from synapse.model.classifier import Batch, Classifier
from synapse.model.hooks import Edit, Site, edited_sites
from synapse.types import COMPONENTS, SCOPES, Component, Neurons, Scope


@dataclass(frozen=True, eq=False)
class Place:
    """Where an intervention acts in one forward pass: the site's layer, the rows it edits, and who the examples are.

    `rows` is None where every row of the site is edited. `keys` identifies each example by its content, `labels` holds
    its class where that is known. `noise(seed)` gives standard normal draws for every row and unit of the states, 0 in
    padding; a draw depends on (seed, component, layer, content key, row), never on the batch.
    """

    layer: int
    rows: Bool[Tensor, "example token"] | None
    keys: tuple[int, ...]
    labels: Int[Tensor, "example"] | None = None
    noise: Callable[[int], Float[Tensor, "example token unit"]] | None = None

    def rows_of(self, states: Float[Tensor, "example token unit"]) -> Float[Tensor, "row unit"]:
        """Return the edited rows of anything shaped like the states, one after the other, example by example."""
        flat = states.reshape(-1, states.shape[2])
        return flat if self.rows is None else flat.index_select(0, self.chosen)

    def examples_of(self, states: Float[Tensor, "example token unit"]) -> Int[Tensor, "row"]:
        """Return whose row each edited row is: an index into `keys` and `labels`."""
        if self.rows is not None:
            return self._chosen_examples
        if states.shape[:2] not in self._all_examples:
            everyone = torch.arange(states.shape[0], device=states.device)
            self._all_examples[states.shape[:2]] = everyone.repeat_interleave(states.shape[1])
        return self._all_examples[states.shape[:2]]

    # Many cells are edited at one place, so what they share is made once.

    @cached_property
    def chosen(self) -> Int[Tensor, "row"]:
        """Positions of the edited rows among all rows of all examples, where not all are edited."""
        assert self.rows is not None
        return self.rows.flatten().nonzero().squeeze(1)

    @cached_property
    def _chosen_examples(self) -> Int[Tensor, "row"]:
        assert self.rows is not None
        return self.chosen // self.rows.shape[1]

    @cached_property
    def _all_examples(self) -> dict[torch.Size, Tensor]:
        return {}


@dataclass(frozen=True)
class Intervention(ABC):
    """An edit of `neurons` in a `scope`; `with classifier.edited(intervention):` applies it.

    The edit acts on the component and layer of the neurons; with scope `readout-onward` also on the same units of every
    later layer. Where the head reads several rows, the scope `readout` edits all of them.

    A kind of intervention is a frozen dataclass whose own fields are plain numbers, strings and tuples of these, so
    that it compares, hashes and serialises; it defines `values`, and where its numbers can be wrong `check`.

    Invariants: rows and neurons that are not declared stay as they are, bitwise; `states` is never changed; the result
    for a row depends on that row, its example and the parameters alone.
    """

    neurons: Neurons
    _: KW_ONLY
    scope: Scope = "readout"

    def __post_init__(self) -> None:
        """Refuse parameters that cannot be, once and where they are given.

        Raises:
            SettingsError: an unknown scope, repeated or negative units, or whatever `check` refuses.
        """
        if self.scope not in SCOPES:
            raise SettingsError(
                f"The scope is {self.scope!r}; one of {', '.join(SCOPES)} was expected.{near(self.scope, SCOPES)}"
            )
        units = self.neurons.units
        if len(set(units)) < len(units):
            raise SettingsError("Some units are listed twice; each neuron can be edited once. Drop the repeats.")
        if min(units, default=0) < 0:
            raise SettingsError(f"Unit {min(units)} was asked for; units are counted from 0.")
        if self.scope == "readout-onward" and not self.fits_every_layer:
            raise SettingsError(
                f"{type(self).__name__} carries numbers of one layer, and 'readout-onward' edits later ones too; apply "
                "one intervention a layer instead: `classifier.edited(first, second, ...)`."
            )
        self.check()

    @abstractmethod
    def values(
        self, x: Float[Tensor, "row unit"], place: Place, example: Int[Tensor, "row"]
    ) -> Float[Tensor, "row unit"]:
        """Return what replaces the values `x` of the neurons, in float32 or better.

        The columns are in the order of `neurons.units`; `example[i]` is the example of row i in the place. `x` itself
        stays as it is.
        """

    def check(self) -> None:
        """Refuse a kind's own parameters that cannot be; by default there is nothing to refuse."""
        return

    @property
    def fits_every_layer(self) -> bool:
        """Whether the same numbers can be used at a later layer; means and deviations of one layer cannot."""
        return True

    def edited(self, states: Float[Tensor, "example token unit"], place: Place) -> Float[Tensor, "example token unit"]:
        """Return a copy of the states in which the neurons have new values in the rows of the place.

        The arithmetic is done in the type of the states, at float32 or better; the result has their type.
        """
        rows = place.rows_of(states)
        is_whole = self._is_range and len(self.neurons) == rows.shape[1]
        x = rows if is_whole else self.columns(rows)
        exact = torch.promote_types(states.dtype, torch.float32)
        new = self.values(x.to(exact), place, place.examples_of(states)).to(states.dtype)
        if place.rows is None and is_whole:
            # A copy all the same: values may be handed back as they came, or be one row that stands for all.
            return torch.empty(states.shape, dtype=states.dtype, device=states.device).copy_(new.reshape(states.shape))
        edited = states.clone(memory_format=torch.contiguous_format)
        flat = edited.view(-1, edited.shape[2])
        if place.rows is None:
            self._put(flat, new)
            return edited
        if not is_whole:
            self._put(rows, new)  # these are a copy already
            new = rows
        flat.index_copy_(0, place.chosen, new)
        return edited

    def columns(self, rows: Float[Tensor, "row unit"]) -> Float[Tensor, "row chosen"]:
        """Return the neurons' columns of rows of the whole site, in the order of `neurons.units`."""
        if self._is_range:
            return rows[:, self._slice]
        return rows.index_select(1, self._units(rows.device))

    def tensor(self, name: str, like: Tensor) -> Tensor:
        """Return the parameter of that name as a tensor of the type and device of another one, made once for each."""
        return self.made_once(name, like, partial(getattr, self, name))

    def made_once(self, name: str, like: Tensor, make: Callable[[], Any]) -> Tensor:
        """Return what `make` gives as a tensor of the type and device of another one, made once under that name."""
        return self._made_once(name, like.dtype, like.device, make)

    def to_dict(self) -> dict[str, Any]:
        """Return the intervention as plain JSON values: its kind by name, its neurons, its scope and its parameters.

        `intervention_from_dict(x.to_dict()) == x`, also with JSON in between.
        """
        return {"kind": kind_name(type(self)), **_plain(asdict(self))}

    @contextmanager
    def applied(self, classifier: Classifier) -> Iterator[None]:
        """Edit the neurons in every forward pass of the classifier while the context is open.

        Raises:
            SettingsError: a component, layer or unit that the classifier does not have.
        """
        check_neurons(self.neurons, classifier)
        sites, first = classifier.sites(self.neurons.component), self.neurons.layer
        layers = range(first, len(sites)) if self.scope == "readout-onward" else [first]
        edits: list[tuple[Site, Edit]] = [(sites[layer], partial(self._live, classifier, layer)) for layer in layers]
        with edited_sites(classifier.module, edits):
            yield

    def _live(self, classifier: Classifier, layer: int, states: Tensor) -> Tensor:
        """Return the states of a layer for the batch that is running, edited."""
        batch, n_tokens, component = classifier.current_batch, states.shape[1], self.neurons.component
        rows = classifier.rows(batch, classifier.sites(component)[layer], n_tokens, self.scope)
        noise = _Draws(classifier, batch, component, layer, n_tokens)
        return self.edited(states, Place(layer, rows, batch.keys, batch.labels, noise))

    def _put(self, rows: Float[Tensor, "row unit"], new: Float[Tensor, "row chosen"]) -> None:
        """Write the neurons' columns, in place."""
        if self._is_range:
            rows[:, self._slice] = new
        else:
            # Several times faster than `index_copy_` along the last axis.
            rows.scatter_(1, self._units(rows.device).expand(new.shape), new)

    @cached_property
    def _is_range(self) -> bool:
        """Whether the units follow one another, so that a view does instead of a gather."""
        units = self.neurons.units
        return bool(units) and units == tuple(range(units[0], units[0] + len(units)))

    @cached_property
    def _slice(self) -> slice:
        return slice(self.neurons.units[0], self.neurons.units[-1] + 1)

    def _units(self, device: torch.device) -> Int[Tensor, "chosen"]:
        return self._made_once("neurons.units", torch.long, device, partial(getattr, self.neurons, "units"))

    @cached_property
    def _tensors(self) -> dict[tuple[str, torch.dtype, torch.device], Tensor]:
        return {}

    def _made_once(self, name: str, dtype: torch.dtype, device: torch.device, make: Callable[[], Any]) -> Tensor:
        """Return what `make` gives as a tensor; kept outside the fields, so that it is no part of equality or hash."""
        key = (name, dtype, device)
        if key not in self._tensors:
            # A tensor born in inference mode could not be used where gradients are wanted.
            with torch.inference_mode(False):
                self._tensors[key] = torch.as_tensor(make(), dtype=dtype, device=device)
        return self._tensors[key]


@dataclass(frozen=True, eq=False)
class _Draws:
    """The noise of a place in a live forward pass."""

    classifier: Classifier
    batch: Batch
    component: Component
    layer: int
    n_tokens: int

    def __call__(self, seed: int) -> Float[Tensor, "example token unit"]:
        return noise_for(self.classifier, self.batch, self.component, self.layer, self.n_tokens, seed=seed)


def intervention_from_dict(values: Mapping[str, Any]) -> Intervention:
    """Return the intervention that `Intervention.to_dict` wrote.

    A kind of your own is found by its class name, once its module has been imported.

    Raises:
        SettingsError: an unknown kind, missing or unknown parameters, or parameters that the kind refuses.
    """
    given = {name: _tuples(value) for name, value in values.items()}
    kind, neurons = given.pop("kind", None), given.pop("neurons", None)
    known = _kinds()
    if kind not in known:
        raise SettingsError(
            f"There is no intervention {kind!r}; the kinds are {', '.join(sorted(known))}.{near(str(kind), known)}"
        )
    if len(known[kind]) > 1:
        homes = " and ".join(sorted(cls.__module__ for cls in known[kind]))
        raise SettingsError(f"The intervention {kind!r} is defined in {homes}; give one of the classes another name.")
    (cls,) = known[kind]
    names = {field.name: field for field in fields(cls) if field.name != "neurons"}
    needed = {name for name, field in names.items() if field.default is MISSING}
    if not isinstance(neurons, Mapping) or not needed <= given.keys() <= names.keys():
        raise SettingsError(
            f"The intervention {kind!r} was given {', '.join(values)}; kind, neurons, {', '.join(names)} were expected."
        )
    return cls(Neurons(**neurons), **given)


def kind_name(cls: type[Intervention]) -> str:
    """Return the name of a kind: that of its class in small letters, `class-mean` for `ClassMean`."""
    return re.sub(r"(?<!^)(?=[A-Z])", "-", cls.__name__).lower()


def check_neurons(neurons: Neurons, classifier: Classifier) -> None:
    """Refuse neurons that the classifier does not have, or that repeat."""
    sites = classifier.sites(neurons.component)
    if not 0 <= neurons.layer < len(sites):
        raise SettingsError(
            f"Layer {neurons.layer} was asked for; the classifier has the layers 0 to {len(sites) - 1} of "
            f"{neurons.component!r}."
        )
    width = sites[neurons.layer].width
    outside = [unit for unit in neurons.units if not 0 <= unit < width]
    if outside:
        raise SettingsError(
            f"Unit {outside[0]} was asked for; the classifier has the units 0 to {width - 1} in each layer of "
            f"{neurons.component!r}."
        )
    if len(set(neurons.units)) < len(neurons.units):
        raise SettingsError("Some units are listed twice; each neuron can be edited once. Drop the repeats.")


def noise_for(
    classifier: Classifier, batch: Batch, component: Component, layer: int, n_tokens: int, *, seed: int
) -> Float[Tensor, "example token unit"]:
    """Return standard normal noise for every row of a batch that is no padding, 0 for the others.

    An example's noise depends on (seed, component, layer, content) and on the row's place among its own rows, never on
    how far, or on which side, the batch was padded.
    """
    site = classifier.sites(component)[layer]
    one_row = site.layout == "example unit"
    there = None if one_row else classifier.anatomy.rows.rows(batch.inputs, n_tokens).cpu().numpy()
    place = (layer,) if component == "residual" else (layer, COMPONENTS.index(component))
    draws = np.zeros((len(batch.keys), n_tokens, site.width), dtype=np.float32)
    for example, key in enumerate(batch.keys):
        rows = np.arange(n_tokens) if there is None else np.flatnonzero(there[example])
        draw = np.random.default_rng((seed, *place, key)).standard_normal((len(rows), site.width), dtype=np.float32)
        draws[example, rows] = draw
    return torch.from_numpy(draws).to(classifier.device)


def _kinds() -> dict[str, list[type[Intervention]]]:
    """Return the kinds that are defined by now, by name; one that a later definition replaced is left out."""
    found: dict[str, dict[tuple[str, str], type[Intervention]]] = {}
    waiting = Intervention.__subclasses__()
    while waiting:
        cls = waiting.pop(0)
        waiting += cls.__subclasses__()
        if not isabstract(cls):
            found.setdefault(kind_name(cls), {})[cls.__module__, cls.__qualname__] = cls
    return {name: list(classes.values()) for name, classes in found.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, tuple) else value


def _tuples(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _tuples(entry) for name, entry in value.items()}
    return tuple(_tuples(entry) for entry in value) if isinstance(value, (list, tuple)) else value
