"""Tables in pieces: memory that does not grow with the file, and the formats of the library `datasets`."""

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from synapse.data import tables
from synapse.data.gathering import InputsOnDisk
from synapse.data.reading import read_examples
from synapse.errors import DataError

GROWTH = """
import resource, sys
from synapse.data.reading import read_examples

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

before = peak()
for path in sys.argv[2:]:
    examples = read_examples(path, in_memory=int(sys.argv[1]))
    examples.fingerprint
    print(peak() - before, len(examples))
"""


def refusal(path, **columns):
    with pytest.raises(DataError) as caught:
        read_examples(path, **columns)
    return str(caught.value)


def write(path, table):
    match path.suffix:
        case ".csv":
            table.to_csv(path, index=False)
        case ".parquet":
            table.to_parquet(path)
        case _:
            table.to_json(path, orient="records", lines=True)
    return path


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(tables, "_ROWS", 2)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_peak_memory_does_not_grow_with_the_file(tmp_path, suffix):
    text = np.array([f"{i} " * 100 for i in range(10, 1000)])
    sizes = {}
    for n in (5_000, 50_000):
        table = pd.DataFrame({"text": text[np.arange(n) % 990], "label": np.arange(n) % 3})
        sizes[n] = write(tmp_path / f"{n}{suffix}", table)

    run = subprocess.run(
        [sys.executable, "-c", GROWTH, "1000000", *map(str, sizes.values())],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )

    (small, n_small), (large, n_large) = (map(float, line.split()) for line in run.stdout.splitlines())
    assert (n_small, n_large) == tuple(sizes)
    # 28 MB more text; 70 000 labels and places more are 2 MB
    assert large - small < 10, (small, large)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("in_memory", [0, 10**9])
def test_pieces_and_disk_give_what_one_piece_in_memory_does(tmp_path, suffix, in_memory, small_pieces):
    table = pd.DataFrame(
        {
            "text": [f"text {i}" for i in range(7)],
            "other": list("abcdefg"),
            "ids": [f"{i} 5" for i in range(7)],
            "t0": np.arange(7.0),
            "t1": np.arange(7.0) / 4,
            "label": list("xyxyxyx"),
        }
    )
    path = write(tmp_path / f"rows{suffix}", table)
    read = {
        "text": read_examples(path, in_memory=in_memory),
        "pair": read_examples(path, pair="other", in_memory=in_memory),
        "ids": read_examples(path, ids="ids", in_memory=in_memory),
        "array": read_examples(path, signal="t?", in_memory=in_memory),
    }

    assert isinstance(read["text"].inputs, InputsOnDisk) == (in_memory == 0)
    assert [examples.kind for examples in read.values()] == list(read)
    assert tuple(read["text"].inputs) == tuple(table["text"])
    assert tuple(read["pair"].inputs) == tuple(zip(table["text"], table["other"], strict=True))
    assert tuple(read["ids"].inputs) == tuple((i, 5) for i in range(7))
    np.testing.assert_array_equal(read["array"].inputs, table[["t0", "t1"]].to_numpy(np.float32))
    assert all(examples.labels == tuple("xyxyxyx") for examples in read.values())


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_wrong_rows_are_counted_over_all_pieces(tmp_path, suffix, small_pieces):
    table = pd.DataFrame({"text": list("a b cd  "), "ids": ["1"] * 5 + ["x"] * 3, "label": list("xyxyxyxy")})
    path = write(tmp_path / f"rows{suffix}", table)

    assert refusal(path) == (f"Column 'text' of {path} is empty in data rows 2, 4, 7, 8: fill in or remove these rows.")
    assert refusal(path, ids="ids").startswith(f"Column 'ids' of {path} holds 'x' in data row 6: ")
    assert refusal(path, signal="ids").startswith(f"Column 'ids' of {path} holds 'x' in data row 6: ")


@pytest.mark.parametrize(
    ("line", "reason"),
    [("a,b,c", "Error tokenizing data. C error: Expected 2 fields in line 8, saw 3"), ('"a', "EOF inside string")],
)
def test_a_row_that_cannot_be_parsed_is_told_in_every_piece(tmp_path, line, reason, small_pieces):
    path = tmp_path / "rows.csv"
    path.write_text("text,label\n" + "a,x\nb,y\n" * 3 + line)

    assert reason in refusal(path)


