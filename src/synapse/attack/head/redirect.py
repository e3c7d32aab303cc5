"""Steps fitted on one split for every pair of classes, scored on another, beside random ones of equal norm."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import permutations

import numpy as np
from jaxtyping import Float, Int

from synapse.attack.base import RANDOM_DRAWS, attacked, broken_budget, needed_budget
from synapse.attack.head.shortest import required_step
from synapse.attack.head.steps import HeadStep, Keys, second_moment
from synapse.attack.logits import gaps
from synapse.errors import SettingsError
from synapse.types import Activations, Redirection

log = logging.getLogger(__name__)

SHARES = (0.5, 0.95)
"""Shares of the source class's examples that an edit is fitted to redirect."""

UNIT = "||dW||/||W||"


def redirect_head(
    step: HeadStep,
    train: Activations,
    test: Activations,
    weight: Float[np.ndarray, "label feature"],
    *,
    seed: int,
    shares: tuple[float, ...] = SHARES,
    max_fit: int = 400,
) -> list[Redirection]:
    """Return what each edit needs on the test examples, for every ordered pair of classes, beside its control.

    Budgets are ||dW||_F / ||W||_F. The control is Gaussian in the weights that the step may edit: the same rows, the
    same features. At most `max_fit` examples of a class are used for fitting.

    Raises:
        SettingsError: the activations carry no features of the final linear map, or `rows` is "all".
    """
    check_features(train, test)
    if step.rows == "all":
        raise SettingsError("A step edits the row of the target, or two rows; all rows were asked for: use 'two'.")
    norm, rng = float(np.linalg.norm(weight)), np.random.default_rng(seed)
    units = np.arange(weight.shape[1]) if step.units is None else np.array(step.units, dtype=np.int64)
    fits, found = Fits(train, test, shares, max_fit), []
    for source, target in permutations(range(len(test.labels)), 2):
        edits = fits.edits(step, source, target)
        if not edits:
            continue
        for share, edit in edits:
            found.append(_along(test, edit[None] * norm, source, target, "attack", share, attack=step.name))
        random = np.zeros((RANDOM_DRAWS, *weight.shape))
        for row in (target, source)[: 2 if step.rows == "two" else 1]:
            random[:, row, units] = rng.standard_normal((RANDOM_DRAWS, len(units)))
        random *= norm / np.linalg.norm(random, axis=(1, 2), keepdims=True)
        found.append(_along(test, random, source, target, "random", float("nan"), attack=step.name))
    return found


def ranked_head_attacks(
    step: HeadStep,
    train: Activations,
    test: Activations,
    weight: Float[np.ndarray, "label feature"],
    order: Int[np.ndarray, "feature"],
    sizes: Sequence[int],
    *,
    seed: int,
    shares: tuple[float, ...] = SHARES,
    max_fit: int = 400,
) -> list[Redirection]:
    """Return the same attack where it may edit k features only: the first k of `order`, or k random ones (the control).

    Whether knowing a ranking makes an attack cheaper is what the two say beside each other. `order` is that of the
    features of the final linear map, most important first.
    """
    check_features(train, test)
    norm, fits, found = float(np.linalg.norm(weight)), Fits(train, test, shares, max_fit), []
    for k in sizes:
        location = f"head, {k} of {weight.shape[1]} features"
        rngs = [np.random.default_rng((seed, draw)) for draw in range(RANDOM_DRAWS)]
        sets = [order[:k], *(rng.permutation(weight.shape[1])[:k] for rng in rngs)]
        steps = [replace(step, units=tuple(int(unit) for unit in units)) for units in sets]
        for source, target in permutations(range(len(test.labels)), 2):
            fitted = [fits.edits(one, source, target) for one in steps]
            for (share, edit), *drawn in zip(*fitted, strict=True):
                random = np.stack([other for _, other in drawn])
                for arm, edits in (("attack", edit[None]), ("random", random)):
                    named = {"attack": f"{step.name}-ranked", "location": location}
                    found.append(_along(test, edits * norm, source, target, arm, share, **named))
    return found


