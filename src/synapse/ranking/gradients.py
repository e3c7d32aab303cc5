"""Rankings by gradients of the live model.

A neuron is a coordinate of a site at the readout row; where the head reads several rows, its attributions are summed
over them. The function that is attributed is the logit z_c, not the softmax, in which one class's share falls because
another one's rises. An example is attributed its own class's logit: a class's score is the mean over its examples, the
global one that over all. Neurons are ordered by the magnitude of the mean, which itself is `signed`; with
`mean="magnitude"` by the mean of the magnitudes, which has no sign.

The model is run as it is: gradients are taken at the sites alone, and no parameter is given one.
"""

import logging
from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from typing import ClassVar, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from synapse.errors import AnatomyError, ModelError, SettingsError, near
from synapse.model.classifier import Batch, Classifier
from synapse.model.hooks import Edit, Site, edited_sites
from synapse.model.resume import CleanPass, clean_pass, resume_layer
from synapse.model.trace import forward_logits, passed_over, traced
from synapse.ranking.base import Evidence, Need, RankingMethod, Scores
from synapse.ranking.live import OfBatch, class_means, mean_states
from synapse.types import Component

log = logging.getLogger(__name__)

Mean = Literal["signed", "magnitude"]
"""What is averaged over the examples: attributions, which may cancel, or their magnitudes."""

Baseline = Literal["mean", "zero"]
"""Where a path begins: each unit's mean over the recorded examples, or 0."""

Objective = Callable[[Float[Tensor, "example label"], Int[Tensor, "example"]], Float[Tensor, ""]]
"""Sums over the examples what is differentiated, a function of each one's logits and class."""

Points = tuple[tuple[float, float], ...]
"""Where on a path from 0 to 1 gradients are taken, and how much each of them counts."""

PREFIX_TOLERANCE = 1e-3
"""Largest difference of a gradient, over the largest of the layer, at which what lies below it need not run again."""


@dataclass(frozen=True)
class GradientMethod(RankingMethod):
    """A method that takes gradients of the live model, at `examples` of the recorded ones (None: at all).

    They are drawn with the seed, in the classes' own shares.
    """

    needs: ClassVar[tuple[Need, ...]] = ("classifier",)
    _: KW_ONLY
    mean: Mean = "signed"
    examples: int | None = None
    seed: int = 0

    @abstractmethod
    def attributions(self, evidence: Evidence) -> OfBatch:
        """Return what attributes each example's own logit to the neurons."""

    def scores(self, evidence: Evidence) -> Scores:
        """Return the mean attributions.

        Raises:
            SettingsError: a parameter is out of range, or the classifier is not the one that was recorded.
            ModelError: the logits have no gradient, or one that is not finite.
        """
        _check_choice("mean", self.mean, get_args(Mean))
        of_batch = self.attributions(evidence)
        if self.mean == "magnitude":
            of_batch = partial(_magnitudes, of_batch)
        means = class_means(evidence, of_batch, examples=self.examples, seed=self.seed)
        return Scores(means) if self.mean == "magnitude" else Scores(np.abs(means), means)

    def _named(self, name: str) -> str:
        return name if self.mean == type(self).mean else f"{name}-{self.mean}"


# -------------------------------------------------------------------------------------------------- at the state itself


@dataclass(frozen=True)
class GradientXActivation(GradientMethod):
    """The activation times the gradient: x_j dz_c/dx_j. One pass forward and back gives all layers.

    Source: Shrikumar et al. (2016), arXiv 1605.01713, at hidden layers. To first order it is what the logit loses when
    the neuron is set to 0.
    """

    @property
    def name(self) -> str:
        """The method's name in tables."""
        return self._named("gradient-x-activation")

    def attributions(self, evidence: Evidence) -> OfBatch:
        """Return what multiplies activations and gradients."""
        return partial(_first_order, *_studied(evidence), own_logits, None)


