"""Intervals that hold however often they are looked at: when may a cell of a sweep stop?

An interval for a fixed number of examples is wrong once one stops as soon as it is narrow enough, or looks at it after
every batch: with enough looks it misses the truth far more often than in 5 % of sweeps. A *confidence sequence* covers
the truth at all numbers of examples at once, with 95 % probability, so that any rule of stopping leaves it valid.

What is bounded is the mean of paired differences d in [-1, 1], one an example: for a change of accuracy 1 (was right,
is wrong now), -1 (the other way round) or 0. With x = (d + 1) / 2 in [0, 1] and a candidate m for its mean, a gambler
who bets against m has the capital

    K+_t(m) = prod_{i <= t} (1 + a_i (x_i - m_i)),   K-_t(m) = prod_{i <= t} (1 - b_i (x_i - m_i)),

each a nonnegative martingale from 1 if m is the truth, so that it ever reaches 2 / alpha with a probability of at most
alpha / 2 (Ville). The interval holds all m for which neither has. The bets a_i and b_i may depend on x_1 ... x_{i-1}.

*Sources*: Waudby-Smith & Ramdas, Estimating means of bounded random variables by betting, JRSS-B 86, 2024 (arXiv
2010.09686): the hedged capital process (their theorem 3, with theta = 1/2) and its bets, and section 5 for sampling
without replacement; the same authors, Confidence sequences for sampling without replacement, NeurIPS 2020: the mean
m_i of the next draw. The bets that aim at a precision are derived in `AnytimeChange`.
"""

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from synapse.errors import SettingsError
from synapse.measure.intervals import ALPHA

LARGEST_BET = 0.75
"""The largest share of the capital that one example may cost: c in the paper, which suggests 1/2 or 3/4."""

TOLERANCE = 1e-6
"""How far an end may lie outside the exact one (never inside), as a mean of x."""

_CELLS_AT_ONCE = 256  # so that what is computed for them stays in the processor's cache


