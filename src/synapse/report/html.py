"""The report as one HTML file that needs no network."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from synapse.elsewhere import only_here
from synapse.report import figures
from synapse.report.attacks import COLUMNS, PROTECTION_COLUMNS, cheapest_attacks, protections
from synapse.report.findings import best_ranking, key_numbers, reaches_zero, sentences
from synapse.report.run import Run, open_run
from synapse.report.words import COMPONENTS, EVERY, few, interval, measured, number, sentence

TOP = 10
"""Units shown of each ranking."""

_AT_INPUTS = ("mlp", "heads", "pooler")
"""Components that are inputs of the modules named in the manifest; others are outputs."""


@dataclass(frozen=True)
class Link:
    """One of the pages of a run."""

    component: str
    meaning: str
    """What the component is, in plain words."""
    href: str
    is_here: bool


@dataclass(frozen=True)
class TopUnit:
    """A unit, its score, and the places that it took in most draws of the examples; empty where none were made."""

    unit: int
    score: str
    ranks: str = ""


@dataclass(frozen=True)
class TopUnits:
    """The first units of one ranking, best first."""

    method: str
    layer: int
    label: str
    units: tuple[TopUnit, ...]


@dataclass(frozen=True)
class Judged:
    """How faithful the rankings are at one block, or over all of them."""

    place: str
    qualities: tuple[str, ...]
    """Ordering quality of each method, in their order."""
    best: int | None
    """Position of the best method, None where none is."""
    lead: str
    """Whether the next one can be told from it."""


def write_report(run: Path | str, out: Path | str | None = None) -> Path:
    """Return the path of the report written for a run folder, `report.html` in it unless told otherwise.

    For a run elsewhere, a URL, that is `NAME-report.html` in the working directory: what is there stays as it is.

    That page is of the study's first component; each further one has a page beside it, `report-mlp.html`, and the pages
    link to each other. A file holds everything it shows, the plotting library included, and asks the network for
    nothing.

    Raises:
        RunFolderError: the folder cannot be read as a finished run.
        SettingsError: `out` is elsewhere.
    """
    path = None if out is None else only_here(out, "a report")
    opened = open_run(run)
    if path is None:
        path = opened.path / "report.html" if opened.place == opened.path else Path(f"{opened.path.name}-report.html")
    for component in opened.components:
        here = replace(opened, component=component)
        title = here.title if here.is_first else f"{here.title} · {component}"
        write_page(_page_of(path, here, component), "report.html.j2", title, _context(here, path))
    return path


def _page_of(path: Path, run: Run, component: str) -> Path:
    """Return where the page of a component stands, `path` being that of the first one."""
    return path if component == run.components[0] else path.with_name(f"{path.stem}-{component}{path.suffix}")


def _context(run: Run, path: Path) -> dict[str, Any]:
    manifest = run.manifest
    return {
        "run": run,
        "wording": run.wording,
        "pages": [
            Link(name, COMPONENTS.get(name, ""), quote(_page_of(path, run, name).name), name == run.component)
            for name in run.components
        ],
        "manifest": manifest,
        "sentences": sentences(run),
        "key_numbers": key_numbers(run),
        "panels": figures.panels(run),
        "judged_methods": list(run.section("faithfulness", "overall", run.judged_scope)),
        "judged": judged_rankings(run),
        "attack_columns": COLUMNS,
        "attacks": cheapest_attacks(run) if run.is_first else [],
        "protection_columns": PROTECTION_COLUMNS,
        "protections": protections(run.defence) if run.is_first else [],
        "top_units": top_units(run),
        "as_run": _as_run(run),
        "sites": _sites(run),
        "settings": _rows(manifest.get("settings", {})),
        "versions": _rows(manifest.get("versions", {})),
        "proofs": _rows(run.model.get("proofs", {})),
        "timings": {k: v for k, v in _part(manifest, "timings").items() if isinstance(v, int | float)},
    }


def _as_run(run: Run) -> list[str]:
    """Return sentences about what was done to the model, and to examples of unequal length, to run it."""
    notes = [sentence(str(note)) for note in run.model.get("notes", ())]
    if run.model.get("pads") is False:
        notes.append("Examples of unequal length never share a batch, because padding would move the logits.")
    return notes + sweep_notes(_part(run.manifest, "sweep"))


def sweep_notes(sweep: Mapping[str, Any]) -> list[str]:
    """Return sentences about how the interventions were run, where that was not as usual."""
    notes = []
    plain, reasons = sweep.get("run_plain") or (), sweep.get("reasons") or {}
    if plain:
        why = "; ".join(dict.fromkeys(str(reasons[place]) for place in plain if place in reasons))
        notes.append(
            f"The whole model was run for every intervention at {few([str(place) for place in plain])}"
            f"{f', since nothing could be taken over from a clean pass ({why})' if why else ''}."
        )
    agreement = sweep.get("agreement")
    if agreement:
        notes.append(
            f"Interventions ran in {agreement['precision']}: in {agreement['runs']} runs compared with float32, "
            f"{agreement['same']:.1%} of the predictions were the same, and logits differed by at most "
            f"{agreement['largest']:.2g}."
        )
    return notes


def _sites(run: Run) -> list[tuple[str, str, str]]:
    """Return the sites of the model: component, what it is, and its modules; or why there are none."""
    found, missing = _part(run.model, "sites"), _part(run.model, "missing")
    rows = [
        (str(name), "input of" if name in _AT_INPUTS else "output of", few([str(module) for module in modules]))
        for name, modules in found.items()
    ]
    return rows + [(str(name), f"not found: {why}", "") for name, why in missing.items()]


def judged_rankings(run: Run) -> list[Judged]:
    """Return the ordering quality of every ranking over all blocks, and at each; nothing where none was judged."""
    scope = run.judged_scope
    methods = list(run.section("faithfulness", "overall", scope))
    if not methods:
        return []
    rows = []
    for layer in (None, *range(run.n_layers)):
        place = ("overall", scope) if layer is None else ("quality", scope, layer)
        figures = [run.figure("faithfulness", *place, method) for method in methods]
        best = best_ranking(run, layer)
        verdict = "–" if best is None else f"{measured(best.lead)} before {best.second}"
        rows.append(
            Judged(
                f"mean of all {run.wording.unit_of_depth}s" if layer is None else run.wording.layer(layer),
                tuple("–" if figure is None else measured(replace(figure, n=0)) for figure in figures),
                None if best is None else methods.index(best.method),
                verdict + (", not told apart" if best and reaches_zero(best.lead) else ""),
            )
        )
    return rows


def top_units(run: Run) -> list[TopUnits]:
    """Return the first `TOP` units of every ranking, by method, layer and label (the global one first)."""
    first = run.ranking[run.ranking["rank"] < run.ranking["rank"].min() + TOP].sort_values("rank")
    drawn = run.rank_stability[run.rank_stability["rank"] < TOP]
    columns = (drawn[column] for column in ("method", "layer", "label", "unit", "low", "high"))
    places = {(*unit,): _places(low, high) for *unit, low, high in zip(*columns, strict=True)}
    order = {label: index for index, label in enumerate(("", *run.labels))}
    return [
        TopUnits(
            str(method),
            int(layer),
            EVERY if label == "" else str(label),
            tuple(
                TopUnit(int(unit), number(score, 3), places.get((method, layer, label, unit), ""))
                for unit, score in zip(rows["unit"], rows["score"], strict=True)
            ),
        )
        for (method, layer, label), rows in sorted(
            first.groupby(["method", "layer", "label"], sort=False),
            key=lambda group: (*group[0][:2], order.get(group[0][2], len(order))),
        )
    ]


def _places(low: int, high: int) -> str:
    """Return ranks from 0 as places from 1: `1–3`."""
    return f"{low + 1}" if low == high else f"{low + 1}–{high + 1}"


def write_page(path: Path, template: str, title: str, context: Mapping[str, Any]) -> None:
    """Write a page from a template, beside its place first and then renamed."""
    page = _templates().get_template(template)
    shared = {"title": title, "plotly": Markup(_script(get_plotlyjs()))}
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(page.render(**shared, **context), encoding="utf-8")
    beside.replace(path)


@cache
def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("synapse.report"),
        autoescape=True,  # class names and titles come from the user
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "figures": figures_json,
        "count": "{:,}".format,
        "number": number,
        "interval": interval,
    }
    environment.filters["unbroken"] = unbroken
    return environment


def figures_json(panel: figures.Panel) -> Markup:
    """Return a panel's figures as JSON that can stand inside a script element."""
    parts = [
        f'"{",".join(map(str, chosen))}":{drawn.to_json(remove_uids=True)}' for chosen, drawn in panel.figures.items()
    ]
    return Markup("{" + ",".join(parts) + "}").replace("<", "\\u003c")


def unbroken(text: str) -> str:
    """Return a sentence whose numbers stay on one line, by spaces that do not break."""
    return re.sub(r"\[[−\d., %]+\]|n = [\d,]+|\d %", lambda found: found.group().replace(" ", "\u00a0"), text)


def _script(text: str) -> str:
    """Return a script that cannot end its element early."""
    return text.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _part(manifest: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    part = manifest.get(key)
    return part if isinstance(part, Mapping) else {}


def _rows(part: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Return name and value of every entry, nested ones with a dotted name."""
    if isinstance(part, Mapping):
        return [row for key, value in part.items() for row in _rows(value, f"{prefix}.{key}".lstrip("."))]
    if isinstance(part, Sequence) and not isinstance(part, str):
        return [(prefix, ", ".join(map(str, part)))]
    return [
        (
            prefix,
            {True: "yes", False: "no", None: "–"}.get(part, str(part)) if not isinstance(part, str) else part,
        )
    ]
