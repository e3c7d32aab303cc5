"""How far a measured number can be trusted: 95 % intervals over the examples.

| the number | its interval |
|---|---|
| a rate: hits among n examples | Clopper-Pearson, exact (`rate`) |
| a change of accuracy on the same examples | Tango's score interval for paired proportions (`change`) |
| anything computed from those: areas, means over classes | percentiles of paired draws (`figure`) |

Why not percentiles for all three: where no example of n changed, every resample says 0 and the percentile
interval is [0, 0], as if n examples had proved that nothing can ever change; with one changed example it is
still too narrow. The exact interval of 0 of n ends at 1 - 0.025^(1/n), about 3.7/n (the "rule of three" for
two sides: Hanley & Lippman-Hand, JAMA 249, 1983), and the score interval of a change without a single
discordant pair at +- z^2/(n + z^2), about 3.8/n. Where all resamples of a derived number agree, `figure`
falls back on the same bound.
"""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int, Shaped
from scipy import stats

from synapse.errors import SettingsError
from synapse.measure.outcomes import macro_f1
from synapse.types import Figure

ALPHA = 0.05
"""One minus the confidence of every interval."""

Z = float(stats.norm.ppf(1 - ALPHA / 2))
"""The normal quantile of a two-sided interval, 1.96."""


@dataclass(frozen=True, eq=False)
class Resamples:
    """How often each example counts: once in row 0 (the data as they are), as drawn in every other row.

    All figures of a study use the same rows, so any two of them are paired by example, and a statistic of
    the data and of all resamples is one matrix product.
    """

    weights: Float[np.ndarray, "draw example"]

    def mean(
        self,
        totals: Shaped[np.ndarray, "row example"],
        counts: Shaped[np.ndarray, "row example"] | None = None,
    ) -> Float[np.ndarray, "draw row"]:
        """Return the mean of each row over the examples, in the data (row 0) and in each resample.

        `counts` says how many observations each total holds (one where it is left out); NaN where a resample
        holds none.
        """
        if counts is None:
            counts = np.ones_like(totals)
        sums = self.weights @ np.asarray(totals, dtype=np.float64).T
        sizes = self.weights @ np.asarray(counts, dtype=np.float64).T
        return np.divide(sums, sizes, out=np.full_like(sums, np.nan), where=sizes > 0)

    def among(self, examples: Int[np.ndarray, "some"]) -> "Resamples":
        """Return the same resamples seen by some of the examples only."""
        return Resamples(self.weights[:, examples])


def resample(
    n: int,
    *,
    seed: int,
    draws: int = 1000,
    groups: Int[np.ndarray, "example"] | None = None,
    targets: Int[np.ndarray, "example"] | None = None,
) -> Resamples:
    """Return bootstrap weights for n examples: (1 + draws, n), row 0 all ones.

    With `groups`, whole groups are drawn (examples that repeat each other are not independent); with
    `targets`, each class is drawn within itself, so its size never changes. *Source*: Efron & Tibshirani, An
    Introduction to the Bootstrap, 1993.

    Raises
    ------
    SettingsError
        For no examples, or for `groups` and `targets` at once.
    """
    if n < 1:
        raise SettingsError(f"Cannot resample {n} examples; pass at least one.")
    if groups is not None and targets is not None:
        raise SettingsError("Both groups and targets were given; resample whole groups or within classes, not both.")
    rng = np.random.default_rng(seed)
    weights = np.ones((1 + draws, n))
    if groups is not None:
        names, group_of = np.unique(groups, return_inverse=True)
        weights[1:] = _counts(rng, len(names), draws)[:, group_of]
    elif targets is not None:
        for target in np.unique(targets):
            members = np.flatnonzero(np.asarray(targets) == target)
            weights[1:, members] = _counts(rng, len(members), draws)
    else:
        weights[1:] = _counts(rng, n, draws)
    return Resamples(weights)


def _counts(rng: np.random.Generator, n: int, draws: int) -> Int[np.ndarray, "draw item"]:
    return rng.multinomial(n, np.full(n, 1 / n), size=draws)


