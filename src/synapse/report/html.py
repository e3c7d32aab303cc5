"""The report as one HTML file that needs no network."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from synapse.report import figures
from synapse.report.findings import key_numbers, sentences
from synapse.report.run import Run, open_run
from synapse.report.words import EVERY, interval, number

TOP = 10
"""Units shown of each ranking."""


@dataclass(frozen=True)
class TopUnits:
    """The first units of one ranking."""

    method: str
    layer: int
    label: str
    units: tuple[tuple[int, str], ...]
    """Unit and score, best first."""


def write_report(run: Path, out: Path | None = None) -> Path:
    """Return the path of the report written for a run folder, `report.html` in it unless told otherwise.

    The file holds everything it shows, the plotting library included, and asks the network for nothing.

    Raises:
        RunFolderError: the folder cannot be read as a finished run.
    """
    opened = open_run(run)
    path = Path(out) if out is not None else opened.path / "report.html"
    context = {
        "run": opened,
        "manifest": opened.manifest,
        "sentences": sentences(opened),
        "key_numbers": key_numbers(opened),
        "panels": figures.panels(opened),
        "top_units": top_units(opened),
        "settings": _rows(opened.manifest.get("settings", {})),
        "versions": _rows(opened.manifest.get("versions", {})),
        "proofs": _rows(_part(opened.manifest, "model").get("proofs", {})),
        "timings": {k: v for k, v in _part(opened.manifest, "timings").items() if isinstance(v, int | float)},
    }
    write_page(path, "report.html.j2", opened.title, context)
    return path


def top_units(run: Run) -> list[TopUnits]:
    """Return the first `TOP` units of every ranking, by method, layer and label (the global one first)."""
    first = run.ranking[run.ranking["rank"] < run.ranking["rank"].min() + TOP].sort_values("rank")
    order = {label: index for index, label in enumerate(("", *run.labels))}
    return [
        TopUnits(
            str(method),
            int(layer),
            EVERY if label == "" else str(label),
            tuple((int(unit), number(score, 3)) for unit, score in zip(rows["unit"], rows["score"], strict=True)),
        )
        for (method, layer, label), rows in sorted(
            first.groupby(["method", "layer", "label"], sort=False),
            key=lambda group: (*group[0][:2], order.get(group[0][2], len(order))),
        )
    ]


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
