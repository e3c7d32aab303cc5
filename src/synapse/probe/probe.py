"""Linear probes: one classifier a layer on recorded activations, which never touches the model."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float, Int

from synapse.data.examples import sample_examples
from synapse.errors import ConvergenceError, DataError, SettingsError
from synapse.execute import Executor, ThreadExecutor
from synapse.probe.solver import TOLERANCE, Solution, check_penalty, solve, solve_path
from synapse.types import Activations

Target = Literal["gold", "model"]
"""What a probe reads out: the labels of the examples, or the classifier's own predictions."""

RULES = ("best", "one-standard-error")
"""Which penalty is chosen: the one with the best accuracy, or the strongest that is about as good."""

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
    gap: float = 0.0
    """Duality gap, in nats, see there."""

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
    joint: bool = False
    """Whether the layers' weights are parts of one probe, whose logits are the sum of theirs."""

    def predict_logits(
        self, values: Float[np.ndarray, "layer example unit"]
    ) -> Float[np.ndarray, "probe example label"]:
        """Return the logits of the probe of every layer for raw states; of a joint one, its own in a single row."""
        logits = np.stack([probe.predict_logits(x) for probe, x in zip(self.probes, values, strict=True)])
        return logits.sum(axis=0, keepdims=True) if self.joint else logits

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
    folds: int | None = None,
    rule: str = "best",
    class_weight: str | None = None,
    seed: int = 0,
    target: Target = "gold",
    solver: str = "newton",
    device: str = "cpu",
    executor: Executor | None = None,
) -> Probes:
    """Return a certified elastic-net probe for every layer.

    The penalty of a layer is the one with the best accuracy on a stratified held-out share of the activations, or, with
    `folds`, over the parts of a stratified cross-validation (of equals, the strongest); the probe is then fitted on all
    of them. Accuracy and not log-loss: the classifier was often trained on these very examples, and log-loss then
    favours over-confident probes. The rule `one-standard-error` takes the strongest penalty whose accuracy is within
    one standard error of the best (Hastie, Tibshirani & Friedman, The Elements of Statistical Learning, section 7.10).

    With `class_weight` "balanced" all classes weigh the same, in the fit and in the choice. `solver` and `device` are
    those of `synapse.probe.solver.solve`. `executor` fits the layers, by default on threads.

    Raises:
        ConvergenceError: a probe's certificate is above the tolerance.
        DataError: fewer than two labels occur, or an activation is not finite.
        SettingsError: an option is out of range.
    """
    fit = _Fit(activations, target, tuple(penalties), l1_ratio, rule, class_weight, solver, device)
    fit.check()
    parts = _held_out(fit.targets, holdout, folds, seed) if len(set(penalties)) > 1 else []

    outcomes = (executor or ThreadExecutor()).results(_probe_of_layer, range(activations.n_layers), shared=(fit, parts))
    found = {done.position: done.result for done in outcomes}
    probes = tuple(found[layer] for layer in range(activations.n_layers))
    return Probes(probes, activations.labels, activations.source, target)


def _probe_of_layer(shared: tuple["_Fit", Sequence[Int[np.ndarray, "sample"]]], layer: int) -> Probe:
    fit, parts = shared
    return fit.of_layer(layer, parts)


def fit_joint_probes(
    activations: Activations,
    *,
    penalties: Sequence[float] = PENALTIES,
    l1_ratio: float = 0.5,
    holdout: float = 0.2,
    folds: int | None = None,
    rule: str = "best",
    class_weight: str | None = None,
    seed: int = 0,
    target: Target = "gold",
    solver: str = "newton",
    device: str = "cpu",
) -> Probes:
    """Return one probe on the neurons of all layers together, its weights layer by layer.

    Options and errors are those of `fit_probes`. Rankings by its weights compare neurons of different layers
    (`Ranking.top_of_all_layers`). Every part carries an equal share of the intercept.
    """
    fit = _Fit(activations, target, tuple(penalties), l1_ratio, rule, class_weight, solver, device)
    fit.check()
    parts = _held_out(fit.targets, holdout, folds, seed) if len(set(penalties)) > 1 else []
    n_layers, width = activations.n_layers, activations.width
    side_by_side = np.asarray(activations.values).transpose(1, 0, 2).reshape(len(activations), n_layers * width)
    whole = fit.on(side_by_side, parts, place="all layers")
    probes = []
    for layer in range(n_layers):
        mine = slice(layer * width, (layer + 1) * width)
        probes.append(
            replace(
                whole,
                layer=layer,
                weights=whole.weights[:, mine],
                intercept=whole.intercept / n_layers,
                mean=whole.mean[mine],
                scale=whole.scale[mine],
            )
        )
    return Probes(tuple(probes), activations.labels, activations.source, target, joint=True)


