"""Changes of the logits: shifts, whose success curve is the distribution of the gaps; priors, noise, swaps, rounding.

Nothing is searched for. Along a ray z + d * v the budget at which an example follows is a quotient; under noise the
probability of each prediction is one integral over a normal density; a permutation permutes the predictions.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.special import ndtr
from torch import Tensor

from synapse.attack.base import RANDOM_DRAWS, attacked, broken_budget, needed_budget
from synapse.errors import SettingsError
from synapse.model.classifier import Classifier
from synapse.types import GLOBAL, Activations, Manipulation, Redirection, StrengthCurve

Norm = Literal["one", "l2", "linf"]
"""How a change of the logits is measured: that of the target's logit alone, its Euclidean length, its largest entry."""

QUADRATURE_NODES = 96
"""Nodes of the Gauss-Hermite rule: with so many the probabilities under noise are exact to 1e-9."""

LEAST_WEIGHT = 1e-14
"""Nodes that weigh less than this are left out."""


# ---------------------------------------------------------------------------------------------------- along a direction


def shift_attacks(test: Activations, *, seed: int) -> list[Redirection]:
    """Return the shift that each example needs, for every target and source (or all others), beside its control.

    The shift that example i needs is its gap g = max_c z_c - z_t, so the success at shift d is P(g <= d): the
    distribution of the gaps. Source: single-bias attack, Liu et al. (ICCAD 2017). The control adds a random vector of
    the same Euclidean length to the logits.
    """
    n_labels = len(test.labels)
    draws = _random_directions(n_labels, seed)
    found = []
    for target in range(n_labels):
        towards = np.eye(n_labels)[[target]]
        for source in (None, *(c for c in range(n_labels) if c != target)):
            for arm, directions in (("attack", towards), ("random", draws)):
                found.append(_along(test, directions, source, target, arm))
    return found


def away_attacks(test: Activations, *, seed: int) -> list[Redirection]:
    """Return the shift of its own logit at which each example of a class falls to any other (one to all).

    It is the margin of the example. The `target` of these is empty: any class but the source.
    """
    n_labels = len(test.labels)
    draws = _random_directions(n_labels, seed)
    return [
        _along(test, directions, source, None, arm, attack="logit-shift-away")
        for source in range(n_labels)
        for arm, directions in (("attack", -np.eye(n_labels)[[source]]), ("random", draws))
    ]


def prior_attacks(test: Activations, priors: Float[np.ndarray, "label"], *, seed: int) -> list[Redirection]:
    """Return the strength tau of a prior adjustment z - tau * log(pi) that each target needs, from all other classes.

    `priors` are the shares of the classes, best those of the training examples. Source: Menon et al. (ICLR 2021),
    "Long-tail learning via logit adjustment", equation 8. The control's random vectors are as long as log(pi), less its
    mean: what all logits share moves no prediction. Under equal priors nothing moves, and every budget is infinite.

    Raises:
        SettingsError: other than one positive number for each class.
    """
    if len(priors) != len(test.labels) or not (np.isfinite(priors) & (priors > 0)).all():
        raise SettingsError(
            f"The priors are {priors.tolist()}; one positive share for each of the {len(test.labels)} classes was "
            "expected. A class without a training example has no prior: give it one of your own."
        )
    towards = np.log(priors).mean() - np.log(priors)
    draws = _random_directions(len(priors), seed) * np.linalg.norm(towards)
    return [
        _along(test, directions, None, target, arm, attack="prior-adjustment", unit="tau")
        for target in range(len(priors))
        for arm, directions in (("attack", towards[None]), ("random", draws))
    ]


def success_curve(
    needed: Float[np.ndarray, "example"], budgets: Float[np.ndarray, "budget"]
) -> Float[np.ndarray, "budget"]:
    """Return the share of examples that each budget redirects: P(needed <= d), an empirical distribution function.

    It needs an example.
    """
    curve: Float[np.ndarray, budget] = np.searchsorted(np.sort(needed), budgets, side="right") / len(needed)
    return curve


def gaps(logits: Float[np.ndarray, "example label"], target: int) -> Float[np.ndarray, "example"]:
    """Return g_t = max_{c != t} z_c - z_t: what the target lacks, negative where it is ahead."""
    others = np.delete(logits, target, axis=1).max(axis=1)
    lacking: Float[np.ndarray, example] = others.astype(np.float64) - logits[:, target]
    return lacking


