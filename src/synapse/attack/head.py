"""Edits of the head's weights that redirect a class, fitted on one split and scored on another.

The logits are z = W h + b. An edit dW moves them by dW h, so that along the ray s * dW the strength that each example
needs is a quotient: every curve is exact, and nothing is run. What is chosen is the direction.

| the edit | who chooses it |
|---|---|
| smallest for one example | `one_sample_edits`, closed form |
| two rows, for a share of a class | a `HeadStep` with `redirect_head` |
| the same, of the top neurons of a ranking only | `ranked_head_attacks` |
| given keys get given values, the least damage elsewhere | `minimal_damage_edit` |
| rows exchanged, scaled, turned, emptied | `row_attacks` |
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import KW_ONLY, asdict, dataclass, replace
from functools import cached_property
from itertools import combinations, permutations
from typing import Literal

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import nnls

from synapse.attack.base import RANDOM_DRAWS, attacked, broken_budget, needed_budget
from synapse.attack.logits import gaps, smallest_changes
from synapse.errors import SettingsError
from synapse.types import Activations, Manipulation, Redirection

log = logging.getLogger(__name__)

SHARES = (0.5, 0.95)
"""Shares of the source class's examples that an edit is fitted to redirect."""

UNIT = "||dW||/||W||"


def required_step(logits: Float[np.ndarray, "example label"], source: int, target: int) -> Float[np.ndarray, "example"]:
    """Return the least v . h that redirects each example: half the gap to the source, all of it to other rivals."""
    gaps = logits.astype(np.float64) - logits[:, [target]]
    gaps[:, source] /= 2
    required: Float[np.ndarray, example] = np.delete(gaps, target, axis=1).max(axis=1)
    return required


def fitted_step(
    features: Float[np.ndarray, "example feature"], required: Float[np.ndarray, "example"], *, share: float
) -> Float[np.ndarray, "feature"]:
    """Return a direction along which a share of *other* examples is reached early.

    The shortest v for the given examples fits them too closely where there are as many features as examples. So two
    thirds of them give a direction of each of `DIRECTIONS`, the rest choose the kind, and all make that kind again.
    """
    chooses = np.arange(len(features)) % 3 == 2
    if not chooses.any():
        return smallest_step(features, required, share=share)
    lengths = []
    for direction in DIRECTIONS:
        v = direction(features[~chooses], required[~chooses], share)
        lengths.append(_length_along(v, features[chooses], required[chooses], share))
    chosen: Float[np.ndarray, feature] = DIRECTIONS[int(np.argmin(lengths))](features, required, share)
    return chosen


def _mean(
    features: Float[np.ndarray, "example feature"], required: Float[np.ndarray, "example"], share: float
) -> Float[np.ndarray, "feature"]:
    del required, share
    return _of_unit_length(features.mean(axis=0))


def _shortest(
    features: Float[np.ndarray, "example feature"], required: Float[np.ndarray, "example"], share: float
) -> Float[np.ndarray, "feature"]:
    return _of_unit_length(smallest_step(features, required, share=share))


def _between(
    features: Float[np.ndarray, "example feature"], required: Float[np.ndarray, "example"], share: float
) -> Float[np.ndarray, "feature"]:
    both: Float[np.ndarray, feature] = _mean(features, required, share) + _shortest(features, required, share)
    return both


def _shortest_for_the_least(
    features: Float[np.ndarray, "example feature"], required: Float[np.ndarray, "example"], share: float
) -> Float[np.ndarray, "feature"]:
    """Return the shortest v for the share of the examples that asks for least, whatever way they point."""
    taken = np.argsort(required, kind="stable")[: max(1, int(np.ceil(share * len(required))))]
    step = least_distance(features[taken], required[taken])
    return _mean(features, required, share) if step is None else step


DIRECTIONS = (_mean, _shortest, _between, _shortest_for_the_least)
"""Ways to choose a direction, of which the examples that did not make them say which holds for others."""


