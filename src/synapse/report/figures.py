"""The figures of the report: each function turns a run into a panel.

Colours are names of the style sheet (`var(--top)`), resolved in the browser: a figure serves light and dark.
Names that come from the user are escaped, since plotly reads a subset of HTML in every text.
"""

import html
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from synapse.report.curves import ablation_curve, few_steps
from synapse.report.findings import reaches_zero
from synapse.report.run import Run
from synapse.report.words import EVERY, SELECTIONS, Wording, fraction, measured, number, shortened
from synapse.types import Figure

_AXIS = {
    "gridcolor": "var(--grid)",
    "linecolor": "var(--axis)",
    "tickcolor": "var(--axis)",
    "zeroline": False,
    "automargin": True,
    "title": {"font": {"size": 12, "color": "var(--soft)"}, "standoff": 10},
}
TEMPLATE = go.layout.Template(
    layout={
        "margin": {"l": 8, "r": 8, "t": 48, "b": 8},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": "var(--ink)"},
        "legend": {"orientation": "h", "x": 0, "y": 1, "yref": "container", "yanchor": "top"},
        "hoverlabel": {
            "bgcolor": "var(--card)",
            "bordercolor": "var(--axis)",
            "font": {"color": "var(--ink)"},
        },
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": "var(--axis)", "activecolor": "var(--ink)"},
        "xaxis": _AXIS | {"showgrid": False, "showline": True, "ticks": "outside", "ticklen": 4},
        "yaxis": _AXIS | {"showgrid": True, "showline": False, "ticks": ""},
        "annotationdefaults": {"font": {"size": 12, "color": "var(--soft)"}, "showarrow": False},
    }
)
"""The style of every figure."""

DARK_IS_LOW = [(step / 4, f"var(--seq-{4 - step})") for step in range(5)]
DIVERGING = [[0.0, "var(--div-low)"], [0.5, "var(--div-mid)"], [1.0, "var(--div-high)"]]
SCOPE_MARKS = {
    "readout": ("var(--readout)", "circle"),
    "readout-onward": ("var(--onward)", "square"),
    "all": ("var(--all)", "diamond"),
    "non-padding": ("var(--non-padding)", "triangle-up"),
}
AGREEMENTS = {"tau": "Kendall's tau", "rbo": "rank-biased overlap", "jaccard": "Jaccard of the top tenths"}
"""The columns of the table of agreement that are drawn, and what they are called."""
STABILITIES = {"kuncheva": "the highest tenth", "nogueira": "those of it by their score alone"}
"""The indices of rank stability, and the units whose agreement each measures."""
SERIES = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "x", "star")
"""Marker symbols: a series is told by its symbol as well as by its colour."""


@dataclass(frozen=True)
class Choice:
    """One selector above a figure."""

    name: str
    options: tuple[str, ...]
    chosen: int = 0


@dataclass(frozen=True)
class Numbers:
    """The table of numbers behind a figure."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, eq=False)
class Panel:
    """A titled figure with one sentence on how to read it; or, without figures, why there is none."""

    key: str
    title: str
    caption: str
    figures: Mapping[tuple[int, ...], go.Figure] = field(default_factory=dict)
    """One figure for each combination of choices, by the position of each choice."""
    choices: tuple[Choice, ...] = ()
    missing: str = ""
    numbers: Numbers | None = None
    wide: int = 0
    """Least width in pixels at which the figure can be read; narrower pages scroll it."""
    most: int = 0
    """Largest width in pixels that suits the figure; 0 for the width of the page."""

    @property
    def shown(self) -> go.Figure | None:
        """The figure of the choices that are set at first, None where there is none."""
        return self.figures.get(tuple(choice.chosen for choice in self.choices))


def panels(run: Run) -> list[Panel]:
    """Return every panel of a run, in the order of the report.

    Changes of weights and logits are of the whole model and stand with the first component.
    """
    of_the_model = [redirect(run), logit_shift(run), weight_noise(run)] if run.is_first else []
    return [
        headroom(run),
        ablation(run),
        layer_by_fraction(run),
        recall_drop(run),
        overlap(run),
        faithfulness(run),
        agreement(run),
        rank_stability(run),
        *of_the_model,
        probe(run),
    ]


def headroom(run: Run) -> Panel:
    """Return the scope control: accuracy lost with everything removed, by depth, for each scope."""
    words = run.wording
    panel = Panel(
        "headroom",
        "How much there is to lose" + ("" if words.is_final else " at each block"),
        f"Each mark is the accuracy lost when all {words.units_of('that block')} are set to zero, with its 95 % "
        f"interval; hollow marks cannot be told from zero. {_how_scopes_differ(words)}",
        wide=520,
    )
    if not run.scopes:
        return _without(panel, "The scorecard has no headroom figures.")
    drawn = new_figure(440, f"{words.unit_of_depth} (relative depth below)", "accuracy lost")
    rows: list[tuple[str, str, str]] = []
    for position, scope in enumerate(run.scopes):
        colour, symbol = SCOPE_MARKS[scope]
        found = _by_layer(run, "stability", "headroom", scope)
        shift = 0.09 * (position - (len(run.scopes) - 1) / 2)  # side by side, so that intervals do not hide
        hollow = [symbol + "-open" if reaches_zero(figure) else symbol for figure in found.values()]
        drawn.add_scatter(
            x=[layer + shift for layer in found],
            y=[figure.value for figure in found.values()],
            error_y=errors(found.values(), colour),
            mode="lines+markers",
            name=words.scope(scope),
            line={"color": colour, "width": 2},
            marker={"color": colour, "symbol": hollow, "size": 10, "line": {"color": colour, "width": 2}},
            text=[f"{words.layer(layer)}: {measured(figure)}" for layer, figure in found.items()],
            hovertemplate="%{text}<extra>" + words.scope(scope) + "</extra>",
        )
        rows.extend((words.scope(scope), f"{layer}", measured(figure, 3)) for layer, figure in found.items())
    accuracy, chance = run.figure("clean", "accuracy"), run.figure("clean", "chance")
    if accuracy and chance and accuracy.value is not None and chance.value is not None:
        level(drawn, accuracy.value - chance.value, "down to chance")
    level(drawn, 0.0, "")
    drawn.update_xaxes(
        tickvals=list(range(run.n_layers)),
        ticktext=[f"{layer}<br>{number(run.depth(layer))}" for layer in range(run.n_layers)],
        range=[-0.4, run.n_layers - 0.6],
    )
    numbers = Numbers(("scope", words.unit_of_depth, "accuracy lost"), tuple(rows))
    return replace(panel, figures={(): drawn}, numbers=numbers)


def _how_scopes_differ(words: Wording) -> str:
    """Return what the scopes' curves say beside each other, or why there is one curve less."""
    if words.is_final:
        return "Nothing comes after these units, so all scopes are the same edit, which is drawn once."
    if words.reads_every_row:
        return "The head reads every row that is no padding: the readout rows are all rows, so they are drawn once."
    lie = "lie" if words.reads_several_rows else "lies"
    shows = (
        f"the other rows make up for the loss: the curve of the {words.rows} says nothing about redundancy there."
        if words.is_inner
        else f"ablation of the {words.rows} alone shows re-supply by later blocks and says nothing about redundancy."
    )
    return f"Where the {words.rows} {lie} at zero while all rows lie high, {shows}"


