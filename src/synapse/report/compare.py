"""Several runs side by side, on relative axes: `write_comparison(runs, out)`."""

import html
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from plotly.subplots import make_subplots

from synapse.elsewhere import only_here
from synapse.errors import SettingsError
from synapse.report.curves import ablation_curve
from synapse.report.figures import SERIES, TEMPLATE, Panel, errors, level, new_figure
from synapse.report.findings import cheapest_redirect, cheapest_shift
from synapse.report.html import write_page
from synapse.report.run import FORMAT, Run, open_runs
from synapse.report.words import COMPONENTS, Wording, measured, number, quoted, shortened
from synapse.types import Figure

Point = dict[str, float | None]
"""One point of a curve: `x`, `value`, `low`, `high`."""

NUMBERS: Mapping[str, str] = {
    "accuracy": "accuracy",
    "above_chance_accuracy": "accuracy above chance",
    "commitment_depth": "commitment depth",
    "headroom_readout_first": "headroom, readout row, first block",
    "headroom_all_first": "headroom, all rows, first block",
    "headroom_readout_last": "headroom, readout row, last block",
    "removable_last": "removable share, last block",
    "ordering_quality_last": "ordering quality, last block",
    "specificity_last": "specificity, last block",
    "overlap_last": "overlap of classes, last block",
    "probe_above_chance_last": "probe above chance, last block",
    "selectivity_last": "probe selectivity, last block",
    "head_edit_d50": "smallest head edit",
    "head_edit_random_d50": "random head edit",
    "logit_shift_d50": "smallest logit shift",
    "logit_shift_d50_margins": "smallest logit shift, in clean margins",
}
"""Key of each number in `comparison.json`, and what it is called on the page."""


def write_comparison(runs: Sequence[Path | str], out: Path | str) -> Path:
    """Return the path of `comparison.html` in the folder `out`, with the same numbers in `comparison.json`.

    Each run is compared at the first component of its study; the page says where these differ.

    Raises:
        RunFolderError: a folder cannot be read as a finished run.
        SettingsError: no runs were given, or `out` is elsewhere.
    """
    out = only_here(out, "a comparison")
    named = _named(runs)
    numbers = {name: compared_numbers(run) for name, run in named}
    curves = {name: compared_curves(run) for name, run in named}
    out.mkdir(parents=True, exist_ok=True)
    _write_json(
        out / "comparison.json",
        {
            "format": FORMAT,
            "runs": [
                {
                    "name": name,
                    "component": run.component,
                    "n_layers": run.n_layers,
                    "width": run.width,
                    "labels": list(run.labels),
                    "numbers": {
                        key: None if figure is None else figure.to_dict() for key, figure in numbers[name].items()
                    },
                    "curves": curves[name],
                }
                for name, run in named
            ],
        },
    )
    context = {
        "runs": named,
        "names": NUMBERS,
        "numbers": numbers,
        "caution": different_sites(named),
        "panels": [*_panels(curves, _shared_wording(named)), _vulnerability(numbers)],
    }
    write_page(out / "comparison.html", "comparison.html.j2", "Comparison of runs", context)
    return out / "comparison.html"


def different_sites(runs: Sequence[tuple[str, Run]]) -> str:
    """Return a sentence on which runs are compared at which component, empty where it is the same for all."""
    names: dict[str, list[str]] = {}
    for name, run in runs:
        names.setdefault(run.component, []).append(quoted(name))
    if len(names) == 1:
        return ""
    parts = [
        f"{', '.join(found)} at {component} ({COMPONENTS.get(component, component)})"
        for component, found in names.items()
    ]
    return f"The runs are compared at different sites: {'; '.join(parts)}. Their numbers do not measure the same."


def _shared_wording(runs: Sequence[tuple[str, Run]]) -> Wording:
    """Return the words of the component that all runs share, or the plain ones."""
    components = {run.component for _, run in runs}
    return Wording(components.pop()) if len(components) == 1 else Wording()


def comparison_table(runs: Sequence[Path | str]) -> pd.DataFrame:
    """Return one row a run, one column a number, as text: `0.89 [0.86, 0.92]`; an en dash where not measured.

    Raises:
        RunFolderError: a folder cannot be read as a finished run.
        SettingsError: no runs were given.
    """
    rows = {
        name: {
            NUMBERS[key]: "–" if figure is None or figure.value is None else measured(replace(figure, n=0))
            for key, figure in compared_numbers(run).items()
        }
        for name, run in _named(runs)
    }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("run")


