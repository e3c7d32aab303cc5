"""Edits of the readout state that change predictions: the smallest for each example, and one direction for all.

An edit d is added to the rows that the head reads, x' = x + d, at one layer. Where the head is one linear map of that
state, z' = z + W d, everything is a closed form. Elsewhere the map is made linear about the present edit, the closed
form is solved for the linear map, and again about what it gives, until the edit is the point of the boundary next to
the state; then the ray to it is halved on real forward passes until the first change is found. What lies below the
layer is not run again.

Sources: Moosavi-Dezfooli et al. (CVPR 2016), "DeepFool", for the affine closed form and its iteration; the iteration
about the present edit, but measured from the start, is that of Hasofer and Lind (1974) and Rackwitz and Fiessler
(1978). An edit that was found is a bound from above; at the linear map it is the smallest.
"""

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import linprog
from torch import Tensor

from synapse.attack.base import RANDOM_DRAWS, attacked, broken_budget, needed_budget
from synapse.attack.head import least_distance
from synapse.data.examples import Examples
from synapse.errors import ModelError, SettingsError
from synapse.model.classifier import Batch, Classifier, in_halves
from synapse.model.hooks import Site, edited_sites
from synapse.model.resume import CleanPass, clean_pass, resume_layer
from synapse.model.trace import forward_logits, passed_over
from synapse.types import GLOBAL, Activations, Component, Neurons, Progress, Redirection, silent

log = logging.getLogger(__name__)

EditNorm = Literal["l2", "linf"]
"""How an edit is measured: its Euclidean length, or its largest entry."""

STEPS = 20
"""Times the map is made linear. The k-th step is 1/sqrt(k) as long as the linear map says, so that they settle: whole
steps jump to and fro where the map bends. The first is whole, and all that is needed of a map that is linear."""

BISECTIONS = 12
"""Halvings of the last stretch of a ray: an edit is within 2^-12 of the first change on its ray."""

STRETCHES = (1.0, 1.01, 1.05, 1.2, 1.5, 2.0, 4.0)
"""Multiples of a found edit that are tried in turn, where the edit itself does not yet change the prediction."""

RANDOM_STRETCHES = tuple(float(2**i) for i in range(8))
"""Multiples of the attack's norm that are tried along random directions."""

RANDOM_BISECTIONS = 4
"""Halvings along random directions, of which there are many: budgets within 4 percent."""

GRID = tuple(np.geomspace(0.05, 8.0, 22).tolist())
"""Budgets, relative to the length of the states, at which a direction is tried where the head is not linear."""

RESUME_TOLERANCE = 1e-3
"""Largest difference of logits or gradients, over the largest, at which what lies below a layer need not run again."""

UNIT = "||d||/||x||"

Directions = Mapping[tuple[int | None, int], Float[np.ndarray, "unit"]]
"""A direction for each (source, target); without a source, from all other classes."""


# --------------------------------------------------------------------------------------------------- the affine problem


def affine_edits(
    logits: Float[np.ndarray, "example label"],
    slopes: Float[np.ndarray, "example label unit"],
    predicted: Int[np.ndarray, "example"],
    target: int | None,
    norm: EditNorm = "l2",
) -> Float[np.ndarray, "example unit"]:
    """Return the smallest d at which logits + slopes d leave the predicted class, or have the target as a maximum.

    Towards a rival c, with gap g and difference of slopes w, it is g w / ||w||_2^2, or g sign(w) / ||w||_1 in the
    largest entry (the dual norms). Without a target it is that of the nearest rival. With one, every other class is to
    be overtaken: that of the farthest if it overtakes all, else the solution of the quadratic or the linear program.
    NaN where no edit does it.
    """
    n_labels, example = logits.shape[1], np.arange(len(logits))
    if target is None:
        gap = logits[example, predicted][:, None] - logits
        towards = slopes - slopes[example, predicted][:, None]
    else:
        gap = logits - logits[:, [target]]
        towards = slopes[:, [target]] - slopes
    dual = np.linalg.norm(towards, ord=2 if norm == "l2" else 1, axis=2)
    with np.errstate(divide="ignore", invalid="ignore"):
        distance = np.where(dual > 0, gap / dual, np.inf)
    if target is None:
        distance[example, predicted] = np.inf
        chosen = np.abs(distance).argmin(axis=1)
    else:
        # A class that moves with the target and is behind it never matters; one that is ahead can never be overtaken.
        distance[(dual == 0) & (gap <= 0)] = distance[:, target] = -np.inf
        chosen = distance.argmax(axis=1)
    step, w = distance[example, chosen], towards[example, chosen]
    shape = w / np.maximum(np.linalg.norm(w, axis=1, keepdims=True), 1e-300) if norm == "l2" else np.sign(w)
    with np.errstate(invalid="ignore"):
        edits = np.where(np.isfinite(step)[:, None], step[:, None] * shape, np.nan)
    if target is not None:
        rivals = np.arange(n_labels) != target
        reached = np.einsum("elu,eu->el", towards, edits) >= gap - 1e-9 * (1 + np.abs(gap))
        for i in np.flatnonzero(~reached[:, rivals].all(axis=1) & np.isfinite(step)):
            edits[i] = _over_all(towards[i, rivals], gap[i, rivals], norm)
    return edits


