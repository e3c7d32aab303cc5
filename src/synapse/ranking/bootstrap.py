"""Whether a ranking would come out the same tomorrow: the examples are drawn again, and ranked again.

Probes and most scores are deterministic, so that a seed says nothing about them; what could have been otherwise are the
examples. Many draws of them (the bootstrap: Efron & Tibshirani, An Introduction to the Bootstrap, 1993) give each unit
many ranks.

- Examples are drawn from all of them and not class by class. Tomorrow's would have other numbers of each class; and a
  class of one example, drawn within itself, would seem to be perfectly stable. So a draw can lose a rare class.
- Equal scores are put in an order by chance, a new one in each draw. By their index, the many units without weight
  would come out the same every time, and so would all units for a class that a draw has lost.
- Draws share examples, so that even units that are all noise agree by more than 0: see `agreement_of_noise`.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import repeat

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from scipy import stats

from synapse.errors import ConvergenceError, DataError, SettingsError
from synapse.execute import Executor, ThreadExecutor
from synapse.measure.agreement import TOP_SHARE, kuncheva, nogueira
from synapse.measure.intervals import ALPHA
from synapse.probe.probe import Probe, Probes, probe_targets
from synapse.probe.solver import TOLERANCE, Solution, solve_resamples
from synapse.ranking import METHODS, rank
from synapse.ranking.base import Evidence, Need, Ranking, RankingMethod, count_of
from synapse.types import GLOBAL, Activations, Figure, Progress, silent

SETTLED = 0.95
"""Probability of being in the top from which on a unit is settled there."""

UNIT = "stability"

_WEIGHTS_AT_ONCE = 20_000_000
"""Weights of refitted probes that are held at once, at most."""


@dataclass(frozen=True, eq=False)
class RankStability:
    """The ranks of every unit in the rankings of many draws of the examples; rank 0 is the most important."""

    ranking: Ranking
    """That of all examples."""
    k: int
    """Number of units that count as the top."""
    ranks: Int[np.ndarray, "draw layer ranking unit"]
    by_score: Int[np.ndarray, "draw layer ranking"]
    """How many units are among the first k by their scores alone; fewer than k where ties reach across that place."""

    @property
    def draws(self) -> int:
        """Number of draws."""
        return len(self.ranks)

    @cached_property
    def intervals(self) -> Int[np.ndarray, "3 layer ranking unit"]:
        """Low end, median and high end of each unit's ranks: their 2.5, 50 and 97.5 % percentiles, each a rank."""
        shares = np.array([ALPHA / 2, 0.5, 1 - ALPHA / 2])
        return np.asarray(np.sort(self.ranks, axis=0)[np.ceil(shares * self.draws).astype(int) - 1])

    @cached_property
    def top_probability(self) -> Float[np.ndarray, "layer ranking unit"]:
        """Share of the draws in which each unit is among the first k."""
        return np.asarray((self.ranks < self.k).mean(axis=0))

    def kuncheva(self, layer: int, label: str = GLOBAL) -> Figure:
        """Return Kuncheva's index of the first k units of all draws, 1 where they are always the same.

        The interval is Nogueira's, whose index of sets of one size is the same. There is no value where the ranking of
        all examples has no order, as for a class without any.
        """
        row = self.ranking.row(label)
        if np.ptp(self.ranking.scores[layer, row]) == 0:
            return Figure(None, None, None, self.draws, UNIT, "the ranking has no order")
        first = self.ranks[:, layer, row] < self.k
        return replace(nogueira(first), value=kuncheva(first))

    def nogueira(self, layer: int, label: str = GLOBAL) -> Figure:
        """Return Nogueira's index of those of the first k units that the scores alone put there, with its interval.

        Where a sparse probe gives a weight to fewer than k units, these can always be the same although the first k are
        not. There is no value where no draw has such a unit.
        """
        row = self.ranking.row(label)
        sure = self.ranks[:, layer, row] < self.by_score[:, layer, row, None]
        return nogueira(sure) if sure.any() else Figure(None, None, None, self.draws, UNIT, "the scores choose no unit")

    def settled(self, layer: int, label: str = GLOBAL) -> Figure:
        """Return how many units are among the first k with a probability of `SETTLED` or more."""
        number = (self.top_probability[layer, self.ranking.row(label)] >= SETTLED).sum()
        return Figure(float(number), None, None, self.draws, "units", f"of {self.k}")

    def figures(self) -> dict[str, object]:
        """Return the figures of all layers, over all classes and for each: the section of a scorecard."""
        layers, labels = range(len(self.ranking.scores)), self.ranking.labels
        noise = agreement_of_noise(self.k, self.ranking.width)
        return {
            "kuncheva": {layer: self.kuncheva(layer) for layer in layers},
            "kuncheva_of_class": {layer: {label: self.kuncheva(layer, label) for label in labels} for layer in layers},
            "nogueira": {layer: self.nogueira(layer) for layer in layers},
            "nogueira_of_class": {layer: {label: self.nogueira(layer, label) for label in labels} for layer in layers},
            "settled": {layer: self.settled(layer) for layer in layers},
            "noise": Figure(noise, None, None, self.draws, UNIT, "expected of units that are all noise"),
        }

    def to_frame(self) -> pd.DataFrame:
        """Return one row for each (layer, label, unit), by their rank among all examples: a table of the run."""
        places = [
            (layer, label) for layer in range(len(self.ranking.scores)) for label in (GLOBAL, *self.ranking.labels)
        ]
        return pd.concat([self._frame(layer, label) for layer, label in places], ignore_index=True)

    def _frame(self, layer: int, label: str) -> pd.DataFrame:
        row, units = self.ranking.row(label), self.ranking.order(layer, label)
        low, median, high = self.intervals[:, layer, row, units]
        return pd.DataFrame(
            {
                "component": self.ranking.component,
                "method": self.ranking.method,
                "layer": layer,
                "label": label,
                "rank": np.arange(len(units)),
                "unit": units,
                "median": median,
                "low": low,
                "high": high,
                "k": self.k,
                "top_probability": self.top_probability[layer, row, units],
                "draws": self.draws,
            }
        )