def ablation(run: Run) -> Panel:
    """Return accuracy against the share of units removed: one small plot a block."""
    one_by_one = "" if run.wording.is_final else ", block by block"
    panel = Panel(
        "ablation",
        "What is left when units are removed",
        f"Accuracy after a share of the units is set to zero{one_by_one}; steps on the horizontal axis "
        "are the shares that were run, dense at both ends and equally spaced. A ranking is faithful where "
        "its highest ranked units (solid) fall below random sets of the same size (dashed); bands are 95 "
        "% intervals.",
        wide=760,
    )
    return _by_scope_and_ranking(panel, run, _small_multiples)


def layer_by_fraction(run: Run) -> Panel:
    """Return accuracy by block and share removed, highest ranked units first, as a heat map."""
    panel = Panel(
        "heat",
        "Where the damage starts",
        f"Each cell is the accuracy with that share of the {run.wording.units_of('a block')} removed, highest ranked "
        "first: read a row from left to right to see at which size it gives way; the stronger the colour, the more "
        "accuracy is lost.",
        wide=720,
    )
    return _by_scope_and_ranking(panel, run, _accuracy_map)


def recall_drop(run: Run) -> Panel:
    """Return the recall that each class loses when another class's units are removed."""
    panel = Panel(
        "classes",
        "Which class loses what",
        "Row: the class whose own ranking chose the half of the units that was removed; column: the class "
        "whose recall was measured. Units of a class's own show as a strong diagonal; grey means the place "
        "is not used here.",
        wide=520,
    )
    measured_scopes = run.section("specialisation", "recall_drop")
    scopes = run.scopes_of("specialisation", "recall_drop")
    layers = [layer for layer in range(run.n_layers) if any(str(layer) in measured_scopes[s] for s in scopes)]
    if not scopes or not layers:
        return _without(panel, "The scorecard has no recall drops by class.")
    drawn: dict[tuple[int, ...], go.Figure] = {
        (i, j): _class_map(run, scope, layer)
        for (i, scope), (j, layer) in product(enumerate(scopes), enumerate(layers))
    }
    choices = (
        Choice("Scope", tuple(run.wording.scope(scope) for scope in scopes)),
        Choice("Block", tuple(run.wording.layer(layer) for layer in layers), len(layers) - 1),
    )
    return replace(panel, figures=drawn, choices=choices, most=260 + 130 * len(run.labels))


