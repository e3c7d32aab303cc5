"""Rankings by what is lost when a single neuron is taken away: in the live model, and in the probe."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from synapse.errors import ModelError, SettingsError, near
from synapse.model.classifier import Batch, Classifier
from synapse.model.hooks import edited_sites
from synapse.model.resume import CleanPass, Runs, clean_pass, run_logits, runs_in_one_row
from synapse.probe.probe import Probe, probe_targets
from synapse.ranking.base import Evidence, Need, RankingMethod, Scores
from synapse.ranking.live import class_means, mean_states
from synapse.types import Activations, Component

log = logging.getLogger(__name__)

Replacement = Literal["zero", "mean", "resample"]
"""What stands in for a neuron's value: 0, its mean over the recorded examples, or its value in one of them."""

Way = Literal["linear", "rows", "prefix", "none", "plain"]
"""How the logits without a neuron are had: `linear`, through the final linear map alone; `rows`, `prefix` and `none`
as in `synapse.model.resume.Reuse`, many neurons in a pass; `plain`, a pass of the whole model for each neuron."""
WAYS: tuple[Way, ...] = get_args(Way)

TOLERANCE = 1e-4
"""Largest logit difference from the plain hooked forward at which a shorter way is trusted; in half precision it is
what that rounds off, 8 units of its last place."""

PROOF_UNITS = 3
"""Neurons of a layer on which its way is tried, those that the replacement changes most, with all of a batch."""

ROWS = 1024
"""Rows that a pass may have at least: with fewer, matrix products do not reach their full speed."""

MARGINS = 4_000_000
"""Logits of a probe that are held at once."""


# ---------------------------------------------------------------------------------------------------- in the live model


@dataclass(frozen=True)
class CausalEffect(RankingMethod):
    """What the margin loses when the neuron alone is replaced at the readout row: m(x) - m(x | do(h_j = v)).

    m is the margin of the example's own class, z_y - max_{c != y} z_c. A class's score is the mean over its examples,
    the global one that over all; they are in units of logits and signed: where removal helps they are negative, and
    such neurons come last. Every neuron of every layer is run, exactly: nothing is approximated.

    v is 0 (`zero`), the neuron's mean over the recorded examples (`mean`), or its value in one of these (`resample`):
    which one depends on the seed and the example's content alone. Where the head reads several rows, all of them are
    replaced.

    That is a run for each neuron and example, so that `examples` of the recorded ones are drawn with the seed, in the
    classes' own shares (None: all are run). Where `layers` are given, from the end where negative, only these are run,
    and the others score 0 everywhere.

    Source: Vig et al. (NeurIPS 2020) for the effect of single neurons; Chan et al. (2022) for resampling.
    """

    needs: ClassVar[tuple[Need, ...]] = ("classifier",)
    value: Replacement = "zero"
    layers: tuple[int, ...] | None = None
    examples: int | None = 64
    seed: int = 0

    @property
    def name(self) -> str:
        """The method's name in tables."""
        return f"causal-{self.value}"

    def scores(self, evidence: Evidence) -> Scores:
        """Return the mean losses of margin.

        Raises:
            SettingsError: a parameter is out of range, or the classifier is not the one that was recorded.
            ModelError: some logit is not finite.
            Exception: whatever the model's own code raises.
        """
        activations = evidence.activations
        if self.value not in get_args(Replacement):
            known = get_args(Replacement)
            raise SettingsError(
                f"The value is {self.value!r}; one of {', '.join(known)} was expected.{near(self.value, known)}"
            )
        classifier, _ = evidence.model
        stand_ins = _StandIns(self.value, activations, self.seed)
        effects = _Effects(classifier, activations.component, self._layers(activations.n_layers), stand_ins)
        means = class_means(evidence, effects, examples=self.examples, seed=self.seed)
        return Scores(means, means)

    def _layers(self, n_layers: int) -> tuple[int, ...]:
        """Return the layers that are run, counted from the first."""
        asked = range(n_layers) if self.layers is None else self.layers
        for layer in asked:
            if not -n_layers <= layer < n_layers:
                raise SettingsError(
                    f"Layer {layer} was asked for; the activations have the layers 0 to {n_layers - 1}."
                )
        return tuple(sorted({layer % n_layers for layer in asked}))


