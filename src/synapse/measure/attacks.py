"""The `attack` table: success, collateral and smallest budgets of every attack and of its random control.

What a family of attacks finds has one of six forms (see `synapse.types.Attacks`); each gives rows of its own.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int, Shaped

from synapse.measure.intervals import figure, rate, rates, resample
from synapse.measure.outcomes import predictions
from synapse.types import (
    GLOBAL,
    Activations,
    Attacks,
    Bound,
    Figure,
    FlipCurve,
    Manipulation,
    Redirection,
    StrengthCurve,
    Transfer,
)

SHARES = {"d50": 0.5, "d95": 0.95}
"""The budgets that are looked for: those which redirect half, and nearly all, of the examples."""

UNITS = {"frobenius": "||dW||/||W||", "rms": "logit"}
"""How the budgets of fixed changes are called in the table, where not by their own name."""

RESAMPLES = 1000

CURVE_POINTS = 24
"""Budgets at which a success curve is tabulated."""

_PAIRS_AT_ONCE = 4_000_000
"""Pairs of draw and example in the resamples that are held at once, at most."""


def attack_table(found: Attacks, test: Activations, *, seed: int) -> pd.DataFrame:
    """Return one row for each measured number of every attack; docs/run-folder.md lists the columns.

    `test` are the examples that the attacks were scored on; curves carry their own.
    """
    rows: list[dict[str, Any]] = []
    for attack in sorted({r.attack for r in found.redirections}):
        group = [r for r in found.redirections if r.attack == attack]
        grid = _budget_grid(group)
        for redirection in group:
            rows += _redirection_rows(redirection, grid, seed=seed)
    for manipulation in found.manipulations:
        rows += _manipulation_rows(manipulation, test, seed=seed)
    for curve in found.curves:
        rows += _curve_rows(curve, test.labels, seed=seed)
    rows += [_bound_row(bound) for bound in found.bounds]
    rows += [_transfer_row(transfer) for transfer in found.transfers]
    for flips in found.flips:
        rows += _flip_rows(flips)
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
    detail: str = ""

    def row(self, measure: str, budget: float, number: Figure) -> dict[str, Any]:
        nan = float("nan")
        value, low, high = (nan if v is None else v for v in (number.value, number.low, number.high))
        return {
            "attack": self.attack,
            "location": self.location,
            "detail": self.detail,
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
    draws, examples = _counts(n_draws, seed + 1), _counts(n, seed)
    at_once = max(1, _PAIRS_AT_ONCE // len(order))
    parts = [slice(start, start + at_once) for start in range(0, len(examples), at_once)]
    first = np.concatenate([_first_covering(draws[p], examples[p], order, share) for p in parts])
    found = budgets[np.minimum(first, len(budgets) - 1)]
    finite = np.where(np.isfinite(found), found, budgets[np.isfinite(budgets)].max())
    low, high = np.quantile(finite[1:], (0.025, 0.975))
    return Figure(float(found[0]), float(min(low, found[0])), float(max(high, found[0])), n, unit)


def _first_covering(
    draws: Float[np.ndarray, "sample draw"],
    examples: Float[np.ndarray, "sample example"],
    order: Int[np.ndarray, "pair"],
    share: float,
) -> Int[np.ndarray, "sample"]:
    """Return how many pairs of draw and example, in an order, it takes in each resample to make up a share of them."""
    draw, example = np.divmod(order, examples.shape[1])
    covered = np.cumsum(examples[:, example] * draws[:, draw], axis=1)
    return np.asarray((covered < share * covered[:, -1:] - 1e-9).sum(axis=1))


def _rates(
    needed: Float[np.ndarray, "draw example"], budgets: Float[np.ndarray, "budget"], *, unit: str, seed: int
) -> list[Figure]:
    """Return the share of (draw, example) pairs that each budget reaches."""
    return _shares(needed <= budgets[:, None, None], unit=unit, seed=seed)


def _shares(hits: Bool[np.ndarray, "set draw example"], *, unit: str, seed: int) -> list[Figure]:
    """Return the share of hits in each set: exact for one draw, else by resampling."""
    n = hits.shape[2]
    if hits.shape[1] == 1:
        return rates(hits.sum(axis=(1, 2)), n, unit=unit)
    return [figure(mean, n=n, unit=unit, bounds=(0, 1)) for mean in _two_way_means(hits, seed)]


def _two_way_means(hits: Shaped[np.ndarray, "set draw example"], seed: int) -> Float[np.ndarray, "set sample"]:
    """Return the mean of hits, or of what each loses, in the data and in resamples of both the draws and the examples.

    Draws of a random change differ from each other, so an interval over the examples alone would be too narrow.
    *Source*: Owen (2007), "The pigeonhole bootstrap", Annals of Applied Statistics 1.
    """
    _, n_draws, n = hits.shape
    draws, examples = _counts(n_draws, seed + 1), _counts(n, seed)
    total = draws.sum(axis=1, dtype=np.float64) * examples.sum(axis=1, dtype=np.float64)
    by_draw = hits.astype(np.float32) @ examples.T  # (set, draw, sample)
    means: Float[np.ndarray, "set sample"] = np.einsum("sdr,rd->sr", by_draw, draws) / total
    return means


@lru_cache(maxsize=32)
def _counts(n: int, seed: int) -> Float[np.ndarray, "sample item"]:
    """Return how often each of n examples or draws stands in every resample; attacks that follow each other share them.

    In float32, which is exact for what is counted here and takes half the time.
    """
    if n == 1:
        return np.ones((1 + RESAMPLES, 1), dtype=np.float32)  # a single draw cannot be resampled
    return resample(n, seed=seed, draws=RESAMPLES).weights.astype(np.float32)


def _manipulation_rows(change: Manipulation, test: Activations, *, seed: int) -> list[dict[str, Any]]:
    """Return how many predictions a fixed change moves, and the accuracy that it costs, over all examples."""
    measure, budget = next(iter(change.budget.items()))
    maker = _Rows(
        change.attack, change.location, GLOBAL, GLOBAL, change.arm, UNITS.get(measure, measure), change.detail
    )
    found, clean = change.predictions, test.predictions
    right = float((clean == test.targets).mean())
    (moved,) = _shares((found != clean)[None], unit="predictions", seed=seed)
    (kept,) = _shares((found == test.targets)[None], unit="accuracy", seed=seed)
    value, low, high = (None if end is None else right - end for end in (kept.value, kept.high, kept.low))
    lost = Figure(value, low, high, kept.n, kept.unit)
    return [maker.row("flip_rate", budget, moved), maker.row("collateral", budget, lost)]


def _bound_row(bound: Bound) -> dict[str, Any]:
    maker = _Rows("certificate", bound.location, bound.source, bound.target, "bound", bound.unit)
    measure = {share: name for name, share in SHARES.items()}.get(bound.share, "none")
    return maker.row(measure, float("nan"), Figure(bound.budget, None, None, bound.n, bound.unit))


def _transfer_row(found: Transfer) -> dict[str, Any]:
    """Return the share of the other examples that follow at the budget that redirects a share of an edit's own."""
    maker = _Rows(found.attack, found.location, found.source, found.target, "transfer", found.unit)
    measure = {share: name for name, share in SHARES.items()}[found.share]
    return maker.row(
        f"success_at_{measure}", found.budget, rate(round(found.success * found.n), found.n, unit="examples")
    )