def clopper_pearson(
    hits: Int[np.ndarray, "*rates"] | int, n: Int[np.ndarray, "*rates"] | int
) -> tuple[Float[np.ndarray, "*rates"], Float[np.ndarray, "*rates"]]:
    """Return the ends of the exact 95 % interval of each rate, in [0, 1]; [0, 1] where n is 0.

    *Source*: Clopper & Pearson, Biometrika 26, 1934, as quantiles of the beta distribution.
    """
    hits, n = np.asarray(hits, dtype=np.float64), np.asarray(n, dtype=np.float64)
    # max(., 1): the beta distribution has no shape 0, and the end there is 0 or 1 anyway.
    low = np.where(hits > 0, stats.beta.ppf(ALPHA / 2, np.maximum(hits, 1), n - hits + 1), 0.0)
    high = np.where(hits < n, stats.beta.ppf(1 - ALPHA / 2, hits + 1, np.maximum(n - hits, 1)), 1.0)
    return low, high


def unseen(n: int) -> float:
    """Return the upper 95 % end of the rate of what none of n examples showed (Clopper-Pearson at 0 of n)."""
    return float(1 - (ALPHA / 2) ** (1 / n)) if n > 0 else 1.0


def paired_score(
    broken: Int[np.ndarray, "*rates"] | int,
    repaired: Int[np.ndarray, "*rates"] | int,
    n: Int[np.ndarray, "*rates"] | int,
) -> tuple[Float[np.ndarray, "*rates"], Float[np.ndarray, "*rates"]]:
    """Return the ends of the 95 % score interval of (broken - repaired) / n, in [-1, 1].

    It excludes zero exactly where McNemar's test does, (broken - repaired)^2 / (broken + repaired) > z^2, and
    has a width even where no example changed. *Source*: Tango, Statistics in Medicine 17, 1998, eq. for the
    score statistic with the constrained maximum-likelihood estimate of the repair rate.
    """
    broken, repaired, n = (np.asarray(a, dtype=np.float64) for a in np.broadcast_arrays(broken, repaired, n))
    n = np.maximum(n, 1)

    def distance(delta: Float[np.ndarray, "*rates"], sign: int) -> Float[np.ndarray, "*rates"]:
        """Observed minus supposed count, shifted by z standard errors under the supposed change `delta`."""
        b = (2 * n - broken + repaired) * delta - broken - repaired
        c = -repaired * delta * (1 - delta)
        repair_rate = (np.sqrt(np.maximum(b**2 - 8 * n * c, 0)) - b) / (4 * n)
        variance = n * (2 * repair_rate + delta * (1 - delta))
        return np.asarray(broken - repaired - n * delta + sign * Z * np.sqrt(np.maximum(variance, 0)))

    def root(
        left: Float[np.ndarray, "*rates"], right: Float[np.ndarray, "*rates"], sign: int
    ) -> Float[np.ndarray, "*rates"]:
        for _ in range(60):  # halving [-1, 1] sixty times reaches the last bit
            middle = np.asarray((left + right) / 2)
            beyond = distance(middle, sign) <= 0
            left, right = np.where(beyond, left, middle), np.where(beyond, middle, right)
        return np.asarray((left + right) / 2)

    change = np.asarray((broken - repaired) / n)
    return root(np.full_like(change, -1.0), change, -1), root(change, np.full_like(change, 1.0), 1)


def rate(hits: int, n: int, *, unit: str, note: str = "") -> Figure:
    """Return hits / n with its exact interval; a null figure where n is 0."""
    return rates(np.array([hits]), n, unit=unit, note=note)[0]


def rates(hits: Int[np.ndarray, "rate"], n: int, *, unit: str, note: str = "") -> list[Figure]:
    """Return each hits / n with its exact interval; null figures where n is 0."""
    if n == 0:
        return [Figure(None, None, None, 0, unit, "no examples")] * len(hits)
    ends = zip(hits.tolist(), *(end.tolist() for end in clopper_pearson(hits, n)), strict=True)
    return [Figure(hit / n, low, high, n, unit, note) for hit, low, high in ends]


def change(lost: Int[np.ndarray, "example"], *, unit: str, note: str = "") -> Figure:
    """Return the mean of paired outcomes (1 broken, -1 repaired, 0 the same) with its score interval.

    A null figure where there are no examples.
    """
    broken, repaired = np.sum(lost == 1, keepdims=True), np.sum(lost == -1, keepdims=True)
    return changes(broken, repaired, np.array([len(lost)]), unit=unit, note=note)[0]