def _over_all(
    towards: Float[np.ndarray, "rival unit"], gap: Float[np.ndarray, "rival"], norm: EditNorm
) -> Float[np.ndarray, "unit"]:
    """Return the smallest d with towards d >= gap, NaN where there is none."""
    nothing = np.full(towards.shape[1], np.nan)
    if norm == "l2":
        step = least_distance(towards, gap)
        return nothing if step is None else step
    # minimise t subject to -t <= d <= t, as a linear program in (d, t)
    n = towards.shape[1]
    cost = np.append(np.zeros(n), 1.0)
    box = np.vstack([np.column_stack([sign * np.eye(n), -np.ones(n)]) for sign in (1.0, -1.0)])
    limits = np.vstack([np.column_stack([-towards, np.zeros(len(towards))]), box])
    solved = linprog(cost, limits, np.append(-gap, np.zeros(2 * n)), bounds=[(None, None)] * n + [(0, None)])
    return np.asarray(solved.x[:n]) if solved.status == 0 else nothing


# ---------------------------------------------------------------------------------------- the smallest for each example


@dataclass(frozen=True, eq=False)
class SmallestEdits:
    """The smallest edits of a layer's readout state that were found, one an example.

    `needed[i]` is the norm of `edits[i]` relative to `scale`, the mean norm of the states (infinite: none was found;
    0: predicted as the target already). `reached[i]` is the class predicted then. `random[d, i]` is what the d-th
    random direction in the same neurons needs. `exact` says that the head is linear there: none is smaller, and the
    edit ends where the two classes tie. `target` is empty where any other prediction will do.
    """

    neurons: Neurons
    norm: EditNorm
    target: str
    labels: tuple[str, ...]
    predicted: Int[np.ndarray, "example"]
    needed: Float[np.ndarray, "example"]
    edits: Float[np.ndarray, "example unit"]
    reached: Int[np.ndarray, "example"]
    random: Float[np.ndarray, "draw example"]
    scale: float
    exact: bool

    def redirections(self, targets: Int[np.ndarray, "example"]) -> list[Redirection]:
        """Return the budgets by source class, and over all, attack and control; `targets` are the examples' classes.

        As elsewhere, a source's examples are those that are classified rightly, and all are those that are not yet
        predicted as the target. Each example has an edit of its own, so that there is no collateral.
        """
        aimed = self.labels.index(self.target) if self.target else None
        found = []
        for source in (None, *range(len(self.labels))):
            if source is not None and source == aimed:
                continue
            right = self.predicted == targets
            among = right if aimed is None else (targets != aimed) & (self.predicted != aimed)
            examples = np.flatnonzero(among if source is None else right & (targets == source))
            for arm, needed in (("attack", self.needed[None]), ("random", self.random)):
                if len(examples) == 0 or len(needed) == 0:
                    continue
                found.append(
                    _redirection(
                        "activation-edit" if self.norm == "l2" else "activation-edit-linf",
                        _location(self.neurons),
                        GLOBAL if source is None else self.labels[source],
                        self.target,
                        arm,
                        needed[:, examples],
                        examples,
                    )
                )
        return found


