"""A recording on disk: written window by window beside its place, sealed and moved there when it is whole.

```text
KEY/manifest.json              what it depends on, and what it holds
KEY/checksums.json             size and SHA-256 of every file
KEY/values.zarr/COMPONENT/NN   (example, unit), one array a layer; a chunk is a window
KEY/values.zarr/logits         (example, label); `features` (example, feature), `targets` (example)
KEY/moments.zarr/...           counts, means and sums of squares of every window
```

While it is written it is called `.KEY.draft`, and `windows/NNNNNN.json` holds the hashes of a window that is through.
"""

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from jaxtyping import Float
from zarr.codecs import BytesCodec, Crc32cCodec

from synapse.errors import ResourceError, RunFolderError, SettingsError
from synapse.integrity import SEAL, FileRecord, flaws, records_of, seal, write_whole
from synapse.moments import Moments
from synapse.recording.passes import Window
from synapse.stored import MISSING, StoredRows, StoredValues, encoded_numbers, read_numbers
from synapse.types import Activations, Component

log = logging.getLogger(__name__)

FORMAT = 2
"""Version of the format, and of what the recording code works out: another one is another recording."""

DTYPES = {"float32": 4, "float16": 2, "bfloat16": 2}
"""Types in which states are stored, and their bytes."""

_WINDOW_BYTES = 32 * 2**20
_FEWEST, _MOST = 64, 1024
"""Examples in a window: at least, at most."""

_SPARE_BYTES = 64 * 2**20
"""What is left of a disk, at least."""


