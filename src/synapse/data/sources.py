"""Where examples lie: one file or the parts of one table, on this machine or elsewhere, packed or not.

| path | what is read |
|---|---|
| `train.csv` | the file |
| `train.jsonl.gz` | what was packed, by gzip, bzip2 (`.bz2`) or zstd (`.zst`) |
| `s3://bucket/train.csv` | the file elsewhere, through fsspec |
| `shards/` | the numbered Parquet files in a folder, in their order |
| `shards/train-*.parquet` | the files that match, in their order |
| `saved/` | what `save_to_disk` of the library `datasets` left behind |
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from synapse.data.examples import quoted
from synapse.elsewhere import as_written, system_of, telling
from synapse.errors import DataError, near

READABLE = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet", ".npz")
"""The suffixes that `read_examples` knows."""

_CODECS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
_READ_IN_ORDER = (".csv", ".tsv", ".jsonl", ".ndjson")
"""What can be read packed: the others are read from the end."""


@dataclass(frozen=True)
class Source:
    """The files of one data set.

    `path` is what the user wrote, which messages repeat; `suffix` says how all `files` are read (`.arrow` where
    `datasets` wrote them); `folder` is where paths in a column start, or None where that is not on this machine.
    """

    path: str
    suffix: str
    files: tuple[str, ...]
    system: AbstractFileSystem
    folder: Path | None

    @property
    def name(self) -> str:
        """What the examples are called."""
        return _last(self.path)

    def shown(self, file: str) -> str:
        """Return how one of the files is called in messages."""
        return self.path if len(self.files) == 1 else f"{_last(file)} of {self.path}"

    @contextmanager
    def opened(self, file: str) -> Iterator[Any]:
        """Give the content of one of the files as a stream of bytes, unpacked."""
        codec = _CODECS.get(Path(_last(file)).suffix.lower())
        with self.system.open(file, "rb") as stream:
            yield stream if codec is None else pa.CompressedInputStream(stream, codec)


def find_source(path: str | Path) -> Source:
    """Return the files that a path stands for.

    Raises:
        DataError: there is no such file, it cannot be reached, its suffix is not known, or it is a folder whose files
            are not the parts of one table.
    """
    shown = as_written(path)
    is_local = "://" not in shown
    system, root = (LocalFileSystem(), shown) if is_local else _elsewhere(shown)
    found = _look_up(system, root, shown)
    folder = Path(shown) if is_local else None
    if found is None:
        if "*" not in shown:
            meant = near(_last(shown), _neighbours(system, root))
            raise DataError(f"There is no file {shown}.{meant} Give the path of a data file.")
        files = _sorted(_called(shown, system.glob, root))
        if not files:
            raise DataError(f"No file matches {shown}: give the path of a data file, or a pattern that fits several.")
        suffix = _one_suffix(shown, files)
    elif found["type"] == "directory":
        suffix, files = _parts(system, root, shown)
        return Source(shown, suffix, files, system, folder)
    else:
        files = (root,)
        suffix = _one_suffix(shown, (shown,))
    return Source(shown, suffix, files, system, folder.parent if folder else None)


def _elsewhere(path: str) -> tuple[AbstractFileSystem, str]:
    if path.startswith("hf://") and "*" not in path and not _suffix(path):
        name = path.removeprefix("hf://").removeprefix("datasets/").strip("/")
        raise DataError(f"{path} names no file: give the path of a file in it, or the data set as dataset:{name}.")
    system, root = _called(path, system_of, path)
    return system, root


def _look_up(system: AbstractFileSystem, root: str, path: str) -> dict[str, Any] | None:
    """Return what is known of a file or folder, None where there is none."""
    try:
        found: dict[str, Any] = _called(path, system.info, root)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found


def _called(path: str, ask: Any, *arguments: Any) -> Any:
    """Return what a file system answers; whatever goes wrong with one elsewhere is told by the path."""
    with telling(path, DataError, but=(FileNotFoundError, NotADirectoryError)):
        return ask(*arguments)


def _neighbours(system: AbstractFileSystem, root: str) -> list[str]:
    try:
        return [_last(name) for name in system.ls(root.rsplit("/", 1)[0] if "/" in root else ".", detail=False)]
    except Exception:  # they are only for the suggestion
        return []


def _parts(system: AbstractFileSystem, root: str, path: str) -> tuple[str, tuple[str, ...]]:
    """Return the suffix and the files of a folder that holds one table."""
    names = {_last(file): file for file in _called(path, system.ls, root, False)}
    if "dataset_dict.json" in names:
        splits = list(_called(path, _json, system, names["dataset_dict.json"])["splits"])
        raise DataError(
            f"{path} holds the splits {quoted(splits)}: give the folder of one, such as "
            f"{path.rstrip('/')}/{next(iter(splits), 'train')}."
        )
    if "state.json" in names:
        state = _called(path, _json, system, names["state.json"])
        return ".arrow", tuple(f"{root.rstrip('/')}/{part['filename']}" for part in state["_data_files"])
    shards = [name for name in names if name.lower().endswith(".parquet")]
    if not shards:
        raise DataError(f"{path} is a folder: give the path of a data file ({', '.join(READABLE)}).")
    if len({re.sub(r"\d+", "", name) for name in shards}) > 1:
        raise DataError(
            f"{path} holds {quoted(sorted(shards))}, which are not the numbered parts of one table: give one file, or "
            f"a pattern such as {path.rstrip('/')}/train-*.parquet."
        )
    return ".parquet", tuple(names[name] for name in _sorted(shards))


def _one_suffix(path: str, files: tuple[str, ...]) -> str:
    suffixes = sorted({_suffix(file) for file in files})
    if len(suffixes) > 1:
        raise DataError(f"{path} matches files that end in {quoted(suffixes)}: give a pattern for files of one format.")
    packing = Path(suffixes[0]).suffix if suffixes[0].count(".") == 2 else ""
    suffix = suffixes[0].removesuffix(packing)
    if suffix not in (_READ_IN_ORDER if packing else READABLE):
        raise DataError(f"{path} ends in {suffixes[0]!r}: give a file that ends in {', '.join(READABLE)}.")
    return suffix


def _suffix(file: str) -> str:
    """Return the suffix of a path, with that of the packing."""
    name = Path(_last(file))
    packing = name.suffix.lower() if name.suffix.lower() in _CODECS else ""
    return Path(name.stem if packing else name).suffix.lower() + packing


def _sorted(files: Any) -> tuple[str, ...]:
    """Return the files in the order of the numbers in their names, so that part 2 comes before part 10."""
    return tuple(sorted(files, key=lambda f: [int(p) if p.isdecimal() else p for p in re.split(r"(\d+)", f)]))


def _last(path: str) -> str:
    """Return the last part of a path, without what a web address asks for."""
    if "://" in path:
        path = re.sub(r"[?#].*", "", path)
    return path.rstrip("/").rsplit("/", 1)[-1]


def _json(system: AbstractFileSystem, file: str) -> Any:
    return json.loads(system.cat_file(file))
