"""Intervals that may be looked at after every batch: do they cover at all times, and are they the formula's?"""

import numpy as np
import pytest
from scipy import stats

from synapse.errors import SettingsError
from synapse.measure.intervals import paired_score
from synapse.measure.sequential import AnytimeChange


def paired(rng, shape, broken, repaired):
    """Return differences: 1 with the probability `broken`, -1 with `repaired`, else 0."""
    u = rng.random(shape)
    return np.where(u < broken, 1, np.where(u < broken + repaired, -1, 0)).astype(np.int8)


def orders(rng, differences, n_runs):
    """Return the same differences in as many random orders."""
    return rng.permuted(np.tile(differences, (n_runs, 1)), axis=1)


def misses(sequence, differences, truth, every):
    """Return which runs had an interval without the truth at any of the looks."""
    missed = np.zeros(len(differences), dtype=bool)
    for start in range(0, differences.shape[1], every):
        sequence.update(differences[:, start : start + every])
        low, high = sequence.interval().T
        missed |= (truth < low - 1e-9) | (truth > high + 1e-9)
    return missed


RUNS = 800
MOST_MISSES = stats.binom.ppf(0.999, RUNS, 0.05)
"""How often 800 runs of a procedure that misses in 5 % may miss, but for one time in a thousand."""


@pytest.mark.parametrize("precision", [None, 0.05])
@pytest.mark.parametrize(("broken", "repaired"), [(0.3, 0.1), (0.02, 0.0), (0.1, 0.1)])
def test_at_all_times_at_once_the_mean_of_the_file_is_covered(precision, broken, repaired):
    rng = np.random.default_rng(1)
    file = paired(rng, 200, broken, repaired)
    sequence = AnytimeChange(RUNS, 200, precision=precision)
    assert misses(sequence, orders(rng, file, RUNS), file.mean(), every=5).sum() <= MOST_MISSES


@pytest.mark.parametrize("precision", [None, 0.05])
@pytest.mark.parametrize(("broken", "repaired"), [(0.3, 0.1), (0.02, 0.0)])
def test_at_all_times_at_once_the_mean_of_the_population_is_covered(precision, broken, repaired):
    differences = paired(np.random.default_rng(2), (RUNS, 300), broken, repaired)
    sequence = AnytimeChange(RUNS, None, precision=precision)
    assert misses(sequence, differences, broken - repaired, every=10).sum() <= MOST_MISSES


def test_an_interval_for_a_fixed_number_does_not_cover_when_it_is_looked_at_on_the_way():
    differences = paired(np.random.default_rng(3), (RUNS, 300), 0.1, 0.1)
    missed = np.zeros(RUNS, dtype=bool)
    for n in range(10, 301, 10):
        seen = differences[:, :n]
        low, high = paired_score((seen == 1).sum(axis=1), (seen == -1).sum(axis=1), np.full(RUNS, n))
        missed |= (low > 0) | (high < 0)
    assert missed.mean() > 0.15
    assert misses(AnytimeChange(RUNS, None), differences, 0.0, every=10).sum() <= MOST_MISSES


def test_stopping_at_a_precision_leaves_the_interval_valid_and_saves_examples():
    """The examples needed are those that the docstring derives: n t0 / (n + t0), t0 = 2 log(2 / alpha) Var(d) / e^2."""
    rng = np.random.default_rng(4)
    file, precision, batch = paired(rng, 1000, 0.06, 0.04), 0.03, 20
    runs = orders(rng, file, 100)
    sequence, active = AnytimeChange(100, 1000, precision=precision), np.arange(100)
    for start in range(0, 1000, batch):
        sequence.update(runs[active, start : start + batch], active)
        active = active[~sequence.is_precise()[active]]
    low, high = sequence.interval().T
    assert ((low <= file.mean()) & (file.mean() <= high)).sum() >= stats.binom.ppf(0.001, 100, 0.95)
    assert (sequence.half_width() <= precision).all()
    alone = 2 * np.log(40) * file.var() / precision**2
    assert sequence.n.mean() == pytest.approx(1000 * alone / (1000 + alone), rel=0.15)
    assert len(active) == 0


def test_once_all_examples_are_used_the_interval_is_their_mean():
    rng = np.random.default_rng(5)
    differences = paired(rng, (4, 37), 0.3, 0.2)
    sequence = AnytimeChange(4, 37)
    for part in np.array_split(differences, 6, axis=1):
        sequence.update(part)
        assert (np.diff(sequence.interval()) > 0).all() == (sequence.n < 37).all()
    assert sequence.interval() == pytest.approx(np.stack([differences.mean(axis=1)] * 2, axis=1), abs=1e-12)
    assert sequence.is_precise().all()


