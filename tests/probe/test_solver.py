import numpy as np
import pytest
import sklearn
import torch
from scipy.special import log_softmax, softmax
from sklearn.linear_model import LogisticRegression

from synapse.errors import DataError, SettingsError
from synapse.probe import solver as solver_module
from synapse.probe.solver import solve, solve_path, solve_resamples


def overlapping_classes(n=240, d=12, c=3, seed=0):
    """Standardised gaussian clouds that overlap, with their classes."""
    random = np.random.default_rng(seed)
    y = np.arange(n) % c
    x = random.normal(size=(n, d)) @ random.normal(size=(d, d)) + random.normal(size=(c, d))[y]
    return (x - x.mean(axis=0)) / x.std(axis=0), y


def objective(x, y, weights, intercept, penalty, l1_ratio):
    loss = -log_softmax(x @ weights.T + intercept, axis=1)[np.arange(len(y)), y].mean()
    return loss + penalty * (l1_ratio * np.abs(weights).sum() + (1 - l1_ratio) / 2 * (weights**2).sum())


def optimality_gap(x, y, solution, penalty, l1_ratio):
    """Largest violation of the optimality conditions, written out coordinate by coordinate."""
    n_labels = len(solution.intercept)
    error = softmax(x @ solution.weights.T + solution.intercept, axis=1) - np.eye(n_labels)[y]
    gaps = list(np.abs(error.mean(axis=0)))
    for c in range(n_labels):
        for j in range(x.shape[1]):
            w = solution.weights[c, j]
            slope = np.mean(error[:, c] * x[:, j]) + penalty * (1 - l1_ratio) * w
            if w == 0:
                gaps.append(max(abs(slope) - penalty * l1_ratio, 0.0))
            else:
                gaps.append(abs(slope + penalty * l1_ratio * np.sign(w)))
    return max(gaps)


def scikit_learn(x, y, penalty, l1_ratio):
    old = tuple(map(int, sklearn.__version__.split(".")[:2])) < (1, 8)
    kind = {"penalty": "elasticnet"} if old else {}
    return LogisticRegression(
        C=1 / (len(y) * penalty), l1_ratio=l1_ratio, solver="saga", tol=1e-9, max_iter=50_000, **kind
    ).fit(x, y)


@pytest.mark.parametrize("l1_ratio", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("penalty", [0.1, 0.01])
def test_the_solution_is_that_of_scikit_learn(penalty, l1_ratio):
    x, y = overlapping_classes()

    ours = solve(x, y, n_labels=3, penalty=penalty, l1_ratio=l1_ratio)
    theirs = scikit_learn(x, y, penalty, l1_ratio)

    value = objective(x, y, theirs.coef_, theirs.intercept_, penalty, l1_ratio)
    assert ours.objective == pytest.approx(value, rel=1e-6)
    np.testing.assert_allclose(ours.weights, theirs.coef_, atol=1e-4)
    np.testing.assert_allclose(ours.intercept, theirs.intercept_ - theirs.intercept_.mean(), atol=1e-4)
    np.testing.assert_array_equal(ours.weights == 0, np.abs(theirs.coef_) < 1e-7)


@pytest.mark.parametrize("l1_ratio", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(200, 10, 2), (40, 90, 4), (300, 30, 7)], ids=str)
def test_the_certificate_is_the_largest_violation_of_the_optimality_conditions(shape, l1_ratio):
    x, y = overlapping_classes(*shape)

    exact = solve(x, y, n_labels=shape[2], penalty=0.003, l1_ratio=l1_ratio)
    rough = solve(x, y, n_labels=shape[2], penalty=0.003, l1_ratio=l1_ratio, tolerance=1e-2)

    assert exact.converged
    assert optimality_gap(x, y, exact, 0.003, l1_ratio) <= 1e-7
    assert optimality_gap(x, y, rough, 0.003, l1_ratio) == pytest.approx(rough.gradient_norm, rel=1e-6)
    assert exact.objective == pytest.approx(objective(x, y, exact.weights, exact.intercept, 0.003, l1_ratio), rel=1e-12)


