"""Stored weights in place in the model, bits of which are flipped one after the other."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from synapse.attack.bits.aim import Loss, Outcome
from synapse.attack.bits.candidates import Place, best_flips
from synapse.attack.bits.runs import Aimed
from synapse.perturb.bits import Flip, StoredWeight


@dataclass(eq=False)
class Flipping:
    """Stored weights in place in the model, bits of which are flipped one after the other, and what comes of it."""

    weights: Mapping[str, Tensor]
    stored: dict[str, StoredWeight]
    fitting: Aimed
    scoring: Aimed
    flips: list[Flip] = field(default_factory=list)
    fitted: list[Outcome] = field(default_factory=list)
    scored: list[Outcome] = field(default_factory=list)
    loss: float = float("nan")

    def look(self, loss: Loss) -> None:
        """Take down what the examples say under the present weights."""
        logits = self.fitting.runs.logits()
        self.loss = loss.value(logits)
        self.fitted.append(self.fitting.aim.outcome(logits))
        self.scored.append(self.scoring.outcome())

    def candidates(
        self, loss: Loss, bits: Sequence[int], *, each_bit: int, each_tensor: int, finite: bool
    ) -> list[Flip]:
        """Return the flips that promise most and have not been made."""
        names = list(self.weights)
        gradients = self.fitting.runs.gradients(loss, list(self.weights.values()))
        made = [Place(names.index(flip.weight), flip.index, flip.bit) for flip in self.flips]
        found = best_flips(
            [self.stored[name] for name in names],
            gradients,
            bits,
            each_bit=each_bit,
            each_tensor=each_tensor,
            finite=finite,
            without=made,
        )
        return [Flip(names[place.tensor], place.weight, place.bit) for place in found.places]

    def logits_after(self, flip: Flip) -> Float[np.ndarray, "example label"]:
        """Return the fitting examples' logits with one more flip, which is taken off again."""
        stored = self.stored[flip.weight]
        index, bit = _scalar(flip.index, stored), _scalar(flip.bit, stored)
        self._write(flip, stored.values_flipped(index, bit))
        logits = self.fitting.runs.logits_with(flip.weight)
        self._write(flip, stored.values_at(index))
        return logits

    def make(self, flip: Flip) -> None:
        """Make a flip that stays."""
        stored = self.stored[flip.weight]
        index, bit = _scalar(flip.index, stored), _scalar(flip.bit, stored)
        self.stored[flip.weight] = stored.flipped(index[None], bit[None])
        self._write(flip, self.stored[flip.weight].values_at(index))
        self.flips.append(flip)

    def _write(self, flip: Flip, value: Float[Tensor, ""]) -> None:
        weight = self.weights[flip.weight]
        with torch.no_grad():
            weight[np.unravel_index(flip.index, weight.shape)] = value


def _scalar(number: int, stored: StoredWeight) -> Int[Tensor, ""]:
    return torch.tensor(number, device=stored.words.device)
