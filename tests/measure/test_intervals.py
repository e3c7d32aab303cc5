import numpy as np
import pytest
from scipy import optimize, stats
from sklearn.metrics import f1_score

from synapse import measure
from synapse.errors import SettingsError
from synapse.measure.intervals import unseen
from synapse.types import Figure

Z = 1.959963984540054


@pytest.mark.parametrize(("hits", "n"), [(0, 7), (7, 7), (3, 7), (1, 120), (119, 120), (500, 1000)])
def test_rates_have_the_exact_interval_of_scipy(hits, n):
    expected = stats.binomtest(hits, n).proportion_ci(method="exact")
    found = measure.rate(hits, n, unit="accuracy")
    assert (found.value, found.n) == (hits / n, n)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_a_rate_of_no_examples_is_null():
    assert measure.rate(0, 0, unit="recall") == Figure(None, None, None, 0, "recall", "no examples")


def test_what_none_of_n_showed_may_still_happen_at_the_exact_upper_rate():
    assert unseen(120) == pytest.approx(stats.binomtest(0, 120).proportion_ci(method="exact").high)
    assert unseen(120) == pytest.approx(3.69 / 120, rel=0.02)  # the two-sided rule of three


def test_no_change_on_n_examples_is_not_known_exactly():
    found = measure.change(np.zeros(120, dtype=int), unit="accuracy")
    margin = Z**2 / (120 + Z**2)  # closed form of Tango's interval without discordant pairs
    assert found.value == 0
    assert (found.low, found.high) == pytest.approx((-margin, margin))


@pytest.mark.parametrize(("broken", "repaired", "n"), [(4, 0, 120), (7, 3, 50), (1, 9, 200), (30, 12, 60)])
def test_ends_of_a_paired_change_solve_the_score_equation(broken, repaired, n):
    # The repair rate q is found by numerical maximum likelihood here, not in closed form.
    def score(delta):
        def minus_log_likelihood(q):
            same = (n - broken - repaired) * np.log(1 - 2 * q - delta)
            return -(broken * np.log(q + delta) + repaired * np.log(q) + same)

        ends = max(0.0, -delta) + 1e-12, (1 - delta) / 2 - 1e-12
        q = optimize.minimize_scalar(minus_log_likelihood, bounds=ends, options={"xatol": 1e-12}).x
        return (broken - repaired - n * delta) / np.sqrt(n * (2 * q + delta * (1 - delta)))

    low, high = measure.paired_score(broken, repaired, n)
    assert score(float(low)) == pytest.approx(Z, abs=1e-3)
    assert score(float(high)) == pytest.approx(-Z, abs=1e-3)


def test_a_paired_change_excludes_zero_exactly_where_mcnemar_does():
    broken, repaired = (grid.ravel() for grid in np.meshgrid(np.arange(12), np.arange(12)))
    low, high = measure.paired_score(broken, repaired, 40)
    with np.errstate(invalid="ignore"):
        statistic = (broken - repaired) ** 2 / (broken + repaired)
    significant = statistic > stats.chi2.ppf(0.95, df=1)
    np.testing.assert_array_equal((low > 0) | (high < 0), significant)


def test_breaking_and_repairing_mirror_each_other():
    low, high = measure.paired_score(9, 2, 80)
    mirrored = measure.paired_score(2, 9, 80)
    assert (float(low), float(high)) == pytest.approx((-float(mirrored[1]), -float(mirrored[0])))


@pytest.mark.parametrize(("breaks", "repairs"), [(0, 0), (1, 0), (3.5, 0), (3, 3), (12, 2)])
def test_paired_changes_are_covered_about_as_often_as_promised(breaks, repairs):
    n, rng = 120, np.random.default_rng(11)
    rates = [breaks / n, repairs / n, 1 - (breaks + repairs) / n]
    broken, repaired, _ = rng.multinomial(n, rates, size=4000).T
    low, high = measure.paired_score(broken, repaired, n)
    truth = (breaks - repairs) / n
    assert np.mean((low <= truth + 1e-12) & (truth - 1e-12 <= high)) > 0.93


def test_row_0_of_resamples_is_the_data_and_every_row_draws_n():
    weights = measure.resample(30, seed=1, draws=50).weights
    assert weights.shape == (51, 30)
    assert (weights[0] == 1).all()
    assert (weights.sum(axis=1) == 30).all()


def test_the_same_seed_draws_the_same_resamples_and_another_seed_others():
    first, again, other = (measure.resample(30, seed=seed).weights for seed in (5, 5, 6))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_resampled_means_scatter_by_the_standard_error():
    values = np.random.default_rng(2).exponential(size=400)
    means = measure.resample(400, seed=0, draws=4000).mean(values[None])[:, 0]
    assert means[0] == pytest.approx(values.mean())
    assert means[1:].std() == pytest.approx(values.std() / 20, rel=0.05)


