"""All figures of one study in one dictionary (`scorecard.json`), and the table of its sweep."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from synapse.measure.faithfulness import faithfulness
from synapse.measure.intervals import clopper_pearson, macro_f1_figure, paired_score, rate, tabled
from synapse.measure.outcomes import confusion, kl, outcomes_of, predictions
from synapse.measure.redundancy import redundancy
from synapse.measure.specialisation import specialisation
from synapse.measure.stability import stability
from synapse.measure.vulnerability import vulnerability
from synapse.types import Component, Figure, Sweep

FORMAT = 1
"""Version of the scorecard's layout."""

PROBE_MEASURES = ("accuracy", "macro_f1", "control_accuracy", "selectivity")


def scorecard(
    *,
    test_logits: Float[np.ndarray, "example label"],
    test_targets: Int[np.ndarray, "example"],
    labels: tuple[str, ...],
    attack_table: pd.DataFrame,
    component: Component,
    figures: dict[str, Any],
    seed: int = 0,
) -> dict[str, Any]:
    """Return every figure of a study as plain dictionaries, ready for JSON; layers are string keys.

    `clean` is measured on the whole test set; `figures` are those of `component` (see `component_figures`). The same
    `seed` gives the same numbers, bit for bit.
    """
    return {
        "format": FORMAT,
        "component": component,
        "clean": _plain(clean_figures(test_logits, test_targets, labels, seed=seed)),
        **figures,
        "vulnerability": _plain(vulnerability(attack_table)),
    }


def component_figures(
    *,
    probe_table: pd.DataFrame,
    ranking_table: pd.DataFrame,
    sweep: Sweep,
    method: str | None = None,
    rank_stability: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Return the figures of one component, measured on the examples of its sweep and of the tables given.

    Tables have the columns of docs/run-folder.md. `method` is the ranking that was swept in full, `rank_stability` the
    figures of its draws, where there are any.

    Raises
    ------
    DataError
        Where the parts of the sweep do not fit each other.
    """
    return {
        "probe": _plain(probe_figures(probe_table)),
        "stability": _plain(stability(sweep, method=method, seed=seed)),
        "faithfulness": _plain(faithfulness(sweep, seed=seed)),
        "redundancy": _plain(redundancy(sweep, method=method, seed=seed)),
        "specialisation": _plain(specialisation(sweep, ranking_table, method=method, seed=seed)),
        "rank_stability": _plain(rank_stability or {}),
    }


def clean_figures(
    logits: Float[np.ndarray, "example label"],
    targets: Int[np.ndarray, "example"],
    labels: tuple[str, ...],
    *,
    seed: int,
) -> dict[str, Any]:
    """Return accuracy, macro-F1, chance and the recall of each class of the unedited model.

    `chance` is what always naming the most frequent class gets: 1/C where classes are equally frequent, more
    where not.
    """
    counts = confusion(targets, predictions(logits), len(labels))
    hits, support = np.diagonal(counts), counts.sum(axis=1)
    return {
        "accuracy": rate(int(hits.sum()), len(targets), unit="accuracy"),
        "macro_f1": macro_f1_figure(counts, seed=seed),
        "chance": rate(int(support.max()), len(targets), unit="accuracy"),
        "recall": {
            label: rate(int(hit), int(n), unit="recall") for label, hit, n in zip(labels, hits, support, strict=True)
        },
    }


def probe_figures(probe_table: pd.DataFrame) -> dict[str, dict[int, Figure]]:
    """Return the probe's measures by layer, as the probe table has them."""
    figures: dict[str, dict[int, Figure]] = {}
    for row in probe_table.to_dict("records"):
        if row["measure"] in PROBE_MEASURES:
            figures.setdefault(row["measure"], {})[int(row["layer"])] = tabled(row, unit=str(row["unit"]))
    return figures


def _plain(figures: Any) -> Any:
    """Nested figures as nested dictionaries with string keys; a name, and what is not there, stays as it is."""
    if figures is None or isinstance(figures, str):
        return figures
    if isinstance(figures, Figure):
        return figures.to_dict()
    if is_dataclass(figures):
        return {field.name: _plain(getattr(figures, field.name)) for field in fields(figures)}
    return {str(key): _plain(value) for key, value in figures.items()}


def sweep_table(sweep: Sweep) -> pd.DataFrame:
    """Return the cells of a sweep with what was measured in each, over the examples it ran.

    Added columns: `cell` (its number), `n`, `accuracy` and `drop` with `_low` and `_high`, `flip_rate`, `kl`
    in nats. The drop is paired: accuracy lost on the same examples. NaN where a cell ran nothing. The
    intervals are closed forms, so there is no seed. Where cells could stop early, the drop's interval is the
    confidence sequence of the sweep, of the drop over all its examples; that of the accuracy is of those that ran.

    Raises
    ------
    DataError
        Where the parts of the sweep do not fit each other.
    """
    outcomes = outcomes_of(sweep)
    n, right = outcomes.ran.sum(axis=1), outcomes.right.sum(axis=1)
    broken, repaired = (outcomes.lost == 1).sum(axis=1), (outcomes.lost == -1).sum(axis=1)
    divergence = [
        kl(sweep.clean_logits[at], logits[at]).sum() for at, logits in zip(outcomes.ran, sweep.logits, strict=True)
    ]
    accuracy_low, accuracy_high = clopper_pearson(right, n)
    drop_low, drop_high = paired_score(broken, repaired, n) if sweep.changes is None else -sweep.changes[:, ::-1].T
    ran = np.where(n > 0, n, np.nan)
    measured = {
        "cell": np.arange(len(n)),
        "n": n,
        "accuracy": right / ran,
        "accuracy_low": accuracy_low,
        "accuracy_high": accuracy_high,
        "drop": (broken - repaired) / ran,
        "drop_low": drop_low,
        "drop_high": drop_high,
        "flip_rate": outcomes.flipped.sum(axis=1) / ran,
        "kl": divergence / ran,
    }
    return outcomes.cells.assign(**measured)
