"""Arrays that lie in files and are read when they are asked for."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from synapse.errors import RunFolderError


@dataclass(frozen=True, eq=False)
class StoredRows:
    """Numbers (example, unit) in a file: `rows[index]` reads these examples, `numpy.asarray(rows)` all of them.

    They come as float32, whatever they are stored as. `array` is a zarr array; bfloat16, which numpy does not know,
    lies in it as the upper half of float32's bits.
    """

    array: Any

    @property
    def shape(self) -> tuple[int, int]:
        """Number of examples and of units."""
        n, width = self.array.shape
        return int(n), int(width)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return 2

    @property
    def dtype(self) -> np.dtype[np.float32]:
        """The type in which the numbers are read."""
        return np.dtype(np.float32)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> np.ndarray:
        rows, *units = _parts_of(index, self.ndim)
        single = isinstance(rows, (int, np.integer))
        if single:
            found = read_numbers(self.array, slice(int(rows), int(rows) + 1 or None))
        elif isinstance(rows, slice) and rows.step in (None, 1):
            found = read_numbers(self.array, rows)
        else:
            found = self._chosen(np.arange(len(self))[rows])
        decoded = decoded_numbers(found)
        decoded = decoded[:, units[0]] if units else decoded
        return np.asarray(decoded[0]) if single else decoded

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Return all of them, read from the file."""
        del copy  # they are always new
        found = self[:]
        return found if dtype is None else found.astype(dtype, copy=False)

    def _chosen(self, rows: np.ndarray) -> np.ndarray:
        # Each chunk is read once, and not all of them are held at a time.
        found = np.empty((len(rows), self.shape[1]), dtype=self.array.dtype)
        length = int(self.array.chunks[0])
        for chunk in np.unique(rows // length):
            mine = rows // length == chunk
            inside = read_numbers(self.array, slice(chunk * length, (chunk + 1) * length))
            found[mine] = inside[rows[mine] - chunk * length]
        return found


@dataclass(frozen=True, eq=False)
class StoredValues:
    """Numbers (layer, example, unit) in files, one a layer: `values[layer]` reads that layer as a numpy array.

    `values[layer, rows]` reads some examples of it, `values[:, rows]` those of all layers, and iterating reads layer
    after layer; `numpy.asarray(values)` reads everything.
    """

    layers: tuple[StoredRows, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number of layers, of examples and of units."""
        return (len(self.layers), *self.layers[0].shape)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return 3

    @property
    def dtype(self) -> np.dtype[np.float32]:
        """The type in which the numbers are read."""
        return np.dtype(np.float32)

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[Float[np.ndarray, "example unit"]]:
        return (rows[:] for rows in self.layers)

    def __getitem__(self, index: Any) -> np.ndarray:
        layer, *rest = _parts_of(index, self.ndim)
        inside = tuple(rest) or (slice(None),)
        if isinstance(layer, (int, np.integer)):
            return self.layers[layer][inside]
        chosen = np.arange(len(self.layers))[layer]
        return np.stack([self.layers[each][inside] for each in chosen])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Return all of them, read from the files."""
        del copy  # they are always new
        found = np.stack(list(self))
        return found if dtype is None else found.astype(dtype, copy=False)


MISSING = {"uint16": 0x7FC0, "int64": -1}
"""The fill values that are not NaN: like it, numbers that are never written (here NaN as a bfloat16, and -1)."""


def _parts_of(index: Any, ndim: int) -> tuple[Any, ...]:
    """Return an index axis by axis; what would mean something else to numpy is refused."""
    parts = index if isinstance(index, tuple) else (index,)
    several = [part for part in parts if not isinstance(part, (int, np.integer, slice))]
    if len(parts) > ndim or len(several) > 1 or any(part is None or part is Ellipsis for part in several):
        raise IndexError(
            f"Numbers in a file were indexed by {index!r}; one index an axis was expected, and a list or an array for "
            "one of them at most. Read the layer first, and index what comes back: `values[layer][...]`."
        )
    return tuple(parts)


def read_numbers(array: Any, rows: slice) -> np.ndarray:
    """Return rows of a zarr array as they are stored.

    Raises:
        RunFolderError: a chunk is not there, was cut, or has changed.
    """
    try:
        found = np.asarray(array[rows])
    except (ValueError, OSError) as error:  # such as that of a chunk's checksum
        raise _unreadable(array, str(error)) from error
    # In place of a chunk that is not there come fill values.
    of_each: tuple[Any, ...] = (slice(None), *(0 for _ in found.shape[1:]))
    first = found[of_each]
    if ((first == array.fill_value) | (first != first)).any():
        raise _unreadable(array, "a chunk is missing")
    return found


def _unreadable(array: Any, why: str) -> RunFolderError:
    place = str(array.store_path).removeprefix("file://")
    return RunFolderError(
        f"{place!r} cannot be read ({why}): the file was changed, cut or removed after it was written. "
        "Remove the recording, and record anew."
    )


def encoded_numbers(values: Float[np.ndarray, "*any"], dtype: str) -> np.ndarray:
    """Return float32 numbers as they are stored in a type, rounded to nearest (to even, where two are as near).

    Numbers too large for float16 become infinite.
    """
    if dtype != "bfloat16":
        with np.errstate(over="ignore"):
            return values.astype(dtype)
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def decoded_numbers(stored: np.ndarray) -> np.ndarray:
    """Return stored numbers as float32."""
    if stored.dtype == np.uint16:
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32, copy=False)