def smallest_edits(
    classifier: Classifier,
    examples: Examples,
    *,
    layer: int,
    component: Component = "residual",
    target: str = GLOBAL,
    norm: EditNorm = "l2",
    units: Sequence[int] | None = None,
    draws: int = RANDOM_DRAWS,
    steps: int = STEPS,
    seed: int = 0,
    progress: Progress = silent,
) -> SmallestEdits:
    """Return the smallest edit of each example's readout state that changes its prediction, or gives the target.

    With `units` only these neurons are edited. Beside each stand so many random directions in the same neurons, and
    what they need: Gaussian ones, or random signs where the largest entry is measured.

    Raises:
        SettingsError: a layer, class, norm or unit that there is not.
        ModelError: the logits have no gradient.
    """
    sites = classifier.sites(component)
    if not 0 <= layer < len(sites):
        raise SettingsError(
            f"Layer {layer} was asked for; the classifier has the layers 0 to {len(sites) - 1} of {component!r}."
        )
    if target != GLOBAL and target not in classifier.labels:
        raise SettingsError(f"There is no class {target!r}; the classes are {', '.join(classifier.labels)}.")
    if norm not in ("l2", "linf"):
        raise SettingsError(f"The norm is {norm!r}; 'l2' or 'linf' was expected.")
    width, n = sites[layer].width, len(examples)
    chosen = np.arange(width) if units is None else np.array(units, dtype=np.int64)
    if len(chosen) == 0 or len(np.unique(chosen)) < len(chosen) or not 0 <= chosen.min() <= chosen.max() < width:
        raise SettingsError(
            f"The units are {chosen.tolist()}; one or more distinct ones from 0 to {width - 1} were expected."
        )
    aim = None if target == GLOBAL else classifier.labels.index(target)
    search = _Search(classifier, component, layer, chosen, aim, norm, steps, draws, seed)
    predicted, reached, lengths = np.empty(n, dtype=np.int64), np.empty(n, dtype=np.int64), np.empty(n)
    needed, edits, random = np.empty(n), np.zeros((n, width)), np.empty((draws, n))
    done, exact = 0, True
    with torch.inference_mode(False), classifier.studied():
        for batch in classifier.batches(examples.inputs):
            for part, found, _ in in_halves(batch, search):
                at = part.index
                predicted[at], reached[at], lengths[at], needed[at] = (
                    found.predicted,
                    found.reached,
                    found.lengths,
                    found.needed,
                )
                edits[at], random[:, at], exact = found.edits, found.random, found.exact
                done += len(at)
                progress(done, n)
    scale = max(float(lengths.mean()), np.finfo(float).tiny) if n else 1.0
    return SmallestEdits(
        Neurons(layer, tuple(chosen.tolist()), component),
        norm,
        target,
        classifier.labels,
        predicted,
        needed / scale,
        edits,
        reached,
        random / scale,
        scale,
        exact,
    )


def ranked_edits(
    classifier: Classifier,
    examples: Examples,
    targets: Int[np.ndarray, "example"],
    order: Int[np.ndarray, "unit"],
    sizes: Sequence[int],
    *,
    layer: int,
    component: Component = "residual",
    target: str = GLOBAL,
    norm: EditNorm = "l2",
    draws: int = RANDOM_DRAWS,
    steps: int = STEPS,
    seed: int = 0,
) -> list[Redirection]:
    """Return what the smallest edits of the first k neurons of an order need, beside those of k random neurons.

    Both are searched for alike: the control says what the ranking adds. `targets` are the classes of the examples.
    """
    found = []
    for k in sizes:
        rngs = [np.random.default_rng((seed, draw)) for draw in range(draws)]
        sets = [order[:k], *(rng.permutation(len(order))[:k] for rng in rngs)]
        edits = [
            smallest_edits(
                classifier,
                examples,
                layer=layer,
                component=component,
                target=target,
                norm=norm,
                units=one.tolist(),
                draws=0,
                steps=steps,
            )
            for one in sets
        ]
        for of_source in zip(*(one.redirections(targets) for one in edits), strict=True):
            top, drawn = of_source[0], of_source[1:]
            names = {"attack": f"{top.attack}-ranked", "location": f"{component} {layer}, {k} of {len(order)} neurons"}
            rest = (top.source, top.target)
            for arm, needed in (("attack", top.needed), ("random", np.concatenate([one.needed for one in drawn]))):
                found.append(_redirection(names["attack"], names["location"], *rest, arm, needed, top.examples))
    return found


