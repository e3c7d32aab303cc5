"""Interventions: edits of neurons during a forward pass.

Every kind is one affine map of the neuron's value x plus noise, `gain * x + offset + deviation * e` with e standard
normal, so that one function edits one example under one intervention, or a thousand copies under a thousand.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from synapse.errors import SettingsError
from synapse.model.classifier import Batch, Classifier
from synapse.model.hooks import Edit, Site, edited_sites
from synapse.types import COMPONENTS, SCOPES, Component, Neurons, Scope


@dataclass(frozen=True, eq=False)
class AffineEdit:
    """The edit of all units of a site, one row a run: untouched units have gain 1, offset 0 and deviation 0."""

    gain: Float[Tensor, "run unit"]
    offset: Float[Tensor, "run unit"]
    deviation: Float[Tensor, "run unit"]

    @classmethod
    def stacked(cls, edits: Sequence["AffineEdit"]) -> "AffineEdit":
        """Return the edits one after the other, a run each."""
        return cls(*(torch.cat([getattr(edit, part) for edit in edits]) for part in ("gain", "offset", "deviation")))

    def to(self, device: torch.device) -> "AffineEdit":
        """Return the edit on a device."""
        return AffineEdit(self.gain.to(device), self.offset.to(device), self.deviation.to(device))

    def take(self, runs: Int[Tensor, "chosen"]) -> "AffineEdit":
        """Return the edit of the chosen runs."""
        return AffineEdit(self.gain[runs], self.offset[runs], self.deviation[runs])

    def __call__(
        self,
        states: Float[Tensor, "run token unit"],
        rows: Bool[Tensor, "run token"] | None,
        noise: Float[Tensor, "run token unit"] | None,
    ) -> Float[Tensor, "run token unit"]:
        """Return the states, edited at the given rows of each run, or at every row if `rows` is None."""
        if rows is None:
            edited = states * self.gain[:, None] + self.offset[:, None]
            edited = edited if noise is None else edited + self.deviation[:, None] * noise
            return edited.to(states.dtype)
        run, row = rows.nonzero(as_tuple=True)
        values = states[run, row] * self.gain[run] + self.offset[run]
        if noise is not None:
            values = values + self.deviation[run] * noise[run, row]
        edited = states.clone()
        edited[run, row] = values.to(edited.dtype)
        return edited


@dataclass(frozen=True)
class Intervention(ABC):
    """An edit of `neurons` in a `scope`; `with classifier.edited(intervention):` applies it.

    The edit acts on the component and layer of the neurons; with scope `readout-onward` also on the same units of every
    later layer. Where the head reads several rows, the scope `readout` edits all of them.
    """

    neurons: Neurons
    _: KW_ONLY
    scope: Scope = "readout"

    @abstractmethod
    def map(self) -> tuple[float, Float[np.ndarray, "unit"] | float, Float[np.ndarray, "unit"] | float]:
        """Return gain, offset and deviation of the edited neurons, in the order of `neurons.units`."""

    @property
    def fits_every_layer(self) -> bool:
        """Whether the same numbers can be used at a later layer; means and deviations of one layer cannot."""
        return True

    def edit(self, width: int) -> AffineEdit:
        """Return the edit of a site of that width, as one run."""
        rows = [torch.ones(1, width), torch.zeros(1, width), torch.zeros(1, width)]
        units = list(self.neurons.units)
        for row, values in zip(rows, self.map(), strict=True):
            row[0, units] = torch.as_tensor(values, dtype=torch.float32)
        return AffineEdit(*rows)

    @contextmanager
    def applied(self, classifier: Classifier) -> Iterator[None]:
        """Edit the neurons in every forward pass of the classifier while the context is open.

        Raises:
            SettingsError: a component, layer, unit or scope that the classifier does not have.
        """
        check_neurons(self.neurons, classifier)
        if self.scope not in SCOPES:
            raise SettingsError(f"The scope is {self.scope!r}; one of {', '.join(SCOPES)} was expected.")
        if self.scope == "readout-onward" and not self.fits_every_layer:
            raise SettingsError(
                f"{type(self).__name__} carries numbers of one layer, and 'readout-onward' edits later ones too; apply "
                "one intervention a layer instead: `classifier.edited(first, second, ...)`."
            )
        sites, first = classifier.sites(self.neurons.component), self.neurons.layer
        layers = range(first, len(sites)) if self.scope == "readout-onward" else [first]
        edit = self.edit(sites[first].width).to(classifier.device)
        edits: list[tuple[Site, Edit]] = [
            (sites[layer], partial(self._edited, classifier, edit, layer)) for layer in layers
        ]
        with edited_sites(classifier.module, edits):
            yield

    def _edited(self, classifier: Classifier, edit: AffineEdit, layer: int, states: Tensor) -> Tensor:
        """Return the states of a layer for the batch that is running, edited."""
        batch, n_tokens = classifier.current_batch, states.shape[1]
        site = classifier.sites(self.neurons.component)[layer]
        rows = classifier.rows(batch, site, n_tokens, self.scope)
        noise = None
        if isinstance(self, Noise) and edit.deviation.any():
            noise = noise_for(classifier, batch, self.neurons.component, layer, n_tokens, seed=self.seed)
        everyone = torch.zeros(len(states), dtype=torch.long, device=states.device)
        return edit.take(everyone)(states, rows, noise)


@dataclass(frozen=True)
class Zero(Intervention):
    """Sets the neurons to 0."""

    def map(self) -> tuple[float, float, float]:
        """Return gain 0, offset 0, no noise."""
        return 0.0, 0.0, 0.0


@dataclass(frozen=True)
class Mean(Intervention):
    """Sets each neuron to a given value, usually its mean over the training examples (`Activations.mean(layer)`)."""

    _: KW_ONLY
    values: tuple[float, ...]

    def map(self) -> tuple[float, Float[np.ndarray, "unit"], float]:
        """Return gain 0, the values as offset, no noise."""
        return 0.0, _one_each(self.values, self.neurons, "values"), 0.0

    @property
    def fits_every_layer(self) -> bool:
        """False: the numbers are those of one layer."""
        return False


@dataclass(frozen=True)
class Scale(Intervention):
    """Multiplies the neurons by a factor; a negative factor also flips their sign."""

    _: KW_ONLY
    factor: float

    def map(self) -> tuple[float, float, float]:
        """Return the factor as gain, offset 0, no noise."""
        return self.factor, 0.0, 0.0


@dataclass(frozen=True)
class Noise(Intervention):
    """Adds Gaussian noise of `strength` times each neuron's own deviation over the training examples.

    The draw depends on the seed, the layer, the example's content and the row, never on batch size or order.
    """

    _: KW_ONLY
    strength: float
    deviations: tuple[float, ...]
    seed: int = 0

    def map(self) -> tuple[float, float, Float[np.ndarray, "unit"]]:
        """Return gain 1, offset 0, and the deviation of the noise."""
        return 1.0, 0.0, self.strength * _one_each(self.deviations, self.neurons, "deviations")

    @property
    def fits_every_layer(self) -> bool:
        """False: the numbers are those of one layer."""
        return False


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


def _one_each(values: tuple[float, ...], neurons: Neurons, what: str) -> Float[np.ndarray, "unit"]:
    if len(values) != len(neurons):
        raise SettingsError(f"{len(values)} {what} were given for {len(neurons)} neurons; one each was expected.")
    return np.asarray(values, dtype=np.float32)