def smallest_changes(
    logits: Float[np.ndarray, "example label"], target: int, norm: Norm
) -> Float[np.ndarray, "example label"]:
    """Return the smallest change of the logits after which the target ties with the largest; 0 where it is ahead.

    `one` lifts the target alone, by the gap g. `linf` lifts it by g / 2 and takes rivals down by as much as they need,
    at most g / 2. `l2` is the projection on {z_t >= z_c for all c}: the target and the rivals above a level m meet
    there, where m is the mean of exactly those; with a single rival its length is g / sqrt(2).
    """
    z = logits.astype(np.float64)
    lacking = np.maximum(gaps(logits, target), 0.0)
    if norm == "one":
        return np.asarray(lacking[:, None] * np.eye(z.shape[1])[target])
    level = z[:, target] + lacking / 2 if norm == "linf" else _meeting_level(z, target)
    level = np.where(lacking > 0, level, np.inf)[:, None]
    changes = np.minimum(level - z, 0.0)
    changes[:, target] = np.where(lacking > 0, level[:, 0] - z[:, target], 0.0)
    return changes


def _meeting_level(z: Float[np.ndarray, "example label"], target: int) -> Float[np.ndarray, "example"]:
    """Return the mean of the target and its r largest rivals, for the r that makes it largest: those are above it."""
    rivals = -np.sort(-np.delete(z, target, axis=1), axis=1)
    sums = z[:, [target]] + np.cumsum(rivals, axis=1)
    level: Float[np.ndarray, example] = (sums / np.arange(2, z.shape[1] + 1)).max(axis=1)
    return level


def _random_directions(n_labels: int, seed: int) -> Float[np.ndarray, "draw label"]:
    draws = np.random.default_rng(seed).standard_normal((RANDOM_DRAWS, n_labels))
    draws /= np.linalg.norm(draws, axis=1, keepdims=True)
    return draws


def _along(
    test: Activations,
    directions: Float[np.ndarray, "draw label"],
    source: int | None,
    target: int | None,
    arm: str,
    *,
    attack: str = "logit-shift",
    unit: str = "logit",
) -> Redirection:
    """Score directions that all logits are moved along; without a target, any other prediction will do."""
    to = source if target is None else target
    assert to is not None
    examples = attacked(test, source, to)
    # A shift that is meant to move everything else has no collateral.
    others = np.flatnonzero(test.targets != source) if source is not None else np.empty(0, dtype=np.int64)
    others = others[test.predictions[others] == test.targets[others]]
    slopes = [np.broadcast_to(direction, test.known_logits.shape) for direction in directions]
    budget = broken_budget if target is None else partial(needed_budget, target=target)
    return Redirection(
        attack=attack,
        location="logits",
        source=GLOBAL if source is None else test.labels[source],
        target=GLOBAL if target is None else test.labels[target],
        arm=arm,
        unit=unit,
        share=float("nan"),
        needed=np.stack([budget(test.known_logits[examples], s[examples]) for s in slopes]),
        examples=examples,
        others=others,
        broken_at=np.stack([broken_budget(test.known_logits[others], s[others]) for s in slopes]),
    )


# ---------------------------------------------------------------------------------------------------------- under noise


def noise_probabilities(
    logits: Float[np.ndarray, "example label"], strength: float
) -> Float[np.ndarray, "example label"]:
    """Return the probability of each prediction when N(0, strength^2) is added to every logit; rows sum to 1.

    P(t) = E_u prod_{c != t} Phi((z_t - z_c) / strength + u) with u ~ N(0, 1), by Gauss-Hermite quadrature. With two
    classes it is Phi((z_t - z_c) / (strength * sqrt(2))).

    Raises:
        SettingsError: a strength that is not positive.
    """
    if not strength > 0:
        raise SettingsError(f"The strength of the noise is {strength}; a positive number was expected.")
    nodes, weights = np.polynomial.hermite_e.hermegauss(QUADRATURE_NODES)
    weights /= weights.sum()
    z = logits.astype(np.float64) / strength
    n_labels = z.shape[1]
    target, rival = np.nonzero(~np.eye(n_labels, dtype=bool))  # target by target
    lead = z[:, target] - z[:, rival]
    total = np.zeros(z.shape)
    for node, weight in zip(nodes[weights > LEAST_WEIGHT], weights[weights > LEAST_WEIGHT], strict=True):
        total += weight * ndtr(lead + node).reshape(len(z), n_labels, n_labels - 1).prod(axis=2)
    return total


def noise_flips(
    logits: Float[np.ndarray, "example label"], strengths: Float[np.ndarray, "strength"]
) -> Float[np.ndarray, "strength example"]:
    """Return the probability that noise of each strength changes the prediction of each example, in [0, 1 - 1/C]."""
    example, predicted = np.arange(len(logits)), logits.argmax(axis=1)
    return np.stack([1 - noise_probabilities(logits, float(s))[example, predicted] for s in strengths])


# ---------------------------------------------------------------------------------------------------- changes in one go


