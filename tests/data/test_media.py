import numpy as np
import pytest
from PIL import Image
from scipy.io import wavfile

from synapse.data.media import read_image, read_sound
from synapse.errors import DataError


@pytest.mark.parametrize(
    ("mode", "dtype", "shape"), [("L", np.uint8, (4, 6)), ("RGB", np.uint8, (4, 6, 3)), ("I;16", np.uint16, (4, 6))]
)
def test_an_image_comes_back_as_it_is_stored(tmp_path, mode, dtype, shape):
    pixels = np.random.default_rng(0).integers(0, 250, size=shape).astype(dtype)
    Image.fromarray(pixels).save(tmp_path / "a.png")

    image = read_image(tmp_path / "a.png")

    assert image.mode == mode
    np.testing.assert_array_equal(np.asarray(image), pixels)


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        (np.array([0, 16384, -32768], dtype=np.int16), [0.0, 0.5, -1.0]),
        (np.array([0, 2**30, -(2**31)], dtype=np.int32), [0.0, 0.5, -1.0]),
        (np.array([128, 192, 0], dtype=np.uint8), [0.0, 0.5, -1.0]),
        (np.array([0.0, 0.5, -1.0], dtype=np.float32), [0.0, 0.5, -1.0]),
        (np.array([[0.5, -0.5], [1.0, 0.0]], dtype=np.float32), [0.0, 0.5]),  # two channels
    ],
    ids=["16 bits", "32 bits", "8 bits", "float", "stereo"],
)
def test_sounds_of_all_formats_lie_between_minus_one_and_one(tmp_path, samples, expected):
    wavfile.write(tmp_path / "a.wav", 8000, samples)

    found, rate = read_sound(tmp_path / "a.wav")

    assert (found.dtype, rate) == (np.float32, 8000)
    np.testing.assert_array_equal(found, np.array(expected, dtype=np.float32))


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n" + bytes(20)])
def test_a_broken_image_is_told_by_its_name(tmp_path, content):
    path = tmp_path / "a.png"
    path.write_bytes(content)

    with pytest.raises(DataError) as caught:
        read_image(path)

    assert str(caught.value).startswith(f"{path} could not be read as an image: ")
    assert str(caught.value).endswith(". Replace the file or remove its row; sounds end in .wav.")


@pytest.mark.parametrize(
    "content", [b"", b"no sound", b"RIFF", b"RIFF\x24\0\0\0WAVEfmt \x10\0\0\0", b"RIFF\x04\0\0\0WAVE"]
)
def test_a_broken_sound_is_told_by_its_name(tmp_path, content):
    path = tmp_path / "a.wav"
    path.write_bytes(content)

    with pytest.raises(DataError) as caught:
        read_sound(path)

    assert str(caught.value).startswith(f"{path} could not be read as a wav sound: ")


@pytest.mark.parametrize(
    ("samples", "reason"),
    [
        (np.zeros(0, dtype=np.int16), "it has no samples"),
        (np.array([np.nan], np.float32), "some samples are no numbers"),
    ],
)
def test_a_sound_without_samples_is_refused(tmp_path, samples, reason):
    wavfile.write(tmp_path / "a.wav", 8000, samples)

    with pytest.raises(DataError) as caught:
        read_sound(tmp_path / "a.wav")

    assert str(caught.value) == (
        f"{tmp_path / 'a.wav'} could not be read as a wav sound: {reason}. "
        "Replace the file or remove its row; sounds end in .wav."
    )
