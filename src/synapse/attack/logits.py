"""Shifting one logit: the whole success curve is the distribution of the gaps, without a search."""

import numpy as np
from jaxtyping import Float

from synapse.attack.base import RANDOM_DRAWS, attacked, broken_budget, needed_budget
from synapse.types import GLOBAL, Activations, Redirection


def shift_attacks(test: Activations, *, seed: int) -> list[Redirection]:
    """Return the shift that each example needs, for every target and source (or all others), beside its control.

    The shift that example i needs is its gap g = max_c z_c - z_t, so the success at shift d is P(g <= d): the
    distribution of the gaps. Source: single-bias attack, Liu et al. (ICCAD 2017). The control adds a random vector of
    the same Euclidean length to the logits.
    """
    n_labels = len(test.labels)
    draws = np.random.default_rng(seed).standard_normal((RANDOM_DRAWS, n_labels))
    draws /= np.linalg.norm(draws, axis=1, keepdims=True)
    found = []
    for target in range(n_labels):
        towards = np.eye(n_labels)[[target]]
        for source in (None, *(c for c in range(n_labels) if c != target)):
            for arm, directions in (("attack", towards), ("random", draws)):
                found.append(_along(test, directions, source, target, arm))
    return found


def _along(
    test: Activations, directions: Float[np.ndarray, "draw label"], source: int | None, target: int, arm: str
) -> Redirection:
    examples = attacked(test, source, target)
    # A shift that is meant to move everything else has no collateral.
    others = np.flatnonzero(test.targets != source) if source is not None else np.empty(0, dtype=np.int64)
    others = others[test.predictions[others] == test.targets[others]]
    slopes = [np.broadcast_to(direction, test.known_logits.shape) for direction in directions]
    return Redirection(
        attack="logit-shift",
        location="logits",
        source=GLOBAL if source is None else test.labels[source],
        target=test.labels[target],
        arm=arm,
        unit="logit",
        share=float("nan"),
        needed=np.stack([needed_budget(test.known_logits[examples], s[examples], target) for s in slopes]),
        examples=examples,
        others=others,
        broken_at=np.stack([broken_budget(test.known_logits[others], s[others]) for s in slopes]),
    )
