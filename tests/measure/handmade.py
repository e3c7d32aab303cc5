"""Sweeps whose every prediction is written down, so that figures can be worked out by hand."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from synapse.types import Sweep

NOT_RUN = -1


def cell(predicted: Sequence[int], **columns: Any) -> dict[str, Any]:
    """One cell of a plan and what it predicts; by default the whole width of layer 0, zeroed in all rows."""
    plan = {"layer": 0, "scope": "all", "kind": "zero", "strength": np.nan, "method": "", "label": ""}
    plan |= {"selection": "top", "draw": -1, "fraction": 1.0} | columns
    if plan["fraction"] < 1 and not plan["method"]:
        plan["method"] = "random" if plan["selection"] == "random" else "cumulative-mass"
    return plan | {"predicted": predicted}


def make_sweep(
    cells: list[dict[str, Any]], targets: Sequence[int], clean: Sequence[int] | None = None, n_layers: int = 1
) -> Sweep:
    """A sweep of these cells; the clean model is right everywhere unless told otherwise."""
    labels = tuple("abcdefgh"[: max(2, max(targets) + 1)])
    plan = pd.DataFrame([{k: v for k, v in c.items() if k != "predicted"} for c in cells])
    plan["depth"] = (plan["layer"] + 1) / n_layers
    plan["k"] = (100 * plan["fraction"]).round().astype(int)
    return Sweep(
        cells=plan,
        logits=_logits(np.array([c["predicted"] for c in cells]), len(labels)),
        clean_logits=_logits(np.array(targets if clean is None else clean), len(labels)),
        targets=np.array(targets),
        labels=labels,
    )


def _logits(predicted: np.ndarray, n_labels: int) -> np.ndarray:
    """Logits whose largest is the given prediction; NaN where there is none."""
    logits = np.where(np.arange(n_labels) == predicted[..., None], 5.0, 0.0)
    logits[predicted == NOT_RUN] = np.nan
    return logits.astype(np.float32)
