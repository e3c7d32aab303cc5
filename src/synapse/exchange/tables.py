"""Activations as a Parquet table: one row an example, for pandas, Polars, DuckDB, Spark and whatever else reads it."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from synapse.exchange.files import written_beside
from synapse.exchange.views import predicted_labels
from synapse.types import Activations

ROW_GROUP_BYTES = 2**26
"""States in one row group, at most (but at least one example): what is held in memory."""


def save_parquet(activations: Activations, path: str | os.PathLike[str]) -> None:
    """Write one row an example; a file that is there is replaced.

    | column | type | what it is |
    |---|---|---|
    | `example` | int64 | its position, from 0 |
    | `label` | string | its class |
    | `predicted` | string | the class of its largest logit; null where the logits are not known |
    | `logits` | list of floats, of one length | in the order of `labels` in the metadata; null where not known |
    | `layer_0`, ... | list of floats, of one length | the readout state in that layer |

    The file's metadata says `labels` (as JSON), `source` and `component`.

    Raises:
        DataError: `path` is a folder.
    """
    schema = _schema(activations)
    with (
        written_beside(Path(path)) as draft,
        # Floats of a state hardly repeat: a dictionary of them would only cost time.
        pq.ParquetWriter(draft, schema, use_dictionary=["label", "predicted"]) as writer,
    ):
        for rows in _windows(activations):
            writer.write_table(_table(activations, rows, schema))


def _schema(activations: Activations) -> pa.Schema:
    state = pa.list_(pa.from_numpy_dtype(activations.values.dtype), activations.width)
    logits = pa.list_(pa.float32(), len(activations.labels))
    return pa.schema(
        [
            pa.field("example", pa.int64(), nullable=False),
            pa.field("label", pa.string(), nullable=False),
            pa.field("predicted", pa.string()),
            pa.field("logits", logits),
            *(pa.field(f"layer_{layer}", state) for layer in range(activations.n_layers)),
        ],
        metadata={
            "labels": json.dumps(activations.labels),
            "source": activations.source,
            "component": activations.component,
        },
    )


def _windows(activations: Activations) -> Iterator[slice]:
    each = activations.n_layers * activations.width * activations.values.dtype.itemsize
    rows = max(1, ROW_GROUP_BYTES // max(1, each))
    for start in range(0, len(activations), rows):
        yield slice(start, min(start + rows, len(activations)))


def _table(activations: Activations, rows: slice, schema: pa.Schema) -> pa.Table:
    names = np.array(activations.labels, dtype=object)
    logits = activations.logits
    states = (activations.values[layer, rows] for layer in range(activations.n_layers))
    columns = [
        pa.array(np.arange(rows.start, rows.stop)),
        pa.array(names[activations.targets[rows]], pa.string()),
        pa.array(predicted_labels(activations, rows), pa.string()),
        pa.nulls(rows.stop - rows.start, schema.field("logits").type) if logits is None else _lists(logits[rows]),
        *map(_lists, states),
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def _lists(numbers: np.ndarray) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(numbers).reshape(-1)), numbers.shape[1])
