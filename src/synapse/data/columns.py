"""The columns of a table that make the examples: which they are, what one cell of each may hold, and what is refused.

Cells come in pieces. What is wrong in a few rows (an empty text, a missing file) is noted, and told with its rows when
all are known; what cannot be read at all is told at once.
"""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pandas as pd
from jaxtyping import Float32

from synapse.data.examples import quoted
from synapse.data.tables import Piece
from synapse.errors import DataError, SettingsError, near

_LARGEST_ID = 2**31 - 1

Option = Literal["text", "file", "signal", "ids"]
"""Which argument of `read_examples` names the inputs."""


class Columns:
    """The columns of inputs and labels in one data set.

    `path` is the data set in messages, `folder` where paths in a column start (None: not on this machine). `named`
    holds the names of the columns, `text`, `pair`, `file`, `signal` and `ids`, as the caller gave them.
    """

    def __init__(self, path: str, folder: Path | None, label: str, option: Option | None, **named: str | None) -> None:
        self.path, self.folder = path, folder
        self.labels = Texts(path, label, "label or remove these rows")
        self._option, self._named = option, named
        self._chosen: list[str] = []
        self._inputs: Inputs | None = None

    @property
    def inputs(self) -> "Inputs":
        """What reads the inputs; known when the columns are."""
        assert self._inputs is not None
        return self._inputs

    def choose(self, where: str, names: Sequence[str]) -> list[str]:
        """Return the columns to read of those that are there; `where` is the file in messages.

        Raises:
            DataError: a column that was named is not there, is named twice, or comes in a part of the rows only.
            SettingsError: the columns of a signal are named by nothing.
        """
        label, names = self.labels.column, [name for name in names if name]
        found = self._find(where, names)
        _there(where, names, label, "label")
        if len({*found, label}) <= len(found):
            raise DataError(
                f"Of {where}, the column {label!r} was named as label and {quoted(found)} as input: "
                "name another column for each."
            )
        if self._inputs is None:
            self._chosen, self._inputs = found, self._reader(found)
        elif set(found) != set(self._chosen):
            raise DataError(
                f"{where} has the columns {quoted(found)} for `signal`, and earlier rows have {quoted(self._chosen)}: "
                "give all rows the same columns, or name those that all have."
            )
        return [*self._chosen, label]

    def _find(self, where: str, names: Sequence[str]) -> list[str]:
        match self._option:
            case "file" | "ids":
                return [_there(where, names, self._named[self._option] or "", self._option)]
            case "signal":
                return _signal_columns(where, names, self._named["signal"] or "", self.labels.column)
            case _:
                columns = [_there(where, names, self._named["text"] or "text", "text")]
                if self._named["pair"]:
                    columns.append(_there(where, names, self._named["pair"], "pair"))
                return columns

    def _reader(self, columns: Sequence[str]) -> "Inputs":
        match self._option:
            case "file":
                return _Files(self.path, columns[0], self.folder)
            case "ids":
                return _Ids(self.path, columns[0])
            case "signal":
                return _Signals(self.path, columns)
            case _:
                return _TextsOrPairs(self.path, columns)


class Inputs(Protocol):
    """Reads the inputs from the pieces of a table."""

    def take(self, piece: Piece) -> Sequence[Any] | np.ndarray:
        """Return the inputs in a piece, and note what is wrong with them."""

    def refuse(self) -> None:
        """Raise a DataError if anything was wrong."""


class WrongRows:
    """Rows in which something is wrong, counted from 1 over all pieces; as text, the first five and how many more."""

    def __init__(self, word: str = "data row") -> None:
        self._word = word
        self._first: list[int] = []
        self._n_wrong = self._n_seen = 0

    def note(self, wrong: Iterable[bool]) -> None:
        """Take in the next rows."""
        for here in wrong:
            self._n_seen += 1
            if here:
                self._n_wrong += 1
                if len(self._first) < 5:
                    self._first.append(self._n_seen)

    def __bool__(self) -> bool:
        return self._n_wrong > 0

    def __str__(self) -> str:
        more = f" and {self._n_wrong - 5} more" if self._n_wrong > 5 else ""
        return f"{self._word}{'s' if self._n_wrong > 1 else ''} {', '.join(map(str, self._first))}{more}"


