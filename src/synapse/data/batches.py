"""Batches of examples of like length, so that little of a batch is padding."""

import numpy as np
from jaxtyping import Int

from synapse.errors import SettingsError


def length_buckets(
    lengths: Int[np.ndarray, "example"], *, batch_size: int, max_tokens: int | None = None
) -> list[Int[np.ndarray, "batch"]]:
    """Return the examples' indices in batches of like length, each index exactly once.

    Batches run from the longest examples to the shortest, so that one too large for memory fails at once;
    examples of equal length keep their order. A batch has at most `batch_size` examples and, padded to its
    longest, at most `max_tokens` tokens; an example longer than that makes a batch of its own.

    Raises:
        SettingsError: `batch_size` or `max_tokens` is below 1.
    """
    if batch_size < 1:
        raise SettingsError(f"batch_size is {batch_size}: give at least 1.")
    if max_tokens is not None and max_tokens < 1:
        raise SettingsError(f"max_tokens is {max_tokens}: give at least 1, or None for no bound.")
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    batches = []
    start = 0
    while start < len(order):
        size = batch_size
        if max_tokens is not None:
            longest = max(int(lengths[order[start]]), 1)
            size = max(1, min(batch_size, max_tokens // longest))
        batches.append(order[start : start + size])
        start += size
    return batches


def equal_lengths(
    lengths: Int[np.ndarray, "example"], *, batch_size: int, max_tokens: int | None = None
) -> list[Int[np.ndarray, "batch"]]:
    """Return the examples' indices in batches of one length each, otherwise as `length_buckets`."""
    batches = []
    for length in np.unique(lengths)[::-1]:
        members = np.flatnonzero(lengths == length)
        for part in length_buckets(lengths[members], batch_size=batch_size, max_tokens=max_tokens):
            batches.append(members[part])
    return batches
