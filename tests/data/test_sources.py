"""Examples from anywhere: elsewhere, packed, in shards."""

import bz2
import gzip
import json
import re
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path

import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from synapse.data.reading import read_examples
from synapse.elsewhere import as_written
from synapse.errors import DataError

TABLE = pd.DataFrame({"text": ["NA", 'a, "b"\nc', "naïve ☕"], "label": ["x", "1", "null"]})


def content(suffix, table=TABLE):
    stream = BytesIO()
    match suffix:
        case ".csv":
            table.to_csv(stream, index=False)
        case ".tsv":
            table.to_csv(stream, index=False, sep="\t")
        case ".parquet":
            table.to_parquet(stream)
            return stream.getbuffer().tobytes()
        case ".jsonl":
            stream.write("\n".join(json.dumps(row) for row in table.to_dict("records")).encode())
        case ".npz":
            np.savez(stream, inputs=np.eye(3), labels=table["label"].tolist())
    return stream.getvalue()


PACK = {".gz": gzip.compress, ".bz2": bz2.compress, ".zst": partial(pa.compress, codec="zstd", asbytes=True)}


def refusal(path, **columns):
    with pytest.raises(DataError) as caught:
        read_examples(path, **columns)
    return str(caught.value)


@pytest.fixture
def memory():
    """The file system in memory of fsspec, empty again afterwards."""
    system = fsspec.filesystem("memory")
    yield system
    system.rm("/", recursive=True)