def changes(
    broken: Int[np.ndarray, "rates"],
    repaired: Int[np.ndarray, "rates"],
    n: Int[np.ndarray, "rates"],
    *,
    unit: str,
    note: str = "",
) -> list[Figure]:
    """Return (broken - repaired) / n with its score interval for many counts, as `change` does for one."""
    low, high = paired_score(broken, repaired, n)
    columns = (column.tolist() for column in (broken - repaired, low, high, n))
    return [
        Figure(difference / count, least, most, count, unit, note)
        if count
        else Figure(None, None, None, 0, unit, "no examples")
        for difference, least, most, count in zip(*columns, strict=True)
    ]


def figure(
    statistic: Float[np.ndarray, "draw"],
    *,
    n: int,
    unit: str,
    span: float = 1.0,
    bounds: tuple[float | int, float | int] = (-np.inf, np.inf),
    note: str = "",
) -> Figure:
    """Return a statistic of the data (entry 0) with the percentile interval of its resamples (the others).

    Draws that are not finite say nothing and are left out. The interval always holds the value and stays
    within `bounds`. Where all draws agree it is value +- span * `unseen(n)`: `span` is how far the statistic
    would move if every example changed. *Source*: Efron & Tibshirani 1993, ch. 13 (percentile interval).
    """
    value = float(statistic[0])
    draws = statistic[1:][np.isfinite(statistic[1:])]
    low, high = np.quantile(draws, (ALPHA / 2, 1 - ALPHA / 2)) if len(draws) else (value, value)
    if high - low < 1e-12:  # equal up to rounding
        low, high = value - span * unseen(n), value + span * unseen(n)
    low, high = max(min(low, value), bounds[0]), min(max(high, value), bounds[1])
    return Figure(value, float(low), float(high), int(n), unit, note)


def bracketed(
    value: float,
    lower: Float[np.ndarray, "draw"],
    upper: Float[np.ndarray, "draw"],
    *,
    n: int,
    unit: str,
    note: str = "",
) -> Figure:
    """Return a figure that a grid only brackets: the interval runs from `lower` to `upper`, both resampled.

    Entry 0 of each belongs to the data, as in `figure`. Ends are points of the grid, never in between.
    """
    low = np.quantile(lower[1:], ALPHA / 2, method="inverted_cdf")
    high = np.quantile(upper[1:], 1 - ALPHA / 2, method="inverted_cdf")
    return Figure(value, float(min(low, lower[0])), float(max(high, upper[0])), n, unit, note)


def macro_f1_figure(counts: Int[np.ndarray, "target predicted"], *, seed: int, draws: int = 1000) -> Figure:
    """Return macro-F1 with its interval, from confusion counts.

    Drawing the counts from a multinomial is drawing the examples with replacement, at a cost that does not
    grow with their number. Where every draw agrees (no errors) the smallest class sets the width.
    """
    n = int(counts.sum())
    drawn = np.random.default_rng(seed).multinomial(n, counts.ravel() / n, size=draws).reshape(-1, *counts.shape)
    scores = macro_f1(np.concatenate([counts[None], drawn]))
    support = counts.sum(axis=1)
    smallest = int(support[support > 0].min())
    return replace(figure(scores, n=smallest, unit="macro-F1", bounds=(0, 1)), n=n)


def tabled(row: Mapping[Hashable, Any], *, unit: str, note: str = "") -> Figure:
    """Return the figure that a table's row holds in `value`, `low`, `high` and `n`; NaN becomes None.

    `note` is for a row without a value.
    """
    value, low, high = (None if pd.isna(row[end]) else float(row[end]) for end in ("value", "low", "high"))
    return Figure(value, low, high, int(row["n"]), unit, note if value is None else "")


def benjamini_hochberg(p_values: Float[np.ndarray, "test"]) -> Float[np.ndarray, "test"]:
    """Return p-values adjusted for many tests; those below q have a false-discovery rate of at most q.

    NaN (a test that could not be done) stays NaN and does not count as a test. *Source*: Benjamini &
    Hochberg, Journal of the Royal Statistical Society B 57, 1995.
    """
    adjusted = np.array(p_values, dtype=np.float64)
    done = ~np.isnan(adjusted)
    if done.any():
        adjusted[done] = stats.false_discovery_control(adjusted[done], method="bh")
    return adjusted