@dataclass(frozen=True)
class Taylor(GradientMethod):
    """First-order Taylor expansion of the loss: mean |x_j dL/dx_j|, L the cross-entropy of the example's class.

    Source: Molchanov et al. (ICLR 2017), arXiv 1611.06440, equation 8. With `mean="signed"` a positive score says that
    the loss falls when the neuron is set to 0.
    """

    mean: Mean = field(default="magnitude", kw_only=True)

    @property
    def name(self) -> str:
        """The method's name in tables."""
        return self._named("taylor")

    def attributions(self, evidence: Evidence) -> OfBatch:
        """Return what multiplies activations and gradients of the loss."""
        return partial(_first_order, *_studied(evidence), losses, None)


@dataclass(frozen=True)
class AttributionPatching(GradientMethod):
    """The distance from the mean times the gradient: (x_j - mean_j) dz_c/dx_j, mean over the recorded examples.

    Convention: the gradient is that of the clean run, and the sign that of what the logit *loses*, to first order, when
    the neuron is set to its mean: an estimate of mean ablation by one pass forward and back. Source: Nanda (2023),
    "Attribution patching"; Syed et al. (2023), arXiv 2310.10348, equation 1.
    """

    @property
    def name(self) -> str:
        """The method's name in tables."""
        return self._named("attribution-patching")

    def attributions(self, evidence: Evidence) -> OfBatch:
        """Return what multiplies distances from the mean and gradients."""
        return partial(_first_order, *_studied(evidence), own_logits, _on_device(evidence, _base(evidence, "mean")))


def _first_order(
    classifier: Classifier,
    component: Component,
    objective: Objective,
    base: Float[Tensor, "layer unit"] | None,
    batch: Batch,
) -> Float[Tensor, "layer example unit"]:
    """Return (x - base) * gradient at the readout rows, for all layers from one pass."""
    layers = range(len(classifier.sites(component)))
    found = states_and_gradients(classifier, batch, component, layers, objective)
    parts = [
        (states if base is None else states - base[layer]) * gradient for layer, (states, gradient) in enumerate(found)
    ]
    return _over_readout_rows(classifier, batch, component, parts)


# -------------------------------------------------------------------------------------------- along a path in the layer


@dataclass(frozen=True)
class IntegratedGradients(GradientMethod):
    """Integral of the gradient along the straight path of a layer's readout row: (x_j - x'_j) int dz_c/dx_j da.

    The path leads from the baseline x' to x; the other rows stay what they are. The integral is taken by Gauss-Legendre
    quadrature with so many `steps`, each a pass forward and back of what lies above the layer.

    Invariant (completeness): the attributions of an example to the units of a layer add up to z_c(x) - z_c(x'). The
    path from `zero` crosses the place where a layer norm that follows has no direction, so that it needs more steps,
    many more where blocks begin with one; on the path from the `mean`, 8 steps gave what 32 did, but for 1e-6 of the
    largest score (6 layers of width 384, news).

    Source: Sundararajan et al. (ICML 2017), arXiv 1703.01365, in layer space as in Dai et al. (ACL 2022),
    arXiv 2104.08696.
    """

    _: KW_ONLY
    baseline: Baseline = "mean"
    steps: int = 8
    examples: int | None = 64

    @property
    def name(self) -> str:
        """The method's name in tables."""
        return self._named("integrated-gradients" + ("" if self.baseline == "mean" else f"-{self.baseline}"))

    def attributions(self, evidence: Evidence) -> OfBatch:
        """Return what integrates gradients."""
        _check_choice("baseline", self.baseline, get_args(Baseline))
        base = _on_device(evidence, _base(evidence, self.baseline))
        return _LayerPaths(*_studied(evidence), base, _quadrature(self.steps))


