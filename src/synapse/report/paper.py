"""Figures for papers and README files: `paper_figures(run, out)`."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Drawing

from synapse.elsewhere import only_here
from synapse.errors import SettingsError, near
from synapse.report.curves import ablation_curve, few_steps
from synapse.report.findings import reaches_zero
from synapse.report.run import Run, open_run
from synapse.report.words import SELECTIONS, shortened

STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "axes.edgecolor": "#8a939b",
    "axes.labelcolor": "#3c444c",
    "xtick.color": "#3c444c",
    "ytick.color": "#3c444c",
    "grid.color": "#e6e8ea",
    "legend.frameon": False,
    "text.parse_math": False,  # a dollar in a title is a dollar
    "svg.fonttype": "path",  # the same on every machine, whatever fonts it has
    "svg.hashsalt": "synapse",  # the same run gives the same bytes
}
SELECTION_LINES = {"top": ("#c84a00", "-"), "random": ("#6b7680", "--"), "bottom": ("#0072b2", ":")}
SCOPE_LINES = {
    "readout": ("#0072b2", "o"),
    "readout-onward": ("#b8790a", "s"),
    "all": ("#c0417f", "D"),
    "non-padding": ("#00865f", "^"),
}


def paper_figures(
    run: Path | str, out: Path | str, formats: Sequence[str] = ("svg",), *, layers: Sequence[int] | None = None
) -> list[Path]:
    """Return the paths of `headroom` and `ablation-curves`, drawn into the folder `out` in each format.

    `layers` are the blocks whose ablation curves are drawn: the first, the middle and the last unless given.
    The figures of a study's further components have the component's name behind theirs: `headroom-mlp`; where one
    has none of the given blocks, its last layer is drawn. A figure whose numbers are missing is left out.

    Raises:
        RunFolderError: the folder cannot be read as a finished run.
        SettingsError: a format that matplotlib does not write, a block that is not there, or an `out` elsewhere.
    """
    out = only_here(out, "figures")
    opened = open_run(run)
    known = FigureCanvasAgg.get_supported_filetypes()
    for wanted in formats:
        if wanted not in known:
            raise SettingsError(
                f"Figures cannot be written as {wanted!r}; choose among {', '.join(sorted(known))}."
                + near(wanted, known)
            )
    runs = [replace(opened, component=component) for component in opened.components]
    last = max(each.last for each in runs)
    for layer in layers or ():
        if not 0 <= layer <= last:
            raise SettingsError(f"There is no block {layer}: the run has blocks 0 to {last}.")
    with mpl.rc_context(STYLE):
        drawings = {}
        for each in runs:
            suffix = "" if each.is_first else f"-{each.component}"
            drawings[f"headroom{suffix}"] = _headroom(each)
            drawings[f"ablation-curves{suffix}"] = _ablation_curves(each, _chosen(each, layers))
        out.mkdir(parents=True, exist_ok=True)
        paths = []
        for name, drawing in drawings.items():
            for wanted in formats if drawing is not None else ():
                assert drawing is not None
                path = out / f"{name}.{wanted}"
                undated = {"Date": None} if wanted in ("svg", "svgz") else None
                drawing.savefig(path, dpi=200, facecolor="white", bbox_inches="tight", metadata=undated)
                paths.append(path)
    return paths


def _chosen(run: Run, layers: Sequence[int] | None) -> list[int]:
    """Return the layers of a component to draw."""
    if layers is None:
        return sorted({0, (run.n_layers - 1) // 2, run.last})
    return [layer for layer in layers if layer <= run.last] or [run.last]


def _headroom(run: Run) -> Drawing | None:
    """Return accuracy lost with everything removed, by depth, for each scope."""
    if not run.scopes:
        return None
    drawing = Drawing(figsize=(6.8, 3.4), layout="constrained")
    axes = drawing.subplots()
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.axhline(0, color="#8a939b", linewidth=0.8)
    for position, scope in enumerate(run.scopes):
        colour, marker = SCOPE_LINES[scope]
        shift = 0.07 * (position - (len(run.scopes) - 1) / 2)
        places, values = [], []
        for layer in range(run.n_layers):
            figure = run.figure("stability", "headroom", scope, layer)
            if figure is None or figure.value is None:
                continue
            places.append(layer + shift)
            values.append(figure.value)
            face = "white" if reaches_zero(figure) else colour
            if figure.low is not None and figure.high is not None:
                axes.plot([layer + shift] * 2, [figure.low, figure.high], color=colour, linewidth=1.3)
            axes.plot(
                layer + shift,
                figure.value,
                marker,
                color=colour,
                markerfacecolor=face,
                markersize=6,
                zorder=3,
            )
        axes.plot(places, values, color=colour, linewidth=1.5)
        axes.plot([], [], color=colour, marker=marker, label=run.wording.scope(scope))  # the legend's entry alone
    axes.set_xticks(range(run.n_layers), [f"{layer}\n{run.depth(layer):.2f}" for layer in range(run.n_layers)])
    axes.set_xlabel(f"{run.wording.unit_of_depth} (relative depth below)")
    axes.set_ylabel("accuracy lost, all units removed")
    if not run.is_first:
        axes.set_title(run.wording.site)
    drawing.legend(loc="outside upper center", ncols=len(run.scopes), fontsize=8.5)
    return drawing


def _ablation_curves(run: Run, layers: Sequence[int]) -> Drawing | None:
    """Return accuracy against the share removed: a row for each scope, a column for each block."""
    scopes = run.swept_scopes
    curves = {
        (scope, layer, selection): ablation_curve(run, layer=layer, scope=scope, selection=selection, method=run.method)
        for scope in scopes
        for layer in layers
        for selection in SELECTION_LINES
    }
    steps = sorted({share for curve in curves.values() for share in curve["fraction"]})
    if not steps:
        return None
    drawing = Drawing(figsize=(1.2 + 2.5 * len(layers), 0.8 + 1.75 * len(scopes)), layout="constrained")
    grid = drawing.subplots(len(scopes), len(layers), sharex=True, sharey=True, squeeze=False)
    for row, scope in enumerate(scopes):
        for column, layer in enumerate(layers):
            axes: Axes = grid[row][column]
            for selection, (colour, dash) in SELECTION_LINES.items():
                curve = curves[scope, layer, selection]
                x = [steps.index(share) for share in curve["fraction"]]
                if selection != "bottom":
                    low, high = (
                        curve["low"].fillna(curve["accuracy"]),
                        curve["high"].fillna(curve["accuracy"]),
                    )
                    axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
                axes.plot(x, curve["accuracy"], dash, color=colour, linewidth=1.6, label=SELECTIONS[selection])
            axes.grid(axis="y")
            if row == 0:
                axes.set_title(run.wording.layer(layer))
            if column == 0:
                axes.set_ylabel(run.wording.scope(scope).replace(", ", ",\n") + "\n\naccuracy")
    shown = few_steps(steps)
    grid[0][0].set_xticks(shown, [f"{100 * steps[i]:.0f}%" for i in shown])
    grid[0][0].set_ylim(0, 1.03)
    for axes in grid[-1]:
        axes.set_xlabel("units removed (equally spaced steps)")
    site = "" if run.is_first else f"\n{run.wording.site}"
    drawing.suptitle(shortened(run.title, 80) + site, fontsize=10)
    handles, names = grid[0][0].get_legend_handles_labels()
    drawing.legend(handles, names, loc="outside lower center", ncols=len(names))
    return drawing
