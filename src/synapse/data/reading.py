"""Files of labelled examples: read, checked row by row, and refused with the row that is wrong."""

import json
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Float32

from synapse.data.examples import Examples, quoted
from synapse.errors import DataError, SettingsError, near

READABLE = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet", ".npz")
"""The suffixes that `read_examples` knows."""

_LARGEST_ID = 2**31 - 1

_Option = Literal["text", "file", "signal", "ids"]


def read_examples(
    path: str | Path,
    *,
    text: str | None = None,
    label: str | None = "label",
    pair: str | None = None,
    file: str | None = None,
    signal: str | None = None,
    ids: str | None = None,
) -> Examples:
    """Return the labelled examples of a CSV, TSV, JSONL (one object a line), Parquet or NPZ file, in file order.

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

    Nothing is taken for a missing value but an empty cell: a text `NA` stays a text.

    Raises:
        DataError: no such file, unknown suffix, unreadable content, no such column, an empty cell, a file that is
            not there, a cell that is no finite number, lists of several shapes, a missing label, or fewer than two
            classes.
        SettingsError: two kinds of input are named, or one that an NPZ file cannot hold.
    """
    path, label = Path(path), label or "label"
    option = _one_option(text=text, pair=pair, file=file, signal=signal, ids=ids)
    _check_path(path)
    if path.suffix.lower() == ".npz":
        if option not in (None, "signal"):
            raise SettingsError(
                f"{path} holds arrays, not columns of `{option}`: name its array of inputs with `signal`, or leave "
                f"`{option}` out."
            )
        return _read_arrays(path, signal or "inputs", label)
    table = _Table(path, _read_table(path))
    text = text or "text"
    match option:
        case "file" | "ids":
            columns = [table.named(file or ids or "", option)]
        case "signal":
            columns = _signal_columns(table, signal or "", label)
        case _:
            columns = [table.named(text, "text")]
            if pair:
                columns.append(table.named(pair, "pair"))
    table.named(label, "label")
    if len({*columns, label}) <= len(columns):
        raise DataError(
            f"Of {path}, the column {label!r} was named as label and {quoted(columns)} as input: "
            "name another column for each."
        )
    if not len(table.rows):
        raise DataError(f"{path} has no rows: give a file with at least one example of each of two classes.")
    inputs: Sequence[Any] | np.ndarray
    match option:
        case "file":
            inputs = _paths(table, columns[0])
        case "ids":
            inputs = _token_ids(table, columns[0])
        case "signal":
            inputs = _signals(table, columns)
        case _:
            texts = [table.filled(column, "fill in or remove these rows") for column in columns]
            inputs = tuple(zip(*texts, strict=True)) if pair else tuple(texts[0])
    labels = table.filled(label, "label or remove these rows")
    _refuse_one_class(labels, table.where(label))
    return Examples(inputs, tuple(labels), path.name)


@dataclass(frozen=True)
class _Table:
    """The rows of a file, and how its columns are called in messages."""

    path: Path
    rows: pd.DataFrame

    @property
    def columns(self) -> list[str]:
        return [str(column) for column in self.rows.columns if str(column)]

    def where(self, column: str) -> str:
        return f"Column {column!r} of {self.path}"

    def named(self, column: str, option: str) -> str:
        """Return the name of a column that is there."""
        if column not in self.columns:
            self.refuse_empty_file()
            other_kinds = ", or images and sounds with `file`" if option == "text" else ""
            raise DataError(
                f"{self.path} has no column {column!r}, only {quoted(self.columns)}.{near(column, self.columns)} "
                f"Name the {option} column with `{option}`{other_kinds}."
            )
        return column

    def refuse_empty_file(self) -> None:
        if not self.columns:
            raise DataError(f"{self.path} is empty: give a file with an input and a label column.")

    def cells(self, column: str) -> list[Any]:
        return list(self.rows[column].tolist())

    def filled(self, column: str, way_out: str) -> list[str]:
        """Return a column as texts, none of which is empty."""
        texts = [_as_text(value) for value in self.cells(column)]
        _refuse_empty([not text.strip() for text in texts], self.where(column), way_out)
        return texts


def _one_option(**named: str | None) -> _Option | None:
    """Return the option that names the kind of input, or None if the default is to be read."""
    options: list[_Option] = []
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


def _paths(table: _Table, column: str) -> tuple[Path, ...]:
    names = table.filled(column, "fill in or remove these rows")
    paths = tuple(table.path.parent / name.strip() for name in names)
    missing = [not path.is_file() for path in paths]
    if any(missing):
        raise DataError(
            f"{table.where(column)} names a file that is not there in {_rows(missing)}: there is no "
            f"{paths[missing.index(True)]}. Correct the paths, which start from the folder of the data file, or remove "
            "these rows."
        )
    return paths


