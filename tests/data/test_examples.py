import json

import numpy as np
import pandas as pd
import pytest

from synapse.data.examples import (
    Examples,
    read_examples,
    sample_examples,
    shared_inputs,
    split_examples,
)
from synapse.errors import DataError, LabelError, SettingsError

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


def refusal(path, **columns):
    with pytest.raises(DataError) as caught:
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
        f"{tmp_path} is a folder: give the path of a data file (.csv, .tsv, .jsonl, .ndjson, .parquet)."
    )
    assert refusal(tmp_path / "rows.xlsx") == (
        f"{tmp_path / 'rows.xlsx'} ends in '.xlsx': give a file that ends in .csv, .tsv, .jsonl, .ndjson, .parquet."
    )


def test_a_wrong_column_is_told_with_the_columns_there_are(tmp_path):
    path = write(tmp_path / "rows.csv", {"texts": ["a", "b"], "label": ["x", "y"]})

    assert refusal(path) == (
        f"{path} has no column 'text', only 'texts', 'label'. Did you mean 'texts'? Name the text column with `text`."
    )


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl"])
def test_an_empty_file_is_refused(tmp_path, name):
    (tmp_path / name).touch()

    assert refusal(tmp_path / name) == (f"{tmp_path / name} is empty: give a file with a text and a label column.")


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


def labelled(*labels):
    return Examples(tuple(f"text {i}" for i in range(len(labels))), labels, "test.csv")


def test_inputs_and_labels_of_different_number_are_refused():
    with pytest.raises(DataError) as caught:
        Examples(("a", "b"), ("x",), "test.csv")

    assert str(caught.value) == "test.csv has 2 inputs but 1 labels: give one label for each input."


@pytest.mark.parametrize(
    ("found", "known", "expected"),
    [
        (("sqli", "benign", "sqli"), ("benign", "sqli", "xss"), [1, 0, 1]),
        (("SQLi", "Benign"), ("benign", "sqli"), [1, 0]),
        (("2", "0"), ("benign", "sqli", "xss"), [2, 0]),
        (("1", "0"), ("LABEL_0", "LABEL_1"), [1, 0]),
        (("1", "0"), ("1", "0"), [0, 1]),
        (("spam", "Spam"), ("Spam", "spam"), [1, 0]),
    ],
)
def test_labels_become_positions_by_name_then_by_case_then_by_id(found, known, expected):
    targets = labelled(*found).targets(known)

    assert targets.dtype == np.int64
    assert targets.tolist() == expected


def test_an_unknown_label_is_told_with_the_known_ones_and_the_near():
    with pytest.raises(LabelError) as caught:
        labelled("benign", "sqly", "xss").targets(("benign", "sqli", "xss"))

    assert str(caught.value) == (
        "test.csv has labels that the classifier does not know: 'sqly'. It knows 'benign', 'sqli', 'xss'. "
        "Did you mean 'sqli'? Correct the file, "
        "or pass the class names in the order of the logits with `--labels`."
    )


def test_generic_class_names_are_told_with_the_way_out():
    with pytest.raises(LabelError) as caught:
        labelled("ham", "spam").targets(("LABEL_0", "LABEL_1"))

    assert str(caught.value) == (
        "test.csv has labels that the classifier does not know: 'ham', 'spam'. "
        "The classifier's own names are generic ('LABEL_0', 'LABEL_1'): "
        "pass the 2 class names in the order of the logits with `--labels`."
    )


@pytest.mark.parametrize(
    ("found", "known"),
    [
        (("SPAM",), ("Spam", "spam")),  # two classes differ by case only
        (("0", "1"), ("1", "2")),  # classes named by numbers: 0 is no id here
        (("2",), ("no", "yes")),  # an id beyond the last class
    ],
)
def test_ambiguous_labels_are_not_guessed(found, known):
    with pytest.raises(LabelError):
        labelled(*found).targets(known)


def test_taking_rows_keeps_their_order_for_texts_and_arrays():
    texts = labelled("x", "y", "z").take([2, 0])
    arrays = Examples(np.arange(6.0).reshape(3, 2), ("x", "y", "z"), "array").take(np.array([2, 0]))

    assert (texts.inputs, texts.labels, len(texts)) == (("text 2", "text 0"), ("z", "x"), 2)
    assert arrays.inputs.tolist() == [[4.0, 5.0], [0.0, 1.0]]


