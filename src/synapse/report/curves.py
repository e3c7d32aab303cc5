"""Ablation curves out of the sweep table."""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from synapse.report.run import Run

COLUMNS = ("fraction", "accuracy", "low", "high", "drop")


def ablation_curve(run: Run, *, layer: int, scope: str, selection: str, method: str) -> pd.DataFrame:
    """Return accuracy against the share of units set to zero, from 0 (clean) to 1, sorted by `fraction`.

    Columns: `fraction`, `accuracy`, `low` and `high` (95 % interval), `drop` (clean minus edited, on the
    same examples). Random sets are pooled: the mean over all (set, example) pairs that ran. Empty where the
    scope and layer were not swept. The clean point has no interval of its own.
    """
    here = run.zeroed.get((layer, scope), run.sweep.head(0))
    cells = here[(here["selection"] == selection) & (here["label"] == "")]
    cells = cells[(cells["fraction"] < 1) & (cells["n"] > 0)]
    if selection != "random":
        cells = cells[cells["method"] == method]
    if cells.empty:
        return pd.DataFrame({column: [] for column in COLUMNS}, dtype=float)
    points = _pooled(cells, _n_examples(run, cells)) if selection == "random" else _single(cells)
    # All curves of a place end in one cell, which is stored once: everything removed.
    everything = _single(here[here["fraction"] >= 1].head(1))
    known = (everything if len(everything) else cells.nlargest(1, "n")).iloc[0]
    unedited = known["accuracy"] + known["drop"]
    clean = pd.DataFrame([[0.0, unedited, np.nan, np.nan, 0.0]], columns=list(COLUMNS))
    parts = [part for part in (clean, points, everything) if len(part)]
    return pd.concat(parts, ignore_index=True).sort_values("fraction", ignore_index=True)


def few_steps(steps: Sequence[float]) -> list[int]:
    """Return the positions of a few shares to name on a narrow axis: those nearest to both ends and the middle."""
    if len(steps) <= 6:
        return list(range(len(steps)))
    return sorted(
        {min(range(len(steps)), key=lambda i: abs(steps[i] - share)) for share in (0.0, 0.05, 0.5, 0.95, 1.0)}
    )


def _single(cells: pd.DataFrame) -> pd.DataFrame:
    names = {"accuracy_low": "low", "accuracy_high": "high"}
    return cells.rename(columns=names)[list(COLUMNS)].astype(float)


def _pooled(cells: pd.DataFrame, n_examples: int) -> pd.DataFrame:
    rows = []
    for share, sets in cells.groupby("fraction"):
        accuracy = float(np.average(sets["accuracy"], weights=sets["n"]))
        drop = np.average(sets["drop"], weights=sets["n"])
        # An example that met several sets still counts once: more sets do not make more examples.
        low, high = wilson(accuracy, min(int(sets["n"].sum()), n_examples))
        rows.append([share, accuracy, low, high, drop])
    return pd.DataFrame(rows, columns=list(COLUMNS), dtype=float)


def _n_examples(run: Run, cells: pd.DataFrame) -> int:
    examples = run.manifest.get("sweep", {}).get("examples")
    return int(examples) if examples else int(cells["n"].max())


def wilson(rate: float, n: int) -> tuple[float, float]:
    """Return the ends of the 95 % score interval of a rate among n, in [0, 1].

    *Source*: Wilson, Journal of the American Statistical Association 22, 1927.
    """
    z2 = 1.959964**2
    middle = (rate + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (rate * (1 - rate) / n + z2 / (4 * n**2))) / (1 + z2 / n)
    return middle - half, middle + half
