"""Folders that lie elsewhere: on an object store, or on whatever else fsspec has a URL for.

A sealed folder is *published*: every file, and its seal last. It is read *here*: from a copy, compared with the seal.
In between, whatever happens, a folder without its seal is none. Readers go by the seal alone and never list a folder,
so that a plain web server will do; writers list it.
"""

import atexit
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path, PurePosixPath, PureWindowsPath

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs

from synapse.errors import RunFolderError, SettingsError, SynapseError
from synapse.integrity import SEAL, flaws

PAGES = "report*.html"
"""The files of a run that its seal does not name, since they can be drawn again."""

UNFINISHED = "unfinished.json"
"""Stands in a folder elsewhere while it is published: the names of the files of that run, and of an earlier one."""

_URL = re.compile(r"[a-z][a-z0-9+.:-]+://")
_LOCAL = re.compile(r"(file|local):/")
_FOLDED = re.compile(r"^([a-z][a-z0-9+]+):/(?!/)")

_AT_ONCE = 16
"""Files that are moved at a time, where a file system is made for it."""


def as_written(path: Path | str) -> str:
    """Return a path as text; where a `Path` has folded the two slashes of `s3://`, they are put back."""
    return _FOLDED.sub(r"\1://", str(path)) if isinstance(path, Path) else path


def place_of(path: Path | str) -> Path | str:
    """Return a place of this machine as a path, and one elsewhere as its URL, with no slash at the end."""
    if _LOCAL.match(str(path)):
        return Path(url_to_fs(str(path))[1])
    written = as_written(path)
    protocol = _URL.match(written)
    return Path(path) if protocol is None else protocol[0] + written[protocol.end() :].rstrip("/")


def only_here(path: Path | str, what: str) -> Path:
    """Return the path of something that can only be written on this machine.

    Raises:
        SettingsError: the place is elsewhere.
    """
    place = place_of(path)
    if isinstance(place, str):
        raise SettingsError(f"{place} is elsewhere, and {what} can be written on this machine only: give a path here.")
    return place


def here(path: Path | str) -> Path:
    """Return the folder of this machine that holds what is at a place: itself, or a copy of a sealed one elsewhere.

    A copy is made once a process, unless the seal changes, and is gone when the process ends.

    Raises:
        RunFolderError: the place cannot be reached, it has no seal, or what was read is not what was written.
    """
    place = place_of(path)
    return place if isinstance(place, Path) else _whole_copy(place, _seal_at(place))


def copied(url: str) -> Path:
    """Return a new copy of a sealed folder elsewhere, whole or not: of the files that its seal names, those there are.

    Raises:
        RunFolderError: the place cannot be reached, it has no seal, or one that names files outside of the folder.
    """
    return _copy(url, _seal_at(url))


def publish(folder: Path, url: str) -> None:
    """Put a sealed folder at a URL, in place of an earlier one; files there that are of neither are let be.

    Raises:
        RunFolderError: a file could not be written, or is not there as it was written. The place has no seal then,
            unless it still holds the earlier folder untouched; it may be published to again.
    """
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    with telling(url, RunFolderError, "written to"):
        system, root = system_of(url)
        seal, marker = f"{root}/{SEAL}", f"{root}/{UNFINISHED}"
        sealed = _content(system, seal)
        earlier = {*_names_in(sealed), *_names_in(_content(system, marker))}
        system.pipe_file(marker, json.dumps(sorted(earlier | sizes.keys()), indent=1).encode())
        if sealed is not None:
            system.rm_file(seal)
        _each(system, partial(_put, system, folder, root), sizes.keys() - {SEAL})
        there = _sizes(system, root)
        for name in sorted(sizes.keys() - {SEAL}):
            if there.get(name) != sizes[name]:
                raise RunFolderError(
                    f"{url}/{name} has {there.get(name, 'no')} bytes, and {sizes[name]} were written: write it again."
                )
        pages = {name for name in there if "/" not in name and PurePosixPath(name).match(PAGES)}
        _each(system, partial(_remove, system, root), there.keys() & (earlier | pages) - sizes.keys())
        _put(system, folder, root, SEAL)
        system.rm_file(marker)


def names_at(url: str) -> set[str]:
    """Return what is at the top of a folder elsewhere; nothing where there is only what an interruption left.

    Raises:
        RunFolderError: the place cannot be reached.
    """
    with telling(url, RunFolderError):
        system, root = system_of(url)
        try:
            found = {entry["name"].rstrip("/"): entry["size"] for entry in system.ls(root, detail=True)}
        except FileNotFoundError:
            return set()
    # On some stores an empty folder is an empty file of its name.
    names = {name.rsplit("/", 1)[-1] for name, size in found.items() if size != 0 or name != root}
    return set() if UNFINISHED in names and SEAL not in names else names


