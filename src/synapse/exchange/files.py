"""What all ways in and out share: a file that appears whole or not at all, and libraries that may be missing."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any
from uuid import uuid4

from synapse.errors import DataError, SettingsError

EXTRA = "exchange"
"""The extra of the package that installs what is imported here only when it is asked for."""


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """Give a name beside `path`, and move what was written there to `path` when the block ends well.

    Raises:
        DataError: `path` is a folder.
    """
    if path.is_dir():
        raise DataError(f"{path} is a folder: give the path of a file, which may or may not be there.")
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}-{uuid4().hex}")
    try:
        yield draft
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def optional(name: str) -> Any:
    """Return a library that is no dependency.

    Raises:
        SettingsError: it is not installed; the message says how it is.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise SettingsError(
            f"{name} is not installed; install it with `pip install {name}`, or `pip install 'synapse[{EXTRA}]'`."
        ) from error
