"""Activations as values of other libraries: tensors of torch, a dataset of xarray. numpy's are `activations.values`."""

from typing import TYPE_CHECKING, Any

import numpy as np

from synapse.errors import SettingsError
from synapse.exchange.files import optional
from synapse.types import Activations

if TYPE_CHECKING:
    import torch
    import xarray

_DIMENSIONS = {
    "activations": ("layer", "example", "unit"),
    "logits": ("example", "class"),
    "features": ("example", "feature"),
    "row_mean": ("layer", "unit"),
    "row_deviation": ("layer", "unit"),
    "class_count": ("layer", "class"),
    "class_mean": ("layer", "class", "unit"),
    "class_deviation": ("layer", "class", "unit"),
}
_ROW_MOMENTS = ("row_mean", "row_deviation")


def to_torch(activations: Activations, layer: int) -> "torch.Tensor":
    """Return the states of one layer, (example, unit), on the CPU; only this layer is read.

    Where the activations are in memory, or a map of a file, the tensor shares it: clone it before you change it.

    Raises:
        SettingsError: there is no such layer.
    """
    import torch  # here, so that files can be read and written without it

    if not -activations.n_layers <= layer < activations.n_layers:
        raise SettingsError(f"There is no layer {layer}: give one of 0 to {activations.n_layers - 1}.")
    states = np.asarray(activations.values[layer])
    return torch.from_numpy(states if states.flags.writeable else states.copy())


def to_xarray(activations: Activations) -> "xarray.Dataset":
    """Return a dataset whose `activations` have the dimensions layer, example and unit.

    Beside them are the other arrays of the activations, as far as these are not None: `logits` (example, class),
    `features` (example, feature), `row_mean`, `row_deviation`, `class_count`, `class_mean` and `class_deviation`.
    Coordinates are `depth` of a layer, `label` (the class), `target` (its position) and `predicted` (the class of the
    largest logit; empty where the logits are not known) of an example, and the positions of layers, examples and units,
    which stay with them in any selection. `source`, `component` and `labels` are attributes.

    Activations on disk are read when they are asked for, and only as far: `dataset.activations.sel(layer=3)` reads one
    layer.

    Raises:
        SettingsError: xarray is not installed.
    """
    xr = optional("xarray")
    layers = np.arange(activations.n_layers)
    names = np.array(activations.labels, dtype=str)
    arrays: dict[str, Any] = {name: getattr(activations, name) for name in ("logits", "features", *_ROW_MOMENTS)}
    arrays["activations"] = activations.values
    if activations.class_moments is not None:
        arrays |= {f"class_{name}": getattr(activations.class_moments, name) for name in ("count", "mean", "deviation")}
    dataset: xarray.Dataset = xr.Dataset(
        {name: (_DIMENSIONS[name], _lazy(array)) for name, array in arrays.items() if array is not None},
        coords={
            "layer": layers,
            "depth": ("layer", (layers + 1) / max(1, activations.n_layers)),
            "example": np.arange(len(activations)),
            "label": ("example", names[activations.targets]),
            "target": ("example", activations.targets),
            "predicted": ("example", np.array([name or "" for name in predicted_labels(activations)], dtype=str)),
            "unit": np.arange(activations.width),
            "class": names,
        },
        attrs={
            "source": activations.source,
            "component": activations.component,
            "labels": list(activations.labels),
        },
    )
    return dataset


def predicted_labels(activations: Activations, rows: slice = slice(None)) -> list[str | None]:
    """Return the class of each example's largest logit, None where the logits are not known."""
    if activations.logits is None:
        return [None] * len(activations.targets[rows])
    return [activations.labels[best] for best in activations.predictions[rows]]


def _lazy(values: Any) -> Any:
    """Return what xarray can index: an array as it is, as what is a map of a file is read by the system anyway."""
    if isinstance(values, np.ndarray):
        return values
    from synapse.exchange.lazy import lazily_indexed  # which imports xarray

    return lazily_indexed(values)
