"""Linear probes: one classifier a layer on recorded activations, which never touches the model."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float, Int
from threadpoolctl import threadpool_limits

from synapse.data.examples import sample_examples
from synapse.errors import ConvergenceError, DataError, SettingsError
from synapse.probe.solver import TOLERANCE, Solution, check_penalty, solve, solve_path
from synapse.types import Activations

Target = Literal["gold", "model"]
"""What a probe reads out: the labels of the examples, or the classifier's own predictions."""

PENALTIES = (0.1, 0.03, 0.01, 0.003, 0.001)
"""Penalties that `fit_probes` chooses from unless told otherwise."""


@dataclass(frozen=True, eq=False)
class Probe:
    """A linear classifier on one layer's states.

    `logits = (x - mean) / scale @ weights.T + intercept`. Weights are in standardised units: how much a logit
    moves when the unit moves by one deviation. A label that no training example had has weights 0 and
    intercept -inf: it is never predicted.
    """

    layer: int
    weights: Float[np.ndarray, "label unit"]
    intercept: Float[np.ndarray, "label"]
    mean: Float[np.ndarray, "unit"]
    scale: Float[np.ndarray, "unit"]
    """Deviation of each unit over the training examples; 1 where the unit is constant (its weights are 0)."""
    penalty: float
    l1_ratio: float
    gradient_norm: float
    """Optimality certificate, see `synapse.probe.solver.Solution`."""
    converged: bool

    def predict_logits(self, x: Float[np.ndarray, "example unit"]) -> Float[np.ndarray, "example label"]:
        """Return the probe's logits for raw states."""
        z: Float[np.ndarray, "example unit"] = (x.astype(np.float64) - self.mean) / self.scale
        return np.asarray(z @ self.weights.T + self.intercept)

    def predict(self, x: Float[np.ndarray, "example unit"]) -> Int[np.ndarray, "example"]:
        """Return the label position with the largest logit for raw states."""
        return np.asarray(self.predict_logits(x).argmax(axis=1))

    def folded(self) -> tuple[Float[np.ndarray, "label unit"], Float[np.ndarray, "label"]]:
        """Return weights and intercept in raw units: `x @ weights.T + intercept == predict_logits(x)`."""
        weights = self.weights / self.scale
        return weights, self.intercept - weights @ self.mean


@dataclass(frozen=True, eq=False)
class Probes:
    """One probe for each layer, all fitted on the same examples; `probes[l]` is the probe of layer `l`."""

    probes: tuple[Probe, ...]
    labels: tuple[str, ...]
    source: str
    """Fingerprint of the training examples."""
    target: Target = "gold"

    def __len__(self) -> int:
        return len(self.probes)

    def __getitem__(self, layer: int) -> Probe:
        return self.probes[layer]


def fit_probes(
    activations: Activations,
    *,
    penalties: Sequence[float] = PENALTIES,
    l1_ratio: float = 0.5,
    holdout: float = 0.2,
    seed: int = 0,
    target: Target = "gold",
) -> Probes:
    """Return a certified elastic-net probe for every layer.

    The penalty of a layer is the one with the best accuracy on a stratified held-out share of the activations
    (of equals, the strongest); the probe is then fitted on all of them. Accuracy and not log-loss: the
    classifier was often trained on these very examples, and log-loss then favours over-confident probes.

    Raises:
        ConvergenceError: a probe's certificate is above the tolerance.
        DataError: fewer than two labels occur, or an activation is not finite.
        SettingsError: an option is out of range.
    """
    if not penalties:
        raise SettingsError("No penalty was given: give at least one number above 0, for example 0.01.")
    for penalty in penalties:
        check_penalty(penalty, l1_ratio)
    if not 0.0 < holdout < 1.0:
        raise SettingsError(f"holdout is {holdout}: give a share between 0 and 1, for example 0.2.")
    targets = probe_targets(activations, target)
    held_out = _held_out(targets, holdout, seed) if len(set(penalties)) > 1 else np.array([], dtype=np.int64)
    n_labels = len(activations.labels)

    def choose(layer: int, z: Float[np.ndarray, "example unit"]) -> tuple[float, Solution | None]:
        if not len(held_out):
            return penalties[0], None
        rest = np.setdiff1d(np.arange(len(z)), held_out)
        # Which penalty wins does not hang on the last digits: this path may stop early, the final fit not.
        path = solve_path(
            z[rest],
            targets[rest],
            n_labels=n_labels,
            penalties=penalties,
            l1_ratio=l1_ratio,
            tolerance=min(1e-4, 0.1 * min(penalties)),
        )

        def merit(penalty: float) -> tuple[int, float]:
            logits = z[held_out] @ path[penalty].weights.T + path[penalty].intercept
            return int(np.sum(np.argmax(logits, axis=1) == targets[held_out])), penalty

        best = max(path, key=merit)
        return best, path[best]

    return _fit_layers(activations, targets, target, l1_ratio, choose)


