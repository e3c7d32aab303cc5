"""Which flips promise most, of all bits of all weights, and flips at random.

All bits of all weights are scored in chunks, so that memory is that of a chunk, a few megabytes, and a copy of the
gradient of one tensor.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from synapse.errors import ModelError, SettingsError
from synapse.perturb.bits import Flip, StoredWeight

CHUNK = 1 << 14
"""Weights whose flips are scored at once: all bits of them stay in a core's cache."""


class Place(NamedTuple):
    """A bit by the position of its tensor among those that are attacked, of its weight in it, and its own."""

    tensor: int
    weight: int
    bit: int


def places_of(flips: Iterable[Flip], names: Sequence[str]) -> list[Place]:
    """Return where flips are, among tensors of these names."""
    number = {name: position for position, name in enumerate(names)}
    return [Place(number[flip.weight], flip.index, flip.bit) for flip in flips]


@dataclass(frozen=True, eq=False)
class Candidates:
    """Flips that promise most, in order of their places.

    `promise` is how much the loss falls to first order; infinite where the flip makes a weight NaN or infinite.
    """

    places: tuple[Place, ...]
    promise: Float[np.ndarray, "flip"]

    def __len__(self) -> int:
        return len(self.places)


def best_flips(
    stored: Sequence[StoredWeight],
    gradients: Sequence[Float[Tensor, "..."]],
    bits: Sequence[int],
    *,
    each_bit: int,
    each_tensor: int = 0,
    finite: bool = True,
    without: Iterable[Place] = (),
) -> Candidates:
    """Return the flips with the largest first-order fall of the loss, -g * (w' - w).

    These are the `each_bit` best of every bit position and, in each tensor, the best bits of the `each_tensor` best
    weights. All weights are scored, in chunks of `CHUNK`; nothing of the size of weights times bits is kept. Equal
    promises go to the lower place. With `finite`, flips whose value is NaN or infinite are left out; `without` (those
    that are made already, and those of protected bits) are left out too.

    Raises:
        ModelError: a gradient is not finite.
    """
    # The largest gradient becomes 1, so that its product with a change up to 3e38 stays finite.
    size = max((float(gradient.abs().max()) for gradient in gradients if gradient.numel()), default=0.0)
    if not np.isfinite(size):
        raise ModelError("The gradient of the loss is not finite, so flips cannot be ranked by it; leave some out.")
    size = size or 1.0
    bits, offsets = sorted(set(bits)), offsets_of(stored)
    barred = np.array(sorted(place for place in without if place.bit in bits), dtype=np.int64).reshape(-1, 3)
    of_bits = _Best(len(bits), each_bit)
    found: list[tuple[float, Place]] = []
    for number, (weight, gradient) in enumerate(zip(stored, gradients, strict=True)):
        in_tensor = torch.from_numpy(barred[barred[:, 0] == number, 1:]).to(gradient.device)
        promises = _Promises(
            weight, gradient.flatten() / -size, torch.tensor(bits, device=gradient.device), finite, in_tensor
        )
        of_tensor = _Best(1, each_tensor)
        for start in range(0, gradient.numel(), CHUNK):
            index = torch.arange(start, min(start + CHUNK, gradient.numel()), device=gradient.device)
            promise = promises.of(index)
            of_bits.offer(promise, int(offsets[number]) + start)
            if each_tensor:
                of_tensor.offer(promise.amax(dim=0, keepdim=True), start)
        if each_tensor:
            found += _best_bits(promises, number, of_tensor.places(0), bits)
    for row, bit in enumerate(bits):
        places = of_bits.places(row)
        tensor = np.searchsorted(offsets, places, side="right") - 1
        index = (places - offsets[tensor]).tolist()
        named = [Place(t, i, bit) for t, i in zip(tensor.tolist(), index, strict=True)]
        found += zip(of_bits.promise[row].tolist(), named, strict=False)
    largest = {place: promise * size for promise, place in found}
    order = sorted(largest)
    return Candidates(tuple(order), np.array([largest[place] for place in order]))


@dataclass(frozen=True, eq=False)
class _Promises:
    """The promises of flips in one tensor: `downhill` is the negative gradient, flat.

    `barred` flips, as weight and bit, in the order of the weights, may not be made.
    """

    weight: StoredWeight
    downhill: Float[Tensor, "weight"]
    bits: Int[Tensor, "bit"]
    finite: bool
    barred: Int[Tensor, "barred 2"]

    def of(self, index: Int[Tensor, "chosen"]) -> Float[Tensor, "bit chosen"]:
        """Return the promise of every bit of some weights, in their order; -infinity where a flip may not be made."""
        values = self.weight.values_flipped(index[None], self.bits[:, None])
        promise = values.sub_(self.weight.values_at(index)).mul_(self.downhill[index])
        beyond = -torch.inf if self.finite else torch.inf
        promise.nan_to_num_(nan=beyond, posinf=beyond, neginf=-torch.inf)
        if len(self.barred):
            weight, bit = self.barred[torch.isin(self.barred[:, 0], index)].T.contiguous()
            promise[torch.searchsorted(self.bits, bit), torch.searchsorted(index, weight)] = -torch.inf
        return promise


