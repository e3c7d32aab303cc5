"""One reader a format: from a stream of bytes, or a name on the hub, to pieces of a table.

A piece holds, for the columns that were chosen, the cells of some consecutive rows. A reader tells `choose` which
columns there are, as soon as it knows and again where later rows may have more, and reads those that come back.
"""

import json
import re
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from importlib import import_module
from io import BufferedReader, TextIOWrapper
from itertools import chain, islice
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from synapse.data.examples import quoted
from synapse.data.sources import Source
from synapse.elsewhere import one_line
from synapse.errors import DataError, SynapseError

Choose = Callable[[Sequence[str]], Sequence[str]]
"""Given the names of the columns there are, the columns to be read."""

Piece = dict[str, list[Any]]
"""The cells of each column."""

_ROWS = 2048
"""Rows of a piece: few enough for memory where each is a document, enough that a piece costs little."""

_BUFFER = 2**20
"""Bytes of a Parquet column that are read at once."""

_HUB = re.compile(r"dataset:(?P<name>[^:]+)(:(?P<config>[^:\[]+)(?=:))?(:(?P<split>.+))?")


def read_files(source: Source, choose: Callable[[str, Sequence[str]], Sequence[str]]) -> Generator[Piece]:
    """Yield the pieces of all files of a data set; `choose` is told of which file the columns are.

    Raises:
        DataError: a file cannot be read.
    """
    for file in source.files:
        shown = source.shown(file)
        try:
            with source.opened(file) as stream:
                yield from _READERS[source.suffix](stream, partial(choose, shown))
        except SynapseError:
            raise
        except Exception as error:  # every parser and every file system raises its own
            raise unreadable(shown, source.suffix, error) from error


def is_on_hub(path: str) -> bool:
    """Return whether a path names a data set of the Hugging Face hub: `dataset:NAME[[:CONFIG]:SPLIT]`."""
    return _HUB.fullmatch(path) is not None


def is_elsewhere(path: str) -> bool:
    """Return whether a path names something that lies in no folder of this machine."""
    return is_on_hub(path) or "://" in path


def read_hub(path: str, choose: Callable[[str, Sequence[str]], Sequence[str]]) -> Generator[Piece]:
    """Yield the pieces of one split of a data set on the hub, which the library `datasets` downloads and keeps.

    Raises:
        DataError: the library is not installed, the data set cannot be had, or it has several splits and none is named.
    """
    try:
        datasets = import_module("datasets")
    except ImportError as error:
        raise DataError(
            f"{path} needs the library `datasets`, which is not installed: install it with "
            "`pip install 'synapse[data]'`, or give the path of a file."
        ) from error
    name, config, split = _HUB.fullmatch(path).group("name", "config", "split")  # type: ignore[union-attr]
    try:
        splits = [split] if split else datasets.get_dataset_split_names(name, config)
        if len(splits) == 1:
            table = datasets.load_dataset(name, config, split=splits[0])
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} could not be had from the hub: {one_line(error)}. Check name, configuration and split "
            "(dataset:NAME:CONFIG:SPLIT) and the network, or give the path of a file."
        ) from error
    if len(splits) != 1:
        raise DataError(f"{path} has the splits {quoted(splits)}: name one, as in dataset:{name}:{splits[0]}.")
    columns = choose(path, table.column_names)
    parts = table.select_columns(list(dict.fromkeys(columns))).with_format("arrow").iter(_ROWS)
    batches = chain.from_iterable(part.to_batches() for part in parts)
    yield from _record_batches(batches, columns, table.features.arrow_schema)


def unreadable(path: str, suffix: str, error: Exception) -> DataError:
    """Return what to raise where the content of a file is not what its suffix says."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return DataError(f"{path} could not be read as {suffix[1:].upper()}: {reason}. Check the file, or its suffix.")


def _delimited(stream: Any, choose: Choose, *, separator: str) -> Iterator[Piece]:
    with _as_text(stream, newline="") as lines:
        try:
            tables = pd.read_csv(
                lines, sep=separator, dtype=str, keep_default_na=False, index_col=False, chunksize=_ROWS
            )
        except pd.errors.EmptyDataError:
            choose([])
            return
        while (table := _next_table(tables)) is not None:
            yield {column: table[column].tolist() for column in choose([str(name) for name in table.columns])}


def _json_lines(stream: Any, choose: Choose) -> Iterator[Piece]:
    # Line by line: pandas would turn integer labels next to a null into 1.0, and says no line number.
    names: dict[str, None] = {}
    with _as_text(stream, newline=None) as lines:
        records = _records(lines)
        while (rows := list(islice(records, _ROWS))) or not names:
            names |= dict.fromkeys(chain.from_iterable(rows))
            yield {column: [row.get(column, float("nan")) for row in rows] for column in choose(list(names))}


def _records(lines: TextIOWrapper) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number}: {error.msg}") from error
        if not isinstance(record, dict):
            raise ValueError(f"line {number} is no JSON object")
        yield record


def _parquet(stream: Any, choose: Choose) -> Iterator[Piece]:
    file = pq.ParquetFile(stream, buffer_size=_BUFFER, pre_buffer=False)
    columns = choose(_names(file.schema_arrow))
    batches = file.iter_batches(_ROWS, columns=list(columns), use_threads=False)
    yield from _record_batches(batches, columns, file.schema_arrow)


def _arrow(stream: Any, choose: Choose) -> Iterator[Piece]:
    reader = pa.ipc.open_stream(stream)
    yield from _record_batches(reader, choose(_names(reader.schema)), reader.schema)


def _record_batches(batches: Any, columns: Sequence[str], schema: pa.Schema) -> Iterator[Piece]:
    classes = _class_names(schema)
    for batch in batches:
        yield {column: _cells(batch.column(column), classes.get(column)) for column in columns}


def _cells(column: pa.Array, classes: Sequence[str] | None) -> list[Any]:
    """Return the cells of a column, ids of classes by their names; an id below 0 stands for no label."""
    if isinstance(column.type, pa.ExtensionType):
        column = column.storage
    if pa.types.is_floating(column.type):
        column = column.fill_null(float("nan"))  # no value reads as no number, as elsewhere
    cells: list[Any] = column.to_pylist()
    if classes is None:
        return cells
    return [classes[i] if i is not None and 0 <= i < len(classes) else None if i is None or i < 0 else i for i in cells]


def _class_names(schema: pa.Schema) -> dict[str, list[str]]:
    """Return the names of the classes of each column that has some, as `datasets` notes them beside its tables."""
    noted = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = (noted.get("info") or {}).get("features") or {}
    return {name: feature["names"] for name, feature in features.items() if _is_class(feature)}


def _is_class(feature: Any) -> bool:
    return isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and bool(feature.get("names"))


def _names(schema: pa.Schema) -> list[str]:
    return [str(name) for name in schema.empty_table().to_pandas().columns]  # without the index that pandas adds


def _next_table(tables: Iterator[pd.DataFrame]) -> pd.DataFrame | None:
    with warnings.catch_warnings():
        # Rows longer than the header would otherwise lose a cell, or shift every column by one.
        warnings.simplefilter("error", pd.errors.ParserWarning)
        return next(tables, None)


def _as_text(stream: Any, *, newline: str | None) -> TextIOWrapper:
    return TextIOWrapper(BufferedReader(stream), encoding="utf-8-sig", newline=newline)


_READERS: dict[str, Callable[[Any, Choose], Iterator[Piece]]] = {
    ".csv": partial(_delimited, separator=","),
    ".tsv": partial(_delimited, separator="\t"),
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".parquet": _parquet,
    ".arrow": _arrow,
}