@dataclass(frozen=True)
class LogitChange(ABC):
    """A change of the logits that `with classifier.edited(change):` applies; a row depends on that row alone."""

    @abstractmethod
    def changed(
        self, logits: Float[np.ndarray, "example label"], keys: Sequence[int]
    ) -> Float[np.ndarray, "example label"]:
        """Return what replaces the logits; `keys` tell the examples apart, by their content."""

    @contextmanager
    def applied(self, classifier: Classifier) -> Iterator[None]:
        """Change the logits in every forward pass of the classifier while the context is open."""
        with classifier.logits_edited(partial(self._live, classifier)):
            yield

    def _live(self, classifier: Classifier, logits: Tensor) -> Tensor:
        changed = self.changed(logits.double().cpu().numpy(), classifier.current_batch.keys)
        return torch.from_numpy(np.ascontiguousarray(changed)).to(logits)


@dataclass(frozen=True)
class PriorAdjustment(LogitChange):
    """Subtracts `strength` times the logarithm of each class's prior. Source: Menon et al. (ICLR 2021)."""

    priors: tuple[float, ...]
    strength: float = 1.0

    def changed(
        self, logits: Float[np.ndarray, "example label"], keys: Sequence[int]
    ) -> Float[np.ndarray, "example label"]:
        """Return the adjusted logits."""
        return logits - self.strength * np.log(self.priors)


@dataclass(frozen=True)
class Temperature(LogitChange):
    """Divides the logits by a positive temperature, which changes no prediction: a control."""

    temperature: float

    def changed(
        self, logits: Float[np.ndarray, "example label"], keys: Sequence[int]
    ) -> Float[np.ndarray, "example label"]:
        """Return the scaled logits."""
        if not self.temperature > 0:
            raise SettingsError(f"The temperature is {self.temperature}; a positive number was expected.")
        return logits / self.temperature


@dataclass(frozen=True)
class LogitNoise(LogitChange):
    """Adds N(0, strength^2) to every logit; an example's draw depends on the seed and on its content."""

    strength: float
    seed: int = 0

    def changed(
        self, logits: Float[np.ndarray, "example label"], keys: Sequence[int]
    ) -> Float[np.ndarray, "example label"]:
        """Return the noisy logits."""
        draws = [np.random.default_rng((self.seed, key)).standard_normal(logits.shape[1]) for key in keys]
        return logits + self.strength * np.stack(draws)


@dataclass(frozen=True)
class Permuted(LogitChange):
    """Gives class c the logit of class `order[c]`; predictions are those of the inverse permutation."""

    order: tuple[int, ...]

    @classmethod
    def swap(cls, first: int, second: int, n_labels: int) -> "Permuted":
        """Return the permutation that exchanges two classes."""
        order = list(range(n_labels))
        order[first], order[second] = second, first
        return cls(tuple(order))

    def changed(
        self, logits: Float[np.ndarray, "example label"], keys: Sequence[int]
    ) -> Float[np.ndarray, "example label"]:
        """Return the logits in the new order."""
        if sorted(self.order) != list(range(logits.shape[1])):
            raise SettingsError(
                f"The order is {list(self.order)}; each of the classes 0 to {logits.shape[1] - 1} was expected once."
            )
        return np.asarray(logits[:, list(self.order)])


@dataclass(frozen=True)
class RoundedLogits(LogitChange):
    """Rounds the logits to 2^bits even levels between `low` and `high`, and cuts them off there.

    Logits that meet on a level tie; the lower class wins, as everywhere.
    """

    bits: int
    low: float
    high: float

    @classmethod
    def of(cls, train: Activations, bits: int) -> "RoundedLogits":
        """Return the rounding whose range is that of the training logits."""
        return cls(bits, float(train.known_logits.min()), float(train.known_logits.max()))

    def changed(
        self, logits: Float[np.ndarray, "example label"], keys: Sequence[int]
    ) -> Float[np.ndarray, "example label"]:
        """Return the rounded logits."""
        if not 1 <= self.bits <= 24 or not self.low < self.high:
            raise SettingsError(
                f"{self.bits} bits between {self.low} and {self.high} were asked for; 1 to 24 bits and a low end below "
                "the high one were expected."
            )
        step = (self.high - self.low) / (2**self.bits - 1)
        level = np.round((np.clip(logits, self.low, self.high) - self.low) / step)
        return np.asarray(self.low + step * level)