def refit_probes(probes: Probes, activations: Activations, targets: Int[np.ndarray, "example"] | None = None) -> Probes:
    """Return probes of `targets` (by default those of `probes`) at the penalties of `probes`, layer by layer.

    Raises:
        ConvergenceError, DataError: as `fit_probes`.
        SettingsError: the probes are joint.
    """
    if probes.joint:
        raise SettingsError("A joint probe cannot be fitted again layer by layer: give the probes of `fit_probes`.")
    found = []
    for layer, probe in enumerate(probes.probes):
        fit = _Fit(activations, probes.target, (probe.penalty,), probe.l1_ratio, given=targets)
        fit.check()
        found.append(fit.of_layer(layer))
    return Probes(tuple(found), activations.labels, activations.source, probes.target)


def probe_targets(activations: Activations, target: Target) -> Int[np.ndarray, "example"]:
    """Return what a probe of `target` should say of each example, as positions in `activations.labels`."""
    if target not in get_args(Target):
        raise SettingsError(f"The target is {target!r}: give one of {', '.join(map(repr, get_args(Target)))}.")
    if target == "gold":
        return activations.targets
    return activations.predictions


def _held_out(
    targets: Int[np.ndarray, "example"], share: float, folds: int | None, seed: int
) -> list[Int[np.ndarray, "sample"]]:
    """Return stratified parts of the examples on which penalties are judged: one, or one for each fold."""
    if not 0.0 < share < 1.0:
        raise SettingsError(f"holdout is {share}: give a share between 0 and 1, for example 0.2.")
    counts = np.bincount(targets)
    repeated = np.flatnonzero(counts[targets] > 1)
    if not len(repeated):
        raise DataError(
            f"No label of the {len(targets)} examples occurs twice, so no penalty can be chosen: "
            "give more examples, or a single penalty."
        )
    if folds is None:
        chosen = sample_examples(targets[repeated], max(1, round(share * len(repeated))), seed=seed)
        return [np.asarray(repeated[chosen])]
    if not 2 <= folds <= len(targets):
        raise SettingsError(f"{folds} folds were asked for: give 2 or more, and no more than there are examples.")
    order = np.random.default_rng(seed).permutation(len(targets))
    by_class = order[np.argsort(targets[order], kind="stable")]
    # Examples of one class follow each other and are dealt out in turn: every fold gets its share of every class.
    return [np.sort(by_class[fold::folds]) for fold in range(folds)]


