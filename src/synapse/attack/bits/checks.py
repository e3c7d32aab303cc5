"""Whether an attack that was kept still does what was stated of it: counts of examples, compared but for near ties."""

from dataclasses import astuple

import numpy as np
import torch
from jaxtyping import Bool, Float

from synapse.attack.bits.aim import Aim, Outcome
from synapse.data.examples import Examples
from synapse.errors import SettingsError
from synapse.model.classifier import Classifier

TIE = 1e-4
"""Distance of the two largest logits, relative to their size, below which another machine may predict otherwise."""


def check_examples(examples: Examples, stated: str, what: str) -> None:
    """Refuse examples other than those, of this fingerprint, that the counts are of.

    Raises:
        SettingsError: their fingerprint is another one.
    """
    if examples.fingerprint != stated:
        raise SettingsError(
            f"What these {what} do is stated for examples with the fingerprint {shortened(stated)}; that of "
            f"{examples.name} is {shortened(examples.fingerprint)}. Give the examples that they were scored on."
        )


def differences(
    name: str,
    stated: Outcome,
    aim: Aim,
    tolerance: float,
    clean: Float[np.ndarray, "example label"],
    edited: Float[np.ndarray, "example label"],
) -> list[str]:
    """Return a sentence where the edited logits give other counts than stated, by more than ties could."""
    found = aim.outcome(edited)
    if found == stated:
        return []
    ties = int((_is_close(clean, tolerance) | _is_close(edited, tolerance)).sum())
    if all(abs(now - then) <= ties for now, then in zip(astuple(found), astuple(stated), strict=True)):
        return []
    return [f"{name}: {_in_words(stated)} were stated, {_in_words(found)} were found"]


def tolerance_of(classifier: Classifier) -> float:
    """Return the relative difference of logits that rounding can make: more where weights are of a coarse type."""
    types = {weight.dtype for weight in classifier.module.parameters() if weight.is_floating_point()}
    return max([TIE, *(4 * torch.finfo(each).eps for each in types)])


def shortened(digest: str) -> str:
    """Return the first digits of a hash, which are enough to tell two apart."""
    return digest[:12]


def _is_close(logits: Float[np.ndarray, "example label"], tolerance: float) -> Bool[np.ndarray, "example"]:
    finite = np.isfinite(logits).all(axis=1)
    known = np.where(finite[:, None], logits, 0.0)
    ordered = np.sort(known, axis=1)
    ahead = ordered[:, -1] - ordered[:, -2]
    return np.asarray(finite & (ahead <= tolerance * (1 + np.abs(known).max(axis=1))))


def _in_words(outcome: Outcome) -> str:
    words = f"{outcome.redirected} of {outcome.attacked} redirected and {outcome.lost} of {outcome.others} others lost"
    return f"{words} ({outcome.nonfinite} no numbers)" if outcome.nonfinite else words
