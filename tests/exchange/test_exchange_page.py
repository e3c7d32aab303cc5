import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from planted import planted_classifier, planted_examples

from synapse.exchange.tables import save_parquet
from synapse.exchange.tensors import load_safetensors, save_safetensors
from synapse.exchange.views import to_torch, to_xarray
from synapse.recording import record

ROOT = Path(__file__).parents[2]


def test_the_python_examples_of_the_page_run(tmp_path, monkeypatch):
    pytest.importorskip("xarray")
    shutil.copy(Path(__file__).parent / "neurox" / "states.json", tmp_path)
    monkeypatch.chdir(tmp_path)
    names = {"classifier": planted_classifier(), "train": planted_examples(30, seed=1)}
    for code in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "exchange.md").read_text(), flags=re.DOTALL):
        exec(code, names)
    targets, states = names["again"].targets, names["again"].values[1]
    by_hand = np.stack([states[targets == c].mean(axis=0) for c in range(3)])
    np.testing.assert_allclose(names["means"].values, by_hand, rtol=1e-5, atol=1e-6)
    assert names["tokens"].values.shape == (2, 13, 5)


def test_what_was_recorded_to_disk_leaves_as_what_was_recorded_in_memory(tmp_path):
    xarray = pytest.importorskip("xarray")
    classifier, examples = planted_classifier(), planted_examples(90, seed=1)
    kept, held = record(classifier, examples, keep=tmp_path / "kept"), record(classifier, examples)
    save_safetensors(kept, tmp_path / "kept.safetensors")
    save_parquet(kept, tmp_path / "kept.parquet")
    loaded = load_safetensors(tmp_path / "kept.safetensors")
    np.testing.assert_array_equal(loaded.values, held.values)
    np.testing.assert_array_equal(loaded.features, held.features)
    np.testing.assert_array_equal(np.stack(pd.read_parquet(tmp_path / "kept.parquet")["layer_1"]), held.values[1])
    np.testing.assert_array_equal(to_torch(kept, 1), held.values[1])
    lazy = to_xarray(kept)
    np.testing.assert_array_equal(lazy["activations"][1, [3, 1, 1], 2:5], held.values[1][[3, 1, 1], 2:5])
    np.testing.assert_array_equal(lazy["features"][5:1:-1], held.features[5:1:-1])
    xarray.testing.assert_identical(lazy[["activations", "logits"]], to_xarray(held)[["activations", "logits"]])