def test_a_penalty_beyond_the_largest_gradient_leaves_the_class_frequencies():
    x, _ = overlapping_classes(n=100)
    y = np.repeat([0, 1, 2], [50, 30, 20])

    solution = solve(x, y, n_labels=3, penalty=100.0)

    logs = np.log([0.5, 0.3, 0.2])
    assert not solution.weights.any()
    np.testing.assert_allclose(solution.intercept, logs - logs.mean(), atol=1e-6)
    assert solution.objective == pytest.approx(-(np.array([0.5, 0.3, 0.2]) @ logs))


def test_separable_data_has_a_finite_certified_solution():
    x = np.array([[-1.0], [-1.0], [1.0], [1.0]])
    y = np.array([0, 0, 1, 1])

    solution = solve(x, y, n_labels=2, penalty=1e-3, l1_ratio=0.0)

    # One dimension: w = (-v, v) with v the root of sigmoid(-2 v) = penalty * v, by symmetry without intercept
    assert solution.converged
    v = solution.weights[1, 0]
    assert 1 / (1 + np.exp(2 * v)) == pytest.approx(1e-3 * v, abs=1e-7)
    np.testing.assert_allclose(solution.weights, [[-v], [v]], atol=1e-4)


@pytest.mark.parametrize("l1_ratio", [0.0, 0.5, 1.0])
def test_a_column_that_is_always_zero_gets_no_weight(l1_ratio):
    x, y = overlapping_classes()
    x[:, 4] = 0.0

    solution = solve(x, y, n_labels=3, penalty=0.01, l1_ratio=l1_ratio)

    assert solution.converged
    assert not solution.weights[:, 4].any()


def test_a_column_that_stands_twice_shares_its_weight_equally():
    x, y = overlapping_classes(d=5)
    doubled = np.hstack([x, x[:, :1]])

    solution = solve(doubled, y, n_labels=3, penalty=0.01)

    assert solution.converged
    assert np.abs(solution.weights[:, 0]).max() > 0.01
    np.testing.assert_allclose(solution.weights[:, 0], solution.weights[:, 5], atol=1e-4)


def test_a_label_without_examples_has_weight_zero_and_probability_zero():
    x, y = overlapping_classes(c=2)

    solution = solve(x, 2 * y, n_labels=4, penalty=0.01)
    present = solve(x, y, n_labels=2, penalty=0.01)

    assert not solution.weights[[1, 3]].any()
    assert np.isneginf(solution.intercept[[1, 3]]).all()
    np.testing.assert_allclose(solution.weights[[0, 2]], present.weights, atol=1e-12)


def test_too_few_iterations_are_not_called_converged():
    x, y = overlapping_classes()

    solution = solve(x, y, n_labels=3, penalty=1e-4, max_iterations=5)

    assert not solution.converged
    assert solution.gradient_norm == pytest.approx(optimality_gap(x, y, solution, 1e-4, 0.5), rel=1e-6)
    assert solution.gradient_norm > 1e-4


def test_a_path_ends_where_the_cold_fits_end():
    x, y = overlapping_classes()

    path = solve_path(x, y, n_labels=3, penalties=(0.001, 0.1, 0.01))

    assert list(path) == [0.1, 0.01, 0.001]
    for penalty, solution in path.items():
        np.testing.assert_allclose(solution.weights, solve(x, y, n_labels=3, penalty=penalty).weights, atol=1e-4)


def test_a_warm_start_is_left_as_it_was():
    x, y = overlapping_classes()
    start = solve(x, y, n_labels=3, penalty=0.1)
    before = start.weights.copy()

    solve(x, y, n_labels=3, penalty=0.01, start=start)

    np.testing.assert_array_equal(start.weights, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"penalty": 0.0}, "The penalty is 0.0: give a number above 0, for example 0.01."),
        ({"penalty": float("nan")}, "The penalty is nan: give a number above 0, for example 0.01."),
        (
            {"penalty": 0.1, "l1_ratio": 1.5},
            "l1_ratio is 1.5: give a share between 0 (ridge) and 1 (lasso).",
        ),
    ],
)
def test_a_problem_without_an_optimum_is_refused(options, message):
    x, y = overlapping_classes()

    with pytest.raises(SettingsError) as caught:
        solve(x, y, n_labels=3, **options)

    assert str(caught.value) == message