@dataclass(eq=False)
class _LayerPaths:
    """Integrates gradients; `resumes` says of the layers that were tried whether what lies below need not run again."""

    classifier: Classifier
    component: Component
    base: Float[Tensor, "layer unit"]
    points: Points
    resumes: dict[int, bool] = field(default_factory=dict)

    def __call__(self, batch: Batch) -> Float[Tensor, "layer example unit"]:
        clean = clean_pass(self.classifier, batch)
        return torch.stack([self._integrated(clean, layer) for layer in range(len(self.base))])

    def _integrated(self, clean: CleanPass, layer: int) -> Float[Tensor, "example unit"]:
        if layer not in self.resumes:
            self.resumes[layer] = self._prefix_agrees(clean, layer)
        total: Tensor | float = 0.0
        for alpha, weight in self.points:
            distance, gradients = self._at(clean, layer, alpha, resumed=self.resumes[layer])
            total = total + weight * gradients
        return (distance * total).sum(dim=1)  # the distance is 0 in the rows that are not read

    def _at(
        self, clean: CleanPass, layer: int, alpha: float, *, resumed: bool
    ) -> tuple[Float[Tensor, "example token unit"], Float[Tensor, "example token unit"]]:
        """Return x - x', and the gradient at x' + alpha (x - x')."""
        classifier, batch, component = self.classifier, clean.batch, self.component
        site = classifier.sites(component)[layer]
        path = _PathPoint(classifier, batch, site, self.base[layer], alpha)
        with ExitStack() as stack:
            below = resume_layer(classifier, component, layer)
            if resumed:
                # Copies: what the clean pass kept was made in inference mode, and can be part of no gradient.
                replay = clean.replay.take(torch.arange(len(batch.index), device=classifier.device))
                states = None if below < 0 else clean.states[below].clone()
                block = classifier.sites()[max(below, 0)]
                stack.enter_context(passed_over(classifier.module, replay, below, block, states))
            stack.enter_context(edited_sites(classifier.module, [(site, path.edited)]))
            ((_, gradients),) = states_and_gradients(classifier, batch, component, [layer], own_logits)
        assert path.distance is not None
        return path.distance.float(), gradients

    def _prefix_agrees(self, clean: CleanPass, layer: int) -> bool:
        """Return whether the gradient is that of the whole model when what lies below the layer is given again."""
        alpha, _ = self.points[0]
        _, plain = self._at(clean, layer, alpha, resumed=False)
        try:
            _, found = self._at(clean, layer, alpha, resumed=True)
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:  # the model's own code may fail in any way on what is given again
            reason = f"{type(error).__name__}: {error}"
        else:
            gap, largest = float((found - plain).abs().max()), float(plain.abs().max())
            if gap <= PREFIX_TOLERANCE * largest:
                return True
            reason = f"gradients differ by {gap:.1e}, the largest is {largest:.1e}"
        log.warning(
            "%s of layer %d: the whole model is run for each step, which is slow (%s).", self.component, layer, reason
        )
        return False


@dataclass(eq=False)
class _PathPoint:
    """Moves the readout rows of a site towards the baseline: x' + alpha (x - x'); `distance` is x - x', 0 elsewhere."""

    classifier: Classifier
    batch: Batch
    site: Site
    base: Float[Tensor, "unit"]
    alpha: float
    distance: Tensor | None = None

    def edited(self, states: Float[Tensor, "example token unit"]) -> Float[Tensor, "example token unit"]:
        states = states.detach()
        rows = self.classifier.rows(self.batch, self.site, states.shape[1], "readout")
        distance = states - self.base.to(states.dtype)
        self.distance = distance if rows is None else torch.where(rows[:, :, None], distance, 0.0)
        return states - (1 - self.alpha) * self.distance


# -------------------------------------------------------------------------------------------- along a path of the input


@dataclass(frozen=True)
class InputPathMethod(GradientMethod):
    """A method that follows the straight path of the model's embedded input, from 0 to what it is.

    The path is that of the input of the first block, all rows: a model of any kind has one, where a padding or mask
    token is a matter of texts. It is cut into so many `steps`, short ones at its ends: as long as the weights of
    Gauss-Legendre quadrature, at whose nodes, one in each, the gradient is taken by a pass forward and back that gives
    all layers. Gradients are not taken at 0 itself, where a layer norm may have a pole.

    States turn sharply near 0, so that values, rather than orders, want many steps: in an encoder of 6 layers of width
    384 (news), 32 steps differed from 64 by 0.06 to 0.22 of a layer's largest conductance.
    """

    _: KW_ONLY
    steps: int = 32
    examples: int | None = 64


