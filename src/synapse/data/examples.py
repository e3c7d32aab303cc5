"""Labelled examples: one value with its inputs and labels, matched to a classifier's labels, split and sampled."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
from jaxtyping import Int, UInt64
from numpy.typing import ArrayLike

from synapse.data.gathering import InputsOnDisk
from synapse.data.inputs import KIND_WORDS, Kind, identities, kind_of
from synapse.errors import DataError, LabelError, SettingsError, near


@dataclass(frozen=True, eq=False)
class Examples:
    """Inputs with a label each, as they stand in the file: nothing is tokenised or encoded.

    `inputs` are texts, pairs of texts, paths of files, tuples of token ids, or an array whose first axis runs over
    the examples (the kinds of `synapse.data.inputs`). Where there are very many they may lie on disk, and are read when
    they are asked for; what is done with all of them here then reads one after the other.
    """

    inputs: Sequence[Any] | np.ndarray
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
        """Return the examples at `indices`, in that order, under the same name; inputs on disk are read."""
        rows = np.asarray(indices, dtype=np.int64)
        labels = tuple(self.labels[i] for i in rows)
        if isinstance(self.inputs, np.ndarray):
            return Examples(self.inputs[rows], labels, self.name)
        return Examples(tuple(self.inputs[i] for i in rows), labels, self.name)

    @cached_property
    def kind(self) -> Kind:
        """The kind of the inputs; `text` if there are none.

        Raises:
            DataError: an input is of no known kind, or the inputs are of several.
        """
        if isinstance(self.inputs, np.ndarray):
            return "array"
        if isinstance(self.inputs, InputsOnDisk):
            return self.inputs.kind
        kinds = list(dict.fromkeys(kind_of(item) for item in self.inputs)) or ["text"]
        if len(kinds) > 1:
            raise DataError(
                f"{self.name} holds {' and '.join(KIND_WORDS[kind] for kind in kinds)}: give inputs of one kind."
            )
        return kinds[0]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of inputs (files by their content) and labels in their order; the name does not enter."""
        digest = hashlib.sha256()
        for part in chain(identities(self.inputs), identities(self.labels)):
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


def shared_inputs(a: Examples, b: Examples) -> int:
    """Return how many inputs of `b` occur in `a` too (a repeated input of `b` counts each time).

    Files are compared by their content. Inputs are compared by 64 bits of a hash: among two times ten million inputs,
    the chance that two which differ are taken for one is 5e-6.
    """
    return int(np.isin(_digests(b.inputs), _digests(a.inputs)).sum())


def split_examples(examples: Examples, *, test_share: float = 0.25, seed: int = 0) -> tuple[Examples, Examples]:
    """Return a train and a test part with nearly equal class shares, each in file order.

    Every class has at least one example in either part.

    Raises:
        DataError: a class has a single example.
        SettingsError: `test_share` is not between 0 and 1.
    """
    if not 0.0 < test_share < 1.0:
        raise SettingsError(f"test_share is {test_share}: give a share between 0 and 1, for example 0.25.")
    names = sorted(set(examples.labels))
    position = {name: i for i, name in enumerate(names)}
    classes = np.fromiter((position[label] for label in examples.labels), dtype=np.int64, count=len(examples))
    counts = np.bincount(classes)
    lonely = [name for name, count in zip(names, counts, strict=True) if count < 2]
    if lonely:
        raise DataError(
            f"{examples.name} cannot be split: {quoted(lonely)} occurs once only, but each class needs at "
            "least 2 examples. Add examples, or remove the class."
        )
    n_test = round(test_share * len(examples))
    n_test = int(np.clip(n_test, len(names), len(examples) - len(names)))
    rows = _draw(classes, _allocate(counts, n_test, capacity=counts - 1), seed)
    test = np.isin(np.arange(len(examples)), rows)
    return _part(examples, np.flatnonzero(~test), "train"), _part(examples, np.flatnonzero(test), "test")


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


def _part(examples: Examples, rows: Int[np.ndarray, "part"], what: str) -> Examples:
    """Return a part of the examples under a name of its own; inputs on disk stay there."""
    name = f"{examples.name}, {what} part"
    if isinstance(examples.inputs, InputsOnDisk):
        return Examples(examples.inputs.select(rows), tuple(examples.labels[i] for i in rows), name)
    part = examples.take(rows)
    return Examples(part.inputs, part.labels, name)


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


def _digests(inputs: Sequence[Any] | np.ndarray) -> UInt64[np.ndarray, "example"]:
    """Return 8 bytes for every input: the inputs themselves would fill the memory a second time."""
    parts = (hashlib.blake2b(part, digest_size=8).digest() for part in identities(inputs))
    return np.fromiter((int.from_bytes(part, "little") for part in parts), dtype=np.uint64, count=len(inputs))


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
    seen = f"{examples.name} has labels that the classifier does not know: {quoted(wrong)}."
    if all(name == f"LABEL_{i}" for i, name in enumerate(known)):
        return (
            f"{seen} The classifier's own names are generic ({quoted(known)}): "
            f"pass the {len(known)} class names in the order of the logits with `--labels`."
        )
    return (
        f"{seen} It knows {quoted(known)}.{near(wrong[0], known)} Correct the file, "
        "or pass the class names in the order of the logits with `--labels`."
    )


def quoted(names: Sequence[str], most: int = 8) -> str:
    """Return the names in quotation marks for a message, and how many more than `most` there are."""
    shown = ", ".join(repr(name) for name in names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown
