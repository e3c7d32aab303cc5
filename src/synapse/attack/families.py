"""The families of attacks that a study can be asked for: each finds attacks on one classifier, ready for its table.

| family | what is changed | what it costs |
|---|---|---|
| `logits` | the logits: shifted, adjusted to the classes' shares, exchanged, rounded | closed forms on recordings |
| `head` | the final linear map: two rows, whole rows, the bias, some of its features | the same |
| `weight-noise` | all weights of a block, at random | forward passes from the block on |
| `bits` | the stored bits of the final linear map, in four number formats | a search on recordings |
| `activations` | the readout state of every layer: the smallest edits, and steering | many forward passes |

A family is a function of a `Target` and one line in `FAMILIES`.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import permutations
from typing import get_args

import numpy as np
from jaxtyping import Float, Int

from synapse.attack.activation import GRID, direction_attacks, smallest_edits, steering_directions
from synapse.attack.base import attacked
from synapse.attack.bits import BitSearch, random_attacks
from synapse.attack.bits.found import BitAttack
from synapse.attack.certificate import head_bounds
from synapse.attack.head import STEPS, FittedStep, bias_attacks, ranked_head_attacks, redirect_head, row_attacks
from synapse.attack.logits import away_attacks, gaps, prior_attacks, rounding_attacks, shift_attacks, swap_attacks
from synapse.attack.noise import noise_attack
from synapse.attack.transfer import halves, transfers
from synapse.data.examples import Examples
from synapse.model.classifier import Classifier
from synapse.perturb.bits import Format
from synapse.perturb.weights import HEAD
from synapse.types import Activations, Attacks, FlipCurve, Progress, silent

log = logging.getLogger(__name__)

ROUNDED_TO = (2, 3, 4, 6, 8)
"""Bits that logits are rounded to."""

FORMATS: tuple[Format, ...] = get_args(Format)
"""Number formats in which bits are flipped."""

HEAD_BITS = BitSearch(share=0.98, bound=0.015, heats=(), each_bit=8, most=400)
"""A search of the final map's bits. No pass of the model is needed, so all candidates are tried on all examples, and
hundreds of flips can be made; a little more is asked for than 95 %, since other examples follow less well."""

FEATURE_SHARES = (0.1, 0.5)
"""Shares of the final map's features that an edit is limited to, by a ranking and at random."""


STATE_STEPS = 8
"""Times that the map from a readout state to the logits is made linear: fewer than where one edit is looked for."""


@dataclass(frozen=True, eq=False)
class Target:
    """What is attacked: a classifier, what was recorded of it, and a few examples that are run again.

    Attacks are fitted on `train` and scored on `test`; those that run the model are scored on `examples`, a few, whose
    recording is `recorded`. `feature_order` ranks the features of the final linear map, most important first.
    """

    classifier: Classifier
    train: Activations
    test: Activations
    examples: Examples
    recorded: Activations
    feature_order: Int[np.ndarray, "feature"] | None = None
    noise_draws: int = 8
    seed: int = 0

    @cached_property
    def weight(self) -> Float[np.ndarray, "label feature"]:
        """The weights of the final linear map."""
        return self.classifier.head_weight().float().cpu().numpy()

    @cached_property
    def bias(self) -> Float[np.ndarray, "label"]:
        """Its bias; zeros where it has none."""
        bias = getattr(self.classifier.final, "bias", None)
        return np.zeros(len(self.weight), dtype=np.float32) if bias is None else bias.detach().float().cpu().numpy()


Family = Callable[[Target, Progress], Attacks]