@dataclass(frozen=True, eq=False)
class _StandIns:
    """What replaces the values of a layer's neurons."""

    value: Replacement
    activations: Activations
    seed: int

    def of(self, layer: int, keys: Sequence[int]) -> Float[np.ndarray, "example unit"]:
        """Return the replacements in the examples of these content keys."""
        values = self.activations.values[layer]
        if self.value == "resample":
            donors = [int(np.random.default_rng((self.seed, key)).integers(len(values))) for key in keys]
            return np.asarray(values[donors])
        base = mean_states(self.activations)[layer] if self.value == "mean" else np.zeros(values.shape[1])
        return np.tile(base.astype(np.float32), (len(keys), 1))


@dataclass(eq=False)
class _Effects:
    """Gives what the margin of each example loses without each neuron.

    `ways` says how a layer's runs are made, once that was proved; `rows` is how many rows a pass may have.
    """

    classifier: Classifier
    component: Component
    layers: tuple[int, ...]
    stand_ins: _StandIns
    ways: dict[int, Way] = field(default_factory=dict)

    def __call__(self, batch: Batch) -> Float[Tensor, "layer example unit"]:
        classifier, component = self.classifier, self.component
        others = () if component == "residual" else (component,)
        with torch.inference_mode():
            clean = clean_pass(classifier, batch, others, reuse=component)
            assert batch.labels is not None
            margin = margins(clean.logits.float()[None], batch.labels)
            sites = classifier.sites(component)
            found = torch.zeros(len(sites), len(batch.index), sites[0].width, device=classifier.device)
            for layer in self.layers:
                values = torch.from_numpy(self.stand_ins.of(layer, batch.keys)).to(classifier.device)
                without = _Without(classifier, clean, component, layer, values)
                for units, logits in self._logits(without):
                    found[layer, :, units] = (margin - margins(logits, batch.labels)).T
        return found

    def _logits(self, without: "_Without") -> Iterator[tuple[Int[Tensor, "unit"], Float[Tensor, "unit example label"]]]:
        """Yield the logits without each unit of a layer, many units at a time."""
        layer, start = without.layer, 0
        if layer not in self.ways:
            self.ways[layer] = _proved_way(without, WAYS)
        everything = torch.arange(without.values.shape[1], device=without.values.device)
        while start < len(everything):
            units = everything[start : start + without.most_units(self.ways[layer])]
            try:
                logits = without.logits(units, self.ways[layer])
            except (torch.OutOfMemoryError, MemoryError):
                raise
            except Exception as error:  # on a batch that differs from the one of the proof
                if self.ways[layer] == "plain":
                    raise
                lower = WAYS[WAYS.index(self.ways[layer]) + 1 :]
                self.ways[layer] = _proved_way(without, lower, f"{self.ways[layer]}: {_named(error)}")
                continue
            start += len(units)
            yield units, logits


def _proved_way(without: "_Without", ways: Sequence[Way], failed: str = "") -> Way:
    """Return the shortest of the ways whose logits are those of the plain hooked forward.

    `failed` says what went wrong before, with what is not among the ways.
    """
    units, reasons = without.most_changed(PROOF_UNITS), [failed] if failed else []
    expected = without.logits(units, "plain")
    eps = torch.finfo(without.clean.states[0].dtype).eps
    tolerance = max(TOLERANCE, 8 * eps * (1 + float(expected.abs().max())))
    chosen: Way = "plain"
    for way in ways:
        if not without.can_go(way):
            continue
        try:
            gap = float((without.logits(units, way) - expected).abs().max())
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:  # the model's own code may fail in any way on single rows
            reasons.append(f"{way}: {_named(error)}")
            continue
        if gap <= tolerance:
            chosen = way
            break
        reasons.append(f"{way}: logits differ by {gap:.1e}, of which {tolerance:.0e} are trusted")
    if reasons:
        log.warning(
            "%s of layer %d goes the way %r (%s).", without.component, without.layer, chosen, "; ".join(reasons)
        )
    return chosen


