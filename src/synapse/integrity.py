"""Folders that know what they hold: size and hash of every file, written last: nothing partial passes as whole."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

SEAL = "checksums.json"
"""The file that says what a folder holds."""

FileRecord = Mapping[str, Any]
"""`size` in bytes and `sha256` of a file."""


def record_of(path: Path) -> FileRecord:
    """Return size and hash of a file."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": digest}


def records_of(folder: Path, paths: Iterable[Path]) -> dict[str, FileRecord]:
    """Return size and hash of files of a folder, by their place in it."""
    return {path.relative_to(folder).as_posix(): record_of(path) for path in sorted(paths)}


def seal(folder: Path, *, known: Mapping[str, FileRecord] | None = None, without: Sequence[str] = ()) -> None:
    """Write what a folder holds, `without` some files; what is `known` of files is taken over, the others are read."""
    known = known or {}
    skipped = {SEAL, *known, *without}
    files = [path for path in folder.rglob("*") if path.is_file()]
    others = records_of(folder, [path for path in files if path.relative_to(folder).as_posix() not in skipped])
    write_whole(folder / SEAL, json.dumps(dict(sorted({**known, **others}.items())), indent=1) + "\n")


def flaws(folder: Path, *, thorough: bool = True) -> list[str]:
    """Return what is wrong with a sealed folder, a sentence each: files that are missing, cut or changed.

    Without `thorough` only presence and sizes are looked at, and what says how the rest is read: the JSON files.
    """
    try:
        sealed = json.loads((folder / SEAL).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return [f"{SEAL} is missing: the folder was not finished, or is of an older version"]
    except (OSError, ValueError):
        return [f"{SEAL} cannot be read"]
    if not isinstance(sealed, dict) or not all(
        isinstance(entry, dict) and {"size", "sha256"} <= set(entry) for entry in sealed.values()
    ):
        return [f"{SEAL} is not a list of files"]
    return [flaw for name, entry in sealed.items() if (flaw := _flaw(folder / name, name, entry, thorough))]


def _flaw(path: Path, name: str, entry: FileRecord, thorough: bool) -> str | None:
    try:
        size = path.stat().st_size
        if size != entry["size"]:
            return f"{name} has {size} bytes, and {entry['size']} were written"
        if (thorough or path.suffix == ".json") and record_of(path)["sha256"] != entry["sha256"]:
            return f"{name} has changed: its SHA-256 is not that of what was written"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror or error})"
    return None


def write_whole(path: Path, text: str) -> None:
    """Write a file beside its place and rename it, so that it is there as a whole or not at all."""
    draft = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        with draft.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
