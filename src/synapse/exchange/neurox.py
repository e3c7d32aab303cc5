"""The activation files of NeuroX, read in: for whoever has these and labels, and no model any more.

Two kinds are written, and both are read; a sentence's states are (layer, token, unit).

- `.json`: a JSON object a line and sentence; its `features` are a list of `token` and `layers`, and these a list of
  `index` and `values`, rounded to 8 decimals.
- `.hdf5`: a data set a sentence, named by its index; and `sentence_to_index`, the indices by the sentences' texts, as
  JSON.

What is not in them: logits, so that only what needs none can be done; and [CLS], as NeuroX takes special tokens out.

*Source*: NeuroX 1.0.9, `neurox.data.writer` and `neurox.data.extraction.transformers_extractor`.
"""

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float32

from synapse.data.examples import Examples
from synapse.errors import DataError, SettingsError, near
from synapse.exchange.files import optional
from synapse.types import Activations

Rows = Literal["every", "first", "last", "mean"]
"""What is an example: `every` token; or a sentence, of which the `first` token, the `last`, or the `mean` is taken."""

_REPEATED = re.compile(r" \(Occurrence \d+\)$")
"""What the HDF5 writer adds to a text that was there before."""


def read_neurox(
    path: str | os.PathLike[str],
    labels: str | os.PathLike[str] | Sequence[str] | Sequence[Sequence[str]],
    *,
    rows: Rows = "every",
    layers: Sequence[int] | None = None,
    classes: Sequence[str] | None = None,
) -> Activations:
    """Return what NeuroX has extracted, with its labels, as activations.

    `labels` is a file of labels as NeuroX reads it, a line a sentence, or the lines themselves. With `rows="every"`
    each token is an example, and a line holds a label a token, with blanks between or as a sequence. Otherwise each
    sentence is an example, and a line is its label.

    `layers` are those to take, in the file's own count. NeuroX writes the embeddings as its layer 0, so by default all
    but this one are taken and layer 0 becomes the first block's output (a file of one layer is taken whole). Give
    `layers=range(n)` for files that NeuroX was told to write without embeddings, or of some layers only. `classes` are
    the class names in the order that `targets` count, by default those that occur, sorted; give them where train and
    test are read apart.

    The logits are not known: None.

    Raises:
        DataError: a file is missing, damaged, cut off or of another kind; a sentence is missing, has no tokens, another
            number of labels than of tokens, or another shape than the first; or a value is not finite.
        LabelError: a label is none of `classes`.
        SettingsError: an unknown choice of rows, a layer that is not there, or an HDF5 file without h5py.
    """
    if rows not in get_args(Rows):
        known = ", ".join(get_args(Rows))
        raise SettingsError(f"There is no choice of rows {rows!r}; there are {known}.{near(rows, get_args(Rows))}")
    path = Path(path)
    lines = _lines(labels, rows)
    texts: list[str] = []
    states: list[np.ndarray] = []
    for sentence in _sentences(path):
        where = f"Sentence {len(texts) + 1} of {path}"
        line = lines[len(texts)] if len(texts) < len(lines) else ()
        _check(sentence, where, line if rows == "every" else None)
        taken = _of_rows(sentence.states[_taken(layers, len(sentence.states), path)], rows)
        if states and taken[:, 0].shape != states[0][:, 0].shape:
            raise DataError(
                f"{where} has {len(taken)} layers of {taken.shape[2]} units and the first has {len(states[0])} of "
                f"{states[0].shape[2]}: extract all with one model."
            )
        texts.append(sentence.text)
        states.append(taken)
    if len(texts) != len(lines) or not texts:
        raise DataError(
            f"{path} has {len(texts)} sentences, and there are {len(lines)} lines of labels: give one line a sentence."
        )
    examples = _examples(texts, lines, rows, path.name)
    names = tuple(sorted(set(examples.labels)) if classes is None else classes)
    return Activations(
        values=np.concatenate(states, axis=1),
        logits=None,
        targets=examples.targets(names),
        labels=names,
        source=examples.fingerprint,
        reads_several_rows=rows == "mean",
    )


@dataclass(frozen=True, eq=False)
class _Sentence:
    """A sentence as it stands in the file."""

    text: str
    states: Float32[np.ndarray, "layer token unit"]


def _sentences(path: Path) -> Iterator[_Sentence]:
    if not path.is_file():
        raise DataError(f"There is no file {path}: give the path of a file that NeuroX wrote.")
    match path.suffix.lower():
        case ".json":
            return _json_sentences(path)
        case ".hdf5":
            return _hdf5_sentences(path)
        case other:
            raise DataError(f"{path} ends in {other!r}: give a file that NeuroX wrote as .json or .hdf5.")


