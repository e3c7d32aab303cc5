"""What lies in the folder of a recording: damage is found wherever it is, and the room that it takes is told before."""

import json
import logging
import shutil
from collections import namedtuple

import numpy as np
import pytest
from planted import random_classifier, random_examples
from recorder import LOOKED_AT, counted_calls, files_of, only_recording, small_windows

import synapse.recording.folder as of_folder
from synapse.errors import ResourceError, RunFolderError
from synapse.recording import Recording, in_words, record, record_components
from synapse.recording.folder import Layout
from synapse.recording.passes import run_window

N = 20


@pytest.fixture(autouse=True)
def windows_of_a_few(monkeypatch):
    small_windows(monkeypatch)


@pytest.fixture(scope="module")
def subject():
    return random_classifier("bert"), random_examples(N, seed=1)


@pytest.fixture(scope="module")
def made(subject, tmp_path_factory):
    """A folder with one recording, and everything that it holds."""
    with pytest.MonkeyPatch.context() as patch:
        small_windows(patch)
        shelf = tmp_path_factory.mktemp("shelf")
        return shelf, everything(record(*subject, keep=shelf))


def everything(activations):
    moments = activations.class_moments
    return [
        np.asarray(activations.values),
        activations.logits,
        np.asarray(activations.features),
        activations.targets,
        activations.row_mean,
        activations.row_deviation,
        moments.count,
        moments.mean,
        moments.squares,
    ]


def kinds_of_files(folder):
    """Return a file of every kind: chunks of the first window, and all that is no chunk, of one layer and array."""
    names = sorted(files_of(folder))
    return [name for name in names if "/c/" not in name or "/c/1" in name]


NAMES = [
    "manifest.json",
    "checksums.json",
    "values.zarr/zarr.json",
    "values.zarr/residual/zarr.json",
    *(
        f"values.zarr/{name}/{file}"
        for name in ("residual/01", "logits", "features")
        for file in ("zarr.json", "c/1/0")
    ),
    *(f"values.zarr/targets/{file}" for file in ("zarr.json", "c/1")),
    "moments.zarr/zarr.json",
    *(
        f"moments.zarr/residual/{kind}/{part}/{file}"
        for kind, axes in (("rows", 1), ("classes", 2))
        for part in ("count", "mean", "squares")
        for file in ("zarr.json", "c/1" + "/0" * (axes + (part != "count")))
    ),
]


def damaged(content, damage):
    middle = len(content) // 2
    if damage == "flip":
        return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    return {"cut": content[:-1], "zeros": bytes(len(content))}[damage]


def test_these_are_all_kinds_of_files_that_there_are(made):
    shelf, _ = made
    found = set(kinds_of_files(only_recording(shelf)))
    assert set(NAMES) <= found
    for name in found - set(NAMES):
        # groups between, and layers of which one stands for all
        assert name.endswith("zarr.json") or "/residual/00/" in name or "/residual/02/" in name


def read_or_refused(subject, shelf):
    try:
        return everything(record(*subject, keep=shelf)), ""
    except RunFolderError as error:
        return [], str(error)


@pytest.mark.parametrize("damage", ["flip", "cut", "zeros", "missing"])
@pytest.mark.parametrize("name", NAMES)
def test_damage_is_named_and_never_read(made, subject, tmp_path, name, damage):
    shelf, truth = made
    shutil.copytree(shelf, tmp_path / "shelf")
    folder = only_recording(tmp_path / "shelf")
    if damage == "missing":
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(damaged((folder / name).read_bytes(), damage))

    flaws = Recording(folder).flaws()
    if name == "checksums.json" and damage == "cut":
        assert flaws == []  # the end of the last line says nothing
    else:
        assert flaws
        assert all(name in flaw or name == "checksums.json" for flaw in flaws)
    found, refused = read_or_refused(subject, tmp_path / "shelf")
    if refused:
        assert name.removesuffix("/zarr.json").split("/c/")[0] in refused
        return
    for expected, read in zip(truth, found, strict=True):
        np.testing.assert_array_equal(read, expected)