class Ranges(SimpleHTTPRequestHandler):
    """Gives parts of files, as object stores do."""

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        path = Path(self.translate_path(self.path))
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not asked or not path.is_file():
            return super().do_GET()
        data = path.read_bytes()
        part = data[int(asked[1]) : int(asked[2]) + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {asked[1]}-{int(asked[1]) + len(part) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        return self.wfile.write(part)


@pytest.fixture
def served(tmp_path):
    """The address of a server of the files in the temporary folder."""
    pytest.importorskip("aiohttp", reason="the http file system of fsspec needs aiohttp")
    pytest.importorskip("requests", reason="the http file system of fsspec needs requests")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Ranges, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join(timeout=5)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet", ".csv.gz", ".jsonl.zst"])
def test_a_table_elsewhere_is_read_like_one_here(memory, suffix):
    plain, _, packing = suffix[1:].partition(".")
    data = content(f".{plain}")
    memory.pipe(f"/bucket/rows{suffix}", PACK[f".{packing}"](data) if packing else data)

    examples = read_examples(f"memory://bucket/rows{suffix}")

    assert examples.inputs == tuple(TABLE["text"])
    assert examples.labels == tuple(TABLE["label"])
    assert examples.name == f"rows{suffix}"


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl.gz"])
def test_a_table_on_a_server_is_read_like_one_here(served, tmp_path, suffix):
    data = content(suffix.removesuffix(".gz"))
    (tmp_path / f"rows{suffix}").write_bytes(gzip.compress(data) if suffix.endswith(".gz") else data)

    examples = read_examples(f"{served}/rows{suffix}?download=true")

    assert (examples.inputs, examples.name) == (tuple(TABLE["text"]), f"rows{suffix}")
    assert refusal(f"{served}/row{suffix}") == (
        f"There is no file {served}/row{suffix}. Did you mean 'rows{suffix}'? Give the path of a data file."
    )


def test_arrays_elsewhere_are_read_like_those_here(memory):
    memory.pipe("/rows.npz", content(".npz"))

    np.testing.assert_array_equal(read_examples("memory://rows.npz").inputs, np.eye(3, dtype=np.float32))


def test_a_path_object_that_folded_the_slashes_is_understood(memory):
    memory.pipe("/bucket/rows.csv", content(".csv"))

    assert len(read_examples(Path("memory://bucket/rows.csv"))) == 3
    assert as_written(Path("/data/s3:/rows.csv")) == "/data/s3:/rows.csv"


def test_messages_of_a_table_elsewhere_name_its_path(memory):
    memory.pipe("/bucket/rows.csv", b"text,label\na,x\n,y\n")
    memory.pipe("/bucket/broken.parquet", b"no parquet")

    assert refusal("memory://bucket/rows.csv") == (
        "Column 'text' of memory://bucket/rows.csv is empty in data row 2: fill in or remove these rows."
    )
    assert refusal("memory://bucket/row.csv") == (
        "There is no file memory://bucket/row.csv. Did you mean 'rows.csv'? Give the path of a data file."
    )
    assert refusal("memory://bucket/broken.parquet").startswith(
        "memory://bucket/broken.parquet could not be read as PARQUET: Parquet magic bytes not found"
    )
    assert refusal("memory://bucket/rows.csv", file="text") == (
        "memory://bucket/rows.csv is not on this machine, and column 'text' was named as paths of files: copy the "
        "files and the data file into a folder here."
    )


def test_a_place_of_an_unknown_kind_is_refused():
    assert refusal("elsewhere://bucket/rows.csv") == (
        "elsewhere://bucket/rows.csv could not be reached: Protocol not known: elsewhere. Check the path and your "
        "access to it, and for one elsewhere that the package it needs is installed."
    )


def test_a_data_set_of_the_hub_without_a_file_is_told_how_to_be_named():
    assert refusal("hf://datasets/owner/name") == (
        "hf://datasets/owner/name names no file: give the path of a file in it, or the data set as dataset:owner/name."
    )


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
@pytest.mark.parametrize("packing", PACK)
def test_packed_tables_are_unpacked(tmp_path, suffix, packing):
    path = tmp_path / f"rows{suffix}{packing}"
    path.write_bytes(PACK[packing](content(suffix)))

    examples = read_examples(path)

    assert (examples.inputs, examples.labels) == (tuple(TABLE["text"]), tuple(TABLE["label"]))


def test_a_packed_file_that_was_cut_is_refused(tmp_path):
    path = tmp_path / "rows.csv.gz"
    path.write_bytes(gzip.compress(content(".csv"))[:-12])

    assert refusal(path) == (
        f"{path} could not be read as CSV: Truncated compressed stream. Check the file, or its suffix."
    )


@pytest.mark.parametrize("name", ["rows.parquet.gz", "rows.npz.zst", "rows.txt.gz", "rows.gz"])
def test_what_cannot_be_read_packed_is_refused(tmp_path, name):
    (tmp_path / name).touch()

    assert refusal(tmp_path / name) == (
        f"{tmp_path / name} ends in {name.removeprefix('rows')!r}: give a file that ends in "
        ".csv, .tsv, .jsonl, .ndjson, .parquet, .npz."
    )


def shards(folder, names):
    folder.mkdir()
    for i, name in enumerate(names):
        pd.DataFrame({"text": [f"text {i}"], "label": ["xy"[i % 2]]}).to_parquet(folder / name)
    return folder


def test_shards_are_read_in_the_order_of_their_numbers(tmp_path):
    folder = shards(tmp_path / "train", [f"part.{i}.parquet" for i in range(12)])
    (folder / "_SUCCESS").touch()

    examples = read_examples(folder)

    assert examples.inputs == tuple(f"text {i}" for i in range(12))
    assert examples.name == "train"


def test_a_pattern_names_the_shards_of_one_split(tmp_path, memory):
    names = [f"{split}-0000{i}-of-00002.parquet" for split in ("test", "train") for i in range(2)]
    folder = shards(tmp_path / "data", names)
    memory.put(str(folder), "/data", recursive=True)

    for where in (folder, "memory://data"):
        assert read_examples(f"{where}/train-*.parquet").inputs == ("text 2", "text 3")
        assert refusal(str(where)) == (
            f"{where} holds 'test-00000-of-00002.parquet', 'test-00001-of-00002.parquet', "
            "'train-00000-of-00002.parquet', 'train-00001-of-00002.parquet', which are not the numbered parts of one "
            f"table: give one file, or a pattern such as {where}/train-*.parquet."
        )
        assert refusal(f"{where}/valid-*.parquet") == (
            f"No file matches {where}/valid-*.parquet: give the path of a data file, or a pattern that fits several."
        )


def test_a_shard_of_another_form_is_told_by_its_name(tmp_path):
    folder = shards(tmp_path / "train", ["0.parquet", "1.parquet"])
    pd.DataFrame({"texts": ["a"], "label": ["x"]}).to_parquet(folder / "1.parquet")
    (tmp_path / "train.csv").touch()

    assert refusal(folder).startswith(f"1.parquet of {folder} has no column 'text', only 'texts', 'label'.")
    (folder / "1.parquet").write_bytes(b"no parquet")
    assert refusal(folder).startswith(f"1.parquet of {folder} could not be read as PARQUET: ")
    assert refusal(tmp_path / "train*") == (
        f"{tmp_path}/train* matches files that end in '', '.csv': give a pattern for files of one format."
    )