def _best_bits(
    promises: _Promises, number: int, index: Int[np.ndarray, "chosen"], bits: Sequence[int]
) -> list[tuple[float, Place]]:
    """Return the best bit of each of some weights."""
    index = np.sort(index)
    table = promises.of(torch.from_numpy(index).to(promises.bits.device)).cpu().numpy()
    best = table.argmax(axis=0)
    largest = table[best, np.arange(len(index))]
    return [(float(largest[i]), Place(number, int(index[i]), bits[best[i]])) for i in range(len(index))]


def offsets_of(stored: Sequence[StoredWeight]) -> Int[np.ndarray, "boundary"]:
    """Return where each tensor begins among all weights, and where the last one ends."""
    return np.cumsum([0, *(weight.words.numel() for weight in stored)])


class _Best:
    """The largest promises of every row seen so far, largest first, and their places."""

    def __init__(self, n_rows: int, n: int) -> None:
        self.promise = np.full((n_rows, n), -np.inf, dtype=np.float32)
        self.place = np.full((n_rows, n), -1, dtype=np.int64)

    def places(self, row: int) -> Int[np.ndarray, "place"]:
        """Return the places of a row that are taken, best first."""
        taken: Int[np.ndarray, "place"] = self.place[row, self.promise[row] > -np.inf]
        return taken

    def offer(self, promise: Float[Tensor, "row weight"], first: int) -> None:
        """Take over what is better than the worst that is kept, of weights that follow one another from `first` on."""
        if self.promise.shape[1] == 0:
            return
        worst = self.promise[:, -1]
        rows = np.flatnonzero(promise.amax(dim=1).cpu().numpy() > worst)
        if len(rows) == 0:
            return
        offered = promise.cpu().numpy()[rows]
        columns = np.flatnonzero((offered > worst[rows, None]).any(axis=0))
        joined = np.concatenate([self.promise[rows], offered[:, columns]], axis=1)
        places = np.concatenate([self.place[rows], np.broadcast_to(first + columns, (len(rows), len(columns)))], axis=1)
        # Stable, and what is kept comes first: among equals the lower place stays.
        order = np.argsort(-joined, axis=1, kind="stable")[:, : self.promise.shape[1]]
        self.promise[rows] = np.take_along_axis(joined, order, axis=1)
        self.place[rows] = np.take_along_axis(places, order, axis=1)


def random_flips(
    stored: Mapping[str, StoredWeight],
    bits: Sequence[int],
    n: int,
    *,
    finite: bool = True,
    without: Iterable[Place] = (),
    seed: int,
) -> tuple[Flip, ...]:
    """Return n distinct flips, each bit of each weight with the same chance, in random order.

    With `finite`, flips whose value is NaN or infinite are left out; `without` are left out too.

    Raises:
        SettingsError: there are not so many.
    """
    names = list(stored)
    offsets = offsets_of(list(stored.values()))
    total = int(offsets[-1]) * len(bits)
    row = {bit: number for number, bit in enumerate(bits)}
    barred = [(offsets[p.tensor] + p.weight) * len(bits) + row[p.bit] for p in without if p.bit in row]
    # Twice as many, since some may be left out; where that is not enough, all there are.
    for size in (min(total, 2 * n + 16), total):
        drawn = np.random.default_rng(seed).choice(total, size, replace=False)
        place, bit = drawn // len(bits), np.asarray(bits)[drawn % len(bits)]
        tensor = np.searchsorted(offsets, place, side="right") - 1
        index = place - offsets[tensor]
        allowed = ~np.isin(drawn, np.array(barred, dtype=np.int64))
        if finite:
            allowed &= _is_finite(stored, tensor, index, bit)
        kept = np.flatnonzero(allowed)[:n]
        if len(kept) == n:
            return tuple(Flip(names[tensor[i]], int(index[i]), int(bit[i])) for i in kept)
    raise SettingsError(f"{n} random flips were asked for, and only {len(kept)} can be made; ask for fewer.")


def _is_finite(
    stored: Mapping[str, StoredWeight],
    tensor: Int[np.ndarray, "flip"],
    index: Int[np.ndarray, "flip"],
    bit: Int[np.ndarray, "flip"],
) -> Bool[np.ndarray, "flip"]:
    finite = np.zeros(len(tensor), dtype=bool)
    for number, weight in enumerate(stored.values()):
        members = np.flatnonzero(tensor == number)
        device = weight.words.device
        places = torch.from_numpy(index[members]).to(device), torch.from_numpy(bit[members]).to(device)
        finite[members] = torch.isfinite(weight.values_flipped(*places)).cpu().numpy()
    return finite
