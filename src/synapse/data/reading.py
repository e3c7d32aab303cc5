"""Files of labelled examples: read in pieces, checked row by row, and refused with the row that is wrong."""

from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from sys import intern

from synapse.data.archives import read_arrays
from synapse.data.columns import Columns, Option, refuse_one_class
from synapse.data.examples import Examples
from synapse.data.gathering import Gathered
from synapse.data.sources import find_source
from synapse.data.tables import Piece, is_on_hub, read_files, read_hub
from synapse.elsewhere import as_written
from synapse.errors import DataError, SettingsError

IN_MEMORY = 2**28
"""Bytes of inputs that are kept in memory unless told otherwise: 256 MB, about two million short texts."""


def read_examples(
    path: str | Path,
    *,
    text: str | None = None,
    label: str | None = "label",
    pair: str | None = None,
    file: str | None = None,
    signal: str | None = None,
    ids: str | None = None,
    in_memory: int = IN_MEMORY,
) -> Examples:
    """Return the labelled examples of a CSV, TSV, JSONL (one object a line), Parquet or NPZ file, in file order.

    `path` is a file here or elsewhere (`s3://bucket/train.csv`, whatever fsspec knows), a packed file (`train.csv.gz`),
    a folder or pattern of Parquet shards, a folder that `save_to_disk` of the library `datasets` wrote, or a data set
    on the Hugging Face hub (`dataset:NAME`, `dataset:NAME:SPLIT`, `dataset:NAME:CONFIGURATION:SPLIT`).

    Each argument names a column; one kind of input may be named, and `label` (None stands for "label"):

    - `text`: texts, the default, from the column "text". With `pair`, a second column of texts, an input is the
      pair (text, second text).
    - `file`: paths of images or wav sounds, from the folder of the data file where they are not absolute; an input
      is the path, and the file has to be there.
    - `signal`: columns of numbers, as a pattern (`"t*"`) or as names or patterns separated by commas; the inputs are
      a float32 array (example, column) in the order of the file. A pattern does not reach the label's column.
      One column whose cells are lists of numbers, nested or not, gives an array (example, ...) of their shape.
    - `ids`: token ids, as whole numbers separated by blanks or as lists; an input is a tuple of ints.

    An NPZ file holds an array of numbers, example first, named by `signal` ("inputs" unless told otherwise), and an
    array of texts or integers named by `label` ("label", or else "labels"). Floating-point numbers become float32,
    integers stay as they are.

    Nothing is taken for a missing value but an empty cell: a text `NA` stays a text. Where `datasets` noted the names
    of a column's classes, their ids become the names.

    A table is read in pieces, and only once. More than `in_memory` bytes of inputs (as Python holds them) go to a
    nameless temporary file, from which each is read when it is asked for; arrays are then mapped, read-only. In memory
    stay 8 bytes an example for its label, and 16 for the place of its input.

    Raises:
        DataError: no such file, a place that cannot be reached, a library that is missing, unknown suffix, unreadable
            content, no such column, an empty cell, a file that is not there, a cell that is no finite number, lists
            of several shapes, a missing label, or fewer than two classes.
        SettingsError: two kinds of input are named, or one that an NPZ file cannot hold.
        ResourceError: the inputs do not fit into the temporary folder.
    """
    label = label or "label"
    option = _one_option(text=text, pair=pair, file=file, signal=signal, ids=ids)
    named = {"text": text, "pair": pair, "file": file, "signal": signal, "ids": ids}
    written = as_written(path)
    if is_on_hub(written):
        columns = Columns(written, None, label, option, **named)
        return _gathered(columns, read_hub(written, columns.choose), in_memory, name=written)
    source = find_source(written)
    if source.suffix == ".npz":
        if option not in (None, "signal"):
            raise SettingsError(
                f"{written} holds arrays, not columns of `{option}`: name its array of inputs with `signal`, or leave "
                f"`{option}` out."
            )
        return read_arrays(source, signal or "inputs", label)
    columns = Columns(written, source.folder, label, option, **named)
    return _gathered(columns, read_files(source, columns.choose), in_memory, name=source.name)


def _gathered(columns: Columns, pieces: Generator[Piece], in_memory: int, *, name: str) -> Examples:
    """Return the examples in the pieces of a table."""
    gathered = Gathered(in_memory)
    labels: list[str] = []
    with closing(pieces):
        for piece in pieces:
            if found := columns.labels.take(piece):
                gathered.add(columns.inputs.take(piece))
                labels += map(intern, found)  # one text a class, however many rows
    if not labels:
        raise DataError(f"{columns.path} has no rows: give a file with at least one example of each of two classes.")
    columns.inputs.refuse()
    columns.labels.refuse()
    refuse_one_class(labels, columns.labels.where)
    return Examples(gathered.inputs(), tuple(labels), name)


def _one_option(**named: str | None) -> Option | None:
    """Return the option that names the kind of input, or None if the default is to be read."""
    options: list[Option] = []
    if named.pop("pair") is not None and named["text"] is None:
        named["text"] = "text"
    for option in ("text", "file", "signal", "ids"):
        if named[option] is not None:
            options.append(option)
    if len(options) > 1:
        raise SettingsError(
            f"Two kinds of input are named, `{options[0]}` and `{options[1]}`: name one, "
            "of `text` (with or without `pair`), `file`, `signal` and `ids`."
        )
    return options[0] if options else None