def _of_unit_length(v: Float[np.ndarray, "feature"]) -> Float[np.ndarray, "feature"]:
    unit: Float[np.ndarray, feature] = v / max(float(np.linalg.norm(v)), np.finfo(float).tiny)
    return unit


def _length_along(
    v: Float[np.ndarray, "feature"],
    features: Float[np.ndarray, "example feature"],
    required: Float[np.ndarray, "example"],
    share: float,
) -> float:
    """Return the length at which v reaches the share of the examples; infinite where it does not, as where it is 0."""
    scale = float(np.quantile(_scales_along(v, features, required), share, method="inverted_cdf"))
    return scale * float(np.linalg.norm(v)) if np.isfinite(scale) else np.inf


def _scales_along(
    v: Float[np.ndarray, "feature"],
    features: Float[np.ndarray, "example feature"],
    required: Float[np.ndarray, "example"],
) -> Float[np.ndarray, "example"]:
    """Return how often v must be taken to reach each example's requirement; infinite where it points away."""
    reach = features @ v
    return np.where(reach > 0, required / np.where(reach > 0, reach, 1.0), np.inf)


def smallest_step(
    features: Float[np.ndarray, "example feature"],
    required: Float[np.ndarray, "example"],
    *,
    share: float,
    rounds: int = 4,
) -> Float[np.ndarray, "feature"]:
    """Return a short v with v . h_i >= required_i for the given share of the examples.

    Which examples to take is a hard choice, so the easiest under the present direction are taken, the shortest v for
    exactly these is solved for, and the choice is made again; ||v|| never grows from one round to the next. It starts
    from the mean feature, which is the shortest edit for the mean example.
    """
    n_taken = max(1, int(np.ceil(share * len(required))))
    best: Float[np.ndarray, feature] = features.mean(axis=0)
    best_length = np.inf
    for _ in range(rounds):
        taken = np.argsort(_scales_along(best, features, required), kind="stable")[:n_taken]
        step = least_distance(features[taken], required[taken])
        if step is None or np.linalg.norm(step) >= best_length * (1 - 1e-6):
            break
        best, best_length = step, float(np.linalg.norm(step))
    return best


def least_distance(
    features: Float[np.ndarray, "example feature"], required: Float[np.ndarray, "example"]
) -> Float[np.ndarray, "feature"] | None:
    """Return the shortest v with `features @ v >= required`, or None where there is none.

    Source: Lawson and Hanson (1974), "Solving Least Squares Problems", chapter 23: least distance programming by
    non-negative least squares on [features^T; required^T] u ~ (0, ..., 0, 1).
    """
    scale = max(float(np.abs(required).max()), np.finfo(float).tiny)
    system = np.vstack([features.T, required / scale])
    aim = np.zeros(len(system))
    aim[-1] = 1.0
    try:
        duals, _ = nnls(system, aim)
    except RuntimeError:  # iteration limit: treated as "none found", the caller keeps what it has
        return None
    residual = system @ duals - aim
    if residual[-1] >= -1e-12:
        return None
    step: Float[np.ndarray, feature] = -residual[:-1] / residual[-1] * scale
    return step


def _along(
    test: Activations,
    edits: Float[np.ndarray, "draw label feature"],
    source: int,
    target: int,
    arm: str,
    share: float,
    *,
    attack: str,
    location: str = "head",
) -> Redirection:
    """Score edits of relative norm 1: the logits move by budget * (edit @ features)."""
    assert test.features is not None
    examples = attacked(test, source, target)
    others: Int[np.ndarray, other] = np.flatnonzero(test.targets != source)
    others = others[test.predictions[others] == test.targets[others]]
    slopes = [test.features @ edit.T for edit in edits]
    return Redirection(
        attack=attack,
        location=location,
        source=test.labels[source],
        target=test.labels[target],
        arm=arm,
        unit=UNIT,
        share=share,
        needed=np.stack([needed_budget(test.known_logits[examples], s[examples], target) for s in slopes]),
        examples=examples,
        others=others,
        broken_at=np.stack([broken_budget(test.known_logits[others], s[others]) for s in slopes]),
    )


