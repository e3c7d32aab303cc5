"""Whether rankings agree: two orders of all units, the heads of two orders, two sets, and many sets at once.

| the question | the measure |
|---|---|
| do two rankings put all units in one order | `kendall`, `spearman` |
| the same, the first places counting most | `weighted_tau`, `rank_biased_overlap` |
| do two sets of the first k units share more than chance | `jaccard`, `chance_jaccard`, `chance_of_sharing` |
| do many sets of units, one from each resample, stay the same | `kuncheva`, `nogueira` |

A ranking without an order (all scores equal) agrees with nothing and disagrees with nothing: NaN.
"""

from collections.abc import Iterator
from itertools import combinations

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int, Real
from scipy import stats

from synapse.errors import SettingsError
from synapse.measure.intervals import Z, benjamini_hochberg
from synapse.types import Figure

TOP_SHARE = 0.1
"""Share of the width that counts as the top of a ranking."""

PLACE_COLUMNS = ("component", "layer", "label")
"""Columns that say which rankings stand side by side."""

AGREEMENT_COLUMNS = (
    *PLACE_COLUMNS,
    *("method", "other", "k", "tau", "rbo", "rbo_chance", "jaccard", "jaccard_chance", "p", "p_adjusted"),
)
"""Columns of `agreement_table`."""


def kendall(first: Real[np.ndarray, "unit"], second: Real[np.ndarray, "unit"]) -> float:
    """Return Kendall's tau-b of two scores of the same units, in [-1, 1]; equal scores count as ties.

    *Source*: Kendall, Biometrika 33, 1945.
    """
    return float(stats.kendalltau(first, second).statistic) if _are_orders(first, second) else float("nan")


def spearman(first: Real[np.ndarray, "unit"], second: Real[np.ndarray, "unit"]) -> float:
    """Return the correlation of the ranks of two scores of the same units, in [-1, 1]; ties share a mean rank.

    *Source*: Spearman, American Journal of Psychology 15, 1904.
    """
    return float(stats.spearmanr(first, second).statistic) if _are_orders(first, second) else float("nan")


def weighted_tau(first: Real[np.ndarray, "unit"], second: Real[np.ndarray, "unit"]) -> float:
    """Return the tau in which a swap of units at ranks r and s (from 0) weighs 1/(r+1) + 1/(s+1), in [-1, 1].

    Ranks are those of the first and of the second score in turn, and the mean of both is returned. *Source*: Vigna,
    "A weighted correlation index for rankings with ties", WWW 2015.
    """
    return float(stats.weightedtau(first, second).statistic) if _are_orders(first, second) else float("nan")


def _are_orders(first: Real[np.ndarray, "unit"], second: Real[np.ndarray, "unit"]) -> bool:
    return all(len(scores) > 0 and bool((scores != scores[0]).any()) for scores in (first, second))


def shared_heads(first: Int[np.ndarray, "unit"], second: Int[np.ndarray, "unit"]) -> Int[np.ndarray, "unit"]:
    """Return X_d, d = 1, 2, ...: how many units stand among the first d of both orders, best first, of all units."""
    # A unit is in both heads from the later of its two places on.
    return np.cumsum(np.bincount(np.maximum(np.argsort(first), np.argsort(second)), minlength=len(first)))


def rank_biased_overlap(
    first: Int[np.ndarray, "unit"],
    second: Int[np.ndarray, "unit"],
    *,
    persistence: float,
    depth: int | None = None,
    extrapolated: bool = True,
) -> float:
    """Return the rank-biased overlap of two orders of the same units, in [0, 1]: 1 where they are one.

    Agreement at depth d is A_d = X_d / d (see `shared_heads`), and a reader who goes on from each place with
    probability p, the `persistence`, sees (1 - p) sum_d p^(d-1) A_d; the mean depth is 1 / (1 - p). The orders are
    read down to `depth` (all of them by default). What lies beyond is taken to agree as well as the last depth does,
    p^k A_k; or not at all, which is the truncated sum, where `extrapolated` is False.

    Raises
    ------
    SettingsError
        A persistence outside [0, 1), or a depth that is not there.

    *Source*: Webber, Moffat & Zobel, "A similarity measure for indefinite rankings", ACM TOIS 28(4), 2010, eq. 4 and
    its extrapolation.
    """
    n_units = len(first)
    depth = n_units if depth is None else depth
    if not 1 <= depth <= n_units:
        raise SettingsError(f"Depth {depth} was asked for in orders of {n_units} units; 1 to {n_units} was expected.")
    agreement = shared_heads(first, second)[:depth] / np.arange(1, depth + 1)
    return _rank_biased(agreement, persistence, extrapolated)


