"""Edits in words: `layer=5,top=50,class=sqli`, and the run folder and examples that such words need."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np

from synapse.data.examples import Examples, sample_examples
from synapse.errors import RunFolderError, SettingsError, near
from synapse.model.classifier import Classifier
from synapse.perturb.activations import Intervention
from synapse.ranking.base import Ranking, count_of
from synapse.recording import record
from synapse.report.run import Run, open_run
from synapse.sweeping.kinds import RECIPES, Kind
from synapse.types import COMPONENTS, GLOBAL, SCOPES, Activations, Component, Neurons, Scope

REFERENCE_EXAMPLES = 500
"""Examples that means and deviations are taken over, at most."""

_SELECTIONS = ("top", "bottom", "random", "units")

_NO_REFERENCE = Activations(np.zeros((0, 0, 0), np.float32), np.zeros((0, 0), np.float32), np.zeros(0, int), (), "")


@dataclass(frozen=True)
class Edit:
    """An intervention in words: which kind, on which neurons; see `parse_edit` for how it is written.

    `selection` is `top`, `bottom`, `random` or `units`; `size` is a count, or a share of the width if it is a float.
    """

    kind: Kind
    layer: int
    selection: str
    size: int | float = 0
    units: tuple[int, ...] = ()
    label: str = GLOBAL
    component: Component = "residual"
    scope: Scope = "readout"

    @property
    def needs_ranking(self) -> bool:
        """Whether the neurons are named by their place in a ranking."""
        return self.selection in ("top", "bottom")

    @property
    def needs_reference(self) -> bool:
        """Whether the kind takes numbers from examples, such as means or deviations."""
        return not self.kind.fits_onward

    def neurons(self, classifier: Classifier, ranking: Ranking | None, *, seed: int) -> Neurons:
        """Return the neurons that are meant.

        Raises:
            SettingsError: a layer or a class that is not there, or no ranking where one is needed.
        """
        sites = classifier.sites(self.component)
        if not 0 <= self.layer < len(sites):
            raise SettingsError(
                f"Layer {self.layer} was asked for; the classifier has the layers 0 to {len(sites) - 1} of "
                f"{self.component!r}."
            )
        width = sites[self.layer].width
        if self.selection == "units":
            return Neurons(self.layer, self.units or tuple(range(width)), self.component)
        if self.selection == "random":
            order = np.random.default_rng((seed, self.layer)).permutation(width)
            return Neurons(self.layer, tuple(order[: count_of(self.size, width)].tolist()), self.component)
        if ranking is None:
            raise SettingsError(
                f"{self.selection}={self.size} asks for neurons by their rank, but no ranking is there; give the run "
                "folder of a study of this model with --run (`synapse run MODEL --train FILE --test FILE --out FOLDER` "
                "makes one), or name neurons with units=1,2,3 or random=50."
            )
        choose = ranking.top if self.selection == "top" else ranking.bottom
        return choose(self.size, layer=self.layer, label=self.label)

    def on(self, neurons: Neurons, reference: Activations | None, *, seed: int) -> Intervention:
        """Return the intervention on these neurons, with the numbers of the reference examples if it needs any.

        Raises:
            SettingsError: no reference where one is needed, or a scope that the kind's numbers do not fit.
        """
        if reference is None and self.needs_reference:
            raise SettingsError(
                f"{self.kind.name!r} needs numbers of other examples (means, deviations); give a labelled file with "
                "--reference FILE."
            )
        return self.kind.of(neurons, self.scope, reference or _NO_REFERENCE, seed=seed)


def parse_edit(kind: str, text: str, *, option: str = "") -> Edit:
    """Return the edit that a text such as `layer=5,top=50,class=sqli` describes.

    | key | meaning |
    |---|---|
    | `layer` | index of the block, from 0 (not for `pooler`, which is one layer) |
    | `top`, `bottom`, `random` | how many neurons, by rank or at random: a count, a share (0.1) or per cent (10%) |
    | `units` | which neurons, in their place: `1,2,3`, `1-9`, or `all` |
    | `class` | whose ranking; that over all classes unless it is named |
    | `component`, `scope` | where; `residual` and `readout` unless they are named |
    | `strength` | the factor of `scale`, deviations of `noise` (1), ... (see `synapse.sweeping.kinds`) |
    | `towards` | the class of `steer` and `class-mean` |

    Raises:
        SettingsError: a key or a value that is not known, a key that is missing, or one too many.
    """
    said = f"{option or kind} {text}"
    given = _pairs(said, text)
    if kind not in RECIPES:
        raise SettingsError(
            f"There is no intervention {kind!r}; the kinds are {', '.join(RECIPES)}.{near(kind, RECIPES)}"
        )
    recipe = RECIPES[kind]
    names = ("layer", *_SELECTIONS, "class", "component", "scope", "strength", "towards")
    if recipe.strength in given:
        if "strength" in given and recipe.strength != "strength":
            raise SettingsError(f"{said}: strength= and {recipe.strength}= are the same; one of them is enough.")
        given["strength"] = given.pop(recipe.strength)
    for name in given:
        if name not in names:
            raise SettingsError(f"{said}: there is no {name!r}; there are {', '.join(names)}.{near(name, names)}")
    chosen = [name for name in _SELECTIONS if name in given]
    if len(chosen) != 1:
        seen = " and ".join(f"{name}=" for name in chosen) or "no neurons"
        raise SettingsError(
            f"{said}: it names {seen}; one of {', '.join(f'{name}=' for name in _SELECTIONS)} is needed."
        )
    selection, component, scope = chosen[0], given.get("component", "residual"), given.get("scope", "readout")
    if component not in COMPONENTS:
        raise SettingsError(
            f"{said}: there is no component {component!r}; there are {', '.join(COMPONENTS)}."
            f"{near(component, COMPONENTS)}"
        )
    if scope not in SCOPES:
        raise SettingsError(f"{said}: there is no scope {scope!r}; there are {', '.join(SCOPES)}.{near(scope, SCOPES)}")
    if "layer" not in given and component != "pooler":
        raise SettingsError(f"{said}: no layer is named; layer=0 is the first block.")
    if "class" in given and selection not in ("top", "bottom"):
        raise SettingsError(f"{said}: class= says whose ranking is meant, so it goes with top= or bottom=.")
    if recipe.strength and "strength" not in given and kind != "noise":
        raise SettingsError(f"{said}: the {recipe.strength} is missing; add {recipe.strength}=NUMBER.")
    if recipe.label and "towards" not in given:
        raise SettingsError(f"{said}: no class is named; add towards=CLASS.")
    strength = _number(said, "strength", given.get("strength", "1")) if recipe.strength else float("nan")
    if not recipe.strength and "strength" in given:
        raise SettingsError(f"{said}: {kind!r} has no strength; leave it out.")
    return Edit(
        Kind(kind, strength, given.get("towards", GLOBAL)),
        _whole(said, "layer", given.get("layer", "0")),
        selection,
        0 if selection == "units" else _size(said, selection, given[selection]),
        _units(said, given["units"]) if selection == "units" else (),
        given.get("class", GLOBAL),
        component,
        scope,
    )


def _pairs(said: str, text: str) -> dict[str, str]:
    """Return the keys with their values; what follows a comma without a key belongs to the value before."""
    given: dict[str, str] = {}
    name = ""
    for part in text.split(","):
        if "=" in part:
            name, value = (piece.strip() for piece in part.split("=", 1))
            if name in given:
                raise SettingsError(f"{said}: {name}= stands there twice; give the option twice for two edits.")
            given[name] = value
        elif name:
            given[name] += f",{part.strip()}"
        else:
            raise SettingsError(f"{said}: {part!r} is no name=value; something like layer=5,top=50 was expected.")
    return given


def _whole(said: str, name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise SettingsError(f"{said}: {name} is {text!r}; a whole number was expected.") from error


def _number(said: str, name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise SettingsError(f"{said}: {name} is {text!r}; a number was expected.") from error


def _size(said: str, name: str, text: str) -> int | float:
    try:
        if text.endswith("%"):
            return float(text[:-1]) / 100
        return int(text) if text.isdigit() else float(text)
    except ValueError as error:
        raise SettingsError(
            f"{said}: {name} is {text!r}; a count (50), a share (0.1) or per cent (10%) was expected."
        ) from error


def _units(said: str, text: str) -> tuple[int, ...]:
    """Return the units of `1,2,3` or `1-9` or both; none for `all`, which are not known yet."""
    if text == "all":
        return ()
    units: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if found is None:
            raise SettingsError(f"{said}: units holds {part!r}; indices such as 1,2,3 or 1-9, or all, were expected.")
        first, last = int(found[1]), int(found[2] or found[1])
        if last < first:
            raise SettingsError(f"{said}: units holds {part!r}, which ends before it begins; write {last}-{first}.")
        units += range(first, last + 1)
    return tuple(units)


def read_ranking(run: Run, classifier: Classifier, *, method: str | None = None) -> Ranking:
    """Return a ranking of a run's component: the one that was swept unless a method is named.

    Raises:
        RunFolderError: the run is of other weights than the classifier's, or it holds no ranking.
        SettingsError: the run has no ranking by that method.
    """
    theirs, ours = str(run.model.get("hash", "")), classifier.weights_hash()
    if theirs != ours:
        raise RunFolderError(
            f"The run in {run.path} is of a model whose weights hash to {theirs[:12] or 'nothing'}, and this one's "
            f"hash to {ours[:12]}; its neurons are others. Give the run of this model, or run the study again."
        )
    table = run.ranking
    methods = tuple(dict.fromkeys(table["method"].astype(str)))
    if not methods:
        raise RunFolderError(f"The run in {run.path} holds no ranking of {run.component!r}; run the study again.")
    method = method or (run.method if run.method in methods else methods[0])
    if method not in methods:
        raise SettingsError(
            f"The run in {run.path} has no ranking {method!r}; it has {', '.join(methods)}.{near(method, methods)}"
        )
    rows = table[table["method"] == method]
    names = (GLOBAL, *run.labels)
    scores = np.full((run.n_layers, len(names), run.width), -np.inf)
    label = rows["label"].map({name: place for place, name in enumerate(names)}).to_numpy(dtype=np.int64)
    scores[rows["layer"].to_numpy(), label, rows["unit"].to_numpy()] = rows["score"].to_numpy(dtype=np.float64)
    source = str(run.manifest.get("data", {}).get("train", {}).get("hash", ""))
    return Ranking(method, scores, run.labels, source, cast(Component, run.component))


def rankings_for(
    edits: Sequence[Edit], folder: Path | str | None, classifier: Classifier, *, method: str | None = None
) -> dict[Component, Ranking]:
    """Return from a run folder the ranking of every component whose neurons are asked for by rank.

    Raises:
        RunFolderError, SettingsError: as `open_run` and `read_ranking`.
    """
    asked = dict.fromkeys(edit.component for edit in edits if edit.needs_ranking)
    if folder is None:
        return {}
    return {component: read_ranking(open_run(folder, component), classifier, method=method) for component in asked}


def references_for(
    edits: Sequence[Edit], examples: Examples | None, classifier: Classifier, *, seed: int = 0
) -> dict[Component, Activations]:
    """Return the activations of reference examples, for every component whose edits need numbers of them.

    At most `REFERENCE_EXAMPLES` are recorded, with the class shares of the whole.
    """
    asked = dict.fromkeys(edit.component for edit in edits if edit.needs_reference)
    if examples is None or not asked:
        return {}
    chosen = examples.take(sample_examples(examples.targets(classifier.labels), REFERENCE_EXAMPLES, seed=seed))
    return {component: record(classifier, chosen, component=component) for component in asked}
