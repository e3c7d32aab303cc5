"""Multinomial logistic regression with an elastic net, solved to a certificate of optimality.

Over weights W (label, unit) and a free intercept b (label), with softmax probabilities p and example weights v that add
up to 1,

    minimise  sum_n v_n * -log p(y_n | x_n)  +  penalty * (l1_ratio * |W|_1 + (1 - l1_ratio) / 2 * |W|_2^2),

the model of Friedman, Hastie & Tibshirani (J. Stat. Softw. 33, 2010, section 4). scikit-learn's `C` is
`1 / (N * penalty)`. The columns of X should be standardised: the penalty treats them alike.

How it is solved:

- with an l1 part, by proximal Newton steps (Lee, Sun & Saunders, SIAM J. Optim. 24, 2014) on a *working set*, the
  weights that are not 0 and the ones that should not be: the objective's second-order model there is a lasso of a few
  hundred unknowns, which scikit-learn's coordinate descent solves. Resamples start from the solution on all examples
  and share the products with X and one second-order model; their steps are mixed (Anderson, J. ACM 12, 1965).
- without one, by L-BFGS in the eigenvectors of X^T X, scaled so that all curvatures are alike: the l2 norm does not
  mind the rotation.
- where the working set is so large that its matrix would be dear, or the steps do not get there, by L-BFGS-B (Byrd, Lu,
  Nocedal & Zhu, SIAM J. Sci. Comput. 16, 1995) over W = P - M with P, M >= 0 (Schmidt, Fung & Rosales, ECML 2007).

What any of them says of itself is not believed: the certificate is worked out afresh from W and b, over all units.
"""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from threading import Lock

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.linalg import get_lapack_funcs, solve_triangular
from scipy.optimize import Bounds, minimize
from sklearn import config_context
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, enet_path
from torch import Tensor

from synapse.errors import DataError, SettingsError

SOLVERS = ("newton", "first-order", "sklearn")
"""`newton`, the default; `first-order`, L-BFGS-B, which `newton` itself turns to where working sets are large;
`sklearn`, scikit-learn's saga: slow, and not ours."""

TOLERANCE = 1e-7
"""Largest `gradient_norm` of a solution that counts as converged."""

LARGEST_MODEL = 1500
"""Weights in a working set up to which the second-order model is made."""

_ENTERING = 30
"""Weights that may enter the working set at a time; a third of what it has already, if that is more."""

_ONE_AT_A_TIME = Lock()

_MOST_STEPS = 60

_GUESSES = 10
"""Guesses of signs before coordinate descent finds them."""

_KEPT_BELOW = 0.5
"""Share to which a step must bring the gradient norm for the second-order model to be kept."""

_SHORTEST_STEP = 1e-6

_OFTEN = 0.05
"""Share of the resamples that a weight must be wanted by to be in the model that they share."""

_REMEMBERED = 4
"""Steps before the last that are mixed with it."""

_FALLING = 0.7
"""Share to which a step must bring the gradient norm for a resample to go on with the model that all share."""

_SURELY = 0.8
"""Share of the tolerance that the gradient norm in single precision must reach: it is wrong by less than a tenth."""

_NEVER = -1e30
"""Intercept of a label without examples: its probability is 0 in every digit, and all arithmetic stays finite."""

_BATCH_NUMBERS = 20_000_000
"""Numbers in the logits of a batch of problems, at most."""


@dataclass(frozen=True, eq=False)
class Solution:
    """Weights and intercept where the solver stopped, with the proof of how good they are.

    A label without a training example has weights 0 and intercept -inf: probability 0 is its optimum.
    """

    weights: Float[np.ndarray, "label unit"]
    intercept: Float[np.ndarray, "label"]
    """Finite entries have mean 0: a softmax does not see a shift of all of them."""
    objective: float
    """Value of the objective, in nats."""
    gradient_norm: float
    """Largest coordinate of the distance from 0 to the subdifferential: 0 at the optimum, and only there."""
    gap: float
    """Duality gap, in nats: no weights whatever have an objective that is lower by more than this."""
    iterations: int
    """Steps that it took: of Newton's method, or evaluations of the objective and its gradient."""
    converged: bool
    """Whether `gradient_norm` is within the tolerance."""


def solve(
    x: Float[np.ndarray, "example unit"],
    targets: Int[np.ndarray, "example"],
    *,
    n_labels: int,
    penalty: float,
    l1_ratio: float = 0.5,
    example_weights: Float[np.ndarray, "example"] | None = None,
    tolerance: float = TOLERANCE,
    max_iterations: int = 20_000,
    start: Solution | None = None,
    solver: str = "newton",
    device: str = "cpu",
) -> Solution:
    """Return the elastic-net solution for `targets` in `[0, n_labels)`, in float64.

    `example_weights` are scaled to add up to 1. `start`, a solution of a nearby problem, saves time. An unconverged
    solution is returned as such.

    Raises:
        SettingsError: `penalty` is not above 0 (separable data would have no optimum), `l1_ratio` is outside [0, 1],
            or there is no such solver.
        DataError: an example weight is negative or not finite, or all are 0.
    """
    check_penalty(penalty, l1_ratio)
    weights = np.ones((1, len(x))) if example_weights is None else example_weights[None]
    problems = _Problems.of(x, targets, weights, n_labels, penalty, l1_ratio, device)
    (solution,) = _solved(problems, _start_at(problems, start), tolerance, max_iterations, solver)
    return solution


