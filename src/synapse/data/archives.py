"""Archives of arrays: one array of inputs and one of labels."""

import zipfile
from typing import Any

import numpy as np

from synapse.data.columns import WrongRows, as_float32, refuse_empty, refuse_one_class
from synapse.data.examples import Examples, quoted
from synapse.data.sources import Source
from synapse.data.tables import unreadable
from synapse.errors import DataError, near


def read_arrays(source: Source, inputs_name: str, label_name: str) -> Examples:
    """Return the examples of an NPZ file; the arrays that are named are read whole.

    Raises:
        DataError: no readable file, no such array, or one that does not hold inputs or labels.
    """
    path = source.path
    try:
        with source.opened(source.files[0]) as stream, _archive(stream) as archive:
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
        raise unreadable(path, source.suffix, error) from error
    inputs, classes = arrays
    where = f"Array {inputs_name!r} of {path}"
    if inputs.dtype.kind not in "biuf" or inputs.ndim < 2 or not inputs.size:
        raise DataError(
            f"{where} has dtype {inputs.dtype} and shape {inputs.shape}: give numbers of two axes or more, "
            "example first."
        )
    if inputs.dtype.kind == "f":
        inputs = as_float32(inputs)
        wrong = WrongRows("example")
        wrong.note((~np.isfinite(inputs)).reshape(len(inputs), -1).any(axis=1).tolist())
        if wrong:
            raise DataError(f"{where} holds a number that is not finite in {wrong}: correct or remove these examples.")
    where = f"Array {label_name!r} of {path}"
    if classes.dtype.kind not in "biuU" or classes.ndim != 1:
        raise DataError(
            f"{where} has dtype {classes.dtype} and shape {classes.shape}: give one text or integer for each example."
        )
    labels = tuple(str(value) for value in classes.tolist())
    empty = WrongRows("example")
    empty.note(not name.strip() for name in labels)
    refuse_empty(empty, where, "label or remove these examples")
    refuse_one_class(labels, where)
    return Examples(inputs, labels, source.name)


def _archive(stream: Any) -> Any:
    if not zipfile.is_zipfile(stream):
        raise ValueError("it is no archive of arrays")
    stream.seek(0)
    return np.load(stream, allow_pickle=False)