def refit_probes(probes: Probes, activations: Activations, targets: Int[np.ndarray, "example"] | None = None) -> Probes:
    """Return probes of `targets` (by default those of `probes`) at the penalties of `probes`, layer by layer.

    Raises:
        ConvergenceError, DataError: as `fit_probes`.
    """
    if targets is None:
        targets = probe_targets(activations, probes.target)
    return _fit_layers(
        activations,
        targets,
        probes.target,
        probes[0].l1_ratio,
        lambda layer, z: (probes[layer].penalty, None),
    )


def probe_targets(activations: Activations, target: Target) -> Int[np.ndarray, "example"]:
    """Return what a probe of `target` should say of each example, as positions in `activations.labels`."""
    if target not in get_args(Target):
        raise SettingsError(f"The target is {target!r}: give one of {', '.join(map(repr, get_args(Target)))}.")
    if target == "gold":
        return activations.targets
    return np.asarray(activations.logits.argmax(axis=1))


def _held_out(targets: Int[np.ndarray, "example"], share: float, seed: int) -> Int[np.ndarray, "sample"]:
    """Return a stratified part of the examples whose class occurs more than once."""
    counts = np.bincount(targets)
    repeated = np.flatnonzero(counts[targets] > 1)
    if not len(repeated):
        raise DataError(
            f"No label of the {len(targets)} examples occurs twice, so no penalty can be chosen: "
            "give more examples, or a single penalty."
        )
    chosen = sample_examples(targets[repeated], max(1, round(share * len(repeated))), seed=seed)
    return np.asarray(repeated[chosen])


def _fit_layers(
    activations: Activations,
    targets: Int[np.ndarray, "example"],
    target: Target,
    l1_ratio: float,
    choose: Callable[[int, Float[np.ndarray, "example unit"]], tuple[float, Solution | None]],
) -> Probes:
    """Return probes whose penalty, and a solution to start from, `choose` finds for each layer."""
    found = [activations.labels[i] for i in np.unique(targets)]
    if len(found) < 2:
        raise DataError(
            f"A probe needs examples of at least two labels, but the {len(targets)} given have only {found}: "
            "add examples of the others."
        )

    def fit(layer: int) -> Probe:
        x = activations.values[layer].astype(np.float64)
        if not np.isfinite(x).all():
            raise DataError(
                f"Activations of layer {layer} hold NaN or infinite values: "
                "look at the inputs, or run the classifier in float32."
            )
        # Equal values can have a deviation of 1e-17 by rounding; only the range says that a unit is constant.
        varies = np.ptp(x, axis=0) > 0.0
        mean, scale = x.mean(axis=0), np.where(varies, x.std(axis=0), 1.0)
        z = np.where(varies, (x - mean) / scale, 0.0)
        penalty, start = choose(layer, z)
        found = solve(z, targets, n_labels=len(activations.labels), penalty=penalty, l1_ratio=l1_ratio, start=start)
        if not found.converged:
            raise ConvergenceError(
                f"The probe of layer {layer} stopped at a gradient norm of {found.gradient_norm:.1e} with "
                f"penalty {penalty:g}, but {TOLERANCE:.0e} is asked for: choose a stronger penalty."
            )
        return Probe(
            layer=layer,
            weights=found.weights,
            intercept=found.intercept,
            mean=mean,
            scale=scale,
            penalty=penalty,
            l1_ratio=l1_ratio,
            gradient_norm=found.gradient_norm,
            converged=found.converged,
        )

    # The products are small: one thread a layer beats many threads a product, most of all on a busy machine.
    workers = max(1, min(activations.n_layers, os.cpu_count() or 1))
    with threadpool_limits(limits=1, user_api="blas"), ThreadPoolExecutor(workers) as pool:
        fitted = tuple(pool.map(fit, range(activations.n_layers)))
    return Probes(fitted, activations.labels, activations.source, target)
