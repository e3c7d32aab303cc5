"""Which token rows the head reads, and which rows are padding: found by changing rows and watching the logits."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
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


def find_readout(there: Bool[Tensor, "token"], states: Float[Tensor, "token unit"], head_logits: HeadLogits) -> Readout:
    """Return which rows of the last block's output move the logits, and whether they do so alike.

    `there` says which rows of the example are no padding. All that the hypothesis says is not read is changed at once,
    and must not matter; a sample of what it says is read is changed row by row, and each must matter; rows that it says
    are read alike are rolled around, and the logits must stay.

    Raises:
        AnatomyError: no hypothesis holds; the message says which rows were seen to move the logits.
    """
    clean = head_logits(states[None])[0]
    tolerance = _tolerance(clean)

    def moves(changed: Float[Tensor, "copy token unit"]) -> Bool[Tensor, "copy"]:
        return (head_logits(changed) - clean).abs().amax(dim=1) > tolerance

    for readout in READOUTS:
        read = weights_of(readout, there[None])[0] > 0
        if not read.any() or ((~read).any() and moves(_changed(states, ~read)[None])[0]):
            continue
        rows = torch.nonzero(read).flatten()
        sample = rows[torch.linspace(0, len(rows) - 1, min(len(rows), 8)).long()]
        each = torch.stack([_changed(states, torch.arange(len(states), device=states.device) == r) for r in sample])
        if not moves(each).all():
            continue
        alike = rows[1:] if readout == "first-and-mean" else rows
        rolled = states.clone()
        rolled[alike] = states[alike.roll(1)]
        is_ordered = readout in ("first", "last") or not moves(rolled[None])[0]
        if is_ordered:
            return readout
    n_tokens = len(states)
    sample = torch.linspace(0, n_tokens - 1, min(n_tokens, 64), device=states.device).long()
    each = torch.stack([_changed(states, torch.arange(n_tokens, device=states.device) == row) for row in sample])
    seen = sample[moves(each)].tolist()
    raise AnatomyError(
        f"The head reads the rows {_listed(seen)} of {n_tokens}, not all of them alike; the first row ([CLS]), the "
        "last that is no padding, the first two, or a mean over rows was expected. Name the one that comes nearest "
        f"with `readout=` ({', '.join(READOUTS)})."
    )


def _changed(states: Float[Tensor, "token unit"], rows: Bool[Tensor, "token"]) -> Float[Tensor, "token unit"]:
    """Return the states with the given rows changed, each by another amount: equal changes could cancel."""
    strength = 1 + 0.5 * torch.cos(torch.arange(len(states), device=states.device).float())
    return torch.where(rows[:, None], shaken(states, strength[:, None]), states)


def _tolerance(logits: Tensor) -> float:
    return float(1e-4 * (1 + logits.abs().max()))


def _listed(rows: list[int]) -> str:
    return f"{rows}" if len(rows) <= 8 else f"{rows[:6]} and {len(rows) - 6} more"