@dataclass(frozen=True)
class Layout:
    """What a recording holds, in numbers: `components` maps to the number of layers and of units."""

    n_examples: int
    labels: tuple[str, ...]
    components: Mapping[Component, tuple[int, int]]
    n_features: int | None
    has_logits: bool
    dtype: str

    @cached_property
    def n_windows(self) -> int:
        """Number of windows."""
        numbers = sum(n_layers * width for n_layers, width in self.components.values())
        most = int(np.clip(_WINDOW_BYTES // (4 * numbers), _FEWEST, _MOST))
        return -(-self.n_examples // most)

    @cached_property
    def window(self) -> int:
        """Number of examples in a window, all of about a size: few enough for their states to take some 32 MiB."""
        return -(-self.n_examples // max(1, self.n_windows))

    def span(self, window: int) -> slice:
        """Return the positions of a window's examples."""
        return slice(window * self.window, min((window + 1) * self.window, self.n_examples))

    @property
    def arrays(self) -> dict[str, tuple[int, str]]:
        """Width and stored type of every array with a row an example."""
        stored = "uint16" if self.dtype == "bfloat16" else self.dtype
        found = {
            f"{name}/{layer:02d}": (width, stored)
            for name, (n_layers, width) in self.components.items()
            for layer in range(n_layers)
        }
        if self.has_logits:
            found["logits"] = (len(self.labels), "float32")
        if self.n_features is not None:
            found["features"] = (self.n_features, "float32")
        return found

    @property
    def moments(self) -> dict[str, tuple[int, ...]]:
        """Shape of the moments of every window: groups, and the number of units last."""
        shapes: dict[str, tuple[int, ...]] = {}
        for name, (n_layers, width) in self.components.items():
            shapes[f"{name}/rows"] = (n_layers, width)
            shapes[f"{name}/classes"] = (n_layers, len(self.labels), width)
        return shapes

    @property
    def n_bytes(self) -> int:
        """Disk space that it takes, but for small files."""
        a_row = sum(width * np.dtype(dtype).itemsize for width, dtype in self.arrays.values()) + 8
        a_window = sum(16 * int(np.prod(shape)) for shape in self.moments.values())
        return self.n_windows * (self.window * a_row + a_window)  # the last chunk is filled up

    def plain(self) -> dict[str, Any]:
        """Return it as it stands in the manifest."""
        return {
            "n_examples": self.n_examples,
            "labels": list(self.labels),
            "components": {name: list(sizes) for name, sizes in self.components.items()},
            "n_features": self.n_features,
            "has_logits": self.has_logits,
            "dtype": self.dtype,
        }

    @classmethod
    def of_plain(cls, plain: Mapping[str, Any]) -> "Layout":
        """Return what `plain` gave."""
        components = {name: (int(sizes[0]), int(sizes[1])) for name, sizes in plain["components"].items()}
        return cls(**{**plain, "labels": tuple(plain["labels"]), "components": components})


@dataclass(frozen=True, eq=False)
class Draft:
    """A recording that is being written."""

    folder: Path
    layout: Layout

    @classmethod
    def at(cls, folder: Path, layout: Layout, depends_on: Mapping[str, Any], targets: np.ndarray) -> "Draft":
        """Return the draft in a folder, as far as it got; a new one is begun where there is none.

        Raises:
            ResourceError: the disk is too small for what is still to be written.
        """
        draft = cls(folder, layout)
        manifest = json.dumps({"format": FORMAT, "layout": layout.plain(), "depends_on": dict(depends_on)}, indent=1)
        try:
            is_ours = (folder / "manifest.json").read_text(encoding="utf-8") == manifest
        except (OSError, ValueError):
            is_ours = False
        if not is_ours:
            shutil.rmtree(folder, ignore_errors=True)
        for path in folder.rglob("*"):
            if path.suffix == ".partial" or path.name.startswith("."):  # a file that was being written at the end
                path.unlink()
        here = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if is_ours else 0
        check_disk(folder.parent, layout.n_bytes - here)
        if not is_ours:
            draft._begin(manifest, targets)
        elif not draft.is_sealed:
            (folder / SEAL).unlink(missing_ok=True)
            (folder / "windows").mkdir(exist_ok=True)
        return draft

    def _begin(self, manifest: str, targets: np.ndarray) -> None:
        self.folder.mkdir(parents=True)
        values = zarr.create_group(str(self.folder / "values.zarr"))
        n, window = self.layout.n_examples, self.layout.window
        for name, (width, dtype) in self.layout.arrays.items():
            _create(values, name, (n, width), (window, width), dtype)
        _create(values, "targets", (n,), (window,), "int64")
        moments = zarr.create_group(str(self.folder / "moments.zarr"))
        for name, shape in self.layout.moments.items():
            for part, its_shape in _parts(shape).items():
                dtype = "int64" if part == "count" else "float64"
                _create(moments, f"{name}/{part}", (self.layout.n_windows, *its_shape), (1, *its_shape), dtype)
        (self.folder / "windows").mkdir()
        values["targets"][:] = targets
        # Last: without it the folder is nobody's.
        write_whole(self.folder / "manifest.json", manifest)

    def is_done(self, window: int) -> bool:
        """Return whether a window is through, and its files are what was written."""
        try:
            written = json.loads(self._record(window).read_text(encoding="utf-8"))
            return bool(records_of(self.folder, self._chunks(window)) == written)
        except (OSError, ValueError):
            return False

    def write(self, window: int, found: Window) -> None:
        """Write what a window gave."""
        span = self.layout.span(window)
        for name in self.layout.components:
            for layer, states in enumerate(found.values[name]):
                self._values[f"{name}/{layer:02d}"][span] = self._encoded(states, f"{name} of layer {layer}")
            for kind, moments in (("rows", found.rows[name]), ("classes", found.classes[name])):
                for part in _PARTS:
                    self._moments[f"{name}/{kind}/{part}"][window] = getattr(moments, part)
        if found.logits is not None:
            self._values["logits"][span] = found.logits
        if found.features is not None:
            self._values["features"][span] = found.features
        write_whole(self._record(window), json.dumps(records_of(self.folder, self._chunks(window))))

    def _encoded(self, states: Float[np.ndarray, "example unit"], place: str) -> np.ndarray:
        encoded = encoded_numbers(states, self.layout.dtype)
        if self.layout.dtype == "float16" and np.isinf(encoded).any():
            raise SettingsError(
                f"The states of {place} reach {float(np.abs(states).max()):.3g}, and float16 holds no more than 65504; "
                "store them as bfloat16 or float32."
            )
        return encoded

    @property
    def is_sealed(self) -> bool:
        """Whether all windows are through, and their files are what was written: killed between that and its move."""
        return not flaws(self.folder)

    def seal(self) -> None:
        """Write down what the windows hold, all of which are through."""
        known: dict[str, FileRecord] = {}
        for window in range(self.layout.n_windows):
            known |= json.loads(self._record(window).read_text(encoding="utf-8"))
        records = [self._record(window).relative_to(self.folder) for window in range(self.layout.n_windows)]
        seal(self.folder, known=known, without=[record.as_posix() for record in records])

    def moved(self, folder: Path) -> "Recording":
        """Move the sealed draft to its place."""
        shutil.rmtree(self.folder / "windows", ignore_errors=True)
        if folder.exists():  # what was there was found to be damaged
            shutil.rmtree(folder)
        self.folder.rename(folder)
        return Recording(folder)

    @cached_property
    def _values(self) -> Any:
        return zarr.open_group(str(self.folder / "values.zarr"), mode="r+")

    @cached_property
    def _moments(self) -> Any:
        return zarr.open_group(str(self.folder / "moments.zarr"), mode="r+")

    def _record(self, window: int) -> Path:
        return self.folder / "windows" / f"{window:06d}.json"

    def _chunks(self, window: int) -> list[Path]:
        """Return the files of a window."""
        values = [self.folder / "values.zarr" / name / "c" / str(window) / "0" for name in self.layout.arrays]
        moments = [
            Path(self.folder / "moments.zarr" / name / part / "c" / str(window), *("0" for _ in its_shape))
            for name, shape in self.layout.moments.items()
            for part, its_shape in _parts(shape).items()
        ]
        return values + moments


@dataclass(frozen=True, eq=False)
class Recording:
    """A whole recording on disk.

    Raises:
        RunFolderError: when it is read, and is no recording, of another format, or not whole.
    """

    folder: Path

    @cached_property
    def manifest(self) -> Mapping[str, Any]:
        """What it depends on and what it holds."""
        try:
            found = json.loads((self.folder / "manifest.json").read_text(encoding="utf-8"))
            known = found["format"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunFolderError(f"{str(self.folder)!r} is no recording: its manifest cannot be read.") from error
        if known != FORMAT:
            raise RunFolderError(
                f"{str(self.folder)!r} is a recording of format {known}, and this version reads format {FORMAT}: "
                "record anew."
            )
        assert isinstance(found, dict)
        return found

    @cached_property
    def layout(self) -> Layout:
        """What it holds, in numbers."""
        return Layout.of_plain(self.manifest["layout"])

    def flaws(self, *, thorough: bool = True) -> list[str]:
        """Return what is wrong with it, a sentence each; without `thorough` only presence and sizes are looked at."""
        return flaws(self.folder, thorough=thorough)

    def activations(self, component: Component, *, reads_several_rows: bool) -> Activations:
        """Return the activations of a component, whose states are read from the files when they are asked for."""
        found = self.flaws(thorough=False)
        if found:
            raise RunFolderError(f"{str(self.folder)!r} is not whole: {found[0]}. Remove it, and record anew.")
        layout, values = self.layout, zarr.open_group(str(self.folder / "values.zarr"), mode="r")
        rows, classes = (self._merged(f"{component}/{kind}") for kind in ("rows", "classes"))
        n_layers, _ = layout.components[component]
        return Activations(
            values=StoredValues(tuple(StoredRows(values[f"{component}/{layer:02d}"]) for layer in range(n_layers))),
            logits=read_numbers(values["logits"], slice(None)) if layout.has_logits else None,
            features=None if layout.n_features is None else StoredRows(values["features"]),
            targets=read_numbers(values["targets"], slice(None)),
            labels=layout.labels,
            row_mean=rows.mean.astype(np.float32),
            row_deviation=rows.deviation.astype(np.float32),
            class_moments=classes,
            source=self.manifest["depends_on"]["examples"],
            component=component,
            reads_several_rows=reads_several_rows,
        )

    def _merged(self, name: str) -> Moments:
        """Return moments over all windows, merged in their order."""
        group = zarr.open_group(str(self.folder / "moments.zarr"), mode="r")
        parts = [group[f"{name}/{part}"] for part in _PARTS]
        whole = Moments.none(*self.layout.moments[name])
        for window in range(self.layout.n_windows):  # one in memory at a time
            whole = whole.merged(Moments(*(read_numbers(part, slice(window, window + 1))[0] for part in parts)))
        return whole


_PARTS = ("count", "mean", "squares")


def _parts(shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {"count": shape[:-1], "mean": shape, "squares": shape}


def _create(group: Any, name: str, shape: tuple[int, ...], chunks: tuple[int, ...], dtype: str) -> None:
    # Activations hardly compress; a checksum in every chunk finds damage wherever it is read. A chunk of zeros is
    # written too, and the fill value is no number that is: one that is missing must not pass for zeros.
    group.create_array(
        name,
        shape=shape,
        chunks=tuple(max(1, length) for length in chunks),
        dtype=dtype,
        filters=None,
        compressors=[Crc32cCodec()],
        serializer=BytesCodec(),
        fill_value=MISSING.get(dtype, np.nan),
        config={"write_empty_chunks": True},
    )


def check_disk(folder: Path, n_bytes: int) -> None:
    """Say how much will be written, and refuse what does not fit on the disk.

    Raises:
        ResourceError: there is not room enough.
    """
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    log.info("The recording takes %s on disk; %s are free.", in_words(n_bytes), in_words(free))
    if n_bytes + _SPARE_BYTES > free:
        raise ResourceError(
            f"The recording needs {in_words(n_bytes)} on the disk of {str(folder)!r}, where {in_words(free)} are free; "
            "free some, keep it elsewhere, record fewer examples, or store it in float16."
        )


def in_words(n_bytes: int) -> str:
    """Return a size in the unit that suits it."""
    size, units = float(max(n_bytes, 0)), ["bytes", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.0f} {units[0]}" if units[0] == "bytes" else f"{size:.1f} {units[0]}"