def _check_features(*recorded: Activations) -> None:
    if any(activations.features is None for activations in recorded):
        raise SettingsError(
            "The head does not end in a linear map, so it has no rows to edit; leave the head attack out."
        )


# --------------------------------------------------------------------------------------------------- what an edit costs


@dataclass(frozen=True)
class EditBudget:
    """How large a change of a weight matrix is, in the ways in which attackers pay for it."""

    frobenius: float
    """||dW||_F / ||W||_F."""
    spectral: float
    """Largest singular value of dW over that of W."""
    largest: float
    """Largest entry of |dW| over that of |W|."""
    rows: int
    """Rows that change."""
    entries: int
    """Entries that change: L0."""


def edit_budget(change: Float[np.ndarray, "label feature"], weight: Float[np.ndarray, "label feature"]) -> EditBudget:
    """Return the size of a change of the weight matrix, relative to it."""
    return EditBudget(
        frobenius=float(np.linalg.norm(change) / np.linalg.norm(weight)),
        spectral=float(np.linalg.norm(change, 2) / np.linalg.norm(weight, 2)),
        largest=float(np.abs(change).max() / np.abs(weight).max()),
        rows=int((change != 0).any(axis=1).sum()),
        entries=int((change != 0).sum()),
    )


# ----------------------------------------------------------------------------------------------------- for one example

Rows = Literal["target", "two", "all"]
"""Which rows of the head an edit may touch: the target's; that and the row of the class predicted now; all of them."""


def one_sample_changes(
    logits: Float[np.ndarray, "example label"], target: int, rows: Rows = "all", *, margin: float = 0.0
) -> Float[np.ndarray, "example label"]:
    """Return the shortest change of each example's logits that puts the target `margin` ahead of all other classes.

    With two rows the target rises by a = max(g_p / 2, g_rest) and the predicted class p falls by max(g_p - a, 0), where
    g_rest is what the target lacks to the others. With `all` see `synapse.attack.logits.smallest_changes`.
    """
    z = logits.astype(np.float64)
    z[:, target] -= margin  # to be ahead by the margin is to tie from that much further back
    if rows != "two":
        return smallest_changes(z, target, "one" if rows == "target" else "l2")
    example, predicted = np.arange(len(z)), np.delete(z, target, axis=1).argmax(axis=1)
    predicted += predicted >= target
    lacking = np.maximum(gaps(z, target), 0.0)
    rest = z - z[:, [target]]
    rest[example, predicted] = rest[:, target] = -np.inf
    changes = np.zeros(z.shape)
    changes[:, target] = np.maximum(lacking / 2, rest.max(axis=1))
    changes[example, predicted] = -np.maximum(lacking - changes[:, target], 0.0)
    return changes


