"""Which token rows the head reads, and which rows are padding: found by changing rows and watching the logits."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from synapse.errors import AnatomyError
from synapse.model.hooks import shaken
from synapse.model.trace import Inputs
from synapse.types import READOUTS, Readout

MASK = "attention_mask"
"""The usual name of the forward argument that says which tokens are there (1) and which are padding (0)."""


@dataclass(frozen=True)
class Mask:
    """The forward argument that tells padding rows: where it equals `there`, a row is no padding.

    Where a model has more rows than its mask, the mask is about the first ones (`place` is `front`: the rows behind are
    padding that the model adds) or the last ones (`back`: the rows before are tokens of the model's own).
    """

    name: str
    there: int
    place: Literal["front", "back"]


HeadLogits = Callable[[Float[Tensor, "copy token unit"]], Float[Tensor, "copy label"]]
"""Gives the logits of one example, many times, from as many last block outputs."""


@dataclass(frozen=True)
class RowWeights:
    """How much each row counts in the readout state: rows of weights sum to 1, padding counts 0."""

    readout: Readout
    mask: Mask | None

    def rows(self, inputs: Inputs, n_tokens: int) -> Bool[Tensor, "example token"]:
        """Return which rows are no padding."""
        first = next(iter(inputs.values()))
        if self.mask is None:
            return torch.ones(len(first), n_tokens, dtype=torch.bool, device=first.device)
        there: Bool[Tensor, "example given"] = inputs[self.mask.name] == self.mask.there
        further = n_tokens - there.shape[1]
        if further == 0:
            return there
        added = torch.full((len(there), further), self.mask.place == "back", device=there.device)
        return torch.cat([there, added] if self.mask.place == "front" else [added, there], dim=1)

    def __call__(self, inputs: Inputs, n_tokens: int) -> Float[Tensor, "example token"]:
        """Return the weight of every row of every example."""
        return weights_of(self.readout, self.rows(inputs, n_tokens))


def weights_of(readout: Readout, there: Bool[Tensor, "example token"]) -> Float[Tensor, "example token"]:
    """Return the weights of the rows, given which of them are no padding."""
    position = torch.arange(there.shape[1], device=there.device)
    if readout == "last":
        return (position == (position * there).argmax(dim=1, keepdim=True)).float()
    if readout in ("first", "first-two"):
        return (position < (1 if readout == "first" else 2)).float().expand(there.shape) / (
            1 if readout == "first" else 2
        )
    read = there.float()
    if readout == "mean":
        return read / read.sum(dim=1, keepdim=True)
    rest = read * (position > 0)
    rest = rest / rest.sum(dim=1, keepdim=True).clamp(min=1)
    return rest if readout == "mean-but-first" else (rest + (position == 0)) / 2


@dataclass(frozen=True, eq=False)
class ReadoutTrial:
    """Tries readouts on one example: `there` says which of its rows are no padding, `states` is the last block's
    output."""

    there: Bool[Tensor, "token"]
    states: Float[Tensor, "token unit"]
    head_logits: HeadLogits

    def find(self) -> Readout:
        """Return the readout that holds.

        Raises:
            AnatomyError: none does; the message says which rows were seen to move the logits.
        """
        for readout in READOUTS:
            if self.holds(readout):
                return readout
        n_tokens = len(self.states)
        sample = torch.linspace(0, n_tokens - 1, min(n_tokens, 64), device=self.states.device).long()
        seen = sample[self._moves(self._each_changed(sample))].tolist()
        raise AnatomyError(
            f"The head reads the rows {_listed(seen)} of {n_tokens}, not all of them alike; the first row ([CLS]), the "
            "last that is no padding, the first two, or a mean over rows was expected. Name the one that comes nearest "
            f"with `readout=` ({', '.join(READOUTS)})."
        )

    def holds(self, readout: Readout) -> bool:
        """Whether the rows of this readout, and no others, move the logits, and as it says.

        All that it says is not read is changed at once, and must not matter; a sample of what it says is read is
        changed row by row, and each must matter; rows that it says are read alike are rolled around, and the logits
        must stay.
        """
        read = weights_of(readout, self.there[None])[0] > 0
        if not read.any() or ((~read).any() and self._moves(_changed(self.states, ~read)[None])[0]):
            return False
        rows = torch.nonzero(read).flatten()
        sample = rows[torch.linspace(0, len(rows) - 1, min(len(rows), 8)).long()]
        if not self._moves(self._each_changed(sample)).all():
            return False
        if readout in ("first", "last", "first-two"):
            return True
        alike = rows[1:] if readout == "first-and-mean" else rows
        rolled = self.states.clone()
        rolled[alike] = self.states[alike.roll(1)]
        return not self._moves(rolled[None])[0]

    def _each_changed(self, rows: Int[Tensor, "copy"]) -> Float[Tensor, "copy token unit"]:
        """Return a copy of the states for each row, with that row changed."""
        position = torch.arange(len(self.states), device=self.states.device)
        return torch.stack([_changed(self.states, position == row) for row in rows])

    def _moves(self, changed: Float[Tensor, "copy token unit"]) -> Bool[Tensor, "copy"]:
        clean = self.head_logits(self.states[None])[0]
        return (self.head_logits(changed) - clean).abs().amax(dim=1) > 1e-4 * (1 + clean.abs().max())


def _changed(states: Float[Tensor, "token unit"], rows: Bool[Tensor, "token"]) -> Float[Tensor, "token unit"]:
    """Return the states with the given rows changed, each by another amount: equal changes could cancel."""
    strength = 1 + 0.5 * torch.cos(torch.arange(len(states), device=states.device).float())
    return torch.where(rows[:, None], shaken(states, strength[:, None]), states)


def _listed(rows: list[int]) -> str:
    return f"{rows}" if len(rows) <= 8 else f"{rows[:6]} and {len(rows) - 6} more"
