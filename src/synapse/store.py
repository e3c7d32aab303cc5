"""The run folder: what one study leaves behind. Written beside, then renamed, so that a half-written run is never read.

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

from synapse.errors import RunFolderError
from synapse.integrity import seal
from synapse.types import Sweep

FORMAT = 1
"""Version of the run folder's format; docs/run-folder.md describes it."""


@contextmanager
def new_run(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give a temporary folder beside `path`, and move it there when the block ends well; otherwise it is removed.

    Raises:
        RunFolderError: something is at `path` already that is no run folder, or one and `overwrite` is not set.
    """
    check_free(path, overwrite=overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        yield draft
        seal(draft, without=[page.name for page in draft.glob("report*.html")])  # they may be drawn again
        if path.exists():
            shutil.rmtree(path)
        draft.chmod(0o755)
        draft.rename(path)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def check_free(path: Path, *, overwrite: bool) -> None:
    """Refuse a place for a run that would cost somebody their files."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    is_run = (path / "manifest.json").is_file() and (path / "scorecard.json").is_file()
    if not is_run:
        raise RunFolderError(f"{str(path)!r} exists and is no run folder; give another place with --out.")
    if not overwrite:
        raise RunFolderError(f"{str(path)!r} already holds a run; give another place with --out, or --overwrite.")


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


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
