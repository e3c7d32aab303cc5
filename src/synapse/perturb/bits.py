"""Weights as the bits in which they are stored, and a perturbation that flips some of these bits.

A number format stores a weight as a word of bits; a flip is the XOR of a word with one bit, and the budget of several
flips is their Hamming distance, the popcount of the XOR. What a flip makes of a weight may be infinite or no number at
all: that is an outcome, not an error.

| format | word | value of a word |
|---|---|---|
| `float32`, `float16`, `bfloat16` | 32, 16, 16 bits | IEEE 754 (bfloat16: the upper half of float32) |
| `int8` | 8 bits, two's complement | word times the scale of its row, which is max abs(w) / 127 |

In `int8` the rows are those of the first axis, a vector is one row, and a weight is rounded to the nearest word, half
to even; a row of zeros has the scale 0. The word -128 is not used, but a flip may reach it. Scales are not attacked.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from synapse.errors import SettingsError, near
from synapse.model.classifier import Classifier
from synapse.perturb.weights import put_back

Format = Literal["float32", "float16", "bfloat16", "int8"]
"""How weights are stored."""
FORMATS: tuple[Format, ...] = get_args(Format)

BitKind = Literal["all", "sign", "exponent", "mantissa"]
"""Which bits of a word: in `int8` the highest is the sign, and the others count as its mantissa."""
BIT_KINDS: tuple[BitKind, ...] = get_args(BitKind)

_WORDS = {"float32": torch.int32, "float16": torch.int16, "bfloat16": torch.int16, "int8": torch.int8}
"""Signed types of the words' width, which torch can compute with; only their bits count."""
_FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_MANTISSA = {"float32": 23, "float16": 10, "bfloat16": 7, "int8": 7}


def bit_positions(number_format: Format, kind: BitKind = "all") -> tuple[int, ...]:
    """Return the positions of the bits of a kind in a word; 0 is the least significant.

    Raises:
        SettingsError: an unknown format or kind, or a kind that the format has none of.
    """
    if number_format not in FORMATS:
        raise SettingsError(
            f"There is no number format {number_format!r}; there are {', '.join(FORMATS)}."
            f"{near(number_format, FORMATS)}"
        )
    if kind not in BIT_KINDS:
        raise SettingsError(f"There are no bits {kind!r}; there are {', '.join(BIT_KINDS)}.{near(kind, BIT_KINDS)}")
    n_bits, mantissa = _n_bits(number_format), _MANTISSA[number_format]
    first, last = {"all": (0, n_bits), "sign": (n_bits - 1, n_bits), "exponent": (mantissa, n_bits - 1)}.get(
        kind, (0, mantissa)
    )
    if first == last:
        raise SettingsError(f"{number_format!r} has no {kind} bits; choose 'all', 'sign' or 'mantissa'.")
    return tuple(range(first, last))


def _n_bits(number_format: Format) -> int:
    return _WORDS[number_format].itemsize * 8


@lru_cache
def _bit_masks(number_format: Format) -> Int[Tensor, "bit"]:
    """Return the word in which only bit b is set, for every b."""
    n_bits = _n_bits(number_format)
    masks = np.left_shift(np.uint64(1), np.arange(n_bits, dtype=np.uint64)).astype(f"uint{n_bits}")
    return torch.from_numpy(masks.view(f"int{n_bits}"))