def overlap(run: Run) -> Panel:
    """Return how much the classes' rankings share, by block, against chance."""
    panel = Panel(
        "overlap",
        "Do classes share their units?",
        "Mean Jaccard overlap of the top tenths of two classes' rankings: 1 means the same units; the "
        "dashed line is what random sets of that size share, with the range of 95 % of them.",
        wide=420,
    )
    found = _by_layer(run, "specialisation", "overlap")
    if not found:
        return _without(panel, "The scorecard has no overlap of class rankings.")
    if all(figure.value is None for figure in found.values()):
        return _without(panel, f"There is nothing to compare: {next(iter(found.values())).note}.")
    drawn = new_figure(340, run.wording.unit_of_depth, "Jaccard overlap")
    _line(drawn, run, found, "top tenths of two classes", "var(--top)", "circle")
    chance = _by_layer(run, "specialisation", "overlap_chance")
    if chance:
        _line(drawn, run, chance, "random sets", "var(--random)", "square", dash="dash")
    _block_axis(drawn, run)
    drawn.update_yaxes(rangemode="tozero")
    return replace(panel, figures={(): drawn}, numbers=_numbers(run, {"overlap": found, "chance": chance}))


def faithfulness(run: Run) -> Panel:
    """Return how much more each ranking's first units cost than random ones, by block."""
    scope, words = run.judged_scope, run.wording
    panel = Panel(
        "faithfulness",
        "Which ranking is faithful?",
        "Ordering quality: the area between the accuracy after removing a ranking's highest units and that after "
        f"removing random ones, over the share removed ({words.scope(scope) if scope else 'all rows'}), as a share of "
        "all there is to lose, with 95 % intervals. Above 0 a ranking finds units that matter, at 0 it is no better "
        "than chance, below 0 it misleads.",
        wide=480,
    )
    found = {
        method: {
            layer: figure
            for layer in range(run.n_layers)
            if (figure := run.figure("faithfulness", "quality", scope, layer, method)) and figure.value is not None
        }
        for method in run.section("faithfulness", "overall", scope)
    }
    if not found:
        why = "No block has anything to lose." if scope else "No two rankings were judged beside each other."
        return _without(panel, why)
    drawn = new_figure(400, words.unit_of_depth, "ordering quality")
    for index, (method, figures) in enumerate(found.items()):
        _line(drawn, run, figures, html.escape(method), f"var(--class-{index % 8})", SERIES[index % len(SERIES)])
    level(drawn, 0.0, "random sets")
    _block_axis(drawn, run)
    return replace(panel, figures={(): drawn})


def agreement(run: Run) -> Panel:
    """Return how far every two rankings put the units of a block in one order, as heat maps."""
    panel = Panel(
        "agreement",
        "Do the rankings agree?",
        "Two rankings of one block's units over all classes: Kendall's tau of the whole order (0 by chance), the "
        "rank-biased overlap of the first places, or the Jaccard overlap of the top tenths, in brackets where random "
        "sets often share as much (p of 0.05 or more, adjusted for the number of comparisons). Rankings that agree "
        "may be wrong together: which one is faithful is another question, with a figure of its own.",
        wide=420,
    )
    pairs = run.agreement[run.agreement["label"] == ""]
    if pairs.empty:
        return _without(panel, "The run folder has no table of the agreement between rankings.")
    layers = sorted(set(pairs["layer"]))
    drawn: dict[tuple[int, ...], go.Figure] = {
        (i, j): _agreement_map(pairs[pairs["layer"] == layer], measure)
        for (i, measure), (j, layer) in product(enumerate(AGREEMENTS), enumerate(layers))
    }
    choices = (
        Choice("Measure", tuple(AGREEMENTS.values())),
        Choice("Block", tuple(run.wording.layer(int(layer)) for layer in layers), len(layers) - 1),
    )
    n_methods = len(set(pairs["method"]) | set(pairs["other"]))
    return replace(panel, figures=drawn, choices=choices, most=330 + 110 * n_methods)


def rank_stability(run: Run) -> Panel:
    """Return how far the highest units of the first ranking stay the same when the examples are drawn again."""
    panel = Panel(
        "rank-stability",
        "Would the ranking come out the same tomorrow?",
        "How much alike the highest tenths of the units are when the ranking is made again on other draws of the "
        "training examples: 1 means always the same units, 0 as alike as random sets; draws share examples, so units "
        "that are all noise would lie at the dotted line. Where a ranking gives a score to fewer units than a tenth, "
        "the rest of the tenth is filled by chance; the second choice counts only units that their scores put there.",
        wide=480,
    )
    found = [_stability_by_layer(run, index) for index in STABILITIES]
    if not any(figures for lines in found for figures in lines.values()):
        return _without(panel, "The ranking was not made again on other draws of the examples.")
    noise = run.figure("rank_stability", "noise")
    drawn: dict[tuple[int, ...], go.Figure] = {}
    for choice, lines in enumerate(found):
        drawn[(choice,)] = shown = new_figure(400, run.wording.unit_of_depth, "agreement of the draws")
        for index, (label, figures) in enumerate(lines.items()):
            colour = f"var(--class-{(index - 1) % 8})" if label else "var(--ink)"
            name = _name(label) if label else EVERY
            _line(shown, run, figures, name, colour, SERIES[index % len(SERIES)], dash="dot" if label else "solid")
        if noise is not None and noise.value is not None:
            level(shown, noise.value, "units that are all noise")
        _block_axis(shown, run)
        shown.update_yaxes(range=[0, 1.03])
    rows = tuple(
        (
            f"{layer}",
            *(measured(lines[""][layer], 3) if layer in lines[""] else "–" for lines in found),
            f"{settled.value:.0f} {settled.note}" if settled and settled.value is not None else "–",
        )
        for layer in range(run.n_layers)
        for settled in [run.figure("rank_stability", "settled", layer)]
    )
    columns = (run.wording.unit_of_depth, *STABILITIES.values(), "units there in 95 % of the draws or more")
    choices = (Choice("Units", tuple(STABILITIES.values())),)
    return replace(panel, figures=drawn, choices=choices, numbers=Numbers(columns, rows))