def chance_rank_biased_overlap(
    n_units: int, *, persistence: float, depth: int | None = None, extrapolated: bool = True
) -> float:
    """Return what `rank_biased_overlap` is on average for two random orders: E A_d = d / n at every depth.

    Raises
    ------
    SettingsError
        A persistence outside [0, 1).
    """
    depths = np.arange(1, (n_units if depth is None else depth) + 1)
    return _rank_biased(depths / n_units, persistence, extrapolated)


def _rank_biased(agreement: Float[np.ndarray, "depth"], persistence: float, extrapolated: bool) -> float:
    if not 0 <= persistence < 1:
        raise SettingsError(f"A persistence of {persistence} was asked for; at least 0 and below 1 was expected.")
    depth = len(agreement)
    seen = (1 - persistence) * float(persistence ** np.arange(depth) @ agreement)
    return seen + (persistence**depth * float(agreement[-1]) if extrapolated else 0.0)


def jaccard(shared: Real[np.ndarray, "*sets"], k: int) -> Float[np.ndarray, "*sets"]:
    """Return |A & B| / |A or B| of two sets of k units that share some, in [0, 1]."""
    return np.asarray(shared / (2 * k - shared))


def chance_jaccard(k: int, n_units: int) -> float:
    """Return what `jaccard` is on average for two random sets of k among n units.

    The number they share is hypergeometric, k^2 / n on average.
    """
    shared = np.arange(k + 1)
    return float(stats.hypergeom(n_units, k, k).pmf(shared) @ jaccard(shared, k))


def chance_of_sharing(
    shared: Int[np.ndarray, "*sets"], k: int | Int[np.ndarray, "*sets"], n_units: int | Int[np.ndarray, "*sets"]
) -> Float[np.ndarray, "*sets"]:
    """Return the probability that two random sets of k among n units share at least so many (hypergeometric)."""
    return np.asarray(stats.hypergeom.sf(shared - 1, n_units, k, k))


def kuncheva(chosen: Bool[np.ndarray, "set unit"]) -> float:
    """Return the mean consistency (r - k^2/n) / (k - k^2/n) over all pairs of sets of k among n units.

    r is what a pair shares: 1 where all sets are one, 0 on average for random sets, at least -k/(n - k).

    Raises
    ------
    SettingsError
        Fewer than two sets, sets of unequal size, or sets of none or of all units.

    *Source*: Kuncheva, "A stability index for feature selection", IASTED AIA 2007.
    """
    n_sets, n_units = chosen.shape
    sizes = np.unique(chosen.sum(axis=1))
    if n_sets < 2 or len(sizes) > 1 or not 0 < sizes[0] < n_units:
        raise SettingsError(
            f"Kuncheva's index was asked for of {n_sets} sets of {', '.join(map(str, sizes))} among {n_units} units; "
            f"two or more sets of one size between 1 and {n_units - 1} were expected."
        )
    k, times = float(sizes[0]), chosen.sum(axis=0)
    shared = float((times * (times - 1)).sum()) / (n_sets * (n_sets - 1))  # a unit in t sets is in t (t - 1) pairs
    by_chance = k * k / n_units
    return float((shared - by_chance) / (k - by_chance))


