import numpy as np
import pytest
import torch
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec

from synapse.errors import RunFolderError
from synapse.stored import MISSING, StoredRows, StoredValues, decoded_numbers, encoded_numbers

N_LAYERS, N, WIDTH, WINDOW = 3, 23, 6, 5


def array_of(folder, name, values, dtype="float32"):
    stored = encoded_numbers(values, dtype)
    array = zarr.open_group(str(folder), mode="a").create_array(
        name,
        shape=stored.shape,
        chunks=(WINDOW, stored.shape[1]),
        dtype=stored.dtype,
        filters=None,
        compressors=[Crc32cCodec()],
        serializer=BytesCodec(),
        fill_value=MISSING.get(str(stored.dtype), np.nan),
    )
    array[:] = stored
    return array


@pytest.fixture
def numbers():
    return np.random.default_rng(1).normal(size=(N_LAYERS, N, WIDTH)).astype(np.float32)


@pytest.fixture
def values(numbers, tmp_path):
    return StoredValues(tuple(StoredRows(array_of(tmp_path, str(layer), each)) for layer, each in enumerate(numbers)))


INDICES = [
    np.s_[0],
    np.s_[-1],
    np.s_[:],
    np.s_[1:],
    np.s_[::-1],
    np.s_[[2, 0]],
    np.s_[[True, False, True]],
    np.s_[0, 5],
    np.s_[0, -1],
    np.s_[0, -N],
    np.s_[np.int64(1), np.int64(7)],
    np.s_[1, 4:16],
    np.s_[1, -3:],
    np.s_[1, :-20],
    np.s_[1, 30:40],
    np.s_[1, 3:1],
    np.s_[1, ::-2],
    np.s_[1, 1::7],
    np.s_[1, [22, 0, 0, 7, -1]],
    np.s_[1, []],
    np.s_[1, np.arange(N) % 3 == 1],
    np.s_[1, np.zeros(N, bool)],
    np.s_[:, 3],
    np.s_[:, 3:9],
    np.s_[:, np.array([22, 4, 5])],
    np.s_[:, [9, 9], 2:4],
    np.s_[0, :, 3],
    np.s_[0, 5, 3],
    np.s_[0, 5, [3, 1]],
    np.s_[:, 4, 2],
    np.s_[2, 4:9, ::2],
]


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_numbers_on_disk_are_indexed_as_numpy_would(values, numbers, index):
    found = values[index]
    assert np.shape(found) == np.shape(numbers[index])
    np.testing.assert_array_equal(found, numbers[index])
    assert found.dtype == np.float32


@pytest.mark.parametrize(
    "index",
    [np.s_[..., 3], np.s_[0, None], np.s_[None], np.s_[0, [1, 2], [3, 4]], np.s_[[0, 1], [2, 3]], np.s_[0, 0, 0, 0]],
    ids=str,
)
def test_an_index_that_would_mean_something_else_to_numpy_is_refused(values, index):
    with pytest.raises(IndexError, match=r"Read the layer first, and index what comes back: `values\[layer\]"):
        values[index]


@pytest.mark.parametrize(
    "index", [np.s_[3], np.s_[-4], np.s_[0, N], np.s_[0, -N - 1], np.s_[0, [N]], np.s_[0, 0, WIDTH]]
)
def test_an_index_beyond_the_end_is_an_error_and_not_empty(values, index):
    with pytest.raises(IndexError):
        values[index]


def test_numbers_on_disk_have_the_shape_and_type_of_an_array(values, numbers):
    assert (values.shape, values.ndim, values.dtype, len(values)) == (numbers.shape, 3, np.float32, N_LAYERS)
    rows = values.layers[0]
    assert (rows.shape, rows.ndim, rows.dtype, len(rows)) == ((N, WIDTH), 2, np.float32, N)
    np.testing.assert_array_equal(np.asarray(values), numbers)
    np.testing.assert_array_equal(np.asarray(rows, dtype=np.float64), numbers[0].astype(np.float64))
    for layer, each in enumerate(values):
        np.testing.assert_array_equal(each, numbers[layer])


