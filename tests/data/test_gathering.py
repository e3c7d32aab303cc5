import gc
import tempfile
from pathlib import Path

import numpy as np
import pytest

from synapse.data.examples import Examples, shared_inputs, split_examples
from synapse.data.gathering import Gathered, InputsOnDisk
from synapse.errors import ResourceError

KINDS = {
    "text": ["", "naïve ☕", "half \ud83d", "a\0b\n", *(f"text {i}" for i in range(6))],
    "pair": [("a", ""), ("", "a"), ("\ud83d", "☕"), *((f"a {i}", "b" * i) for i in range(7))],
    "file": [Path(f"images/é {i}.png") for i in range(10)],
    "ids": [(0,), (2**31 - 1, 5), *(tuple(range(i)) for i in range(1, 9))],
}


def gathered(items, *, in_memory):
    found = Gathered(in_memory)
    for start in range(0, len(items), 3):
        found.add(items[start : start + 3])
    return found.inputs()


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_of_every_kind_come_back_from_disk_as_they_were(kind):
    items = KINDS[kind]
    on_disk = gathered(items, in_memory=0)

    assert isinstance(on_disk, InputsOnDisk)
    assert list(on_disk) == items
    assert (on_disk[-1], on_disk[2:5], on_disk[::-2]) == (items[-1], tuple(items[2:5]), tuple(items[::-2]))
    assert list(on_disk.select([7, 0, 7])) == [items[7], items[0], items[7]]
    assert gathered(items, in_memory=10**6) == tuple(items)


def test_an_index_beyond_the_inputs_is_an_error():
    with pytest.raises(IndexError):
        gathered(KINDS["text"], in_memory=0)[10]


def test_arrays_on_disk_are_mapped_and_equal():
    arrays = np.random.default_rng(0).normal(size=(10, 2, 3)).astype(np.float32)

    mapped = gathered(arrays, in_memory=0)

    assert isinstance(mapped, np.memmap)
    assert not mapped.flags.writeable
    np.testing.assert_array_equal(mapped, arrays)
    np.testing.assert_array_equal(gathered(arrays, in_memory=10**6), arrays)


@pytest.mark.parametrize("kind", KINDS)
def test_examples_on_disk_are_those_in_memory(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    for path in KINDS["file"]:
        path.write_bytes(path.name.encode())
    labels = tuple("xy" * 5)
    here = Examples(tuple(KINDS[kind]), labels, "here")
    there = Examples(gathered(KINDS[kind], in_memory=0), labels, "there")

    assert (there.kind, there.fingerprint) == (here.kind, here.fingerprint)
    assert there.take([4, 1]).inputs == here.take([4, 1]).inputs
    assert (shared_inputs(here, there), shared_inputs(there, here.take([0, 3]))) == (10, 2)
    for part, expected in zip(split_examples(there, seed=1), split_examples(here, seed=1), strict=True):
        assert isinstance(part.inputs, InputsOnDisk)
        assert (tuple(part.inputs), part.labels) == (expected.inputs, expected.labels)


def test_the_temporary_file_has_no_name_and_goes_with_the_last_use_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    inputs = gathered(KINDS["text"], in_memory=0)
    part, file = inputs.select([1]), inputs._file.file

    assert list(tmp_path.iterdir()) == []
    del inputs
    gc.collect()
    assert part[0] == "naïve ☕"
    del part
    gc.collect()
    assert file.closed


def test_a_full_temporary_folder_is_told():
    class Full:
        def write(self, content):
            raise OSError(28, "No space left on device")

    found = Gathered(0)
    found.add(["a"])
    found._writer._file.file = Full()
    with pytest.raises(ResourceError) as caught:
        found.add(["b"])

    assert str(caught.value) == (
        f"The inputs do not fit into the temporary folder {tempfile.gettempdir()} (No space left on device): make room "
        "there, name another folder in the environment variable TMPDIR, or give a smaller file."
    )