def test_a_damaged_recording_is_made_anew_with_a_warning(made, subject, tmp_path, caplog):
    shelf, truth = made
    shutil.copytree(shelf, tmp_path / "shelf")
    folder = only_recording(tmp_path / "shelf")
    (folder / "values.zarr" / "residual" / "01" / "c" / "1" / "0").unlink()

    found = everything(record(*subject, keep=tmp_path / "shelf"))

    message = f"The recording {folder.name} is not whole (values.zarr/residual/01/c/1/0 is missing); it is made anew."
    assert message in caplog.messages
    for expected, read in zip(truth, found, strict=True):
        np.testing.assert_array_equal(read, expected)
    assert files_of(folder) == files_of(only_recording(shelf))


def test_what_is_removed_after_it_was_found_is_an_error_and_not_zeros(made, subject, tmp_path):
    shelf, _ = made
    shutil.copytree(shelf, tmp_path / "shelf")
    found = record(*subject, keep=tmp_path / "shelf")
    first = found.values[0]
    shutil.rmtree(only_recording(tmp_path / "shelf"))
    for layer, rows in ((0, slice(None)), (1, 3), (2, [4, 9])):
        with pytest.raises(RunFolderError, match="a chunk is missing"):
            found.values[layer, rows]
    with pytest.raises(RunFolderError, match="a chunk is missing"):
        np.asarray(found.features)
    assert first.any()


def test_a_recording_of_another_format_and_a_folder_that_is_none_say_so(made, tmp_path):
    shelf, _ = made
    shutil.copytree(only_recording(shelf), tmp_path / "new")
    manifest = json.loads((tmp_path / "new" / "manifest.json").read_text())
    (tmp_path / "new" / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(RunFolderError, match="is a recording of format 99, and this version reads format"):
        _ = Recording(tmp_path / "new").layout
    for content in ("", "[]", "{}", "3"):
        (tmp_path / "new" / "manifest.json").write_text(content)
        with pytest.raises(RunFolderError, match="is no recording: its manifest cannot be read"):
            _ = Recording(tmp_path / "new").layout


def test_the_manifest_says_what_the_recording_holds_and_depends_on(made, subject):
    shelf, _ = made
    manifest = json.loads((only_recording(shelf) / "manifest.json").read_text())
    assert manifest["layout"]["components"] == {"residual": [3, 32]}
    assert manifest["depends_on"]["weights"] == subject[0].weights_hash()
    assert manifest["depends_on"]["examples"] == subject[1].fingerprint


# Room on the disk


Disk = namedtuple("Disk", "total used free")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("n", "most"), [(20, 8), (500, 64), (500, 500), (129, 64)])
def test_the_room_that_is_told_is_the_room_that_is_taken(tmp_path, monkeypatch, caplog, subject, dtype, n, most):
    small_windows(monkeypatch, most)
    caplog.set_level(logging.INFO, "synapse")
    classifier, examples = subject[0], random_examples(n, seed=2)
    record_components(classifier, examples, ["residual", "mlp"], keep=tmp_path, dtype=dtype)
    folder = only_recording(tmp_path)
    chunks = sum(path.stat().st_size for path in folder.rglob("c/**/*") if path.is_file())
    rest = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) - chunks
    layout = Recording(folder).layout
    assert layout.n_bytes == pytest.approx(chunks, rel=0.1, abs=3000)
    assert rest < 100_000
    assert any(f"takes {in_words(layout.n_bytes)} on disk" in message for message in caplog.messages)


def test_too_small_a_disk_stops_before_any_work(subject, tmp_path, monkeypatch):
    monkeypatch.setattr(of_folder.shutil, "disk_usage", lambda _: Disk(10**9, 10**9 - 10**7, 10**7))
    monkeypatch.setattr("synapse.recording.windows.run_window", None)  # would fail
    with pytest.raises(ResourceError) as caught:
        record(*subject, keep=tmp_path / "shelf")
    message = str(caught.value)
    assert message.startswith("The recording needs ")
    assert message.endswith(
        f" on the disk of '{tmp_path}/shelf', where 10.0 MB are free; free some, keep it elsewhere, record fewer "
        "examples, or store it in float16."
    )
    assert [path.name for path in (tmp_path / "shelf").iterdir() if path.suffix != ".lock"] == []