def swap_attacks(test: Activations, *, seed: int) -> list[Manipulation]:
    """Return the logits with every pair of classes exchanged, beside pairs at random.

    No number moves far, and no weight: rows of a table of names are exchanged. The budget is the number of classes that
    are named wrongly.
    """
    n_labels, rng = len(test.labels), np.random.default_rng(seed)
    found = [
        _permuted("logit-swap", test, f"{test.labels[a]} <-> {test.labels[b]}", [Permuted.swap(a, b, n_labels)])
        for a, b in combinations(range(n_labels), 2)
    ]
    # Any two classes, at random: as many are named wrongly as in the attack.
    pairs = [rng.choice(n_labels, size=2, replace=False).tolist() for _ in range(RANDOM_DRAWS)]
    drawn = [Permuted.swap(a, b, n_labels) for a, b in pairs]
    return [*found, _permuted("logit-swap", test, "any two", drawn, arm="random")]


def rotation_attacks(test: Activations, *, seed: int) -> list[Manipulation]:
    """Return the logits with each class named as the next one, beside random permutations that leave none its name.

    With two classes there is one such permutation, which is the swap: nothing is returned.
    """
    n_labels, rng = len(test.labels), np.random.default_rng(seed)
    if n_labels == 2:
        return []
    rotation = Permuted(tuple(np.roll(np.arange(n_labels), 1).tolist()))
    drawn = [Permuted(tuple(_derangement(n_labels, rng).tolist())) for _ in range(RANDOM_DRAWS)]
    every = "each as the next"
    return [
        _permuted("logit-permutation", test, every, [rotation]),
        _permuted("logit-permutation", test, every, drawn, arm="random"),
    ]


def _derangement(n: int, rng: np.random.Generator) -> Int[np.ndarray, "label"]:
    """Return a permutation that leaves nothing in its place; of random ones about every third is one."""
    order = rng.permutation(n)
    while (order == np.arange(n)).any():
        order = rng.permutation(n)
    return order


def _permuted(
    attack: str, test: Activations, detail: str, permutations: Sequence[Permuted], *, arm: str = "attack"
) -> Manipulation:
    """Return what permutations that move the same number of classes do to the logits."""
    z, keys = test.known_logits.astype(np.float64), range(len(test))
    moved = float(sum(place != label for place, label in enumerate(permutations[0].order)))
    logits = np.stack([permutation.changed(z, keys) for permutation in permutations])
    return Manipulation(attack, "logits", detail, arm, {"classes": moved}, logits)


def temperature_controls(test: Activations, temperatures: Sequence[float]) -> list[Manipulation]:
    """Return the logits divided by temperatures, which must move no prediction: the arm is `control`."""
    z, keys = test.known_logits.astype(np.float64), range(len(test))
    found = []
    for temperature in temperatures:
        divided = Temperature(temperature).changed(z, keys)
        budget = {"rms": float(np.sqrt(np.mean((divided - z) ** 2))), "temperature": temperature}
        found.append(
            Manipulation("logit-temperature", "logits", f"by {temperature:g}", "control", budget, divided[None])
        )
    return found


def noise_curve(
    test: Activations, strengths: Sequence[float], *, seed: int, draws: int = RANDOM_DRAWS
) -> StrengthCurve:
    """Return the logits under draws of N(0, strength^2) on each; how often they change is `noise_flips`, exactly."""
    z, keys = test.known_logits.astype(np.float64), range(len(test))
    noise = np.stack(
        [LogitNoise(1.0, seed=seed * 1009 + draw).changed(np.zeros_like(z), keys) for draw in range(draws)]
    )
    logits = z + np.array(strengths)[:, None, None, None] * noise
    return StrengthCurve(
        "logit-noise", "logits", GLOBAL, "random", "logit", tuple(strengths), logits, test.known_logits, test.targets
    )


def rounding_attacks(train: Activations, test: Activations, bits: Sequence[int], *, seed: int) -> list[Manipulation]:
    """Return the logits rounded to so many bits, each beside uniform noise of the same root mean square.

    The range of the levels is that of the training logits. The budget is that root mean square, in logits.
    """
    z, keys, rng = test.known_logits.astype(np.float64), range(len(test)), np.random.default_rng(seed)
    found = []
    for n in bits:
        rounded = RoundedLogits.of(train, n).changed(z, keys)
        size = float(np.sqrt(np.mean((rounded - z) ** 2)))
        noise = rng.uniform(-1, 1, size=(RANDOM_DRAWS, *z.shape)) * np.sqrt(3) * size
        for arm, logits in (("attack", rounded[None]), ("random", z + noise)):
            budget = {"rms": size, "bits": float(n)}
            found.append(Manipulation("logit-rounding", "logits", f"{n} bits", arm, budget, logits))
    return found


def tied(logits: Float[np.ndarray, "example label"]) -> Int[np.ndarray, "tied"]:
    """Return the examples whose largest logit is that of two classes or more: rounding decides for the lower one."""
    return np.flatnonzero((logits == logits.max(axis=1, keepdims=True)).sum(axis=1) > 1)
