"""The kinds of interventions: what replaces the value x of a neuron during a forward pass.

Each is a frozen dataclass of plain numbers. Those that need numbers of the examples have a constructor
`of(neurons, activations, ...)`, which takes them from recorded activations, best those of the training examples.
`Activations.values` holds the readout row only; moments over all rows are there too. So `Mean.of` and `Noise.of` fit
every scope but `readout-onward`, and the `of` of the others refuses `all` and `non-padding`.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from synapse.errors import SettingsError, near
from synapse.perturb.base import (
    Intervention,
    Place,
    check_neurons,
    intervention_from_dict,
    kind_name,
    noise_for,
)
from synapse.types import GLOBAL, Activations, Neurons, Scope

__all__ = [
    "Clamp",
    "ClassMean",
    "Intervention",
    "Mean",
    "Noise",
    "Patch",
    "Permute",
    "Place",
    "Quantise",
    "Resample",
    "Rotate",
    "Scale",
    "SignFlip",
    "Steer",
    "Zero",
    "check_neurons",
    "intervention_from_dict",
    "kind_name",
    "noise_for",
]

MOST_BITS = 16
"""Finest quantisation: with many more levels, float32 could not tell them apart."""

DONORS = 64
"""Examples that `Resample.of` takes values from, unless another number is asked for."""

Numbers = tuple[float, ...]
"""One number for each neuron, in the order of `neurons.units`."""


# ------------------------------------------------------------------------------------------- kinds that need no numbers


@dataclass(frozen=True)
class Zero(Intervention):
    """Sets the neurons to 0: x' = 0. Any scope."""

    def values(
        self, x: Float[Tensor, "row unit"], place: Place, example: Int[Tensor, "row"]
    ) -> Float[Tensor, "row unit"]:
        """Return 0, also where x is not finite."""
        return torch.zeros_like(x)


@dataclass(frozen=True)
class Scale(Intervention):
    """Multiplies the neurons by a factor: x' = factor * x; a negative one also flips their sign. Any scope."""

    _: KW_ONLY
    factor: float

    def check(self) -> None:
        """Refuse a factor that is not finite."""
        _check_finite("factor", (self.factor,))

    def values(
        self, x: Float[Tensor, "row unit"], place: Place, example: Int[Tensor, "row"]
    ) -> Float[Tensor, "row unit"]:
        """Return the multiples."""
        return x * self.factor


@dataclass(frozen=True)
class SignFlip(Intervention):
    """Turns the sign of the neurons: x' = -x. Any scope."""

    def values(
        self, x: Float[Tensor, "row unit"], place: Place, example: Int[Tensor, "row"]
    ) -> Float[Tensor, "row unit"]:
        """Return the negatives."""
        return -x


@dataclass(frozen=True)
class Permute(Intervention):
    """Exchanges values within the set, so that each neuron gets another one's: x'_i = x_p(i). Any scope.

    The permutation p is drawn uniformly from those without fixed points, by rejection (one draw in about e has none);
    it depends on the seed and the size of the set. A set of one stays as it is.

    Invariant: the values of a row are the same multiset before and after.
    """

    _: KW_ONLY
    seed: int = 0

    def check(self) -> None:
        """Refuse a negative seed."""
        _check_seed(self.seed)

    def values(
        self, x: Float[Tensor, "row unit"], place: Place, example: Int[Tensor, "row"]
    ) -> Float[Tensor, "row unit"]:
        """Return the values in the order of the permutation."""
        return x.index_select(1, self.made_once("order", example, self.order))

    def order(self) -> Int[np.ndarray, "unit"]:
        """Return which neuron of the set each one gets its value from, as positions in `neurons.units`."""
        rng, same = np.random.default_rng((self.seed, len(self.neurons))), np.arange(len(self.neurons))
        while True:
            order = rng.permutation(same)
            if len(same) < 2 or (order != same).all():
                return order