class Texts:
    """A column of texts, none of which may be empty."""

    def __init__(self, path: str, column: str, way_out: str = "fill in or remove these rows") -> None:
        self.column = column
        self.where = f"Column {column!r} of {path}"
        self._way_out = way_out
        self._empty = WrongRows()

    def take(self, piece: Piece) -> list[str]:
        """Return the texts in a piece."""
        texts = [as_text(value) for value in piece[self.column]]
        self._empty.note(not text.strip() for text in texts)
        return texts

    def refuse(self) -> None:
        """Raise a DataError if a text was empty."""
        refuse_empty(self._empty, self.where, self._way_out)


class _TextsOrPairs:
    """One column of texts, or two whose texts are paired."""

    def __init__(self, path: str, columns: Sequence[str]) -> None:
        self._columns = [Texts(path, column) for column in columns]

    def take(self, piece: Piece) -> Sequence[Any]:
        texts = [column.take(piece) for column in self._columns]
        return texts[0] if len(texts) == 1 else list(zip(*texts, strict=True))

    def refuse(self) -> None:
        for column in self._columns:
            column.refuse()


class _Files:
    """A column of paths, of files that are there."""

    def __init__(self, path: str, column: str, folder: Path | None) -> None:
        if folder is None:
            raise DataError(
                f"{path} is not on this machine, and column {column!r} was named as paths of files: copy the files and "
                "the data file into a folder here."
            )
        self._names = Texts(path, column)
        self._folder = folder
        self._missing = WrongRows()
        self._first_missing: Path | None = None

    def take(self, piece: Piece) -> list[Path]:
        paths = [self._folder / name.strip() for name in self._names.take(piece)]
        there = [path.is_file() for path in paths]
        self._missing.note(not here for here in there)
        if self._first_missing is None and not all(there):
            self._first_missing = paths[there.index(False)]
        return paths

    def refuse(self) -> None:
        self._names.refuse()
        if self._missing:
            raise DataError(
                f"{self._names.where} names a file that is not there in {self._missing}: there is no "
                f"{self._first_missing}. Correct the paths, which start from the folder of the data file, or remove "
                "these rows."
            )


class _Ids:
    """A column of token ids, as texts or as lists."""

    def __init__(self, path: str, column: str) -> None:
        self._column = column
        self._where = f"Column {column!r} of {path}"
        self._empty = WrongRows()
        self._n_rows = 0

    def take(self, piece: Piece) -> list[tuple[int, ...]]:
        rows = []
        for row, cell in enumerate(piece[self._column], start=self._n_rows + 1):
            values = _plain(cell) if _is_list(cell) else as_text(cell).split()
            try:
                rows.append(tuple(_as_id(value) for value in values))
            except ValueError as error:
                raise DataError(
                    f"{self._where} holds {_short(cell)} in data row {row}: give token ids, whole numbers from 0 "
                    f"to {_LARGEST_ID}, separated by blanks or as a list."
                ) from error
        self._empty.note(not ids for ids in rows)
        self._n_rows += len(rows)
        return rows

    def refuse(self) -> None:
        refuse_empty(self._empty, self._where, "fill in or remove these rows")