@pytest.mark.parametrize("l1_ratio", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("tolerance", [1e-1, 1e-2, 1e-4])
def test_no_objective_is_lower_than_the_gap_allows(l1_ratio, tolerance):
    x, y = overlapping_classes(n=150, d=20, c=4)

    rough = solve(x, y, n_labels=4, penalty=0.01, l1_ratio=l1_ratio, tolerance=tolerance)
    theirs = scikit_learn(x, y, 0.01, l1_ratio)

    lowest = objective(x, y, theirs.coef_, theirs.intercept_, 0.01, l1_ratio)
    assert rough.objective - lowest <= rough.gap + 1e-9
    assert rough.gap < 1e3 * tolerance  # a bound that says something


@pytest.mark.parametrize("l1_ratio", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("solver", "tolerance"), [("first-order", 1e-7), ("sklearn", 1e-3)])
@pytest.mark.parametrize("labels", [2, 3])  # with an even number above two, a pure lasso has many optima
def test_all_solvers_find_the_same_optimum(solver, tolerance, l1_ratio, labels):
    x, y = overlapping_classes(n=200, d=15, c=labels)

    newton = solve(x, y, n_labels=labels, penalty=0.01, l1_ratio=l1_ratio)
    other = solve(x, y, n_labels=labels, penalty=0.01, l1_ratio=l1_ratio, solver=solver, tolerance=tolerance)

    assert newton.converged
    assert other.converged
    assert other.objective == pytest.approx(newton.objective, abs=10 * tolerance)
    if l1_ratio < 1:
        np.testing.assert_allclose(other.weights, newton.weights, atol=100 * tolerance)


@pytest.mark.parametrize("l1_ratio", [0.0, 0.5])
def test_an_example_of_weight_two_stands_twice(l1_ratio):
    x, y = overlapping_classes()
    weights = np.where(np.arange(len(y)) % 5 == 0, 2.0, 1.0)
    twice = np.repeat(np.arange(len(y)), weights.astype(int))

    weighted = solve(x, y, n_labels=3, penalty=0.01, l1_ratio=l1_ratio, example_weights=weights)
    repeated = solve(x[twice], y[twice], n_labels=3, penalty=0.01, l1_ratio=l1_ratio)

    np.testing.assert_allclose(weighted.weights, repeated.weights, atol=1e-5)


@pytest.mark.parametrize("l1_ratio", [0.0, 0.5, 1.0])
def test_resamples_solved_together_are_those_solved_alone(l1_ratio, monkeypatch):
    x, y = overlapping_classes(n=120, d=30, c=4)
    counts = np.random.default_rng(0).multinomial(len(y), np.full(len(y), 1 / len(y)), size=7)
    counts[6, y == 3] = 0  # a resample that lost a label
    whole = solve(x, y, n_labels=4, penalty=0.02, l1_ratio=l1_ratio)
    monkeypatch.setattr(solver_module, "_BATCH_NUMBERS", 3 * 4 * len(y))  # batches of three

    together = solve_resamples(x, y, counts, n_labels=4, penalty=0.02, l1_ratio=l1_ratio, start=whole)

    for draw, found in zip(counts, together, strict=True):
        chosen = np.repeat(np.arange(len(y)), draw)
        alone = solve(x[chosen], y[chosen], n_labels=4, penalty=0.02, l1_ratio=l1_ratio)
        assert found.converged
        assert found.objective == pytest.approx(alone.objective, rel=1e-9)
        if l1_ratio < 1:  # a pure lasso of four labels has many optima
            np.testing.assert_allclose(found.weights, alone.weights, atol=1e-5)
    assert np.isneginf(together[6].intercept[3])


@pytest.mark.parametrize(
    ("what", "value"),
    [
        ("_FALLING", 0.0),  # no step of the shared model is good enough
        ("_OFTEN", 0.99),  # the shared model lacks weights
        ("_GUESSES", 0),  # the shared model cannot be minimised
        ("_SURELY", 1e4),  # single precision believes to be there too early
        ("_REMEMBERED", 0),  # steps are not mixed
        ("LARGEST_MODEL", 5),  # nor is there a model of its own for any resample
    ],
)
def test_resamples_end_at_their_optimum_whatever_becomes_of_the_model_that_they_share(what, value, monkeypatch):
    x, y = overlapping_classes(n=300, d=20, c=3)
    counts = np.random.default_rng(0).multinomial(len(y), np.full(len(y), 1 / len(y)), size=5)
    whole = solve(x, y, n_labels=3, penalty=0.02)
    monkeypatch.setattr(solver_module, what, value)

    together = solve_resamples(x, y, counts, n_labels=3, penalty=0.02, start=whole)

    for draw, found in zip(counts, together, strict=True):
        chosen = np.repeat(np.arange(len(y)), draw)
        assert found.converged
        assert optimality_gap(x[chosen], y[chosen], found, 0.02, 0.5) <= 1e-7


def test_resamples_of_many_examples_need_one_model_for_all_of_them(monkeypatch):
    x, y = overlapping_classes(n=2000, d=20, c=3)
    counts = np.random.default_rng(0).multinomial(len(y), np.full(len(y), 1 / len(y)), size=20)
    whole = solve(x, y, n_labels=3, penalty=0.01)
    made, make = [], solver_module._Model.of
    monkeypatch.setattr(solver_module._Model, "of", lambda *parts: made.append(1) or make(*parts))

    together = solve_resamples(x, y, counts, n_labels=3, penalty=0.01, start=whole)

    assert all(found.converged for found in together)
    assert max(found.iterations for found in together) < 15
    assert len(made) == 1


def test_resamples_without_a_start_find_it():
    x, y = overlapping_classes()
    counts = np.random.default_rng(0).multinomial(len(y), np.full(len(y), 1 / len(y)), size=2)
    whole = solve(x, y, n_labels=3, penalty=0.02)

    found = solve_resamples(x, y, counts, n_labels=3, penalty=0.02)
    started = solve_resamples(x, y, counts, n_labels=3, penalty=0.02, start=whole)

    np.testing.assert_array_equal([one.weights for one in found], [one.weights for one in started])


def test_a_resample_that_is_all_examples_stays_where_it_starts():
    x, y = overlapping_classes()
    whole = solve(x, y, n_labels=3, penalty=0.02)

    (found,) = solve_resamples(x, y, np.ones((1, len(y)), dtype=int), n_labels=3, penalty=0.02, start=whole)

    assert found.iterations == 0
    np.testing.assert_array_equal(found.weights, whole.weights)


def test_a_mixture_of_steps_that_are_linear_is_where_they_would_end():
    random = np.random.default_rng(0)
    fixed = torch.tensor([[[3.0, 2.0], [1.0, 4.0]]])
    shrink = torch.from_numpy(random.normal(size=(4, 4)) / 6).float()
    point, ends, ways = torch.zeros(1, 4), [], []
    for _ in range(5):  # four numbers, and one more step
        way = (fixed.flatten(1) - point) @ (torch.eye(4) - shrink)
        point = point + way
        ends.append(as_point(point))
        ways.append(as_point(way))

    mixed = solver_module._mixed(ends, ways)

    assert float((point - fixed.flatten(1)).abs().max()) > 1e-3
    np.testing.assert_allclose(mixed.weights, fixed, rtol=1e-3)


def as_point(numbers):
    """One problem with two labels and two units, and no intercepts that matter."""
    return solver_module._Point(numbers.view(1, 2, 2), torch.zeros(1, 2))


def test_a_large_working_set_goes_to_the_first_order_solver(monkeypatch):
    x, y = overlapping_classes(n=200, d=40)
    expected = solve(x, y, n_labels=3, penalty=0.001)
    monkeypatch.setattr(solver_module, "LARGEST_MODEL", 10)

    found = solve(x, y, n_labels=3, penalty=0.001)

    assert found.converged
    np.testing.assert_allclose(found.weights, expected.weights, atol=1e-4)


def test_what_newton_does_not_finish_the_first_order_solver_does(monkeypatch):
    x, y = overlapping_classes(n=200, d=40)
    expected = solve(x, y, n_labels=3, penalty=0.001)
    monkeypatch.setattr(solver_module, "_MOST_STEPS", 2)

    found = solve(x, y, n_labels=3, penalty=0.001)

    assert found.converged
    assert found.iterations > 2
    np.testing.assert_allclose(found.weights, expected.weights, atol=1e-4)


@pytest.mark.parametrize("weights", [[-1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [np.nan, 1.0, 1.0]])
def test_example_weights_that_mean_nothing_are_refused(weights):
    with pytest.raises(DataError, match="Example weights are negative, not finite or all 0"):
        solve(np.eye(3), np.array([0, 1, 2]), n_labels=3, penalty=0.1, example_weights=np.array(weights))