@dataclass(frozen=True)
class Conductance(InputPathMethod):
    """Share of the change along the input path that flows through the neuron: int dz_c/dy_j dy_j.

    The integral is over dy, as in Shrikumar et al. (2018), arXiv 1807.09946: each step's gradient times the step's
    change of y. Invariant (completeness): the attributions to all units of *all rows* of a layer add up to
    z_c(x) - z_c(0); those to the readout row do in the last layer, where the head reads nothing else.

    Source: Dhamdhere et al. (ICLR 2019), arXiv 1805.12233, equation 2.
    """

    @property
    def name(self) -> str:
        """The method's name in tables."""
        return self._named("conductance")

    def attributions(self, evidence: Evidence) -> OfBatch:
        """Return what integrates gradients over the change of the states."""
        return partial(_conductance, *_studied(evidence), _quadrature(self.steps))


@dataclass(frozen=True)
class InternalInfluence(InputPathMethod):
    """Mean gradient of the neuron along the input path: int dz_c/dy_j da; the size of the state does not enter.

    Source: Leino et al. (ITC 2018), arXiv 1802.03788, with the uniform distribution over the path.
    """

    @property
    def name(self) -> str:
        """The method's name in tables."""
        return self._named("internal-influence")

    def attributions(self, evidence: Evidence) -> OfBatch:
        """Return what integrates gradients over the path."""
        return partial(_influence, *_studied(evidence), _quadrature(self.steps))


def _conductance(
    classifier: Classifier, component: Component, points: Points, batch: Batch
) -> Float[Tensor, "layer example unit"]:
    """Return the sum over the steps of gradient times change of the state, at the readout rows of all layers."""
    site, ends = _input_of_blocks(classifier, batch), np.cumsum([weight for _, weight in points]).tolist()
    before, total = _states_at(classifier, component, site, 0.0, batch), torch.zeros((), device=classifier.device)
    for (alpha, _), end in zip(points, ends, strict=True):
        after = _states_at(classifier, component, site, end, batch)
        gradients = _gradients_at(classifier, component, site, alpha, batch)
        parts = [(y - x) * gradient for x, y, gradient in zip(before, after, gradients, strict=True)]
        total, before = total + _over_readout_rows(classifier, batch, component, parts), after
    return total


def _influence(
    classifier: Classifier, component: Component, points: Points, batch: Batch
) -> Float[Tensor, "layer example unit"]:
    """Return the mean gradient along the path of the input, at the readout rows of all layers."""
    site, total = _input_of_blocks(classifier, batch), torch.zeros((), device=classifier.device)
    for alpha, weight in points:
        gradients = _gradients_at(classifier, component, site, alpha, batch)
        total = total + weight * _over_readout_rows(classifier, batch, component, gradients)
    return total


def _states_at(
    classifier: Classifier, component: Component, site: Site, alpha: float, batch: Batch
) -> list[Float[Tensor, "example token unit"]]:
    """Return the states of all layers at a point of the path."""
    others = () if component == "residual" else (component,)
    with edited_sites(classifier.module, [(site, partial(torch.mul, alpha))]):
        # Copies: what is made in inference mode can be part of no gradient.
        return [states.float().clone() for states in clean_pass(classifier, batch, others).of(component)]


def _gradients_at(
    classifier: Classifier, component: Component, site: Site, alpha: float, batch: Batch
) -> list[Float[Tensor, "example token unit"]]:
    """Return the gradients at all layers at a point of the path."""
    layers = range(len(classifier.sites(component)))
    with edited_sites(classifier.module, [(site, partial(torch.mul, alpha))]):
        return [gradient for _, gradient in states_and_gradients(classifier, batch, component, layers, own_logits)]


def _input_of_blocks(classifier: Classifier, batch: Batch) -> Site:
    """Return the site of what the first block is given."""
    name, output = classifier.anatomy.blocks[0], classifier.sites()[0]
    alone = batch.take(torch.arange(1, device=classifier.device))
    first = next(call for call in traced(classifier.module, alone.inputs).calls if call.name == name)
    if first.input is None or not first.input.is_floating_point():
        raise AnatomyError(
            f"The first block, {name!r}, is given no states, so there is no path of its input; rank by "
            "'integrated-gradients', whose path begins in the layer."
        )
    return Site(name, output.width, output.layout, side="input", argument=first.argument)


