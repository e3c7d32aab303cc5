"""The smallest edit of each example's readout state that changes its prediction.

An edit d is added to the rows that the head reads, x' = x + d, at one layer. Where the head is one linear map of that
state, z' = z + W d, everything is a closed form. Elsewhere the map is made linear about the present edit, the closed
form is solved for the linear map, and again about what it gives, until the edit is the point of the boundary next to
the state; then the ray to it is searched on real forward passes for the first change. What lies below the layer is not
run again, and neither are examples whose edit has settled.

Sources: Moosavi-Dezfooli et al. (CVPR 2016), "DeepFool", for the affine closed form and its iteration; the iteration
about the present edit, but measured from the start, is that of Hasofer and Lind (1974) and Rackwitz and Fiessler
(1978). An edit that was found is a bound from above; at the linear map it is the smallest.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from synapse.attack.affine import EditNorm, affine_edits
from synapse.attack.base import RANDOM_DRAWS, broken_budget, needed_budget
from synapse.attack.readout import ReadoutMap
from synapse.data.examples import Examples
from synapse.errors import SettingsError
from synapse.model.classifier import Batch, Classifier, in_halves
from synapse.model.resume import Reuse
from synapse.types import GLOBAL, Component, Neurons, Progress, Redirection, silent

STEPS = 16
"""Times the map is made linear, at most."""

SLOWEST, FASTEST = 0.1, 0.7
"""Parts of a step that are made, at least and at most: where the map bends, whole steps jump to and fro. The first is
whole, and all that is needed of a map that is linear."""

SETTLED = 0.02
"""Share of its length by which the next step would move an edit that is left: along the boundary the length changes by
the square of it, and across it the ray is searched."""

PRECISION = 5e-4
"""How near the first change on its ray an edit is, relative to it."""

MOST_TURNS = 12
"""Passes that a ray is searched with, at most."""

STRETCHES = (1.0, 1.01, 1.05, 1.2, 1.5, 2.0, 4.0)
"""Multiples of a found edit that are tried in turn, where the edit itself does not yet change the prediction."""

RANDOM_STRETCHES = (2.0, 8.0, 32.0, 128.0)
"""Multiples of the attack's norm that are tried along random directions."""

RANDOM_PRECISION = 0.04
"""The same along random directions, of which there are many."""