@dataclass(frozen=True, eq=False)
class Fits:
    """Fits edits on one split, where the other has examples to score them on."""

    train: Activations
    test: Activations
    shares: tuple[float, ...]
    max_fit: int

    @cached_property
    def features(self) -> Float[np.ndarray, "example feature"]:
        """The features of the fitting examples."""
        assert self.train.features is not None
        return np.asarray(self.train.features, dtype=np.float64)

    @cached_property
    def moment(self) -> Float[np.ndarray, "feature feature"]:
        """The mean of h h^T over them."""
        return second_moment(self.features)

    def edits(self, step: HeadStep, source: int, target: int) -> list[tuple[float, Float[np.ndarray, "label feature"]]]:
        """Return the edits of norm 1 and the shares that they are made for; none where a split has no example."""
        train, labels = self.train, self.test.labels
        fitting = attacked(train, source, target)[: self.max_fit]
        if len(fitting) == 0 or len(attacked(self.test, source, target)) == 0:
            log.info("No examples of %s to redirect to %s.", labels[source], labels[target])
            return []
        logits = train.known_logits[fitting]
        required = required_step(logits, source, target) if step.rows == "two" else gaps(logits, target)
        shares = self.shares if step.depends_on_share else (float("nan"),)
        keys = [Keys(self.features, self.moment, train.targets, fitting, required, share) for share in shares]
        return [(one.share, step.edit(one, source, target, len(labels))) for one in keys]


def bias_attacks(
    train: Activations, test: Activations, bias: Float[np.ndarray, "label"], *, seed: int
) -> list[Redirection]:
    """Return the smallest change of the bias alone for every ordered pair of classes, relative to its norm.

    The bias is an input of 1 that has two rows: the target's rises and the source's falls by the same number, which is
    the shortest change where no third class is near. Nothing is fitted, and `train` only says which bias to relate to
    where the head has none (||b|| = 0): the mean length of its logits. The control is Gaussian.
    """
    size = float(np.linalg.norm(bias)) or float(np.linalg.norm(train.known_logits, axis=1).mean())
    n_labels, rng = len(test.labels), np.random.default_rng(seed)
    draws = rng.standard_normal((RANDOM_DRAWS, n_labels, 1))
    draws /= np.linalg.norm(draws, axis=1, keepdims=True)
    ones = replace(test, features=np.ones((len(test), 1), dtype=np.float32))
    found = []
    for source, target in permutations(range(n_labels), 2):
        towards = ((np.eye(n_labels)[target] - np.eye(n_labels)[source]) / np.sqrt(2))[None, :, None]
        for arm, edits in (("attack", towards), ("random", draws)):
            scored = _along(ones, edits * size, source, target, arm, float("nan"), attack="head-bias")
            found.append(replace(scored, unit="||db||/||b||"))
    return [one for one in found if len(one.examples)]


def _along(
    test: Activations,
    edits: Float[np.ndarray, "draw label feature"],
    source: int,
    target: int,
    arm: str,
    share: float,
    *,
    attack: str,
    location: str = "head",
) -> Redirection:
    """Score edits of relative norm 1: the logits move by budget * (edit @ features)."""
    assert test.features is not None
    examples = attacked(test, source, target)
    others: Int[np.ndarray, other] = np.flatnonzero(test.targets != source)
    others = others[test.predictions[others] == test.targets[others]]
    slopes = [test.features @ edit.T for edit in edits]
    return Redirection(
        attack=attack,
        location=location,
        source=test.labels[source],
        target=test.labels[target],
        arm=arm,
        unit=UNIT,
        share=share,
        needed=np.stack([needed_budget(test.known_logits[examples], s[examples], target) for s in slopes]),
        examples=examples,
        others=others,
        broken_at=np.stack([broken_budget(test.known_logits[others], s[others]) for s in slopes]),
    )


def check_features(*recorded: Activations) -> None:
    """Raise `SettingsError` where there are no features, so that there are no rows to edit."""
    if any(activations.features is None for activations in recorded):
        raise SettingsError(
            "The head does not end in a linear map, so it has no rows to edit; leave the head attack out."
        )
