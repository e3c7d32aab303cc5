"""A run folder, read: `open_run(path, component) -> Run`."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import zarr

from synapse.elsewhere import here, place_of
from synapse.errors import RunFolderError, SettingsError, near
from synapse.report.words import Wording
from synapse.types import CELL_COLUMNS, SCOPES, Figure

FORMAT = 1
"""The format of manifest and scorecard that is read here."""

OF_THE_MODEL = ("format", "clean", "vulnerability")
"""Sections of the scorecard that are of the whole model, whatever the component."""

_RESIDUAL = "residual"
"""The component of run folders that name none: they were written when there was no other."""

_INTERVAL = ("value", "low", "high", "n")
_COLUMNS: Mapping[str, tuple[str, ...]] = {
    "probe": ("component", "layer", "depth", "measure", *_INTERVAL, "unit"),
    "ranking": ("component", "method", "layer", "label", "rank", "unit", "score"),
    "agreement": (
        *("component", "layer", "label", "method", "other", "k", "tau"),
        *("rbo", "rbo_chance", "jaccard", "jaccard_chance", "p", "p_adjusted"),
    ),
    "rank_stability": (
        *("component", "method", "layer", "label", "rank", "unit", "median"),
        *("low", "high", "k", "top_probability", "draws"),
    ),
    "sweep": (*CELL_COLUMNS, "n", "accuracy", "accuracy_low", "accuracy_high", "drop"),
    "attack": (
        "attack",
        "location",
        "source",
        "target",
        "arm",
        "measure",
        "budget",
        "budget_unit",
        *_INTERVAL,
    ),
    "defence": (
        *("what", "location", "chosen", "draw", "protected", "of", "before", "after"),
        *("unit", "searched", "source", "target", "factor"),
    ),
}


@dataclass(frozen=True, eq=False)
class Run:
    """What one study left behind about one component of the model.

    Tables are read when first asked for and hold the rows of the component; a missing one is an empty frame.
    """

    path: Path
    """The folder that is read: the run folder, or a copy of one that lies elsewhere."""
    place: Path | str
    """Where the run folder is: its path, or its URL."""
    manifest: Mapping[str, Any]
    """What was run: settings, model, data, versions, timings."""
    scorecard: Mapping[str, Any]
    """The measured figures, by section."""
    component: str = _RESIDUAL
    """The component that tables and figures are of."""

    @property
    def components(self) -> tuple[str, ...]:
        """The components of the study, in its order."""
        return _components(self.manifest)

    @property
    def is_first(self) -> bool:
        """Whether the component is the first of the study."""
        return self.component == self.components[0]

    @property
    def wording(self) -> Wording:
        """What the component and the rows that the head reads are called."""
        readout = self.model.get("readout")
        return Wording(self.component, readout if isinstance(readout, str) else "")

    @property
    def model(self) -> Mapping[str, Any]:
        """What the manifest says of the model, empty where it says nothing."""
        model = self.manifest.get("model")
        return model if isinstance(model, Mapping) else {}

    @property
    def n_heads(self) -> int | None:
        """Number of attention heads of a block, None where they were not told apart."""
        heads = self.model.get("n_heads")
        return heads if isinstance(heads, int) else None

    @property
    def title(self) -> str:
        """The title of the study, or the folder's name where it has none."""
        return str(self.manifest.get("title") or self.path.name)

    @property
    def labels(self) -> tuple[str, ...]:
        """The class names, in the order of the logits."""
        return tuple(str(label) for label in self.manifest["labels"])

    @property
    def n_layers(self) -> int:
        """Number of layers of the component."""
        return int(self._shape["n_layers"])

    @property
    def width(self) -> int:
        """Number of units of the component in a layer."""
        return int(self._shape["width"])

    @property
    def _shape(self) -> Mapping[str, Any]:
        shape: Mapping[str, Any] = self.manifest.get("components", {}).get(self.component, self.manifest)
        return shape

    @property
    def last(self) -> int:
        """Index of the last layer."""
        return self.n_layers - 1

    @property
    def scopes(self) -> tuple[str, ...]:
        """The scopes that have headroom figures, in the order of `synapse.types.SCOPES`.

        Of scopes that come to the same edit, the first stands for all: see `Wording.distinct`.
        """
        return self.scopes_of("stability", "headroom")

    def scopes_of(self, *keys: str) -> tuple[str, ...]:
        """Return the scopes that have figures under these keys of the scorecard, in the same way."""
        measured = self.section(*keys)
        return self.wording.distinct(scope for scope in SCOPES if measured.get(scope))

    @property
    def swept_scopes(self) -> tuple[str, ...]:
        """The scopes in the sweep table, in the same way."""
        swept = set(self.sweep["scope"])
        return self.wording.distinct(scope for scope in SCOPES if scope in swept)

    @property
    def method(self) -> str:
        """The ranking that was swept in full, which the scorecard judges: the first one of the sweep."""
        return next(iter(self.swept_methods), "")

    @property
    def swept_methods(self) -> tuple[str, ...]:
        """The methods whose ranking over all classes was swept in every scope, in the order of the table.

        Methods that were swept in one scope only, to be judged beside the first, have a place in the section
        `faithfulness` of the scorecard.
        """
        sweep = self.sweep
        top = sweep[(sweep["selection"] == "top") & (sweep["label"] == "") & (sweep["method"] != "")]
        scopes = top.groupby("method", sort=False)["scope"].nunique()
        return tuple(str(method) for method in scopes.index[scopes == scopes.max()])

    @property
    def judged_scope(self) -> str:
        """The scope in which several rankings were judged beside each other, empty where none were."""
        scopes = self.scopes_of("faithfulness", "quality")
        return "all" if "all" in scopes else next(iter(scopes), "")

    def depth(self, layer: int) -> float:
        """Return the relative depth of a layer, `(layer + 1) / n_layers`, in (0, 1]."""
        return (layer + 1) / self.n_layers

    def section(self, *keys: str | int) -> Mapping[str, Any]:
        """Return the part of the scorecard under these keys, empty where it is missing.

        What is of the whole model, `OF_THE_MODEL`, is the same for every component.
        """
        part: Any = self.scorecard
        if not self.is_first and not (keys and keys[0] in OF_THE_MODEL):
            keys = ("components", self.component, *keys)
        for key in keys:
            part = part.get(str(key)) if isinstance(part, Mapping) else None
        return part if isinstance(part, Mapping) else {}

    def figure(self, *keys: str | int) -> Figure | None:
        """Return the figure under these keys of the scorecard, None where it was not measured."""
        part = self.section(*keys)
        if "value" not in part:
            return None
        value, low, high = (_finite(part.get(name)) for name in ("value", "low", "high"))
        note = str(part.get("note", ""))
        return Figure(value, low, high, int(part.get("n") or 0), str(part.get("unit", "")), note)

    @cached_property
    def probe(self) -> pd.DataFrame:
        """One row per layer and measure of the probes."""
        return self._of_component("probe")

    @cached_property
    def ranking(self) -> pd.DataFrame:
        """One row per method, layer, label and rank."""
        return self._of_component("ranking")

    @cached_property
    def agreement(self) -> pd.DataFrame:
        """One row per layer, label and pair of ranking methods."""
        return self._of_component("agreement")

    @cached_property
    def rank_stability(self) -> pd.DataFrame:
        """One row per layer, label and unit of the ranking that was made again; empty where none was."""
        return self._of_component("rank_stability")

    @cached_property
    def sweep(self) -> pd.DataFrame:
        """One row per cell of the sweep."""
        return self._of_component("sweep")

    @cached_property
    def zeroed(self) -> Mapping[tuple[int, str], pd.DataFrame]:
        """The cells of the sweep that set units to zero, by layer and scope."""
        zero = self.sweep[self.sweep["kind"] == "zero"]
        places: dict[tuple[int, str], pd.DataFrame] = {
            (int(str(layer)), str(scope)): cells for (layer, scope), cells in zero.groupby(["layer", "scope"])
        }
        return places

    @cached_property
    def attack(self) -> pd.DataFrame:
        """One row per attack, arm, measure and budget."""
        return self._table("attack")

    @cached_property
    def defence(self) -> pd.DataFrame:
        """One row per protection of the final map, and per random one beside it; empty where none was tried."""
        return self._table("defence")

    @cached_property
    def clean_margin(self) -> float | None:
        """Median distance of the highest clean logit from the second one, in logits; None without logits."""
        if not (self.path / "logits.zarr").is_dir():
            return None
        try:
            clean = np.asarray(zarr.open_group(self.path / "logits.zarr", mode="r")["clean"])
        except (KeyError, OSError, ValueError) as error:
            message = f"{self.place}/logits.zarr cannot be read ({error}). Run the study again."
            raise RunFolderError(message) from error
        two = np.sort(clean, axis=1)[:, -2:]  # (example, 2): second, highest
        return float(np.median(two[:, 1] - two[:, 0]))

    def _of_component(self, name: str) -> pd.DataFrame:
        table = self._table(name)
        return table[table["component"] == self.component].reset_index(drop=True)

    def _table(self, name: str) -> pd.DataFrame:
        path, expected = self.path / "tables" / f"{name}.parquet", _COLUMNS[name]
        shown = f"{self.place}/tables/{name}.parquet"
        if not path.is_file():
            return pd.DataFrame({column: [] for column in expected})
        try:
            table = pd.read_parquet(path)
        except (OSError, ValueError) as error:  # pyarrow's errors are kinds of both
            raise RunFolderError(f"{shown} is no parquet file ({error}). Run the study again.") from error
        if table.empty:  # nothing was measured; such a table may have no columns either
            return pd.DataFrame({column: [] for column in expected})
        if "component" in expected and "component" not in table and "components" not in self.manifest:
            table.insert(0, "component", _RESIDUAL)
        if missing := [column for column in expected if column not in table]:
            raise RunFolderError(
                f"{shown} has no column {', '.join(map(repr, missing))}; this version of SYNAPSE writes "
                f"{', '.join(expected)}. Run the study again with it."
            )
        return table