@dataclass(frozen=True, eq=False)
class StoredWeight:
    """One weight tensor as it is stored.

    `words` holds the bits of every weight, flat, in a signed integer of the format's width; `scale` that of every row
    in `int8`. `shape` is that of the tensor.
    """

    words: Int[Tensor, "weight"]
    number_format: Format
    shape: tuple[int, ...]
    scale: Float[Tensor, "row"] | None = None

    @classmethod
    def of(cls, weight: Float[Tensor, "*shape"], number_format: Format) -> "StoredWeight":
        """Return the weight in a format: the nearest word of each number, half to even."""
        values, shape = weight.detach().float(), tuple(weight.shape)
        if number_format != "int8":
            words = values.to(_FLOATS[number_format]).contiguous().view(_WORDS[number_format])
            return cls(words.flatten().clone(), number_format, shape)
        rows = values.reshape(shape[0], -1) if values.ndim > 1 else values.reshape(1, -1)
        scale = rows.abs().amax(dim=1) / 127
        steps = rows / torch.where(scale > 0, scale, 1.0)[:, None]
        return cls(steps.round().clamp(-127, 127).to(torch.int8).flatten(), number_format, shape, scale)

    @property
    def unsigned(self) -> np.ndarray:
        """The words as unsigned integers, in the tensor's shape."""
        return self.words.cpu().numpy().view(f"uint{_n_bits(self.number_format)}").reshape(self.shape)

    def values(self) -> Float[Tensor, "*shape"]:
        """Return the weights that the words stand for, in float32."""
        if self.scale is None:
            return self._decoded(self.words.clone(), None).reshape(self.shape)  # float32 is a view of its words
        return self._decoded(self.words.reshape(len(self.scale), -1), self.scale[:, None]).reshape(self.shape)

    def values_at(self, index: Int[Tensor, "*place"]) -> Float[Tensor, "*place"]:
        """Return the weights at some places, in float32; `index` counts them row by row."""
        return self._decoded(self.words[index], self._scale_at(index))

    def values_flipped(self, index: Int[Tensor, "*#flip"], bit: Int[Tensor, "*#flip"]) -> Float[Tensor, "..."]:
        """Return what each single flip makes of its weight, in float32; index and bit broadcast."""
        words = self.words[index] ^ _bit_masks(self.number_format).to(self.words.device)[bit]
        return self._decoded(words, self._scale_at(index))

    def flipped(self, index: Int[Tensor, "flip"], bit: Int[Tensor, "flip"]) -> "StoredWeight":
        """Return the weight with all of these bits flipped; no (index, bit) may occur twice."""
        masks = torch.zeros_like(self.words)
        # Distinct bits of a word: their sum is their union.
        masks.index_put_((index,), _bit_masks(self.number_format).to(masks.device)[bit], accumulate=True)
        return replace(self, words=self.words ^ masks)

    def distance(self, other: "StoredWeight") -> int:
        """Return the Hamming distance, the number of bits that differ: the popcount of the XOR."""
        return int(np.bitwise_count(self.unsigned ^ other.unsigned).sum())

    def _scale_at(self, index: Int[Tensor, "*place"]) -> Float[Tensor, "*place"] | None:
        if self.scale is None:
            return None
        return self.scale[index // max(1, self.words.numel() // max(1, len(self.scale)))]

    def _decoded(self, words: Tensor, scale: Tensor | None) -> Tensor:
        if scale is None:
            return words.view(_FLOATS[self.number_format]).float()
        return words.float().mul_(scale)


def matrices(classifier: Classifier, patterns: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the names of the weight matrices whose names match a pattern (`*.query.weight`), by default of all.

    Vectors, which are biases and norms, are left out unless a pattern names them exactly.

    Raises:
        SettingsError: a pattern that matches nothing.
    """
    floats = {name: p for name, p in classifier.module.named_parameters() if p.is_floating_point()}
    matching = [name for name, p in floats.items() if p.ndim >= 2]
    found = set(matching)
    for pattern in patterns:
        if pattern not in floats and not any(fnmatchcase(name, pattern) for name in matching):
            raise SettingsError(f"No weight is called {pattern!r}.{near(pattern, floats)}")
    if patterns:
        found = {name for name in matching if any(fnmatchcase(name, p) for p in patterns)} | (
            set(patterns) & set(floats)
        )
    return tuple(name for name in floats if name in found)


def named_weights(classifier: Classifier, names: Sequence[str], number_format: Format) -> dict[str, Tensor]:
    """Return the parameters of these names.

    Raises:
        SettingsError: a name that is not there, or a parameter whose own type cannot hold the format's values.
    """
    floats = {name: p for name, p in classifier.module.named_parameters() if p.is_floating_point()}
    for name in names:
        if name not in floats:
            raise SettingsError(f"There is no weight {name!r}.{near(name, floats)}")
        own = floats[name].dtype
        if own not in (torch.float32, torch.float64) and own != _FLOATS.get(number_format):
            raise SettingsError(
                f"{name} is computed with in {str(own).removeprefix('torch.')}, which cannot hold what {number_format} "
                'stores; load the model with dtype="float32".'
            )
    return {name: floats[name] for name in names}


@dataclass(frozen=True, order=True)
class Flip:
    """One bit of one weight: the parameter's name, the weight's place in it row by row, and the bit (0: lowest)."""

    weight: str
    index: int
    bit: int


@dataclass(frozen=True)
class BitFlips:
    """Stores weights in a number format and flips bits of them; `with classifier.edited(BitFlips(...)):` applies it.

    `weights` are the names of the parameters that are stored in the format, whether flipped or not; without `flips` it
    is the format alone. The model computes with the stored values. At the end the saved weights are copied back and
    compared by SHA-256 with what they were. The budget is `len(flips)`, the Hamming distance.
    """

    number_format: Format
    weights: tuple[str, ...]
    flips: tuple[Flip, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what cannot be, once and where it is given.

        Raises:
            SettingsError: an unknown format, no or repeated weights, a flip that occurs twice, or one of another weight
                or of a bit that a word does not have.
        """
        n_bits = len(bit_positions(self.number_format))
        if not self.weights or len(set(self.weights)) < len(self.weights):
            raise SettingsError(f"{len(self.weights)} weights are named; one or more, each once, were expected.")
        if len(set(self.flips)) < len(self.flips):
            raise SettingsError("A bit is flipped twice, which leaves it as it was; drop both flips.")
        known = set(self.weights)
        for flip in self.flips:
            if flip.weight not in known or not 0 <= flip.bit < n_bits or flip.index < 0:
                raise SettingsError(
                    f"Bit {flip.bit} of weight {flip.index} in {flip.weight!r} was to be flipped; bits 0 to "
                    f"{n_bits - 1} of {', '.join(self.weights[:4])}{', ...' * (len(self.weights) > 4)} were expected."
                )

    def to_dict(self) -> dict[str, Any]:
        """Return the perturbation as plain JSON values; `BitFlips.from_dict(x.to_dict()) == x`."""
        return {**asdict(self), "weights": list(self.weights), "flips": [asdict(flip) for flip in self.flips]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "BitFlips":
        """Return the perturbation that `to_dict` wrote.

        Raises:
            SettingsError: missing or unknown entries, or what cannot be.
        """
        try:
            given = dict(values)
            flips = tuple(Flip(**flip) for flip in given.pop("flips"))
            return cls(flips=flips, weights=tuple(given.pop("weights")), **given)
        except (KeyError, TypeError) as error:
            raise SettingsError(
                f"Bit flips were given with {', '.join(values)}; number_format, weights and flips (each with weight, "
                "index, bit) were expected."
            ) from error

    def stored(self, weights: Mapping[str, Tensor]) -> dict[str, StoredWeight]:
        """Return the weights as they are stored, flips made.

        Raises:
            SettingsError: a flip of a weight beyond the last one of its tensor.
        """
        stored = {name: StoredWeight.of(weight, self.number_format) for name, weight in weights.items()}
        for name in dict.fromkeys(flip.weight for flip in self.flips):
            index, bit = zip(*((flip.index, flip.bit) for flip in self.flips if flip.weight == name), strict=True)
            if max(index) >= (n := weights[name].numel()):
                raise SettingsError(f"Weight {max(index)} of {name} was to be flipped; it has 0 to {n - 1}.")
            device = weights[name].device
            stored[name] = stored[name].flipped(torch.tensor(index, device=device), torch.tensor(bit, device=device))
        return stored

    @contextmanager
    def applied(self, classifier: Classifier) -> Iterator[None]:
        """Hold the stored and flipped weights while the context is open.

        Raises:
            SettingsError: a weight that is not there, or whose own type cannot hold the format's values.
            RestoreError: the weights could not be put back bit for bit.
        """
        weights = named_weights(classifier, self.weights, self.number_format)
        with put_back(weights, "The weights", type(self).__name__) as saved:
            with torch.no_grad():
                for name, weight in self.stored(saved).items():
                    weights[name].copy_(weight.values())
            yield