@dataclass(frozen=True)
class Rotate(Intervention):
    """Rotates the neurons' values within their subspace, by an angle in degrees, in planes drawn at random. Any scope.

    x' = Q B Q^T x. Q is an orthonormal basis of the set, uniform by Haar's measure: the QR factor of a normal matrix,
    with the signs of the triangle's diagonal taken out (Mezzadri 2007). B turns each pair of basis vectors by the
    angle; in a set of odd size one direction stays, and a set of one stays as it is. Q depends on the seed and the
    size of the set.

    Invariants: ||x'|| = ||x||; where the size is even, the angle between x and x' is the angle asked for.
    """

    _: KW_ONLY
    angle: float
    seed: int = 0

    def check(self) -> None:
        """Refuse an angle that is not finite, or a negative seed."""
        _check_finite("angle", (self.angle,))
        _check_seed(self.seed)

    def values(
        self, x: Float[Tensor, "row unit"], place: Place, example: Int[Tensor, "row"]
    ) -> Float[Tensor, "row unit"]:
        """Return the rotated values."""
        return x @ self.made_once("matrix", x, self.matrix).T

    def matrix(self) -> Float[np.ndarray, "unit unit"]:
        """Return Q B Q^T."""
        size = len(self.neurons)
        normal = np.random.default_rng((self.seed, size)).standard_normal((size, size))
        basis, triangle = np.linalg.qr(normal)
        basis = basis * np.sign(np.diag(triangle))
        turn, angle = np.eye(size), math.radians(self.angle)
        first = np.arange(0, size - 1, 2)
        turn[first, first] = turn[first + 1, first + 1] = math.cos(angle)
        turn[first, first + 1], turn[first + 1, first] = -math.sin(angle), math.sin(angle)
        rotation: Float[np.ndarray, "unit unit"] = basis @ turn @ basis.T
        return rotation


# -------------------------------------------------------------------------------- kinds that carry numbers of one layer


@dataclass(frozen=True)
class OfOneLayer(Intervention):
    """An intervention that carries numbers of one layer, so that the scope `readout-onward` is refused."""

    @property
    def fits_every_layer(self) -> bool:
        """False: the numbers are those of one layer."""
        return False

    def _check_one_each(self, *names: str) -> None:
        """Refuse parameters that have not one finite number for each neuron."""
        for name in names:
            numbers = getattr(self, name)
            if len(numbers) != len(self.neurons):
                raise SettingsError(
                    f"{len(numbers)} {name} were given for {len(self.neurons)} neurons; one each was expected."
                )
            _check_finite(name, numbers)


@dataclass(frozen=True)
class Mean(OfOneLayer):
    """Sets each neuron to a given value, usually its mean over the training examples: x' = mean. All scopes but onward.

    Source: mean ablation, Wang et al. (ICLR 2023).
    """

    _: KW_ONLY
    means: Numbers

    @classmethod
    def of(cls, neurons: Neurons, activations: Activations, *, scope: Scope = "readout") -> "Mean":
        """Return it with each neuron's mean over the rows that the scope edits."""
        mean, _ = _moments(neurons, activations, scope)
        return cls(neurons, scope=scope, means=mean)

    def check(self) -> None:
        """Refuse other than one number for each neuron."""
        self._check_one_each("means")

    def values(
        self, x: Float[Tensor, "row unit"], place: Place, example: Int[Tensor, "row"]
    ) -> Float[Tensor, "row unit"]:
        """Return the means in every row."""
        return self.tensor("means", x).expand(x.shape)


@dataclass(frozen=True)
class Noise(OfOneLayer):
    """Adds Gaussian noise of `strength` times each neuron's own deviation: x' = x + strength * deviation * e.

    e is standard normal and depends on the seed, the component, the layer, the example's content and the row, never on
    batch size or order; padding gets none. All scopes but onward.
    """

    _: KW_ONLY
    strength: float
    deviations: Numbers
    seed: int = 0

    @classmethod
    def of(
        cls, neurons: Neurons, activations: Activations, *, strength: float, seed: int = 0, scope: Scope = "readout"
    ) -> "Noise":
        """Return it with each neuron's deviation over the rows that the scope edits."""
        _, deviation = _moments(neurons, activations, scope)
        return cls(neurons, scope=scope, strength=strength, deviations=deviation, seed=seed)

    def check(self) -> None:
        """Refuse other than one deviation, 0 or more, for each neuron, and a strength that is not finite."""
        self._check_one_each("deviations")
        _check_finite("strength", (self.strength,))
        _check_seed(self.seed)
        if any(deviation < 0 for deviation in self.deviations):
            raise SettingsError(f"A deviation is {min(self.deviations)}; deviations of 0 or more were expected.")

    def values(
        self, x: Float[Tensor, "row unit"], place: Place, example: Int[Tensor, "row"]
    ) -> Float[Tensor, "row unit"]:
        """Return the values with noise."""
        if place.noise is None:
            raise SettingsError("The place has no noise to draw from; give `Place(noise=...)`.")
        draws = self.columns(place.rows_of(place.noise(self.seed))).to(x.dtype)
        return torch.addcmul(x, draws, self.tensor("deviations", x), value=self.strength)


