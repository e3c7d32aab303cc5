"""Smallest edits of two rows of the head that redirect a class, fitted on one split and scored on another."""

import logging
from itertools import permutations

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import nnls

from synapse.attack.base import RANDOM_DRAWS, attacked, broken_budget, needed_budget
from synapse.errors import SettingsError
from synapse.types import Activations, Redirection

log = logging.getLogger(__name__)

SHARES = (0.5, 0.95)
"""Shares of the source class's examples that an edit is fitted to redirect."""

UNIT = "||dW||/||W||"


def head_attacks(
    train: Activations,
    test: Activations,
    weight: Float[np.ndarray, "label feature"],
    *,
    seed: int,
    shares: tuple[float, ...] = SHARES,
    max_fit: int = 400,
) -> list[Redirection]:
    """Return what each fitted edit needs on the test examples, for every ordered pair of classes, beside its control.

    The edit adds v to the target's row and takes v from the source's, so its norm is sqrt(2) * ||v||. Budgets are
    relative to the Frobenius norm of `weight`. The control is a Gaussian matrix of the same norm. At most `max_fit`
    examples of a class are used for fitting.

    Raises:
        SettingsError: the activations carry no features of the final linear map.
    """
    if train.features is None or test.features is None:
        raise SettingsError(
            "The head does not end in a linear map, so it has no rows to edit; leave the head attack out."
        )
    norm = float(np.linalg.norm(weight))
    random = np.random.default_rng(seed).standard_normal((RANDOM_DRAWS, *weight.shape))
    random *= norm / np.linalg.norm(random, axis=(1, 2), keepdims=True)
    found = []
    for source, target in permutations(range(len(test.labels)), 2):
        fitting = attacked(train, source, target)[:max_fit]
        if len(fitting) == 0 or len(attacked(test, source, target)) == 0:
            log.info("No examples of %s to redirect to %s.", test.labels[source], test.labels[target])
            continue
        for share in shares:
            required = required_step(train.known_logits[fitting], source, target)
            step = fitted_step(train.features[fitting].astype(np.float64), required, share=share)
            edit = np.zeros_like(weight, dtype=np.float64)
            edit[target], edit[source] = step, -step
            edit *= norm / max(float(np.linalg.norm(edit)), np.finfo(float).tiny)
            found.append(_along(test, edit[None], source, target, "attack", share))
        found.append(_along(test, random, source, target, "random", float("nan")))
    return found


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
    thirds of them give candidates (their mean, the shortest v, and both in equal parts), the rest choose among these.
    """
    chooses = np.arange(len(features)) % 3 == 2
    if not chooses.any():
        return smallest_step(features, required, share=share)
    mean = features[~chooses].mean(axis=0)
    shortest = smallest_step(features[~chooses], required[~chooses], share=share)
    unit = [v / max(float(np.linalg.norm(v)), np.finfo(float).tiny) for v in (mean, shortest)]
    candidates = (*unit, unit[0] + unit[1])
    lengths = [_length_along(v, features[chooses], required[chooses], share) for v in candidates]
    return candidates[int(np.argmin(lengths))]


def _length_along(
    v: Float[np.ndarray, "feature"],
    features: Float[np.ndarray, "example feature"],
    required: Float[np.ndarray, "example"],
    share: float,
) -> float:
    """Return the length at which v reaches the share of the examples."""
    return float(np.quantile(_scales_along(v, features, required), share, method="inverted_cdf") * np.linalg.norm(v))


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
) -> Redirection:
    """Score edits of relative norm 1: the logits move by budget * (edit @ features)."""
    assert test.features is not None
    examples = attacked(test, source, target)
    others: Int[np.ndarray, other] = np.flatnonzero(test.targets != source)
    others = others[test.predictions[others] == test.targets[others]]
    slopes = [test.features @ edit.T for edit in edits]
    return Redirection(
        attack="head-edit",
        location="head",
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
