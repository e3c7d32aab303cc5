"""How large a change of the head provably changes nothing, from margins and the lengths of the features.

An edit dW moves the logits of an example with features h by dW h. To let class c overtake the predicted class y, with
logits z, it needs (dW h)_c - (dW h)_y >= z_y - z_c, and by Cauchy and Schwarz

    ||dW||_F >= ||dW||_2 >= (z_y - z_c) / (sqrt(2) * ||h||),

which the edit ((z_y - z_c) / 2) (e_c - e_y) h^T / ||h||^2 attains. So the smallest of these over the rivals is exact
for one example, in the Frobenius and in the spectral norm, and for a set of examples a bound that no edit undercuts.

Where an edit may touch some rows and some features only, dW h is made of the features that it may touch, and is zero in
the rows that it may not: ||h|| becomes the length of these features, and the change of the logits the smallest one in
these rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from synapse.attack.base import attacked
from synapse.attack.head import SHARES, UNIT
from synapse.attack.logits import smallest_changes
from synapse.errors import SettingsError
from synapse.perturb.weights import HEAD
from synapse.types import GLOBAL, Activations, Bound

EditNorm = Literal["frobenius", "entry"]
"""`frobenius` (and spectral: the bounds are the same), or the largest `entry` of |dW|."""


@dataclass(frozen=True, eq=False)
class Certificate:
    """Radii below which no edit of the head changes the prediction of an example: `radii[i]`, relative to ||W||.

    `rivals[i]` is the class that is the first to overtake.
    """

    radii: Float[np.ndarray, "example"]
    rivals: Int[np.ndarray, "example"]

    @property
    def whole_set(self) -> float:
        """The largest budget that provably changes no prediction of any example; infinite for no examples."""
        return float(self.radii.min(initial=np.inf))

    def flips_at_most(self, budgets: Float[np.ndarray, "budget"]) -> Float[np.ndarray, "budget"]:
        """Return the largest share of predictions that any one edit of each budget can change."""
        share: Float[np.ndarray, budget] = np.searchsorted(np.sort(self.radii), budgets, side="right") / max(
            len(self.radii), 1
        )
        return share

    def least_for(self, share: float) -> float:
        """Return a budget that every edit exceeds, or just meets, that changes a share of the predictions."""
        return least_for_share(self.radii, share)


def certify_head(
    recorded: Activations,
    weight: Float[np.ndarray, "label feature"],
    *,
    rows: Sequence[int] | None = None,
    norm: EditNorm = "frobenius",
    with_bias: bool = False,
) -> Certificate:
    """Return the certificate of the head on recorded examples.

    With `rows`, for edits of these rows alone (two of them: the rows that an attack on one pair of classes edits).
    `with_bias` also allows changes of the bias, as one more column: h becomes (h, 1), W becomes (W, b) with b unknown
    here, so budgets stay relative to the norm of `weight`.

    Raises:
        SettingsError: the activations carry no features of the final linear map, or a row that it does not have.
    """
    features = _features(recorded)
    size = float(np.linalg.norm(weight)) if norm == "frobenius" else float(np.abs(weight).max())
    if with_bias:
        features = np.column_stack([features, np.ones(len(features))])
    radii, rivals = certified_radii(recorded.known_logits, features, rows=rows, norm=norm)
    return Certificate(radii / size, rivals)


def certified_radii(
    logits: Float[np.ndarray, "example label"],
    features: Float[np.ndarray, "example feature"],
    *,
    rows: Sequence[int] | None = None,
    norm: EditNorm = "frobenius",
) -> tuple[Float[np.ndarray, "example"], Int[np.ndarray, "example"]]:
    """Return the norm of the smallest edit that changes each prediction, and the class that it changes to.

    With n of the two rows y and c among those that may be edited, it is (z_y - z_c) / (sqrt(n) * ||h||_2), or, for the
    largest entry, (z_y - z_c) / (n * ||h||_1); infinite where n is 0 or h is.
    """
    n_labels = logits.shape[1]
    if rows is not None and not set(rows) <= set(range(n_labels)):
        raise SettingsError(f"The rows {sorted(rows)} were asked for; the head has the rows 0 to {n_labels - 1}.")
    z, example, predicted = logits.astype(np.float64), np.arange(len(logits)), logits.argmax(axis=1)
    may = np.isin(np.arange(n_labels), range(n_labels) if rows is None else rows)
    count = may[None, :].astype(float) + may[predicted][:, None]  # (example, rival)
    gain = np.sqrt(count) if norm == "frobenius" else count
    length = np.linalg.norm(features.astype(np.float64), ord=2 if norm == "frobenius" else 1, axis=1)
    reach = gain * length[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        radii = np.where(reach > 0, (z[example, predicted][:, None] - z) / reach, np.inf)
    radii[example, predicted] = np.inf
    return radii.min(axis=1), np.asarray(radii.argmin(axis=1))


def head_bounds(test: Activations, weight: Float[np.ndarray, "label feature"]) -> list[Bound]:
    """Return what edits of the head provably need: to change any prediction, and to redirect shares of each class.

    Raises:
        SettingsError: the activations carry no features of the final linear map.
    """
    untouched = Bound(HEAD, GLOBAL, GLOBAL, UNIT, 0.0, certify_head(test, weight).whole_set, len(test))
    found = [untouched] if len(test) else []
    for source, target in permutations(range(len(test.labels)), 2):
        ends = HEAD, test.labels[source], test.labels[target], UNIT
        needed = needed_norms(test, weight, source, target)
        found += [Bound(*ends, share, least_for_share(needed, share), len(needed)) for share in SHARES if len(needed)]
    return found


def needed_norms(
    test: Activations,
    weight: Float[np.ndarray, "label feature"],
    source: int | None,
    target: int,
    *,
    rows: Sequence[int] | None = None,
    features: Sequence[int] | None = None,
) -> Float[np.ndarray, "example"]:
    """Return the relative norm of the smallest edit of the head that redirects each example that an attack is about.

    With `rows` or `features`, of the smallest that touches these alone; infinite where none of them does it. An edit
    that redirects several examples is at least as large as the largest of theirs.
    """
    examples = attacked(test, source, target)
    read = _features(test)[examples]
    change = least_change(test.known_logits[examples], target, rows=rows)
    length = np.linalg.norm(read if features is None else read[:, list(features)], axis=1)
    return quotient(change, length) / float(np.linalg.norm(weight))


def least_change(
    logits: Float[np.ndarray, "example label"], target: int, *, rows: Sequence[int] | None = None
) -> Float[np.ndarray, "example"]:
    """Return the length of the smallest change of each example's logits, of all or of these rows, that puts the target
    on top: 0 where it is, infinite where no such change does it.

    Of rivals that may not fall, the highest says how far the target must rise at least; beyond that, with the rivals
    that may fall, it is as if there were no others (`synapse.attack.logits.smallest_changes`). *Source*: the sum of the
    squares is convex in how far the target rises, so that the least one that is allowed is next to the least of all.
    """
    z = logits.astype(np.float64)
    may = np.isin(np.arange(z.shape[1]), range(z.shape[1]) if rows is None else list(rows))
    lacking = z - z[:, [target]]
    fixed = lacking[:, ~may].max(axis=1, initial=0.0)
    rise = np.zeros(len(z))
    if may[target]:
        alone = smallest_changes(np.where(may, z, -np.inf), target, "l2")[:, target]
        rise = np.maximum(alone, fixed)
    falls = np.maximum(lacking[:, may] - rise[:, None], 0.0)
    length = np.sqrt(np.square(rise) + np.square(falls).sum(axis=1))
    return np.where(fixed > rise, np.inf, length)


def quotient(change: Float[np.ndarray, "*#shape"], length: Float[np.ndarray, "*#shape"]) -> Float[np.ndarray, "..."]:
    """Return how large an edit must be that changes logits by so much through features of that length.

    Nothing for no change, and infinitely large for a change through features that are zero.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(change > 0, change / length, 0.0)


def _features(recorded: Activations) -> Float[np.ndarray, "example feature"]:
    if recorded.features is None:
        raise SettingsError("The head does not end in a linear map, so there is nothing to certify; leave it out.")
    return np.asarray(recorded.features, dtype=np.float64)


def least_for_share(needed: Float[np.ndarray, "example"], share: float) -> float:
    """Return the smallest of the needed budgets that a share of the examples does not exceed; NaN without examples."""
    if len(needed) == 0:
        return float("nan")
    return float(np.quantile(needed, share, method="inverted_cdf"))
