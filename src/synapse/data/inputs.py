"""What one input may be, and the bytes that say which input it is.

| kind | one input |
|---|---|
| `text` | a text |
| `pair` | two texts |
| `file` | the path of an image or of a sound; the content is read where it is needed |
| `ids` | token ids |
| `array` | numbers of any shape: a signal, a table row, an image |
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from synapse.errors import DataError

Kind = Literal["text", "pair", "file", "ids", "array"]

KIND_WORDS: dict[Kind, str] = {
    "text": "texts",
    "pair": "pairs of texts",
    "file": "files",
    "ids": "token ids",
    "array": "arrays",
}
"""What several inputs of a kind are called in a message."""


def kind_of(item: Any) -> Kind:
    """Return the kind of one input.

    Raises:
        DataError: it is of no kind that is known.
    """
    if isinstance(item, str):
        return "text"
    if isinstance(item, Path):
        return "file"
    if isinstance(item, (tuple, list)):
        if len(item) == 2 and all(isinstance(part, str) for part in item):
            return "pair"
        if _is_array(item, "iu") and np.ndim(item) == 1:
            return "ids"
    if _is_array(item, "biuf"):
        return "array"
    raise DataError(
        f"An input is a {type(item).__name__}: give a text, a pair of texts, a pathlib.Path, "
        "a tuple of token ids or an array of numbers."
    )


def content_bytes(item: Any) -> bytes:
    """Return the bytes that identify one input among all inputs of its kind (of one dtype and shape, if arrays).

    A file is identified by its content, whatever its name: the bytes are the SHA-256 of it.

    Raises:
        DataError: the file cannot be read, or the input is of no kind that is known.
    """
    match kind_of(item):
        case "text":
            return _encoded(item)
        case "pair":
            first, second = (_encoded(part) for part in item)
            # The length keeps ("ab", "c") apart from ("a", "bc").
            return len(first).to_bytes(8, "little") + first + second
        case "file":
            try:
                with item.open("rb") as stream:
                    return hashlib.file_digest(stream, "sha256").digest()
            except OSError as error:
                raise DataError(
                    f"{item} cannot be read ({error.strerror or error}): put the file back, or read the examples anew."
                ) from error
        case "ids":
            return np.asarray(item, dtype=np.int64).tobytes()
        case "array":
            return np.ascontiguousarray(item).tobytes()


def identities(inputs: Sequence[Any] | np.ndarray) -> Iterator[bytes]:
    """Yield for every input the bytes that identify it among inputs of all kinds, dtypes and shapes."""
    for item in inputs:
        form: str = kind_of(item)
        if form == "array":
            array = np.asarray(item)
            form = f"{form} {array.dtype.str} {array.shape}"
        yield form.encode() + b"\0" + content_bytes(item)


def _encoded(text: str) -> bytes:
    # Texts cut inside an emoji hold half a surrogate pair, which strict UTF-8 refuses.
    return text.encode("utf-8", "surrogatepass")


def _is_array(item: Any, dtypes: str) -> bool:
    try:
        return np.asarray(item).dtype.kind in dtypes
    except ValueError:  # lists of unequal length
        return False