@dataclass(frozen=True)
class ClassMean(OfOneLayer):
    """Sets each neuron to its mean over the examples of one class, `label`: x' = mean of the class. Readout rows.

    Against `Mean` it shows what the neurons say for that class rather than that they say nothing.
    """

    _: KW_ONLY
    means: Numbers
    label: str

    @classmethod
    def of(cls, neurons: Neurons, activations: Activations, *, label: str, scope: Scope = "readout") -> "ClassMean":
        """Return it with the means over the examples whose class is `label`."""
        _check_readout(cls, scope)
        mean = _states(neurons, activations)[_members(activations, label)].mean(axis=0)
        return cls(neurons, scope=scope, means=_numbers(mean), label=label)

    def check(self) -> None:
        """Refuse other than one number for each neuron."""
        self._check_one_each("means")

    def values(
        self, x: Float[Tensor, "row unit"], place: Place, example: Int[Tensor, "row"]
    ) -> Float[Tensor, "row unit"]:
        """Return the means in every row."""
        return self.tensor("means", x).expand(x.shape)


@dataclass(frozen=True)
class Patch(OfOneLayer):
    """Sets the neurons to what they are in a given example: x' = state. Readout rows.

    `example` is its index, and `source` the fingerprint of the examples that it is of, for the record.
    Source: activation patching, Vig et al. (NeurIPS 2020); interchange intervention, Geiger et al. (NeurIPS 2021).
    """

    _: KW_ONLY
    state: Numbers
    example: int
    source: str = ""

    @classmethod
    def of(cls, neurons: Neurons, activations: Activations, *, example: int, scope: Scope = "readout") -> "Patch":
        """Return it with the neurons' values in example number `example` of the activations."""
        _check_readout(cls, scope)
        if not 0 <= example < len(activations):
            raise SettingsError(f"Example {example} was asked for; the activations hold 0 to {len(activations) - 1}.")
        state = _numbers(_states(neurons, activations)[example])
        return cls(neurons, scope=scope, state=state, example=example, source=activations.source)

    def check(self) -> None:
        """Refuse other than one number for each neuron."""
        self._check_one_each("state")

    def values(
        self, x: Float[Tensor, "row unit"], place: Place, example: Int[Tensor, "row"]
    ) -> Float[Tensor, "row unit"]:
        """Return the given example's values in every row."""
        return self.tensor("state", x).expand(x.shape)