def test_a_disk_with_room_for_what_is_left_lets_a_recording_go_on(subject, tmp_path, monkeypatch):
    classifier, examples = subject
    needed = Layout(N, classifier.labels, {"residual": (3, 32)}, 32, True, "float32").n_bytes
    done = []

    def killed(*arguments, **options):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(1)
        return run_window(*arguments, **options)

    monkeypatch.setattr("synapse.recording.windows.run_window", killed)
    with pytest.raises(KeyboardInterrupt):
        record(classifier, examples, keep=tmp_path)
    monkeypatch.setattr("synapse.recording.windows.run_window", run_window)
    free = of_folder._SPARE_BYTES + needed // 2  # for half of it
    monkeypatch.setattr(of_folder.shutil, "disk_usage", lambda _: Disk(10**9, 10**9 - free, free))
    found = record(classifier, examples, keep=tmp_path)
    np.testing.assert_array_equal(np.asarray(found.values), record(classifier, examples).values)


def test_a_disk_that_fills_up_in_the_middle_ends_with_a_sentence_and_the_next_call_goes_on(
    subject, tmp_path, monkeypatch
):
    write, calls = of_folder.write_whole, []

    def fills_up(path, text):
        calls.append(path)
        if len(calls) == 3:  # after the manifest, the second window
            raise OSError(28, "No space left on device")
        write(path, text)

    monkeypatch.setattr(of_folder, "write_whole", fills_up)
    with pytest.raises(ResourceError) as caught:
        record(*subject, keep=tmp_path)
    assert str(caught.value) == (
        f"The recording cannot be written on to '{tmp_path}' (No space left on device); what was written stays, and "
        "the next call goes on from there."
    )
    with counted_calls(subject[0].blocks[0]) as run:
        found = record(*subject, keep=tmp_path)
    assert sum(run) == LOOKED_AT + N - 7  # the first window is there
    np.testing.assert_array_equal(np.asarray(found.values), record(*subject).values)


@pytest.mark.parametrize(
    ("n_bytes", "words"),
    [
        (0, "0 bytes"),
        (-5, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.0 kB"),
        (1234567, "1.2 MB"),
        (10**16, "10000.0 TB"),
    ],
)
def test_sizes_are_told_in_the_unit_that_suits_them(n_bytes, words):
    assert in_words(n_bytes) == words


# Windows


@pytest.mark.parametrize("n", [0, 1, 63, 64, 65, 4096, 4097, 40_000])
@pytest.mark.parametrize("width", [1, 384, 1024, 100_000])
def test_windows_follow_each_other_and_are_of_about_one_size(n, width, monkeypatch):
    monkeypatch.undo()
    layout = Layout(n, ("a", "b"), {"residual": (12, width)}, None, False, "float32")
    spans = [layout.span(window) for window in range(layout.n_windows)]
    assert [i for span in spans for i in range(span.start, span.stop)] == list(range(n))
    sizes = [span.stop - span.start for span in spans]
    assert all(size > 0 for size in sizes)
    assert all(size == layout.window for size in sizes[:-1])
    assert layout.window <= 64 or layout.window * 12 * width * 4 <= 32 * 2**20
    assert Layout.of_plain(json.loads(json.dumps(layout.plain()))) == layout


@pytest.mark.parametrize("ends_in", ["seal", "moved", "rename"])
def test_a_recording_that_is_killed_while_it_is_put_in_its_place_is_put_there_later(subject, tmp_path, ends_in):
    """Up to the seal the windows are through; after it nothing is run again, whatever is left of their records."""
    classifier, examples = subject
    whole = files_of(only_recording_of(subject, tmp_path / "whole"))
    with pytest.MonkeyPatch.context() as patch:
        place = {"seal": of_folder, "moved": of_folder.Draft, "rename": of_folder.Path}[ends_in]
        patch.setattr(place, ends_in, _killed)
        with pytest.raises(KeyboardInterrupt):
            record(classifier, examples, keep=tmp_path / "killed")
    if ends_in == "rename":
        assert not list((tmp_path / "killed").glob(".*.draft/windows"))
    with counted_calls(classifier.blocks[0]) as calls:
        record(classifier, examples, keep=tmp_path / "killed")
    assert sum(calls) == LOOKED_AT
    assert files_of(only_recording(tmp_path / "killed")) == whole


def only_recording_of(subject, shelf):
    record(*subject, keep=shelf)
    return only_recording(shelf)


def _killed(*_arguments, **_options):
    raise KeyboardInterrupt
