"""Labelled examples: read from a file, checked, matched to a classifier's labels, split and sampled."""

import hashlib
import json
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Int
from numpy.typing import ArrayLike

from synapse.errors import DataError, LabelError, SettingsError, near

READABLE = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
"""The suffixes that `read_examples` knows."""


@dataclass(frozen=True, eq=False)
class Examples:
    """Inputs with a label each, as they stand in the file: nothing is tokenised or encoded.

    `inputs` are texts, or an array whose first axis runs over the examples.
    """

    inputs: Sequence[str] | np.ndarray
    labels: tuple[str, ...]
    name: str

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.labels):
            raise DataError(
                f"{self.name} has {len(self.inputs)} inputs but {len(self.labels)} labels: "
                "give one label for each input."
            )

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: ArrayLike) -> "Examples":
        """Return the examples at `indices`, in that order, under the same name."""
        rows = np.asarray(indices, dtype=np.int64)
        labels = tuple(self.labels[i] for i in rows)
        if isinstance(self.inputs, np.ndarray):
            return Examples(self.inputs[rows], labels, self.name)
        return Examples(tuple(self.inputs[i] for i in rows), labels, self.name)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of inputs and labels in their order; the name does not enter."""
        digest = hashlib.sha256()
        if isinstance(self.inputs, np.ndarray):
            digest.update(f"{self.inputs.dtype.str}{self.inputs.shape}".encode())
        for part in (*_input_bytes(self.inputs), *_input_bytes(self.labels)):
            # The length in front keeps ("ab", "c") apart from ("a", "bc").
            digest.update(len(part).to_bytes(8, "little") + part)
        return digest.hexdigest()

    def targets(self, labels: tuple[str, ...]) -> Int[np.ndarray, "example"]:
        """Return each example's position in the classifier's `labels`, as int64.

        The names must agree exactly; failing that up to case; failing that the examples' labels may be the
        ids `"0"` to `"C-1"`, unless a class is named by a number.

        Raises:
            LabelError: some label of the examples is none of the classifier's.
        """
        position = _label_positions(tuple(dict.fromkeys(self.labels)), labels)
        if position is None:
            raise LabelError(_unmatched(self, labels))
        return np.array([position[label] for label in self.labels], dtype=np.int64)


def read_examples(path: str | Path, *, text: str | None = "text", label: str | None = "label") -> Examples:
    """Return the labelled texts of a CSV, TSV, JSONL (one object a line) or Parquet file, in file order.

    `text` and `label` name the columns; None stands for the default name. Nothing is taken for a missing
    value but an empty cell: a text `NA` stays a text.

    Raises:
        DataError: no such file, unknown suffix, unreadable content, no such column, an empty text, a missing
            label, or fewer than two classes.
    """
    path = Path(path)
    table = _read_table(path)
    texts = _column(table, text or "text", "text", path)
    labels = _column(table, label or "label", "label", path)
    if not len(table):
        raise DataError(f"{path} has no rows: give a file with at least one example of each of two classes.")
    _refuse_empty(texts, f"Column {text or 'text'!r} of {path} is empty", "fill in or remove these rows")
    _refuse_empty(labels, f"Column {label or 'label'!r} of {path} is empty", "label or remove these rows")
    if len(set(labels)) == 1:
        raise DataError(
            f"Column {label or 'label'!r} of {path} holds the one class {labels[0]!r}: "
            "give examples of at least two classes."
        )
    return Examples(tuple(texts), tuple(labels), path.name)


def shared_inputs(a: Examples, b: Examples) -> int:
    """Return how many inputs of `b` occur in `a` too (a repeated input of `b` counts each time)."""
    if isinstance(a.inputs, np.ndarray) != isinstance(b.inputs, np.ndarray):
        return 0
    known = set(_input_bytes(a.inputs))
    return sum(part in known for part in _input_bytes(b.inputs))


def split_examples(examples: Examples, *, test_share: float = 0.25, seed: int = 0) -> tuple[Examples, Examples]:
    """Return a train and a test part with nearly equal class shares, each in file order.

    Every class has at least one example in either part.

    Raises:
        DataError: a class has a single example.
        SettingsError: `test_share` is not between 0 and 1.
    """
    if not 0.0 < test_share < 1.0:
        raise SettingsError(f"test_share is {test_share}: give a share between 0 and 1, for example 0.25.")
    names, classes, counts = np.unique(examples.labels, return_inverse=True, return_counts=True)
    lonely = [str(name) for name in names[counts < 2]]
    if lonely:
        raise DataError(
            f"{examples.name} cannot be split: {_list(lonely)} occurs once only, but each class needs at "
            "least 2 examples. Add examples, or remove the class."
        )
    n_test = round(test_share * len(examples))
    n_test = int(np.clip(n_test, len(names), len(examples) - len(names)))
    rows = _draw(classes, _allocate(counts, n_test, capacity=counts - 1), seed)
    test = np.isin(np.arange(len(examples)), rows)
    train_part, test_part = examples.take(np.flatnonzero(~test)), examples.take(np.flatnonzero(test))
    return (
        Examples(train_part.inputs, train_part.labels, f"{examples.name}, train part"),
        Examples(test_part.inputs, test_part.labels, f"{examples.name}, test part"),
    )


def sample_examples(targets: Int[np.ndarray, "example"], n: int, *, seed: int = 0) -> Int[np.ndarray, "sample"]:
    """Return `n` distinct indices into `targets`, sorted, with the class shares of the whole.

    Class sizes are the proportional ones, rounded by largest remainder; every class that occurs keeps at
    least one example where `n` allows it. All indices come back if there are no more than `n`.

    Raises:
        SettingsError: `n` is below 1.
    """
    if n < 1:
        raise SettingsError(f"A sample of {n} examples was asked for: ask for at least 1.")
    if n >= len(targets):
        return np.arange(len(targets))
    _, classes, counts = np.unique(targets, return_inverse=True, return_counts=True)
    return _draw(classes, _allocate(counts, n, capacity=counts), seed)


def _allocate(counts: Int[np.ndarray, "class"], n: int, capacity: Int[np.ndarray, "class"]) -> Int[np.ndarray, "class"]:
    """Return the classes' shares of `n`: each at least 1 if `n` suffices, and at most its `capacity`."""
    quota = n * counts / counts.sum()
    least = 1 if n >= len(counts) else 0
    taken: Int[np.ndarray, "class"] = np.clip(np.floor(quota).astype(np.int64), least, capacity)
    while taken.sum() < n:
        taken[np.argmax(np.where(taken < capacity, quota - taken, -np.inf))] += 1
    while taken.sum() > n:
        taken[np.argmax(np.where(taken > least, taken - quota, -np.inf))] -= 1
    return taken