@dataclass(frozen=True)
class Resample(OfOneLayer):
    """Sets the neurons to what they are in another example, a donor: x' = donors[d(example)]. Readout rows.

    d is a hash (BLAKE2b) of the seed and the example's content, modulo the number of donors: an example has one donor,
    the same at every layer and in every set of neurons, whatever stands beside it in a batch. With `other_class` the
    donor is one of another class than the example's own: `donor_labels` are the classes of the donors, as indices.
    Source: resampling ablation, Chan et al. (causal scrubbing, 2022).
    """

    _: KW_ONLY
    donors: tuple[Numbers, ...]
    donor_labels: tuple[int, ...] = ()
    other_class: bool = False
    seed: int = 0

    @classmethod
    def of(
        cls,
        neurons: Neurons,
        activations: Activations,
        *,
        other_class: bool = False,
        donors: int = DONORS,
        seed: int = 0,
        scope: Scope = "readout",
    ) -> "Resample":
        """Return it with that many of the recorded examples as donors, drawn with the seed (all, where fewer)."""
        _check_readout(cls, scope)
        if donors < 1:
            raise SettingsError(f"{donors} donors were asked for; 1 or more were expected.")
        order = np.random.default_rng(seed).permutation(len(activations))
        if other_class:
            # Class by class in turn, so that a rare class gives donors too.
            turn = np.empty(len(order), dtype=np.int64)
            for label in np.unique(activations.targets):
                members = activations.targets[order] == label
                turn[members] = np.arange(members.sum())
            order = order[np.argsort(turn, kind="stable")]
        chosen = np.sort(order[:donors])
        states = _states(neurons, activations)[chosen]
        return cls(
            neurons,
            scope=scope,
            donors=tuple(_numbers(state) for state in states),
            donor_labels=tuple(int(label) for label in activations.targets[chosen]),
            other_class=other_class,
            seed=seed,
        )

    def check(self) -> None:
        """Refuse donors without one number for each neuron, or, with `other_class`, of fewer than two classes."""
        _check_seed(self.seed)
        if not self.donors:
            raise SettingsError("No donors were given; one or more were expected.")
        for donor in self.donors:
            if len(donor) != len(self.neurons):
                raise SettingsError(
                    f"A donor has {len(donor)} values for {len(self.neurons)} neurons; one each was expected."
                )
            _check_finite("donors", donor)
        if self.donor_labels and len(self.donor_labels) != len(self.donors):
            raise SettingsError(
                f"{len(self.donor_labels)} donor_labels were given for {len(self.donors)} donors; one each was "
                "expected."
            )
        if self.other_class and len(set(self.donor_labels)) < 2:
            raise SettingsError(
                f"The donors are of {len(set(self.donor_labels))} known classes; for `other_class` two or more were "
                "expected: give `donor_labels`, and donors of several classes."
            )

    def values(
        self, x: Float[Tensor, "row unit"], place: Place, example: Int[Tensor, "row"]
    ) -> Float[Tensor, "row unit"]:
        """Return each row's donor values.

        Raises:
            SettingsError: with `other_class`, where the classes of the examples are not known.
        """
        donors = torch.tensor(self.donors_of(place), dtype=torch.long, device=x.device)
        return self.tensor("donors", x).index_select(0, donors.index_select(0, example))

    def donors_of(self, place: Place) -> list[int]:
        """Return the position among `donors` of each example's donor."""
        if not self.other_class:
            return [_hashed(self.seed, key) % len(self.donors) for key in place.keys]
        if place.labels is None:
            raise SettingsError(
                "The classes of the examples are not known here, and donors of other classes were asked for; sweep "
                "labelled examples, or leave out `other_class`."
            )
        pools = [self._pool(label) for label in place.labels.tolist()]
        return [pool[_hashed(self.seed, key) % len(pool)] for key, pool in zip(place.keys, pools, strict=True)]

    def _pool(self, label: int) -> tuple[int, ...]:
        """Return the donors of other classes than this one."""
        if label not in self._pools:
            self._pools[label] = tuple(i for i, other in enumerate(self.donor_labels) if other != label)
        return self._pools[label]

    @cached_property
    def _pools(self) -> dict[int, tuple[int, ...]]:
        return {}


@dataclass(frozen=True)
class Bounded(OfOneLayer):
    """Keeps each neuron between two bounds of its own."""

    _: KW_ONLY
    low: Numbers
    high: Numbers

    def check(self) -> None:
        """Refuse other than one low and one high number, in that order, for each neuron."""
        self._check_one_each("low", "high")
        for unit, low, high in zip(self.neurons.units, self.low, self.high, strict=True):
            if low > high:
                raise SettingsError(f"Unit {unit} has the bounds {low} and {high}; low <= high was expected.")


@dataclass(frozen=True)
class Clamp(Bounded):
    """Keeps each neuron between two bounds of its own: x' = min(max(x, low), high). Readout rows.

    With quantiles of the training examples for bounds it takes away what is out of the ordinary, and nothing else.
    """

    @classmethod
    def of(
        cls,
        neurons: Neurons,
        activations: Activations,
        *,
        low: float = 0.01,
        high: float = 0.99,
        scope: Scope = "readout",
    ) -> "Clamp":
        """Return it with the quantiles `low` and `high` of each neuron (shares in [0, 1], linear interpolation)."""
        bottom, top = _quantiles(cls, neurons, activations, low, high, scope)
        return cls(neurons, scope=scope, low=bottom, high=top)

    def values(
        self, x: Float[Tensor, "row unit"], place: Place, example: Int[Tensor, "row"]
    ) -> Float[Tensor, "row unit"]:
        """Return the values within the bounds."""
        return x.clamp(self.tensor("low", x), self.tensor("high", x))