def test_the_fingerprint_sees_content_and_order_but_not_the_name():
    one = Examples(("ab", "c"), ("x", "y"), "one")

    assert one.fingerprint == Examples(["ab", "c"], ("x", "y"), "other").fingerprint
    assert len(one.fingerprint) == 64
    others = [
        Examples(("a", "bc"), ("x", "y"), "one"),
        Examples(("c", "ab"), ("y", "x"), "one"),
        Examples(("ab", "c"), ("x", "z"), "one"),
        Examples(np.zeros((2, 3)), ("x", "y"), "one"),
        Examples(np.zeros((2, 3), dtype=np.float32), ("x", "y"), "one"),
    ]
    assert len({one.fingerprint, *(other.fingerprint for other in others)}) == 6


def test_a_text_cut_inside_an_emoji_has_a_fingerprint():
    assert len(Examples(("\ud83d", "b"), ("x", "y"), "cut").fingerprint) == 64


def test_shared_inputs_counts_the_rows_of_the_second_that_the_first_has():
    a, b = Examples(("p", "q"), ("x", "y"), "a"), Examples(("q", "r", "q"), ("x", "x", "y"), "b")
    rows = np.array([[1.0, 2.0], [3.0, 4.0]])

    assert shared_inputs(a, b) == 2
    assert shared_inputs(b, a) == 1
    assert shared_inputs(Examples(rows, ("x", "y"), "c"), Examples(rows[1:], ("x",), "d")) == 1
    assert shared_inputs(a, Examples(rows, ("x", "y"), "c")) == 0


def test_a_split_takes_the_same_share_of_every_class_and_loses_nothing():
    examples = labelled(*["x"] * 40, *["y"] * 20, *["z"] * 2)

    train, test = split_examples(examples, test_share=0.25, seed=3)

    # 62 / 4 = 15.5, rounded to the even 16; shares 10.3, 5.2 and 0.5, of which z keeps one in either part
    assert [test.labels.count(name) for name in "xyz"] == [10, 5, 1]
    assert sorted(train.inputs + test.inputs) == sorted(examples.inputs)
    assert test.inputs == split_examples(examples, test_share=0.25, seed=3)[1].inputs
    assert test.inputs != split_examples(examples, test_share=0.25, seed=4)[1].inputs
    assert (train.name, test.name) == ("test.csv, train part", "test.csv, test part")


def test_a_class_with_one_row_cannot_be_split():
    with pytest.raises(DataError) as caught:
        split_examples(labelled("x", "x", "y"), seed=0)

    assert str(caught.value) == (
        "test.csv cannot be split: 'y' occurs once only, but each class needs at least 2 examples. "
        "Add examples, or remove the class."
    )


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_share_that_leaves_a_part_empty_is_refused(share):
    with pytest.raises(SettingsError, match="give a share between 0 and 1"):
        split_examples(labelled("x", "x", "y", "y"), test_share=share, seed=0)


@pytest.mark.parametrize(
    ("n", "expected"),
    [
        (10, [7, 2, 1]),  # 7.0, 2.9, 0.1: the rare class keeps one, at the cost of the largest remainder
        (3, [1, 1, 1]),
        (2, [1, 1, 0]),  # 1.4, 0.58, 0.02: floors 1, 0, 0, and the largest remainder is the second
        (500, [70, 29, 1]),
    ],
)
def test_a_sample_has_the_class_shares_by_largest_remainder(n, expected):
    targets = np.repeat([0, 3, 4], [70, 29, 1])

    rows = sample_examples(targets, n, seed=0)

    assert [int(np.sum(targets[rows] == c)) for c in (0, 3, 4)] == expected
    assert np.all(np.diff(rows) > 0)


def test_a_sample_depends_on_the_seed_only():
    targets = np.repeat([0, 1], 50)

    assert sample_examples(targets, 20, seed=1).tolist() == sample_examples(targets, 20, seed=1).tolist()
    assert sample_examples(targets, 20, seed=1).tolist() != sample_examples(targets, 20, seed=2).tolist()


def test_an_empty_sample_is_refused():
    with pytest.raises(SettingsError) as caught:
        sample_examples(np.array([0, 1]), 0, seed=0)

    assert str(caught.value) == "A sample of 0 examples was asked for: ask for at least 1."
