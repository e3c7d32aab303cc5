import json

import numpy as np
import pandas as pd
import pytest

from synapse.data.reading import read_examples
from synapse.errors import DataError, SettingsError

ROWS = {"text": ["NA", 'a, "b"\nc', "naïve ☕"], "label": ["sqli", "1", "null"]}


def write(path, rows):
    table = pd.DataFrame(rows)
    match path.suffix:
        case ".csv":
            table.to_csv(path, index=False)
        case ".tsv":
            table.to_csv(path, index=False, sep="\t")
        case ".parquet":
            table.to_parquet(path)
        case _:
            path.write_text("\n".join(json.dumps(row) for row in table.to_dict("records")), encoding="utf-8")
    return path


def refusal(path, error=DataError, **columns):
    with pytest.raises(error) as caught:
        read_examples(path, **columns)
    return str(caught.value)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".ndjson", ".parquet", ".CSV"])
def test_texts_and_labels_come_back_as_written_in_every_format(tmp_path, suffix):
    path = write(tmp_path / f"rows{suffix.lower()}", ROWS).rename(tmp_path / f"rows{suffix}")

    examples = read_examples(path)

    assert examples.inputs == tuple(ROWS["text"])
    assert examples.labels == tuple(ROWS["label"])
    assert examples.name == f"rows{suffix}"


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_integer_labels_become_their_digits(tmp_path, suffix):
    path = write(tmp_path / f"rows{suffix}", {"sentence": ["a", "b"], "y": [0, 1]})

    assert read_examples(path, text="sentence", label="y").labels == ("0", "1")


def test_a_byte_order_mark_does_not_hide_the_first_column(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text,label\na,x\nb,y\n", encoding="utf-8-sig")

    assert read_examples(path, text=None, label=None).labels == ("x", "y")


def test_a_missing_file_is_told_with_its_neighbours(tmp_path):
    write(tmp_path / "train.csv", ROWS)
    missing = tmp_path / "trian.csv"

    assert refusal(missing) == (f"There is no file {missing}. Did you mean 'train.csv'? Give the path of a data file.")


def test_a_folder_and_an_unknown_suffix_are_refused(tmp_path):
    (tmp_path / "rows.xlsx").touch()

    assert refusal(tmp_path) == (
        f"{tmp_path} is a folder: give the path of a data file (.csv, .tsv, .jsonl, .ndjson, .parquet, .npz)."
    )
    assert refusal(tmp_path / "rows.xlsx") == (
        f"{tmp_path / 'rows.xlsx'} ends in '.xlsx': give a file that ends in "
        ".csv, .tsv, .jsonl, .ndjson, .parquet, .npz."
    )


def test_a_wrong_column_is_told_with_the_columns_there_are(tmp_path):
    path = write(tmp_path / "rows.csv", {"texts": ["a", "b"], "label": ["x", "y"]})

    assert refusal(path) == (
        f"{path} has no column 'text', only 'texts', 'label'. Did you mean 'texts'? Name the text column with `text`, "
        "or images and sounds with `file`."
    )


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl"])
def test_an_empty_file_is_refused(tmp_path, name):
    (tmp_path / name).touch()

    assert refusal(tmp_path / name) == (f"{tmp_path / name} is empty: give a file with an input and a label column.")


def test_a_header_without_rows_is_refused(tmp_path):
    (tmp_path / "rows.csv").write_text("text,label\n")

    assert refusal(tmp_path / "rows.csv") == (
        f"{tmp_path / 'rows.csv'} has no rows: give a file with at least one example of each of two classes."
    )


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_empty_texts_are_told_by_their_rows(tmp_path, suffix):
    texts = ["a", "", "b", *[" "] * 6]
    path = write(tmp_path / f"rows{suffix}", {"text": texts, "label": list("xyxyxyxyx")})

    assert refusal(path) == (
        f"Column 'text' of {path} is empty in data rows 2, 4, 5, 6, 7 and 2 more: fill in or remove these rows."
    )


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_missing_label_is_told_by_its_row(tmp_path, suffix):
    path = write(tmp_path / f"rows{suffix}", {"text": ["a", "b", "c"], "label": ["x", None, "y"]})

    assert refusal(path) == f"Column 'label' of {path} is empty in data row 2: label or remove these rows."


def test_one_class_only_is_refused(tmp_path):
    path = write(tmp_path / "rows.csv", {"text": ["a", "b"], "label": ["x", "x"]})

    assert refusal(path) == (
        f"Column 'label' of {path} holds the one class 'x': give examples of at least two classes."
    )


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("rows.jsonl", b'{"text": "a", "label": "x"}\n{"text": ', "line 2: Expecting value"),
        ("rows.jsonl", b"[1, 2]", "line 1 is no JSON object"),
        ("rows.csv", b"text,label\na,x\n\xff\xfe,y\n", "'utf-8' codec can't decode byte 0xff"),
        ("rows.csv", b"text,label\na, b,x\nc,y\n", "Length of header or names does not match"),
        ("rows.parquet", b"no parquet", "Parquet magic bytes not found"),
    ],
)
def test_a_file_that_cannot_be_parsed_is_told_in_one_line(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)

    message = refusal(tmp_path / name)

    assert message.startswith(f"{tmp_path / name} could not be read as {name.split('.')[1].upper()}: ")
    assert reason in message
    assert message.endswith("Check the file, or its suffix.")
    assert "\n" not in message


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_second_text_column_makes_pairs(tmp_path, suffix):
    path = write(tmp_path / f"rows{suffix}", {"text": ["a", "b"], "hypothesis": ["c", "NA"], "label": ["x", "y"]})

    assert read_examples(path, pair="hypothesis").inputs == (("a", "c"), ("b", "NA"))
    assert read_examples(path, text="hypothesis", pair="text").inputs == (("c", "a"), ("NA", "b"))


