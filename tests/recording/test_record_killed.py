"""Recordings that are killed, or made twice at once, by processes of their own."""

import os
import signal
import time

import numpy as np
import pytest
from planted import random_classifier
from recorder import LOOKED_AT, Recorder, examples_of, files_of, is_running, only_recording, small_windows

from synapse.recording import Shelf, record

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes are forked")

N = 90
"""Examples of a recording: 12 windows."""


@pytest.fixture(scope="module")
def recorder(tmp_path_factory):
    found = Recorder(tmp_path_factory.mktemp("recorder"), "bert")
    yield found
    found.close()


@pytest.fixture(scope="module")
def unbroken(recorder, tmp_path_factory):
    """The folder of a recording that nothing has disturbed."""
    shelf = tmp_path_factory.mktemp("unbroken")
    recorder.ended(recorder.start(shelf, N))
    return only_recording(shelf)


def n_files(folder):
    return sum(len(names) for _, _, names in os.walk(folder))


def killed_once_there_are(n, recorder, shelf):
    """Kill a recording once its draft holds so many files; return whether it was still running."""
    child = recorder.start(shelf, N)
    deadline = time.monotonic() + 30
    while is_running(child) and n_files(shelf) < n:
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    if not is_running(child):
        return False
    os.kill(child, signal.SIGKILL)
    while is_running(child):
        time.sleep(0.0005)
    return True


@pytest.mark.parametrize("seed", range(4))
def test_a_recording_killed_five_times_ends_as_if_it_never_was(recorder, unbroken, tmp_path, seed):
    random, hits, last = np.random.default_rng(seed), 0, n_files(unbroken) + 11  # a file a window goes at the end
    for _ in range(5):
        least = min(n_files(tmp_path), last - 1)
        hits += killed_once_there_are(random.integers(least, last), recorder, tmp_path)
        # There is nothing, or all of it.
        assert all(files_of(found.folder) == files_of(unbroken) for found in Shelf(tmp_path).recordings())

    examples, _ = recorder.ended(recorder.start(tmp_path, N))

    assert hits >= 3
    assert examples <= N + LOOKED_AT  # the identity check, and what was not there yet
    assert only_recording(tmp_path).name == unbroken.name
    assert files_of(tmp_path / unbroken.name) == files_of(unbroken)
    assert Shelf(tmp_path).drafts() == []


def test_nothing_of_a_killed_recording_is_taken_for_a_recording(recorder, unbroken, tmp_path):
    for n in (1, 3, 20, 60, 120):
        assert killed_once_there_are(n, recorder, tmp_path)
        assert Shelf(tmp_path).find(unbroken.name) is None
        assert Shelf(tmp_path).recordings() == []


def test_a_killed_recording_goes_on_where_it_stopped(recorder, unbroken, tmp_path):
    killed_once_there_are(n_files(unbroken) // 2, recorder, tmp_path)
    n_windows = len(list(tmp_path.glob(".*.draft/windows/*.json")))

    examples, _ = recorder.ended(recorder.start(tmp_path, N))

    assert 2 <= n_windows <= 10
    assert examples == N - 8 * n_windows + LOOKED_AT  # windows of 90 / 12, rounded up; and the identity check


def test_what_was_half_written_when_the_process_ended_is_not_left_in_the_recording(recorder, unbroken, tmp_path):
    killed_once_there_are(n_files(unbroken) // 2, recorder, tmp_path)
    (draft,) = Shelf(tmp_path).drafts()
    for name in ("values.zarr/residual/00/c/0/0.0123abcd.partial", ".checksums.json-abc", "windows/.000000.json-x"):
        (draft / name).write_text("{")

    recorder.ended(recorder.start(tmp_path, N))

    assert files_of(tmp_path / unbroken.name) == files_of(unbroken)


@pytest.mark.parametrize("name", ["values.zarr/residual/01/c/0/0", "moments.zarr/residual/rows/mean/c/0/0/0"])
def test_a_window_that_was_damaged_after_the_kill_is_made_again(recorder, unbroken, tmp_path, name):
    killed_once_there_are(n_files(unbroken) // 2, recorder, tmp_path)
    (draft,) = Shelf(tmp_path).drafts()
    damaged = bytearray((draft / name).read_bytes())
    damaged[3] ^= 1
    (draft / name).write_bytes(damaged)

    recorder.ended(recorder.start(tmp_path, N))

    assert files_of(tmp_path / unbroken.name) == files_of(unbroken)


@pytest.mark.parametrize("record_of_window", ["{}", "[]", "", "null", "{"])
def test_a_window_whose_record_says_nothing_is_made_again(recorder, unbroken, tmp_path, record_of_window):
    killed_once_there_are(n_files(unbroken) // 2, recorder, tmp_path)
    (draft,) = Shelf(tmp_path).drafts()
    (draft / "windows" / "000000.json").write_text(record_of_window)
    (draft / "values.zarr" / "residual" / "01" / "c" / "0" / "0").unlink()

    recorder.ended(recorder.start(tmp_path, N))

    assert files_of(tmp_path / unbroken.name) == files_of(unbroken)


def test_two_processes_record_the_same_thing_once(recorder, unbroken, tmp_path):
    children = [recorder.start(tmp_path, N), recorder.start(tmp_path, N)]

    ran = sorted(recorder.ended(child)[0] for child in children)

    assert ran == [LOOKED_AT, N + LOOKED_AT]
    assert files_of(only_recording(tmp_path)) == files_of(unbroken)


def test_another_process_finds_what_this_one_records(recorder, unbroken, tmp_path, monkeypatch):
    small_windows(monkeypatch)

    record(random_classifier("bert"), examples_of("bert", N), keep=tmp_path)

    assert only_recording(tmp_path).name == unbroken.name
    assert recorder.ended(recorder.start(tmp_path, N))[0] == LOOKED_AT
    assert files_of(only_recording(tmp_path)) == files_of(unbroken)


def test_memory_does_not_grow_with_the_number_of_examples_that_are_kept(tmp_path):
    recorder = Recorder(tmp_path, "wide")
    few, many = 200, 2400
    taken = {
        (where, n): recorder.ended(recorder.start(tmp_path / str(n) if where == "kept" else None, n))[1]
        for where in ("kept", "in memory")
        for n in (few, many)
    }
    recorder.close()

    grown = (many - few) * 16 * 384 * 4  # bytes: 54 MB
    assert taken["in memory", many] - taken["in memory", few] > 0.8 * grown
    assert taken["kept", many] - taken["kept", few] < 0.4 * grown  # what warms up once: codecs, threads