@dataclass(frozen=True, eq=False)
class _Found:
    """What was found for the examples of a batch; norms are absolute."""

    predicted: Int[np.ndarray, "example"]
    reached: Int[np.ndarray, "example"]
    lengths: Float[np.ndarray, "example"]
    needed: Float[np.ndarray, "example"]
    edits: Float[np.ndarray, "example unit"]
    random: Float[np.ndarray, "draw example"]
    exact: bool


@dataclass(eq=False)
class _Search:
    """Finds the smallest edits of a batch; `resumes` says, once tried, whether what lies below need not run again."""

    classifier: Classifier
    component: Component
    layer: int
    units: Int[np.ndarray, "chosen"]
    target: int | None
    norm: EditNorm
    steps: int
    draws: int
    seed: int
    resumes: dict[int, bool] = field(default_factory=dict)

    def __call__(self, batch: Batch) -> _Found:
        state = _State(self.classifier, batch, self.component, self.layer, self.resumes)
        clean = state.clean_logits
        predicted = clean.argmax(axis=1)
        is_there = np.zeros(len(clean), dtype=bool) if self.target is None else predicted == self.target
        if state.is_linear:
            edits = self._masked(affine_edits(clean, state.slopes[:, :, self.units], predicted, self.target, self.norm))
        else:
            edits = self._searched(state, predicted)
        edits[is_there] = 0.0
        needed = self._length(edits)
        edits = np.where(np.isfinite(edits), edits, 0.0)
        reached = self._reached(state, edits, predicted, np.isfinite(needed))
        random = self._random(state, predicted, needed, batch)
        return _Found(predicted, reached, self._length(state.values), needed, edits, random, state.is_linear)

    def _reached(
        self,
        state: "_State",
        edits: Float[np.ndarray, "example unit"],
        predicted: Int[np.ndarray, "example"],
        is_found: Bool[np.ndarray, "example"],
    ) -> Int[np.ndarray, "example"]:
        """Return the class predicted at the edits; where they end on an exact tie, the one that the tie is with."""
        logits = state.logits(edits)
        if state.is_linear and self.target is not None:
            return np.asarray(np.where(is_found, self.target, predicted))
        if state.is_linear:
            logits[is_found, predicted[is_found]] = -np.inf
        return np.asarray(logits.argmax(axis=1))

    def _masked(self, edits: Float[np.ndarray, "example chosen"]) -> Float[np.ndarray, "example unit"]:
        """Return edits of the chosen neurons as edits of all; NaN stays in all of them."""
        whole = np.zeros((len(edits), self.classifier.sites(self.component)[self.layer].width))
        whole[:, self.units] = edits
        whole[np.isnan(edits).any(axis=1)] = np.nan
        return whole

    def _length(self, edits: Float[np.ndarray, "example unit"]) -> Float[np.ndarray, "example"]:
        """Return the norms; infinite for what is NaN."""
        length = np.linalg.norm(edits, ord=2 if self.norm == "l2" else np.inf, axis=1)
        return np.where(np.isnan(length), np.inf, length)

    def _is_reached(
        self, logits: Float[np.ndarray, "example label"], predicted: Int[np.ndarray, "example"]
    ) -> Bool[np.ndarray, "example"]:
        now = logits.argmax(axis=1)
        return np.asarray(now != predicted if self.target is None else now == self.target)

    def _searched(self, state: "_State", predicted: Int[np.ndarray, "example"]) -> Float[np.ndarray, "example unit"]:
        """Return the smallest edits found, NaN where there is none."""
        offset = np.zeros_like(state.values)
        best = np.full_like(offset, np.nan)
        logits, slopes = state.linearised(offset)
        for step in range(self.steps):
            at_start = logits - np.einsum("elu,eu->el", slopes, offset)
            aims = self._masked(affine_edits(at_start, slopes[:, :, self.units], predicted, self.target, self.norm))
            offset = np.where(np.isfinite(aims), offset + (aims - offset) / np.sqrt(1 + step), offset)
            logits, slopes = state.linearised(offset)
            better = self._is_reached(logits, predicted) & (self._length(offset) < self._length(best))
            best[better] = offset[better]
        rays = [np.where(np.isfinite(best), best, 0.0), offset]
        finished = [self._finished(state, ray, predicted) for ray in rays]
        shorter = self._length(finished[0]) <= self._length(finished[1])
        return np.where(shorter[:, None], finished[0], finished[1])

    def _finished(
        self, state: "_State", ray: Float[np.ndarray, "example unit"], predicted: Int[np.ndarray, "example"]
    ) -> Float[np.ndarray, "example unit"]:
        """Return the edits where the rays first change the predictions, NaN where they do not."""
        multiple = self._first(state, ray, predicted, STRETCHES, BISECTIONS)
        return np.asarray(np.where(np.isfinite(multiple), multiple, np.nan)[:, None] * ray)

    def _first(
        self,
        state: "_State",
        ray: Float[np.ndarray, "example unit"],
        predicted: Int[np.ndarray, "example"],
        stretches: Sequence[float],
        bisections: int,
    ) -> Float[np.ndarray, "example"]:
        """Return the multiple of each ray at which the prediction changes, infinite where none of them does."""
        low, high = np.zeros(len(ray)), np.full(len(ray), np.inf)
        for multiple in stretches:
            open_ = np.isinf(high)
            if not open_.any():
                break
            reached = self._is_reached(state.logits(ray * multiple), predicted)
            high[open_ & reached] = multiple
            low[open_ & ~reached] = multiple
        for _ in range(bisections):
            middle = np.where(np.isfinite(high), (low + high) / 2, 0.0)
            reached = self._is_reached(state.logits(ray * middle[:, None]), predicted)
            bounded = np.isfinite(high)
            high, low = np.where(bounded & reached, middle, high), np.where(bounded & ~reached, middle, low)
        return np.asarray(high)

    def _random(
        self,
        state: "_State",
        predicted: Int[np.ndarray, "example"],
        needed: Float[np.ndarray, "example"],
        batch: Batch,
    ) -> Float[np.ndarray, "draw example"]:
        """Return what random directions need; a draw depends on the seed and the example's content."""
        found, n_units = np.empty((self.draws, len(predicted))), len(self.units)
        lengths = self._length(state.values)
        for draw in range(self.draws):
            rows = [np.random.default_rng((self.seed, draw, key)).standard_normal(n_units) for key in batch.keys]
            rays = np.stack(rows) if self.norm == "l2" else np.sign(np.stack(rows))
            rays = self._masked(rays / np.maximum(self._length(rays)[:, None], 1e-300))
            if state.is_linear:
                slopes, clean = np.einsum("elu,eu->el", state.slopes, rays), state.clean_logits
                found[draw] = (
                    broken_budget(clean, slopes) if self.target is None else needed_budget(clean, slopes, self.target)
                )
                continue
            start = np.where(np.isfinite(needed) & (needed > 0), needed, lengths)
            found[draw] = start * self._first(
                state, rays * start[:, None], predicted, RANDOM_STRETCHES, RANDOM_BISECTIONS
            )
            found[draw] = np.where(needed == 0, 0.0, found[draw])
        return found


