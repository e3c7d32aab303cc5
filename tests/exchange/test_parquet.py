import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from planted import planted_classifier, planted_examples

from synapse.errors import DataError
from synapse.exchange import tables
from synapse.exchange.tables import save_parquet
from synapse.recording import record
from synapse.types import Activations


@pytest.fixture(scope="module")
def recorded():
    return record(planted_classifier(), planted_examples(31, seed=0))


def test_the_table_has_a_row_an_example(recorded, tmp_path):
    save_parquet(recorded, tmp_path / "a.parquet")
    table = pd.read_parquet(tmp_path / "a.parquet")
    assert list(table.columns) == ["example", "label", "predicted", "logits", "layer_0", "layer_1"]
    assert table["example"].tolist() == list(range(31))
    assert table["label"].tolist() == list(planted_examples(31, seed=0).labels)
    assert table["predicted"].tolist() == [("a", "b", "c")[i] for i in recorded.logits.argmax(axis=1)]
    np.testing.assert_array_equal(np.stack(table["logits"]), recorded.logits)
    for layer in range(2):
        np.testing.assert_array_equal(np.stack(table[f"layer_{layer}"]), recorded.values[layer])


def test_the_columns_are_lists_of_one_length_and_the_file_says_what_they_are(recorded, tmp_path):
    save_parquet(recorded, tmp_path / "a.parquet")
    schema = pq.read_schema(tmp_path / "a.parquet")
    assert schema.field("layer_1").type == pa.list_(pa.float32(), 16)
    assert schema.field("logits").type == pa.list_(pa.float32(), 3)
    assert json.loads(schema.metadata[b"labels"]) == ["a", "b", "c"]
    assert schema.metadata[b"source"].decode() == recorded.source
    assert schema.metadata[b"component"] == b"residual"


def test_rows_are_written_in_groups_that_bound_the_memory(recorded, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "ROW_GROUP_BYTES", 10 * 2 * 16 * 4)  # ten examples
    save_parquet(recorded, tmp_path / "a.parquet")
    file = pq.ParquetFile(tmp_path / "a.parquet")
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [10, 10, 10, 1]
    read = np.stack(file.read(["layer_1"])["layer_1"].to_pandas())
    np.testing.assert_array_equal(read, recorded.values[1])


def test_what_is_not_known_is_not_predicted(tmp_path):
    activations = Activations(
        values=np.ones((1, 2, 3), dtype=np.float16),
        logits=None,
        targets=np.array([1, 0]),
        labels=("a", "b"),
        source="abc",
    )
    save_parquet(activations, tmp_path / "a.parquet")
    table = pq.read_table(tmp_path / "a.parquet")
    assert table["predicted"].null_count == table["logits"].null_count == 2
    assert table["label"].to_pylist() == ["b", "a"]
    assert table.schema.field("layer_0").type == pa.list_(pa.float16(), 3)


def test_no_examples_make_an_empty_table(tmp_path):
    nothing = Activations(
        np.empty((1, 0, 3), np.float32), np.empty((0, 2), np.float32), np.arange(0), ("a", "b"), "abc"
    )
    save_parquet(nothing, tmp_path / "a.parquet")
    table = pd.read_parquet(tmp_path / "a.parquet")
    assert (len(table), list(table.columns)) == (0, ["example", "label", "predicted", "logits", "layer_0"])


def test_a_write_that_breaks_off_leaves_what_was_there(recorded, tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_text("before")
    monkeypatch.setattr(tables, "_table", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_parquet(recorded, tmp_path / "a.parquet")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]
    with pytest.raises(DataError, match="is a folder"):
        save_parquet(recorded, tmp_path)