class _Signals:
    """Columns of numbers, side by side, or one column of lists of numbers of one shape."""

    def __init__(self, path: str, columns: Sequence[str]) -> None:
        self._path, self._columns = path, columns
        self._n_rows = 0
        self._shape: tuple[int, ...] | None = None
        self._lists = False

    def take(self, piece: Piece) -> Float32[np.ndarray, "example ..."]:
        if not self._n_rows:
            self._lists = len(self._columns) == 1 and _is_list(piece[self._columns[0]][0])
        found = self._stacked(piece[self._columns[0]]) if self._lists else self._side_by_side(piece)
        self._n_rows += len(found)
        return found

    def refuse(self) -> None:
        """Nothing is left to refuse: a number that is wrong is told when it comes."""

    def _side_by_side(self, piece: Piece) -> Float32[np.ndarray, "example column"]:
        signals = np.empty((len(piece[self._columns[0]]), len(self._columns)), dtype=np.float32)
        for place, column in enumerate(self._columns):
            cells = piece[column]
            signals[:, place] = as_float32(np.array([_as_number(cell) for cell in cells]))
            wrong = np.flatnonzero(~np.isfinite(signals[:, place]))
            if len(wrong):
                raise DataError(
                    f"Column {column!r} of {self._path} holds {_short(cells[wrong[0]])} in data row "
                    f"{self._n_rows + wrong[0] + 1}: give a finite number, remove the row, or leave the column out of "
                    "`signal`."
                )
        return signals

    def _stacked(self, cells: Sequence[Any]) -> Float32[np.ndarray, "example ..."]:
        arrays: list[np.ndarray] = []
        where = f"Column {self._columns[0]!r} of {self._path}"
        for row, cell in enumerate(cells, start=self._n_rows + 1):
            try:
                array = as_float32(np.asarray(_plain(cell), dtype=np.float64))
            except (ValueError, TypeError):
                array = np.array(np.nan)
            if not array.size or not np.isfinite(array).all():
                raise DataError(
                    f"{where} holds {_short(cell)} in data row {row}: give a list of finite numbers, "
                    "or of lists of equal length, or remove the row."
                )
            self._shape = array.shape if self._shape is None else self._shape
            if array.shape != self._shape:
                raise DataError(
                    f"{where} holds numbers of shape {array.shape} in data row {row}, but of "
                    f"{self._shape} in data row 1: cut or fill them up to one shape."
                )
            arrays.append(array)
        return np.stack(arrays)


def _there(where: str, names: Sequence[str], column: str, option: str) -> str:
    """Return the name of a column that is there."""
    if column not in names:
        _refuse_empty_file(where, names)
        other_kinds = ", or images and sounds with `file`" if option == "text" else ""
        raise DataError(
            f"{where} has no column {column!r}, only {quoted(names)}.{near(column, names)} "
            f"Name the {option} column with `{option}`{other_kinds}."
        )
    return column


def _refuse_empty_file(where: str, names: Sequence[str]) -> None:
    if not names:
        raise DataError(f"{where} is empty: give a file with an input and a label column.")


def _signal_columns(where: str, names: Sequence[str], pattern: str, label: str) -> list[str]:
    """Return the columns that are named, in the order of the file."""
    if pattern in names:
        return [pattern]
    chosen = set()
    for part in filter(None, (part.strip() for part in pattern.split(","))):
        # A name may hold characters that mean something in a pattern.
        found = [part] if part in names else [name for name in names if name != label and fnmatchcase(name, part)]
        if not found:
            _refuse_empty_file(where, names)
            raise DataError(
                f"{where} has no column {part!r}, as a name or a pattern, only {quoted(names)}."
                f"{near(part, names)} Name the columns of numbers with `signal`, as a pattern ('t*') or as "
                "names separated by commas."
            )
        chosen.update(found)
    if not chosen:
        raise SettingsError(f"`signal` is {pattern!r}: give a pattern ('t*') or column names separated by commas.")
    return [name for name in names if name in chosen]


def _as_id(value: Any) -> int:
    if isinstance(value, str) and value.isascii() and value.isdecimal():
        value = int(value)
    if not isinstance(value, Integral) or isinstance(value, bool) or not 0 <= int(value) <= _LARGEST_ID:
        raise ValueError(f"{value!r} is no token id")
    return int(value)


def as_text(value: Any) -> str:
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


def as_float32(values: np.ndarray) -> Float32[np.ndarray, "..."]:
    """Return numbers as float32."""
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


def refuse_one_class(labels: Sequence[str], where: str) -> None:
    """Raise a DataError if all labels are one."""
    if len(set(labels)) == 1:
        raise DataError(f"{where} holds the one class {labels[0]!r}: give examples of at least two classes.")


def refuse_empty(empty: WrongRows, where: str, way_out: str) -> None:
    """Raise a DataError if there are empty rows."""
    if empty:
        raise DataError(f"{where} is empty in {empty}: {way_out}.")
