"""The logits of a sweep as they come in: in memory, or in a folder from which a sweep that was killed goes on."""

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from synapse.errors import RunFolderError

log = logging.getLogger(__name__)

CLEAN = -1
"""The part of a sweep that is its clean passes."""


@dataclass(frozen=True, eq=False)
class SweepResults:
    """The logits of every cell and example (NaN: not run), those of the clean passes, and what has been done.

    `done[i, g]` says that the runs of group g are through on example i; its last column is the clean pass.
    """

    logits: Float[np.ndarray, "cell example label"]
    clean_logits: Float[np.ndarray, "example label"]
    done: Bool[np.ndarray, "example part"]

    @classmethod
    def in_memory(cls, n_cells: int, n_examples: int, n_labels: int, n_groups: int) -> "SweepResults":
        """Return empty results."""
        shapes = _shapes(n_cells, n_examples, n_labels, n_groups)
        return cls(*(np.full(shape, fill, dtype=dtype) for shape, dtype, fill in shapes.values()))

    @classmethod
    def in_folder(
        cls, folder: Path, identity: str, n_cells: int, n_examples: int, n_labels: int, n_groups: int
    ) -> "SweepResults":
        """Return the results in a folder, as far as the sweep got; a new one is made where there is none.

        The arrays lie in files and take no memory; a part counts as done when it has reached the disk.

        Raises:
            RunFolderError: the folder holds something else.
        """
        shapes = _shapes(n_cells, n_examples, n_labels, n_groups)
        plan = {"identity": identity, "shapes": {name: list(shape) for name, (shape, _, _) in shapes.items()}}
        if folder.exists():
            _check_folder(folder, plan)
            log.info("The sweep goes on where it was left in %s.", folder)
        else:
            _begin(folder, plan, shapes)
        return cls(*(np.lib.format.open_memmap(folder / f"{name}.npy", mode="r+") for name in shapes))

    def is_done(self, examples: Int[np.ndarray, "chosen"], part: int) -> bool:
        """Return whether a part is through on all of these examples."""
        return bool(self.done[examples, part].all())

    def finish(self, examples: Int[np.ndarray, "chosen"], part: int) -> None:
        """Say that a part is through on these examples, once what it gave is safe."""
        _flush(self.clean_logits if part == CLEAN else self.logits)
        self.done[examples, part] = True
        _flush(self.done)


def identity_of(values: Mapping[str, Any]) -> str:
    """Return a hash of what a sweep's logits depend on."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


_Shapes = Mapping[str, tuple[tuple[int, ...], str, Any]]


def _shapes(n_cells: int, n_examples: int, n_labels: int, n_groups: int) -> _Shapes:
    return {
        "logits": ((n_cells, n_examples, n_labels), "float32", np.nan),
        "clean_logits": ((n_examples, n_labels), "float32", np.nan),
        "done": ((n_examples, n_groups + 1), "bool", False),
    }


def _check_folder(folder: Path, plan: Mapping[str, Any]) -> None:
    """Refuse a folder that is not that of this sweep."""
    try:
        is_ours = json.loads((folder / "sweep.json").read_text(encoding="utf-8")) == plan
    except (OSError, ValueError):
        is_ours = False
    if not is_ours or not all((folder / f"{name}.npy").is_file() for name in plan["shapes"]):
        raise RunFolderError(
            f"{str(folder)!r} is not what a sweep left there; remove it, or keep the sweep in another folder."
        )


def _begin(folder: Path, plan: Mapping[str, Any], shapes: _Shapes) -> None:
    """Write empty arrays, beside the place and then renamed, so that no half of them is ever found there."""
    if folder.parent.exists() and not folder.parent.is_dir():
        raise RunFolderError(f"{str(folder.parent)!r} is a file; a folder for the sweep was expected.")
    draft = folder.with_name(f"{folder.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    for name, (shape, dtype, fill) in shapes.items():
        array = np.lib.format.open_memmap(draft / f"{name}.npy", mode="w+", dtype=np.dtype(dtype), shape=shape)
        array[...] = fill
        array.flush()
    (draft / "sweep.json").write_text(json.dumps(plan), encoding="utf-8")
    draft.rename(folder)


def _flush(array: np.ndarray) -> None:
    if isinstance(array, np.memmap):
        array.flush()