def test_groups_are_drawn_as_a_whole():
    groups = np.array([7, 7, 7, 2, 2, 9])
    weights = measure.resample(6, seed=0, groups=groups).weights
    assert (weights[:, :3] == weights[:, :1]).all()
    assert (weights[:, 3] == weights[:, 4]).all()
    assert (weights[:, [0, 3, 5]].sum(axis=1) == 3).all()  # three groups in every draw


def test_classes_keep_their_sizes_when_targets_are_given():
    targets = np.array([0, 1, 1, 0, 1, 2])
    weights = measure.resample(6, seed=0, targets=targets).weights
    for target, size in ((0, 2), (1, 3), (2, 1)):
        assert (weights[:, targets == target].sum(axis=1) == size).all()


def test_groups_and_targets_together_are_refused():
    message = r"^Both groups and targets were given; resample whole groups or within classes, not both\.$"
    with pytest.raises(SettingsError, match=message):
        measure.resample(2, seed=0, groups=np.array([0, 1]), targets=np.array([0, 1]))


def test_nothing_cannot_be_resampled():
    with pytest.raises(SettingsError, match=r"^Cannot resample 0 examples; pass at least one\.$"):
        measure.resample(0, seed=0)


def test_a_mean_without_observations_is_nan():
    means = measure.resample(2, seed=0, draws=3).mean(np.array([[1.0, 2.0]]), np.array([[0.0, 0.0]]))
    assert np.isnan(means).all()


def test_a_figure_is_entry_0_with_the_percentiles_of_the_others():
    statistic = np.concatenate([[0.5], np.linspace(0, 1, 1001), [np.nan, np.inf]])
    found = measure.figure(statistic, n=9, unit="nats", note="so")
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0.025, 0.975))
    assert (found.n, found.unit, found.note) == (9, "nats", "so")


def test_a_figure_lies_in_its_own_interval():
    found = measure.figure(np.concatenate([[0.9], np.linspace(0, 0.8, 101)]), n=9, unit="accuracy")
    assert found.high == 0.9


def test_draws_that_all_agree_give_the_exact_width_instead_of_none():
    found = measure.figure(np.full(101, 0.4), n=60, unit="share", span=0.5)
    margin = 0.5 * stats.binomtest(0, 60).proportion_ci(method="exact").high
    assert (found.low, found.high) == pytest.approx((0.4 - margin, 0.4 + margin))


def test_a_figure_stays_within_its_bounds():
    assert measure.figure(np.ones(101), n=10, unit="share", bounds=(0, 1)).high == 1


def test_a_bracketed_figure_reaches_from_the_lower_to_the_upper_grid_point():
    lower, upper = np.array([0.5] * 60 + [0.25] * 40), np.array([0.75] * 60 + [0.5] * 40)
    found = measure.bracketed(0.5, lower, upper, n=10, unit="share")
    assert (found.low, found.value, found.high) == (0.25, 0.5, 0.75)


def test_macro_f1_has_the_interval_of_resampled_examples():
    rng = np.random.default_rng(8)
    targets = rng.integers(0, 3, size=150)
    predicted = np.where(rng.random(150) < 0.8, targets, rng.integers(0, 3, size=150))
    found = measure.macro_f1_figure(measure.confusion(targets, predicted, 3), seed=0, draws=2000)
    drawn = [rng.integers(0, 150, size=150) for _ in range(600)]
    scores = [f1_score(targets[rows], predicted[rows], average="macro") for rows in drawn]
    assert found.value == pytest.approx(f1_score(targets, predicted, average="macro"))
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(scores, (0.025, 0.975))), abs=0.012)


def test_macro_f1_without_errors_is_as_uncertain_as_the_smallest_class():
    found = measure.macro_f1_figure(np.diag([40, 10]), seed=0)
    expected = stats.binomtest(10, 10).proportion_ci(method="exact").low
    assert (found.value, found.low, found.high, found.n) == (1, pytest.approx(expected), 1, 50)


def test_benjamini_hochberg_by_hand():
    # p_(i) * m / i, then the smallest of it and all later ones: .04, .06, .0667 -> .06, .80
    adjusted = measure.benjamini_hochberg(np.array([0.80, 0.01, np.nan, 0.05, 0.03]))
    np.testing.assert_allclose(adjusted, [0.80, 0.04, np.nan, 0.2 / 3, 0.06])