def plain_interval(differences, n_examples, precision, alpha=0.05, c=0.75):
    """The paper's formulas, one candidate and one example after the other; running intersection over all times."""
    xs = [(d + 1) / 2 for d in differences]
    step, kept = 0.0005, []
    for m in np.arange(0, 1 + step / 2, step):
        up = down = 1.0
        total, squares, is_out = 0.0, 0.0, False
        for i, x in enumerate(xs, start=1):
            left = None if n_examples is None else n_examples - i + 1
            mean = m if left is None else (n_examples * m - total) / left
            if not -1e-9 <= mean <= 1 + 1e-9:
                is_out = True
                break
            variance = (0.25 + squares) / i
            if precision is None:
                bet = np.sqrt(2 * np.log(2 / alpha) / (variance * i * np.log(i + 1)))
            else:
                bet = (1.0 if left is None else n_examples / left) * precision / 2 / variance
            up *= 1 + min(bet, c / mean if mean > 0 else np.inf) * (x - mean)
            down *= 1 - min(bet, c / (1 - mean) if mean < 1 else np.inf) * (x - mean)
            is_out = is_out or max(up, down) / 2 >= 1 / alpha
            total += x
            squares += (x - (0.5 + total) / (i + 1)) ** 2
        if n_examples is not None:
            is_out = is_out or not total <= n_examples * m + 1e-9 <= total + n_examples - len(xs) + 2e-9
        if not is_out:
            kept.append(2 * m - 1)
    return min(kept), max(kept), 2 * step


@pytest.mark.parametrize("n_examples", [None, 90])
@pytest.mark.parametrize("precision", [None, 0.1])
@pytest.mark.parametrize("rates", [(0.4, 0.1), (0.0, 0.0), (0.9, 0.1)])
def test_the_ends_are_those_of_the_formula_computed_plainly(n_examples, precision, rates):
    differences = paired(np.random.default_rng(6), 60, *rates)
    low, high, step = plain_interval(differences, n_examples, precision)
    sequence = AnytimeChange(1, n_examples, precision=precision)
    for example in differences:
        sequence.update(example[None, None])
        found = sequence.interval()[0]
    # The exact ends lie between the outermost candidate that is kept and the next one.
    assert low - step - 1e-5 <= found[0] <= low + 1e-5
    assert high - 1e-5 <= found[1] <= high + step + 1e-5


def test_cells_do_not_touch_each_other_and_batches_do_not_matter():
    rng = np.random.default_rng(7)
    differences = paired(rng, (3, 60), 0.2, 0.1)
    sizes = np.array([60, 80, 100])
    together = AnytimeChange(3, sizes)
    together.update(differences[:, :20])
    together.update(differences[[2, 0], 20:60], np.array([2, 0]))
    assert together.n.tolist() == [60, 20, 60]
    for cell, n in enumerate([60, 20, 60]):
        alone = AnytimeChange(1, int(sizes[cell]))
        alone.update(differences[cell : cell + 1, :n])
        assert together.interval()[cell] == pytest.approx(alone.interval()[0], abs=1e-5)
        assert together.mean()[cell] == pytest.approx(differences[cell, :n].mean())


def test_before_the_first_example_nothing_is_known():
    sequence = AnytimeChange(2, 10, precision=0.1)
    assert sequence.interval().tolist() == [[-1.0, 1.0], [-1.0, 1.0]]
    assert not sequence.is_precise().any()
    assert np.isnan(sequence.mean()).all()


def test_intervals_never_grow():
    differences = paired(np.random.default_rng(8), (5, 200), 0.2, 0.2)
    sequence, before = AnytimeChange(5, 200), np.full(5, 1.0)
    for start in range(0, 200, 10):
        sequence.update(differences[:, start : start + 10])
        assert (sequence.half_width() <= before + 1e-12).all()
        before = sequence.half_width()


def test_wrong_uses_get_one_clear_sentence():
    with pytest.raises(SettingsError, match=r"The precision is 0.0; a half-width in \(0, 1\] was expected"):
        AnytimeChange(1, 10, precision=0.0)
    with pytest.raises(SettingsError, match=r"alpha is 2\.0"):
        AnytimeChange(1, 10, alpha=2.0)
    sequence = AnytimeChange(2, np.array([3, 5]))
    with pytest.raises(SettingsError, match=r"A difference lies outside \[-1, 1\]"):
        sequence.update(np.array([[2.0], [0.0]]))
    with pytest.raises(SettingsError, match=r"A difference lies outside \[-1, 1\]"):
        sequence.update(np.array([[np.nan], [0.0]]))
    with pytest.raises(SettingsError, match="1 rows of differences were given for 2 cells"):
        sequence.update(np.zeros((1, 1)))
    with pytest.raises(SettingsError, match="A cell got 4 examples, but it has 3; each may be used once"):
        sequence.update(np.zeros((2, 4)))