def compared_numbers(run: Run) -> dict[str, Figure | None]:
    """Return the figures of one run under the keys of `NUMBERS`; None where one was not measured.

    Accuracies are given above chance, `(a - c) / (1 - c)`, and headroom as a share of the accuracy above
    chance of the clean model, `headroom / (a - c)`; intervals are scaled likewise, with a and c held fixed.
    """
    chance = _value(run.figure("clean", "chance"))
    accuracy = run.figure("clean", "accuracy")
    last = run.last
    redirect, shift = cheapest_redirect(run), cheapest_shift(run)
    random = run.figure("vulnerability", "head_edit_random", "d50", *redirect[:2]) if redirect else None
    margin = run.clean_margin
    return {
        "accuracy": accuracy,
        "above_chance_accuracy": _above_chance(accuracy, chance),
        "commitment_depth": run.figure("stability", "commitment_depth"),
        "headroom_readout_first": _share(run, run.figure("stability", "headroom", "readout", 0)),
        "headroom_all_first": _share(run, run.figure("stability", "headroom", "all", 0)),
        "headroom_readout_last": _share(run, run.figure("stability", "headroom", "readout", last)),
        "removable_last": run.figure("redundancy", "removable", "readout", last),
        "ordering_quality_last": run.figure("stability", "ordering_quality", "readout", last),
        "specificity_last": run.figure("specialisation", "specificity", "readout", last),
        "overlap_last": run.figure("specialisation", "overlap", last),
        "probe_above_chance_last": _above_chance(run.figure("probe", "accuracy", last), chance),
        "selectivity_last": run.figure("probe", "selectivity", last),
        "head_edit_d50": redirect[2] if redirect else None,
        "head_edit_random_d50": random,
        "logit_shift_d50": shift[1] if shift else None,
        "logit_shift_d50_margins": _scaled(shift[1], 1 / margin, "clean margins") if shift and margin else None,
    }


def compared_curves(run: Run) -> dict[str, list[Point]]:
    """Return the curves of one run: `x` is relative depth, or the share of the units removed."""
    chance = _value(run.figure("clean", "chance"))
    layers = range(run.n_layers)

    def by_depth(figure: Callable[[int], Figure | None]) -> list[Point]:
        found = [(run.depth(layer), figure(layer)) for layer in layers]
        return [
            {"x": depth, "value": figure.value, "low": figure.low, "high": figure.high}
            for depth, figure in found
            if figure is not None and figure.value is not None
        ]

    removed = ablation_curve(run, layer=run.last, scope="readout", selection="top", method=run.method)
    return {
        "headroom_readout": by_depth(lambda layer: _share(run, run.figure("stability", "headroom", "readout", layer))),
        "headroom_all": by_depth(lambda layer: _share(run, run.figure("stability", "headroom", "all", layer))),
        "damage_last": _damage(run, removed),
        "probe_above_chance": by_depth(lambda layer: _above_chance(run.figure("probe", "accuracy", layer), chance)),
    }


def _damage(run: Run, curve: pd.DataFrame) -> list[Point]:
    """Return the share of the accuracy above chance that is lost, along an ablation curve."""
    above = _clean_above_chance(run)
    if above is None or curve.empty:
        return []
    return [
        {
            "x": row["fraction"],
            "value": row["drop"] / above,
            "low": None if math.isnan(row["high"]) else (row["drop"] + row["accuracy"] - row["high"]) / above,
            "high": None if math.isnan(row["low"]) else (row["drop"] + row["accuracy"] - row["low"]) / above,
        }
        for row in curve.to_dict("records")
    ]


def _panels(curves: Mapping[str, Mapping[str, Sequence[Point]]], words: Wording) -> list[Panel]:
    units = words.units_of("a block")
    again = (
        "the other rows make up for what was removed" if words.is_inner else "later blocks re-supply what was removed"
    )
    depth = "relative depth"
    lost = "share of above-chance accuracy lost"
    return [
        _overlaid(
            Panel(
                "headroom-all",
                "All rows removed, by depth",
                f"Share of each classifier's accuracy above chance that is lost when all {units} "
                "are set to zero in all rows, with 95 % intervals; depth 1 is the last block.",
            ),
            curves,
            "headroom_all",
            depth,
            lost,
        ),
        _overlaid(
            Panel(
                "headroom-readout",
                "Readout row removed, by depth",
                "The same for the rows that the head reads alone: where a curve lies at zero while the one above lies "
                f"high, {again}.",
            ),
            curves,
            "headroom_readout",
            depth,
            lost,
        ),
        _overlaid(
            Panel(
                "damage",
                "Units removed at the last block",
                "Share of the accuracy above chance that is lost when a share of the "
                f"{words.units_of('the last block')} is set to zero at the rows that the head reads, highest ranked "
                "first, with 95 % intervals; the axis is stretched at both ends.",
            ),
            curves,
            "damage_last",
            "share of units removed",
            lost,
            stretched=True,
        ),
        _overlaid(
            Panel(
                "probe",
                "What a probe reads, by depth",
                "Accuracy of a linear probe above chance, with 95 % intervals: 0 is guessing, 1 is never wrong.",
            ),
            curves,
            "probe_above_chance",
            depth,
            "probe accuracy above chance",
        ),
    ]