def _flip_rows(curve: FlipCurve) -> list[dict[str, Any]]:
    """Return success and collateral of every number of flips, and the smallest that reaches each share.

    Random draws differ from each other more than examples do: their interval is that of all of them, least to most.
    """
    maker = _Rows(
        "bit-flips", f"{curve.location}, {curve.number_format}", curve.source, curve.target, curve.arm, "bits"
    )
    rows = []
    for flips, redirected, lost in zip(map(float, curve.flips), curve.redirected.T, curve.lost.T, strict=True):
        rows.append(maker.row("success", flips, _over_draws(redirected, curve.attacked, "examples")))
        rows.append(maker.row("collateral", flips, _over_draws(lost, curve.others, "accuracy")))
    success = curve.redirected.mean(axis=0) / max(curve.attacked, 1)
    for measure, share in SHARES.items():
        enough = [float(flips) for flips, reached in zip(curve.flips, success, strict=True) if reached >= share]
        rows.append(
            maker.row(measure, float("nan"), Figure(min(enough, default=None), None, None, curve.attacked, "bits"))
        )
    return rows


def _over_draws(hits: Int[np.ndarray, "draw"], n: int, unit: str) -> Figure:
    if len(hits) == 1 or n == 0:
        return rate(int(hits[0]), n, unit=unit)
    return Figure(float(hits.mean() / n), float(hits.min() / n), float(hits.max() / n), n, unit)


def _curve_rows(curve: StrengthCurve, labels: tuple[str, ...], *, seed: int) -> list[dict[str, Any]]:
    """Return what each strength does, and the strengths at which half, and nearly all, of the predictions follow.

    With a target those count that are of other classes and not predicted as it; without one all, and they follow where
    they change. Logits that are infinite or no numbers predict nothing: that is a change, and wrong.
    """
    maker = _Rows(curve.attack, curve.location, GLOBAL, curve.target, curve.arm, curve.unit)
    clean, now = predictions(curve.clean), _finite_predictions(curve.logits)
    measure, unit, follows = "flip_rate", "predictions", now != clean  # (budget, draw, example)
    if curve.target:
        label = labels.index(curve.target)
        asked = (curve.targets != label) & (clean != label)
        measure, unit, follows = "success", "examples", now[:, :, asked] == label
    n = follows.shape[2]
    if n == 0:
        return []
    right = clean == curve.targets
    lost = _two_way_means(right.astype(np.float32) - (now == curve.targets), seed)
    measured = {
        measure: _shares(follows, unit=unit, seed=seed),
        "collateral": [figure(mean, n=len(clean), unit="accuracy", bounds=(-1, 1)) for mean in lost],
        "nonfinite": _shares(now < 0, unit="predictions", seed=seed),
    }
    rows = [
        maker.row(name, budget, each)
        for name, figures in measured.items()
        for budget, each in zip(curve.budgets, figures, strict=True)
    ]
    rates = _two_way_means(follows, seed).T  # (resample, budget)
    for name, share in SHARES.items():
        rows.append(maker.row(name, float("nan"), _crossing(rates, curve.budgets, share, n, curve.unit)))
    return rows


def _finite_predictions(logits: Float[np.ndarray, "*lead label"]) -> Int[np.ndarray, "*lead"]:
    """Return the predictions; -1 where a logit is infinite or no number."""
    return np.where(np.isfinite(logits).all(axis=-1), predictions(logits), -1)


def _crossing(
    rates: Float[np.ndarray, "draw budget"], budgets: Sequence[float], share: float, n: int, unit: str
) -> Figure:
    """Return the budget at which a share of them first follows, between grid points on a logarithmic scale.

    Where the smallest budget tried reaches it already, that is the value, and the lower end of the interval is 0.
    """
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
