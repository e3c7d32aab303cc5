import hashlib
import json

import pytest

from synapse.integrity import SEAL, flaws, record_of, records_of, seal, write_whole


@pytest.fixture
def folder(tmp_path):
    """A sealed folder of three files, one of them empty."""
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "numbers").write_bytes(bytes(range(256)) * 40)
    (tmp_path / "manifest.json").write_text('{"a": 1}')
    (tmp_path / "nothing").touch()
    seal(tmp_path)
    return tmp_path


def test_a_seal_says_size_and_hash_of_every_file(folder):
    content = bytes(range(256)) * 40
    assert json.loads((folder / SEAL).read_text()) == {
        "deep/er/numbers": {"size": 10240, "sha256": hashlib.sha256(content).hexdigest()},
        "manifest.json": {"size": 8, "sha256": hashlib.sha256(b'{"a": 1}').hexdigest()},
        "nothing": {"size": 0, "sha256": hashlib.sha256(b"").hexdigest()},
    }
    assert flaws(folder) == []


def test_a_flipped_byte_a_cut_and_a_missing_file_are_named(folder):
    numbers = folder / "deep" / "er" / "numbers"
    whole = numbers.read_bytes()
    numbers.write_bytes(whole[:5000] + b"\xff" + whole[5001:])
    assert flaws(folder) == ["deep/er/numbers has changed: its SHA-256 is not that of what was written"]
    assert flaws(folder, thorough=False) == []
    numbers.write_bytes(whole[:-1])
    assert flaws(folder) == ["deep/er/numbers has 10239 bytes, and 10240 were written"]
    assert flaws(folder, thorough=False) == flaws(folder)
    numbers.unlink()
    (folder / "nothing").unlink()
    assert flaws(folder, thorough=False) == ["deep/er/numbers is missing", "nothing is missing"]


def test_what_says_how_to_read_the_rest_is_always_compared(folder):
    (folder / "manifest.json").write_text('{"a": 2}')
    found = ["manifest.json has changed: its SHA-256 is not that of what was written"]
    assert flaws(folder, thorough=False) == flaws(folder) == found


def test_every_single_flipped_bit_of_the_seal_is_found(folder):
    sealed = (folder / SEAL).read_bytes()
    for position in range(len(sealed)):
        for bit in (1, 128):
            damaged = bytearray(sealed)
            damaged[position] ^= bit
            (folder / SEAL).write_bytes(bytes(damaged))
            is_same = _said(bytes(damaged)) == json.loads(sealed)
            assert is_same or flaws(folder), (position, bit, bytes(damaged)[position - 5 : position + 5])


def _said(text):
    try:
        return json.loads(text)
    except ValueError:
        return None


@pytest.mark.parametrize(
    ("text", "flaw"),
    [
        ("", "checksums.json cannot be read"),
        ("{", "checksums.json cannot be read"),
        ("[]", "checksums.json is not a list of files"),
        ('{"manifest.json": 3}', "checksums.json is not a list of files"),
        ('{"manifest.json": {"size": 8}}', "checksums.json is not a list of files"),
        (None, "checksums.json is missing: the folder was not finished, or is of an older version"),
    ],
)
def test_a_seal_that_is_none_is_a_flaw(folder, text, flaw):
    if text is None:
        (folder / SEAL).unlink()
    else:
        (folder / SEAL).write_text(text)
    assert flaws(folder) == [flaw]


def test_a_folder_in_the_place_of_a_file_is_a_flaw(folder):
    (folder / "nothing").unlink()
    (folder / "nothing").mkdir()
    (found,) = flaws(folder)
    assert found.startswith("nothing ")


def test_files_that_are_left_out_may_change(tmp_path):
    (tmp_path / "kept").write_text("a")
    (tmp_path / "report.html").write_text("a")
    seal(tmp_path, without=["report.html"])
    (tmp_path / "report.html").write_text("drawn again")
    assert flaws(tmp_path) == []
    assert list(json.loads((tmp_path / SEAL).read_text())) == ["kept"]


def test_what_is_known_of_files_is_taken_over_and_sealing_again_changes_nothing(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).write_text(name)
    seal(tmp_path)
    first = (tmp_path / SEAL).read_bytes()
    seal(tmp_path, known=records_of(tmp_path, [tmp_path / "one"]))
    assert (tmp_path / SEAL).read_bytes() == first
    seal(tmp_path, known={"one": {"size": 3, "sha256": "0"}})
    assert flaws(tmp_path) == ["one has changed: its SHA-256 is not that of what was written"]


def test_a_file_larger_than_a_buffer_is_hashed_whole(tmp_path):
    content = bytes(1 << 20) + b"end"
    (tmp_path / "x").write_bytes(content)
    assert record_of(tmp_path / "x") == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_a_file_is_there_as_a_whole_or_as_it_was(tmp_path):
    write_whole(tmp_path / "x", "first")
    with pytest.raises(UnicodeEncodeError):
        write_whole(tmp_path / "x", "\ud800")
    assert (tmp_path / "x").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
