"""Where inputs lie in a space of few dimensions in which near means alike, found without the model."""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image
from scipy.signal import welch
from scipy.sparse import csr_matrix
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.preprocessing import normalize
from sklearn.utils.extmath import randomized_svd

from synapse.data.examples import Examples
from synapse.data.inputs import KIND_WORDS
from synapse.data.media import is_sound, read_image, read_sound
from synapse.errors import DataError

_DIMENSIONS = 32

_HASHES = 2**14

_VALUES = 4096
"""Numbers of one array that are looked at, at most."""

_SIDE = 16
"""Points along either side of an image's thumbnail."""

_PARTS = 4
_BANDS = np.geomspace(60.0, 4000.0, 11)
"""A sound is cut into parts of equal length, and its energy summed between these frequencies (Hz) in each.

What lies higher is not in every recording."""


def input_places(
    train: Examples, test: Examples, *, seed: int
) -> tuple[Float[np.ndarray, "train place"], Float[np.ndarray, "test place"]]:
    """Return the places of the train and of the test inputs, in at most 32 dimensions set by the train inputs.

    Texts enter as hashed bags of words (of character trigrams where texts are not made of words, such as DNA or
    URLs), pairs as their texts together, token ids as bags of ids. Arrays enter as flattened values in units of
    their deviation, large ones averaged over neighbours before. Files enter as grey thumbnails of the images, or as
    the logarithms of the sounds' energies in a few bands of frequency and parts of time.

    Raises:
        DataError: train and test are not of one kind and shape, or a file cannot be read.
    """
    if train.kind != test.kind:
        raise DataError(
            f"Of {train.name} and {test.name}, one holds {KIND_WORDS[train.kind]} and one {KIND_WORDS[test.kind]}: "
            "give one kind."
        )
    if train.kind in ("text", "pair", "ids"):
        features_train, features_test = _bags(train, test)
    elif train.kind == "file":
        features_train, features_test = _coarse_files(train, test)
    else:
        features_train, features_test = _standardised(*_coarse_arrays(train, test))
    if features_train.shape[1] > _DIMENSIONS:
        _, _, axes = randomized_svd(features_train, _DIMENSIONS, random_state=seed)
        features_train, features_test = features_train @ axes.T, features_test @ axes.T
    if train.kind in ("text", "pair", "ids"):
        # Texts of different length on one subject point the same way.
        features_train, features_test = normalize(features_train), normalize(features_test)
    return features_train, features_test


def _bags(train: Examples, test: Examples) -> tuple[csr_matrix, csr_matrix]:
    if train.kind == "ids":
        bag = HashingVectorizer(analyzer=_id_words, n_features=_HASHES, alternate_sign=False)
        return bag.transform(train.inputs), bag.transform(test.inputs)
    texts, others = (
        ["\n".join(item) if part.kind == "pair" else item for item in part.inputs] for part in (train, test)
    )
    in_words = np.median([len(text.split()) for text in texts]) >= 3
    analyzer, ngrams = ("word", (1, 1)) if in_words else ("char", (3, 3))
    bag = HashingVectorizer(analyzer=analyzer, ngram_range=ngrams, n_features=_HASHES, alternate_sign=False)
    return bag.transform(texts), bag.transform(others)


def _id_words(ids: Any) -> list[str]:
    return [str(i) for i in ids]


def _coarse_files(
    train: Examples, test: Examples
) -> tuple[Float[np.ndarray, "train value"], Float[np.ndarray, "test value"]]:
    found = {is_sound(path) for part in (train, test) for path in part.inputs}
    if len(found) > 1:
        raise DataError(f"{train.name} and {test.name} hold images as well as sounds: give files of one kind.")
    coarse = _energies if found == {True} else _thumbnail
    known, new = (np.array([coarse(path) for path in part.inputs]) for part in (train, test))
    # One unit for all values: in units of its own deviation, a silent band would count as much as any other.
    mean = known.mean(axis=0)
    return known - mean, new - mean


def _thumbnail(path: Path) -> Float[np.ndarray, "value"]:
    image = read_image(path)
    # Modes I and F hold more than 8 bits, which a conversion to L would cut off at white.
    grey = image if image.mode.startswith(("I", "F")) else image.convert("RGB").convert("L")
    small = grey.convert("F").resize((_SIDE, _SIDE), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float64).ravel()


def _energies(path: Path) -> Float[np.ndarray, "value"]:
    samples, rate = read_sound(path)
    samples = np.pad(samples, (0, max(0, _PARTS * 256 - len(samples))))
    energies = []
    for part in np.array_split(samples.astype(np.float64), _PARTS):
        frequencies, densities = welch(part, fs=rate, nperseg=min(1024, len(part)))
        band = np.digitize(frequencies, _BANDS)  # 0 lies below the first band, and the last one above all
        energies.append(np.bincount(band, weights=densities, minlength=len(_BANDS) + 1)[1:-1] * frequencies[1])
    # In powers of ten, as loudness is heard; the floor stands for silence.
    return np.asarray(np.log10(np.concatenate(energies) + 1e-8))


def _coarse_arrays(
    train: Examples, test: Examples
) -> tuple[Float[np.ndarray, "train value"], Float[np.ndarray, "test value"]]:
    known, new = _shape(train), _shape(test)
    if known != new:
        raise DataError(f"{train.name} has inputs of shape {known}, {test.name} of {new}: give examples of one shape.")
    train_values, test_values = (np.array([_averaged(item) for item in part.inputs]) for part in (train, test))
    return train_values, test_values


def _shape(examples: Examples) -> tuple[int, ...]:
    shapes: list[tuple[int, ...]] = list(dict.fromkeys(np.shape(item) for item in examples.inputs))
    if len(shapes) != 1:
        raise DataError(
            f"{examples.name} has inputs of {len(shapes)} shapes, such as {' and '.join(str(s) for s in shapes[:2])}: "
            "give examples of one shape."
        )
    return shapes[0]


def _averaged(item: Any) -> Float[np.ndarray, "value"]:
    """Return the values of one array, neighbours averaged along the longest axis until there are few enough."""
    array = np.asarray(item, dtype=np.float64)
    while array.size > _VALUES:
        axis = int(np.argmax(array.shape))
        array = np.moveaxis(array, axis, 0)
        half = len(array) // 2
        array = np.moveaxis((array[: 2 * half : 2] + array[1 : 2 * half : 2]) / 2.0, 0, axis)
    return array.ravel()


def _standardised(
    known: Float[np.ndarray, "train value"], new: Float[np.ndarray, "test value"]
) -> tuple[Float[np.ndarray, "train value"], Float[np.ndarray, "test value"]]:
    # A value that is constant in train says nothing of the type: an infinite scale takes it to 0.
    mean, scale = known.mean(axis=0), np.where(np.ptp(known, axis=0) > 0.0, known.std(axis=0), np.inf)
    return (known - mean) / scale, (new - mean) / scale
