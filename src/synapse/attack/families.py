"""The families of attacks that a study can be asked for: each finds attacks on one classifier, ready for its table.

| family | what is changed | what it costs |
|---|---|---|
| `logits` | the logits: shifted, adjusted, exchanged, rounded, under noise | closed forms on recordings |
| `head` | the final linear map: two rows, whole rows, the bias, some of its features | the same |
| `weight-noise` | all weights of a block, at random | forward passes from the block on |
| `pruning` | the smallest, the largest, or any weights of a block: set to zero | the same |
| `random-bits` | signs and exponents of the stored weights of a block, at random | the same |
| `adversarial-weights` | all weights of a block, up the gradient of the loss | the same, and gradients |
| `bits` | the stored bits of the final linear map, in four number formats | a search on recordings |
| `activations` | the readout state of every layer: the smallest edits, and steering | many forward passes |

A family is one line in `FAMILIES`: a function that names its parts, which are independent, and one that gives the
attacks of a part. An executor runs the parts, here or on a cluster.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from synapse.attack.activation import ranked_edits, smallest_edits
from synapse.attack.adversarial import adversarial_steps, adversarial_weights
from synapse.attack.base import RANDOM_DRAWS
from synapse.attack.bits import BitSearch, random_attacks
from synapse.attack.bits.aim import nearest_pairs
from synapse.attack.bits.found import BitAttack
from synapse.attack.certificate import head_bounds
from synapse.attack.damage import pruning, random_flips
from synapse.attack.directions import GRID, direction_attacks, steering_directions, universal_directions
from synapse.attack.head import STEPS, FittedStep, bias_attacks, ranked_head_attacks, redirect_head, row_attacks
from synapse.attack.logits import (
    away_attacks,
    noise_curve,
    prior_attacks,
    rotation_attacks,
    rounding_attacks,
    shift_attacks,
    swap_attacks,
    temperature_controls,
)
from synapse.attack.noise import BUDGETS, weight_noise
from synapse.attack.transfer import halves, transfers
from synapse.attack.trials import Strengths, WeightTrials
from synapse.data.examples import Examples
from synapse.execute import Executor, for_models
from synapse.model.classifier import Classifier
from synapse.model.replica import Replica
from synapse.perturb.bits import FORMATS, Format
from synapse.perturb.weights import HEAD, places
from synapse.types import GLOBAL, Activations, Attacks, FlipCurve, Progress, StrengthCurve, silent

log = logging.getLogger(__name__)

ROUNDED_TO = (2, 3, 4, 6, 8)
"""Bits that logits are rounded to."""

LOGIT_NOISE = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
"""Standard deviations of the noise on logits."""

TEMPERATURES = (0.1, 10.0)
"""What logits are divided by, which must change no prediction."""

HEAD_BITS = BitSearch(share=0.98, bound=0.015, heats=(), each_bit=8, most=400)
"""A search of the final map's bits. No pass of the model is needed, so all candidates are tried on all examples, and
hundreds of flips can be made; a little more is asked for than 95 %, since other examples follow less well."""

FEATURE_SHARES = (0.1, 0.5)
"""Shares of the final map's features that an edit is limited to, by a ranking and at random."""


STATE_STEPS = 10
"""Times that the map from a readout state to the logits is made linear: fewer than where one edit is looked for."""

NEURON_SHARES = (0.1,)
"""Shares of a layer's neurons that an edit of its readout state is limited to, by a ranking and at random."""


@dataclass(frozen=True, eq=False)
class Target:
    """What is attacked: a classifier, what was recorded of it, and a few examples that are run again.

    Attacks are fitted on `train` and scored on `test`; those that run the model are scored on `examples`, a few, whose
    recording is `recorded`, and fitted on `fitting`, a few training examples. `feature_order` ranks the features of the
    final linear map, most important first, and `neuron_order` the neurons of every layer. What is None leaves the
    attacks out that need it.
    """

    classifier: Classifier
    train: Activations
    test: Activations
    examples: Examples
    recorded: Activations
    feature_order: Int[np.ndarray, "feature"] | None = None
    noise_draws: int = 8
    seed: int = 0
    fitting: Examples | None = None
    neuron_order: Int[np.ndarray, "layer unit"] | None = None

    @property
    def draws(self) -> int:
        """Draws of a random control: as many as of noise, ten at least."""
        return max(self.noise_draws, RANDOM_DRAWS)

    @cached_property
    def weight(self) -> Float[np.ndarray, "label feature"]:
        """The weights of the final linear map."""
        return self.classifier.head_weight().float().cpu().numpy()

    @cached_property
    def bias(self) -> Float[np.ndarray, "label"]:
        """Its bias; zeros where it has none."""
        bias = getattr(self.classifier.final, "bias", None)
        return np.zeros(len(self.weight), dtype=np.float32) if bias is None else bias.detach().float().cpu().numpy()

    @cached_property
    def trials(self) -> WeightTrials:
        """The examples, to be run under changes of the weights."""
        return WeightTrials(self.classifier, self.examples)


