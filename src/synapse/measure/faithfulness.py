"""Which of several rankings is best here: each is judged by what removing its units does in the live model.

A ranking promises that its first units matter most. How far it keeps that is its *ordering quality*: the damage area
of its top units less that of random sets (see `synapse.measure.stability`), as a share of the headroom.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from synapse.measure.intervals import figure, resample
from synapse.measure.outcomes import outcomes_of
from synapse.measure.stability import (
    Place,
    by_scope,
    curve,
    headroom,
    is_used,
    not_used,
    on_shared_points,
    swept_places,
)
from synapse.types import GLOBAL, Figure, Sweep

UNIT = "share of headroom"

Draws = Mapping[str, Float[np.ndarray, "draw"]]
"""Ordering quality of each method, in the data (entry 0) and in each resample."""


@dataclass(frozen=True)
class Best:
    """The method of highest ordering quality, the next one, and by how much it leads, paired by example.

    The two cannot be told apart where the interval of the lead reaches zero. That the best was chosen by the same
    numbers makes this no easier: of many equal methods the first two lie closer together than any two do.
    """

    method: str
    second: str
    lead: Figure


@dataclass(frozen=True)
class Faithfulness:
    """Ordering qualities by scope, layer and method, where more than one method was swept; else all are empty.

    `overall` is the mean over the layers that are used, and only those have a `best`.
    """

    quality: dict[str, dict[int, dict[str, Figure]]]
    best: dict[str, dict[int, Best]]
    overall: dict[str, dict[str, Figure]]
    best_overall: dict[str, Best]


def faithfulness(sweep: Sweep, *, seed: int = 0) -> Faithfulness:
    """Return the ordering quality of every method that was swept, and which is best, by layer and over all layers.

    At one place all methods are compared at the sizes that all of them and the random sets have, so that the quality
    of a method that was swept more densely can differ from that in `stability`. `seed` is that of the resamples.

    Raises
    ------
    DataError
        Where the parts of the sweep do not fit each other.
    """
    outcomes = outcomes_of(sweep)
    n, resamples = len(outcomes), resample(len(outcomes), seed=seed)
    quality: dict[Place, dict[str, Figure]] = {}
    best: dict[Place, Best] = {}
    of_scope: dict[str, list[tuple[Draws, float]]] = {}
    for (scope, layer), cells in swept_places(outcomes):
        ranked = cells[(cells["selection"] == "top") & (cells["label"] == GLOBAL) & (cells["fraction"] < 1)]
        tops = {str(m): top for m in dict.fromkeys(ranked["method"]) if (top := curve(outcomes, cells, "top", m))}
        random = curve(outcomes, cells, "random", "")
        if len(tops) < 2 or random is None:
            continue
        if not is_used(headroom(outcomes, cells)):
            quality[scope, layer] = dict.fromkeys(tops, not_used(n, UNIT))
            continue
        chance, *areas = (each.area(resamples) for each in on_shared_points([random, *tops.values()]))
        draws = {method: area - chance for method, area in zip(tops, areas, strict=True)}
        span = 2 / random.headroom  # of two areas, each of which one example in all moves by 1 / headroom
        quality[scope, layer] = _figures(draws, n, span)
        best[scope, layer] = _best(draws, n, span)
        of_scope.setdefault(scope, []).append((draws, span))
    means = {scope: _mean(layers) for scope, layers in of_scope.items()}
    return Faithfulness(
        quality=by_scope(quality),
        best=by_scope(best),
        overall={scope: _figures(draws, n, span) for scope, (draws, span) in means.items()},
        best_overall={scope: _best(draws, n, span) for scope, (draws, span) in means.items() if len(draws) > 1},
    )


def _figures(draws: Draws, n: int, span: float) -> dict[str, Figure]:
    return {method: figure(quality, n=n, unit=UNIT, span=span) for method, quality in draws.items()}


def _best(draws: Draws, n: int, span: float) -> Best:
    first, second = sorted(draws, key=lambda method: -draws[method][0])[:2]  # ties keep the order of the sweep
    return Best(first, second, figure(draws[first] - draws[second], n=n, unit=UNIT, span=span))


def _mean(layers: list[tuple[Draws, float]]) -> tuple[Draws, float]:
    """Return the mean over layers for the methods that all of them have, and the mean span (see `figure`)."""
    first, _ = layers[0]
    methods = [method for method in first if all(method in draws for draws, _ in layers)]
    means = {method: np.mean([draws[method] for draws, _ in layers], axis=0) for method in methods}
    return means, float(np.mean([span for _, span in layers]))