# -------------------------------------------------------------------------------------------------------- the gradients


def own_logits(logits: Float[Tensor, "example label"], labels: Int[Tensor, "example"]) -> Float[Tensor, ""]:
    """Return the sum of each example's logit of its own class."""
    return logits.gather(1, labels[:, None]).sum()


def losses(logits: Float[Tensor, "example label"], labels: Int[Tensor, "example"]) -> Float[Tensor, ""]:
    """Return the sum of the cross-entropies of each example's own class."""
    return cross_entropy(logits, labels, reduction="sum")


def states_and_gradients(
    classifier: Classifier, batch: Batch, component: Component, layers: Sequence[int], objective: Objective
) -> list[tuple[Float[Tensor, "example token unit"], Float[Tensor, "example token unit"]]]:
    """Return the states of the layers and the gradients of the objective at them, from one pass forward and back.

    Examples of a batch do not see each other, so that the gradient of a sum over them is that of each. No parameter is
    touched, nor is it asked for a gradient.

    Raises:
        ModelError: the logits have no gradient.
    """
    sites = classifier.sites(component)
    kept: dict[int, Tensor] = {}
    edits: list[tuple[Site, Edit]] = [(sites[layer], partial(_keep, kept, layer)) for layer in layers]
    assert batch.labels is not None
    with torch.enable_grad(), edited_sites(classifier.module, edits), classifier.running(batch):
        total = objective(forward_logits(classifier.module, batch.inputs).float(), batch.labels)
        if not total.requires_grad:
            raise ModelError(
                "The logits have no gradient: the model computes them where gradients are turned off, or in whole "
                "numbers. Rank by a method that needs none, such as 'causal-zero'."
            )
        states = [kept[layer] for layer in layers]
        # A site that the logits do not depend on has the gradient 0.
        gradients = torch.autograd.grad(total, states, materialize_grads=True)
    return [(state.detach().float(), gradient.float()) for state, gradient in zip(states, gradients, strict=True)]


def _keep(kept: dict[int, Tensor], layer: int, states: Tensor) -> Tensor:
    """Keep the states, from which the gradient is asked, also where no parameter below them wants one."""
    kept[layer] = states if states.requires_grad else states.detach().requires_grad_()
    return kept[layer].clone()  # a block that works in place would change what was kept


def _over_readout_rows(
    classifier: Classifier, batch: Batch, component: Component, parts: Sequence[Float[Tensor, "example token unit"]]
) -> Float[Tensor, "layer example unit"]:
    """Return the sums over the rows that the head reads, of one tensor for each layer."""
    found = []
    for site, values in zip(classifier.sites(component), parts, strict=True):
        rows = classifier.rows(batch, site, values.shape[1], "readout")
        found.append(values.sum(dim=1) if rows is None else torch.einsum("etu,et->eu", values, rows.float()))
    return torch.stack(found)


def _magnitudes(of_batch: OfBatch, batch: Batch) -> Float[Tensor, "layer example unit"]:
    return of_batch(batch).abs()


def _studied(evidence: Evidence) -> tuple[Classifier, Component]:
    return evidence.model[0], evidence.activations.component


def _base(evidence: Evidence, baseline: Baseline) -> Float[np.ndarray, "layer unit"]:
    means = mean_states(evidence.activations)
    return means if baseline == "mean" else np.zeros_like(means)


def _on_device(evidence: Evidence, values: Float[np.ndarray, "layer unit"]) -> Float[Tensor, "layer unit"]:
    return torch.from_numpy(values).to(evidence.model[0].device)


def _check_choice(what: str, given: str, known: Sequence[str]) -> None:
    if given not in known:
        raise SettingsError(f"The {what} is {given!r}; one of {', '.join(known)} was expected.{near(given, known)}")


def _quadrature(steps: int) -> Points:
    """Return the nodes and weights of Gauss-Legendre quadrature on [0, 1]."""
    if steps < 1:
        raise SettingsError(f"{steps} steps were asked for; 1 or more were expected.")
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    return tuple(zip(((nodes + 1) / 2).tolist(), (weights / 2).tolist(), strict=True))