UNIT = "||d||/||x||"


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
                    state_redirection(
                        "activation-edit" if self.norm == "l2" else "activation-edit-linf",
                        f"{self.neurons.component} {self.neurons.layer}",
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
    reuse: dict[int, Reuse] | None = None,
    progress: Progress = silent,
) -> SmallestEdits:
    """Return the smallest edit of each example's readout state that changes its prediction, or gives the target.

    With `units` only these neurons are edited. Beside each stand so many random directions in the same neurons, and
    what they need: Gaussian ones, or random signs where the largest entry is measured. `reuse` says by layer what
    passes take over; what is found out of it is added, so that calls that share it try it once.

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
    search = _Search(
        classifier, component, layer, chosen, aim, norm, steps, draws, seed, {} if reuse is None else reuse
    )
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
    reuse: dict[int, Reuse] | None = None,
) -> list[Redirection]:
    """Return what the smallest edits of the first k neurons of an order need, beside those of k random neurons.

    Both are searched for alike: the control says what the ranking adds. `targets` are the classes of the examples;
    `reuse` is as in `smallest_edits`.
    """
    found, shared = [], {} if reuse is None else reuse
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
                reuse=shared,
            )
            for one in sets
        ]
        for of_source in zip(*(one.redirections(targets) for one in edits), strict=True):
            top, drawn = of_source[0], of_source[1:]
            names = {"attack": f"{top.attack}-ranked", "location": f"{component} {layer}, {k} of {len(order)} neurons"}
            rest = (top.source, top.target)
            for arm, needed in (("attack", top.needed), ("random", np.concatenate([one.needed for one in drawn]))):
                found.append(state_redirection(names["attack"], names["location"], *rest, arm, needed, top.examples))
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
    """Finds the smallest edits of a batch; the fields are what `smallest_edits` is given."""

    classifier: Classifier
    component: Component
    layer: int
    units: Int[np.ndarray, "chosen"]
    target: int | None
    norm: EditNorm
    steps: int
    draws: int
    seed: int
    reuse: dict[int, Reuse]

    def __call__(self, batch: Batch) -> _Found:
        state = ReadoutMap(self.classifier, batch, self.component, self.layer, self.reuse)
        predicted = state.clean_logits.argmax(axis=1)
        edits = self._affine(state, predicted) if state.is_linear else self._searched(state, predicted)
        if self.target is not None:
            edits[predicted == self.target] = 0.0
        needed = self._length(edits)
        edits = np.where(np.isfinite(edits), edits, 0.0)
        reached = self._reached(state, edits, predicted, np.isfinite(needed))
        random = self._random(state, predicted, needed, batch)
        return _Found(predicted, reached, self._length(state.values), needed, edits, random, state.is_linear)

    def _affine(self, state: ReadoutMap, predicted: Int[np.ndarray, "example"]) -> Float[np.ndarray, "example unit"]:
        """Return the smallest edits where the head is linear, NaN where there is none."""
        slopes = np.broadcast_to(state.weight[:, self.units], (len(predicted), len(state.weight), len(self.units)))
        return self._masked(affine_edits(state.clean_logits, slopes, predicted, self.target, self.norm))

    def _reached(
        self,
        state: ReadoutMap,
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

    def _masked(self, edits: Float[np.ndarray, "run chosen"]) -> Float[np.ndarray, "run unit"]:
        """Return edits of the chosen neurons as edits of all; NaN stays in all of them."""
        whole = np.zeros((len(edits), self.classifier.sites(self.component)[self.layer].width))
        whole[:, self.units] = edits
        whole[np.isnan(edits).any(axis=1)] = np.nan
        return whole

    def _length(self, edits: Float[np.ndarray, "run unit"]) -> Float[np.ndarray, "run"]:
        """Return the norms; infinite for what is NaN."""
        length = np.linalg.norm(edits, ord=2 if self.norm == "l2" else np.inf, axis=1)
        return np.where(np.isnan(length), np.inf, length)

    def _searched(self, state: ReadoutMap, predicted: Int[np.ndarray, "example"]) -> Float[np.ndarray, "example unit"]:
        """Return the smallest edits found, NaN where there is none."""
        reference = self._reference(predicted)
        planes = _Planes(state, reference)
        offset, best = np.zeros_like(state.values), np.full_like(state.values, np.nan)
        pace, last = np.ones(len(offset)), np.zeros_like(offset)
        nearest: Int[np.ndarray, "some"] | None = None
        moving = np.flatnonzero(~self._lead(state.clean_logits, reference)[1])
        for step in range(self.steps + 1):
            at = offset[moving]
            logits = planes.touched(moving, at, nearest)
            shorter = self._lead(logits, reference[moving])[1] & (self._length(at) < self._length(best[moving]))
            best[moving[shorter]] = at[shorter]
            aims = self._masked(planes.edits(moving, self.units, self.target, self.norm))
            move = np.where(np.isfinite(aims), aims - at, 0.0)
            nearest = planes.largest(moving, at + move)
            if step > 0:
                pace[moving] = _pace(pace[moving], move, last[moving])
            last[moving] = move
            is_settled = np.linalg.norm(move, axis=1) <= SETTLED * np.linalg.norm(at, axis=1)
            moving, move, nearest = moving[~is_settled], move[~is_settled], nearest[~is_settled]
            if step == self.steps or len(moving) == 0:
                break
            offset[moving] += pace[moving][:, None] * move
        return self._shortest(state, reference, best, offset)

    def _reference(self, predicted: Int[np.ndarray, "example"]) -> Int[np.ndarray, "example"]:
        """Return the class that is to lose its lead, or to win it."""
        return predicted if self.target is None else np.full_like(predicted, self.target)

    def _lead(
        self, logits: Float[np.ndarray, "run label"], reference: Int[np.ndarray, "run"]
    ) -> tuple[Float[np.ndarray, "run"], Bool[np.ndarray, "run"]]:
        """Return how far runs are from the wanted prediction, and whether they are there; of a tie the lower class."""
        run, rivals = np.arange(len(logits)), logits.copy()
        rivals[run, reference] = -np.inf
        lead = logits[run, reference] - rivals.max(axis=1)
        wins = logits.argmax(axis=1) == reference
        return (lead, ~wins) if self.target is None else (-lead, wins)

    def _shortest(
        self,
        state: ReadoutMap,
        reference: Int[np.ndarray, "example"],
        best: Float[np.ndarray, "example unit"],
        last: Float[np.ndarray, "example unit"],
    ) -> Float[np.ndarray, "example unit"]:
        """Return the edits that end where the rays to the best and to the last first change the prediction."""
        n = len(best)
        may_be = (self._length(last) < self._length(best))[:, None]  # it ends where it is, or beyond
        rays = np.concatenate([np.where(np.isfinite(best), best, 0.0), np.where(may_be, last, 0.0)])
        example = np.tile(np.arange(n), 2)
        multiples = self._first(state, rays, example, reference[example], STRETCHES, PRECISION)
        edits = np.where(np.isfinite(multiples), multiples, np.nan)[:, None] * rays
        shorter = self._length(edits[:n]) <= self._length(edits[n:])
        return np.asarray(np.where(shorter[:, None], edits[:n], edits[n:]))

    def _first(
        self,
        state: ReadoutMap,
        rays: Float[np.ndarray, "run unit"],
        example: Int[np.ndarray, "run"],
        reference: Int[np.ndarray, "run"],
        stretches: Sequence[float],
        precision: float,
    ) -> Float[np.ndarray, "run"]:
        """Return the multiple of each ray at which the prediction changes, infinite where none of them does."""
        between = _Between(self._lead(state.clean_logits[example], reference)[0])
        for multiple in stretches:
            run = np.flatnonzero(np.isinf(between.high) & rays.any(axis=1))
            if len(run) == 0:
                break
            logits = state.logits(rays[run] * multiple, example[run])
            between.seen(run, np.full(len(run), multiple), *self._lead(logits, reference[run]))
        for turn in range(MOST_TURNS):
            run = between.wide(precision)
            if len(run) == 0:
                break
            middle = between.guess(run, turn, precision)
            logits = state.logits(rays[run] * middle[:, None], example[run])
            between.seen(run, middle, *self._lead(logits, reference[run]))
        return between.high

    def _random(
        self,
        state: ReadoutMap,
        predicted: Int[np.ndarray, "example"],
        needed: Float[np.ndarray, "example"],
        batch: Batch,
    ) -> Float[np.ndarray, "draw example"]:
        """Return what random directions need; a draw depends on the seed and the example's content."""
        n, n_units, shape = len(predicted), len(self.units), (self.draws, len(predicted))
        draws = [
            np.random.default_rng((self.seed, draw, key)).standard_normal(n_units)
            for draw in range(self.draws)
            for key in batch.keys
        ]
        rays = np.reshape(draws, (self.draws * n, n_units))
        rays = self._masked(rays if self.norm == "l2" else np.sign(rays))
        rays /= np.maximum(self._length(rays)[:, None], 1e-300)
        example = np.tile(np.arange(n), self.draws)
        if state.is_linear:
            clean, slopes = state.clean_logits[example], rays @ state.weight.T
            if self.target is None:
                return broken_budget(clean, slopes).reshape(shape)
            return needed_budget(clean, slopes, self.target).reshape(shape)
        start = np.where(np.isfinite(needed) & (needed > 0), needed, self._length(state.values))[example]
        is_there = needed[example] == 0
        rays *= np.where(is_there, 0.0, start)[:, None]
        reference = self._reference(predicted)[example]
        multiples = self._first(state, rays, example, reference, RANDOM_STRETCHES, RANDOM_PRECISION)
        return np.where(is_there, 0.0, start * multiples).reshape(shape)


