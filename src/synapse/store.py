"""The run folder: what one study leaves behind, on this machine or elsewhere. A half-written run is never read.

```text
RUN/manifest.json      settings, seeds, versions, hashes, timings
RUN/scorecard.json     the measures, each with interval and n
RUN/tables/*.parquet   probe, ranking, sweep, attack: tidy, one row a measurement
RUN/logits.zarr        the logits of every cell and example
RUN/report.html        the report, made from all of the above
RUN/checksums.json     size and SHA-256 of every file but the reports
```
"""

import json
import logging
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import zarr
from jaxtyping import Int

from synapse.elsewhere import PAGES, check_writable, names_at, place_of, publish
from synapse.errors import RunFolderError
from synapse.integrity import seal
from synapse.types import Sweep

log = logging.getLogger(__name__)

FORMAT = 1
"""Version of the run folder's format; docs/run-folder.md describes it."""


@contextmanager
def new_run(path: Path | str, *, overwrite: bool = False) -> Iterator[Path]:
    """Give a temporary folder, and put it at `path` when the block ends well; otherwise it is removed.

    On this machine it lies beside `path` and is renamed. Elsewhere it is published file by file, the seal last; where
    that fails, the temporary folder stays, since it holds the whole run, and the log says where.

    Raises:
        RunFolderError: something is at `path` already that is no run folder, or one and `overwrite` is not set; or a
            place elsewhere cannot be written to.
    """
    check_free(path, overwrite=overwrite)
    place = place_of(path)
    draft = _draft(place)
    try:
        yield draft
        seal(draft, without=[page.name for page in draft.glob(PAGES)])
        if isinstance(place, Path):
            _move(draft, place)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    if isinstance(place, str):
        _send(draft, place)


def check_free(path: Path | str, *, overwrite: bool) -> None:
    """Refuse a place for a run that would cost somebody their files, or one elsewhere that cannot be written to.

    Raises:
        RunFolderError: as the message says.
    """
    place = place_of(path)
    names = names_at(place) if isinstance(place, str) else _names_in(place)
    if names and not {"manifest.json", "scorecard.json"} <= names:
        raise RunFolderError(f"{str(place)!r} exists and is no run folder; give another place with --out.")
    if names and not overwrite:
        raise RunFolderError(f"{str(place)!r} already holds a run; give another place with --out, or --overwrite.")
    if isinstance(place, str):
        check_writable(place)  # now, and not after hours


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write readable JSON; NaN and infinity, which JSON does not know, become null."""
    path.write_text(
        json.dumps(_finite(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
    )


def write_table(run: Path, name: str, table: pd.DataFrame) -> None:
    """Write one table of a run."""
    folder = run / "tables"
    folder.mkdir(exist_ok=True)
    table.to_parquet(folder / f"{name}.parquet", index=False)


def write_logits(run: Path, sweep: Sweep, rows: Int[np.ndarray, "example"]) -> None:
    """Write the logits of a sweep; `rows` are the examples' rows in the test file."""
    group = zarr.create_group(store=str(run / "logits.zarr"))
    group.attrs["labels"] = list(sweep.labels)
    for name, values in (
        ("cells", sweep.logits),
        ("clean", sweep.clean_logits),
        ("targets", sweep.targets),
        ("rows", np.asarray(rows, dtype=np.int64)),
    ):
        group.create_array(name, data=values)


def _draft(place: Path | str) -> Path:
    """Return a new temporary folder: where it can be renamed to a place of this machine, or just somewhere."""
    if isinstance(place, str):
        return Path(tempfile.mkdtemp(prefix="synapse-run-"))
    place.parent.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=f".{place.name}-", dir=place.parent))


def _move(draft: Path, place: Path) -> None:
    if place.exists():
        shutil.rmtree(place)
    draft.chmod(0o755)
    draft.rename(place)


def _send(draft: Path, url: str) -> None:
    try:
        publish(draft, url)
    except BaseException:
        log.warning("The run is not at %s; it is whole in %s.", url, draft)
        raise
    shutil.rmtree(draft, ignore_errors=True)


def _names_in(place: Path) -> set[str]:
    """Return what is in a folder; the name of a file for the file."""
    if not place.is_dir():
        return {place.name} if place.exists() else set()
    return {path.name for path in place.iterdir()}


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
