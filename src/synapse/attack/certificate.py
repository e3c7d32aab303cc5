"""How large a change of the head provably changes nothing, from margins and the lengths of the features.

An edit dW moves the logits of an example with features h by dW h. To let class c overtake the predicted class y, with
logits z, it needs (dW h)_c - (dW h)_y >= z_y - z_c, and by Cauchy and Schwarz

    ||dW||_F >= ||dW||_2 >= (z_y - z_c) / (sqrt(2) * ||h||),

which the edit ((z_y - z_c) / 2) (e_c - e_y) h^T / ||h||^2 attains. So the smallest of these over the rivals is exact
for one example, in the Frobenius and in the spectral norm, and for a set of examples a bound that no edit undercuts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from synapse.attack.base import attacked
from synapse.attack.head import SHARES, UNIT, one_sample_changes
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
    test: Activations, weight: Float[np.ndarray, "label feature"], source: int | None, target: int
) -> Float[np.ndarray, "example"]:
    """Return the relative norm of the smallest edit of the head that redirects each example that an attack is about.

    An edit that redirects several of them is at least as large as the largest of theirs: see
    `synapse.attack.head.one_sample_changes`, with all rows.
    """
    features = _features(test)
    examples = attacked(test, source, target)
    changes = one_sample_changes(test.known_logits[examples], target)
    with np.errstate(divide="ignore"):
        needed = np.linalg.norm(changes, axis=1) / np.linalg.norm(features[examples], axis=1)
    return np.asarray(needed / float(np.linalg.norm(weight)))


def _features(recorded: Activations) -> Float[np.ndarray, "example feature"]:
    if recorded.features is None:
        raise SettingsError("The head does not end in a linear map, so there is nothing to certify; leave it out.")
    return np.asarray(recorded.features, dtype=np.float64)


def least_for_share(needed: Float[np.ndarray, "example"], share: float) -> float:
    """Return the smallest of the needed budgets that a share of the examples does not exceed; NaN without examples."""
    if len(needed) == 0:
        return float("nan")
    return float(np.quantile(needed, share, method="inverted_cdf"))
