"""The `probe` table: what each layer's probe reads, beside its control, with intervals over the test examples."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from synapse.measure.intervals import figure, macro_f1_figure, rate, resample
from synapse.measure.outcomes import confusion
from synapse.types import Figure

RATES = ("accuracy", "control_accuracy", "model_agreement", "model_accuracy")


def probe_rows(
    *,
    layer: int,
    n_layers: int,
    outcomes: Mapping[str, Float[np.ndarray, "example"]],
    predictions: Int[np.ndarray, "example"],
    targets: Int[np.ndarray, "example"],
    n_labels: int,
    settings: Mapping[str, float],
    seed: int,
) -> list[dict[str, Any]]:
    """Return the rows of one layer: rates and macro-F1 with intervals, then plain numbers about the fit.

    `outcomes` are per-example values of each measure; rates get exact intervals, differences
    percentiles of resampled examples.
    """
    n = len(targets)
    resamples = resample(n, seed=seed)
    figures = {
        name: rate(int(values.sum()), n, unit="accuracy")
        if name in RATES
        else figure(resamples.mean(values[None])[:, 0], n=n, unit="accuracy", bounds=(-1, 1))
        for name, values in outcomes.items()
    }
    figures["macro_f1"] = macro_f1_figure(confusion(targets, predictions, n_labels), seed=seed)
    plain = {name: Figure(float(value), None, None, n, _UNITS.get(name, "")) for name, value in settings.items()}
    return [
        {
            "layer": layer,
            "depth": (layer + 1) / n_layers,
            "measure": name,
            "value": number.value,
            "low": np.nan if number.low is None else number.low,
            "high": np.nan if number.high is None else number.high,
            "n": number.n,
            "unit": number.unit,
        }
        for name, number in (figures | plain).items()
    ]


def probe_table(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Return the rows of all layers as one table."""
    return pd.DataFrame(list(rows))


_UNITS = {"penalty": "lambda", "gradient_norm": "max-norm", "nonzero_units": "units"}
