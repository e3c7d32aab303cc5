import numpy as np
import pytest

from synapse.data.batches import length_buckets
from synapse.errors import SettingsError


def test_batches_run_from_long_to_short_and_equal_lengths_keep_their_order():
    batches = length_buckets(np.array([3, 9, 3, 5, 9]), batch_size=2)

    assert [batch.tolist() for batch in batches] == [[1, 4], [3, 0], [2]]


def test_padded_batches_hold_at_most_the_tokens_allowed():
    batches = length_buckets(np.array([12, 5, 5, 4, 2, 2, 2, 2, 2]), batch_size=4, max_tokens=10)

    # 12 is beyond the bound and stands alone; two of 5; two of at most 4; four of 2
    assert [batch.tolist() for batch in batches] == [[0], [1, 2], [3, 4], [5, 6, 7, 8]]


@pytest.mark.parametrize("n", [0, 1, 7, 8, 100])
def test_each_example_is_in_exactly_one_batch(n):
    lengths = np.random.default_rng(n).integers(0, 30, size=n)

    batches = length_buckets(lengths, batch_size=8, max_tokens=64)

    assert sorted(i for batch in batches for i in batch.tolist()) == list(range(n))
    assert all(1 <= len(batch) <= 8 for batch in batches)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0: give at least 1."),
        ({"batch_size": 1, "max_tokens": 0}, "max_tokens is 0: give at least 1, or None for no bound."),
    ],
)
def test_bounds_below_one_are_refused(options, message):
    with pytest.raises(SettingsError) as caught:
        length_buckets(np.array([1, 2]), **options)

    assert str(caught.value) == message