def _stability_by_layer(run: Run, index: str) -> dict[str, dict[int, Figure]]:
    """Return an index of rank stability by label, that over all classes first, and layer."""
    of_class = {
        label: {
            layer: figure
            for layer in range(run.n_layers)
            if (figure := run.figure("rank_stability", f"{index}_of_class", layer, label)) and figure.value is not None
        }
        for label in run.labels
    }
    return {"": _by_layer(run, "rank_stability", index), **of_class}


def redirect(run: Run) -> Panel:
    """Return the smallest head edit that turns half of a class into another, and random edits beside it."""
    panel = Panel(
        "redirect",
        "How small an edit of the head redirects a class",
        "Each cell is the smallest relative change ‖ΔW‖ / ‖W‖ of the head that turns half of the row's "
        "class into the column's, with random edits of the head beside it; grey cells were not reached at "
        "any size.",
        wide=720,
    )
    attack = run.section("vulnerability", "head_edit", "d50")
    if not attack:
        return _without(panel, "The scorecard has no head edits.")
    control = run.section("vulnerability", "head_edit_random", "d50")
    most = 260 + 230 * len(run.labels)
    return replace(panel, figures={(): _edit_maps(run, attack, control)}, most=most)


def logit_shift(run: Run) -> Panel:
    """Return the share of predictions turned into each class against the shift of its logit."""
    panel = Panel(
        "shift",
        "How far the logits must move",
        "Share of the other classes' examples that turn into a class when its logit is raised by that "
        "much, with 95 % intervals: the further left a curve rises, the easier the class is reached. "
        "Dashed: random shifts, at that size or below.",
        wide=480,
    )
    rows = run.attack[(run.attack["attack"] == "logit-shift") & (run.attack["measure"] == "success")]
    pooled = rows[rows["source"] == ""]
    rows = pooled if len(pooled) else rows
    attacked = rows[rows["arm"] == "attack"]
    if attacked.empty:
        return _without(panel, "The attack table has no logit shifts.")
    drawn = new_figure(420, "shift of the target's logit", "share of predictions turned")
    for index, target in enumerate(label for label in ("", *run.labels) if label in set(attacked["target"])):
        colour, symbol = f"var(--class-{index % 8})", SERIES[index % len(SERIES)]
        _curve(drawn, attacked[attacked["target"] == target], _name(target), colour, symbol)
        random = rows[(rows["arm"] == "random") & (rows["target"] == target)]
        if len(random):
            _curve(drawn, random, _name(target), colour, symbol, control=True)
    drawn.update_xaxes(rangemode="tozero")
    drawn.update_yaxes(range=[-0.02, 1.02])
    return replace(panel, figures={(): drawn})