def _token_ids(table: _Table, column: str) -> tuple[tuple[int, ...], ...]:
    rows = []
    for row, cell in enumerate(table.cells(column), start=1):
        values = _plain(cell) if _is_list(cell) else _as_text(cell).split()
        try:
            ids = tuple(_as_id(value) for value in values)
        except ValueError as error:
            raise DataError(
                f"{table.where(column)} holds {_short(cell)} in data row {row}: give token ids, whole numbers from 0 "
                f"to {_LARGEST_ID}, separated by blanks or as a list."
            ) from error
        rows.append(ids)
    _refuse_empty([not ids for ids in rows], table.where(column), "fill in or remove these rows")
    return tuple(rows)


def _as_id(value: Any) -> int:
    if isinstance(value, str) and value.isascii() and value.isdecimal():
        value = int(value)
    if not isinstance(value, Integral) or isinstance(value, bool) or not 0 <= int(value) <= _LARGEST_ID:
        raise ValueError(f"{value!r} is no token id")
    return int(value)


def _signal_columns(table: _Table, pattern: str, label: str) -> list[str]:
    """Return the columns that are named, in the order of the file."""
    if pattern in table.columns:
        return [pattern]
    chosen = set()
    for part in filter(None, (part.strip() for part in pattern.split(","))):
        if part in table.columns:  # a name may hold characters that mean something in a pattern
            found = [part]
        else:
            found = [name for name in table.columns if name != label and fnmatchcase(name, part)]
        if not found:
            table.refuse_empty_file()
            raise DataError(
                f"{table.path} has no column {part!r}, as a name or a pattern, only {quoted(table.columns)}."
                f"{near(part, table.columns)} Name the columns of numbers with `signal`, as a pattern ('t*') or as "
                "names separated by commas."
            )
        chosen.update(found)
    if not chosen:
        raise SettingsError(f"`signal` is {pattern!r}: give a pattern ('t*') or column names separated by commas.")
    return [name for name in table.columns if name in chosen]


def _signals(table: _Table, columns: Sequence[str]) -> Float32[np.ndarray, "example ..."]:
    if len(columns) == 1 and _is_list(table.cells(columns[0])[0]):
        return _lists(table, columns[0])
    signals = np.empty((len(table.rows), len(columns)), dtype=np.float32)
    for place, column in enumerate(columns):
        cells = table.cells(column)
        signals[:, place] = _as_float32(np.array([_as_number(cell) for cell in cells]))
        wrong = np.flatnonzero(~np.isfinite(signals[:, place]))
        if len(wrong):
            raise DataError(
                f"{table.where(column)} holds {_short(cells[wrong[0]])} in data row {wrong[0] + 1}: give a finite "
                "number, remove the row, or leave the column out of `signal`."
            )
    return signals


def _lists(table: _Table, column: str) -> Float32[np.ndarray, "example ..."]:
    arrays: list[np.ndarray] = []
    for row, cell in enumerate(table.cells(column), start=1):
        try:
            array = _as_float32(np.asarray(_plain(cell), dtype=np.float64))
        except (ValueError, TypeError):
            array = np.array(np.nan)
        if not array.size or not np.isfinite(array).all():
            raise DataError(
                f"{table.where(column)} holds {_short(cell)} in data row {row}: give a list of finite numbers, "
                "or of lists of equal length, or remove the row."
            )
        arrays.append(array)
        if array.shape != arrays[0].shape:
            raise DataError(
                f"{table.where(column)} holds numbers of shape {array.shape} in data row {row}, but of "
                f"{arrays[0].shape} in data row 1: cut or fill them up to one shape."
            )
    return np.stack(arrays)


def _read_arrays(path: Path, inputs_name: str, label_name: str) -> Examples:
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("it is no archive of arrays")
        with np.load(path, allow_pickle=False) as archive:
            if label_name == "label" and "label" not in archive.files and "labels" in archive.files:
                label_name = "labels"
            arrays = []
            for name, option in ((inputs_name, "signal"), (label_name, "label")):
                if name not in archive.files:
                    raise DataError(
                        f"{path} has no array {name!r}, only {quoted(archive.files)}.{near(name, archive.files)} "
                        f"Name the array of {'inputs' if option == 'signal' else 'labels'} with `{option}`."
                    )
                arrays.append(archive[name])
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise _unreadable(path, error) from error
    inputs, classes = arrays
    where = f"Array {inputs_name!r} of {path}"
    if inputs.dtype.kind not in "biuf" or inputs.ndim < 2 or not inputs.size:
        raise DataError(
            f"{where} has dtype {inputs.dtype} and shape {inputs.shape}: give numbers of two axes or more, "
            "example first."
        )
    if inputs.dtype.kind == "f":
        inputs = _as_float32(inputs)
        finite = np.isfinite(inputs).reshape(len(inputs), -1).all(axis=1)
        if not finite.all():
            raise DataError(
                f"{where} holds a number that is not finite in {_rows(~finite, 'example')}: "
                "correct or remove these examples."
            )
    where = f"Array {label_name!r} of {path}"
    if classes.dtype.kind not in "biuU" or classes.ndim != 1:
        raise DataError(
            f"{where} has dtype {classes.dtype} and shape {classes.shape}: give one text or integer for each example."
        )
    labels = tuple(str(value) for value in classes.tolist())
    _refuse_empty([not name.strip() for name in labels], where, "label or remove these examples", "example")
    _refuse_one_class(labels, where)
    return Examples(inputs, labels, path.name)


