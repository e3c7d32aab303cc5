import hashlib
from pathlib import Path

import numpy as np
import pytest

from synapse.data.inputs import content_bytes, identities, kind_of
from synapse.errors import DataError


@pytest.mark.parametrize(
    ("item", "kind"),
    [
        ("a text", "text"),
        (("a", "b"), "pair"),
        (["a", "b"], "pair"),
        (Path("a.png"), "file"),
        ((1, 2, 3), "ids"),
        ([np.int64(1)], "ids"),
        ([0.5, 1.0], "array"),
        ([[1, 2], [3, 4]], "array"),
        (np.arange(3), "array"),
        (np.zeros((2, 2), dtype=np.uint8), "array"),
    ],
)
def test_an_input_says_of_which_kind_it_is(item, kind):
    assert kind_of(item) == kind


@pytest.mark.parametrize("item", [None, {"a": 1}, ("a", "b", "c"), ("a", 1), [[1], [2, 3]], b"bytes"])
def test_what_is_no_input_is_refused(item):
    with pytest.raises(DataError) as caught:
        content_bytes(item)

    assert str(caught.value) == (
        f"An input is a {type(item).__name__}: give a text, a pair of texts, a pathlib.Path, "
        "a tuple of token ids or an array of numbers."
    )


def test_the_bytes_of_an_input_are_its_content(tmp_path):
    (tmp_path / "a.wav").write_bytes(b"sound")

    assert content_bytes("naïve") == b"na\xc3\xafve"
    assert content_bytes("\ud83d") == b"\xed\xa0\xbd"  # half an emoji
    assert content_bytes(tmp_path / "a.wav") == hashlib.sha256(b"sound").digest()
    assert content_bytes(np.array([1.0, 2.0], dtype=np.float32)) == bytes.fromhex("0000803f00000040")
    assert content_bytes(np.arange(6.0).reshape(2, 3).T) == np.array([0.0, 3, 1, 4, 2, 5]).tobytes()


@pytest.mark.parametrize(
    "items",
    [
        [("ab", "c"), ("a", "bc"), ("abc", ""), ("", "abc")],
        [(1, 2), (12,), (1, 2, 0), (2, 1), (258,), (2**31 - 1,)],
    ],
    ids=["pairs", "token ids"],
)
def test_unlike_inputs_have_unlike_bytes_and_lists_those_of_tuples(items):
    assert len({content_bytes(item) for item in items}) == len(items)
    assert [content_bytes(list(item)) for item in items] == [content_bytes(item) for item in items]


def test_identities_tell_kinds_dtypes_and_shapes_apart():
    items = [
        "\0" * 16,
        (0, 0),
        np.zeros(2, dtype=np.int64),
        np.zeros(2),
        np.zeros((1, 2)),
        np.zeros(4, dtype=np.float32),
    ]

    assert len({content_bytes(item) for item in items}) == 1
    assert len(set(identities(items))) == len(items)


def test_a_file_that_has_gone_is_told(tmp_path):
    with pytest.raises(DataError) as caught:
        content_bytes(tmp_path / "gone.png")

    assert str(caught.value) == (
        f"{tmp_path / 'gone.png'} cannot be read (No such file or directory): "
        "put the file back, or read the examples anew."
    )
