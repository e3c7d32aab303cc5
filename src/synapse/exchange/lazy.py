"""Numbers on disk as an array of xarray that reads what is indexed."""

from typing import Any

import numpy as np
from xarray.backends import BackendArray
from xarray.core import indexing


class OnDisk(BackendArray):
    """Numbers (layer, example, unit), of which `values[layer, rows]` reads some, or (example, unit), `values[rows]`.

    Rows are asked for as a slice or as an array of positions; units are chosen after the rows were read.
    """

    def __init__(self, values: Any) -> None:
        self.values = values
        self.shape = tuple(values.shape)
        self.dtype = np.dtype(values.dtype)

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        """Return the part that is indexed, as numpy."""
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.OUTER, self._part)

    def _part(self, key: tuple[Any, ...]) -> np.ndarray:
        positions = [np.atleast_1d(np.arange(n)[each]) for n, each in zip(self.shape, key, strict=True)]
        rows, units = (
            each if isinstance(each, slice) else chosen for each, chosen in zip(key[-2:], positions[-2:], strict=True)
        )
        found = np.empty([len(chosen) for chosen in positions], self.dtype)
        if self.ndim == 2:
            found[:] = self.values[rows][:, units]
        else:
            for place, layer in enumerate(positions[0].tolist()):
                found[place] = self.values[layer, rows][:, units]
        # A single position takes its axis away.
        return found.reshape(
            [n for n, each in zip(found.shape, key, strict=True) if isinstance(each, (slice, np.ndarray))]
        )


def lazily_indexed(values: Any) -> Any:
    """Return numbers as data of an xarray variable, of which nothing is read yet."""
    return indexing.LazilyIndexedArray(OnDisk(values))