def solve_path(
    x: Float[np.ndarray, "example unit"],
    targets: Int[np.ndarray, "example"],
    *,
    n_labels: int,
    penalties: Iterable[float],
    l1_ratio: float = 0.5,
    example_weights: Float[np.ndarray, "example"] | None = None,
    tolerance: float = TOLERANCE,
    solver: str = "newton",
    device: str = "cpu",
) -> dict[float, Solution]:
    """Return the solution of each penalty, from the strongest to the weakest, each started from the last."""
    strongest_first = sorted(set(penalties), reverse=True)
    for penalty in strongest_first:
        check_penalty(penalty, l1_ratio)
    path: dict[float, Solution] = {}
    if not strongest_first:
        return path
    weights = np.ones((1, len(x))) if example_weights is None else example_weights[None]
    problems = _Problems.of(x, targets, weights, n_labels, strongest_first[0], l1_ratio, device)
    last = None
    for penalty in strongest_first:
        problems = problems.with_penalty(penalty, l1_ratio)
        (last,) = _solved(problems, _start_at(problems, last), tolerance, 20_000, solver)
        path[penalty] = last
    return path


def solve_resamples(
    x: Float[np.ndarray, "example unit"],
    targets: Int[np.ndarray, "example"],
    counts: Int[np.ndarray, "resample example"],
    *,
    n_labels: int,
    penalty: float,
    l1_ratio: float = 0.5,
    start: Solution | None = None,
    tolerance: float = TOLERANCE,
    device: str = "cpu",
) -> list[Solution]:
    """Return the solution for each resample, in which example n stands `counts[r, n]` times, all of them together.

    `start` is best the solution on all examples, which is found first where it is not given. The columns of x keep the
    scale that they have on all examples.
    """
    check_penalty(penalty, l1_ratio)
    if start is None:
        start = solve(x, targets, n_labels=n_labels, penalty=penalty, l1_ratio=l1_ratio, device=device)
    together = max(1, _BATCH_NUMBERS // (n_labels * len(x)))
    found: list[Solution] = []
    for first in range(0, len(counts), together):
        part = counts[first : first + together].astype(np.float64)
        problems = _Problems.of(x, targets, part, n_labels, penalty, l1_ratio, device)
        found += _solved_together(problems, _start_at(problems, start), tolerance)
    return found


def check_penalty(penalty: float, l1_ratio: float) -> None:
    """Raise `SettingsError` unless `0 < penalty < inf` and `0 <= l1_ratio <= 1`."""
    if not 0.0 < penalty < np.inf:
        raise SettingsError(f"The penalty is {penalty}: give a number above 0, for example 0.01.")
    if not 0.0 <= l1_ratio <= 1.0:
        raise SettingsError(f"l1_ratio is {l1_ratio}: give a share between 0 (ridge) and 1 (lasso).")


@dataclass(frozen=True, eq=False)
class _Point:
    """Weights and intercepts of the problems of a batch."""

    weights: Float[Tensor, "problem label unit"]
    intercept: Float[Tensor, "problem label"]

    def moved(self, other: "_Point", step: Float[Tensor, "problem"]) -> "_Point":
        return _Point(
            self.weights + step[:, None, None] * other.weights, self.intercept + step[:, None] * other.intercept
        )

    def take(self, chosen: Int[Tensor, "chosen"]) -> "_Point":
        return _Point(self.weights[chosen], self.intercept[chosen])

    def only(self, row: int) -> "_Point":
        here = slice(row, row + 1)
        return _Point(self.weights[here], self.intercept[here])

    @property
    def numbers(self) -> Float[Tensor, "problem number"]:
        """All of a problem's weights, then its intercepts."""
        return torch.cat([self.weights.flatten(1), self.intercept], dim=1)


@dataclass(frozen=True, eq=False)
class _Slope:
    """What is known of the objective at a point; the gradient is that of its smooth part."""

    value: Float[Tensor, "problem"]
    gradient: Float[Tensor, "problem label unit"]
    intercept: Float[Tensor, "problem label"]
    probabilities: Float[Tensor, "problem label example"]

    def take(self, chosen: Int[Tensor, "chosen"]) -> "_Slope":
        return _Slope(self.value[chosen], self.gradient[chosen], self.intercept[chosen], self.probabilities[chosen])

    def only(self, row: int) -> "_Slope":
        here = slice(row, row + 1)
        return _Slope(self.value[here], self.gradient[here], self.intercept[here], self.probabilities[here])


@dataclass(frozen=True, eq=False)
class _Problems:
    """Problems that differ in the weights of their examples and nothing else; `weight[r]` adds up to 1.

    `x` stands transposed, so that a unit's values lie side by side.
    """

    x: Float[Tensor, "unit example"]
    target: Int[Tensor, "example"]
    weight: Float[Tensor, "problem example"]
    n_labels: int
    l1: float
    l2: float | Float[Tensor, "unit"]

    @classmethod
    def of(
        cls,
        x: Float[np.ndarray, "example unit"],
        targets: Int[np.ndarray, "example"],
        example_weights: Float[np.ndarray, "problem example"],
        n_labels: int,
        penalty: float,
        l1_ratio: float,
        device: str,
    ) -> "_Problems":
        total = example_weights.sum(axis=1, keepdims=True)
        if not np.isfinite(total).all() or (example_weights < 0).any() or (total <= 0).any():
            raise DataError("Example weights are negative, not finite or all 0; numbers of 0 and more were expected.")
        return cls(
            torch.from_numpy(np.ascontiguousarray(x.T, dtype=np.float64)).to(device),
            torch.from_numpy(np.ascontiguousarray(targets, dtype=np.int64)).to(device),
            torch.from_numpy(example_weights / total).to(device),
            n_labels,
            penalty * l1_ratio,
            penalty * (1 - l1_ratio),
        )

    def with_penalty(self, penalty: float, l1_ratio: float) -> "_Problems":
        return replace(self, l1=penalty * l1_ratio, l2=penalty * (1 - l1_ratio))

    def take(self, chosen: Int[Tensor, "chosen"]) -> "_Problems":
        return replace(self, weight=self.weight[chosen])

    def only(self, row: int) -> "_Problems":
        return replace(self, weight=self.weight[[row]])

    def __len__(self) -> int:
        return len(self.weight)

    @property
    def has_examples(self) -> Bool[Tensor, "problem label"]:
        """Which labels a problem has examples of."""
        counts = torch.zeros(len(self), self.n_labels, dtype=self.weight.dtype, device=self.x.device)
        return counts.index_add_(1, self.target, self.weight) > 0

    def slope(self, point: _Point) -> _Slope:
        """Return the value of the objective and the gradient of its smooth part."""
        n, n_labels, width = point.weights.shape
        logits = (point.weights.reshape(-1, width) @ self.x).view(n, n_labels, -1)
        logits += point.intercept[:, :, None]
        logits -= logits.amax(dim=1, keepdim=True)
        place = self.target.expand(n, 1, -1)
        chosen = logits.gather(1, place)[:, 0]
        probabilities = logits.exp_()
        mass = probabilities.sum(dim=1)
        value = ((mass.log() - chosen) * self.weight).sum(dim=1)
        value += 0.5 * (self.l2 * point.weights.square()).sum(dim=(1, 2))
        value += self.l1 * point.weights.abs().sum(dim=(1, 2))
        probabilities /= mass[:, None]
        residual = self._residual(probabilities)
        gradient = (residual.reshape(n * n_labels, -1) @ self.x.T).view_as(point.weights) + self.l2 * point.weights
        return _Slope(value, gradient, residual.sum(dim=2), probabilities)

    def _residual(self, probabilities: Float[Tensor, "problem label example"]) -> Tensor:
        weight = self.weight[:, None]
        return (probabilities * weight).scatter_add_(1, self.target.expand(len(probabilities), 1, -1), -weight)

    def excess(self, point: _Point, slope: _Slope) -> Float[Tensor, "problem label unit"]:
        """Return the subgradient of smallest norm in each weight.

        It is `gradient + l1 * sign(w)`; at w = 0 what of `|gradient|` exceeds `l1` (the pseudo-gradient of Andrew &
        Gao, ICML 2007).
        """
        at_zero = slope.gradient.sign() * (slope.gradient.abs() - self.l1).clamp(min=0)
        return torch.where(point.weights == 0, at_zero, slope.gradient + self.l1 * point.weights.sign())

    def norm(self, point: _Point, slope: _Slope) -> Float[Tensor, "problem"]:
        """Return the largest coordinate of the distance from 0 to the subdifferential."""
        return torch.maximum(self.excess(point, slope).abs().amax(dim=(1, 2)), slope.intercept.abs().amax(dim=1))

    def gap(self, slope: _Slope) -> Float[Tensor, "problem"]:
        """Return how far the objective is above the dual one, at the dual point that the probabilities give.

        The dual asks for residuals that add up to 0 for every label. They nearly do; mixing the probabilities with
        the labels' frequencies makes them. Without an l2 part it also bounds their products with the columns of x,
        which are scaled down to it.
        """
        frequency = (
            self.weight[:, None] * (self.target == torch.arange(self.n_labels, device=self.x.device)[:, None])
        ).sum(2)
        off = slope.intercept[:, :, None]
        smallest = torch.where(frequency > 0, frequency, torch.inf).amin(dim=1)
        share = (off.abs().amax(dim=(1, 2)) / smallest).clamp(max=1)[:, None, None]
        dual = ((1 - share) * (slope.probabilities - off) + share * frequency[:, :, None]).clamp(min=0)
        products = (self._residual(dual).reshape(-1, self.x.shape[1]) @ self.x.T).view_as(slope.gradient)
        if self.l2 > 0:
            conjugate = (products.abs() - self.l1).clamp(min=0).square().sum(dim=(1, 2)) / (2 * self.l2)
        else:
            scale = (self.l1 / products.abs().amax(dim=(1, 2))).clamp(max=1)[:, None, None]
            dual = scale * dual
            dual.scatter_add_(1, self.target.expand(len(dual), 1, -1), (1 - scale).expand(-1, 1, self.x.shape[1]))
            conjugate = torch.zeros_like(slope.value)
        entropy = -(torch.special.xlogy(dual, dual).sum(dim=1) * self.weight).sum(dim=1)
        gap: Tensor = slope.value - (entropy - conjugate)
        return gap.clamp(min=0)  # it is known no better than to the rounding errors of both


def _start_at(problems: _Problems, start: Solution | None) -> _Point:
    """Return where all problems begin: at a solution, or at 0."""
    n, n_labels, width = len(problems), problems.n_labels, len(problems.x)
    has_examples = problems.has_examples
    weights, intercept = problems.x.new_zeros(n, n_labels, width), problems.x.new_zeros(n, n_labels)
    if start is not None:
        weights += torch.from_numpy(start.weights).to(weights)
        intercept += torch.from_numpy(np.where(np.isfinite(start.intercept), start.intercept, 0.0)).to(weights)
    weights = torch.where(has_examples[:, :, None], weights, 0.0)
    return _Point(weights, torch.where(has_examples, intercept, _NEVER))


def _solved(problems: _Problems, point: _Point, tolerance: float, max_iterations: int, solver: str) -> list[Solution]:
    """Return the solutions of a batch of problems, with their certificates."""
    if solver not in SOLVERS:
        raise SettingsError(f"There is no solver {solver!r}: give one of {', '.join(map(repr, SOLVERS))}.")
    if solver == "sklearn":
        iterations = [_by_scikit_learn(problems, point, row, tolerance) for row in range(len(problems))]
    elif problems.l1 == 0:
        iterations = _without_l1(problems, point, tolerance, max_iterations)
    elif solver == "first-order":
        iterations = [_first_order(problems, point, row, tolerance, max_iterations) for row in range(len(problems))]
    else:
        iterations = _newton(problems, point, tolerance, max_iterations)
    return _certified(problems, point, tolerance, iterations)


def _certified(problems: _Problems, point: _Point, tolerance: float, iterations: list[int]) -> list[Solution]:
    """Return the points as solutions, with their certificates."""
    slope = problems.slope(point)
    norms, gaps = problems.norm(point, slope).tolist(), problems.gap(slope).tolist()
    has_examples = problems.has_examples.cpu().numpy()
    solutions = []
    for row, there in enumerate(has_examples):
        intercept = point.intercept[row].cpu().numpy()
        intercept = np.where(there, intercept - intercept[there].mean(), -np.inf)
        weights = point.weights[row].cpu().numpy().copy()
        solutions.append(
            Solution(
                weights,
                intercept,
                float(slope.value[row]),
                norms[row],
                gaps[row],
                iterations[row],
                norms[row] <= tolerance,
            )
        )
    return solutions


def _solved_together(problems: _Problems, point: _Point, tolerance: float) -> list[Solution]:
    """Return the solutions of resamples that start near them, with their certificates."""
    iterations = _share_a_model(problems, point, tolerance) if problems.l1 > 0 else [0] * len(problems)
    solutions = _certified(problems, point, tolerance, iterations)
    left = [row for row, solution in enumerate(solutions) if not solution.converged]
    if left:
        rows = torch.tensor(left, device=problems.x.device)
        finished = _solved(problems.take(rows), point.take(rows), tolerance, 20_000, "newton")
        for row, solution in zip(left, finished, strict=True):
            solutions[row] = replace(solution, iterations=iterations[row] + solution.iterations)
    return solutions


# --------------------------------------------------------------------------------------------------- with an l1 part


def _share_a_model(problems: _Problems, point: _Point, tolerance: float) -> list[int]:
    """Move resamples towards their optima by steps of one model, in single precision; return how many each took.

    The model is that of all of them together where they start. The curvature of each is a little different: of 5000
    states of MiniLM, a step leaves a quarter of the error and a mixture of steps a sixth, and the seven that it takes
    cost less than a model of its own. A resample whose gradient norm stops falling, as where a weight that the model
    lacks should not be 0, is left at its best point.
    """
    single = replace(problems, x=problems.x.float(), weight=problems.weight.float())
    at = _Point(point.weights.float(), point.intercept.float())
    slope = single.slope(at)
    wanted = _wanted_often((at.weights != 0) | (single.excess(at, slope) != 0), n_examples=single.x.shape[1])
    model = _Model.of(single.x, slope.probabilities.mean(dim=0), single.weight.mean(dim=0), wanted, float(problems.l2))
    model = model.in_single_precision()
    running = torch.arange(len(problems), device=problems.x.device)
    steps = torch.zeros_like(running)
    ways: list[_Point] = []
    ends: list[_Point] = []
    norms = single.norm(at, slope)
    before = torch.full_like(norms, torch.inf)
    while len(on := ((norms > _SURELY * tolerance) & (norms < _FALLING * before)).nonzero()[:, 0]):
        running, single, at, slope, before = running[on], single.take(on), at.take(on), slope.take(on), norms[on]
        ways = [*(way.take(on) for way in ways[-_REMEMBERED:]), model.step(single.l1, at, slope, precision=None)]
        ends = [*(end.take(on) for end in ends[-_REMEMBERED:]), at.moved(ways[-1], torch.ones_like(before))]
        at = _mixed(ends, ways)
        slope = single.slope(at)
        norms = single.norm(at, slope)
        steps[running] += 1
        better = norms < before
        point.weights[running[better]] = at.weights[better].to(point.weights)
        point.intercept[running[better]] = at.intercept[better].to(point.intercept)
    return [int(taken) for taken in steps.tolist()]


def _wanted_often(wanted: Bool[Tensor, "problem label unit"], n_examples: int) -> Bool[Tensor, "label unit"]:
    """Return the weights that many problems want, at most half as many as there are examples.

    Of more weights than that, the resamples' curvatures would have little in common.
    """
    share = wanted.double().mean(dim=0)
    largest = min(LARGEST_MODEL, n_examples // 2)
    beyond = share.flatten().sort(descending=True).values[largest : largest + 1]  # empty if there are no more
    return (share >= _OFTEN) & (share > beyond.sum())


def _mixed(ends: list[_Point], ways: list[_Point]) -> _Point:
    """Return the mixture of the points where steps ended whose steps, mixed alike, nearly cancel.

    A weight whose sign would differ from that at the last end is 0, where the objective has its kink.
    """
    last = ends[-1]
    if len(ends) == 1:
        return last
    turns = torch.stack([way.numbers for way in ways], dim=1).diff(dim=1).double()
    lengths = turns.norm(dim=2, keepdim=True).clamp(min=1e-30)
    turns = turns / lengths
    gram = turns @ turns.mT + 1e-8 * torch.eye(turns.shape[1]).to(turns)  # they may be parallel
    parts = torch.linalg.solve(gram, turns @ ways[-1].numbers.double()[:, :, None]) / lengths
    moves = torch.stack([end.numbers for end in ends], dim=1).diff(dim=1)
    mixed = last.numbers - (moves * parts.to(moves)).sum(dim=1)
    weights, intercept = mixed.split([last.weights[0].numel(), last.intercept.shape[1]], dim=1)
    weights = weights.view_as(last.weights)
    return _Point(torch.where(weights * last.weights > 0, weights, 0.0), intercept)


def _newton(problems: _Problems, point: _Point, tolerance: float, max_iterations: int) -> list[int]:
    """Move the points to the optimum by proximal Newton steps; return how many each took.

    A model is kept as long as its steps do well, since making it costs more than several steps.
    """
    steps = [0] * len(problems)
    running = torch.arange(len(problems), device=problems.x.device)
    slope = problems.slope(point)
    models: dict[int, _Model] = {}
    norm_before: dict[int, float] = {}
    x, l2 = problems.x.float(), float(problems.l2)  # single precision will do for a model
    for _ in range(min(_MOST_STEPS, max_iterations)):
        part, at = problems.take(running), point.take(running)
        norms = part.norm(at, slope)
        going_on = (norms > tolerance).nonzero()[:, 0]
        if not len(going_on):
            break
        running, part, at, slope = running[going_on], part.take(going_on), at.take(going_on), slope.take(going_on)
        excess, norms = part.excess(at, slope), norms[going_on]
        active = _working_set(at, excess)
        if int(active.sum(dim=(1, 2)).max()) > LARGEST_MODEL:
            for row in running.tolist():
                steps[row] += _first_order(problems, point, row, tolerance, max_iterations)
            break
        direction = _Point(torch.zeros_like(at.weights), torch.zeros_like(at.intercept))
        for row, problem in enumerate(running.tolist()):
            norm = float(norms[row])
            if problem not in models or norm > _KEPT_BELOW * norm_before[problem]:
                models[problem] = _Model.of(x, slope.probabilities[row], part.weight[row], active[row], l2)
            norm_before[problem] = norm
            way = models[problem].step(part.l1, at.only(row), slope.only(row), precision=1e-4 * min(1.0, norm))
            direction.weights[row], direction.intercept[row] = way.weights[0], way.intercept[0]
            steps[problem] += 1
        slope = _line_search(part, point, running, at, slope, direction)
    else:
        left = running[problems.take(running).norm(point.take(running), slope) > tolerance]
        for row in left.tolist():
            steps[row] += _first_order(problems, point, row, tolerance, max_iterations - steps[row])
    return steps


def _working_set(point: _Point, excess: Float[Tensor, "problem label unit"]) -> Bool[Tensor, "problem label unit"]:
    """Return the weights that are not 0, and of those that should not be the ones that should least."""
    nonzero = point.weights != 0
    should = torch.where(nonzero, 0.0, excess.abs()).flatten(1)
    entering = max(_ENTERING, int(nonzero.sum(dim=(1, 2)).max()) // 3)
    if entering < should.shape[1]:
        least = should.topk(entering, dim=1).values[:, -1:]
        should = torch.where(should >= least, should, 0.0)
    return nonzero | (should > 0).view_as(nonzero)


def _line_search(
    problems: _Problems,
    point: _Point,
    running: Int[Tensor, "chosen"],
    at: _Point,
    slope: _Slope,
    direction: _Point,
) -> _Slope:
    """Move the points of the running problems along a direction as far as the objective falls; return the slope there.

    Steps are halved until the decrease is a part of what the gradient promises (Tseng & Yun, Math. Program. 117, 2009).
    """
    promised = (slope.gradient * direction.weights).sum(dim=(1, 2)) + (slope.intercept * direction.intercept).sum(dim=1)
    promised += problems.l1 * ((at.weights + direction.weights).abs() - at.weights.abs()).sum(dim=(1, 2))
    step = torch.ones_like(promised)
    while True:
        moved = at.moved(direction, step)
        found = problems.slope(moved)
        falls = found.value <= slope.value + 1e-3 * step * promised + 1e-14 * slope.value.abs()
        falls |= step < _SHORTEST_STEP
        if bool(falls.all()):
            break
        step = torch.where(falls, step, step / 2)
    point.weights[running], point.intercept[running] = moved.weights, moved.intercept
    return found


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Let scikit-learn stop early without a word: a rough minimum will do for a step, and the certificate decides."""
    # Python keeps its filters of warnings for all threads, and layers are fitted in several.
    with _ONE_AT_A_TIME, warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield


@dataclass(frozen=True, eq=False)
class _Model:
    """The second-order model of the objective in the weights of a working set, the intercepts eliminated.

    `curvature` is its matrix, `root` the Cholesky factor of that, and `from_weights` says how the intercepts follow.
    """

    label: Int[Tensor, "weight"]
    unit: Int[Tensor, "weight"]
    curvature: Float[np.ndarray, "weight weight"]
    intercepts: Float[np.ndarray, "label label"]
    from_weights: Float[np.ndarray, "label weight"]

    @cached_property
    def root(self) -> Float[np.ndarray, "weight weight"]:
        return np.linalg.cholesky(self.curvature)

    @classmethod
    def of(
        cls,
        x: Float[Tensor, "unit example"],
        probabilities: Float[Tensor, "label example"],
        weight: Float[Tensor, "example"],
        active: Bool[Tensor, "label unit"],
        l2: float,
    ) -> "_Model":
        label, unit = active.nonzero(as_tuple=True)
        kept = weight.nonzero()[:, 0]  # of a resample, two thirds of the examples
        x, probabilities, weight = x.index_select(1, kept), probabilities[:, kept], weight[kept]
        n_labels = len(active)
        ends = np.cumsum(active.sum(dim=1).tolist())
        # Of each label: its columns and the one of its intercept, and where they stand in the matrix.
        columns, places = [], []
        for c, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            columns.append(torch.cat([x[unit[start:end]], torch.ones_like(x[:1])]))
            places.append(np.append(np.arange(start, end), ends[-1] + c))
        full = np.empty((len(label) + n_labels,) * 2)
        # The Hessian of the cross-entropy: sum_n v_n (p_c [c = c'] - p_c p_c') x_j x_j'.
        for c, its_place in enumerate(places):
            for other in range(c, n_labels):
                curved = weight * probabilities[c] * (float(c == other) - probabilities[other])
                block = ((columns[c] * curved.float()) @ columns[other].T).cpu().numpy()
                full[np.ix_(its_place, places[other])] = block
                full[np.ix_(places[other], its_place)] = block.T
        m = len(label)
        # A shift of all intercepts changes nothing, nor does that of a label which is never probable: without the other
        # terms there would be no inverse.
        shifts = full[m:, m:]
        intercepts = np.linalg.inv(shifts + float(np.diag(shifts).max()) / n_labels + 1e-8 * np.eye(n_labels))
        from_weights = intercepts @ full[m:, :m]
        curvature = full[:m, :m] - full[:m, m:] @ from_weights
        curvature = (curvature + curvature.T) / 2
        # Equal columns with no l2 part would make it singular.
        curvature[np.diag_indices(m)] += l2 + 1e-10 + 1e-6 * float(np.diag(curvature).max(initial=0.0))
        return cls(label, unit, np.ascontiguousarray(curvature), intercepts, from_weights)

    def in_single_precision(self) -> "_Model":
        """Return the same in single precision."""
        numbers = (self.curvature, self.intercepts, self.from_weights)
        return _Model(self.label, self.unit, *(number.astype(np.float32) for number in numbers))

    def step(self, l1: float, at: _Point, slope: _Slope, *, precision: float | None) -> _Point:
        """Return the direction to the model's minimum, for each problem.

        Where guesses do not find it, coordinate descent does so to a precision; without one the direction is 0.
        """
        weights = at.weights[:, self.label, self.unit].cpu().numpy()
        gradient = slope.gradient[:, self.label, self.unit].cpu().numpy()
        of_intercept = slope.intercept.cpu().numpy()
        pull = weights @ self.curvature - (gradient - of_intercept @ self.from_weights)
        found, guessed = self._on_their_faces(weights, pull, l1)
        for row in np.flatnonzero(~guessed):
            found[row] = (
                weights[row] if precision is None else self._by_coordinates(weights[row], pull[row], l1, precision)
            )
        change = found - weights
        direction = torch.zeros_like(at.weights)
        direction[:, self.label, self.unit] = torch.from_numpy(change).to(direction)
        shift = -of_intercept @ self.intercepts.T - change @ self.from_weights.T
        return _Point(direction, torch.from_numpy(shift - shift.mean(axis=1, keepdims=True)).to(direction))

    def _on_their_faces(
        self, weights: Float[np.ndarray, "problem weight"], pull: Float[np.ndarray, "problem weight"], l1: float
    ) -> tuple[Float[np.ndarray, "problem weight"], Bool[np.ndarray, "problem"]]:
        """Return the minima for which a few guesses find which weights are 0 and the signs of the others, and which.

        A guess gives a system of equations; what comes out with the wrong sign is 0 in the next one, and what should
        not be 0 is not (the primal-dual active set of Hintermüller, Ito & Kunisch, SIAM J. Optim. 13, 2002).
        """
        (posv,) = get_lapack_funcs(("posv",), (self.curvature,))
        found, signs = np.zeros_like(weights), np.sign(weights)
        guessing, guessed = np.arange(len(weights)), np.zeros(len(weights), dtype=bool)
        for _ in range(_GUESSES):
            found[guessing], failed = 0.0, np.zeros(len(guessing), dtype=bool)
            for place, row in enumerate(guessing):
                (face,) = signs[row].nonzero()
                if len(face):
                    curvature = self.curvature.take(face, axis=0).take(face, axis=1)
                    _, found[row, face], failed[place] = posv(
                        curvature.T, pull[row, face] - l1 * signs[row, face], overwrite_a=True
                    )
            ours, guess = found[guessing], signs[guessing]
            left = pull[guessing] - ours @ self.curvature
            at_zero = np.where(np.abs(left) > l1 * (1 + 1e-9), np.sign(left), 0.0)
            better = np.where(guess != 0, np.where(ours * guess > 0, guess, 0.0), at_zero)
            right = (better == guess).all(axis=1) & ~failed
            guessed[guessing[right]] = True
            signs[guessing] = better
            guessing = guessing[~right & ~failed]
            if not len(guessing):
                break
        return found, guessed

    def _by_coordinates(
        self, weights: Float[np.ndarray, "weight"], pull: Float[np.ndarray, "weight"], l1: float, precision: float
    ) -> Float[np.ndarray, "weight"]:
        """Return the minimum by scikit-learn's coordinate descent."""
        # The model as a lasso: |target - columns w|^2 / 2 has this curvature and this pull.
        target = solve_triangular(self.root, pull, lower=True)
        with config_context(assume_finite=True), _without_warnings():
            _, path, _ = enet_path(
                np.asfortranarray(self.root.T),
                target,
                l1_ratio=1.0,
                alphas=[l1 / len(target)],
                precompute=self.curvature,
                Xy=pull,
                coef_init=weights.copy(),  # it is written to
                check_input=False,
                tol=precision,
            )
        return np.asarray(path[:, 0])


# ---------------------------------------------------------------------------------------------------- other solvers


def _without_l1(problems: _Problems, point: _Point, tolerance: float, max_iterations: int) -> list[int]:
    """Move the points to the optimum of a ridge, in coordinates in which it is curved nearly alike everywhere."""
    width, n = problems.x.shape
    if n < width:  # no weights but combinations of the examples do anything
        values, left = torch.linalg.eigh(problems.x.T @ problems.x)
        kept = values > values[-1] * 1e-12
        values, axes = values[kept], (problems.x @ left[:, kept]) / values[kept].sqrt()
    else:
        values, axes = torch.linalg.eigh(problems.x @ problems.x.T)
    axes = torch.where((problems.x != 0).any(dim=1)[:, None], axes, 0.0)  # which they are but for rounding errors
    # Of p (1 - p) only the order of magnitude matters.
    curvature = values.clamp(min=0) / n / (2 * problems.n_labels) + problems.l2
    rotated = replace(problems, x=(axes / curvature.sqrt()).T @ problems.x, l2=problems.l2 / curvature)
    iterations = []
    for row in range(len(problems)):
        one, asked, taken = problems.only(row), tolerance, 0
        turned = _Point((point.weights[[row]] @ axes) * curvature.sqrt(), point.intercept[[row]])
        while True:
            taken += _first_order(rotated.only(row), turned, 0, asked, max_iterations - taken)
            at = _Point((turned.weights / curvature.sqrt()) @ axes.T, turned.intercept)
            # The gradient that counts is the one in the weights, which the new coordinates stretch.
            norm = float(one.norm(at, one.slope(at)))
            asked *= 0.1
            if norm <= tolerance or taken >= max_iterations or asked < 1e-5 * tolerance:
                break
        point.weights[row], point.intercept[row] = at.weights[0], at.intercept[0]
        iterations.append(taken)
    return iterations


def _first_order(problems: _Problems, point: _Point, row: int, tolerance: float, max_iterations: int) -> int:
    """Move one point to the optimum by L-BFGS-B; return how often the objective was evaluated."""
    one = problems.only(row)
    # Without an l1 part the split would only add a flat direction (P and M growing together).
    signs = np.array([1.0, -1.0]) if one.l1 > 0 else np.array([1.0])
    weights, intercept = point.weights[row].cpu().numpy(), point.intercept[row].cpu().numpy()
    there = np.flatnonzero(intercept > _NEVER)
    parts = np.multiply.outer(signs, weights[there])  # (sign, label, unit)
    if one.l1 > 0:
        parts = np.maximum(parts, 0.0)
    shape, size = parts.shape, parts.size
    objective = _Split(one, signs, shape, there)
    found = minimize(
        objective,
        np.concatenate([parts.ravel(), intercept[there]]),
        jac=True,
        method="L-BFGS-B",
        bounds=Bounds(np.where(np.arange(size + len(there)) < (size if one.l1 > 0 else 0), 0.0, -np.inf), np.inf),
        options={
            "maxcor": 20,
            "ftol": 0.0,  # stop by the gradient, not when the objective changes little
            "gtol": 0.5 * tolerance,
            "maxiter": max_iterations,
            "maxfun": max_iterations,
        },
    )
    at = objective.point(found.x)
    if one.l1 > 0:
        # L-BFGS-B also stops where a weight is within the tolerance of its bound: that weight is a zero.
        gradient = one.slope(at).gradient
        at = replace(
            at, weights=torch.where((at.weights.abs() <= tolerance) & (gradient.abs() < one.l1), 0.0, at.weights)
        )
    point.weights[row], point.intercept[row] = at.weights[0], at.intercept[0]
    return int(found.nfev)


@dataclass(frozen=True, eq=False)
class _Split:
    """The objective of one problem as a function of P, M and the intercepts of the labels that are there."""

    one: _Problems
    signs: Float[np.ndarray, "sign"]
    shape: tuple[int, ...]
    there: Int[np.ndarray, "present"]

    def point(self, vector: Float[np.ndarray, "number"]) -> _Point:
        """Return the weights and intercepts of all labels."""
        size, n_labels = int(np.prod(self.shape)), self.one.n_labels
        weights, intercept = np.zeros((n_labels, self.shape[2])), np.full(n_labels, _NEVER)
        weights[self.there] = np.tensordot(self.signs, vector[:size].reshape(self.shape), axes=1)
        intercept[self.there] = vector[size:]
        device = self.one.x.device
        return _Point(torch.from_numpy(weights[None]).to(device), torch.from_numpy(intercept[None]).to(device))

    def __call__(self, vector: Float[np.ndarray, "number"]) -> tuple[float, Float[np.ndarray, "number"]]:
        """Return the value and the gradient."""
        point = self.point(vector)
        slope, size = self.one.slope(point), int(np.prod(self.shape))
        value = float(slope.value[0])
        gradient = np.multiply.outer(self.signs, slope.gradient[0].cpu().numpy()[self.there])
        if self.one.l1 > 0:
            # P and M may overlap on the way.
            value += self.one.l1 * float(vector[:size].sum() - point.weights.abs().sum())
            gradient += self.one.l1
        return value, np.concatenate([gradient.ravel(), slope.intercept[0].cpu().numpy()[self.there]])


def _by_scikit_learn(problems: _Problems, point: _Point, row: int, tolerance: float) -> int:
    """Move one point to where scikit-learn's saga stops; return its iterations."""
    one = problems.only(row)
    present, classes = np.unique(one.target.cpu().numpy(), return_inverse=True)
    # Its model of two classes has one row of weights, v = 2 W: as |v|^2 / 2 = 2 |W|^2, with half the l2 part.
    binary = len(present) == 2
    l2 = float(one.l2) / 2 if binary else float(one.l2)
    regression = LogisticRegression(
        C=1 / (one.l1 + l2), l1_ratio=one.l1 / (one.l1 + l2), solver="saga", tol=1e-3 * tolerance, max_iter=20_000
    )
    with _without_warnings():
        regression.fit(one.x.T.cpu().numpy(), classes, sample_weight=one.weight[0].cpu().numpy())
    weights, intercept = regression.coef_, regression.intercept_
    if binary:
        weights, intercept = np.stack([-weights[0], weights[0]]) / 2, np.array([-1.0, 1.0]) * intercept[0] / 2
    point.weights[row] = 0
    point.weights[row, present] = torch.from_numpy(weights).to(point.weights)
    point.intercept[row, present] = torch.from_numpy(intercept).to(point.weights)
    return int(regression.n_iter_.max())