def _vulnerability(numbers: Mapping[str, Mapping[str, Figure | None]]) -> Panel:
    """Return the smallest budgets that redirect half of a class, a line for each run."""
    panel = Panel(
        "vulnerability",
        "How little redirects a prediction",
        "Smallest change that turns half of a class, for the easiest class of each run, with 95 % intervals: "
        "further left is more fragile; hollow squares are random edits of the head.",
    )
    names = list(numbers)
    axes = [
        ("head_edit_d50", "‖ΔW‖ / ‖W‖ of the head"),
        ("logit_shift_d50_margins", "logit shift, clean margins"),
    ]
    drawn = make_subplots(1, 2, shared_yaxes=True, horizontal_spacing=0.05)
    marks = [("head_edit_d50", 1, "circle"), ("head_edit_random_d50", 1, "square-open")]
    for key, column, symbol in [*marks, ("logit_shift_d50_margins", 2, "circle")]:
        found = {i: f for i, name in enumerate(names) if (f := numbers[name][key]) and f.value is not None}
        if found:
            drawn.add_scatter(
                x=[figure.value for figure in found.values()],
                y=list(found),
                error_x=errors(found.values(), "var(--class-0)"),
                mode="markers",
                marker={"color": "var(--class-0)", "symbol": symbol, "size": 10},
                text=[measured(figure) for figure in found.values()],
                hovertemplate="%{text}<extra>" + NUMBERS[key] + "</extra>",
                showlegend=False,
                row=1,
                col=column,
            )
    if not drawn.data:
        return replace(panel, missing="None of the runs has attacks. This figure is left out.")
    drawn.update_layout(template=TEMPLATE, height=110 + 38 * len(names), margin_t=30)
    for column, (_, title) in enumerate(axes, start=1):
        drawn.update_xaxes(title_text=title, rangemode="tozero", row=1, col=column)
    drawn.update_yaxes(
        tickvals=list(range(len(names))),
        ticktext=[html.escape(shortened(name, 40)) for name in names],
        range=[len(names) - 0.5, -0.5],
        ticklabelstandoff=6,
    )
    return replace(panel, figures={(): drawn}, wide=620)


def _overlaid(
    panel: Panel,
    curves: Mapping[str, Mapping[str, Sequence[Point]]],
    key: str,
    x: str,
    y: str,
    stretched: bool = False,
) -> Panel:
    drawn = new_figure(380, x, y)
    place = _stretched if stretched else float
    for index, (name, run_curves) in enumerate(curves.items()):
        points = run_curves[key]
        if not points:
            continue
        colour = f"var(--class-{index % 8})"
        figures = [Figure(p["value"], p["low"], p["high"], 0, "") for p in points]
        shown = html.escape(shortened(name, 40))
        drawn.add_scatter(
            x=[place(point["x"] or 0.0) for point in points],
            y=[point["value"] for point in points],
            error_y=errors(figures, colour),
            mode="lines+markers",
            name=shown,
            line={"color": colour, "width": 2},
            marker={"color": colour, "symbol": SERIES[index % len(SERIES)], "size": 8},
            text=[f"{number(p['x'], 3)}: {measured(figure)}" for p, figure in zip(points, figures, strict=True)],
            hovertemplate="%{text}<extra>" + shown + "</extra>",
        )
    if not drawn.data:
        return replace(panel, missing="None of the runs has these measurements. This figure is left out.")
    level(drawn, 0.0, "")
    if stretched:
        ticks = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
        drawn.update_xaxes(
            tickvals=[_stretched(tick) for tick in ticks],
            ticktext=[f"{100 * tick:g} %" for tick in ticks],
            tickangle=0,
        )
    else:
        drawn.update_xaxes(range=[0, 1.04])
    return replace(panel, figures={(): drawn}, wide=480)


def _stretched(share: float) -> float:
    """Return the log-odds of a share, with the ends 0 and 1 placed a step beyond 0.2 % and 99.8 %."""
    end = 0.002
    if share <= 0 or share >= 1:
        return math.copysign(math.log((1 - end) / end) + 0.8, share - 0.5)
    inside = min(max(share, end), 1 - end)
    return math.log(inside / (1 - inside))


def _clean_above_chance(run: Run) -> float | None:
    accuracy, chance = _value(run.figure("clean", "accuracy")), _value(run.figure("clean", "chance"))
    return accuracy - chance if accuracy is not None and chance is not None and accuracy > chance else None


def _share(run: Run, figure: Figure | None) -> Figure | None:
    above = _clean_above_chance(run)
    return None if figure is None or above is None else _scaled(figure, 1 / above, "share of above-chance accuracy")


def _above_chance(figure: Figure | None, chance: float | None) -> Figure | None:
    if figure is None or chance is None or chance >= 1:
        return None
    return _mapped(figure, lambda value: (value - chance) / (1 - chance), "above-chance accuracy")


def _scaled(figure: Figure, factor: float, unit: str) -> Figure:
    return _mapped(figure, lambda value: value * factor, unit)


def _mapped(figure: Figure, change: Callable[[float], float], unit: str) -> Figure:
    def changed(value: float | None) -> float | None:
        return None if value is None else change(value)

    return replace(figure, value=changed(figure.value), low=changed(figure.low), high=changed(figure.high), unit=unit)


def _value(figure: Figure | None) -> float | None:
    return None if figure is None else figure.value


def _named(runs: Sequence[Path | str]) -> list[tuple[str, Run]]:
    if not runs:
        raise SettingsError("There are no runs to compare. Give at least one run folder, better two.")
    return open_runs(runs)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8")
    beside.replace(path)