Part = str | int
"""A block by its name as a place of weights, a layer by its number, a number format, or `WHOLE`."""

WHOLE = "whole"
"""The only part of a family that has no more."""


@dataclass(frozen=True)
class Family:
    """A family of attacks: its parts, none where it does not suit the target, and what each of them gives."""

    parts: Callable[[Target], Sequence[Part]]
    find: Callable[[Target, Any], Attacks]


def find_attacks(
    name: str, target: Target, *, executor: Executor | None = None, progress: Progress = silent
) -> Attacks:
    """Return the attacks of a family, the parts in their order, whoever ran them and when."""
    items = [(name, part) for part in FAMILIES[name].parts(target)]
    found: dict[int, Attacks] = {}
    for done in for_models(executor).results(_find_part, items, shared=_Travelling.of(target)):
        found[done.position] = done.result
        progress(len(found), len(items))
    return sum((found[position] for position in range(len(items))), Attacks())


def _find_part(target: Target, item: tuple[str, Part]) -> Attacks:
    name, part = item
    return FAMILIES[name].find(target, part)


@dataclass(frozen=True, eq=False)
class _Travelling:
    """A recipe for a target in another process."""

    replica: Replica
    others: Mapping[str, Any]

    @classmethod
    def of(cls, target: Target) -> "_Travelling":
        """Return what is sent of a target: in place of the classifier its recipe."""
        others = {field.name: getattr(target, field.name) for field in fields(Target) if field.name != "classifier"}
        return cls(Replica(target.classifier), others)

    def build(self) -> Target:
        """Return the target, with a classifier of this process."""
        return Target(self.replica.build(), **self.others)


def _undivided(_target: Target) -> Sequence[Part]:
    return [WHOLE]


def _all_places(target: Target) -> Sequence[Part]:
    return places(target.classifier)


def _places_to_fit(target: Target) -> Sequence[Part]:
    if target.fitting is None:
        log.warning("There are no training examples to follow the loss of, so changes along its gradient are left out.")
        return []
    return places(target.classifier)


def _layers(target: Target) -> Sequence[Part]:
    return range(target.classifier.n_layers)


def _head_as_a_whole(target: Target) -> Sequence[Part]:
    if target.classifier.final is None:
        log.warning("The head does not end in a linear map, so head edits are left out.")
        return []
    return [WHOLE]


def _formats_of_the_head(target: Target) -> Sequence[Part]:
    if target.classifier.final is None:
        log.warning("The head does not end in a linear map, so flips of its bits are left out.")
        return []
    return FORMATS


def attack_logits(target: Target, _part: Part = WHOLE) -> Attacks:
    """Return what changes of the logits do."""
    test, seed = target.test, target.seed
    counts = np.bincount(target.train.targets, minlength=len(test.labels))
    redirections = [*shift_attacks(test, seed=seed), *away_attacks(test, seed=seed)]
    if counts.all() and np.ptp(counts):
        redirections += prior_attacks(test, counts / counts.sum(), seed=seed)
    else:
        log.info("The classes are of one size, or one has no training example: there is no prior to adjust to.")
    changes = [
        *swap_attacks(test, seed=seed),
        *rotation_attacks(test, seed=seed),
        *rounding_attacks(target.train, test, ROUNDED_TO, seed=seed),
        *temperature_controls(test, TEMPERATURES),
    ]
    return Attacks(redirections, changes, [noise_curve(test, LOGIT_NOISE, seed=seed)])


def attack_head(target: Target, _part: Part = WHOLE) -> Attacks:
    """Return what changes of the final linear map do, what they provably cannot do, and how they transfer.

    Transfer is that between two halves of the test examples.
    """
    train, test, weight, seed = target.train, target.test, target.weight, target.seed
    redirections = bias_attacks(train, test, target.bias, seed=seed)
    for step in STEPS:
        redirections += redirect_head(step, train, test, weight, seed=seed)
    if target.feature_order is not None:
        sizes = [max(1, round(share * weight.shape[1])) for share in FEATURE_SHARES]
        redirections += ranked_head_attacks(FittedStep(), train, test, weight, target.feature_order, sizes, seed=seed)
    fitted = partial(redirect_head, FittedStep(), weight=weight, seed=seed)
    return Attacks(
        redirections,
        row_attacks(test, weight, target.bias, seed=seed),
        bounds=head_bounds(test, weight),
        transfers=transfers(fitted, *halves(test, seed=seed)),
    )


def attack_weights(target: Target, place: str) -> Attacks:
    """Return what noise on the weights of a block, or of the final map, does."""
    noise = weight_noise(place, BUDGETS, draws=target.noise_draws, seed=target.seed)
    return Attacks(curves=[target.trials.curve(noise)])