class _State:
    """The readout state of a layer in one batch, as what the logits are a function of."""

    def __init__(
        self, classifier: Classifier, batch: Batch, component: Component, layer: int, resumes: dict[int, bool]
    ) -> None:
        self.classifier, self.component, self.layer, self.resumes = classifier, component, layer, resumes
        self.site = classifier.sites(component)[layer]
        self.clean: CleanPass = clean_pass(classifier, batch, () if component == "residual" else (component,))
        states = self.clean.of(component)[layer]
        read = classifier.readout_state(batch, self.site, states)
        self.values: Float[np.ndarray, "example unit"] = read.cpu().numpy().astype(np.float64)
        self.clean_logits: Float[np.ndarray, "example label"] = self.clean.logits.double().cpu().numpy()
        self.is_linear = self.clean.features is not None and torch.equal(self.clean.features, read)
        if self.is_linear:
            weight = classifier.head_weight().double().cpu().numpy()
            self.slopes: Float[np.ndarray, "example label unit"] = np.broadcast_to(weight, (len(read), *weight.shape))
        elif layer not in resumes:
            resumes[layer] = self._resumed_agrees()

    def logits(self, offset: Float[np.ndarray, "example unit"]) -> Float[np.ndarray, "example label"]:
        """Return the logits with the offset added to the rows that the head reads."""
        if self.is_linear:
            return np.asarray(self.clean_logits + np.einsum("elu,eu->el", self.slopes, offset))
        with torch.no_grad():
            return np.asarray(self._forward(self._tensor(offset)).double().cpu().numpy())

    def linearised(
        self, offset: Float[np.ndarray, "example unit"]
    ) -> tuple[Float[np.ndarray, "example label"], Float[np.ndarray, "example label unit"]]:
        """Return the logits at the offset and the slope of each with the offset."""
        with torch.enable_grad():
            given = self._tensor(offset).requires_grad_()
            logits = self._forward(given)
            if not logits.requires_grad:
                raise ModelError(
                    "The logits have no gradient: the model computes them where gradients are turned off, or in whole "
                    "numbers. Attack its logits or its head instead."
                )
            # Examples of a batch do not see each other, so that the gradient of a sum over them is that of each.
            columns = logits.sum(dim=0)
            slopes = [
                torch.autograd.grad(column, given, retain_graph=True, materialize_grads=True)[0] for column in columns
            ]
        return logits.detach().double().cpu().numpy(), torch.stack(slopes, dim=1).double().cpu().numpy()

    def _tensor(self, offset: Float[np.ndarray, "example unit"]) -> Float[Tensor, "example unit"]:
        return torch.from_numpy(offset).to(self.classifier.device, torch.float32)

    def _forward(self, offset: Float[Tensor, "example unit"]) -> Float[Tensor, "example label"]:
        classifier, clean = self.classifier, self.clean
        with ExitStack() as stack:
            if self.resumes.get(self.layer, False):
                below = resume_layer(classifier, self.component, self.layer)
                # Copies: what the clean pass kept was made in inference mode, and can be part of no gradient.
                replay = clean.replay.take(torch.arange(len(offset), device=classifier.device))
                states = None if below < 0 else clean.states[below].clone()
                block = classifier.sites()[max(below, 0)]
                stack.enter_context(passed_over(classifier.module, replay, below, block, states))
            edit = partial(_moved, classifier, clean.batch, self.site, offset)
            stack.enter_context(edited_sites(classifier.module, [(self.site, edit)]))
            stack.enter_context(classifier.running(clean.batch))
            return forward_logits(classifier.module, clean.batch.inputs).float()

    def _resumed_agrees(self) -> bool:
        """Return whether logits and slopes are those of the whole model when what lies below is given again."""
        offset = 0.1 * np.roll(self.values, 1, axis=1)
        self.resumes[self.layer] = False
        plain = self.linearised(offset)
        self.resumes[self.layer] = True
        try:
            found = self.linearised(offset)
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:  # the model's own code may fail in any way on what is given again
            reason = f"{type(error).__name__}: {error}"
        else:
            gaps = [float(np.abs(a - b).max() / (np.abs(b).max() + 1e-30)) for a, b in zip(found, plain, strict=True)]
            if max(gaps) <= RESUME_TOLERANCE:  # false for NaN, which agrees with nothing
                return True
            reason = f"logits differ by {gaps[0]:.1e} of the largest, slopes by {gaps[1]:.1e}"
        log.warning(
            "%s of layer %d: the whole model is run for each edit, which is slow (%s).",
            self.component,
            self.layer,
            reason,
        )
        return False


