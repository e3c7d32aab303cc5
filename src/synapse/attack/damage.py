"""What becomes of predictions when weights of a place are set to zero, or bits of them flip, without an aim."""

from collections.abc import Sequence

from synapse.attack.trials import Strengths
from synapse.perturb.bits import BitKind
from synapse.perturb.random_bits import RandomFlips
from synapse.perturb.weights import Pruned, Pruning

SHARES = (0.1, 0.3, 0.5, 0.7, 0.9, 0.97, 1.0)
"""Shares of every matrix's weights that are set to zero."""

PER_MILLION = (1.0, 10.0, 100.0, 1_000.0, 10_000.0)
"""Flips for each million weights of a place."""


def pruning(place: str, which: Pruned, shares: Sequence[float] = SHARES, *, draws: int = 1, seed: int = 0) -> Strengths:
    """Return prunings of a place; of random weights so many draws, of the smallest or largest there is one."""
    seeds = range(seed * 1009, seed * 1009 + draws)
    changes = [[Pruning(place, share, which, one) for one in seeds] for share in shares]
    arm = "random" if which == "random" else "attack"
    return Strengths(f"pruning-{which}", arm, "of the weights", tuple(shares), changes)


def random_flips(
    place: str, kind: BitKind, per_million: Sequence[float] = PER_MILLION, *, draws: int, seed: int
) -> Strengths:
    """Return draws of random flips of bits of a kind at a place, so many for each million weights.

    Those of any bit are the control.
    """
    seeds = range(seed * 1009, seed * 1009 + draws)
    changes = [[RandomFlips(place, n / 1e6, kind, one) for one in seeds] for n in per_million]
    arm = "random" if kind == "all" else "attack"
    return Strengths(f"{kind}-bits", arm, "bits per million weights", tuple(per_million), changes)