def test_what_was_read_may_be_written_to_without_changing_the_file(values, numbers):
    values[0][:] = 7
    values[0, [1, 2]][:] = 7
    np.testing.assert_array_equal(values[0], numbers[0])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_numbers_are_rounded_as_torch_rounds_them(dtype):
    random = np.random.default_rng(2)
    bits = random.integers(0, 2**32, size=200_000, dtype=np.uint32).view(np.float32)
    ties = (np.arange(0, 2**16, dtype=np.uint32) << 16 | 0x8000).view(np.float32)  # halfway between two bfloat16
    halves = np.float32(1 + np.arange(4096) / 4096)  # and between two float16
    special = np.float32([0.0, -0.0, 65504, 65519, 65520, -65520, 1e-8, 3.4e38, -3.4028235e38, 6e-8, np.inf, -np.inf])
    numbers = np.concatenate([bits, ties, halves, special])
    numbers = numbers[~np.isnan(numbers)]

    found = decoded_numbers(encoded_numbers(numbers, dtype))

    expected = torch.from_numpy(numbers).to(getattr(torch, dtype)).float().numpy()
    np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))  # the sign of zero too


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_numbers_in_half_the_bits_take_half_the_room(numbers, tmp_path, dtype):
    assert encoded_numbers(numbers[0], dtype).nbytes == numbers[0].nbytes // 2
    rows = StoredRows(array_of(tmp_path, "half", numbers[0], dtype))
    expected = torch.from_numpy(numbers[0]).to(getattr(torch, dtype)).float().numpy()
    np.testing.assert_array_equal(rows[3:9], expected[3:9])
    np.testing.assert_array_equal(rows[[22, 1]], expected[[22, 1]])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("index", [np.s_[:], np.s_[7], np.s_[[7, 22]], np.s_[3:8]], ids=str)
def test_a_missing_chunk_is_never_read_as_zeros(numbers, tmp_path, dtype, index):
    rows = StoredRows(array_of(tmp_path, "x", numbers[0], dtype))
    (tmp_path / "x" / "c" / "1" / "0").unlink()
    with pytest.raises(RunFolderError) as caught:
        rows[index]
    assert str(caught.value) == (
        f"'{tmp_path}/x' cannot be read (a chunk is missing): the file was changed, cut or removed after it was "
        "written. Remove the recording, and record anew."
    )
    assert rows[:5].shape == (5, WIDTH)  # the others are read


@pytest.mark.parametrize("damage", ["flip", "flip the checksum", "cut", "empty", "lengthen"])
def test_a_chunk_that_was_changed_is_not_read(numbers, tmp_path, damage):
    rows = StoredRows(array_of(tmp_path, "x", numbers[0]))
    chunk = tmp_path / "x" / "c" / "1" / "0"
    found = bytearray(chunk.read_bytes())
    if damage.startswith("flip"):
        found[-1 if "checksum" in damage else 0] ^= 1
    else:
        found = {"cut": found[:-5], "empty": bytearray(), "lengthen": found + b"12345"}[damage]
    chunk.write_bytes(bytes(found))
    for index in (np.s_[:], np.s_[9], np.s_[[9, 0]]):
        with pytest.raises(RunFolderError, match="cannot be read"):
            rows[index]


def test_rows_that_are_zero_are_not_taken_for_missing(tmp_path):
    rows = StoredRows(array_of(tmp_path, "zeros", np.zeros((N, WIDTH), np.float32)))
    assert not rows[:].any()


def test_each_chunk_is_read_once_whatever_the_order_of_the_rows(numbers, tmp_path):
    class Counted:
        def __init__(self, array):
            self.array, self.reads = array, 0

        def __getattr__(self, name):
            return getattr(self.array, name)

        def __getitem__(self, index):
            self.reads += 1
            return self.array[index]

    counted = Counted(array_of(tmp_path, "x", numbers[0]))
    order = np.random.default_rng(3).permutation(N)
    np.testing.assert_array_equal(StoredRows(counted)[order], numbers[0][order])
    assert counted.reads == 5