class _Planes:
    """The lead of every class over a reference, in each example, taken for a plane: level + slopes . offset.

    A step is made for one rival, and only its plane is made again; those of the others stay as they were made last.
    """

    def __init__(self, state: ReadoutMap, reference: Int[np.ndarray, "example"]) -> None:
        n, n_labels = state.clean_logits.shape
        self.state, self.reference = state, reference
        self.level, self.slopes = np.zeros((n, n_labels)), np.zeros((n, n_labels, state.values.shape[1]))

    def touched(
        self,
        example: Int[np.ndarray, "some"],
        offsets: Float[np.ndarray, "some unit"],
        rival: Int[np.ndarray, "some"] | None,
    ) -> Float[np.ndarray, "some label"]:
        """Make the plane of one rival each (of all: None) touch the map at the offsets, and return the logits there."""
        own = self.reference[example]
        rivals = _all_but(own, self.level.shape[1]) if rival is None else rival[:, None]
        logits, slopes = self.state.linearised(offsets, example, own, rivals)
        leads = np.take_along_axis(logits, rivals, axis=1) - np.take_along_axis(logits, own[:, None], axis=1)
        self.slopes[example[:, None], rivals] = slopes
        self.level[example[:, None], rivals] = leads - np.einsum("sru,su->sr", slopes, offsets)
        return logits

    def largest(
        self, example: Int[np.ndarray, "some"], offsets: Float[np.ndarray, "some unit"]
    ) -> Int[np.ndarray, "some"]:
        """Return which rival leads most at the offsets, as the planes have it: that which a smallest edit is for."""
        leads = self.level[example] + np.einsum("slu,su->sl", self.slopes[example], offsets)
        np.put_along_axis(leads, self.reference[example][:, None], -np.inf, axis=1)
        return np.asarray(leads.argmax(axis=1))

    def edits(
        self, example: Int[np.ndarray, "some"], units: Int[np.ndarray, "chosen"], target: int | None, norm: EditNorm
    ) -> Float[np.ndarray, "some chosen"]:
        """Return the smallest edits that make another class lead, or the target, as the planes have it."""
        slopes = self.slopes[example][:, :, units]
        return affine_edits(self.level[example], slopes, self.reference[example], target, norm)


