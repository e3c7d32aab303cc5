import numpy as np
import pytest

from synapse.moments import Moments, moments_by_class


def of(rows):
    """Moments by their definition, of one group."""
    rows = np.asarray(rows, dtype=np.float64)
    mean = rows.mean(axis=0) if len(rows) else np.zeros(rows.shape[1:])
    return Moments(np.array([len(rows)]), mean[None], np.square(rows - mean).sum(axis=0)[None])


def merged(pieces):
    whole = Moments.none(1, 5)
    for piece in pieces:
        whole = whole.merged(of(piece))
    return whole


@pytest.mark.parametrize("cut", [[], [500], [1], [999], [1, 2, 3], [0, 1000], [250, 250, 600], list(range(1, 1000))])
def test_moments_are_those_of_the_whole_however_it_is_cut(cut):
    rows = np.random.default_rng(1).normal([0, 1, -5, 100, 1e-3], [1, 2, 0.1, 30, 1e-5], size=(1000, 5))

    found = merged(np.split(rows, cut))

    assert found.count.tolist() == [1000]
    np.testing.assert_allclose(found.mean[0], rows.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.deviation[0], rows.std(axis=0), rtol=1e-12)


def test_a_mean_far_above_the_deviation_costs_no_digits():
    rows = np.random.default_rng(2).normal(1e8, 1, size=(4000, 5))
    naive = np.sqrt(np.maximum(np.square(rows).mean(axis=0) - np.square(rows.mean(axis=0)), 0))

    found = merged(np.array_split(rows, 13))

    np.testing.assert_allclose(found.deviation[0], rows.std(axis=0), rtol=1e-7)
    assert np.abs(naive / rows.std(axis=0) - 1).max() > 0.01  # what sums of squares would have given


def test_the_order_of_the_pieces_does_not_matter():
    pieces = np.array_split(np.random.default_rng(3).normal(7, 3, size=(300, 5)), 7)
    one, other = merged(pieces), merged(pieces[::-1])
    np.testing.assert_allclose(one.mean, other.mean, rtol=1e-13)
    np.testing.assert_allclose(one.squares, other.squares, rtol=1e-12)


def test_pieces_merged_in_a_tree_are_those_merged_in_a_row():
    pieces = [of(piece) for piece in np.array_split(np.random.default_rng(4).normal(size=(64, 5)), 8)]
    tree = list(pieces)
    while len(tree) > 1:
        tree = [a.merged(b) for a, b in zip(tree[::2], tree[1::2], strict=True)]
    row = Moments.none(1, 5)
    for piece in pieces:
        row = row.merged(piece)
    np.testing.assert_allclose(tree[0].deviation, row.deviation, rtol=1e-13)


def test_no_rows_and_one_row_have_no_deviation():
    none, one = Moments.none(1, 5), of(np.full((1, 5), 3.0))
    assert (none.deviation == 0).all()
    assert (none.merged(none).mean == 0).all()
    assert (one.deviation == 0).all()
    np.testing.assert_array_equal(none.merged(one).mean, 3.0)
    np.testing.assert_array_equal(one.merged(none).mean, 3.0)


def test_constant_units_have_a_deviation_of_exactly_nothing():
    rows = np.broadcast_to(np.float64([0.1, 1e6, -3, 0, 1 / 3]), (99, 5))
    assert (merged(np.array_split(rows, 9)).deviation < 1e-9).all()


def test_merging_changes_neither_part():
    a, b = of(np.ones((3, 5))), of(np.zeros((2, 5)))
    before = [a.count.copy(), a.mean.copy(), a.squares.copy()]
    a.merged(b)
    for was, part in zip(before, (a.count, a.mean, a.squares), strict=True):
        np.testing.assert_array_equal(was, part)


def test_moments_by_class_are_those_of_the_rows_of_each_class():
    random = np.random.default_rng(5)
    values = random.normal(1e4, 1, size=(2, 60, 5)).astype(np.float32)
    targets = random.integers(0, 3, size=60)
    targets[targets == 1] = 0  # a class without examples
    targets[:2] = (3, 4)  # and two with one
    targets[2:4] = 5

    found = moments_by_class(values, targets, 6)

    for label in range(6):
        mine = values[:, targets == label].astype(np.float64)
        assert (found.count[:, label] == mine.shape[1]).all()
        if mine.shape[1]:
            np.testing.assert_allclose(found.mean[:, label], mine.mean(axis=1), rtol=1e-14)
            np.testing.assert_allclose(found.deviation[:, label], mine.std(axis=1), rtol=1e-9, atol=1e-12)
    assert (found.deviation[:, [1, 3, 4]] == 0).all()
