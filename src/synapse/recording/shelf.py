"""Recordings that are kept, each under the hash of all that it depends on."""

import hashlib
import json
import os
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
from synapse.recording.passes import Wanted

CACHE = "SYNAPSE_CACHE"
"""The environment variable that names the folder of recordings."""

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
            RunFolderError: the folder is a file.
            ResourceError: another process has held the place for a day.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise RunFolderError(f"{str(self.folder)!r} is a file; a folder for recordings was expected.")
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / f".{key}.lock")
        try:
            # The system lets go of it when the process ends, however it ends.
            lock.acquire(timeout=0)
        except Timeout:
            log.info("Another process is making the recording %s; waiting for it.", key)
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
        """Return all whole recordings, those used last first."""
        if not self.folder.is_dir():
            return []
        found = [path for path in self.folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
        return [Recording(path) for path in sorted(found, key=lambda path: (-path.stat().st_mtime, path.name))]

    def drafts(self) -> list[Path]:
        """Return what was begun and is not finished."""
        return sorted(self.folder.glob(".*.draft")) if self.folder.is_dir() else []

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
    few = examples.take(np.unique(np.linspace(0, len(examples) - 1, 4).astype(int)))
    return {
        "format": FORMAT,
        "versions": {name: version(name) for name in ("synapse", "torch", "transformers")},
        "weights": classifier.weights_hash(),
        "inputs": hash_of_inputs(classifier, examples),
        "examples": examples.fingerprint,
        "targets": hashlib.sha256(targets.tobytes()).hexdigest(),
        "sites": repr((sites, classifier.anatomy.rows, classifier.anatomy.readout)),
        "layout": layout.plain(),
        "pass": [classifier.max_tokens, classifier.device.type],
        # Whatever else is applied to the model shows in what it says.
        "logits": hash_tensors({"": torch.from_numpy(classifier.predict(few.inputs))}) if len(examples) else "",
    }


def key_of(dependencies: Mapping[str, Any]) -> str:
    """Return the name of a recording: a hash of all that it depends on."""
    return hashlib.sha256(json.dumps(dependencies, sort_keys=True).encode()).hexdigest()[:32]


def hash_of_inputs(classifier: Classifier, examples: Examples) -> str:
    """Return a hash of what the preprocessing makes of the examples.

    That is what the model gets: it changes with the tokenizer's files, with its settings, and with any preprocessing of
    one's own, and with nothing else.
    """
    digest = hashlib.sha256()
    for start in range(0, len(examples), _AT_ONCE):
        some = examples.take(np.arange(start, min(start + _AT_ONCE, len(examples))))
        inputs = some.inputs if isinstance(some.inputs, np.ndarray) else list(some.inputs)
        digest.update(hash_tensors(classifier.preprocess(inputs)).encode())
    return digest.hexdigest()
