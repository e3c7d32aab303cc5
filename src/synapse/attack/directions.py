"""One direction for all examples, and how far along it each must go: class means apart, or a mean of smallest edits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from synapse.attack.activation import STEPS, smallest_edits, state_redirection
from synapse.attack.base import RANDOM_DRAWS, attacked, broken_budget, needed_budget
from synapse.attack.readout import ReadoutMap
from synapse.data.examples import Examples
from synapse.errors import SettingsError
from synapse.model.classifier import Classifier
from synapse.model.resume import Reuse
from synapse.types import GLOBAL, Activations, Component, Progress, Redirection, silent

GRID = tuple(np.geomspace(0.05, 8.0, 22).tolist())
"""Budgets, relative to the length of the states, at which a direction is tried where the head is not linear."""

Directions = Mapping[tuple[int | None, int], Float[np.ndarray, "unit"]]
"""A direction for each (source, target); without a source, from all other classes."""


def steering_directions(train: Activations, layer: int) -> dict[tuple[int | None, int], Float[np.ndarray, "unit"]]:
    """Return the differences of class means: from each class, and from all others together, to each class.

    Pairs with a class that has no example are left out. Source: Rimsky et al. (ACL 2024), "Steering Llama 2 via
    contrastive activation addition"; see `synapse.perturb.activations.Steer`, which applies one.
    """
    values, targets, n_labels = np.asarray(train.values[layer], dtype=np.float64), train.targets, len(train.labels)
    found = {}
    for target in range(n_labels):
        for source in (None, *(c for c in range(n_labels) if c != target)):
            start = targets != target if source is None else targets == source
            if start.any() and (targets == target).any():
                found[source, target] = values[targets == target].mean(axis=0) - values[start].mean(axis=0)
    return found


def universal_directions(
    classifier: Classifier,
    train: Examples,
    *,
    layer: int,
    component: Component = "residual",
    steps: int = STEPS,
    reuse: dict[int, Reuse] | None = None,
) -> dict[tuple[int | None, int], Float[np.ndarray, "unit"]]:
    """Return for each class the mean of the smallest edits that make training examples of others that class.

    Source: Moosavi-Dezfooli et al. (CVPR 2017), "Universal adversarial perturbations", which adds such edits up one
    after the other; here their mean is taken, which does not depend on the order. `reuse` as in `smallest_edits`.
    """
    found: dict[tuple[int | None, int], Float[np.ndarray, "unit"]] = {}
    options: dict[str, Any] = {"component": component, "draws": 0, "steps": steps}
    options["reuse"] = {} if reuse is None else reuse
    for target, label in enumerate(classifier.labels):
        edits = smallest_edits(classifier, train, layer=layer, target=label, **options)
        moved = np.isfinite(edits.needed) & (edits.needed > 0)
        if moved.any():
            found[None, target] = edits.edits[moved].mean(axis=0)
    return found


def direction_attacks(
    classifier: Classifier,
    examples: Examples,
    test: Activations,
    directions: Mapping[str, Directions],
    *,
    layer: int,
    component: Component = "residual",
    grid: Sequence[float] = GRID,
    seed: int = 0,
    reuse: dict[int, Reuse] | None = None,
    progress: Progress = silent,
) -> list[Redirection]:
    """Return how far along its direction each example follows, and when others are lost, beside random directions.

    `directions`, by the name of the attack, were found on other examples; `test` is the recording of `examples`.
    Budgets are relative to the mean length of the states. They are exact where the head is linear; elsewhere they are
    the first of the `grid`, at which the states are moved in the live model: at most one of its steps too large.
    `reuse` as in `smallest_edits`.

    Raises:
        SettingsError: examples that are not those of the recording.
    """
    if len(examples) != len(test):
        raise SettingsError(f"{len(examples)} examples and {len(test)} recorded ones were given; pass the same ones.")
    scale = float(np.linalg.norm(np.asarray(test.values[layer], dtype=np.float64), axis=1).mean())
    asked = [(attack, *ends, way) for attack, ways in directions.items() for ends, way in ways.items()]
    random = np.random.default_rng(seed).standard_normal((RANDOM_DRAWS, classifier.sites(component)[layer].width))
    vectors = np.stack([*(way for *_, way in asked), *random])
    vectors *= scale / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.finfo(float).tiny)
    moved = _along_vectors(
        classifier, examples, component, layer, vectors, grid, {} if reuse is None else reuse, progress
    )
    drawn, found = range(len(asked), len(vectors)), []
    for v, (attack, source, target, _) in enumerate(asked):
        chosen = attacked(test, source, target)
        if len(chosen) == 0:
            continue
        others = np.flatnonzero(test.targets != source) if source is not None else np.empty(0, dtype=np.int64)
        others = others[test.predictions[others] == test.targets[others]]
        for arm, which in (("attack", range(v, v + 1)), ("random", drawn)):
            needed = np.stack([moved.needed(one, chosen, target) for one in which])
            broken = np.stack([moved.broken(one, others) for one in which])
            names = (GLOBAL if source is None else test.labels[source], test.labels[target], arm)
            location = f"{component} {layer}"
            found.append(state_redirection(attack, location, *names, needed, chosen, others, broken))
    return found


@dataclass(frozen=True, eq=False)
class _Moved:
    """Logits of all examples along vectors: by their slopes where they are linear, else at the budgets of a grid."""

    clean: Float[np.ndarray, "example label"]
    slopes: Float[np.ndarray, "vector label"] | None
    budgets: Float[np.ndarray, "budget"]
    logits: Float[np.ndarray, "vector budget example label"]

    def needed(self, v: int, examples: Int[np.ndarray, "some"], target: int) -> Float[np.ndarray, "some"]:
        """Return the budget at which each example is predicted as the target."""
        clean = self.clean[examples]
        if self.slopes is not None:
            return needed_budget(clean, np.broadcast_to(self.slopes[v], clean.shape), target)
        return self._first(self.logits[v][:, examples].argmax(axis=2) == target)

    def broken(self, v: int, examples: Int[np.ndarray, "some"]) -> Float[np.ndarray, "some"]:
        """Return the budget at which the prediction of each example is another one."""
        clean = self.clean[examples]
        if self.slopes is not None:
            return broken_budget(clean, np.broadcast_to(self.slopes[v], clean.shape))
        return self._first(self.logits[v][:, examples].argmax(axis=2) != clean.argmax(axis=1))

    def _first(self, hits: Bool[np.ndarray, "budget some"]) -> Float[np.ndarray, "some"]:
        return np.where(hits.any(axis=0), self.budgets[hits.argmax(axis=0)], np.inf)


def _along_vectors(
    classifier: Classifier,
    examples: Examples,
    component: Component,
    layer: int,
    vectors: Float[np.ndarray, "vector unit"],
    grid: Sequence[float],
    reuse: dict[int, Reuse],
    progress: Progress,
) -> _Moved:
    n, budgets, done = len(examples), np.sort(np.array(grid)), 0
    clean = np.empty((n, len(classifier.labels)))
    logits = np.empty((len(vectors), len(budgets), *clean.shape), dtype=np.float32)
    slopes = None
    with torch.inference_mode(False), classifier.studied():
        for batch in classifier.batches(examples.inputs):
            state = ReadoutMap(classifier, batch, component, layer, reuse)
            clean[batch.index] = state.clean_logits
            if state.is_linear:
                slopes = vectors @ state.weight.T
            else:
                for v, vector in enumerate(vectors):
                    for b, budget in enumerate(budgets):
                        logits[v, b, batch.index] = state.logits(np.tile(vector * budget, (len(state), 1)))
            done += len(batch.index)
            progress(done, n)
    return _Moved(clean, slopes, budgets, logits)