@dataclass(frozen=True, eq=False)
class _Fit:
    """How a probe is fitted to the states of one layer, or of all of them side by side."""

    activations: Activations
    target: Target
    penalties: tuple[float, ...]
    l1_ratio: float
    rule: str = "best"
    class_weight: str | None = None
    solver: str = "newton"
    device: str = "cpu"
    given: Int[np.ndarray, "example"] | None = None
    """Targets of a control task, in place of those of `target`."""

    @cached_property
    def targets(self) -> Int[np.ndarray, "example"]:
        return probe_targets(self.activations, self.target) if self.given is None else self.given

    def check(self) -> None:
        """Refuse options out of range, and examples of one label."""
        if not self.penalties:
            raise SettingsError("No penalty was given: give at least one number above 0, for example 0.01.")
        for penalty in self.penalties:
            check_penalty(penalty, self.l1_ratio)
        if self.rule not in RULES:
            raise SettingsError(f"The rule is {self.rule!r}: give one of {', '.join(map(repr, RULES))}.")
        if self.class_weight not in (None, "balanced"):
            raise SettingsError(f"class_weight is {self.class_weight!r}: give None or 'balanced'.")
        found = [self.activations.labels[i] for i in np.unique(self.targets)]
        if len(found) < 2:
            raise DataError(
                f"A probe needs examples of at least two labels, but the {len(self.targets)} given have only {found}: "
                "add examples of the others."
            )

    @cached_property
    def example_weights(self) -> Float[np.ndarray, "example"]:
        """How much each example weighs: alike, or so that all classes do."""
        if self.class_weight is None:
            return np.ones(len(self.targets))
        return np.asarray(1.0 / np.bincount(self.targets)[self.targets])

    def of_layer(self, layer: int, parts: Sequence[Int[np.ndarray, "sample"]] = ()) -> Probe:
        """Return the probe of a layer; without `parts` to judge penalties on there is no choice."""
        return replace(self.on(self.activations.values[layer], parts, place=f"layer {layer}"), layer=layer)

    def on(
        self, states: Float[np.ndarray, "example unit"], parts: Sequence[Int[np.ndarray, "sample"]], *, place: str
    ) -> Probe:
        """Return the probe on these states, for layer 0."""
        x = states.astype(np.float64)
        if not np.isfinite(x).all():
            raise DataError(
                f"Activations of {place} hold NaN or infinite values: "
                "look at the inputs, or run the classifier in float32."
            )
        # Equal values can have a deviation of 1e-17 by rounding; only the range says that a unit is constant.
        varies = np.ptp(x, axis=0) > 0.0
        mean, scale = x.mean(axis=0), np.where(varies, x.std(axis=0), 1.0)
        z = np.where(varies, (x - mean) / scale, 0.0)
        penalty, start = self._choice(z, parts)
        found = self._solve(z, penalty, start)
        if not found.converged:
            raise ConvergenceError(
                f"The probe of {place} stopped at a gradient norm of {found.gradient_norm:.1e} with "
                f"penalty {penalty:g}, but {TOLERANCE:.0e} is asked for: choose a stronger penalty."
            )
        return Probe(
            0,
            found.weights,
            found.intercept,
            mean,
            scale,
            penalty,
            self.l1_ratio,
            found.gradient_norm,
            found.converged,
            found.gap,
        )

    def _solve(self, z: Float[np.ndarray, "example unit"], penalty: float, start: Solution | None) -> Solution:
        return solve(
            z,
            self.targets,
            n_labels=len(self.activations.labels),
            penalty=penalty,
            l1_ratio=self.l1_ratio,
            example_weights=self.example_weights,
            start=start,
            solver=self.solver,
            device=self.device,
        )

    def _choice(
        self, z: Float[np.ndarray, "example unit"], parts: Sequence[Int[np.ndarray, "sample"]]
    ) -> tuple[float, Solution | None]:
        """Return the penalty, and a solution at it to start from."""
        if not parts:
            return self.penalties[0], None
        correct = {penalty: np.zeros(len(z)) for penalty in self.penalties}
        for part in parts:
            rest = np.setdiff1d(np.arange(len(z)), part)
            path = solve_path(
                z[rest],
                self.targets[rest],
                n_labels=len(self.activations.labels),
                penalties=self.penalties,
                l1_ratio=self.l1_ratio,
                example_weights=self.example_weights[rest],
                # Which penalty wins does not hang on the last digits: this path may stop early, the final fit not.
                tolerance=min(1e-4, 0.1 * min(self.penalties)),
                solver=self.solver,
                device=self.device,
            )
            for penalty, solution in path.items():
                logits = z[part] @ solution.weights.T + solution.intercept
                correct[penalty][part] = logits.argmax(axis=1) == self.targets[part]
        judged = np.concatenate(parts)
        weights = self.example_weights[judged] / self.example_weights[judged].sum()
        accuracy = {penalty: float(weights @ hits[judged]) for penalty, hits in correct.items()}
        best = max(accuracy, key=lambda penalty: (accuracy[penalty], penalty))
        if self.rule == "one-standard-error":
            error = float(np.sqrt((weights**2) @ (correct[best][judged] - accuracy[best]) ** 2))
            best = max(penalty for penalty in accuracy if accuracy[penalty] >= accuracy[best] - error)
        return best, path[best]