def _check_path(path: Path) -> None:
    if not path.exists():
        neighbours = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"There is no file {path}.{near(path.name, neighbours)} Give the path of a data file.")
    if path.is_dir():
        raise DataError(f"{path} is a folder: give the path of a data file ({', '.join(READABLE)}).")
    if path.suffix.lower() not in READABLE:
        raise DataError(f"{path} ends in {path.suffix.lower()!r}: give a file that ends in {', '.join(READABLE)}.")


def _read_table(path: Path) -> pd.DataFrame:
    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            return pd.read_parquet(path)
        if suffix in (".jsonl", ".ndjson"):
            return _read_json_lines(path)
        return _read_delimited(path, "\t" if suffix == ".tsv" else ",")
    except (ValueError, OSError, pd.errors.ParserWarning) as error:
        # ValueError: parser errors of pandas, pyarrow and json, and bytes that are no UTF-8.
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> DataError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return DataError(f"{path} could not be read as {path.suffix[1:].upper()}: {reason}. Check the file, or its suffix.")


def _read_delimited(path: Path, separator: str) -> pd.DataFrame:
    if not path.stat().st_size:
        return pd.DataFrame({"": []})
    with warnings.catch_warnings():
        # Rows longer than the header would otherwise lose a cell, or shift every column by one.
        warnings.simplefilter("error", pd.errors.ParserWarning)
        return pd.read_csv(path, sep=separator, dtype=str, keep_default_na=False, index_col=False, encoding="utf-8-sig")


def _read_json_lines(path: Path) -> pd.DataFrame:
    # Line by line: pandas would turn integer labels next to a null into 1.0, and says no line number.
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number}: {error.msg}") from error
        if not isinstance(record, dict):
            raise ValueError(f"line {number} is no JSON object")
        records.append(record)
    return pd.DataFrame(records, dtype=object)


def _as_text(value: Any) -> str:
    """Return a cell as a text, "" where there is no value."""
    if pd.api.types.is_scalar(value) and pd.isna(value):
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def _as_number(value: Any) -> float:
    """Return a cell as a number, NaN where it is none."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return float("nan")


def _as_float32(values: np.ndarray) -> Float32[np.ndarray, "..."]:
    with np.errstate(over="ignore", invalid="ignore"):  # what is too large becomes infinite, and is refused as such
        return values.astype(np.float32)


def _is_list(cell: Any) -> bool:
    return isinstance(cell, (list, tuple, np.ndarray))


def _plain(cell: Any) -> Any:
    """Return a cell of nested arrays, as Parquet gives them, as nested lists."""
    if isinstance(cell, np.ndarray) and cell.dtype != object:
        return cell.tolist()
    return [_plain(part) for part in cell] if _is_list(cell) else cell


def _short(cell: Any, most: int = 40) -> str:
    shown = repr("" if cell is None else _plain(cell))
    return shown if len(shown) <= most else f"{shown[:most]}..."


def _refuse_one_class(labels: Sequence[str], where: str) -> None:
    if len(set(labels)) == 1:
        raise DataError(f"{where} holds the one class {labels[0]!r}: give examples of at least two classes.")


def _refuse_empty(empty: Sequence[bool], where: str, way_out: str, word: str = "data row") -> None:
    if any(empty):
        raise DataError(f"{where} is empty in {_rows(empty, word)}: {way_out}.")


def _rows(wrong: Sequence[bool] | np.ndarray, word: str = "data row") -> str:
    """Return the rows that are wrong, counted from 1, for a message."""
    found = [str(row) for row, here in enumerate(wrong, start=1) if here]
    more = f" and {len(found) - 5} more" if len(found) > 5 else ""
    return f"{word}{'s' if len(found) > 1 else ''} {', '.join(found[:5])}{more}"