def open_run(path: Path | str, component: str | None = None) -> Run:
    """Return the run in a folder, as far as it is about one component: the first of the study unless one is named.

    The folder may be the URL of one elsewhere, of which a copy is made (see `synapse.elsewhere.here`).

    Raises:
        RunFolderError: no folder, no manifest or scorecard in it, an unfinished study, or another format; elsewhere,
            also a place that cannot be reached and files that are not what was written.
        SettingsError: a component that was not studied.
    """
    place, folder = place_of(path), here(path)
    if not folder.is_dir():
        raise RunFolderError(f"{place} is no folder. Give the folder that a study wrote, with manifest.json in it.")
    manifest = _read(folder, "manifest.json", place)
    if (status := manifest.get("status")) != "complete":
        raise RunFolderError(
            f"The study in {place} did not finish: its status is {status!r}, not 'complete'. "
            "Run it again with the same output folder to go on where it stopped."
        )
    scorecard = _read(folder, "scorecard.json", place)
    if missing := [key for key in ("labels", "n_layers", "width") if key not in manifest]:
        raise RunFolderError(f"{place}/manifest.json has no {' and no '.join(missing)}. Run the study again.")
    components = _components(manifest)
    for name, shape in manifest.get("components", {}).items():
        if not {"n_layers", "width"} <= set(shape):
            raise RunFolderError(
                f"{place}/manifest.json does not say how many layers and units {name!r} has. Run the study again."
            )
    if component is not None and component not in components:
        raise SettingsError(
            f"The run in {place} has no component {component!r}; it has {', '.join(components)}."
            + near(component, components)
        )
    return Run(folder, place, manifest, scorecard, components[0] if component is None else component)


