"""The `attack` table: success, collateral and smallest budgets of every attack and of its random control."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from synapse.measure.intervals import Resamples, figure, rate, resample
from synapse.measure.outcomes import predictions
from synapse.types import GLOBAL, Figure, NoiseCurve, Redirection

SHARES = {"d50": 0.5, "d95": 0.95}
"""The budgets that are looked for: those which redirect half, and nearly all, of the examples."""

RESAMPLES = 1000

CURVE_POINTS = 24
"""Budgets at which a success curve is tabulated."""


def attack_table(
    redirections: Sequence[Redirection],
    noise: Sequence[NoiseCurve],
    clean_logits: Float[np.ndarray, "example label"],
    *,
    seed: int,
) -> pd.DataFrame:
    """Return one row for each measured number of every attack; docs/run-folder.md lists the columns.

    `clean_logits` are those of the examples that the noise curves ran on.
    """
    rows: list[dict[str, Any]] = []
    for attack in sorted({r.attack for r in redirections}):
        group = [r for r in redirections if r.attack == attack]
        grid = _budget_grid(group)
        for redirection in group:
            rows += _redirection_rows(redirection, grid, seed=seed)
    for curve in noise:
        rows += _noise_rows(curve, clean_logits, seed=seed)
    return pd.DataFrame(rows)


def _budget_grid(redirections: Iterable[Redirection]) -> Float[np.ndarray, "budget"]:
    """Return budgets that span the success curves of the real attacks; controls are shown over the same range."""
    needed = np.concatenate([r.needed.ravel() for r in redirections if r.arm == "attack"])
    finite = needed[np.isfinite(needed) & (needed > 0)]
    if len(finite) == 0:
        return np.empty(0)
    return np.geomspace(np.quantile(finite, 0.01), np.quantile(finite, 0.999), CURVE_POINTS)


@dataclass(frozen=True)
class _Rows:
    """Makes table rows that share an attack's identity."""

    attack: str
    location: str
    source: str
    target: str
    arm: str
    unit: str

    def row(self, measure: str, budget: float, number: Figure) -> dict[str, Any]:
        nan = float("nan")
        value, low, high = (nan if v is None else v for v in (number.value, number.low, number.high))
        return {
            "attack": self.attack,
            "location": self.location,
            "source": self.source,
            "target": self.target,
            "arm": self.arm,
            "measure": measure,
            "budget": budget,
            "budget_unit": self.unit,
            "value": value,
            "low": low,
            "high": high,
            "n": number.n,
        }


def _redirection_rows(r: Redirection, grid: Float[np.ndarray, "budget"], *, seed: int) -> list[dict[str, Any]]:
    if len(r.examples) == 0:
        return []
    maker = _Rows(r.attack, r.location, r.source, r.target, r.arm, r.unit)
    rows = []
    fitted = not np.isnan(r.share)
    if not fitted or r.share == SHARES["d50"]:
        successes = _rates(r.needed, grid, unit="examples", seed=seed)
        rows += [maker.row("success", float(b), success) for b, success in zip(grid, successes, strict=True)]
    for measure, share in SHARES.items():
        if fitted and r.share != share:
            continue
        smallest = smallest_budget(r.needed, share, unit=r.unit, seed=seed)
        rows.append(maker.row(measure, float("nan"), smallest))
        if smallest.value is not None and len(r.others):
            (lost,) = _rates(r.broken_at, np.array([smallest.value]), unit="accuracy", seed=seed)
            rows.append(maker.row("collateral", smallest.value, lost))
    return rows


