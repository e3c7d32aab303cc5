"""Images and sounds: from a file to numbers, with a named error where the file is not what it should be."""

import struct
import warnings
from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image
from scipy.io import wavfile

from synapse.errors import DataError

SOUNDS = (".wav",)
"""The suffixes of sounds; every other file is taken for an image."""


def is_sound(path: Path) -> bool:
    """Return whether the file is a sound, by its suffix."""
    return path.suffix.lower() in SOUNDS


def read_image(path: Path) -> Image.Image:
    """Return the image of a file, in the mode it is stored in (the first frame, if there are several).

    Raises:
        DataError: the file cannot be read as an image.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on metadata and size; the pixels are there all the same
            with Image.open(path) as image:
                image.load()
                return image
    # SyntaxError and struct.error: what the library makes of some broken headers.
    except (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError) as error:
        raise _unreadable(path, "an image", error) from error


def read_sound(path: Path) -> tuple[Float[np.ndarray, "sample"], int]:
    """Return the samples of a wav file as float32 in [-1, 1], the mean of its channels, and its samples a second.

    Raises:
        DataError: the file cannot be read as a wav file, or has no samples.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", wavfile.WavFileWarning)  # chunks of metadata that are skipped
            rate, samples = wavfile.read(path)
        if not samples.size or rate < 1:
            raise ValueError("it has no samples")
    except (OSError, ValueError, EOFError, struct.error) as error:
        raise _unreadable(path, "a wav sound", error) from error
    except UnboundLocalError as error:  # what scipy makes of a file that ends before its samples
        raise _unreadable(path, "a wav sound", ValueError("it ends before its samples")) from error
    if samples.dtype == np.uint8:  # eight bits are stored without a sign, silence at 128
        samples = (samples.astype(np.float32) - 128.0) / 128.0
    elif samples.dtype.kind == "i":
        samples = samples / -float(np.iinfo(samples.dtype).min)
    if not np.isfinite(samples).all():
        raise _unreadable(path, "a wav sound", ValueError("some samples are no numbers"))
    channels = samples.reshape(len(samples), -1)
    return channels.mean(axis=1, dtype=np.float64).astype(np.float32), int(rate)


def _unreadable(path: Path, what: str, error: Exception) -> DataError:
    reason = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
    return DataError(
        f"{path} could not be read as {what}: {reason}. "
        f"Replace the file or remove its row; sounds end in {', '.join(SOUNDS)}."
    )
