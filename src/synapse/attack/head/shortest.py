"""Short steps: along which direction is a share of examples redirected early?"""

import numpy as np
from jaxtyping import Float
from scipy.optimize import nnls


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