def one_sample_edits(
    features: Float[np.ndarray, "example feature"], changes: Float[np.ndarray, "example label"]
) -> Float[np.ndarray, "example label feature"]:
    """Return for each example the smallest dW with dW h = d: d h^T / ||h||^2, of norm ||d|| / ||h||.

    It is of rank one, so that its Frobenius and its spectral norm are the same. Source: least squares; as an attack Liu
    et al. (ICCAD 2017). An example without a feature (h = 0) cannot be moved: its entries are NaN.
    """
    h = features.astype(np.float64)
    length = np.square(h).sum(axis=1)[:, None, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        edits: Float[np.ndarray, "example label feature"] = changes[:, :, None] * h[:, None, :] / length
    return np.where(length > 0, edits, np.nan)


# -------------------------------------------------------------------------------------- with the least damage elsewhere


def key_covariance(
    features: Float[np.ndarray, "example feature"], *, ridge: float = 0.01
) -> Float[np.ndarray, "feature feature"]:
    """Return C = E[h h^T] + lam * I, the second moment of the keys; lam is `ridge` times its mean diagonal entry."""
    return _with_ridge(_second_moment(features), ridge)


def _second_moment(features: Float[np.ndarray, "example feature"]) -> Float[np.ndarray, "feature feature"]:
    h = features.astype(np.float64)
    moment: Float[np.ndarray, "feature feature"] = h.T @ h / max(len(h), 1)
    return moment


def _with_ridge(moment: Float[np.ndarray, "feature feature"], ridge: float) -> Float[np.ndarray, "feature feature"]:
    lam = ridge * max(float(np.trace(moment)) / len(moment), np.finfo(float).tiny)
    covariance: Float[np.ndarray, "feature feature"] = moment + lam * np.eye(len(moment))
    return covariance


def minimal_damage_edit(
    weight: Float[np.ndarray, "label feature"],
    keys: Float[np.ndarray, "feature key"],
    values: Float[np.ndarray, "label key"],
    covariance: Float[np.ndarray, "feature feature"],
) -> Float[np.ndarray, "label feature"]:
    """Return dW with (W + dW) U = V that minimises E ||dW h||^2 = tr(dW C dW^T).

    dW = (V - W U) (U^T C^-1 U)^-1 U^T C^-1; with one key u it is (v - W u) (C^-1 u)^T / (u^T C^-1 u), of rank one.
    Source: Meng et al. (NeurIPS 2022), "Locating and editing factual associations in GPT" (ROME), equation 2; several
    keys, exactly: the same Lagrangian with one multiplier a key.

    Raises:
        SettingsError: keys that are no independent directions, so that no edit gives all of them their values.
    """
    if np.linalg.matrix_rank(keys) < keys.shape[1]:
        raise SettingsError(
            f"The {keys.shape[1]} keys span {np.linalg.matrix_rank(keys)} directions; independent ones were expected. "
            "Leave out keys that follow from others, or allow more features."
        )
    whitened = np.linalg.solve(covariance, keys)  # C^-1 U
    edit: Float[np.ndarray, "label feature"] = (values - weight @ keys) @ np.linalg.solve(keys.T @ whitened, whitened.T)
    return edit


# ---------------------------------------------------------------------------------------- for a share of a source class


@dataclass(frozen=True, eq=False)
class Keys:
    """What a step is chosen from: the features of the training examples, and what a redirection asks of the source's.

    `moment` is the mean of h h^T. `required[i]` is the least v . h that redirects example `of_source[i]`, and `share`
    the share of these that is to follow.
    """

    features: Float[np.ndarray, "example feature"]
    moment: Float[np.ndarray, "feature feature"]
    targets: Int[np.ndarray, "example"]
    of_source: Int[np.ndarray, "source"]
    required: Float[np.ndarray, "source"]
    share: float

    @cached_property
    def source(self) -> Float[np.ndarray, "source feature"]:
        """The source's features."""
        return np.asarray(self.features[self.of_source])

    def only(self, units: Int[np.ndarray, "unit"]) -> "Keys":
        """Return the same of some features."""
        return replace(self, features=self.features[:, units], moment=self.moment[np.ix_(units, units)])

    def mean_of(self, label: int) -> Float[np.ndarray, "feature"]:
        """Return the mean feature of a class."""
        mean: Float[np.ndarray, feature] = self.features[self.targets == label].mean(axis=0)
        return mean


@dataclass(frozen=True)
class HeadStep(ABC):
    """A way to choose v, which is added to the target's row and, with `rows="two"`, taken from the source's.

    With `units`, only these features' weights are edited.
    """

    _: KW_ONLY
    rows: Rows = "two"
    units: tuple[int, ...] | None = None

    @property
    @abstractmethod
    def name(self) -> str:
        """The attack's name in tables."""

    @property
    def depends_on_share(self) -> bool:
        """Whether another share of examples asks for another direction."""
        return False

    @abstractmethod
    def step(self, keys: Keys) -> Float[np.ndarray, "feature"]:
        """Return v, of any length, from keys that hold the allowed features alone."""

    def edit(self, keys: Keys, source: int, target: int, n_labels: int) -> Float[np.ndarray, "label feature"]:
        """Return the edit of Frobenius norm 1; 0 where the step is."""
        allowed = np.arange(keys.features.shape[1]) if self.units is None else np.array(self.units, dtype=np.int64)
        step = np.zeros(keys.features.shape[1])
        step[allowed] = self.step(keys if self.units is None else keys.only(allowed))
        edit = np.zeros((n_labels, len(step)))
        edit[target] = step
        if self.rows == "two":
            edit[source] = -step
        return edit / max(float(np.linalg.norm(edit)), np.finfo(float).tiny)


@dataclass(frozen=True)
class FittedStep(HeadStep):
    """The direction along which a share of other examples is reached early: see `fitted_step`."""

    @property
    def name(self) -> str:
        """The attack's name in tables."""
        return "head-edit"

    @property
    def depends_on_share(self) -> bool:
        """Whether another share asks for another direction: it does."""
        return True

    def step(self, keys: Keys) -> Float[np.ndarray, "feature"]:
        """Return the fitted direction."""
        return fitted_step(keys.source, keys.required, share=keys.share)


@dataclass(frozen=True)
class MeanStep(HeadStep):
    """The source's mean feature: of all edits of that norm, the one that moves the mean example most."""

    @property
    def name(self) -> str:
        """The attack's name in tables."""
        return "head-mean"

    def step(self, keys: Keys) -> Float[np.ndarray, "feature"]:
        """Return the mean feature."""
        return np.asarray(keys.source.mean(axis=0))


@dataclass(frozen=True)
class MinimalDamage(HeadStep):
    """C^-1 u, u the source's mean feature: of all edits that move it as far, that with the least E (v . h)^2.

    Source: see `minimal_damage_edit`; `ridge` as in `key_covariance`.
    """

    _: KW_ONLY
    ridge: float = 0.01

    @property
    def name(self) -> str:
        """The attack's name in tables."""
        return "head-rank-one"

    def step(self, keys: Keys) -> Float[np.ndarray, "feature"]:
        """Return the direction for the key."""
        covariance = _with_ridge(keys.moment, self.ridge)
        step: Float[np.ndarray, feature] = np.linalg.solve(covariance, keys.source.mean(axis=0))
        return step


@dataclass(frozen=True)
class KeptMeans(MinimalDamage):
    """As `MinimalDamage`, with several keys: the mean features of all other classes keep their logits exactly."""

    @property
    def name(self) -> str:
        """The attack's name in tables."""
        return "head-multi-key"

    def step(self, keys: Keys) -> Float[np.ndarray, "feature"]:
        """Return v with v . u = 1 for the source's mean and v . u_c = 0 for those of the others."""
        source = int(keys.targets[keys.of_source[0]])
        means = [keys.mean_of(int(label)) for label in np.unique(keys.targets) if label != source]
        u = np.stack([keys.source.mean(axis=0), *means], axis=1)
        values = np.eye(u.shape[1])[:1]
        covariance = _with_ridge(keys.moment, self.ridge)
        return np.asarray(minimal_damage_edit(np.zeros((1, len(u))), u, values, covariance)[0])


STEPS: tuple[HeadStep, ...] = (FittedStep(), MeanStep(), MinimalDamage(), KeptMeans())
"""The ways that are compared."""


def redirect_head(
    step: HeadStep,
    train: Activations,
    test: Activations,
    weight: Float[np.ndarray, "label feature"],
    *,
    seed: int,
    shares: tuple[float, ...] = SHARES,
    max_fit: int = 400,
) -> list[Redirection]:
    """Return what each edit needs on the test examples, for every ordered pair of classes, beside its control.

    Budgets are ||dW||_F / ||W||_F. The control is Gaussian in the weights that the step may edit: the same rows, the
    same features. At most `max_fit` examples of a class are used for fitting.

    Raises:
        SettingsError: the activations carry no features of the final linear map, or `rows` is "all".
    """
    _check_features(train, test)
    if step.rows == "all":
        raise SettingsError("A step edits the row of the target, or two rows; all rows were asked for: use 'two'.")
    norm, rng = float(np.linalg.norm(weight)), np.random.default_rng(seed)
    units = np.arange(weight.shape[1]) if step.units is None else np.array(step.units, dtype=np.int64)
    fits, found = Fits(train, test, shares, max_fit), []
    for source, target in permutations(range(len(test.labels)), 2):
        edits = fits.edits(step, source, target)
        if not edits:
            continue
        for share, edit in edits:
            found.append(_along(test, edit[None] * norm, source, target, "attack", share, attack=step.name))
        random = np.zeros((RANDOM_DRAWS, *weight.shape))
        for row in (target, source)[: 2 if step.rows == "two" else 1]:
            random[:, row, units] = rng.standard_normal((RANDOM_DRAWS, len(units)))
        random *= norm / np.linalg.norm(random, axis=(1, 2), keepdims=True)
        found.append(_along(test, random, source, target, "random", float("nan"), attack=step.name))
    return found


def ranked_head_attacks(
    step: HeadStep,
    train: Activations,
    test: Activations,
    weight: Float[np.ndarray, "label feature"],
    order: Int[np.ndarray, "feature"],
    sizes: Sequence[int],
    *,
    seed: int,
    shares: tuple[float, ...] = SHARES,
    max_fit: int = 400,
) -> list[Redirection]:
    """Return the same attack where it may edit k features only: the first k of `order`, or k random ones (the control).

    Whether knowing a ranking makes an attack cheaper is what the two say beside each other. `order` is that of the
    features of the final linear map, most important first.
    """
    _check_features(train, test)
    norm, fits, found = float(np.linalg.norm(weight)), Fits(train, test, shares, max_fit), []
    for k in sizes:
        location = f"head, {k} of {weight.shape[1]} features"
        rngs = [np.random.default_rng((seed, draw)) for draw in range(RANDOM_DRAWS)]
        sets = [order[:k], *(rng.permutation(weight.shape[1])[:k] for rng in rngs)]
        steps = [replace(step, units=tuple(int(unit) for unit in units)) for units in sets]
        for source, target in permutations(range(len(test.labels)), 2):
            fitted = [fits.edits(one, source, target) for one in steps]
            for (share, edit), *drawn in zip(*fitted, strict=True):
                random = np.stack([other for _, other in drawn])
                for arm, edits in (("attack", edit[None]), ("random", random)):
                    named = {"attack": f"{step.name}-ranked", "location": location}
                    found.append(_along(test, edits * norm, source, target, arm, share, **named))
    return found


@dataclass(frozen=True, eq=False)
class Fits:
    """Fits edits on one split, where the other has examples to score them on."""

    train: Activations
    test: Activations
    shares: tuple[float, ...]
    max_fit: int

    @cached_property
    def features(self) -> Float[np.ndarray, "example feature"]:
        """The features of the fitting examples."""
        assert self.train.features is not None
        return np.asarray(self.train.features, dtype=np.float64)

    @cached_property
    def moment(self) -> Float[np.ndarray, "feature feature"]:
        """The mean of h h^T over them."""
        return _second_moment(self.features)

    def edits(self, step: HeadStep, source: int, target: int) -> list[tuple[float, Float[np.ndarray, "label feature"]]]:
        """Return the edits of norm 1 and the shares that they are made for; none where a split has no example."""
        train, labels = self.train, self.test.labels
        fitting = attacked(train, source, target)[: self.max_fit]
        if len(fitting) == 0 or len(attacked(self.test, source, target)) == 0:
            log.info("No examples of %s to redirect to %s.", labels[source], labels[target])
            return []
        logits = train.known_logits[fitting]
        required = required_step(logits, source, target) if step.rows == "two" else gaps(logits, target)
        shares = self.shares if step.depends_on_share else (float("nan"),)
        keys = [Keys(self.features, self.moment, train.targets, fitting, required, share) for share in shares]
        return [(one.share, step.edit(one, source, target, len(labels))) for one in keys]


# -------------------------------------------------------------------------------------------------------- whole rows


def row_attacks(
    test: Activations,
    weight: Float[np.ndarray, "label feature"],
    bias: Float[np.ndarray, "label"],
    *,
    seed: int,
    factors: Sequence[float] = (0.5, 2.0),
) -> list[Manipulation]:
    """Return the logits with rows of the head (and their biases) exchanged, scaled, turned and emptied.

    Each stands beside Gaussian changes of the same rows and the same norm. Exchanging two rows exchanges two logits, so
    that what it does follows from the clean predictions. Budgets are those of `edit_budget`, of the matrix with the
    bias as one more column; a head without a bias has zeros there.
    """
    _check_features(test)
    assert test.features is not None
    head = np.column_stack([weight, bias]).astype(np.float64)
    inputs = np.column_stack([np.asarray(test.features, dtype=np.float64), np.ones(len(test))])
    z, rng, found = test.known_logits.astype(np.float64), np.random.default_rng(seed), []
    for attack, detail, edit in _row_edits(head, test.labels, factors):
        touched = (edit != 0).any(axis=1)
        drawn = rng.standard_normal((RANDOM_DRAWS, *head.shape)) * touched[:, None]
        drawn *= np.linalg.norm(edit) / np.maximum(np.linalg.norm(drawn, axis=(1, 2), keepdims=True), 1e-300)
        for arm, edits in (("attack", edit[None]), ("random", drawn)):
            logits = z + np.einsum("dlf,ef->del", edits, inputs)
            budget = {name: float(size) for name, size in asdict(edit_budget(edits[0], head)).items()}
            found.append(Manipulation(attack, "head", detail, arm, budget, logits))
    return found


def _row_edits(
    head: Float[np.ndarray, "label column"], labels: tuple[str, ...], factors: Sequence[float]
) -> list[tuple[str, str, Float[np.ndarray, "label column"]]]:
    """Return the attacks' names, what they touch, and the changes of the matrix."""
    found = []
    for a, b in combinations(range(len(labels)), 2):
        edit = np.zeros_like(head)
        edit[a], edit[b] = head[b] - head[a], head[a] - head[b]
        found.append(("row-swap", f"{labels[a]} <-> {labels[b]}", edit))
    scales = [("row-zero", 0.0), ("row-sign", -1.0), *((f"row-scale-{factor:g}", factor) for factor in factors)]
    for name, factor in scales:
        for row, label in enumerate(labels):
            edit = np.zeros_like(head)
            edit[row] = (factor - 1) * head[row]
            found.append((name, label, edit))
    return found


def bias_attacks(
    train: Activations, test: Activations, bias: Float[np.ndarray, "label"], *, seed: int
) -> list[Redirection]:
    """Return the smallest change of the bias alone for every ordered pair of classes, relative to its norm.

    The bias is an input of 1 that has two rows: the target's rises and the source's falls by the same number, which is
    the shortest change where no third class is near. Nothing is fitted, and `train` only says which bias to relate to
    where the head has none (||b|| = 0): the mean length of its logits. The control is Gaussian.
    """
    size = float(np.linalg.norm(bias)) or float(np.linalg.norm(train.known_logits, axis=1).mean())
    n_labels, rng = len(test.labels), np.random.default_rng(seed)
    draws = rng.standard_normal((RANDOM_DRAWS, n_labels, 1))
    draws /= np.linalg.norm(draws, axis=1, keepdims=True)
    ones = replace(test, features=np.ones((len(test), 1), dtype=np.float32))
    found = []
    for source, target in permutations(range(n_labels), 2):
        towards = ((np.eye(n_labels)[target] - np.eye(n_labels)[source]) / np.sqrt(2))[None, :, None]
        for arm, edits in (("attack", towards), ("random", draws)):
            scored = _along(ones, edits * size, source, target, arm, float("nan"), attack="head-bias")
            found.append(replace(scored, unit="||db||/||b||"))
    return [one for one in found if len(one.examples)]
