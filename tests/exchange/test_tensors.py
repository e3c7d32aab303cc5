import json
import sys
from dataclasses import fields, is_dataclass, replace

import numpy as np
import pytest
from planted import planted_classifier, planted_examples
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from synapse.errors import DataError
from synapse.exchange import tensors
from synapse.exchange.tensors import load_safetensors, save_safetensors
from synapse.moments import moments_by_class
from synapse.recording import record
from synapse.types import Activations

ARRAYS = ("values", "targets", "logits", "features", "row_mean", "row_deviation")


@pytest.fixture(scope="module")
def recorded():
    return record(planted_classifier(), planted_examples(30, seed=0))


def refusal(path):
    with pytest.raises(DataError) as caught:
        load_safetensors(path)
    return str(caught.value)


def assert_equal(before, after):
    """Bit for bit, also inside of the moments."""
    if isinstance(before, np.ndarray):
        assert (before.dtype, before.shape, before.tobytes()) == (after.dtype, after.shape, after.tobytes())
    elif is_dataclass(before):
        for field in fields(before):
            assert_equal(getattr(before, field.name), getattr(after, field.name))
    else:
        assert before == after


def made(**changes):
    """Activations of 3 layers, 7 examples and 5 units."""
    random = np.random.default_rng(0)
    plain = Activations(
        values=random.normal(size=(3, 7, 5)).astype(np.float32),
        logits=random.normal(size=(7, 2)).astype(np.float32),
        targets=np.array([0, 1, 1, 0, 1, 0, 0]),
        labels=("läbel", 'with "quotes"'),
        source="abc",
    )
    return replace(plain, **changes)


class Spy(np.ndarray):
    """An array that remembers how much of it was asked for at once."""

    largest = 0

    def __getitem__(self, key):
        part = np.asarray(self)[key]
        Spy.largest = max(Spy.largest, part.nbytes)
        return part


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"values": np.random.default_rng(1).normal(size=(3, 7, 5)).astype(np.float16)},
        {"logits": None, "component": "mlp", "reads_several_rows": True},
        {"class_moments": moments_by_class(np.random.default_rng(2).normal(size=(3, 7, 5)), np.arange(7) % 2, 2)},
        {"features": np.ones((7, 3), dtype=np.float32), "row_mean": np.zeros((3, 5), dtype=np.float32)},
        {"values": np.ones((3, 7, 5), dtype=np.float32).swapaxes(0, 0)[::-1]},
    ],
)
def test_every_field_comes_back_bit_for_bit(tmp_path, changes):
    activations = made(**changes)
    save_safetensors(activations, tmp_path / "a.safetensors")
    loaded = load_safetensors(tmp_path / "a.safetensors")
    assert_equal(activations, loaded)


def test_a_recording_is_what_the_safetensors_library_reads(recorded, tmp_path):
    save_safetensors(recorded, tmp_path / "a.safetensors")
    held = load_file(tmp_path / "a.safetensors")
    for name in ARRAYS:
        np.testing.assert_array_equal(held[name], getattr(recorded, name))
    with safe_open(tmp_path / "a.safetensors", "np") as file:
        np.testing.assert_array_equal(file.get_slice("values")[1], recorded.values[1])
        assert json.loads(file.metadata()["labels"]) == list(recorded.labels)


def test_no_examples_are_kept_as_none(tmp_path):
    nothing = made(values=np.empty((3, 0, 5), np.float32), logits=np.empty((0, 2), np.float32), targets=np.arange(0))
    save_safetensors(nothing, tmp_path / "a.safetensors")
    assert load_safetensors(tmp_path / "a.safetensors").values.shape == (3, 0, 5)
    assert load_file(tmp_path / "a.safetensors")["values"].shape == (3, 0, 5)


def test_a_piece_of_a_layer_is_held_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "_PIECE_BYTES", 3 * 5 * 4)
    Spy.largest = 0
    plain = made()
    save_safetensors(replace(plain, values=plain.values.view(Spy)), tmp_path / "a.safetensors")
    assert Spy.largest == 3 * 5 * 4
    np.testing.assert_array_equal(load_file(tmp_path / "a.safetensors")["values"], plain.values)


def test_what_is_loaded_is_mapped_and_stays_when_the_file_is_replaced(tmp_path):
    path = tmp_path / "new" / "a.safetensors"
    plain = made()
    save_safetensors(plain, path)
    loaded = load_safetensors(path)
    assert isinstance(loaded.values, np.memmap)
    save_safetensors(replace(loaded, values=2 * loaded.values), path)
    np.testing.assert_array_equal(loaded.values, plain.values)
    loaded.values[:] = 0  # in memory alone
    np.testing.assert_array_equal(load_safetensors(path).values, 2 * plain.values)


def test_a_failure_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.safetensors"
    save_safetensors(made(), path)
    before = path.read_bytes()
    with pytest.raises(DataError) as caught:
        save_safetensors(made(targets=np.zeros(7, dtype=np.int32)), path)
    assert str(caught.value) == (
        "The targets are of type int32; float16, float32, float64 or int64 was expected: cast them."
    )
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_breaks_off_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "_pieces", lambda array: iter([array[:1], 1 / 0]))
    with pytest.raises(ZeroDivisionError):
        save_safetensors(made(), tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_no_place_for_a_file(tmp_path):
    with pytest.raises(DataError) as caught:
        save_safetensors(made(), tmp_path)
    assert str(caught.value) == f"{tmp_path} is a folder: give the path of a file, which may or may not be there."


def test_a_missing_a_damaged_and_a_cut_off_file_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    assert refusal(path).startswith(f"{path} cannot be read as a safetensors file: ")
    save_safetensors(made(), path)
    whole = path.read_bytes()
    for broken in (whole[:-1], whole[:100], b"", b"no tensors at all", whole + b"more"):
        path.write_bytes(broken)
        assert refusal(path).endswith("Give the path of a file that `save_safetensors` wrote, or write it again.")


def test_tensors_that_are_no_activations_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"weight": np.ones(3)}, path)
    assert refusal(path) == (
        f"{path} holds tensors, but no activations of synapse: give a file that `save_safetensors` wrote."
    )
    save_file({"values": np.ones((1, 1, 1))}, path, {"synapse_activations": "9"})
    assert refusal(path) == (f"{path} is of version 9 of the format, and this version of synapse reads 1: update it.")


def test_the_first_tensor_is_aligned(tmp_path):
    """The format wants no alignment, but a map of numbers that are not aligned is slow."""
    for labels in (("a", "b"), ("a", "bc"), ("a", "bcd")):
        save_safetensors(made(labels=labels), tmp_path / "a.safetensors")
        loaded = load_safetensors(tmp_path / "a.safetensors")
        assert loaded.values.flags.aligned
        assert int.from_bytes((tmp_path / "a.safetensors").read_bytes()[:8], sys.byteorder) % 8 == 0
