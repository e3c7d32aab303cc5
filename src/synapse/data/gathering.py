"""Inputs gathered piece by piece: in memory while they are few, in a temporary file from then on.

The file has no name. The system removes it with the last use of the inputs in it, also where the process is killed. It
lies in the temporary folder of the system, which the environment variable `TMPDIR` moves.
"""

import operator
import os
import sys
import tempfile
import weakref
from array import array
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, SupportsIndex, overload

import numpy as np
from jaxtyping import Int
from numpy.typing import ArrayLike

from synapse.data.inputs import Kind, content_bytes, kind_of
from synapse.errors import ResourceError


class InputsOnDisk(Sequence[Any]):
    """Inputs of one kind that lie in a file, each read when it is asked for.

    An index gives one input, a slice a tuple of those in it. What stays in memory are 16 bytes an input.
    """

    def __init__(
        self, kind: Kind, file: "_NamelessFile", starts: Int[np.ndarray, "example"], sizes: Int[np.ndarray, "example"]
    ) -> None:
        self.kind = kind
        self._file = file
        self._starts, self._sizes = starts, sizes

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: SupportsIndex) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Any, ...]: ...
    def __getitem__(self, index: SupportsIndex | slice) -> Any:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        i = operator.index(index)
        return _unpacked(self.kind, self._file.read(int(self._starts[i]), int(self._sizes[i])))

    def select(self, rows: ArrayLike) -> "InputsOnDisk":
        """Return the inputs of some rows, in that order, none of which is read."""
        chosen = np.asarray(rows, dtype=np.int64)
        return InputsOnDisk(self.kind, self._file, self._starts[chosen], self._sizes[chosen])


class Gathered:
    """The inputs of a data set as they come in; more than `in_memory` bytes of them go to a temporary file."""

    def __init__(self, in_memory: int) -> None:
        self._room = in_memory
        self._pieces: list[Sequence[Any] | np.ndarray] = []
        self._writer: _Writer | None = None

    def add(self, piece: Sequence[Any] | np.ndarray) -> None:
        """Take in some inputs, at least one, of the kind of those before.

        Raises:
            ResourceError: the temporary file could not be written.
        """
        if self._writer is not None:
            self._writer.write(piece)
            return
        self._pieces.append(piece)
        self._room -= _n_bytes(piece)
        if self._room < 0:
            self._writer = _ArrayWriter(piece) if isinstance(piece, np.ndarray) else _ItemWriter(kind_of(piece[0]))
            for earlier in self._pieces:
                self._writer.write(earlier)
            self._pieces = []

    def inputs(self) -> Sequence[Any] | np.ndarray:
        """Return all inputs: a tuple or an array, or the same on disk (`InputsOnDisk`, or a read-only mapped array)."""
        if self._writer is not None:
            return self._writer.inputs()
        if isinstance(self._pieces[0], np.ndarray):
            return np.concatenate(self._pieces)
        return tuple(chain.from_iterable(self._pieces))


class _Writer(Protocol):
    def write(self, piece: Sequence[Any] | np.ndarray) -> None: ...
    def inputs(self) -> Sequence[Any] | np.ndarray: ...


class _ItemWriter:
    """Writes inputs one after the other, and keeps how many bytes each takes."""

    def __init__(self, kind: Kind) -> None:
        self._kind: Kind = kind
        self._file = _NamelessFile()
        self._sizes = array("q")

    def write(self, piece: Sequence[Any] | np.ndarray) -> None:
        packed = [_packed(self._kind, item) for item in piece]
        self._sizes.extend(map(len, packed))
        self._file.write(b"".join(packed))

    def inputs(self) -> InputsOnDisk:
        sizes = np.array(self._sizes, dtype=np.int64)
        return InputsOnDisk(self._kind, self._file, np.cumsum(sizes) - sizes, sizes)


class _ArrayWriter:
    """Writes arrays (example, ...) one after the other."""

    def __init__(self, like: np.ndarray) -> None:
        self._file = _NamelessFile()
        self._dtype, self._shape = like.dtype, like.shape[1:]

    def write(self, piece: Sequence[Any] | np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(piece).tobytes())

    def inputs(self) -> np.ndarray:
        mapped = np.memmap(self._file.file, dtype=self._dtype, mode="r")
        return mapped.reshape(-1, *self._shape)


class _NamelessFile:
    """A temporary file without a name, which lives as long as this object."""

    def __init__(self) -> None:
        self.file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (closed with this object)
        weakref.finalize(self, self.file.close)

    def write(self, content: bytes) -> None:
        left = memoryview(content)
        try:
            while left:  # the system may take a part only
                left = left[self.file.write(left) :]
        except OSError as error:
            raise ResourceError(
                f"The inputs do not fit into the temporary folder {tempfile.gettempdir()} ({error.strerror}): make "
                "room there, name another folder in the environment variable TMPDIR, or give a smaller file."
            ) from error

    def read(self, start: int, size: int) -> bytes:
        # By position: the place in a file is shared between threads and forked processes. Not mapped: pages that were
        # looked at would count as memory of the process.
        return os.pread(self.file.fileno(), size, start)


def _packed(kind: Kind, item: Any) -> bytes:
    """Return the bytes that `_unpacked` turns back into the input."""
    return os.fsencode(item) if kind == "file" else content_bytes(item)


def _unpacked(kind: Kind, data: bytes) -> Any:
    match kind:
        case "text":
            return _decoded(data)
        case "pair":
            start = 8 + int.from_bytes(data[:8], "little")
            return _decoded(data[8:start]), _decoded(data[start:])
        case "file":
            return Path(os.fsdecode(data))
        case _:
            return tuple(np.frombuffer(data, dtype=np.int64).tolist())


def _decoded(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


def _n_bytes(piece: Sequence[Any] | np.ndarray) -> int:
    """Return about how much memory some inputs take."""
    if isinstance(piece, np.ndarray):
        return piece.nbytes
    parts = chain.from_iterable(item for item in piece if isinstance(item, tuple))
    return sum(map(sys.getsizeof, piece)) + sum(map(sys.getsizeof, parts))