def smallest_budget(needed: Float[np.ndarray, "draw example"], share: float, *, unit: str, seed: int) -> Figure:
    """Return the smallest budget that redirects a share of the (draw, example) pairs, resampled in both.

    The value is None where even the largest budget does not get there; an open upper end is the largest finite
    budget seen.
    """
    n_draws, n = needed.shape
    order = np.argsort(needed, axis=None, kind="stable")
    budgets = needed.ravel()[order]
    reached = float(np.isfinite(budgets).mean())
    if reached < share:
        return Figure(None, None, None, n, unit, f"not reached: {reached:.0%} at any budget")
    draws, examples = _resamples(n_draws, seed + 1).weights, _resamples(n, seed).weights
    first = np.empty(len(examples), dtype=np.int64)
    for r in range(len(examples)):  # one at a time: all at once would take resamples x draws x examples numbers
        covered = np.cumsum(examples[r][order % n] * draws[r][order // n])
        first[r] = np.searchsorted(covered, share * covered[-1] - 1e-9)
    found = budgets[np.minimum(first, len(budgets) - 1)]
    finite = np.where(np.isfinite(found), found, budgets[np.isfinite(budgets)].max())
    low, high = np.quantile(finite[1:], (0.025, 0.975))
    return Figure(float(found[0]), float(min(low, found[0])), float(max(high, found[0])), n, unit)


def _rates(
    needed: Float[np.ndarray, "draw example"], budgets: Float[np.ndarray, "budget"], *, unit: str, seed: int
) -> list[Figure]:
    """Return the share of (draw, example) pairs that each budget reaches: exact for one draw, else by resampling."""
    n = needed.shape[1]
    if len(needed) == 1:
        return [rate(int((needed <= budget).sum()), n, unit=unit) for budget in budgets]
    means = [_two_way_means(needed <= budget, seed) for budget in budgets]
    return [figure(mean, n=n, unit=unit, bounds=(0, 1)) for mean in means]


def _two_way_means(hits: Bool[np.ndarray, "draw example"], seed: int) -> Float[np.ndarray, "sample"]:
    """Return the share of hits in the data and in resamples of both the draws and the examples.

    Draws of a random change differ from each other, so an interval over the examples alone would be too narrow.
    *Source*: Owen (2007), "The pigeonhole bootstrap", Annals of Applied Statistics 1.
    """
    draws, examples = _resamples(len(hits), seed + 1).weights, _resamples(hits.shape[1], seed).weights
    total = draws.sum(axis=1) * examples.sum(axis=1)
    means: Float[np.ndarray, "sample"] = np.einsum("re,re->r", draws @ hits, examples) / total
    return means


@lru_cache(maxsize=6)
def _resamples(n: int, seed: int) -> Resamples:
    """Return the resamples of n examples or draws; attacks that follow each other share them."""
    if n > 1:
        return resample(n, seed=seed, draws=RESAMPLES)
    return Resamples(np.ones((1 + RESAMPLES, 1)))  # a single draw cannot be resampled


def _noise_rows(
    curve: NoiseCurve, clean_logits: Float[np.ndarray, "example label"], *, seed: int
) -> list[dict[str, Any]]:
    maker = _Rows("weight-noise", curve.place, GLOBAL, GLOBAL, "random", "||dW||/||W||")
    flipped = predictions(curve.logits) != predictions(clean_logits)  # (budget, draw, example)
    n = flipped.shape[2]
    rates = np.stack([_two_way_means(of_budget, seed) for of_budget in flipped], axis=1)  # (resample, budget)
    rows = []
    for b, budget in enumerate(curve.budgets):
        rows.append(maker.row("flip_rate", budget, figure(rates[:, b], n=n, unit="predictions", bounds=(0, 1))))
    for measure, share in SHARES.items():
        rows.append(maker.row(measure, float("nan"), _crossing(rates, curve.budgets, share, n)))
    return rows


def _crossing(rates: Float[np.ndarray, "draw budget"], budgets: Sequence[float], share: float, n: int) -> Figure:
    """Return the budget at which the flip rate first reaches a share, between grid points on a logarithmic scale.

    Where the smallest budget tried reaches it already, that is the value, and the lower end of the interval is 0.
    """
    unit = "||dW||/||W||"
    found = np.array([_first_crossing(row, np.log(budgets), share) for row in rates])
    if np.isnan(found[0]):
        return Figure(None, None, None, n, unit, f"not reached: {rates[0].max():.0%} at {budgets[-1]:g}")
    beyond = np.where(np.isnan(found), budgets[-1], found)  # an open upper end is the largest budget tried
    low, high = np.quantile(beyond[1:], (0.025, 0.975))
    low = 0.0 if low <= budgets[0] else min(low, found[0])
    return Figure(float(found[0]), float(low), float(max(high, found[0])), n, unit)


def _first_crossing(
    rates: Float[np.ndarray, "budget"], log_budgets: Float[np.ndarray, "budget"], share: float
) -> float:
    above = np.flatnonzero(rates >= share)
    if len(above) == 0:
        return float("nan")
    b = int(above[0])
    if b == 0:
        return float(np.exp(log_budgets[0]))
    step = (share - rates[b - 1]) / (rates[b] - rates[b - 1])
    return float(np.exp(log_budgets[b - 1] + step * (log_budgets[b] - log_budgets[b - 1])))
