"""How many units of a layer the classifier can do without, in the live model, on the fractions swept.

*Source*: minimal sufficient set of Dalvi et al., EMNLP 2020 (99 % of the accuracy kept), here without
refitting anything: the classifier itself answers with units zeroed.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from synapse.measure.intervals import Resamples, bracketed, resample
from synapse.measure.outcomes import Outcomes, outcomes_of
from synapse.measure.stability import (
    Curve,
    Place,
    by_scope,
    curve,
    headroom,
    is_used,
    not_used,
    preferred_method,
    swept_places,
)
from synapse.types import Figure, Sweep

UNIT = "share of the width"


@dataclass(frozen=True)
class Redundancy:
    """Shares of the width by scope and layer; what a sweep lacks is absent.

    `removable`: the largest share of the top units that may go before 1 % of the accuracy (relative) is lost.
    `sufficient`: the smallest share of the top units that keeps 99 % of it when kept alone.
    """

    removable: dict[str, dict[int, Figure]]
    sufficient: dict[str, dict[int, Figure]]


def redundancy(sweep: Sweep, *, method: str | None = None, seed: int = 0) -> Redundancy:
    """Return the removable and the sufficient share of every layer and scope.

    Curves need not be monotone, so a share counts as removable only where every smaller one swept is
    removable too (and as sufficient only where every larger one is). The truth lies between that point of the
    grid and the next, so the interval reaches from the one to the other. `method` and `seed` as in
    `stability`.

    Raises
    ------
    SettingsError
        Where the sweep has no such method.
    DataError
        Where the parts of the sweep do not fit each other.
    """
    outcomes = outcomes_of(sweep)
    method = preferred_method(outcomes.cells["method"], method)
    resamples = resample(len(outcomes), seed=seed)
    removable: dict[Place, Figure] = {}
    sufficient: dict[Place, Figure] = {}
    for place, cells in swept_places(outcomes):
        used = is_used(headroom(outcomes, cells))
        top = curve(outcomes, cells, "top", method)
        bottom = curve(outcomes, cells, "bottom", method)
        if top is not None:
            removable[place] = _removable(outcomes, top, resamples) if used else not_used(len(outcomes), UNIT)
        if bottom is not None:
            sufficient[place] = _sufficient(outcomes, bottom, resamples) if used else not_used(len(outcomes), UNIT)
    return Redundancy(by_scope(removable), by_scope(sufficient))


def _removable(outcomes: Outcomes, top: Curve, resamples: Resamples) -> Figure:
    last, beyond = _last_safe(outcomes, top, resamples)
    return bracketed(float(last[0]), last, beyond, n=len(outcomes), unit=UNIT, note=_resolution(outcomes))


def _sufficient(outcomes: Outcomes, bottom: Curve, resamples: Resamples) -> Figure:
    """Removing the bottom share q keeps the top share 1 - q alone."""
    last, beyond = _last_safe(outcomes, bottom, resamples)
    kept, too_few = np.round(1 - last, 12), np.round(1 - beyond, 12)  # 1 - 0.9 is not 0.1 in binary
    return bracketed(float(kept[0]), too_few, kept, n=len(outcomes), unit=UNIT, note=_resolution(outcomes))


def _last_safe(
    outcomes: Outcomes, curve: Curve, resamples: Resamples
) -> tuple[Float[np.ndarray, "draw"], Float[np.ndarray, "draw"]]:
    """The largest fraction up to which less than 1 % of the accuracy is lost, and the next one."""
    lost = resamples.weights @ curve.lost.T
    right = resamples.weights @ (curve.ran * outcomes.clean_right).T
    safe: Bool[np.ndarray, "draw point"] = 100 * lost < right  # whole numbers: no rounding at exactly 1 %
    run = np.cumprod(safe, axis=1).sum(axis=1)  # safe points before the first that is not
    last = np.maximum(run - 1, 0)
    beyond = np.minimum(last + 1, len(curve.fractions) - 1)
    return curve.fractions[last], curve.fractions[beyond]


def _resolution(outcomes: Outcomes) -> str:
    """Say so where 1 % of the accuracy is less than three examples."""
    right = int(outcomes.clean_right.sum())
    return "" if right >= 300 else f"one example is {1 / right:.1%} of the accuracy"
