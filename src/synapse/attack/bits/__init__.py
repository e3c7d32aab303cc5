"""Bit flips of stored weights that redirect predictions, searched for bit by bit, beside random flips of equal number.

Progressive bit search: at every step the gradient of a loss ranks all bits of all weights by the first-order change
g * (w' - w) that their flip promises; the best are tried, each with real forward passes, in heats of ever more fitting
examples and ever fewer flips, and the one with the lowest loss on all of them stays. *Sources*: Rakin et al. (ICCV
2019), "Bit-Flip Attack", for the search without a target; Rakin et al. (TPAMI 2021), "T-BFA", for a source and a target
class with stealth on the rest.

What differs, and why:

- Candidates are the best of every tensor, in int8, there; here also the best of every bit position, in every format: a
  first-order promise compares flips of like size, and among the exponents of float32 the largest jump would always
  promise most.
- The loss is a hinge on margins, as in Bai et al. (ICLR 2021), "Targeted attack against deep neural networks via
  flipping limited weight bits"; cross-entropy there. It asks for the others' safety before they are wrong.
- Others may be lost on the way: what few flips of an encoder redirect a class first take others along, and the next
  flips bring these back. What counts is how many are lost at the end.
- One gradient serves several flips, as long as each still brings half of what the first one did.

Memory, beside the model: the saved weights and their gradients (4 bytes a weight each, and while a batch adds to them
twice that), the words (1 to 4 bytes), the block outputs of the fitting examples, and a few megabytes for a chunk.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from synapse.attack.base import RANDOM_DRAWS
from synapse.attack.bits.aim import usual_margin
from synapse.attack.bits.candidates import Place, places_of, random_flips
from synapse.attack.bits.flipping import Flipping, Judge
from synapse.attack.bits.found import BitAttack
from synapse.attack.bits.runs import Aimed, runs_of
from synapse.data.examples import Examples
from synapse.errors import SettingsError, SplitError, near
from synapse.model.classifier import Classifier, hash_tensors
from synapse.perturb.bits import BitFlips, BitKind, Flip, Format, StoredWeight, bit_positions, matrices, named_weights
from synapse.types import GLOBAL, Activations, Progress, silent

log = logging.getLogger(__name__)

REACHED = "the share is reached"
SPENT = "the flips are spent"
BEYOND = "the loss is no longer finite"
STUCK = "no flip that may be made lowers the loss"

LIMIT = 2.0
"""Usual margins by which an example may be on the wrong side before it makes no difference any more."""

QUARTER = 4
"""One candidate in so many goes on after a heat."""


@dataclass(frozen=True)
class BitSearch:
    """Progressive bit search in the weights whose names match `weights` (by default in all matrices).

    `bits` are a kind of bits or their positions, and `protected` flips that may not be made, whatever their position:
    those of bits that a checksum covers. With `finite`, no weight is made NaN or infinite. At each step the
    most promising flips are tried, `each_bit` of every bit position and `each_tensor` of every tensor: first on as many
    fitting examples as the first of the `heats` says; the best quarter on as many as the next
    says, and so on; the rest on all. Up to `together` of these are made, as long as each brings half as much as the
    first of them.

    The search ends when a `share` of the attacked fitting examples is redirected (a constant answer is wrong for
    1 - 1/C of C balanced classes) with no more than `bound` of the others lost, after `most` flips, or where no flip
    lowers the loss. `stealth` weighs the others' loss, and `margin` is how far ahead the wanted class is to be, as a
    share of what is usual without a flip. What is found holds less well for other examples: ask for a little more
    than is needed.
    """

    number_format: Format = "int8"
    weights: tuple[str, ...] = ()
    bits: BitKind | tuple[int, ...] = "all"
    protected: frozenset[Flip] = frozenset()
    finite: bool = True
    each_bit: int = 2
    each_tensor: int = 1
    heats: tuple[int, ...] = (16, 64)
    together: int = 4
    most: int = 64
    share: float = 0.95
    stealth: float = 1.0
    bound: float = 0.02
    margin: float = 0.5

    def find(
        self,
        classifier: Classifier,
        fitting: Examples | Activations,
        scoring: Examples | Activations,
        *,
        source: str | None = None,
        target: str | None = None,
        progress: Progress = silent,
    ) -> BitAttack:
        """Return the flips that make examples of the source class be predicted as the target.

        Without a source it is about every class, and nothing is collateral; without a target about any wrong
        prediction. Both splits are examples, or both activations: then the final linear map alone is attacked, and run
        on their features. What is attacked and what is collateral is judged by the model as stored, without a flip.

        Raises:
            SettingsError: an unknown class, weight, format or kind of bits, a protected bit that is not there, no
                example to redirect, or activations without features or of another model.
            SplitError: the attack would be scored on the examples that it was fitted to.
            ModelError: the gradient is not finite.
        """
        names, bits = _names(classifier, self.weights, fitting, scoring), positions(self.number_format, self.bits)
        ends = _classes(classifier, source, target)
        plain = BitFlips(self.number_format, names)
        weights = named_weights(classifier, names, self.number_format)
        stored, before = plain.stored(weights), hash_tensors(weights)
        protected = _protected(self.protected, stored)
        with plain.applied(classifier), torch.inference_mode(False), classifier.studied():
            fit = Aimed.of(classifier, fitting, *ends, keeps=True)
            score = Aimed.of(classifier, scoring, *ends)
            if not fit.aim.attacked.any():
                raise SettingsError(
                    f"No fitting example of {source or 'any class'} can be redirected to {target or 'another class'}: "
                    "the stored model gets none right, or they go there already; give others."
                )
            flipping = Flipping(weights, stored, fit, score, protected)
            stopped = self._search(flipping, bits, progress)
            after = hash_tensors(weights)
        return BitAttack(
            perturbation=replace(plain, flips=tuple(flipping.flips)),
            source=source or GLOBAL,
            target=target or GLOBAL,
            arm="attack",
            after=tuple(range(len(flipping.scored))),
            fitting=tuple(flipping.fitted),
            scoring=tuple(flipping.scored),
            stopped=stopped,
            examples=_fingerprint(scoring),
            model=before,
            flipped=after,
        )

    def _search(self, flipping: Flipping, bits: Sequence[int], progress: Progress) -> str:
        """Flip bit after bit, and return why it ended."""
        flipping.look()
        usual = usual_margin(flipping.logits)
        loss = flipping.fitting.aim.loss(self.stealth, self.margin * usual, (self.margin + LIMIT) * usual)
        judge = Judge(flipping.fitting, loss)
        while True:
            if self._is_reached(flipping):
                return REACHED
            if len(flipping.flips) >= self.most:
                return SPENT
            if not np.isfinite(loss.value(flipping.logits)):
                return BEYOND
            tried = flipping.candidates(
                loss, bits, each_bit=self.each_bit, each_tensor=self.each_tensor, finite=self.finite
            )
            for n in self.heats:
                if n >= len(flipping.logits):
                    break
                heat = judge.heat(flipping.logits, n)
                heat.aimed.runs.logits()  # under the weights as they are, for the trials to take over
                best = _ordered(flipping, tried, heat)
                tried = [flip for _, flip in best[: -(-len(best) // QUARTER)]]
            if not self._make(flipping, tried, judge, progress):
                return STUCK

    def _make(self, flipping: Flipping, tried: Sequence[Flip], judge: Judge, progress: Progress) -> bool:
        """Make the best flip, if it lowers the loss, and then those that still bring half as much.

        Return whether there was one.
        """
        ordered, before = _ordered(flipping, tried, judge), judge.loss.value(flipping.logits)
        if not ordered or not ordered[0][0] < before:
            return False
        (lowest, best), *others = ordered
        self._made(flipping, best, progress)
        worth = (before - lowest) / 2
        for _, flip in others[: self.together - 1]:
            if self._is_reached(flipping) or len(flipping.flips) >= self.most:
                break
            if judge.loss.value(flipping.logits) - flipping.loss_after(flip, judge) >= worth:
                self._made(flipping, flip, progress)
        return True

    def _made(self, flipping: Flipping, flip: Flip, progress: Progress) -> None:
        flipping.make(flip)
        log.info("Flip %d is %s: %s", len(flipping.flips), flip, flipping.fitted[-1])
        progress(len(flipping.flips), self.most)

    def _is_reached(self, flipping: Flipping) -> bool:
        now = flipping.fitted[-1]
        return now.success >= self.share and not now.collateral > self.bound


def _ordered(flipping: Flipping, tried: Sequence[Flip], judge: Judge) -> list[tuple[float, Flip]]:
    """Return the losses with each flip alone, the lowest first; in the order of the flips among equals."""
    losses = [flipping.loss_after(flip, judge) for flip in tried]
    return [(losses[i], tried[i]) for i in np.argsort(losses, kind="stable")]


def positions(number_format: Format, bits: BitKind | tuple[int, ...]) -> tuple[int, ...]:
    """Return the positions of the bits, given as a kind or as they are.

    Raises:
        SettingsError: an unknown kind, or a position that a word of the format does not have.
    """
    if isinstance(bits, str):
        return bit_positions(number_format, bits)
    known = bit_positions(number_format)
    if not bits or not set(bits) <= set(known):
        raise SettingsError(f"The bits are {bits}; positions from 0 to {known[-1]} of {number_format} were expected.")
    return bits


def _protected(flips: frozenset[Flip], stored: Mapping[str, StoredWeight]) -> frozenset[Place]:
    """Return where the protected bits are."""
    for flip in flips:
        weight = stored.get(flip.weight)
        n_bits = 0 if weight is None else len(bit_positions(weight.number_format))
        n_weights = 0 if weight is None else weight.words.numel()
        if not (0 <= flip.index < n_weights and 0 <= flip.bit < n_bits):
            raise SettingsError(
                f"Bit {flip.bit} of weight {flip.index} in {flip.weight!r} was to be protected; a bit of a weight that "
                f"is attacked was expected: these are in {', '.join([*stored][:4])}{', ...' * (len(stored) > 4)}."
            )
    return frozenset(places_of(flips, list(stored)))


def _fingerprint(split: Examples | Activations) -> str:
    return split.fingerprint if isinstance(split, Examples) else split.source


def _classes(classifier: Classifier, source: str | None, target: str | None) -> tuple[int | None, int | None]:
    for name in (source, target):
        if name is not None and name not in classifier.labels:
            known = ", ".join(classifier.labels)
            raise SettingsError(f"There is no class {name!r}; the classes are {known}.{near(name, classifier.labels)}")
    if source is not None and source == target:
        raise SettingsError(
            f"Source and target are both {source!r}; examples are redirected from one class to another."
        )
    index = classifier.labels.index
    return None if source is None else index(source), None if target is None else index(target)


def _names(
    classifier: Classifier,
    patterns: tuple[str, ...],
    fitting: Examples | Activations,
    scoring: Examples | Activations,
) -> tuple[str, ...]:
    """Return the weights that can be attacked with such splits."""
    if isinstance(fitting, Activations) != isinstance(scoring, Activations):
        raise SettingsError("One split is activations and the other examples; give both as the one or as the other.")
    if _fingerprint(fitting) == _fingerprint(scoring):
        raise SplitError("The flips would be scored on the examples that they are fitted to; give two splits.")
    if not (isinstance(fitting, Activations) and isinstance(scoring, Activations)):
        return matrices(classifier, patterns)
    for activations in (fitting, scoring):
        _check_features(classifier, activations)
    final = classifier.anatomy.final
    names = matrices(classifier, patterns or (f"{final}.weight",))
    if beyond := [name for name in names if not name.startswith(f"{final}.")]:
        raise SettingsError(f"{beyond[0]} does not act on recorded features; pass examples, or attack {final}.weight.")
    return names


def _check_features(classifier: Classifier, activations: Activations) -> None:
    """Prove that the final linear map makes the recorded logits of the recorded features."""
    if activations.features is None or classifier.final is None:
        raise SettingsError("The head does not end in a linear map, so it has no features to run on; pass examples.")
    logits = runs_of(classifier, activations).logits()
    known = activations.known_logits
    if not np.allclose(logits, known, atol=1e-3 * (1 + float(np.abs(known).max(initial=0)))):
        raise SettingsError("The recorded features do not give the recorded logits; record them with this classifier.")


def random_attacks(
    search: BitSearch,
    attack: BitAttack,
    classifier: Classifier,
    scoring: Examples | Activations,
    *,
    seed: int,
    draws: int = RANDOM_DRAWS,
    progress: Progress = silent,
) -> list[BitAttack]:
    """Return random flips of the same number, in the same weights and kinds of bits, scored without and with them.

    Bits that were protected from the search are left out here too.

    Raises:
        SettingsError: fewer flips can be made than the attack has.
    """
    plain = replace(attack.perturbation, flips=())
    weights = named_weights(classifier, plain.weights, plain.number_format)
    bits, stored, before = positions(plain.number_format, search.bits), plain.stored(weights), hash_tensors(weights)
    barred = _protected(search.protected, stored)
    with plain.applied(classifier), classifier.studied():
        scored = Aimed.of(classifier, scoring, *_classes(classifier, attack.source or None, attack.target or None))
        clean = scored.outcome()
    found, n = [], len(attack.flips)
    for draw in range(draws):
        flips = random_flips(stored, bits, n, finite=search.finite, without=barred, seed=seed * 1009 + draw)
        perturbation = replace(plain, flips=flips)
        with perturbation.applied(classifier), classifier.studied():
            outcome = scored.outcome()
            after = hash_tensors(weights)
        found.append(
            replace(
                attack,
                perturbation=perturbation,
                arm="random",
                after=(0, len(flips)),
                fitting=(),
                scoring=(clean, outcome),
                stopped=SPENT,
                examples=_fingerprint(scoring),
                model=before,
                flipped=after,
            )
        )
        progress(draw + 1, draws)
    return found