@dataclass(frozen=True)
class Quantise(Bounded):
    """Rounds each neuron to one of 2^bits equally spaced levels from `low` to `high`; what lies outside is clipped.

    x' = low + step * round((min(max(x, low), high) - low) / step) with step = (high - low) / (2^bits - 1), halves to
    the even level; where low = high, that is the value. Readout rows.
    Source: uniform quantisation, Jacob et al. (CVPR 2018), with the bounds themselves for levels.
    """

    _: KW_ONLY
    bits: int

    @classmethod
    def of(
        cls,
        neurons: Neurons,
        activations: Activations,
        *,
        bits: int,
        low: float = 0.0,
        high: float = 1.0,
        scope: Scope = "readout",
    ) -> "Quantise":
        """Return it between the quantiles `low` and `high` of each neuron, by default its least and largest value."""
        bottom, top = _quantiles(cls, neurons, activations, low, high, scope)
        return cls(neurons, scope=scope, bits=bits, low=bottom, high=top)

    def check(self) -> None:
        """Refuse other than 1 to 16 bits, and other than one low and one high number, in that order, a neuron."""
        if not 1 <= self.bits <= MOST_BITS:
            raise SettingsError(f"{self.bits} bits were asked for; 1 to {MOST_BITS} were expected.")
        super().check()

    def values(
        self, x: Float[Tensor, "row unit"], place: Place, example: Int[Tensor, "row"]
    ) -> Float[Tensor, "row unit"]:
        """Return the nearest levels."""
        low, high = self.tensor("low", x), self.tensor("high", x)
        step = self.made_once("step", x, self.steps)
        level = x.clamp(low, high).sub_(low).div_(step).round_()
        # The top level is `high` itself, not what rounding errors of the step make of it.
        return torch.addcmul(low, level, step).clamp_(low, high)

    def steps(self) -> Numbers:
        """Return the distance of two levels of each neuron; 1 where there is only one, and nothing is divided by 0."""
        n = 2**self.bits - 1
        return tuple((high - low) / n or 1.0 for low, high in zip(self.low, self.high, strict=True))


@dataclass(frozen=True)
class Steer(OfOneLayer):
    """Adds a vector, `strength` times: x' = x + strength * vector.

    The vector is given, or the difference of two class means; `source` and `target` then name the classes, for the
    record. One that is given may act in any scope but onward; a difference of means is of the readout rows.
    Source: Turner et al. (activation addition, 2023); the difference of means, Rimsky et al. (ACL 2024).
    """

    _: KW_ONLY
    strength: float
    vector: Numbers
    source: str = GLOBAL
    target: str = GLOBAL

    @classmethod
    def of(
        cls,
        neurons: Neurons,
        activations: Activations,
        *,
        target: str,
        source: str = GLOBAL,
        strength: float = 1.0,
        scope: Scope = "readout",
    ) -> "Steer":
        """Return the step from the mean of `source` to that of `target`; without a source, from all other classes."""
        _check_readout(cls, scope)
        states, to = _states(neurons, activations), _members(activations, target)
        start = ~to if source == GLOBAL else _members(activations, source)
        if not start.any():
            raise SettingsError(f"All recorded examples are of the class {target!r}; others were expected too.")
        vector = _numbers(states[to].mean(axis=0) - states[start].mean(axis=0))
        return cls(neurons, scope=scope, strength=strength, vector=vector, source=source, target=target)

    def check(self) -> None:
        """Refuse other than one number for each neuron, and a strength that is not finite."""
        self._check_one_each("vector")
        _check_finite("strength", (self.strength,))

    def values(
        self, x: Float[Tensor, "row unit"], place: Place, example: Int[Tensor, "row"]
    ) -> Float[Tensor, "row unit"]:
        """Return the values with the vector added."""
        return torch.add(x, self.tensor("vector", x), alpha=self.strength)


# -------------------------------------------------------------------------------------- numbers of recorded activations


def _numbers(values: Float[np.ndarray, "unit"]) -> Numbers:
    return tuple(values.astype(np.float64).tolist())