def attack_pruning(target: Target, place: str) -> Attacks:
    """Return what is lost with shares of the weights of a block, or of the final map: by size, and at random."""
    random = pruning(place, "random", draws=target.draws, seed=target.seed)
    return Attacks(curves=_beside(target.trials, [pruning(place, "smallest"), pruning(place, "largest")], random))


def attack_random_bits(target: Target, place: str) -> Attacks:
    """Return what random flips of signs and exponents do in a block, or in the final map, beside those of any bit.

    In the number format in which the model holds its weights.
    """
    flips = partial(random_flips, place, draws=target.draws, seed=target.seed)
    return Attacks(curves=_beside(target.trials, [flips("sign"), flips("exponent")], flips("all")))


def attack_adversarial_weights(target: Target, place: str) -> Attacks:
    """Return what changes along the gradient do in a block, or in the final map, beside noise of equal norm.

    Towards any other prediction, and towards the class that is nearest to another in training.
    """
    assert target.fitting is not None  # or there would be no parts
    fit, aims = (
        WeightTrials(target.classifier, target.fitting),
        (GLOBAL, target.test.labels[nearest_pairs(target.train)[0][1]]),
    )
    fitted = [adversarial_weights(adversarial_steps(fit, place, target=aim), aim) for aim in aims]
    noise = weight_noise(place, fitted[0].budgets, draws=target.draws, seed=target.seed)
    return Attacks(curves=_beside(target.trials, fitted, noise))


def _beside(trials: WeightTrials, chosen: Sequence[Strengths], random: Strengths) -> list[StrengthCurve]:
    """Return the curves of attacks, and beside each the same random changes, under its name."""
    control, found = trials.curve(random), []
    for attack in map(trials.curve, chosen):
        found += [attack, replace(control, attack=attack.attack, target=attack.target)]
    return found


def attack_activations(target: Target, layer: int) -> Attacks:
    """Return what edits of the readout state of a layer do: the smallest of each example, and one for all.

    The smallest are those in all neurons, and in those that a ranking puts first, beside as many at random. One for all
    is the difference of the class means of the training examples, or the mean of the smallest edits of a few of them.
    """
    classifier, examples = target.classifier, target.examples
    targets = examples.targets(classifier.labels)
    options: dict[str, Any] = {"seed": target.seed, "layer": layer, "reuse": {}}
    found = smallest_edits(classifier, examples, steps=STATE_STEPS, **options).redirections(targets)
    if target.neuron_order is not None:
        order = target.neuron_order[layer]
        sizes = [max(1, round(share * len(order))) for share in NEURON_SHARES]
        found += ranked_edits(classifier, examples, targets, order, sizes, steps=STATE_STEPS, **options)
    means = steering_directions(target.train, layer)
    directions = {"steering": {ends: way for ends, way in means.items() if ends[0] is None}}
    if target.fitting is not None:
        directions["universal"] = universal_directions(
            classifier, target.fitting, layer=layer, steps=STATE_STEPS, reuse=options["reuse"]
        )
    found += direction_attacks(classifier, examples, target.recorded, directions, grid=GRID[::2], **options)
    return Attacks(found)


def attack_bits(target: Target, number_format: Format) -> Attacks:
    """Return what bit flips in the final linear map do, its weights stored in a number format.

    The pair of classes is the one whose logits are nearest in training. For other weights see
    `synapse.attack.bits.BitSearch`, of which this is the form that needs no forward pass.
    """
    labels, (source, to) = target.test.labels, nearest_pairs(target.train)[0]
    search = replace(HEAD_BITS, number_format=number_format)
    found = search.find(target.classifier, target.train, target.test, source=labels[source], target=labels[to])
    random = random_attacks(search, found, target.classifier, target.test, seed=target.seed) if found.flips else []
    return Attacks(flips=[_curve([found]), *([_curve(random)] if random else [])])


def _curve(attacks: Sequence[BitAttack]) -> FlipCurve:
    """Return what draws of the same search did."""
    first, scored = attacks[0], [attack.scoring for attack in attacks]
    return FlipCurve(
        HEAD,
        first.perturbation.number_format,
        first.source,
        first.target,
        first.arm,
        first.after,
        np.array([[outcome.redirected for outcome in one] for one in scored]),
        scored[0][0].attacked,
        np.array([[outcome.lost for outcome in one] for one in scored]),
        scored[0][0].others,
    )


FAMILIES: Mapping[str, Family] = {
    "logits": Family(_undivided, attack_logits),
    "head": Family(_head_as_a_whole, attack_head),
    "weight-noise": Family(_all_places, attack_weights),
    "pruning": Family(_all_places, attack_pruning),
    "random-bits": Family(_all_places, attack_random_bits),
    "adversarial-weights": Family(_places_to_fit, attack_adversarial_weights),
    "bits": Family(_formats_of_the_head, attack_bits),
    "activations": Family(_layers, attack_activations),
}
"""The families by name."""
