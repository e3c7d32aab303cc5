"""The attention of the blocks: what it was in a clean pass, and how one row alone repeats it.

Every model whose attention goes through PyTorch's `scaled_dot_product_attention` is seen here, at that function: one
place for encoders and decoders, absolute and rotary positions, with no code for an architecture. Queries of the rows
that changed meet the keys and values of those that did not.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One call of scaled dot-product attention: `key[b, h, j]` is what query row i of head h may look at.

    `mask` is boolean (true: may look) or added to the scores, and broadcasts to (example, head, query, token); with
    `is_causal` row i looks at the rows up to i.
    """

    query: Float[Tensor, "example head query unit"]
    key: Float[Tensor, "example key_head token unit"]
    value: Float[Tensor, "example key_head token value_unit"]
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    def is_of_all_rows(self, n_examples: int) -> bool:
        """Whether every row of every example looks at the rows of that example: not at those of a window, say."""
        shapes = self.query.shape, self.key.shape
        are_known = all(len(shape) == 4 and shape[0] == n_examples for shape in shapes)
        return are_known and shapes[0][2] == shapes[1][2] and self.dropout_p == 0


@dataclass(frozen=True, eq=False)
class Attended:
    """Keys and values that the queries of one row a run look at.

    `bias` is added to the scores of that row: (1 or example, 1 or head, 1, token).
    """

    key: Float[Tensor, "example head token unit"]
    value: Float[Tensor, "example head token value_unit"]
    bias: Tensor
    scale: float


@dataclass(frozen=True, eq=False)
class BlockAttention:
    """The attention of one block in a clean pass, all rows of it.

    `looks[i, j]` says whether row i looks at row j, (1 or example, token, token).
    """

    call: AttentionCall

    @property
    def looks(self) -> Bool[Tensor, "any token token"]:
        """Which row looks at which, in any head."""
        n_tokens = self.call.key.shape[2]
        everywhere = torch.ones(1, n_tokens, n_tokens, dtype=torch.bool, device=self.call.key.device)
        mask = self.call.attn_mask
        if mask is None:
            return everywhere.tril() if self.call.is_causal else everywhere
        if mask.dtype != torch.bool:
            # The library masks with the lowest number there is, or with minus infinity.
            mask = mask > torch.finfo(mask.dtype).min / 2
        mask = mask.reshape((1,) * (4 - mask.ndim) + tuple(mask.shape))
        return everywhere & mask.any(dim=1)

    def at(self, rows: Int[Tensor, "example"]) -> Attended:
        """Return what the given row of every example looks at."""
        call = self.call
        groups = call.query.shape[1] // call.key.shape[1]
        key, value = (
            tensor if groups == 1 else tensor.repeat_interleave(groups, dim=1) for tensor in (call.key, call.value)
        )
        return Attended(
            key.contiguous(),
            value.contiguous(),
            self._bias(rows),
            call.query.shape[-1] ** -0.5 if call.scale is None else call.scale,
        )

    def _bias(self, rows: Int[Tensor, "example"]) -> Tensor:
        call, example = self.call, torch.arange(len(rows), device=rows.device)
        n_tokens, mask = call.key.shape[2], call.attn_mask
        dtype = call.query.dtype
        if mask is None:
            position = torch.arange(n_tokens, device=rows.device)
            seen = position <= rows[:, None] if call.is_causal else (position >= 0).expand(len(rows), -1)
            mask = seen[:, None, None]
        else:
            mask = mask.reshape((1,) * (4 - mask.ndim) + tuple(mask.shape))
            if mask.shape[2] > 1:  # (example, head, query, token) -> the line of one query
                mask = mask.expand(len(rows), *mask.shape[1:])[example, :, rows].unsqueeze(2)
        if mask.dtype != torch.bool:
            return mask.to(dtype)
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, -torch.inf)


@contextmanager
def attention_kept(root: nn.Module, blocks: Sequence[str], n_examples: int) -> Iterator[list[BlockAttention | None]]:
    """Keep the attention of every block in the forward pass that follows; None where a block has not just one, from
    each row of an example to all others.

    `blocks` are the names of the blocks in call order.
    """
    keeper = _Keeper()
    kept: list[BlockAttention | None] = []
    with _in_blocks(root, blocks, keeper):
        yield kept
    for layer in range(len(blocks)):
        calls = keeper.calls[layer]
        kept.append(BlockAttention(calls[0]) if len(calls) == 1 and calls[0].is_of_all_rows(n_examples) else None)


@contextmanager
def ended_at_attention(root: nn.Module, blocks: Sequence[str], layer: int) -> Iterator[list[AttentionCall]]:
    """End the forward pass where the attention of a block is reached, and hold what it was given."""
    seen: list[AttentionCall] = []
    with suppress(_EndedError), _in_blocks(root, blocks, _Ender(layer, seen)):
        yield seen


class _EndedError(Exception):
    """What was wanted of a forward pass is there."""


@contextmanager
def attention_of_one_row(
    root: nn.Module, blocks: Sequence[str], others: Callable[[int], Attended], slots: "Slots | None"
) -> Iterator[None]:
    """Let blocks that are given one row a run attend as that row does among all of its example.

    `others(l)` are keys and values of block l. With `slots` they are those of the clean pass, of which only the row's
    own have changed; without, they are those of the runs, changed as they are.
    """
    with _in_blocks(root, blocks, _OneRow(others, slots)):
        yield