def test_a_column_of_numbers_that_comes_late_is_refused(tmp_path, small_pieces):
    path = tmp_path / "rows.jsonl"
    rows = [{"t0": 1, "label": "x"}, {"t0": 2, "label": "y"}, {"t0": 3, "t1": 4, "label": "x"}]
    path.write_text("\n".join(map(json.dumps, rows)))

    assert refusal(path, signal="t*") == (
        f"{path} has the columns 't0', 't1' for `signal`, and earlier rows have 't0': give all rows the same columns, "
        "or name those that all have."
    )
    assert len(read_examples(path, signal="t0")) == 3


def saved(datasets, label="label"):
    features = {"text": datasets.Value("string"), label: datasets.ClassLabel(names=["ham", "spam"])}
    columns = {"text": [f"text {i}" for i in range(6)], label: [0, 1] * 3}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


@pytest.fixture
def datasets(monkeypatch, tmp_path):
    library = pytest.importorskip("datasets", reason="the extra `data` is not installed")
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return library


def test_a_saved_data_set_gives_the_names_of_its_classes(datasets, tmp_path):
    table = saved(datasets).rename_column("label", "kind").select(range(5, -1, -1))
    table.save_to_disk(tmp_path / "mail", num_shards=2)

    examples = read_examples(tmp_path / "mail", label="kind")

    assert examples.inputs == tuple(f"text {i}" for i in range(5, -1, -1))
    assert examples.labels == ("spam", "ham") * 3
    assert examples.name == "mail"


def test_shards_of_a_data_set_give_the_names_of_its_classes(datasets, tmp_path):
    (tmp_path / "mail").mkdir()
    for i in range(2):
        saved(datasets).shard(2, i).to_parquet(tmp_path / "mail" / f"{i}.parquet")

    assert read_examples(tmp_path / "mail").labels == ("ham", "spam") * 3


def test_saved_splits_are_told_to_be_named(datasets, tmp_path):
    datasets.DatasetDict(train=saved(datasets), test=saved(datasets)).save_to_disk(tmp_path / "mail")

    assert refusal(tmp_path / "mail") == (
        f"{tmp_path / 'mail'} holds the splits 'train', 'test': give the folder of one, such as "
        f"{tmp_path / 'mail'}/train."
    )
    assert len(read_examples(tmp_path / "mail" / "train")) == 6


def test_rows_without_a_class_are_refused(datasets, tmp_path):
    columns = {"text": ["a", "b", "c"], "label": [0, -1, None]}
    datasets.Dataset.from_dict(columns, features=saved(datasets).features).save_to_disk(tmp_path / "mail")

    assert refusal(tmp_path / "mail") == (
        f"Column 'label' of {tmp_path / 'mail'} is empty in data rows 2, 3: label or remove these rows."
    )


def test_arrays_of_a_data_set_are_read_as_signals(datasets, tmp_path):
    values = np.random.default_rng(0).normal(size=(4, 2, 3)).astype(np.float32)
    features = datasets.Features({"beat": datasets.Array2D((2, 3), "float32"), "label": datasets.Value("string")})
    table = datasets.Dataset.from_dict({"beat": values, "label": list("xyxy")}, features=features)
    table.save_to_disk(tmp_path / "beats")

    np.testing.assert_array_equal(read_examples(tmp_path / "beats", signal="beat").inputs, values)


def test_a_data_set_is_had_by_name_and_split(datasets, tmp_path, small_pieces):
    """From a folder that is laid out like a data set on the hub."""
    (tmp_path / "mail").mkdir()
    for split, rows in (("train", range(4)), ("test", range(4, 6))):
        saved(datasets).select(rows).to_parquet(tmp_path / "mail" / f"{split}.parquet")
    name = f"dataset:{tmp_path / 'mail'}"

    assert read_examples(f"{name}:test").inputs == ("text 4", "text 5")
    assert read_examples(f"{name}:default:train[1:]").labels == ("spam", "ham", "spam")
    assert read_examples(f"{name}:train").name == f"{name}:train"
    assert refusal(name) == f"{name} has the splits 'train', 'test': name one, as in {name}:train."
    assert refusal(f"{name}:test", text="texts").startswith(f"{name}:test has no column 'texts', only 'text', 'label'.")


def test_a_data_set_that_cannot_be_had_is_told(datasets, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)

    message = refusal("dataset:owner/name:train")

    assert message.startswith("dataset:owner/name:train could not be had from the hub: Couldn't reach 'owner/name'")
    assert message.endswith(
        "Check name, configuration and split (dataset:NAME:CONFIG:SPLIT) and the network, or give the path of a file."
    )


def test_a_missing_library_is_told_with_its_installation(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)

    assert refusal("dataset:owner/name:train") == (
        "dataset:owner/name:train needs the library `datasets`, which is not installed: install it with "
        "`pip install 'synapse[data]'`, or give the path of a file."
    )
