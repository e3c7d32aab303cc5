"""The kinds of interventions that a sweep knows by name, each with one number for its strength.

| kind | strength | label |
|---|---|---|
| `zero`, `mean`, `sign-flip`, `permute` | none | |
| `class-mean` | none | the class whose means are set |
| `resample` | none | |
| `resample-other` | none; donors are of other classes than the example | |
| `scale` | factor | |
| `noise` | deviations of the neuron | |
| `clamp` | quantile q; the bounds are the quantiles q and 1 - q | |
| `quantise` | bits | |
| `steer` | multiples of the step from the mean of the other classes | the class that is steered towards |
| `patch` | number of the reference example | |
| `rotate` | degrees | |
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from synapse.errors import SettingsError, near
from synapse.perturb.activations import (
    Clamp,
    ClassMean,
    Intervention,
    Mean,
    Noise,
    Patch,
    Permute,
    Quantise,
    Resample,
    Rotate,
    Scale,
    SignFlip,
    Steer,
    Zero,
)
from synapse.types import GLOBAL, Activations, Neurons, Scope

Numbers = Literal["none", "readout row", "rows of the scope"]
"""The numbers that a kind takes from the reference examples: none; those of the readout row of a layer; or the
moments of a layer over whichever rows are edited."""


@dataclass(frozen=True)
class Recipe:
    """What a kind needs, and how it is made.

    `make` takes the neurons and the reference examples where the kind needs numbers of them, then keywords: the scope,
    `strength` under the name `strength`, `label` under the name `label`, the seed where `is_random`, and `options`.
    `lowest` and `highest` bound the strength; `is_whole` says that it counts something.
    """

    make: Callable[..., Intervention]
    numbers: Numbers = "none"
    strength: str = ""
    lowest: float = -math.inf
    highest: float = math.inf
    is_whole: bool = False
    label: str = ""
    is_random: bool = False
    options: tuple[tuple[str, Any], ...] = ()


def _clamp(neurons: Neurons, reference: Activations, *, scope: Scope, quantile: float) -> Clamp:
    return Clamp.of(neurons, reference, low=quantile, high=1 - quantile, scope=scope)


RECIPES: dict[str, Recipe] = {
    "zero": Recipe(Zero),
    "mean": Recipe(Mean.of, "rows of the scope"),
    "class-mean": Recipe(ClassMean.of, "readout row", label="label"),
    "resample": Recipe(Resample.of, "readout row", is_random=True),
    "resample-other": Recipe(Resample.of, "readout row", is_random=True, options=(("other_class", True),)),
    "noise": Recipe(Noise.of, "rows of the scope", strength="strength", is_random=True),
    "scale": Recipe(Scale, strength="factor"),
    "sign-flip": Recipe(SignFlip),
    "clamp": Recipe(_clamp, "readout row", strength="quantile", lowest=0.0, highest=0.5),
    "quantise": Recipe(Quantise.of, "readout row", strength="bits", lowest=1.0, highest=16.0, is_whole=True),
    "steer": Recipe(Steer.of, "readout row", strength="strength", label="target"),
    "patch": Recipe(Patch.of, "readout row", strength="example", lowest=0.0, is_whole=True),
    "rotate": Recipe(Rotate, strength="angle", is_random=True),
    "permute": Recipe(Permute, is_random=True),
}
"""Every kind by its name; to add one, give it a line here."""


@dataclass(frozen=True, eq=False)
class Kind:
    """A kind of intervention, with its strength and the class it is about where it has them.

    The strength of a kind that has none is NaN, and its label the empty string.

    Raises:
        SettingsError: an unknown kind, or a strength or label that is missing, not wanted or out of range.
    """

    name: str
    strength: float = math.nan
    label: str = GLOBAL

    def __post_init__(self) -> None:
        """Refuse what could not be made."""
        recipe = self.recipe
        if bool(recipe.label) != bool(self.label):
            wanted = "a class was expected: `Kind(..., label=...)`" if recipe.label else "it takes none"
            raise SettingsError(f"The intervention {self.name!r} was given the label {self.label!r}; {wanted}.")
        if not recipe.strength:
            if not math.isnan(self.strength):
                raise SettingsError(f"The intervention {self.name!r} was given {self.strength}; it has no strength.")
            return
        is_fine = recipe.lowest <= self.strength <= recipe.highest and math.isfinite(self.strength)
        if not is_fine or (recipe.is_whole and self.strength != int(self.strength)):
            bounds = [f"from {recipe.lowest:g}"] if recipe.lowest > -math.inf else []
            bounds += [f"to {recipe.highest:g}"] if recipe.highest < math.inf else []
            what = " ".join(["a whole number" if recipe.is_whole else "a number", *bounds])
            raise SettingsError(
                f"The {recipe.strength} of {self.name!r} is {self.strength}; {what} was expected: "
                f"`Kind({self.name!r}, ...)`."
            )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Kind) and self._values == other._values

    def __hash__(self) -> int:
        return hash(self._values)

    @property
    def _values(self) -> tuple[str, str, str]:
        # As text: NaN, which stands for no strength, is not equal to itself.
        return self.name, repr(self.strength), self.label

    @property
    def recipe(self) -> Recipe:
        """What the kind needs, and how it is made."""
        if self.name not in RECIPES:
            raise SettingsError(
                f"There is no intervention {self.name!r}; the kinds are {', '.join(RECIPES)}.{near(self.name, RECIPES)}"
            )
        return RECIPES[self.name]

    @property
    def fits_onward(self) -> bool:
        """Whether the numbers of one layer may be used in later ones too: where there are none."""
        return self.recipe.numbers == "none"

    @property
    def has_moments_of_all_rows(self) -> bool:
        """Whether its numbers for all rows are others than those for the readout rows, so that these scopes differ
        even where they come to the same rows."""
        return self.recipe.numbers == "rows of the scope"

    @property
    def is_random(self) -> bool:
        """Whether it depends on the seed."""
        return self.recipe.is_random

    def fits(self, scope: Scope) -> bool:
        """Return whether the numbers that the kind needs exist for a scope."""
        if scope == "readout-onward":
            return self.fits_onward
        return scope == "readout" or self.recipe.numbers != "readout row"

    def of(self, neurons: Neurons, scope: Scope, reference: Activations, *, seed: int = 0) -> Intervention:
        """Return the intervention on these neurons, with the numbers of the reference examples that it needs.

        `seed` is that of whatever is random in it.

        Raises:
            SettingsError: a scope for which the kind has no numbers, or a class that the reference examples lack.
        """
        recipe = self.recipe
        given: dict[str, Any] = {"scope": scope, **dict(recipe.options)}
        if recipe.strength:
            given[recipe.strength] = int(self.strength) if recipe.is_whole else self.strength
        if recipe.label:
            given[recipe.label] = self.label
        if recipe.is_random:
            given["seed"] = seed
        numbers = () if recipe.numbers == "none" else (reference,)
        return recipe.make(neurons, *numbers, **given)


ZERO = Kind("zero")
KINDS = (ZERO, Kind("mean"), Kind("scale", 0.5), Kind("noise", 1.0))
"""What a study sweeps unless it is told otherwise."""