def rank_stability(
    activations: Activations,
    *,
    method: str | RankingMethod = "cumulative-mass",
    probes: Probes | None = None,
    draws: int = 100,
    size: int | float = TOP_SHARE,
    seed: int = 0,
    executor: Executor | None = None,
    progress: Progress = silent,
) -> RankStability:
    """Return the ranks of every unit in the rankings of `draws` draws of the examples, with replacement.

    Where the method reads probes, those of every draw are fitted at the penalties of `probes`, from which they start;
    the columns keep the scale that they have on all examples, and all examples weigh alike. `size` is how many units of
    a layer, or which share of them, count as the top. The same seed draws the same examples, whatever the layers.
    `executor` fits the probes of the draws, by default on threads.

    A draw holds copies: a method that holds examples out meets some that it was fitted to.

    Raises:
        SettingsError: a method that runs the live model or was not given what it needs, joint probes, fewer than two
            draws, or a top of no units or of all.
        DataError: an activation is not finite, or the probes are those of other examples.
        ConvergenceError: a probe's certificate is above the tolerance.
    """
    chosen = METHODS.get(method, method) if isinstance(method, str) else method
    if isinstance(chosen, RankingMethod) and runs_the_model(chosen):
        raise SettingsError(
            f"The ranking {chosen.name!r} asks for the classifier, and each of {draws} draws would run the model "
            "again: give a method that reads the activations or probes, such as 'cumulative-mass'."
        )
    if draws < 2:
        raise SettingsError(f"{draws} draws were asked for: give 2 or more, for example 100.")
    n, width = len(activations), activations.width
    k = count_of(size, width)
    if not 0 < k < width:
        raise SettingsError(f"A top of {k} among {width} units says nothing of their order: give 1 to {width - 1}.")
    ranking = rank(activations, method=chosen, probes=probes)
    assert isinstance(chosen, RankingMethod)  # an unknown name is refused by now
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws)
    reads_probes = "probes" in _needs(chosen)
    drawn_probes: Iterable[Probes | None] = repeat(None)
    if probes is not None and reads_probes:
        drawn_probes = _refits(activations, probes, counts, executor or ThreadExecutor())
    ranks = np.empty((draws, *ranking.scores.shape), dtype=np.int32)
    by_score = np.empty(ranks.shape[:3], dtype=np.int32)
    for draw, refitted in zip(range(draws), drawn_probes, strict=False):
        drawn = activations.take(np.repeat(np.arange(n), counts[draw]))
        scores = chosen.scores(Evidence(drawn, refitted)).values
        tied_order = np.random.default_rng((seed, draw)).permutation(width)
        ranks[draw], by_score[draw] = _ranks(scores, tied_order, k)
        progress(draw + 1, draws)
    return RankStability(ranking, k, ranks, by_score)


def runs_the_model(method: RankingMethod) -> bool:
    """Return whether a method, or one that it is made of, asks for the classifier: then its draws are not made."""
    return "classifier" in _needs(method)