def _check_recorded(neurons: Neurons, activations: Activations) -> None:
    """Refuse neurons that the activations are not of."""
    if neurons.component != activations.component:
        raise SettingsError(
            f"The neurons are of {neurons.component!r}, the activations of {activations.component!r}; record them with "
            f"`component={neurons.component!r}`."
        )
    if not 0 <= neurons.layer < activations.n_layers:
        raise SettingsError(
            f"Layer {neurons.layer} was asked for; the activations have the layers 0 to {activations.n_layers - 1}."
        )
    outside = [unit for unit in neurons.units if not 0 <= unit < activations.width]
    if outside:
        raise SettingsError(
            f"Unit {outside[0]} was asked for; the activations have the units 0 to {activations.width - 1}."
        )


def _states(neurons: Neurons, activations: Activations) -> Float[np.ndarray, "example unit"]:
    """Return the neurons' values at the readout row of every example, in float64: means of many are taken of them."""
    _check_recorded(neurons, activations)
    states: Float[np.ndarray, "example unit"] = activations.values[neurons.layer][:, list(neurons.units)]
    return states.astype(np.float64)


def _moments(neurons: Neurons, activations: Activations, scope: Scope) -> tuple[Numbers, Numbers]:
    """Return mean and deviation of the neurons over the rows that the scope edits: one row, or all that are there."""
    _check_recorded(neurons, activations)
    units = list(neurons.units)
    if scope in ("all", "non-padding") or activations.reads_several_rows:
        if activations.row_mean is None or activations.row_deviation is None:
            raise SettingsError("The activations carry no moments over all rows; record them again with `record`.")
        mean, deviation = activations.row_mean[neurons.layer], activations.row_deviation[neurons.layer]
        return _numbers(mean[units]), _numbers(deviation[units])
    # Of the whole layer and then of the units: a sum depends on the layout, and one neuron has one mean in every set.
    return _numbers(activations.unit_mean[neurons.layer][units]), _numbers(
        activations.unit_deviation[neurons.layer][units]
    )


def _quantiles(
    cls: type[Intervention], neurons: Neurons, activations: Activations, low: float, high: float, scope: Scope
) -> tuple[Numbers, Numbers]:
    _check_readout(cls, scope)
    if activations.reads_several_rows:
        raise SettingsError(
            f"The head reads several rows, and only quantiles of their mean are recorded, while {cls.__name__} bounds "
            "every row; give bounds of your own: `low=` and `high=`, one each a neuron."
        )
    if not 0 <= low <= high <= 1:
        raise SettingsError(
            f"The quantiles are {low} and {high}; shares of the examples, 0 <= low <= high <= 1, were expected."
        )
    _check_recorded(neurons, activations)
    bottom, top = activations.quantiles(neurons.layer, (low, high))[:, list(neurons.units)]
    return _numbers(bottom), _numbers(top)


def _members(activations: Activations, label: str) -> np.ndarray:
    """Return which examples are of the class."""
    if label not in activations.labels:
        raise SettingsError(
            f"There is no class {label!r}; the classes are {', '.join(activations.labels)}."
            f"{near(label, activations.labels)}"
        )
    members: np.ndarray = activations.targets == activations.labels.index(label)
    if not members.any():
        raise SettingsError(f"None of the recorded examples is of the class {label!r}; record some that are.")
    return members


# ------------------------------------------------------------------------------------------------------------- refusals


def _check_readout(cls: type[Intervention], scope: Scope) -> None:
    """Refuse scopes beyond the readout rows, of which alone the recorded values are."""
    if scope in ("all", "non-padding"):
        raise SettingsError(
            f"The recorded values are those of the readout row, and {cls.__name__} was to edit the rows of {scope!r}; "
            "use the scope 'readout', or give numbers of your own."
        )


def _check_finite(name: str, numbers: Sequence[float]) -> None:
    if not all(map(math.isfinite, numbers)):
        raise SettingsError(f"A number of {name} is not finite; finite numbers were expected.")


def _check_seed(seed: int) -> None:
    if seed < 0:
        raise SettingsError(f"The seed is {seed}; 0 or more was expected.")


def _hashed(seed: int, key: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed} {key}".encode(), digest_size=8).digest(), "little")