def check_writable(url: str) -> None:
    """Refuse a place elsewhere where nothing can be written, by writing; nothing stays there.

    Raises:
        RunFolderError: the place cannot be reached, or not be written to.
    """
    with telling(url, RunFolderError, "written to"):
        system, root = system_of(url)
        marker = f"{root}/{UNFINISHED}"
        before = _content(system, marker)
        system.pipe_file(marker, before or b"[]")
        if before is None:
            system.rm_file(marker)


def system_of(url: str) -> tuple[AbstractFileSystem, str]:
    """Return the file system of a URL and the place in it; nothing is remembered there from before."""
    system, root = url_to_fs(url)
    system.invalidate_cache()  # a size remembered from before would cut a file that has grown
    return system, root


@contextmanager
def telling(
    path: str, kind: type[SynapseError], done: str = "reached", *, but: Sequence[type[Exception]] = ()
) -> Iterator[None]:
    """Tell whatever goes wrong with a file system by the path, as one kind of error, `but` for what passes."""
    try:
        yield
    except Exception as error:  # every file system raises its own
        if isinstance(error, (SynapseError, *but)):
            raise
        raise kind(
            f"{path} could not be {done}: {one_line(error)}. Check the path and your access to it, and for one "
            "elsewhere that the package it needs is installed."
        ) from error


def one_line(error: Exception, most: int = 300) -> str:
    """Return what an error says as one line without a stop at its end, or its name where it says nothing."""
    said = " ".join(str(error).split()).rstrip(".")
    return said[:most] or type(error).__name__


def _seal_at(url: str) -> bytes:
    with telling(url, RunFolderError):
        system, root = system_of(url)
        seal = _content(system, f"{root}/{SEAL}")
    if seal is None:
        raise RunFolderError(
            f"There is no finished run at {url}: no {SEAL} is there, which is written last. Check the address; where a "
            "run was being written, wait for it or run it again."
        )
    return seal


@cache
def _whole_copy(url: str, seal: bytes) -> Path:
    folder = _copy(url, seal)
    if found := flaws(folder):
        shutil.rmtree(folder.parent)
        raise RunFolderError(
            f"The run at {url} is damaged, or was replaced while it was read: {'; '.join(found[:3])}"
            f"{f'; and {len(found) - 3} files more' if len(found) > 3 else ''}. `synapse verify` names every file."
        )
    return folder


def _copy(url: str, seal: bytes) -> Path:
    """Return a folder, gone when the process ends, with a seal and those of the files that it names that are there."""
    names = _names_in(seal)
    for name in names:
        place = PureWindowsPath(name)  # which knows both kinds of slashes
        if place.anchor or ".." in place.parts or not place.parts:
            raise RunFolderError(f"{url}/{SEAL} names {name!r}, which is no file inside the folder: do not trust it.")
    outer = Path(tempfile.mkdtemp(prefix="synapse-"))
    atexit.register(shutil.rmtree, outer, ignore_errors=True)
    folder = outer / url.rsplit("/", 1)[-1]  # a run without a title is called as its folder
    folder.mkdir()
    (folder / SEAL).write_bytes(seal)
    with telling(url, RunFolderError, "read"):
        system, root = system_of(url)
        _each(system, partial(_get, system, root, folder), names)
    return folder


def _names_in(said: bytes | None) -> list[str]:
    """Return the names in a seal, or in what stands in for one; none where it cannot be read."""
    try:
        names = json.loads(said or b"[]")
    except ValueError:
        return []
    return [str(name) for name in names] if isinstance(names, (dict, list)) else []


def _content(system: AbstractFileSystem, path: str) -> bytes | None:
    try:
        content: bytes = system.cat_file(path)
    except FileNotFoundError:
        return None
    return content


def _sizes(system: AbstractFileSystem, root: str) -> dict[str, int]:
    """Return the size of every file of a folder, by its place in it."""
    system.invalidate_cache()
    return {name.removeprefix(f"{root}/"): said["size"] for name, said in system.find(root, detail=True).items()}


def _each(system: AbstractFileSystem, work: Callable[[str], None], names: Iterable[str]) -> None:
    """Do something with each file, several at a time where the file system is made for it."""
    with ThreadPoolExecutor(_AT_ONCE if system.async_impl else 1) as pool:
        list(pool.map(work, sorted(names)))  # which raises what the first one raised


def _put(system: AbstractFileSystem, folder: Path, root: str, name: str) -> None:
    system.put_file(str(folder / name), f"{root}/{name}")


def _get(system: AbstractFileSystem, root: str, folder: Path, name: str) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        system.get_file(f"{root}/{name}", str(path))
    except FileNotFoundError:
        path.unlink(missing_ok=True)


def _remove(system: AbstractFileSystem, root: str, name: str) -> None:
    system.rm_file(f"{root}/{name}")
