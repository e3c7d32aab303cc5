"""Bits of stored weights flipped at random: what faults of the memory do that nobody aims."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from synapse.errors import SettingsError
from synapse.perturb.bits import BitKind, Format, StoredWeight, bit_positions
from synapse.perturb.weights import WeightPerturbation

FORMAT_OF: Mapping[torch.dtype, Format] = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}
"""The number format in which a model holds weights of a type."""


@dataclass(frozen=True)
class RandomFlips(WeightPerturbation):
    """Flips bits of one kind at random in the weights of a place, as they are stored: `rate` flips for each weight.

    So many flips as that makes of all its weights together, to the nearest one; no bit is flipped twice. What a flip
    makes of a weight may be infinite or no number at all: that is an outcome, not an error. For flips that are searched
    for see `synapse.attack.bits`.
    """

    rate: float
    kind: BitKind = "all"
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be, once and where it is given.

        Raises:
            SettingsError: a rate that is none, or an unknown kind of bits.
        """
        if not 0 <= self.rate <= 1:
            raise SettingsError(f"The rate of flips is {self.rate}; a number from 0 to 1 was expected.")
        bit_positions("float32", self.kind)

    def changed(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the matrices with their bits flipped; the draw depends on the seed and the sizes of the matrices.

        Raises:
            SettingsError: weights that are held in another type than float32, float16 or bfloat16.
        """
        number_format = _format(weights)
        bits = np.array(bit_positions(number_format, self.kind))
        starts = np.cumsum([0, *(weight.numel() for weight in weights.values())])
        drawn = np.random.default_rng(self.seed).choice(
            int(starts[-1]) * len(bits), size=round(self.rate * int(starts[-1])), replace=False, shuffle=False
        )
        index, which = np.divmod(drawn, len(bits))
        flipped = {}
        for start, end, (name, weight) in zip(starts[:-1], starts[1:], weights.items(), strict=True):
            mine = (start <= index) & (index < end)
            place, bit = (torch.from_numpy(each).to(weight.device) for each in (index[mine] - start, bits[which[mine]]))
            flipped[name] = StoredWeight.of(weight, number_format).flipped(place, bit).values()
        return flipped


def _format(weights: Mapping[str, Tensor]) -> Format:
    kinds = {weight.dtype for weight in weights.values()}
    if len(kinds) > 1 or not kinds <= set(FORMAT_OF):
        seen = " and ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
        raise SettingsError(
            f"The weights are held in {seen}; bits are flipped in one of float32, float16 and bfloat16. Load the model "
            'with dtype="float32".'
        )
    return FORMAT_OF[kinds.pop()]
