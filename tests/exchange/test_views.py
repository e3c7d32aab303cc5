import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from planted import planted_classifier, planted_examples

from synapse.errors import SettingsError
from synapse.exchange.tensors import load_safetensors, save_safetensors
from synapse.exchange.views import to_torch, to_xarray
from synapse.moments import moments_by_class
from synapse.recording import record


@pytest.fixture(scope="module")
def recorded():
    return record(planted_classifier(), planted_examples(12, seed=0))


class OnDisk:
    """States that say what was read of them."""

    def __init__(self, values):
        self.held, self.shape, self.dtype, self.read = values, values.shape, values.dtype, []

    def __getitem__(self, key):
        layer, rows = key
        assert isinstance(layer, int)
        self.read.append((layer, len(np.arange(self.shape[1])[rows])))
        return self.held[layer, rows]


def test_a_layer_is_a_tensor_that_shares_the_memory(recorded):
    states = to_torch(recorded, 1)
    assert (states.dtype, tuple(states.shape)) == (torch.float32, (12, 16))
    np.testing.assert_array_equal(states.numpy(), recorded.values[1])
    assert states.data_ptr() == recorded.values[1].ctypes.data


def test_a_layer_of_a_file_can_be_changed_and_the_file_stays(recorded, tmp_path):
    save_safetensors(recorded, tmp_path / "a.safetensors")
    states = to_torch(load_safetensors(tmp_path / "a.safetensors"), 0)
    states += 1
    np.testing.assert_array_equal(load_safetensors(tmp_path / "a.safetensors").values, recorded.values)


def test_a_layer_that_is_not_there_is_refused(recorded):
    with pytest.raises(SettingsError) as caught:
        to_torch(recorded, 2)
    assert str(caught.value) == "There is no layer 2: give one of 0 to 1."


def test_a_dataset_has_the_words_of_the_package(recorded):
    pytest.importorskip("xarray")
    dataset = to_xarray(recorded)
    states = dataset["activations"]
    assert states.dims == ("layer", "example", "unit")
    assert states.shape == recorded.values.shape
    np.testing.assert_array_equal(states.values, recorded.values)
    np.testing.assert_array_equal(dataset["logits"], recorded.logits)
    np.testing.assert_array_equal(dataset["row_mean"].sel(layer=1), recorded.row_mean[1])
    assert dataset["depth"].values.tolist() == [0.5, 1.0]
    assert dataset["label"].values.tolist() == list(planted_examples(12, seed=0).labels)
    assert dataset.attrs == {"source": recorded.source, "component": "residual", "labels": ["a", "b", "c"]}


def test_positions_stay_with_a_selection(recorded):
    """The mean state of class b in the last layer, as one would write it in xarray and in numpy."""
    pytest.importorskip("xarray")
    states = to_xarray(recorded)["activations"]
    of_b = states.sel(layer=1).where(states["label"] == "b", drop=True)
    assert of_b["example"].values.tolist() == np.flatnonzero(recorded.targets == 1).tolist()
    np.testing.assert_allclose(of_b.mean("example"), recorded.values[1][recorded.targets == 1].mean(axis=0), rtol=1e-6)
    assert states.isel(unit=[9, 5])["unit"].values.tolist() == [9, 5]


def test_unknown_logits_predict_nothing_and_missing_moments_are_left_out(recorded):
    pytest.importorskip("xarray")
    nothing = replace(recorded, logits=None, features=None, row_mean=None)
    dataset = to_xarray(nothing)
    assert set(dataset["predicted"].values.tolist()) == {""}
    assert {"activations", "row_deviation"} <= set(dataset.data_vars)
    assert not {"logits", "features", "row_mean"} & set(dataset.data_vars)


@pytest.mark.parametrize(
    ("key", "read"),
    [
        ((1,), [(1, 12)]),
        ((1, slice(2, 5)), [(1, 3)]),
        ((slice(None), 3), [(0, 1), (1, 1)]),
        ((0, [4, 1, 1], slice(1, 3)), [(0, 2)]),  # a position that is asked for twice is read once
        ((slice(None, None, -1), slice(None, None, -2), [9, 5]), [(0, 6), (1, 6)]),
        ((-1, -1, -1), [(1, 1)]),
        ((slice(0, 0), slice(None), 3), []),
    ],
)
def test_only_what_is_indexed_is_read_from_disk(recorded, key, read):
    xarray = pytest.importorskip("xarray")
    from synapse.exchange.lazy import lazily_indexed

    on_disk = OnDisk(recorded.values)
    states = xarray.DataArray(xarray.Variable(("layer", "example", "unit"), lazily_indexed(on_disk)))
    chosen = states[key]
    assert on_disk.read == []
    np.testing.assert_array_equal(chosen.values, xarray.DataArray(recorded.values)[key].values)
    assert on_disk.read == read


def test_pointwise_indexing_reads_what_it_needs(recorded):
    xarray = pytest.importorskip("xarray")
    from synapse.exchange.lazy import lazily_indexed

    on_disk = OnDisk(recorded.values)
    states = xarray.DataArray(xarray.Variable(("layer", "example", "unit"), lazily_indexed(on_disk)))
    at = {"example": xarray.DataArray([3, 7], dims="point"), "unit": xarray.DataArray([5, 9], dims="point")}
    np.testing.assert_array_equal(states.isel(layer=1, **at).values, recorded.values[1, [3, 7], [5, 9]])
    assert on_disk.read == [(1, 2)]


def test_moments_of_classes_stand_by_the_names_of_the_classes(recorded):
    pytest.importorskip("xarray")
    moments = moments_by_class(recorded.values, recorded.targets, 3)
    dataset = to_xarray(replace(recorded, class_moments=moments))
    of_c = recorded.values[1][recorded.targets == 2]
    np.testing.assert_allclose(dataset["class_mean"].sel({"layer": 1, "class": "c"}), of_c.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(dataset["class_deviation"].sel({"layer": 1, "class": "c"}), of_c.std(axis=0), rtol=1e-5)
    assert dataset["class_count"].sel({"class": "c"}).values.tolist() == [len(of_c), len(of_c)]


def test_features_on_disk_are_read_by_rows(recorded):
    xarray = pytest.importorskip("xarray")
    from synapse.exchange.lazy import lazily_indexed

    features = recorded.features
    lazy = xarray.DataArray(xarray.Variable(("example", "feature"), lazily_indexed(features)))
    np.testing.assert_array_equal(lazy[[4, 1], 2:5].values, features[[4, 1], 2:5])
    np.testing.assert_array_equal(lazy[3].values, features[3])


def test_without_xarray_its_install_command_is_said(recorded, monkeypatch):
    monkeypatch.setitem(sys.modules, "xarray", None)
    with pytest.raises(SettingsError) as caught:
        to_xarray(recorded)
    assert str(caught.value) == (
        "xarray is not installed; install it with `pip install xarray`, or `pip install 'synapse[exchange]'`."
    )