@dataclass(frozen=True, eq=False)
class _Without:
    """Examples of a clean pass without single neurons of a layer: `values` are what stands in for these."""

    classifier: Classifier
    clean: CleanPass
    component: Component
    layer: int
    values: Float[Tensor, "example unit"]

    def can_go(self, way: Way) -> bool:
        """Return whether there is such a way at all."""
        if way == "linear":
            return self._final is not None
        return way != "rows" or self._is_in_one_row or self.clean.knows_rows

    def most_units(self, way: Way) -> int:
        """Return how many neurons one call may be about."""
        if way in ("linear", "plain"):
            return int(self.values.shape[1])
        alone = way == "rows" and self._is_in_one_row
        rows = len(self.values) * (1 if alone else self.clean.n_tokens)
        return max(1, max(ROWS, self.classifier.max_tokens) // rows)

    def most_changed(self, n: int) -> Int[Tensor, "unit"]:
        """Return the neurons that the replacement changes most."""
        change = (self.states - self.values).abs().mean(dim=0)
        return change.topk(min(n, len(change))).indices

    def logits(self, units: Int[Tensor, "unit"], way: Way) -> Float[Tensor, "unit example label"]:
        """Return the logits of every example without each of the neurons."""
        if way == "linear":
            found = self._by_final_map(units)
        elif way == "plain":
            found = torch.stack([self._plain(unit) for unit in units])
        else:
            edit = _Replaced(self, units)
            runs = Runs(self.component, self.layer, {self.layer: edit.edited}, edit.example, in_readout_row=True)
            found = run_logits(self.classifier, self.clean, runs, way).float()
            found = found.reshape(len(units), len(self.values), -1)
        if not bool(torch.isfinite(found).all()):
            raise ModelError(
                f"Without a neuron of {self.component} of layer {self.layer} some logits are not finite (NaN or "
                "infinity); use float32, or bf16 in place of fp16."
            )
        return found

    @cached_property
    def states(self) -> Float[Tensor, "example unit"]:
        """The clean states at the readout row."""
        site = self.classifier.sites(self.component)[self.layer]
        return self.classifier.readout_state(self.clean.batch, site, self.clean.of(self.component)[self.layer])

    def _plain(self, unit: Int[Tensor, ""]) -> Float[Tensor, "example label"]:
        """Return the logits without one neuron, by the whole model and its live hooks."""
        site, edit = self.classifier.sites(self.component)[self.layer], _Replaced(self, unit[None])
        with edited_sites(self.classifier.module, [(site, edit.edited)]):
            return self.classifier.forward(self.clean.batch).float()

    def _by_final_map(self, units: Int[Tensor, "unit"]) -> Float[Tensor, "unit example label"]:
        """Return z - W_j (x_j - v_j): an update of rank one for each neuron."""
        assert self._final is not None
        change = (self.values - self.states)[:, units]
        return self.clean.logits.float() + torch.einsum("eu,lu->uel", change, self.classifier.head_weight()[:, units])

    @cached_property
    def _final(self) -> nn.Module | None:
        """The final linear map, where the states of the layer are what it is given."""
        is_last = self.layer == len(self.classifier.sites(self.component)) - 1
        features = self.clean.features
        is_input = is_last and features is not None and torch.equal(features, self.states)
        return self.classifier.final if is_input else None

    @cached_property
    def _is_in_one_row(self) -> bool:
        return runs_in_one_row(self.classifier, self.clean, self.component, self.layer, in_readout_row=True)


class _Replaced:
    """Copies of all examples of a clean pass, one copy after the other, each without another neuron."""

    def __init__(self, without: _Without, units: Int[Tensor, "unit"]) -> None:
        n_examples = len(without.values)
        self.without = without
        self.unit = units.repeat_interleave(n_examples)
        self.example = torch.arange(n_examples, device=units.device).repeat(len(units))
        self.values = without.values[self.example, self.unit]

    def edited(self, states: Float[Tensor, "run token any_unit"]) -> Float[Tensor, "run token any_unit"]:
        """Return the states with the neuron of each copy replaced in the rows that the head reads."""
        classifier, without = self.without.classifier, self.without
        site, n_tokens = classifier.sites(without.component)[without.layer], states.shape[1]
        # One row that stands for all of its example is the one to edit.
        rows = None if n_tokens == 1 else classifier.rows(classifier.current_batch, site, n_tokens, "readout")
        run = torch.arange(len(states), device=states.device)
        old = states[run, :, self.unit]
        new = self.values.to(states.dtype)[:, None].expand(old.shape)
        edited = states.clone()
        edited[run, :, self.unit] = new if rows is None else torch.where(rows, new, old)
        return edited


def margins(
    logits: Float[Tensor, "unit example label"], labels: Int[Tensor, "example"]
) -> Float[Tensor, "unit example"]:
    """Return the logit of each example's own class minus the largest of the others."""
    own = labels[None, :, None].expand(len(logits), -1, 1)
    others = logits.scatter(2, own, -torch.inf).amax(dim=2)
    return logits.gather(2, own)[:, :, 0] - others


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


# --------------------------------------------------------------------------------------------------------- in the probe


@dataclass(frozen=True)
class ProbeRemoval(RankingMethod):
    """What the probe's accuracy loses when the neuron is set to its mean; globally over all classes, else the recall.

    It is measured on the recorded examples, against what the probe was fitted to read, in [-1, 1] and signed: where
    removal helps it is negative. Most neurons of a wide layer change no prediction; their scores are exactly 0.

    Source: leave-one-out importance of a linear model, by an update of rank one of its logits for each neuron:
    z' = z - w_j (x_j - mean_j) / scale_j.
    """

    needs: ClassVar[tuple[Need, ...]] = ("probes",)

    @property
    def name(self) -> str:
        """The method's name in tables."""
        return "probe-removal"

    def scores(self, evidence: Evidence) -> Scores:
        """Return the losses of accuracy and of each class's recall."""
        activations, probes = evidence.activations, evidence.probes
        assert probes is not None
        targets = probe_targets(activations, probes.target)
        members = np.eye(len(activations.labels))[targets]  # (example, label)
        # Losses of all examples count alike in the accuracy, those of a class in its recall.
        shares = np.concatenate([np.ones((len(targets), 1)), members], axis=1)
        shares /= np.maximum(shares.sum(axis=0), 1)
        losses = np.stack(
            [
                shares.T @ _lost_without_each(probe, values, targets)
                for probe, values in zip(probes.probes, activations.values, strict=True)
            ]
        )
        return Scores(losses, losses)


def _lost_without_each(
    probe: Probe, values: Float[np.ndarray, "example unit"], targets: Int[np.ndarray, "example"]
) -> Float[np.ndarray, "example unit"]:
    """Return 1 where the probe is right only with the neuron, -1 where only without it, and 0 elsewhere."""
    z = (values.astype(np.float64) - probe.mean) / probe.scale
    logits = probe.predict_logits(values)
    is_right = logits.argmax(axis=1) == targets
    lost = np.empty(z.shape)
    size = max(1, MARGINS // logits.size)
    for start in range(0, z.shape[1], size):
        units = slice(start, start + size)
        # (example, label, 1) - (example, 1, unit) * (label, unit)
        without = logits[:, :, None] - z[:, None, units] * probe.weights[:, units]
        lost[:, units] = is_right[:, None].astype(float) - (without.argmax(axis=1) == targets[:, None])
    return lost
