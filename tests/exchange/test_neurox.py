"""`neurox/states.json` and `.hdf5` were written by NeuroX 1.0.9 itself: see `written` for what it was given."""

import json
import shutil
import sys
from pathlib import Path

import jaxtyping
import numpy as np
import pytest

from synapse.data.examples import Examples
from synapse.errors import DataError, LabelError, SettingsError
from synapse.exchange.neurox import read_neurox
from synapse.probe.probe import fit_probes

FILES = Path(__file__).parent / "neurox"
SENTENCES = ("stocks fell on friday", "the team won", "stocks fell on friday", "rates rose")
TAGS = ("N V P N", "D N V", "N V P N", "N V")
TOPICS = ("business", "sport", "business", "business")


def written(sentence: int) -> np.ndarray:
    """What NeuroX was given: (layer, token, unit)."""
    layer, token, unit = np.ogrid[0:3, 0 : len(SENTENCES[sentence].split()), 0:5]
    return np.sin(100.0 * sentence + 17.0 * layer + 3.0 * token + unit)


@pytest.fixture(params=["json", "hdf5"])
def file(request):
    if request.param == "hdf5":
        pytest.importorskip("h5py")
    return FILES / f"states.{request.param}"


def write_lines(path, *sentences):
    """Sentences as lists of tokens, each a list of layers, each a list of values."""
    lines = [
        {
            "linex_index": number,
            "features": [
                {"token": "t", "layers": [{"index": i, "values": values} for i, values in enumerate(layers)]}
                for layers in tokens
            ],
        }
        for number, tokens in enumerate(sentences)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def refusal(error, *arguments, **options):
    with pytest.raises(error) as caught:
        read_neurox(*arguments, **options)
    return str(caught.value)


def test_every_token_is_an_example_with_its_own_label(file):
    activations = read_neurox(file, TAGS)
    assert activations.values.shape == (2, 13, 5)  # without the embeddings
    expected = np.concatenate([written(sentence)[1:] for sentence in range(4)], axis=1)
    np.testing.assert_allclose(activations.values, expected, atol=1e-7 if file.suffix == ".hdf5" else 1.1e-7)
    assert activations.labels == ("D", "N", "P", "V")
    assert "".join(activations.labels[i] for i in activations.targets) == "NVPNDNVNVPNNV"


@pytest.mark.parametrize(
    ("rows", "of_tokens"),
    [("first", lambda x: x[:, 0]), ("last", lambda x: x[:, -1]), ("mean", lambda x: x.mean(axis=1))],
)
def test_a_sentence_is_an_example_by_one_of_its_tokens_or_their_mean(file, rows, of_tokens):
    activations = read_neurox(file, TOPICS, rows=rows)
    expected = np.stack([of_tokens(written(sentence))[1:] for sentence in range(4)], axis=1)
    np.testing.assert_allclose(activations.values, expected, atol=2e-7)
    assert activations.targets.tolist() == [0, 1, 0, 0]
    assert activations.values.dtype == np.float32


def test_both_kinds_of_file_are_the_same_examples_as_the_texts_themselves():
    pytest.importorskip("h5py")
    sources = {read_neurox(FILES / f"states.{kind}", TOPICS, rows="last").source for kind in ("json", "hdf5")}
    assert sources == {Examples(SENTENCES, TOPICS, "texts").fingerprint}


def test_layers_are_taken_in_the_count_of_the_file(file):
    every = read_neurox(file, TOPICS, rows="first", layers=range(3))
    assert every.n_layers == 3
    np.testing.assert_array_equal(read_neurox(file, TOPICS, rows="first", layers=[2, 0]).values, every.values[[2, 0]])
    assert refusal(SettingsError, file, TOPICS, rows="first", layers=[1, 3]) == (
        f"{file} has the layers 0 to 2, but [3] was asked for: give some of these."
    )


def test_a_file_of_one_layer_is_taken_whole(tmp_path):
    file = write_lines(tmp_path / "a.json", [[[1.0, 2.0]]], [[[3.0, 4.0]]])
    assert read_neurox(file, ["a", "b"], rows="first").values.tolist() == [[[1, 2], [3, 4]]]


def test_labels_are_read_from_a_file_as_neurox_has_it(file, tmp_path):
    (tmp_path / "labels.txt").write_text("\n".join(TAGS) + "\n")
    read = read_neurox(file, tmp_path / "labels.txt")
    assert read.targets.tolist() == read_neurox(file, [line.split() for line in TAGS]).targets.tolist()


def test_classes_give_the_order_of_targets(file):
    activations = read_neurox(file, TOPICS, rows="last", classes=("world", "sport", "business"))
    assert activations.labels == ("world", "sport", "business")
    assert activations.targets.tolist() == [2, 1, 2, 2]
    with pytest.raises(LabelError, match="'sport'"):
        read_neurox(file, TOPICS, rows="last", classes=("world", "business"))


def test_the_logits_are_said_to_be_unknown(file):
    assert read_neurox(file, TOPICS, rows="last").logits is None


def test_probes_are_fitted_on_what_neurox_has_extracted(tmp_path):
    """Unit 1 of the last layer, and nothing else, is the class."""
    random = np.random.default_rng(0)
    classes = random.integers(0, 2, 120)
    states = random.normal(size=(120, 3, 4)).round(3)
    states[:, 2, 1] += 6 * classes
    file = write_lines(tmp_path / "a.json", *[[one.tolist()] for one in states])
    probes = fit_probes(read_neurox(file, [f"c{c}" for c in classes], rows="first"))
    assert np.abs(probes[1].weights).max(axis=0).argmax() == 1
    assert probes[1].predict(states[:, 2].astype(np.float32)).tolist() == classes.tolist()


def test_labels_that_are_not_as_many_as_tokens_are_refused(file):
    assert refusal(DataError, file, (TAGS[0], "D N", *TAGS[2:])) == (
        f"Sentence 2 of {file} has 3 tokens and 2 labels: give one a token (NeuroX cuts a sentence that is longer than "
        "the model takes), or choose other `rows`, with one label a sentence."
    )


@pytest.mark.parametrize("lines", [TOPICS[:3], (*TOPICS, "sport")])
def test_lines_of_labels_that_are_not_as_many_as_sentences_are_refused(file, lines):
    assert refusal(DataError, file, lines, rows="last") == (
        f"{file} has 4 sentences, and there are {len(lines)} lines of labels: give one line a sentence."
    )


def test_a_list_of_labels_is_not_the_label_of_a_sentence(file):
    assert refusal(DataError, file, [["a", "b"]] * 4, rows="first") == (
        "The label of sentence 1 is ['a', 'b']; with rows='first' each sentence has one label, a text that is not "
        "empty: give that, or rows='every' with one label a token."
    )


def test_an_unknown_choice_of_rows_is_refused(file, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # it would refuse the call before
    assert refusal(SettingsError, file, TOPICS, rows="lst") == (
        "There is no choice of rows 'lst'; there are every, first, last, mean. Did you mean 'last' or 'first'?"
    )


def test_what_is_no_file_of_neurox_is_refused(tmp_path):
    missing, other = tmp_path / "a.json", tmp_path / "a.pt"
    assert refusal(DataError, missing, TOPICS) == (
        f"There is no file {missing}: give the path of a file that NeuroX wrote."
    )
    other.touch()
    assert refusal(DataError, other, TOPICS) == (
        f"{other} ends in '.pt': give a file that NeuroX wrote as .json or .hdf5."
    )


def test_a_file_that_is_cut_off_is_refused(file, tmp_path):
    cut = tmp_path / file.name
    cut.write_bytes(file.read_bytes()[:-300])
    said = refusal(DataError, cut, TOPICS, rows="last")
    expected = f"Line 4 of {cut} is no sentence" if file.suffix == ".json" else f"{cut} cannot be read as an HDF5 file"
    assert said.startswith(expected)
    assert "xtract it again" in said


def test_an_hdf5_file_that_was_never_closed_or_lacks_a_sentence_is_refused(tmp_path):
    h5py = pytest.importorskip("h5py")
    file = Path(shutil.copy(FILES / "states.hdf5", tmp_path))
    with h5py.File(file, "a") as opened:
        del opened["2"]
    assert refusal(DataError, file, TOPICS, rows="last") == (
        f"{file} has 4 sentences, but none with the index 2: extract it again."
    )
    with h5py.File(file, "a") as opened:
        del opened["sentence_to_index"]
    assert refusal(DataError, file, TOPICS, rows="last") == (
        f"{file} has no `sentence_to_index`, which NeuroX writes at its end: extract it again."
    )


def test_without_h5py_its_install_command_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    assert refusal(SettingsError, FILES / "states.hdf5", TOPICS, rows="last") == (
        "h5py is not installed; install it with `pip install h5py`, or `pip install 'synapse[exchange]'`."
    )


@pytest.mark.parametrize(
    ("sentences", "expected"),
    [
        (([[[1.0]]], []), "Sentence 2 of {} has no tokens: leave it out, and its line of labels."),
        (
            ([[[1.0]]], [[[float("nan")]]]),
            "Sentence 2 of {} has values that are not finite: leave it out, and its line of labels.",
        ),
        (
            ([[[1.0]]], [[[1.0, 2.0]]]),
            "Sentence 2 of {} has 1 layers of 2 units and the first has 1 of 1: extract all with one model.",
        ),
    ],
)
def test_sentences_of_which_no_examples_can_be_made_are_refused(tmp_path, sentences, expected):
    file = write_lines(tmp_path / "a.json", *sentences)
    assert refusal(DataError, file, ["a", "b"], rows="first") == expected.format(file)


def test_a_missing_file_of_labels_is_refused(file, tmp_path):
    missing = tmp_path / "labels.txt"
    assert refusal(DataError, file, missing) == (
        f"There is no file {missing}: give the path of a file of labels, or the labels themselves."
    )