def open_runs(paths: Sequence[Path | str]) -> list[tuple[str, Run]]:
    """Return every run with a name: its title, with its folder's name where two titles are the same, or all its place.

    A run is that of its first component.
    """
    runs = [open_run(path) for path in paths]
    names = [run.title for run in runs]
    for told_apart in ([run.path.resolve().name for run in runs], [run.place for run in runs]):
        names = [
            name if names.count(name) == 1 else f"{run.title} ({what})"
            for name, run, what in zip(names, runs, told_apart, strict=True)
        ]
    return list(zip(names, runs, strict=True))


def _read(folder: Path, name: str, place: Path | str) -> Mapping[str, Any]:
    """Return a JSON object of the known format; `place` is what the folder is called."""
    path = folder / name
    if not path.is_file():
        raise RunFolderError(f"{place} has no {name}: it is no finished run folder.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunFolderError(f"{place}/{name} is no JSON ({error}). Run the study again.") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise RunFolderError(
            f"{place}/{name} has format {found!r}; this version of SYNAPSE reads format {FORMAT}. "
            "Read it with the version that wrote it, or run the study again."
        )
    assert isinstance(content, dict)
    return content


def _components(manifest: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(manifest.get("components") or (_RESIDUAL,))


def _finite(value: Any) -> float | None:
    """Return a number, or None for null and NaN."""
    return float(value) if value is not None and math.isfinite(value) else None