def test_a_pair_without_its_second_text_is_told(tmp_path):
    path = write(tmp_path / "rows.csv", {"text": ["a", "b"], "other": ["c", ""], "label": ["x", "y"]})

    assert (
        refusal(path, pair="other") == f"Column 'other' of {path} is empty in data row 2: fill in or remove these rows."
    )
    assert refusal(path, pair="othr") == (
        f"{path} has no column 'othr', only 'text', 'other', 'label'. Did you mean 'other'? "
        "Name the pair column with `pair`."
    )


def test_a_column_cannot_be_label_and_input_or_both_texts(tmp_path):
    path = write(tmp_path / "rows.csv", ROWS)

    assert refusal(path, pair="label") == (
        f"Of {path}, the column 'label' was named as label and 'text', 'label' as input: name another column for each."
    )
    assert "'text', 'text' as input" in refusal(path, pair="text")
    assert "'label' as input" in refusal(path, signal="label")


@pytest.mark.parametrize(
    ("named", "seen"),
    [
        ({"text": "text", "file": "image"}, "`text` and `file`"),
        ({"pair": "other", "ids": "ids"}, "`text` and `ids`"),
        ({"file": "image", "signal": "t*", "ids": "ids"}, "`file` and `signal`"),
    ],
)
def test_two_kinds_of_input_are_refused(tmp_path, named, seen):
    assert refusal(tmp_path / "rows.csv", SettingsError, **named) == (
        f"Two kinds of input are named, {seen}: name one, of `text` (with or without `pair`), `file`, "
        "`signal` and `ids`."
    )


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_paths_start_from_the_folder_of_the_data_file(tmp_path, suffix):
    (tmp_path / "images").mkdir()
    for name in ("images/a.png", "b.png"):
        (tmp_path / name).touch()
    path = write(tmp_path / f"rows{suffix}", {"image": ["images/a.png", str(tmp_path / "b.png")], "label": ["x", "y"]})

    examples = read_examples(path, file="image")

    assert examples.kind == "file"
    assert examples.inputs == (tmp_path / "images" / "a.png", tmp_path / "b.png")


def test_a_file_that_is_not_there_is_told_by_its_row(tmp_path):
    (tmp_path / "a.png").touch()
    path = write(tmp_path / "rows.csv", {"image": ["a.png", "b.png", "a.png", "."], "label": list("xyxy")})

    assert refusal(path, file="image") == (
        f"Column 'image' of {path} names a file that is not there in data rows 2, 4: there is no "
        f"{tmp_path / 'b.png'}. Correct the paths, which start from the folder of the data file, or remove these rows."
    )


SIGNALS = {"t1": [0.5, -1.0], "label": ["x", "y"], "t0": [3, 1e-3], "t[mV]": [7, 8]}


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
@pytest.mark.parametrize(
    ("signal", "expected"),
    [
        ("t?", [[0.5, 3.0], [-1.0, 0.001]]),
        ("t0, t1", [[0.5, 3.0], [-1.0, 0.001]]),  # in the order of the file
        ("*", [[0.5, 3.0, 7.0], [-1.0, 0.001, 8.0]]),  # a pattern leaves the label out
        ("t1,t[mV]", [[0.5, 7.0], [-1.0, 8.0]]),
        ("t[mV]", [[7.0], [8.0]]),
    ],
)
def test_columns_of_numbers_become_an_array(tmp_path, suffix, signal, expected):
    examples = read_examples(write(tmp_path / f"rows{suffix}", SIGNALS), signal=signal)

    assert examples.inputs.dtype == np.float32
    np.testing.assert_array_equal(examples.inputs, np.array(expected, dtype=np.float32))
    assert examples.labels == ("x", "y")


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
@pytest.mark.parametrize("cell", ["n/a", "", "nan", "inf", "1e39"])
def test_a_cell_that_is_no_finite_number_is_told_by_row_and_column(tmp_path, suffix, cell):
    path = write(tmp_path / f"rows{suffix}", {"t0": [1, 2, 3], "t1": ["1", "2", cell], "label": list("xyx")})

    assert refusal(path, signal="t*") == (
        f"Column 't1' of {path} holds {cell!r} in data row 3: give a finite number, remove the row, or leave the "
        "column out of `signal`."
    )