def _moved(
    classifier: Classifier,
    batch: Batch,
    site: Site,
    offset: Float[Tensor, "example unit"],
    states: Float[Tensor, "example token unit"],
) -> Float[Tensor, "example token unit"]:
    """Return the states with the offset added to the rows that the head reads."""
    rows = classifier.rows(batch, site, states.shape[1], "readout")
    spread = offset[:, None].to(states.dtype)
    return states + (spread if rows is None else spread * rows[:, :, None].to(states.dtype))


# ------------------------------------------------------------------------------------------------ one direction for all


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
) -> dict[tuple[int | None, int], Float[np.ndarray, "unit"]]:
    """Return for each class the mean of the smallest edits that make training examples of others that class.

    Source: Moosavi-Dezfooli et al. (CVPR 2017), "Universal adversarial perturbations", which adds such edits up one
    after the other; here their mean is taken, which does not depend on the order.
    """
    found: dict[tuple[int | None, int], Float[np.ndarray, "unit"]] = {}
    for target, label in enumerate(classifier.labels):
        edits = smallest_edits(classifier, train, layer=layer, component=component, target=label, draws=0, steps=steps)
        moved = np.isfinite(edits.needed) & (edits.needed > 0)
        if moved.any():
            found[None, target] = edits.edits[moved].mean(axis=0)
    return found