def attack_logits(target: Target, progress: Progress = silent) -> Attacks:
    """Return what changes of the logits do."""
    del progress
    test, seed = target.test, target.seed
    counts = np.bincount(target.train.targets, minlength=len(test.labels))
    redirections = [*shift_attacks(test, seed=seed), *away_attacks(test, seed=seed)]
    if counts.all() and np.ptp(counts):
        redirections += prior_attacks(test, counts / counts.sum(), seed=seed)
    else:
        log.info("The classes are of one size, or one has no training example: there is no prior to adjust to.")
    changes = [*swap_attacks(test, seed=seed), *rounding_attacks(target.train, test, ROUNDED_TO, seed=seed)]
    return Attacks(redirections, changes)


def attack_head(target: Target, progress: Progress = silent) -> Attacks:
    """Return what changes of the final linear map do, what they provably cannot do, and how they transfer.

    Transfer is that between two halves of the test examples.
    """
    if target.classifier.final is None:
        log.warning("The head does not end in a linear map, so head edits are left out.")
        return Attacks()
    train, test, weight, seed = target.train, target.test, target.weight, target.seed
    redirections = bias_attacks(train, test, target.bias, seed=seed)
    for done, step in enumerate(STEPS):
        redirections += redirect_head(step, train, test, weight, seed=seed)
        progress(done + 1, len(STEPS))
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


def attack_weights(target: Target, progress: Progress = silent) -> Attacks:
    """Return what noise on the weights of every block, and of the final map, does."""
    curves = noise_attack(
        target.classifier, target.examples, seed=target.seed, draws=target.noise_draws, progress=progress
    )
    return Attacks(noise=curves)


def attack_activations(target: Target, progress: Progress = silent) -> Attacks:
    """Return what edits of the readout state do at every layer: the smallest of each example, and steering.

    Steering goes along the differences of the class means of the training examples.
    """
    classifier, examples, seed = target.classifier, target.examples, target.seed
    targets = examples.targets(classifier.labels)
    n_layers, found = classifier.n_layers, []
    for layer in range(n_layers):
        edits = smallest_edits(classifier, examples, layer=layer, steps=STATE_STEPS, seed=seed)
        found += edits.redirections(targets)
        progress(2 * layer + 1, 2 * n_layers)
        means = {ends: way for ends, way in steering_directions(target.train, layer).items() if ends[0] is None}
        found += direction_attacks(
            classifier, examples, target.recorded, means, layer=layer, attack="steering", grid=GRID[::2], seed=seed
        )
        progress(2 * layer + 2, 2 * n_layers)
    return Attacks(found)


def attack_bits(target: Target, progress: Progress = silent) -> Attacks:
    """Return what bit flips in the final linear map do, in every number format that its weights can be stored in.

    The pair of classes is the one whose logits are nearest in training. For other weights see
    `synapse.attack.bits.BitSearch`, of which this is the form that needs no forward pass.
    """
    if target.classifier.final is None:
        log.warning("The head does not end in a linear map, so flips of its bits are left out.")
        return Attacks()
    labels, curves = target.test.labels, []
    source, to = _nearest_pair(target.train)
    for done, number_format in enumerate(FORMATS):
        search = replace(HEAD_BITS, number_format=number_format)
        found = search.find(target.classifier, target.train, target.test, source=labels[source], target=labels[to])
        random = random_attacks(search, found, target.classifier, target.test, seed=target.seed) if found.flips else []
        curves += [_curve([found]), *([_curve(random)] if random else [])]
        progress(done + 1, len(FORMATS))
    return Attacks(flips=curves)


def _nearest_pair(train: Activations) -> tuple[int, int]:
    """Return source and target of the pair whose examples lack least, all but 5 % of them."""
    lacking = {
        (source, to): float(np.quantile(gaps(train.known_logits[chosen], to), 0.95))
        for source, to in permutations(range(len(train.labels)), 2)
        if len(chosen := attacked(train, source, to))
    }
    return min(lacking, key=lambda ends: lacking[ends])


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
    "logits": attack_logits,
    "head": attack_head,
    "weight-noise": attack_weights,
    "bits": attack_bits,
    "activations": attack_activations,
}
"""The families by name."""