def test_a_pattern_without_a_column_is_told(tmp_path):
    path = write(tmp_path / "rows.csv", SIGNALS)

    assert refusal(path, signal="t0,t2") == (
        f"{path} has no column 't2', as a name or a pattern, only 't1', 'label', 't0', 't[mV]'. Did you mean 't1' or "
        "'t0'? Name the columns of numbers with `signal`, as a pattern ('t*') or as names separated by commas."
    )
    assert refusal(path, SettingsError, signal=" ,") == (
        "`signal` is ' ,': give a pattern ('t*') or column names separated by commas."
    )


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 2, 2)])
def test_a_column_of_lists_becomes_an_array_of_their_shape(tmp_path, suffix, shape):
    values = np.random.default_rng(0).normal(size=(4, *shape)).astype(np.float32)
    path = write(tmp_path / f"rows{suffix}", {"beat": values.tolist(), "label": list("xyxy")})

    inputs = read_examples(path, signal="b*").inputs

    assert inputs.dtype == np.float32
    np.testing.assert_array_equal(inputs, values)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_lists_of_unequal_length_are_told_by_their_row(tmp_path, suffix):
    path = write(tmp_path / f"rows{suffix}", {"beat": [[1, 2], [3, 4], [5]], "label": list("xyx")})

    assert refusal(path, signal="beat") == (
        f"Column 'beat' of {path} holds numbers of shape (1,) in data row 3, but of (2,) in data row 1: "
        "cut or fill them up to one shape."
    )


@pytest.mark.parametrize(
    ("cell", "shown"),
    [
        ([[1], [2, 3]], "[[1], [2, 3]]"),
        ([1, None], "[1, None]"),
        ([], "[]"),
        ("a", "'a'"),
        (["a" * 50], "['" + "a" * 38),
    ],
)
def test_a_list_that_is_not_of_numbers_is_told_by_its_row(tmp_path, cell, shown):
    path = write(tmp_path / "rows.jsonl", {"beat": [[1, 2], cell], "label": list("xy")})

    assert refusal(path, signal="beat") == (
        f"Column 'beat' of {path} holds {shown}{'...' if 'aaa' in shown else ''} in data row 2: give a list of finite "
        "numbers, or of lists of equal length, or remove the row."
    )


@pytest.mark.parametrize(
    ("suffix", "cells"),
    [
        (".csv", ["5 66  5", "7"]),
        (".jsonl", [[5, 66, 5], [7]]),
        (".jsonl", ["5 66 5", 7]),
        (".parquet", [[5, 66, 5], [7]]),
        (".parquet", ["5 66 5", "7"]),
    ],
)
def test_token_ids_are_read_from_texts_and_from_lists(tmp_path, suffix, cells):
    examples = read_examples(write(tmp_path / f"rows{suffix}", {"calls": cells, "label": ["x", "y"]}), ids="calls")

    assert examples.inputs == ((5, 66, 5), (7,))
    assert all(type(i) is int for row in examples.inputs for i in row)


@pytest.mark.parametrize("cell", ["5 -1", "5 a", "[5, 6]", [5, -1], [5.5], [True], [5, None], [2**31]])
def test_what_is_no_token_id_is_told_by_its_row(tmp_path, cell):
    path = write(tmp_path / "rows.jsonl", {"ids": ["1", cell], "label": ["x", "y"]})

    assert refusal(path, ids="ids") == (
        f"Column 'ids' of {path} holds {cell!r} in data row 2: give token ids, whole numbers from 0 to 2147483647, "
        "separated by blanks or as a list."
    )


def test_an_example_without_token_ids_is_told_by_its_row(tmp_path):
    path = write(tmp_path / "rows.jsonl", {"ids": ["1", "", [], None], "label": list("xyxy")})

    assert refusal(path, ids="ids") == (
        f"Column 'ids' of {path} is empty in data rows 2, 3, 4: fill in or remove these rows."
    )


IMAGES = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)