class _Between:
    """Where each run first changes: not yet at `low`, at `high` it has; and how far it was from it at both."""

    def __init__(self, lead: Float[np.ndarray, "run"]) -> None:
        self.low, self.high = np.zeros(len(lead)), np.full(len(lead), np.inf)
        self.lead_low, self.lead_high = lead.copy(), np.full(len(lead), np.nan)
        self.is_above = np.zeros(len(lead), dtype=bool)  # where it was seen last

    def seen(
        self,
        run: Int[np.ndarray, "some"],
        multiple: Float[np.ndarray, "some"],
        lead: Float[np.ndarray, "some"],
        is_reached: Bool[np.ndarray, "some"],
    ) -> None:
        """Take in what some of the runs did at a multiple between the two."""
        above, below = run[is_reached], run[~is_reached]
        self.is_above[run] = is_reached
        self.high[above], self.lead_high[above] = multiple[is_reached], lead[is_reached]
        self.low[below], self.lead_low[below] = multiple[~is_reached], lead[~is_reached]

    def wide(self, precision: float) -> Int[np.ndarray, "some"]:
        """Return the runs whose first change is not known to this share of it."""
        return np.flatnonzero(np.isfinite(self.high) & (self.high - self.low > precision * self.high))

    def guess(self, run: Int[np.ndarray, "some"], turn: int, precision: float) -> Float[np.ndarray, "some"]:
        """Return where to look next: just across where the lead would be lost if it fell evenly, seen from the last.

        So both ends come near; every third time it is the middle, which bounds the turns.
        """
        low, high, start, end = (each[run] for each in (self.low, self.high, self.lead_low, self.lead_high))
        across = np.where(self.is_above[run], -precision / 3, precision / 3) * high
        with np.errstate(divide="ignore", invalid="ignore"):
            crossing = low + (high - low) * start / (start - end) + across
        is_within = (low < crossing) & (crossing < high) & (turn % 3 != 2)  # false for NaN too
        return np.asarray(np.where(is_within, crossing, (low + high) / 2))


def _all_but(label: Int[np.ndarray, "some"], n_labels: int) -> Int[np.ndarray, "some rival"]:
    return (label[:, None] + np.arange(1, n_labels)) % n_labels


def _pace(
    pace: Float[np.ndarray, "some"], move: Float[np.ndarray, "some unit"], last: Float[np.ndarray, "some unit"]
) -> Float[np.ndarray, "some"]:
    """Return which part of the move is to be made: less where the moves go to and fro.

    Source: Barzilai and Borwein (1988), "Two-point step size gradient methods", equation 5, with moves for gradients.
    """
    size = (last * last).sum(axis=1)
    turned = np.divide((move * last).sum(axis=1), size, out=np.zeros_like(size), where=size > 0)
    return np.asarray(np.clip(pace / np.maximum(1 - turned, 1e-3), SLOWEST, FASTEST))


def state_redirection(
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
    """Return what edits of a readout state need, and at which budgets others are lost; the rest as in `Redirection`."""
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