@dataclass(frozen=True, eq=False)
class Slots:
    """Runs side by side: `run[e, s]` is the s-th run about example e (where `is_taken`), `row[e]` the row it changes.

    Runs of one example share its keys and values, so no key is copied for a run.
    """

    run: Int[Tensor, "example slot"]
    is_taken: Bool[Tensor, "example slot"]
    row: Int[Tensor, "example"]

    @classmethod
    def of(cls, example: Int[Tensor, "run"], row: Int[Tensor, "example"]) -> "Slots":
        """Return the slots of runs about these examples."""
        n_examples, order = len(row), torch.argsort(example, stable=True)
        counts = torch.bincount(example, minlength=n_examples)
        slot = torch.arange(int(counts.max()), device=example.device)
        starts = counts.cumsum(0) - counts
        is_taken = slot < counts[:, None]
        position = (starts[:, None] + slot).clamp(max=len(example) - 1)
        return cls(order[position], is_taken, row)


@contextmanager
def _in_blocks(root: nn.Module, blocks: Sequence[str], watch: "_AttentionOfBlocks") -> Iterator[None]:
    """Let `watch` see the attention of every block, told which block it is."""
    with ExitStack() as stack:
        stack.callback(root.register_forward_pre_hook(watch.start_pass).remove)
        for name in dict.fromkeys(blocks):
            block = root.get_submodule(name)
            stack.callback(block.register_forward_pre_hook(watch.enter_block).remove)
            stack.callback(block.register_forward_hook(watch.leave_block).remove)
        stack.enter_context(watch)
        yield


class _AttentionOfBlocks(TorchFunctionMode):
    """Sees the calls of scaled dot-product attention inside the blocks; `layer` is the block that is running."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = -1
        self.is_inside = False

    def start_pass(self, _module: nn.Module, _arguments: Any) -> None:
        self.layer, self.is_inside = -1, False

    def enter_block(self, _module: nn.Module, _arguments: Any) -> None:
        self.layer += 1
        self.is_inside = True

    def leave_block(self, _module: nn.Module, _arguments: Any, _output: Any) -> None:
        self.is_inside = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is scaled_dot_product_attention and self.is_inside:
            return self.attend(AttentionCall(*args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))

    def attend(self, call: AttentionCall) -> Tensor:
        """Return what the attention gives."""
        return scaled_dot_product_attention(
            call.query,
            call.key,
            call.value,
            attn_mask=call.attn_mask,
            dropout_p=call.dropout_p,
            is_causal=call.is_causal,
            scale=call.scale,
            enable_gqa=call.enable_gqa,
        )


class _Keeper(_AttentionOfBlocks):
    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[int, list[AttentionCall]] = defaultdict(list)

    def attend(self, call: AttentionCall) -> Tensor:
        self.calls[self.layer].append(call)
        return super().attend(call)


class _Ender(_AttentionOfBlocks):
    def __init__(self, at: int, seen: list[AttentionCall]) -> None:
        super().__init__()
        self.at, self.seen = at, seen

    def attend(self, call: AttentionCall) -> Tensor:
        if self.layer == self.at:
            self.seen.append(call)
            raise _EndedError
        return super().attend(call)


class _OneRow(_AttentionOfBlocks):
    def __init__(self, others: Callable[[int], Attended], slots: Slots | None) -> None:
        super().__init__()
        self.others, self.slots = others, slots

    def attend(self, call: AttentionCall) -> Tensor:
        others = self.others(self.layer)
        if self.slots is None:
            return scaled_dot_product_attention(
                call.query, others.key, others.value, attn_mask=others.bias, scale=others.scale
            )
        return _among_unchanged(call, others, self.slots)


def _among_unchanged(call: AttentionCall, others: Attended, slots: Slots) -> Tensor:
    """Return the attention of one changed row a run, (run, head, 1, unit), among the unchanged rows of its example."""
    groups = call.query.shape[1] // call.key.shape[1]
    own_key, own_value = (
        tensor[:, :, 0] if groups == 1 else tensor[:, :, 0].repeat_interleave(groups, dim=1)
        for tensor in (call.key, call.value)
    )
    query = call.query[:, :, 0]
    example = torch.arange(len(slots.row), device=slots.row.device)
    # (run, head, unit) -> (example, head, slot, unit)
    side_by_side = query[slots.run].transpose(1, 2)
    scores = side_by_side @ others.key.transpose(2, 3)
    # The row's own key has changed: its score is that with the new one.
    scores[example, :, :, slots.row] = (query * own_key).sum(dim=-1)[slots.run].transpose(1, 2)
    weights = torch.softmax(scores * others.scale + others.bias, dim=-1)
    own_weight = weights[example, :, :, slots.row]
    weights[example, :, :, slots.row] = 0
    mixed = weights @ others.value + own_weight[..., None] * own_value[slots.run].transpose(1, 2)
    # (example, head, slot, unit) -> (run, head, 1, unit)
    found = torch.empty_like(own_value)
    found[slots.run[slots.is_taken]] = mixed.transpose(1, 2)[slots.is_taken]
    return found.unsqueeze(2)