@pytest.mark.parametrize(
    ("arrays", "named"),
    [
        ({"inputs": IMAGES, "labels": ["7", "é"]}, {}),
        ({"inputs": IMAGES, "label": ["7", "é"], "labels": ["a", "b"]}, {}),
        ({"x": IMAGES, "y": ["7", "é"], "labels": ["a", "b"]}, {"signal": "x", "label": "y"}),
    ],
)
def test_an_archive_of_arrays_gives_inputs_and_labels(tmp_path, arrays, named):
    np.savez(tmp_path / "digits.npz", **arrays)

    examples = read_examples(tmp_path / "digits.npz", **named)

    assert examples.inputs.dtype == np.uint8
    np.testing.assert_array_equal(examples.inputs, IMAGES)
    assert (examples.labels, examples.name) == (("7", "é"), "digits.npz")


def test_fractions_of_an_archive_become_float32_and_integer_labels_their_digits(tmp_path):
    np.savez(tmp_path / "beats.npz", inputs=np.array([[0.1], [0.2]]), labels=np.array([3, 5]))

    examples = read_examples(tmp_path / "beats.npz", signal="inputs")

    np.testing.assert_array_equal(examples.inputs, np.array([[0.1], [0.2]], dtype=np.float32))
    assert examples.labels == ("3", "5")


@pytest.mark.parametrize(
    ("arrays", "named", "message"),
    [
        (
            {"input": IMAGES, "labels": ["a", "b"]},
            {},
            "{path} has no array 'inputs', only 'input', 'labels'. Did you mean 'input'? "
            "Name the array of inputs with `signal`.",
        ),
        (
            {"inputs": IMAGES, "y": ["a", "b"]},
            {},
            "{path} has no array 'label', only 'inputs', 'y'. Name the array of labels with `label`.",
        ),
        (
            {"inputs": ["a", "b"], "labels": ["a", "b"]},
            {},
            "Array 'inputs' of {path} has dtype <U1 and shape (2,): give numbers of two axes or more, example first.",
        ),
        (
            {"inputs": [[0.0], [np.nan], [1e39]], "labels": ["a", "b", "c"]},
            {},
            "Array 'inputs' of {path} holds a number that is not finite in examples 2, 3: "
            "correct or remove these examples.",
        ),
        (
            {"inputs": IMAGES, "labels": [0.5, 1.0]},
            {},
            "Array 'labels' of {path} has dtype float64 and shape (2,): give one text or integer for each example.",
        ),
        (
            {"inputs": IMAGES, "labels": ["a", ""]},
            {},
            "Array 'labels' of {path} is empty in example 2: label or remove these examples.",
        ),
        (
            {"inputs": IMAGES, "labels": [1, 1]},
            {},
            "Array 'labels' of {path} holds the one class '1': give examples of at least two classes.",
        ),
        (
            {"inputs": IMAGES, "labels": [1, 2, 3]},
            {},
            "rows.npz has 2 inputs but 3 labels: give one label for each input.",
        ),
        (
            {"inputs": np.array([[{}], [{}]]), "labels": [1, 2]},
            {},
            "{path} could not be read as NPZ: Object arrays cannot be loaded when allow_pickle=False. "
            "Check the file, or its suffix.",
        ),
    ],
)
def test_an_archive_that_cannot_be_used_is_refused(tmp_path, arrays, named, message):
    path = tmp_path / "rows.npz"
    np.savez(path, **arrays)

    assert refusal(path, **named) == message.format(path=path)


def test_an_archive_has_no_columns_and_must_be_one(tmp_path):
    path = tmp_path / "rows.npz"
    path.write_bytes(b"text,label")

    assert refusal(path) == (
        f"{path} could not be read as NPZ: it is no archive of arrays. Check the file, or its suffix."
    )
    assert refusal(path, SettingsError, text="text") == (
        f"{path} holds arrays, not columns of `text`: name its array of inputs with `signal`, or leave `text` out."
    )


def test_heartbeats_system_calls_and_news_are_read_as_they_stand(shared):
    beats = read_examples(shared / "data" / "ecg5000" / "test.csv", signal="t*")
    calls = read_examples(shared / "data" / "adfa_ld" / "test.csv", ids="text")
    news = read_examples(shared / "data" / "ag_news" / "test.csv")

    assert beats.inputs.shape == (150, 140)  # rows and columns as the data set's own description has them
    assert beats.labels.count("r-on-t-pvc") == 53
    np.testing.assert_array_equal(
        beats.inputs,
        np.loadtxt(shared / "data" / "ecg5000" / "test.csv", np.float32, delimiter=",", skiprows=1, usecols=range(140)),
    )
    assert calls.inputs[0][:5] == (311, 240, 240, 78, 33)
    assert max(map(len, calls.inputs)) == 160
    assert news.kind == "text"
    assert len(news) == 1900
