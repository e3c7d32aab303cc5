"""Whether an edit that was made for some examples works on others."""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int

from synapse.attack.certificate import least_for_share
from synapse.types import Activations, Redirection, Transfer

Attack = Callable[[Activations, Activations], Sequence[Redirection]]
"""Fits edits on the first and scores them on the second."""


def halves(recorded: Activations, *, seed: int) -> tuple[Activations, Activations]:
    """Return two halves of the examples, each class split as evenly as it goes, drawn with the seed."""
    rng, first = np.random.default_rng(seed), np.zeros(len(recorded), dtype=bool)
    for position, label in enumerate(np.unique(recorded.targets)):
        members: Int[np.ndarray, member] = rng.permutation(np.flatnonzero(recorded.targets == label))
        # Of classes of odd size every other one gives its extra example to the first half.
        first[members[: (len(members) + position % 2) // 2]] = True
    return recorded.take(np.flatnonzero(first)), recorded.take(np.flatnonzero(~first))


def transfers(attack: Attack, first: Activations, second: Activations) -> list[Transfer]:
    """Return how the edits fitted on `first` do on `second`, each at its own budget: halves, or two data sets.

    Only the fitted arm is told; attacks whose budget is infinite on their own examples are left out, and so are pairs
    of classes that one of the two has no example of.
    """
    own = {_identity(one): one for one in attack(first, first) if one.arm == "attack" and one.needed.size}
    other = {_identity(one): one for one in attack(first, second) if one.arm == "attack" and one.needed.size}
    shares = {identity: (0.5, 0.95) if np.isnan(one.share) else (one.share,) for identity, one in own.items()}
    found = [
        transferred(own[identity], other[identity], share)
        for identity in own
        if identity in other
        for share in shares[identity]
    ]
    return [transfer for transfer in found if np.isfinite(transfer.budget)]


def transferred(own: Redirection, other: Redirection, share: float) -> Transfer:
    """Return how an edit does on other examples at the budget at which it redirects a share of its own."""
    budget = least_for_share(own.needed.ravel(), share)
    return Transfer(
        own.attack,
        own.location,
        own.source,
        own.target,
        own.unit,
        share,
        budget,
        float((own.needed <= budget).mean()),
        float((other.needed <= budget).mean()),
        least_for_share(other.needed.ravel(), share),
        int(other.needed.shape[1]),
    )


def _identity(one: Redirection) -> tuple[str, str, str, str, str]:
    return one.attack, one.location, one.source, one.target, f"{one.share:g}"
