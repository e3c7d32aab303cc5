"""Recordings that are kept, each under the hash of all that it depends on."""

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout

from synapse.data.examples import Examples
from synapse.errors import ResourceError, RunFolderError
from synapse.model.classifier import Classifier, hash_tensors
from synapse.recording.folder import FORMAT, Draft, Layout, Recording, log
from synapse.recording.passes import Wanted, run_window

CACHE = "SYNAPSE_CACHE"
"""The environment variable that names the folder of recordings."""

_KEY = re.compile("[0-9a-f]{32}")

_AT_ONCE = 256
"""Examples that are preprocessed together to be hashed."""


def default_shelf() -> Path:
    """Return the folder of recordings of the command line: `$SYNAPSE_CACHE`, else `~/.cache/synapse`."""
    given = os.environ.get(CACHE)
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "synapse"


@dataclass(frozen=True)
class Shelf:
    """A folder of recordings. Several processes may use it at a time: one records, the others wait for it."""

    folder: Path

    def find(self, key: str) -> Recording | None:
        """Return a recording that is there and whole, as far as presence and sizes tell."""
        recording = Recording(self.folder / key)
        if not (self.folder / key).is_dir():
            return None
        found = recording.flaws(thorough=False)
        if found:
            log.warning("The recording %s is not whole (%s); it is made anew.", key, found[0])
            return None
        os.utime(self.folder / key)  # when it was last used, for `prune`
        return recording

    @contextmanager
    def recording(self, key: str) -> Iterator[None]:
        """Hold a recording's place alone.

        Raises:
            RunFolderError: the folder is a file, or cannot be made.
            ResourceError: another process has held the place for a day.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise RunFolderError(f"{str(self.folder)!r} is a file; a folder for recordings was expected.")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunFolderError(
                f"{str(self.folder)!r} cannot be made ({error.strerror}); a folder for recordings was expected."
            ) from error
        lock = FileLock(self.folder / f".{key}.lock")
        try:
            # The system lets go of it when the process ends, however it ends.
            lock.acquire(timeout=0)
        except Timeout:
            log.warning("Another process is making the recording %s; waiting for it.", key)
            try:
                lock.acquire(timeout=86_400)
            except Timeout as error:
                raise ResourceError(f"Another process has been making the recording {key} for a day.") from error
        try:
            yield
        finally:
            lock.release()

    def draft(self, key: str, layout: Layout, depends_on: Mapping[str, Any], targets: np.ndarray) -> Draft:
        """Return the draft of a recording, as far as it got."""
        return Draft.at(self.folder / f".{key}.draft", layout, depends_on, targets)

    def recordings(self) -> list[Recording]:
        """Return all recordings, those used last first; what else lies in the folder is somebody else's."""
        if not self.folder.is_dir():
            return []
        found = [path for path in self.folder.iterdir() if _KEY.fullmatch(path.name) and path.is_dir()]
        return [Recording(path) for path in sorted(found, key=lambda path: (-path.stat().st_mtime, path.name))]

    def drafts(self) -> list[Path]:
        """Return what was begun and is not finished."""
        found = self.folder.glob(".*.draft") if self.folder.is_dir() else []
        return sorted(path for path in found if _KEY.fullmatch(path.name[1:].removesuffix(".draft")))

    def prune(self, *, older_than: float = 0.0) -> list[Path]:
        """Remove recordings and drafts that were not used for so many days; return where they were."""
        latest = time.time() - older_than * 86_400
        removed = []
        for path in [*(recording.folder for recording in self.recordings()), *self.drafts()]:
            key = path.name.removeprefix(".").removesuffix(".draft")
            try:
                with FileLock(self.folder / f".{key}.lock", timeout=0):
                    if path.stat().st_mtime <= latest:
                        shutil.rmtree(path)
                        removed.append(path)
            except Timeout:
                log.info("%s is in use and stays.", path)
        return removed


def depends_on(
    classifier: Classifier, examples: Examples, targets: np.ndarray, wanted: Wanted, layout: Layout
) -> dict[str, Any]:
    """Return all that a recording depends on, in plain values."""
    sites = wanted.sites(classifier)
    return {
        "format": FORMAT,
        "versions": {name: version(name) for name in ("synapse", "torch", "transformers")},
        "weights": classifier.weights_hash(),
        "preprocess": _preprocess_hash(classifier, examples),
        "examples": examples.fingerprint,
        "targets": hashlib.sha256(targets.tobytes()).hexdigest(),
        "sites": repr((sorted(sites.items()), classifier.anatomy.rows, classifier.anatomy.readout)),
        "layout": layout.plain(),
        "pass": [classifier.max_tokens, classifier.device.type],
        # Whatever else is applied to the model shows in what would be recorded.
        "first": _first_hash(classifier, examples.take(np.arange(min(2, len(examples)))), wanted),
    }


def key_of(dependencies: Mapping[str, Any]) -> str:
    """Return the name of a recording: a hash of all that it depends on."""
    return hashlib.sha256(json.dumps(dependencies, sort_keys=True).encode()).hexdigest()[:32]


def _first_hash(classifier: Classifier, few: Examples, wanted: Wanted) -> str:
    """Return a hash of what a few examples give."""
    found = run_window(classifier, few, few.targets(classifier.labels), wanted, first=0, progress=lambda _: None)
    arrays = [each for name in sorted(wanted.components) for each in (found.values[name], found.rows[name].mean)]
    if found.logits is not None:
        arrays.append(found.logits)
    return hash_tensors({"": tuple(torch.from_numpy(each) for each in arrays)})


def _preprocess_hash(classifier: Classifier, examples: Examples) -> str:
    """Return a hash that changes with the tokenizer's files, with its settings, and with preprocessing of one's own.

    It is what the preprocessing says of itself, or else a hash of what it makes of all examples: what the model gets.
    """
    told = getattr(classifier.preprocess, "fingerprint", None)
    found = told() if callable(told) else None
    if found is not None:
        return str(found)
    digest = hashlib.sha256()
    for start in range(0, len(examples), _AT_ONCE):
        some = examples.take(np.arange(start, min(start + _AT_ONCE, len(examples))))
        inputs = some.inputs if isinstance(some.inputs, np.ndarray) else list(some.inputs)
        digest.update(hash_tensors(classifier.preprocess(inputs)).encode())
    return digest.hexdigest()