def direction_attacks(
    classifier: Classifier,
    examples: Examples,
    test: Activations,
    directions: Directions,
    *,
    layer: int,
    attack: str,
    component: Component = "residual",
    grid: Sequence[float] = GRID,
    seed: int = 0,
    progress: Progress = silent,
) -> list[Redirection]:
    """Return how far along its direction each example follows, and when others are lost, beside random directions.

    `directions` were found on other examples; `test` is the recording of `examples`. Budgets are relative to the mean
    length of the states. They are exact where the head is linear; elsewhere they are the first of the `grid`, at which
    the states are moved in the live model, so they are at most one of its steps too large.

    Raises:
        SettingsError: examples that are not those of the recording.
    """
    if len(examples) != len(test):
        raise SettingsError(f"{len(examples)} examples and {len(test)} recorded ones were given; pass the same ones.")
    scale = float(np.linalg.norm(np.asarray(test.values[layer], dtype=np.float64), axis=1).mean())
    width, n_found = classifier.sites(component)[layer].width, len(directions)
    random = np.random.default_rng(seed).standard_normal((RANDOM_DRAWS, width))
    vectors = np.concatenate([np.stack(list(directions.values())), random]) if n_found else random
    vectors *= scale / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.finfo(float).tiny)
    moved = _along_vectors(classifier, examples, component, layer, vectors, grid, progress)
    drawn, found = range(n_found, len(vectors)), []
    for v, (source, target) in enumerate(directions):
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
            found.append(_redirection(attack, location, *names, needed, chosen, others, broken))
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
    progress: Progress,
) -> _Moved:
    n, budgets, done = len(examples), np.sort(np.array(grid)), 0
    resumes: dict[int, bool] = {}
    clean = np.empty((n, len(classifier.labels)))
    logits = np.empty((len(vectors), len(budgets), *clean.shape), dtype=np.float32)
    slopes = None
    with torch.inference_mode(False), classifier.studied():
        for batch in classifier.batches(examples.inputs):
            state = _State(classifier, batch, component, layer, resumes)
            clean[batch.index] = state.clean_logits
            if state.is_linear:
                slopes = vectors @ state.slopes[0].T
            else:
                for v, vector in enumerate(vectors):
                    for b, budget in enumerate(budgets):
                        offset = np.broadcast_to(vector * budget, state.values.shape)
                        logits[v, b, batch.index] = state.logits(np.ascontiguousarray(offset))
            done += len(batch.index)
            progress(done, n)
    return _Moved(clean, slopes, budgets, logits)


def _location(neurons: Neurons) -> str:
    return f"{neurons.component} {neurons.layer}"


def _redirection(
    attack: str,
    location: str,
    source: str,
    target: str,
    arm: str,
    needed: Float[np.ndarray, "draw example"],
    examples: Int[np.ndarray, "example"],
    others: Int[np.ndarray, "other"] | None = None,
    broken: Float[np.ndarray, "draw other"] | None = None,
) -> Redirection:
    nobody = np.empty(0, dtype=np.int64)
    return Redirection(
        attack=attack,
        location=location,
        source=source,
        target=target,
        arm=arm,
        unit=UNIT,
        share=float("nan"),
        needed=needed,
        examples=examples,
        others=nobody if others is None else others,
        broken_at=np.empty((len(needed), 0)) if broken is None else broken,
    )
