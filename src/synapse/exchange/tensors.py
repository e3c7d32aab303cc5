"""Activations as a safetensors file, written a piece of a layer at a time and read as far as it is asked for.

```text
8 bytes    length of the header, little-endian
header     JSON: for every tensor its type, shape and place; under `__metadata__` texts by name
the rest   the tensors' bytes
```

`values` (layer, example, unit) is one tensor, so that `safetensors.safe_open(path, "np").get_slice("values")[3]` is
layer 3 alone. The other tensors have the names of the fields of `Activations`, as far as these are not None (and
`class_moments.count`, `.mean` and `.squares`); what is no array is in the metadata, as JSON.

*Source*: the format, https://github.com/huggingface/safetensors#format.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from synapse.errors import DataError
from synapse.exchange.files import written_beside
from synapse.moments import Moments
from synapse.types import Activations

FORMAT = "1"
"""Version of what stands in the file, under `synapse_activations` in its metadata."""

_MARK = "synapse_activations"
_SAID = ("labels", "source", "component", "reads_several_rows")
_MOMENTS = "class_moments"
_LARGE = ("values", "features")
"""What is mapped when it is loaded; the rest is read."""
_TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8"}
_PIECE_BYTES = 2**24
_ALIGNMENT = 8  # of the first tensor's bytes


def save_safetensors(activations: Activations, path: str | os.PathLike[str]) -> None:
    """Write activations to a file, which `load_safetensors` reads back bit for bit; a file that is there is replaced.

    At most a piece of one layer is held in memory.

    Raises:
        DataError: `path` is a folder, or an array is of a type other than float16, float32, float64 and int64.
    """
    arrays = _arrays(activations)
    header = _header(arrays, activations)
    with written_beside(Path(path)) as draft, draft.open("xb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name in _order(arrays):
            for piece in _pieces(arrays[name]):
                file.write(np.ascontiguousarray(piece, dtype=piece.dtype.newbyteorder("<")).data)
        file.flush()
        os.fsync(file.fileno())


def load_safetensors(path: str | os.PathLike[str]) -> Activations:
    """Return the activations in a file that `save_safetensors` wrote.

    `values` and `features` are maps of the file: a layer is read when it is asked for, and a change of it stays in
    memory. The file must stay as it is meanwhile; another `save_safetensors` to its path does no harm.

    Raises:
        DataError: there is no such file, or it is cut off or of another kind or version.
    """
    path = Path(path)
    try:
        with safe_open(path, framework="np") as opened:  # which checks that header and length agree
            said = _checked_metadata(path, opened.metadata())
            small = {name: opened.get_tensor(name) for name in set(opened.keys()) - set(_LARGE)}
        arrays: dict[str, Any] = {"logits": None} | small | _mapped(path)
        moments = {field.name: arrays.pop(f"{_MOMENTS}.{field.name}", None) for field in fields(Moments)}
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"{path} cannot be read as a safetensors file: {error}. Give the path of a file that `save_safetensors` "
            "wrote, or write it again."
        ) from error
    return Activations(
        labels=tuple(json.loads(said["labels"])),
        source=json.loads(said["source"]),
        component=json.loads(said["component"]),
        reads_several_rows=json.loads(said["reads_several_rows"]),
        class_moments=None if moments["count"] is None else Moments(**moments),
        **arrays,
    )


def _arrays(activations: Activations) -> dict[str, Any]:
    """Return the arrays that there are, by their names in the file."""
    found = {field.name: getattr(activations, field.name) for field in fields(Activations) if field.name not in _SAID}
    moments = found.pop(_MOMENTS)
    if moments is not None:
        found |= {f"{_MOMENTS}.{field.name}": getattr(moments, field.name) for field in fields(Moments)}
    return {name: array for name, array in found.items() if array is not None}


def _header(arrays: Mapping[str, Any], activations: Activations) -> bytes:
    """Return the header, filled up with blanks so that the bytes after it are aligned."""
    said: dict[str, Any] = {
        "__metadata__": {_MARK: FORMAT} | {name: json.dumps(getattr(activations, name)) for name in _SAID}
    }
    start = 0
    for name in _order(arrays):
        array = arrays[name]
        size = int(np.prod(array.shape, dtype=np.int64)) * array.dtype.itemsize
        said[name] = {
            "dtype": _type_name(name, array),
            "shape": [int(length) for length in array.shape],
            "data_offsets": [start, start + size],
        }
        start += size
    text = json.dumps(said, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % _ALIGNMENT)


def _order(arrays: Mapping[str, Any]) -> list[str]:
    """Return the names, those of wide numbers first: so every array is aligned to its own."""
    return sorted(arrays, key=lambda name: -arrays[name].dtype.itemsize)


def _type_name(name: str, array: Any) -> str:
    for known, dtype in _TYPES.items():
        if array.dtype == np.dtype(dtype):
            return known
    raise DataError(
        f"The {name} are of type {array.dtype}; float16, float32, float64 or int64 was expected: cast them."
    )


def _pieces(array: Any) -> Iterator[np.ndarray]:
    """Yield the numbers in their order, some rows of a layer at a time where there are layers."""
    layers = [(layer,) for layer in range(array.shape[0])] if len(array.shape) == 3 else [()]
    size = array.dtype.itemsize * (array.shape[-1] if len(array.shape) > 1 else 1)
    rows = max(1, _PIECE_BYTES // max(1, size))
    for layer in layers:
        for start in range(0, array.shape[len(layer)], rows):
            yield array[(*layer, slice(start, start + rows))]


def _checked_metadata(path: Path, said: Mapping[str, str] | None) -> Mapping[str, str]:
    version = (said or {}).get(_MARK)
    if said is None or version is None:
        raise DataError(
            f"{path} holds tensors, but no activations of synapse: give a file that `save_safetensors` wrote."
        )
    if version != FORMAT:
        raise DataError(
            f"{path} is of version {version} of the format, and this version of synapse reads {FORMAT}: update it."
        )
    return said


def _mapped(path: Path) -> dict[str, np.ndarray]:
    """Return the large arrays of a file that was checked, as maps of it."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        return {name: _map(file, 8 + length, header[name]) for name in _LARGE if name in header}


def _map(file: Any, start: int, entry: Mapping[str, Any]) -> np.ndarray:
    shape, dtype = tuple(entry["shape"]), np.dtype(_TYPES[entry["dtype"]])
    if 0 in shape:  # which nothing can be mapped to
        return np.empty(shape, dtype)
    return np.memmap(file, dtype, "c", start + entry["data_offsets"][0], shape)