def _json_sentences(path: Path) -> Iterator[_Sentence]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                features = json.loads(line)["features"]
                states = np.array(
                    [[layer["values"] for layer in feature["layers"]] for feature in features], dtype=np.float32
                )
                text = " ".join(feature["token"] for feature in features)
            except (ValueError, KeyError, TypeError) as error:  # no JSON, other names, lists of unequal length
                raise DataError(
                    f"Line {number} of {path} is no sentence as NeuroX writes it ({type(error).__name__}: {error}): "
                    "extract it again."
                ) from error
            # (token, layer, unit) -> (layer, token, unit)
            yield _Sentence(text, states.swapaxes(0, 1) if states.ndim == 3 else np.empty((0, 0, 0), np.float32))


def _hdf5_sentences(path: Path) -> Iterator[_Sentence]:
    h5py = optional("h5py")
    try:
        with h5py.File(path, "r") as file:
            if "sentence_to_index" not in file:
                raise DataError(f"{path} has no `sentence_to_index`, which NeuroX writes at its end: extract it again.")
            texts = {int(index): text for text, index in json.loads(file["sentence_to_index"][0]).items()}
            for index in range(len(texts)):
                if index not in texts or str(index) not in file:
                    raise DataError(
                        f"{path} has {len(texts)} sentences, but none with the index {index}: extract it again."
                    )
                states = np.asarray(file[str(index)], dtype=np.float32)
                if states.ndim != 3:
                    raise DataError(
                        f"Sentence {index + 1} of {path} has the shape {states.shape}; (layer, token, unit) was "
                        "expected: extract it again."
                    )
                yield _Sentence(_REPEATED.sub("", texts[index]), states)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as an HDF5 file of NeuroX: {error}. Extract it again.") from error


def _check(sentence: _Sentence, where: str, labels: Sequence[str] | None) -> None:
    """Refuse a sentence of which no examples can be made; `labels` are those of its tokens, where they have some."""
    n_tokens = sentence.states.shape[1]
    if not sentence.states.size:
        raise DataError(f"{where} has no tokens: leave it out, and its line of labels.")
    if not np.isfinite(sentence.states).all():
        raise DataError(f"{where} has values that are not finite: leave it out, and its line of labels.")
    if labels is not None and len(labels) != n_tokens:
        raise DataError(
            f"{where} has {n_tokens} tokens and {len(labels)} labels: give one a token (NeuroX cuts a sentence that is "
            "longer than the model takes), or choose other `rows`, with one label a sentence."
        )


def _taken(layers: Sequence[int] | None, n_layers: int, path: Path) -> list[int]:
    """Return the file's layers that are taken."""
    if layers is None:
        return list(range(1, n_layers)) or [0]
    missing = [layer for layer in layers if not 0 <= layer < n_layers]
    if missing or not layers:
        raise SettingsError(
            f"{path} has the layers 0 to {n_layers - 1}, but {missing or 'none'} was asked for: give some of these."
        )
    return list(layers)


def _of_rows(states: Float32[np.ndarray, "layer token unit"], rows: Rows) -> Float32[np.ndarray, "layer example unit"]:
    match rows:
        case "every":
            return states
        case "first":
            return states[:, :1]
        case "last":
            return states[:, -1:]
        case "mean":
            return np.asarray(states.mean(axis=1, keepdims=True))


def _lines(labels: Any, rows: Rows) -> list[tuple[str, ...]]:
    """Return the labels of every sentence: one of each token, or its own alone."""
    if isinstance(labels, (str, os.PathLike)):
        path = Path(labels)
        if not path.is_file():
            raise DataError(f"There is no file {path}: give the path of a file of labels, or the labels themselves.")
        labels = path.read_text(encoding="utf-8").splitlines()
    if rows == "every":
        return [tuple(line.split() if isinstance(line, str) else line) for line in labels]
    several = [number for number, line in enumerate(labels, start=1) if not isinstance(line, str) or not line.strip()]
    if several:
        raise DataError(
            f"The label of sentence {several[0]} is {labels[several[0] - 1]!r}; with rows={rows!r} each sentence has "
            "one label, a text that is not empty: give that, or rows='every' with one label a token."
        )
    return [(line.strip(),) for line in labels]


def _examples(texts: Sequence[str], lines: Sequence[tuple[str, ...]], rows: Rows, name: str) -> Examples:
    """Return what was recorded as examples: their fingerprint tells two splits apart."""
    labels = tuple(label for line in lines for label in line)
    if rows != "every":
        return Examples(tuple(texts), labels, name)
    places = tuple((text, str(place)) for text, line in zip(texts, lines, strict=True) for place, _ in enumerate(line))
    return Examples(places, labels, name)