@dataclass(eq=False)
class AnytimeChange:
    """Intervals of the mean of paired differences, of many cells at once, that are valid at all times.

    Feed `update` batch by batch and look at `interval` or `is_precise` whenever you like. Examples must come in a
    random order that does not depend on their differences; all cells may share it. The confidence is that of each cell
    alone.

    `n_examples` says of what the mean is bounded:

    - a number (or one a cell): the mean over *these* examples, drawn without replacement. A candidate m fixes what is
      left, so the next draw has the mean m_i = (n m - sum_{j < i} x_j) / (n - i + 1). The interval has the width 0 once
      all are used. A sweep uses this one: stopping early replaces the rest of the same file, so what has to be bounded
      is the number that the whole file would have given. It never runs beyond the file, and needs fewer examples.
    - None: the mean of the population that the examples are drawn from, m_i = m. It needs more examples, and all of a
      file may be too few. What it says holds for new data, wherever a cell stopped.

    `precision` is the half-width that is aimed at, in units of d: `is_precise` says which cells have reached it.
    Without one the bets are those of the paper, sqrt(2 log(2/alpha) / (v t log(1 + t))), tight at all times. With one
    they are best at that half-width e, which in units of x is e/2: against an m that is false by e/2, an example adds
    about a f e/2 - a^2 v/2 to the log capital, where v is the variance of x and f_i = n / (n - i + 1) how far the mean
    of the next draw moves with m (1 without an end); that is largest for a_i = f_i (e/2) / v. It then takes about
    t = n t0 / (n + t0) examples, t0 = 2 log(2/alpha) Var(d) / e^2: less than twice as many (2 log 40 = 7.4 against
    1.96^2 = 3.8) as a normal interval needs that may be looked at once. Where no example changes, t0 is about
    log(2/alpha) / (c e), 980 for e = 0.005, c being `LARGEST_BET`.
    """

    n_cells: int
    n_examples: int | Int[np.ndarray, "cell"] | None
    precision: float | None = None
    alpha: float = ALPHA
    _differences: Float[np.ndarray, "cell example"] = field(init=False, repr=False)
    _counts: Int[np.ndarray, "cell"] = field(init=False, repr=False)
    _ends: Float[np.ndarray, "cell 2"] = field(init=False, repr=False)
    _is_stale: Bool[np.ndarray, "cell"] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.precision is not None and not 0 < self.precision <= 1:
            raise SettingsError(
                f"The precision is {self.precision}; a half-width in (0, 1] was expected, such as 0.005."
            )
        if not 0 < self.alpha < 1:
            raise SettingsError(f"alpha is {self.alpha}; one minus the confidence, between 0 and 1, was expected.")
        self._differences = np.zeros((self.n_cells, 0), dtype=np.float32)
        self._counts = np.zeros(self.n_cells, dtype=np.int64)
        self._ends = np.tile([0.0, 1.0], (self.n_cells, 1))
        self._is_stale = np.zeros(self.n_cells, dtype=bool)

    def update(
        self, differences: Shaped[np.ndarray, "some example"], cells: Int[np.ndarray, "some"] | None = None
    ) -> None:
        """Take in further differences of all cells, or of those at the positions `cells`, in the order of the draws.

        Raises:
            SettingsError: a difference outside [-1, 1], not one row a cell, or more examples than there are.
        """
        cells = np.arange(self.n_cells) if cells is None else np.asarray(cells)
        if len(differences) != len(cells):
            raise SettingsError(f"{len(differences)} rows of differences were given for {len(cells)} cells; one each.")
        if not (np.abs(differences) <= 1).all():  # NaN is refused too
            raise SettingsError("A difference lies outside [-1, 1]; the intervals hold for differences in [-1, 1].")
        n_new = differences.shape[1]
        counts = self._counts[cells] + n_new
        too_many = np.flatnonzero(counts > self._totals()[cells])
        if len(too_many):
            there = int(self._totals()[cells][too_many[0]])
            raise SettingsError(
                f"A cell got {counts[too_many[0]]} examples, but it has {there}; each may be used once."
            )
        if (room := counts.max(initial=0)) > self._differences.shape[1]:
            # Twice as many, so that growing costs no more in all than filling.
            more = max(room, 2 * self._differences.shape[1]) - self._differences.shape[1]
            self._differences = np.pad(self._differences, ((0, 0), (0, more)))
        columns = self._counts[cells][:, None] + np.arange(n_new)
        self._differences[cells[:, None], columns] = differences
        self._counts[cells] = counts
        self._is_stale[cells] |= n_new > 0

    def interval(self) -> Float[np.ndarray, "cell 2"]:
        """Return the ends of every cell's interval, in [-1, 1]: the intersection of all that were looked at before."""
        stale = np.flatnonzero(self._is_stale)
        # Cells of like length share a chunk, so that little of it is padding.
        stale = stale[np.argsort(self._counts[stale], kind="stable")]
        for start in range(0, len(stale), _CELLS_AT_ONCE):
            cells = stale[start : start + _CELLS_AT_ONCE]
            self._ends[cells] = self._new_ends(cells)
        self._is_stale[:] = False
        return 2 * self._ends - 1

    def half_width(self) -> Float[np.ndarray, "cell"]:
        """Return half of the width of every cell's interval, in units of d."""
        ends = self.interval()
        return np.asarray((ends[:, 1] - ends[:, 0]) / 2)

    def is_precise(self) -> Bool[np.ndarray, "cell"]:
        """Return which cells need no further example: their half-width is at most `precision`, or all were used."""
        done = self._counts >= self._totals()
        if self.precision is not None:
            done = done | (self.half_width() <= self.precision)
        return np.asarray(done)

    def mean(self) -> Float[np.ndarray, "cell"]:
        """Return the mean difference of the examples used so far; NaN where there are none."""
        sums = self._differences.sum(axis=1, dtype=np.float64)
        return np.where(self._counts > 0, sums / np.maximum(self._counts, 1), np.nan)

    @property
    def n(self) -> Int[np.ndarray, "cell"]:
        """How many examples every cell has used."""
        return self._counts.copy()

    def _totals(self) -> Float[np.ndarray, "cell"]:
        total = np.inf if self.n_examples is None else np.asarray(self.n_examples, dtype=np.float64)
        totals: Float[np.ndarray, "cell"] = np.broadcast_to(total, (self.n_cells,))
        return totals

    def _new_ends(self, cells: Int[np.ndarray, "some"]) -> Float[np.ndarray, "some 2"]:
        """Return the ends, as means of x, with all that is known of these cells."""
        counts, total, ends = self._counts[cells], self._totals()[cells], self._ends[cells]
        x = (self._differences[cells, : counts.max()].astype(np.float64) + 1) / 2
        bets = _Bets.against(x, counts, total, self.precision, self.alpha)
        # With an end to the draws, what is left can be anything between all 0 and all 1.
        sums, left = np.where(bets.is_used, x, 0.0).sum(axis=1), total - counts
        finite = np.isfinite(total)
        least = np.divide(sums, total, out=np.zeros_like(sums), where=finite)
        most = np.divide(sums + left, total, out=np.ones_like(sums), where=finite)
        low, high = np.clip(ends, least[:, None], most[:, None]).T
        new_low = bets.end(low, most, upper=False, reached=np.log(2 / self.alpha))
        new_high = bets.end(least, high, upper=True, reached=np.log(2 / self.alpha))
        return np.stack([new_low, np.maximum(new_high, new_low)], axis=1)


