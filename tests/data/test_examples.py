from pathlib import Path

import numpy as np
import pytest

from synapse.data.examples import Examples, sample_examples, shared_inputs, split_examples
from synapse.errors import DataError, LabelError, SettingsError


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


def test_the_same_bytes_in_another_kind_are_another_data_set(tmp_path):
    (tmp_path / "a").write_bytes(bytes(16))
    inputs = [
        (b"\0" * 16).decode(),
        ("", "\0" * 8),  # the length of the first text, and the second
        (0, 0),
        np.zeros(2),
        np.zeros(4, dtype=np.float32),
        np.zeros((2, 2), dtype=np.float32),
        tmp_path / "a",
    ]

    assert len({Examples([item], ("x",), "one").fingerprint for item in inputs}) == len(inputs)


def test_two_files_are_one_input_if_their_content_is_and_a_changed_file_is_another(tmp_path):
    for name, content in {"a.png": b"1", "copy.png": b"1", "b.png": b"2"}.items():
        (tmp_path / name).write_bytes(content)
    a, copy, b = (Examples((tmp_path / name,), ("x",), name) for name in ("a.png", "copy.png", "b.png"))

    assert a.fingerprint == copy.fingerprint != b.fingerprint
    assert (shared_inputs(a, copy), shared_inputs(a, b)) == (1, 0)
    (tmp_path / "copy.png").write_bytes(b"2")
    assert Examples(copy.inputs, ("x",), "changed").fingerprint == b.fingerprint


def test_a_text_cut_inside_an_emoji_has_a_fingerprint():
    assert len(Examples(("\ud83d", "b"), ("x", "y"), "cut").fingerprint) == 64


def test_shared_inputs_counts_the_rows_of_the_second_that_the_first_has():
    a, b = Examples(("p", "q"), ("x", "y"), "a"), Examples(("q", "r", "q"), ("x", "x", "y"), "b")
    rows = np.array([[1.0, 2.0], [3.0, 4.0]])

    assert shared_inputs(a, b) == 2
    assert shared_inputs(b, a) == 1
    assert shared_inputs(Examples(rows, ("x", "y"), "c"), Examples(rows[1:], ("x",), "d")) == 1
    assert shared_inputs(a, Examples(rows, ("x", "y"), "c")) == 0
    assert shared_inputs(Examples(np.zeros((1, 4)), ("x",), "c"), Examples(np.zeros((1, 2, 2)), ("x",), "d")) == 0
    assert shared_inputs(Examples((("p", "q"),), ("x",), "c"), Examples(("pq", ("p", "q")), ("x", "y"), "d")) == 1


@pytest.mark.parametrize(
    "inputs",
    [
        tuple((f"a {i}", f"b {i}") for i in range(8)),
        tuple(Path(f"{i}.png") for i in range(8)),
        tuple((i, i + 1) for i in range(8)),
        np.arange(48, dtype=np.uint8).reshape(8, 2, 3),
    ],
    ids=["pair", "file", "ids", "array"],
)
def test_inputs_of_every_kind_are_split_and_taken_as_they_are(inputs, request):
    examples = Examples(inputs, tuple("xy" * 4), "all")

    train, test = split_examples(examples, test_share=0.25, seed=0)

    assert examples.kind == train.kind == test.kind == request.node.callspec.id
    assert type(train.inputs) is type(inputs)
    assert sorted(map(repr, [*train.inputs, *test.inputs])) == sorted(map(repr, inputs))
    assert repr(examples.take([3]).inputs[0]) == repr(inputs[3])


def test_inputs_of_two_kinds_have_no_kind():
    with pytest.raises(DataError) as caught:
        _ = Examples(("a", ("a", "b"), (1, 2)), ("x", "y", "x"), "mixed.csv").kind

    assert str(caught.value) == "mixed.csv holds texts and pairs of texts and token ids: give inputs of one kind."


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