def nogueira(chosen: Bool[np.ndarray, "set unit"]) -> Figure:
    """Return the stability of many sets of units with its 95 % interval, in [-1/(M - 1), 1] for M sets.

    Phi = 1 - mean_f s_f^2 / [(k/n)(1 - k/n)], where s_f^2 = M/(M - 1) p_f (1 - p_f) is the variance of whether unit f
    is chosen, and k the mean size of the sets, which may differ; for sets of one size it is Kuncheva's index. The
    interval is the paper's, for many sets: with v = 4/M^2 sum_i (phi_i - mean phi)^2 it is Phi -+ 1.96 sqrt(v). It has
    no width where all sets are one.

    Raises
    ------
    SettingsError
        Fewer than two sets, or all of them of none or of all units.

    *Source*: Nogueira, Sechidis & Brown, "On the stability of feature selection algorithms", JMLR 18(174), 2018.
    """
    n_sets, n_units = chosen.shape
    if n_sets < 2 or not 0 < chosen.sum() < chosen.size:
        raise SettingsError(
            f"The stability of {n_sets} sets with {chosen.sum()} units in all was asked for, among {n_units} units; "
            "two or more sets, neither all empty nor all full, were expected."
        )
    share = chosen.mean(axis=0)  # of the sets that chose a unit
    size = float(share.mean())  # mean size of a set, as a share of the units
    at_random = size * (1 - size)
    value = 1 - n_sets / (n_sets - 1) * float((share * (1 - share)).mean()) / at_random
    own = chosen.mean(axis=1)
    each = ((chosen @ share) / n_units - own * size + value / 2 * (2 * own * size - own - size + 1)) / at_random
    margin = Z * 2 / n_sets * float(np.sqrt(((each - each.mean()) ** 2).sum()))
    low, high = max(value - margin, -1 / (n_sets - 1)), min(value + margin, 1.0)
    return Figure(value, low, high, n_sets, "stability")


def agreement_table(ranking_table: pd.DataFrame, *, share: float = TOP_SHARE) -> pd.DataFrame:
    """Return how well every pair of methods agrees, a row for each layer, label and pair (`AGREEMENT_COLUMNS`).

    `ranking_table` has a row a unit: `method`, `layer`, `label`, `rank`, `unit`, `score`; a column `component` is kept.
    `k` is that share of the width. `tau` is Kendall's tau-b of the scores; `rbo` the rank-biased overlap of a reader
    who sees k units on average, beside that of random orders; `jaccard` is that of the first k units, beside that
    of random sets, with the probability `p` that random sets share as many, adjusted over the whole table
    (Benjamini and Hochberg). All are NaN where one of the two has no order.
    """
    place = [column for column in PLACE_COLUMNS if column in ranking_table]
    places = ranking_table.groupby(place, sort=False) if len(ranking_table) else ()
    rows = [(*where, *pair) for where, rankings in places for pair in _pairs(rankings, share)]
    if not rows:
        return pd.DataFrame({column: [] for column in AGREEMENT_COLUMNS})
    table = pd.DataFrame(rows, columns=[*place, *AGREEMENT_COLUMNS[len(PLACE_COLUMNS) : -2], "shared", "width"])
    table["p"] = chance_of_sharing(*(table[column].to_numpy() for column in ("shared", "k", "width")))
    # The first units of a ranking without an order are only those with the lowest index.
    table.loc[table["tau"].isna(), ["rbo", "jaccard", "p"]] = np.nan
    table["p_adjusted"] = benjamini_hochberg(table["p"].to_numpy(np.float64))
    return table.drop(columns=["shared", "width"])


def _pairs(rankings: pd.DataFrame, share: float) -> Iterator[tuple[str | float, ...]]:
    """Yield what the table says of every pair of methods at one place, then what they share and the width."""
    methods = rankings["method"].unique().tolist()
    by_unit = rankings.pivot(index="unit", columns="method", values=["score", "rank"])
    scores = {method: by_unit["score", method].to_numpy(np.float64) for method in methods}
    orders = {method: np.argsort(by_unit["rank", method].to_numpy(), kind="stable") for method in methods}
    width = len(by_unit)
    k = max(1, round(share * width))
    persistence = 1 - 1 / k
    by_chance = chance_rank_biased_overlap(width, persistence=persistence), chance_jaccard(k, width)
    for one, other in combinations(methods, 2):
        shared = len(np.intersect1d(orders[one][:k], orders[other][:k]))
        tau = kendall(scores[one], scores[other])
        rbo = rank_biased_overlap(orders[one], orders[other], persistence=persistence)
        overlap = float(jaccard(np.array(shared), k))
        yield one, other, k, tau, rbo, by_chance[0], overlap, by_chance[1], shared, width