@dataclass(frozen=True, eq=False)
class _Bets:
    """All draws of some cells, and the bets that were made on them before they were seen."""

    x: Float[np.ndarray, "cell example"]
    offset: Float[np.ndarray, "cell example"]
    slope: Float[np.ndarray, "cell example"]
    bets: Float[np.ndarray, "cell example"]
    is_used: Bool[np.ndarray, "cell example"]

    @classmethod
    def against(
        cls,
        x: Float[np.ndarray, "cell example"],
        counts: Int[np.ndarray, "cell"],
        total: Float[np.ndarray, "cell"],
        precision: float | None,
        alpha: float,
    ) -> "_Bets":
        """Return the bets on `x`, of which each cell has used its first `counts`; none is made on the others."""
        t = np.arange(1, x.shape[1] + 1, dtype=np.float64)
        is_used = t <= counts[:, None]
        x = np.where(is_used, x, 0.5)
        # The next draw's mean under m is slope * m - offset; without an end (total infinite) it is m.
        finite = np.isfinite(total)[:, None]
        left = np.where(finite & is_used, total[:, None] - t + 1, 1.0)
        sums_before = np.cumsum(x, axis=1) - x
        slope = np.where(finite & is_used, total[:, None] / left, 1.0)
        offset = np.where(finite & is_used, sums_before / left, 0.0)
        # Running mean and variance with a first guess: one example of the largest variance (as in the paper).
        means = (0.5 + np.cumsum(x, axis=1)) / (t + 1)
        squares = np.cumsum((x - means) ** 2, axis=1)
        before = np.concatenate([np.zeros((len(x), 1)), squares[:, :-1]], axis=1)
        variance = (0.25 + before) / t
        if precision is None:
            bets = np.sqrt(2 * np.log(2 / alpha) / (variance * t * np.log1p(t)))
        else:
            bets = slope * (precision / 2) / variance
        return cls(x, offset, slope, np.where(is_used, bets, 0.0), is_used)

    def capital(self, m: Float[np.ndarray, "cell"], *, upper: bool) -> Float[np.ndarray, "cell"]:
        """Return the log of the capital won against each cell's candidate, by bets on more, or (`upper`) on less.

        It falls with m, or rises if `upper`: that is why the interval has no holes.
        """
        mean = np.clip(self.slope * m[:, None] - self.offset, 0.0, 1.0)  # outside by rounding only
        worst = 1 - mean if upper else mean  # what one example can cost at most
        with np.errstate(divide="ignore"):
            bets = np.minimum(self.bets, LARGEST_BET / worst)
        gain = mean - self.x if upper else self.x - mean
        return np.asarray(np.log(1 + bets * gain).sum(axis=1))

    def end(
        self,
        low: Float[np.ndarray, "cell"],
        high: Float[np.ndarray, "cell"],
        *,
        upper: bool,
        reached: float,
    ) -> Float[np.ndarray, "cell"]:
        """Return where between `low` and `high` the log capital has just `reached` its bound; the outer side of it.

        By false position (Illinois: a side that stays twice counts half), which closes in from both sides, so that the
        outer one is never inside the exact interval.
        """
        outer, inner = (high, low) if upper else (low, high)
        f_outer = self.capital(outer, upper=upper) - reached
        f_inner = self.capital(inner, upper=upper) - reached
        # Where even the outer end is not ruled out, it stays; where all are, the interval has shrunk to the inner end.
        outer = np.where(f_inner >= 0, inner, outer)
        open_ = (f_outer > 0) & (f_inner < 0)
        last = np.zeros(len(outer))
        for step in range(100):
            open_ = open_ & (np.abs(outer - inner) > TOLERANCE)
            if not open_.any():
                break
            share = np.divide(f_outer, f_outer - f_inner, out=np.full_like(f_outer, 0.5), where=open_)
            # A plain halving now and then: false position alone can creep.
            share = np.clip(share, 1e-3, 1 - 1e-3) if step % 6 < 5 else np.full_like(share, 0.5)
            m = outer + share * (inner - outer)
            f = self.capital(m, upper=upper) - reached
            side = np.where(f >= 0, 1.0, -1.0)  # 1: ruled out, so the outer end moves in
            moves_out, moves_in = open_ & (side > 0), open_ & (side < 0)
            outer, inner = np.where(moves_out, m, outer), np.where(moves_in, m, inner)
            weight = np.where(side == last, 0.5, 1.0)
            f_outer = np.where(moves_out, f, np.where(moves_in, f_outer * weight, f_outer))
            f_inner = np.where(moves_in, f, np.where(moves_out, f_inner * weight, f_inner))
            last = side
        return np.asarray(outer)