def _draw(classes: Int[np.ndarray, "example"], sizes: Int[np.ndarray, "class"], seed: int) -> Int[np.ndarray, "sample"]:
    random = np.random.default_rng(seed)
    drawn = [random.permutation(np.flatnonzero(classes == c))[:size] for c, size in enumerate(sizes)]
    return np.sort(np.concatenate(drawn))


def _input_bytes(inputs: Sequence[str] | np.ndarray) -> Iterable[bytes]:
    if isinstance(inputs, np.ndarray):
        return (np.ascontiguousarray(row).tobytes() for row in inputs)
    # Texts cut inside an emoji hold half a surrogate pair, which strict UTF-8 refuses.
    return (text.encode("utf-8", "surrogatepass") for text in inputs)


def _label_positions(found: tuple[str, ...], known: tuple[str, ...]) -> dict[str, int] | None:
    """Return the position in `known` of every label in `found`, or None if they do not match."""
    exact = {name: i for i, name in enumerate(known)}
    if all(name in exact for name in found):
        return exact
    folded = {name.casefold(): i for i, name in enumerate(known)}
    if len(folded) == len(known) and all(name.casefold() in folded for name in found):
        return {name: folded[name.casefold()] for name in found}
    ids = {str(i): i for i in range(len(known))}
    if all(name in ids for name in found) and not any(name.isdecimal() for name in known):
        return ids
    return None


def _unmatched(examples: Examples, known: tuple[str, ...]) -> str:
    """Return the message for labels of `examples` that are none of `known`."""
    wrong = [name for name in dict.fromkeys(examples.labels) if name not in known]
    seen = f"{examples.name} has labels that the classifier does not know: {_list(wrong)}."
    if all(name == f"LABEL_{i}" for i, name in enumerate(known)):
        return (
            f"{seen} The classifier's own names are generic ({_list(known)}): "
            f"pass the {len(known)} class names in the order of the logits with `--labels`."
        )
    return (
        f"{seen} It knows {_list(known)}.{near(wrong[0], known)} Correct the file, "
        "or pass the class names in the order of the logits with `--labels`."
    )


def _list(names: Sequence[str], most: int = 8) -> str:
    shown = ", ".join(repr(name) for name in names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


def _read_table(path: Path) -> pd.DataFrame:
    if not path.exists():
        neighbours = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"There is no file {path}.{near(path.name, neighbours)} Give the path of a data file.")
    if path.is_dir():
        raise DataError(f"{path} is a folder: give the path of a data file ({', '.join(READABLE)}).")
    suffix = path.suffix.lower()
    if suffix not in READABLE:
        raise DataError(f"{path} ends in {suffix!r}: give a file that ends in {', '.join(READABLE)}.")
    try:
        if suffix == ".parquet":
            return pd.read_parquet(path)
        if suffix in (".jsonl", ".ndjson"):
            return _read_json_lines(path)
        return _read_delimited(path, "\t" if suffix == ".tsv" else ",")
    except (ValueError, OSError, pd.errors.ParserWarning) as error:
        # ValueError: parser errors of pandas, pyarrow and json, and bytes that are no UTF-8.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"{path} could not be read as {suffix[1:].upper()}: {reason}. Check the file, or its suffix."
        ) from error


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


def _column(table: pd.DataFrame, name: str, option: str, path: Path) -> list[str]:
    """Return a column as texts, with "" where there is no value."""
    columns = [str(column) for column in table.columns if str(column)]
    if name not in columns:
        if not columns:
            raise DataError(f"{path} is empty: give a file with a text and a label column.")
        raise DataError(
            f"{path} has no column {name!r}, only {_list(columns)}.{near(name, columns)} "
            f"Name the {option} column with `{option}`."
        )
    return [_as_text(value) for value in table[name].tolist()]


def _as_text(value: Any) -> str:
    if pd.api.types.is_scalar(value) and pd.isna(value):
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def _refuse_empty(values: Sequence[str], seen: str, way_out: str) -> None:
    empty = [row for row, value in enumerate(values, start=1) if not value.strip()]
    if empty:
        rows = ", ".join(str(row) for row in empty[:5])
        more = f" and {len(empty) - 5} more" if len(empty) > 5 else ""
        raise DataError(f"{seen} in data row{'s' if len(empty) > 1 else ''} {rows}{more}: {way_out}.")