def weight_noise(run: Run) -> Panel:
    """Return the share of predictions that change against the size of random noise on the weights."""
    panel = Panel(
        "noise",
        "How much noise the weights bear",
        "Share of predictions that change when a part's weights get random noise of that relative norm, "
        "with 95 % intervals: parts whose curves rise first are the fragile ones.",
        wide=480,
    )
    rows = run.attack[run.attack["attack"] == "weight-noise"]
    for measure in ("flip_rate", "success"):
        if (rows["measure"] == measure).any():
            rows = rows[rows["measure"] == measure]
            break
    else:
        return _without(panel, "The attack table has no weight noise.")
    drawn = new_figure(420, "‖ΔW‖ / ‖W‖", "share of predictions changed")
    places = list(dict.fromkeys(rows["location"]))
    for index, place in enumerate(places):
        step = round(7 * index / max(1, len(places) - 1))
        _curve(
            drawn,
            rows[rows["location"] == place].sort_values("arm").drop_duplicates("budget"),
            html.escape(str(place)),
            f"var(--depth-{step})",
            SERIES[index % len(SERIES)],
        )
    budgets = sorted(budget for budget in rows["budget"].unique() if budget > 0)  # a logarithm has no zero
    named = budgets[:: -(-len(budgets) // 9)]
    drawn.update_xaxes(type="log", tickvals=named, ticktext=[f"{budget:g}" for budget in named])
    drawn.update_yaxes(range=[0, max(0.2, 1.05 * float(rows["value"].max()))])
    return replace(panel, figures={(): drawn})


def probe(run: Run) -> Panel:
    """Return what a linear probe reads at each block, its control, and the difference."""
    words = run.wording
    panel = Panel(
        "probe",
        "What can be read" + (" there" if words.is_final else " at each block"),
        f"Accuracy of a linear probe on {words.state}, of the same probe on control labels, and their "
        "difference (selectivity), with 95 % intervals; beside it that of a probe of the model's own predictions, at "
        "these. A probe shows what can be read, not what the "
        f"model uses: compare with the headroom of the same {words.unit_of_depth}." + _convergence(run),
        wide=480,
    )
    lines = {
        "accuracy": ("probe", "var(--readout)", "circle", "solid"),
        "model_accuracy": ("probe of the model's predictions", "var(--all)", "triangle-up", "dot"),
        "selectivity": ("selectivity", "var(--onward)", "diamond", "solid"),
        "control_accuracy": ("probe on control labels", "var(--random)", "square", "dash"),
    }
    found = {measure: _by_layer(run, "probe", measure) for measure in lines}
    if not found["accuracy"]:
        return _without(panel, "The scorecard has no probes.")
    drawn = new_figure(400, words.unit_of_depth, "share of test examples")
    lines = {measure: line for measure, line in lines.items() if found[measure]}  # older runs have fewer
    for measure, (name, colour, symbol, dash) in lines.items():
        _line(drawn, run, found[measure], name, colour, symbol, dash=dash)
    accuracy = run.figure("clean", "accuracy")
    if accuracy is not None and accuracy.value is not None:
        level(drawn, accuracy.value, "the classifier itself")
    _block_axis(drawn, run)
    drawn.update_yaxes(rangemode="tozero")
    numbers = {name: found[measure] for measure, (name, *_) in lines.items()}
    numbers["macro-F1 of the probe"] = _by_layer(run, "probe", "macro_f1")
    return replace(panel, figures={(): drawn}, numbers=_numbers(run, numbers))


def _convergence(run: Run) -> str:
    """Return how near the probes are to their optimum, as a sentence; nothing where the table does not say."""
    table = run.probe
    if table.empty or not (table["measure"] == "gradient_norm").any():
        return ""
    worst = table.loc[table["measure"] == "gradient_norm", "value"].max()
    return f" Every probe converged: no entry of its gradient is above {worst:.0e}."


def _small_multiples(run: Run, scope: str, method: str) -> go.Figure:
    columns = 4 if run.n_layers % 4 == 0 else min(3, run.n_layers)
    rows = -(-run.n_layers // columns)
    drawn = make_subplots(
        rows,
        columns,
        shared_xaxes="all",
        shared_yaxes="all",
        subplot_titles=[run.wording.layer(layer) for layer in range(run.n_layers)],
        horizontal_spacing=0.03,
        vertical_spacing=0.2 / rows,
    )
    curves = {
        (layer, selection): ablation_curve(run, layer=layer, scope=scope, selection=selection, method=method)
        for layer in range(run.n_layers)
        for selection in ("random", "bottom", "top")
    }
    steps = sorted({share for curve in curves.values() for share in curve["fraction"]})
    for (layer, selection), curve in curves.items():
        if len(curve):
            _ablation_curve(drawn, curve, selection, steps, layer // columns + 1, layer % columns + 1, layer == 0)
    drawn.update_layout(template=TEMPLATE, height=110 + 210 * rows)
    drawn.update_annotations(font_size=12)  # the titles, which plotly makes large
    drawn.update_xaxes(**_step_axis(steps, sparse=True))
    drawn.update_yaxes(range=[0, 1.03], dtick=0.25, tickformat=".2~f")
    for row in range(rows):
        drawn.update_yaxes(title_text="accuracy", row=row + 1, col=1)
    for column in range(columns):
        last = (run.n_layers - 1 - column) // columns + 1  # the lowest plot of this column
        drawn.update_xaxes(title_text="units removed", showticklabels=True, row=last, col=column + 1)
    return drawn


def _ablation_curve(
    drawn: go.Figure,
    curve: pd.DataFrame,
    selection: str,
    steps: Sequence[float],
    row: int,
    column: int,
    legend: bool,
) -> None:
    colour, dash = f"var(--{selection})", {"top": "solid", "bottom": "dot", "random": "dash"}[selection]
    x = [steps.index(share) for share in curve["fraction"]]
    low, high = curve["low"].fillna(curve["accuracy"]), curve["high"].fillna(curve["accuracy"])
    if selection != "bottom":  # two bands can be told apart, three cannot
        drawn.add_scatter(
            x=[*x, *reversed(x)],
            y=[*high, *reversed(low.tolist())],
            fill="toself",
            fillcolor=f"var(--{selection}-band)",
            line={"width": 0, "color": colour},
            mode="lines",
            hoverinfo="skip",
            showlegend=False,
            legendgroup=selection,
            row=row,
            col=column,
        )
    drawn.add_scatter(
        x=x,
        y=list(curve["accuracy"]),
        mode="lines+markers",
        name=SELECTIONS[selection],
        legendgroup=selection,
        showlegend=legend,
        line={"color": colour, "width": 2, "dash": dash},
        marker={"color": colour, "size": 4},
        text=[
            f"{fraction(share)} removed: {number(accuracy)}" + _spread(low, high)
            for share, accuracy, low, high in zip(
                curve["fraction"], curve["accuracy"], curve["low"], curve["high"], strict=True
            )
        ],
        hovertemplate="%{text}<extra>" + SELECTIONS[selection] + "</extra>",
        row=row,
        col=column,
    )


def _accuracy_map(run: Run, scope: str, method: str) -> go.Figure:
    curves = {
        layer: ablation_curve(run, layer=layer, scope=scope, selection="top", method=method)
        for layer in range(run.n_layers)
    }
    steps = sorted({share for curve in curves.values() for share in curve["fraction"]})
    values = []
    for layer in range(run.n_layers):
        at = dict(zip(curves[layer]["fraction"], curves[layer]["accuracy"], strict=True))
        values.append([at.get(share) for share in steps])
    known = [value for row in values for value in row if value is not None]
    lowest, highest = (min(known), max(known)) if known else (0.0, 1.0)
    drawn = new_figure(110 + 34 * run.n_layers, "units removed, highest ranked first", run.wording.unit_of_depth)
    drawn.add_heatmap(
        x=list(range(len(steps))),
        y=list(range(run.n_layers)),
        z=values,
        zmin=lowest,
        zmax=highest,
        colorscale=DARK_IS_LOW,
        text=[[number(value) for value in row] for row in values],
        texttemplate="%{text}",
        textfont={"size": 11},
        hovertemplate=f"{run.wording.unit_of_depth} %{{y}}, %{{x}}: %{{text}}<extra></extra>",
        xgap=1,
        ygap=1,
        colorbar=_colour_bar("accuracy"),
    )
    drawn.update_xaxes(**_step_axis(steps, sparse=False))
    drawn.update_yaxes(tickvals=list(range(run.n_layers)), autorange="reversed", showgrid=False)
    drawn.update_layout(margin_t=30)
    return drawn


def _class_map(run: Run, scope: str, layer: int) -> go.Figure:
    figures = {
        (row, column): run.figure("specialisation", "recall_drop", scope, layer, row, column)
        for row in run.labels
        for column in run.labels
    }
    values = [[_value(figures[row, column]) for column in run.labels] for row in run.labels]
    known = [abs(value) for row in values for value in row if value is not None]
    drawn = new_figure(150 + 46 * len(run.labels), "recall of", "units removed of")
    extent = max([*known, 0.2])  # so that the noise of a few examples looks like little
    drawn.add_heatmap(
        **_positions(run.labels),
        z=values,
        zmin=-extent,
        zmax=extent,
        colorscale=DIVERGING,
        text=[[number(value) if value is not None else "" for value in row] for row in values],
        texttemplate="%{text}",
        customdata=[[_hover(figures[row, column]) for column in run.labels] for row in run.labels],
        hovertemplate="%{customdata}<extra></extra>",
        hoverongaps=True,
        xgap=1,
        ygap=1,
        colorbar=_colour_bar("recall lost"),
    )
    _class_axes(drawn, run.labels, run.labels)
    drawn.update_layout(plot_bgcolor="var(--unused)", margin_t=30)
    if not known:
        _notice(
            drawn,
            next((figure.note for figure in figures.values() if figure and figure.note), "not measured"),
        )
    return drawn


def _agreement_map(pairs: pd.DataFrame, measure: str) -> go.Figure:
    methods = list(dict.fromkeys([*pairs["method"], *pairs["other"]]))
    values: list[list[float | None]] = [[None] * len(methods) for _ in methods]
    text = [[""] * len(methods) for _ in methods]
    hover = [["one ranking"] * len(methods) for _ in methods]
    for pair in pairs.to_dict("records"):
        value, one, other = pair[measure], methods.index(pair["method"]), methods.index(pair["other"])
        by_chance = measure == "jaccard" and not pair["p_adjusted"] < 0.05
        shown = "" if value != value else f"({number(value)})" if by_chance else number(value)
        for row, column in ((one, other), (other, one)):
            values[row][column] = None if value != value else value
            text[row][column], hover[row][column] = shown, _pair(pair)
    drawn = new_figure(150 + 40 * len(methods), "", "")
    drawn.add_heatmap(
        **_positions(methods),
        z=values,
        zmin=-1,
        zmax=1,
        colorscale=DIVERGING,
        text=text,
        texttemplate="%{text}",
        customdata=hover,
        hovertemplate="%{customdata}<extra></extra>",
        hoverongaps=True,
        xgap=1,
        ygap=1,
        colorbar=_colour_bar(AGREEMENTS[measure]),
    )
    _class_axes(drawn, methods, methods)
    drawn.update_layout(plot_bgcolor="var(--unused)", margin_t=30)
    return drawn


def _pair(pair: Mapping[Hashable, Any]) -> str:
    """Return what stands over a pair of rankings under the pointer."""
    return html.escape(
        f"{pair['method']} and {pair['other']}: tau {number(pair['tau'])}; rank-biased overlap {number(pair['rbo'])} "
        f"(by chance {number(pair['rbo_chance'])}); of the first {pair['k']} Jaccard {number(pair['jaccard'])} "
        f"(by chance {number(pair['jaccard_chance'])}, adjusted p {pair['p_adjusted']:.2g})"
    )


def _edit_maps(run: Run, attack: Mapping[str, Any], control: Mapping[str, Any]) -> go.Figure:
    order = [*run.labels, ""]
    sources = [label for label in order if label in attack]
    targets = [label for label in order if any(label in attack[source] for source in sources)]
    arms = [("head_edit", "searched edit")] + ([("head_edit_random", "random edit")] if control else [])
    drawn = make_subplots(
        1, len(arms), shared_yaxes=True, horizontal_spacing=0.04, subplot_titles=[name for _, name in arms]
    )
    tables = []
    for key, _ in arms:
        figures = [[run.figure("vulnerability", key, "d50", s, t) for t in targets] for s in sources]
        tables.append(figures)
    known = [v for table in tables for row in table for figure in row if (v := _value(figure)) is not None]
    known = [value for value in known if value > 0]
    lowest, highest = (math.log10(min(known)), math.log10(max(known))) if known else (-1.0, 0.0)
    highest = max(highest, lowest + 1)  # what lies close together should look so
    ticks = [a * 10.0**b for b in range(-6, 7) for a in (1, 2, 5)]
    ticks = [tick for tick in ticks if lowest <= math.log10(tick) <= highest]
    bar = {"tickvals": [math.log10(tick) for tick in ticks], "ticktext": [f"{tick:g}" for tick in ticks]}
    for column, figures in enumerate(tables, start=1):
        drawn.add_heatmap(
            **_positions(targets, sources),
            # Searched and random edits lie a power of ten apart: colours follow the logarithm.
            z=[[math.log10(v) if (v := _value(figure)) else None for figure in row] for row in figures],
            zmin=lowest,
            zmax=highest,
            colorscale=DARK_IS_LOW,
            text=[[number(v) if (v := _value(figure)) is not None else "" for figure in row] for row in figures],
            texttemplate="%{text}",
            customdata=[
                [
                    _hover(figure, "the same class" if s == t else "not reached")
                    for t, figure in zip(targets, row, strict=True)
                ]
                for s, row in zip(sources, figures, strict=True)
            ],
            hovertemplate="%{customdata}<extra></extra>",
            hoverongaps=True,
            xgap=1,
            ygap=1,
            showscale=column == len(tables),
            colorbar=_colour_bar("‖ΔW‖ / ‖W‖") | bar,
            row=1,
            col=column,
        )
    drawn.update_layout(template=TEMPLATE, height=170 + 44 * len(sources), margin_t=30)
    drawn.update_annotations(font_size=12)  # the titles, which plotly makes large
    _class_axes(drawn, targets, sources)
    drawn.update_xaxes(title_text="turned into", range=[-0.5, len(targets) - 0.5])
    for column, figures in enumerate(tables, start=1):
        if not any(_value(figure) is not None for row in figures for figure in row):
            _notice(drawn, "not reached", f"x{column if column > 1 else ''} domain")
    drawn.update_yaxes(title_text="class", row=1, col=1)
    drawn.update_layout(plot_bgcolor="var(--unused)")
    return drawn


def _without(panel: Panel, why: str) -> Panel:
    return replace(panel, missing=f"{why} This figure is left out.")


def _by_scope_and_ranking(panel: Panel, run: Run, draw: Callable[[Run, str, str], go.Figure]) -> Panel:
    """Return the panel with one figure for each scope and ranking that were swept, and selectors for both."""
    methods, swept = run.swept_methods, run.swept_scopes
    if not methods or not swept:
        return _without(panel, "The run folder has no sweep table with ranked units.")
    choices = (
        Choice("Scope", tuple(run.wording.scope(scope) for scope in swept), _true_curves(run, swept)),
        Choice("Ranking", methods, methods.index(run.method)),
    )
    figures: dict[tuple[int, ...], go.Figure] = {
        (i, j): draw(run, scope, method) for (i, scope), (j, method) in product(enumerate(swept), enumerate(methods))
    }
    return replace(panel, figures=figures, choices=choices)


def _true_curves(run: Run, swept: Sequence[str]) -> int:
    """Return the position of the scope to show first: all rows, where nothing can be re-supplied."""
    if run.wording.is_final or run.wording.reads_every_row:
        return 0
    return swept.index("all") if "all" in swept else len(swept) - 1


def _by_layer(run: Run, *keys: str) -> dict[int, Figure]:
    found = {layer: run.figure(*keys, layer) for layer in range(run.n_layers)}
    return {layer: figure for layer, figure in found.items() if figure is not None and figure.value is not None}


def _value(figure: Figure | None) -> float | None:
    return None if figure is None else figure.value


def _hover(figure: Figure | None, otherwise: str = "not measured") -> str:
    if figure is None or figure.value is None:
        return html.escape((figure.note if figure else "") or otherwise)
    return measured(figure, 3)


def _name(label: str) -> str:
    return html.escape(shortened(label)) if label else "any other class"


def _spread(low: float, high: float) -> str:
    return "" if low != low else f" [{number(low)}, {number(high)}]"


def _numbers(run: Run, columns: Mapping[str, Mapping[int, Figure]]) -> Numbers:
    layers = sorted({layer for figures in columns.values() for layer in figures})
    rows = tuple(
        (
            f"{layer}",
            *(measured(figures[layer], 3) if layer in figures else "–" for figures in columns.values()),
        )
        for layer in layers
    )
    return Numbers((run.wording.unit_of_depth, *columns), rows)


def new_figure(height: int, x: str, y: str) -> go.Figure:
    """Return an empty figure in the style of the report, with the titles of its axes."""
    layout = {
        "template": TEMPLATE,
        "height": height,
        "xaxis": {"title": {"text": x}},
        "yaxis": {"title": {"text": y}},
    }
    return go.Figure(layout=layout)


def errors(figures: Iterable[Figure], colour: str) -> dict[str, Any]:
    """Return plotly's error bars from the intervals of figures that have a value."""
    above, below = [], []
    for figure in figures:
        value = figure.value or 0.0
        above.append((figure.high if figure.high is not None else value) - value)
        below.append(value - (figure.low if figure.low is not None else value))
    shape = {"type": "data", "symmetric": False, "thickness": 1.5, "width": 4, "color": colour}
    return shape | {"array": above, "arrayminus": below}


def _line(
    drawn: go.Figure,
    run: Run,
    found: Mapping[int, Figure],
    name: str,
    colour: str,
    symbol: str,
    dash: str = "solid",
) -> None:
    if not found:
        return
    drawn.add_scatter(
        x=list(found),
        y=[figure.value for figure in found.values()],
        error_y=errors(found.values(), colour),
        mode="lines+markers",
        name=name,
        line={"color": colour, "width": 2, "dash": dash},
        marker={"color": colour, "symbol": symbol, "size": 8},
        text=[f"{run.wording.layer(layer)}: {measured(figure)}" for layer, figure in found.items()],
        hovertemplate="%{text}<extra>" + name + "</extra>",
    )


def _curve(drawn: go.Figure, rows: pd.DataFrame, name: str, colour: str, symbol: str, control: bool = False) -> None:
    """Add an attack's curve over the budget, `name` escaped; a control is dashed, with no legend entry."""
    rows = rows.dropna(subset=["budget", "value"]).sort_values("budget")
    if rows.empty:
        return
    value = rows["value"]
    drawn.add_scatter(
        x=list(rows["budget"]),
        y=list(value),
        error_y={
            "type": "data",
            "symmetric": False,
            "array": list((rows["high"] - value).fillna(0)),
            "arrayminus": list((value - rows["low"]).fillna(0)),
            "thickness": 0.8,
            "width": 0,
            "color": colour,
        },
        mode="lines" if control else "lines+markers",
        name=name,
        legendgroup=name,
        showlegend=not control,
        line={"color": colour, "width": 1 if control else 2, "dash": "dash" if control else "solid"},
        marker={"color": colour, "symbol": symbol, "size": 5},
        hovertemplate="%{x:.3~g}: %{y:.2f}<extra>" + name + (" (random)" if control else "") + "</extra>",
    )


def level(drawn: go.Figure, height: float, name: str) -> None:
    """Draw a horizontal reference line, which stands in the legend where it has a name."""
    line = {"color": "var(--axis)", "width": 1.5 if name else 1, "dash": "dot" if name else "solid"}
    drawn.add_shape(
        type="line",
        xref="paper",
        x0=0,
        x1=1,
        y0=height,
        y1=height,
        line=line,
        name=name,
        showlegend=bool(name),
    )


def _notice(drawn: go.Figure, text: str, across: str = "paper") -> None:
    drawn.add_annotation(
        x=0.5,
        y=0.5,
        xref=across,
        yref="paper",
        text=html.escape(text),
    )


def _block_axis(drawn: go.Figure, run: Run) -> None:
    drawn.update_xaxes(tickvals=list(range(run.n_layers)), range=[-0.3, run.n_layers - 0.7])


def _step_axis(steps: Sequence[float], sparse: bool) -> dict[str, Any]:
    """Return an axis whose ticks are the swept shares; a sparse one names few enough not to collide."""
    shown = few_steps(steps) if sparse else list(range(len(steps)))
    text = [f"{100 * steps[index]:.0f}%" if sparse else f"{100 * steps[index]:.3g} %" for index in shown]
    return {"tickvals": shown, "ticktext": text, "tickangle": 0, "showgrid": False}


def _positions(columns: Sequence[str], rows: Sequence[str] | None = None) -> dict[str, list[int]]:
    """Return cell positions: names go to the ticks, for two classes may be cut to the same short name."""
    return {"x": list(range(len(columns))), "y": list(range(len(rows if rows is not None else columns)))}


def _class_axes(drawn: go.Figure, columns: Sequence[str], rows: Sequence[str]) -> None:
    drawn.update_xaxes(
        tickvals=list(range(len(columns))),
        ticktext=[_name(label) for label in columns],
        showgrid=False,
        ticks="",
    )
    drawn.update_yaxes(
        tickvals=list(range(len(rows))),
        ticktext=[_name(label) if label else EVERY for label in rows],
        autorange="reversed",
        showgrid=False,
        ticklabelstandoff=6,
    )


def _colour_bar(title: str) -> dict[str, Any]:
    return {
        "title": {"text": title, "side": "right", "font": {"size": 11, "color": "var(--soft)"}},
        "thickness": 10,
        "outlinewidth": 0,
        "tickfont": {"size": 11},
        "len": 1,
    }