def agreement_of_noise(k: int, n_units: int) -> float:
    """Return what Kuncheva's index of draws is on average where all units are noise and alike.

    Let a score be the magnitude of a mean over the examples, or of what is nearly one, such as a difference of means. A
    draw's mean is that of the examples, which all draws share, plus an error of the same variance, so that the means of
    two draws correlate by 1/2. The k of n units with the largest are those beyond +-z with P(|mean| > z) = k/n; two
    draws share n P(both beyond), and the index is (P(both) - (k/n)^2) / (k/n - (k/n)^2).
    """
    share = k / n_units
    z = stats.norm.ppf(1 - share / 2)
    alike, unlike = (float(stats.multivariate_normal([0, 0], [[1, r], [r, 1]]).cdf([-z, -z])) for r in (0.5, -0.5))
    return (2 * alike + 2 * unlike - share**2) / (share - share**2)


def _needs(method: RankingMethod) -> set[Need]:
    """Return what a method asks for, and what those that it is made of do."""
    parts = [getattr(method, field.name) for field in fields(method)]
    return set(method.needs).union(*(_needs(part) for part in parts if isinstance(part, RankingMethod)))


def _ranks(
    scores: Float[np.ndarray, "layer ranking unit"], tied_order: Int[np.ndarray, "unit"], k: int
) -> tuple[Int[np.ndarray, "layer ranking unit"], Int[np.ndarray, "layer ranking"]]:
    """Return the ranks, of equal scores in the given order, and how many of the first k stand there by score alone."""
    order = tied_order[np.argsort(-scores[:, :, tied_order], axis=2, kind="stable")]
    ranks = np.empty(scores.shape, dtype=np.int32)
    np.put_along_axis(ranks, order, np.arange(scores.shape[2], dtype=np.int32)[None, None], axis=2)
    first_outside = np.take_along_axis(scores, order[:, :, [k]], axis=2)
    return ranks, (scores > first_outside).sum(axis=2)


# -------------------------------------------------------------------------------------------------- probes of the draws


@dataclass(frozen=True, eq=False)
class _Refits:
    """What the refits share: `together` draws are fitted at a time, which share a model of the objective."""

    activations: Activations
    targets: Int[np.ndarray, "example"]
    counts: Int[np.ndarray, "draw example"]
    probes: Probes
    together: int


def _refits(
    activations: Activations, probes: Probes, counts: Int[np.ndarray, "draw example"], executor: Executor
) -> Iterator[Probes]:
    """Yield the probes of every draw, fitted for many draws of a layer together."""
    if probes.joint:
        raise SettingsError("A joint probe cannot be fitted again layer by layer: give the probes of `fit_probes`.")
    if probes.source != activations.source or len(probes) != activations.n_layers:
        raise DataError("The probes were fitted on other activations: give those that `fit_probes` fitted on these.")
    together = max(1, _WEIGHTS_AT_ONCE // (activations.n_layers * probes[0].weights.size))
    shared = _Refits(activations, probe_targets(activations, probes.target), counts, probes, together)
    for first in range(0, len(counts), together):
        items = [(first, layer) for layer in range(activations.n_layers)]
        outcomes = executor.results(_refits_of_layer, items, shared=shared)
        by_layer = {items[done.position][1]: done.result for done in outcomes}
        for layers in zip(*(by_layer[layer] for _, layer in items), strict=True):
            yield replace(probes, probes=layers)


def _refits_of_layer(shared: _Refits, item: tuple[int, int]) -> list[Probe]:
    """Return the probe of one layer in each of some draws, given the first of them and the layer."""
    first, layer = item
    activations, probe, counts = (
        shared.activations,
        shared.probes[layer],
        shared.counts[first : first + shared.together],
    )
    x = activations.values[probe.layer].astype(np.float64)
    z = np.where(np.ptp(x, axis=0) > 0, (x - probe.mean) / probe.scale, 0.0)
    fitted = Solution(probe.weights, probe.intercept, np.nan, probe.gradient_norm, probe.gap, 0, probe.converged)
    found = solve_resamples(
        z,
        shared.targets,
        counts,
        n_labels=len(activations.labels),
        penalty=probe.penalty,
        l1_ratio=probe.l1_ratio,
        start=fitted,
    )
    worst = max(solution.gradient_norm for solution in found)
    if not all(solution.converged for solution in found):
        raise ConvergenceError(
            f"The probe of layer {probe.layer} stopped at a gradient norm of {worst:.1e} in one of {len(found)} draws "
            f"of the examples, with penalty {probe.penalty:g}, but {TOLERANCE:.0e} is asked for: choose a stronger "
            "penalty."
        )
    return [
        replace(
            probe,
            weights=solution.weights,
            intercept=solution.intercept,
            gradient_norm=solution.gradient_norm,
            gap=solution.gap,
        )
        for solution in found
    ]
