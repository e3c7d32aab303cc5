"""Stored weights in place in the model, bits of which are flipped one after the other."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from synapse.attack.bits.aim import Loss, Outcome
from synapse.attack.bits.candidates import Place, best_flips, places_of
from synapse.attack.bits.runs import Aimed
from synapse.perturb.bits import Flip, StoredWeight

HOPELESS = 20.0
"""A flip that promises so many times less than the best of the same bit is not tried."""


@dataclass(frozen=True, eq=False)
class Judge:
    """Fitting examples, and the loss by which they judge flips."""

    aimed: Aimed
    loss: Loss

    def heat(self, logits: Float[np.ndarray, "example label"], n: int) -> "Judge":
        """Return a judge with n of the examples, whose loss is an estimate of this one's.

        They are of four kinds: attacked or not, and lacking something under these logits or not. Where there are so
        many, there are equally many of each, and each stands for all of its kind, so that the few that matter are seen.
        """
        lacks = np.isin(np.arange(len(logits)), self.loss.lacking(logits))
        of_aim = (self.aimed.aim.attacked, self.aimed.aim.others)
        kinds = [np.flatnonzero(one & is_lacking) for one in of_aim for is_lacking in (lacks, ~lacks)]
        sizes = _evenly(n, [len(kind) for kind in kinds])
        taken = [kind[np.arange(k) * len(kind) // max(1, k)] for kind, k in zip(kinds, sizes, strict=True)]
        times = [np.full(k, len(kind) / max(1, k)) for kind, k in zip(kinds, sizes, strict=True)]
        examples = np.concatenate(taken)
        return Judge(self.aimed.take(examples), self.loss.part(examples, np.concatenate(times)))


def _evenly(n: int, capacities: Sequence[int]) -> list[int]:
    """Return numbers that add up to n, as equal as the capacities allow."""
    given, left = [0] * len(capacities), n
    for rank, kind in enumerate(np.argsort(capacities, kind="stable").tolist()):
        given[kind] = min(capacities[kind], left // (len(capacities) - rank))
        left -= given[kind]
    return given


@dataclass(eq=False)
class Flipping:
    """Stored weights in place in the model, bits of which are flipped one after the other, and what comes of it.

    No flip is made at a place in `protected`. `logits` are those of the fitting examples under the present weights.
    """

    weights: Mapping[str, Tensor]
    stored: dict[str, StoredWeight]
    fitting: Aimed
    scoring: Aimed
    protected: Collection[Place] = ()
    flips: list[Flip] = field(default_factory=list)
    fitted: list[Outcome] = field(default_factory=list)
    scored: list[Outcome] = field(default_factory=list)
    logits: Float[np.ndarray, "example label"] = field(default_factory=lambda: np.empty((0, 0), dtype=np.float32))

    def look(self) -> None:
        """Take down what the examples say under the present weights."""
        self.logits = self.fitting.runs.logits()
        self.fitted.append(self.fitting.aim.outcome(self.logits))
        self.scored.append(self.scoring.outcome())

    def candidates(
        self, loss: Loss, bits: Sequence[int], *, each_bit: int, each_tensor: int, finite: bool
    ) -> list[Flip]:
        """Return the flips that promise most and may still be made, without hopeless ones."""
        names = list(self.weights)
        gradients = self.fitting.runs.gradients(loss, loss.lacking(self.logits), list(self.weights.values()))
        made = places_of(self.flips, names)
        found = best_flips(
            [self.stored[name] for name in names],
            gradients,
            bits,
            each_bit=each_bit,
            each_tensor=each_tensor,
            finite=finite,
            without={*made, *self.protected},
        )
        promises = found.promise.clip(max=loss.value(self.logits))  # the loss cannot fall by more
        best = {place.bit: promise for promise, place in sorted(zip(promises.tolist(), found.places, strict=True))}
        return [
            Flip(names[place.tensor], place.weight, place.bit)
            for promise, place in zip(promises.tolist(), found.places, strict=True)
            if promise >= best[place.bit] / HOPELESS
        ]

    def loss_after(self, flip: Flip, judge: Judge) -> float:
        """Return the loss with one more flip, which is taken off again."""
        stored = self.stored[flip.weight]
        index, bit = _scalar(flip.index, stored), _scalar(flip.bit, stored)
        self._write(flip, stored.values_flipped(index, bit))
        logits = judge.aimed.runs.logits_with(flip.weight)
        self._write(flip, stored.values_at(index))
        return judge.loss.value(logits)

    def make(self, flip: Flip) -> None:
        """Make a flip that stays, and look."""
        stored = self.stored[flip.weight]
        index, bit = _scalar(flip.index, stored), _scalar(flip.bit, stored)
        self.stored[flip.weight] = stored.flipped(index[None], bit[None])
        self._write(flip, self.stored[flip.weight].values_at(index))
        self.flips.append(flip)
        self.look()

    def _write(self, flip: Flip, value: Float[Tensor, ""]) -> None:
        weight = self.weights[flip.weight]
        with torch.no_grad():
            weight[np.unravel_index(flip.index, weight.shape)] = value


def _scalar(number: int, stored: StoredWeight) -> Int[Tensor, ""]:
    return torch.tensor(number, device=stored.words.device)
