"""Folders elsewhere: published so that nothing partial reads as whole, and read back as they were written."""

import json
import shutil
import threading
from contextlib import nullcontext
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from synapse.elsewhere import as_written, check_writable, copied, here, names_at, only_here, place_of, publish
from synapse.errors import RunFolderError, SettingsError
from synapse.integrity import SEAL, flaws, seal
from synapse.store import check_free, new_run


class Fragile(MemoryFileSystem):
    """A file system in memory that can do so many changes more, and cuts what it is told to cut."""

    protocol = "fragile"
    changes_left = 10**9
    cut = ""

    def changed(self):
        if Fragile.changes_left == 0:
            raise OSError("the line went dead")
        Fragile.changes_left -= 1

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("fragile://"))

    def put_file(self, lpath, rpath, **options):
        self.changed()
        super().put_file(lpath, rpath, **options)
        if Fragile.cut and rpath.endswith(Fragile.cut):
            super().pipe_file(rpath, self.cat_file(rpath)[:-1])

    def pipe_file(self, path, value, **options):
        self.changed()
        super().pipe_file(path, value, **options)

    def rm_file(self, path):
        self.changed()
        super().rm_file(path)


@pytest.fixture
def memory():
    """The file system in memory of fsspec, empty again afterwards."""
    system = fsspec.filesystem("memory")
    yield system
    system.rm("/", recursive=True)


@pytest.fixture
def fragile(monkeypatch):
    fsspec.register_implementation("fragile", Fragile, clobber=True)
    monkeypatch.setattr(Fragile, "store", {})
    monkeypatch.setattr(Fragile, "pseudo_dirs", [""])
    monkeypatch.setattr(Fragile, "changes_left", 10**9)
    return Fragile()


def sealed(folder: Path, files: dict[str, str]) -> Path:
    """Write a folder that looks like a run, with other files too."""
    for name, text in {"manifest.json": "{}", "scorecard.json": "{}", **files}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    seal(folder, without=["report.html"])
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(call, *arguments, **options) -> str:
    with pytest.raises(RunFolderError) as caught:
        call(*arguments, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("runs/mine", Path("runs/mine")),
        (Path("/data/s3:/mine"), Path("/data/s3:/mine")),
        ("file:///data/mine", Path("/data/mine")),
        (Path("file:///data/mine"), Path("/data/mine")),
        ("C:\\runs\\mine", Path("C:\\runs\\mine")),
        ("C:/runs/mine", Path("C:/runs/mine")),
        ("s3://bucket/mine/", "s3://bucket/mine"),
        (Path("s3://bucket/mine"), "s3://bucket/mine"),
        ("memory://", "memory://"),
        ("https://host:8080/mine", "https://host:8080/mine"),
        ("zip://mine::s3://bucket/runs.zip", "zip://mine::s3://bucket/runs.zip"),
    ],
)
def test_a_place_is_a_path_here_or_the_url_of_one_elsewhere(path, place):
    assert place_of(path) == place


def test_a_path_object_that_folded_the_slashes_is_written_out_again():
    assert as_written(Path("s3://bucket/run")) == "s3://bucket/run"
    assert as_written("s3://bucket//run") == "s3://bucket//run"


def test_what_can_be_written_here_only_is_refused_elsewhere():
    assert only_here(Path("page.html"), "a report") == Path("page.html")
    with pytest.raises(SettingsError) as caught:
        only_here("s3://bucket/page.html", "a report")
    assert str(caught.value) == (
        "s3://bucket/page.html is elsewhere, and a report can be written on this machine only: give a path here."
    )


def test_a_folder_is_read_elsewhere_as_it_was_written_but_for_its_reports(tmp_path, memory):
    folder = sealed(tmp_path / "run", {"tables/sweep.parquet": "a", "logits.zarr/c/0/0": "b", "report.html": "c"})

    publish(folder, "memory://bucket/run")

    assert memory.cat_file("/bucket/run/report.html") == b"c"
    assert not memory.exists("/bucket/run/unfinished.json")
    written = contents(folder)
    del written["report.html"]
    assert contents(here("memory://bucket/run")) == written
    assert here("memory://bucket/run").name == "run"
    assert here(folder) == folder


def test_a_later_run_takes_the_place_of_an_earlier_one_and_of_nothing_else(tmp_path, memory):
    earlier = {"tables/defence.parquet": "a", "tables/sweep.parquet": "b", "report.html": "c"}
    publish(sealed(tmp_path / "first", earlier), "memory://bucket/run")
    memory.pipe_file("/bucket/run/report-mlp.html", b"a page of the first")
    memory.pipe_file("/bucket/run/notes/thesis.tex", b"years of work")
    later = sealed(tmp_path / "second", {"tables/sweep.parquet": "d"})

    publish(later, "memory://bucket/run")

    assert contents(here("memory://bucket/run")) == contents(later)
    kept = {name.removeprefix("/bucket/run/") for name in memory.find("/bucket/run")}
    assert kept == {*contents(later), "notes/thesis.tex"}


def found_at(url: str) -> dict[str, bytes] | None:
    """Return what a reader gets at a place, None where there is no finished run."""
    try:
        copy = copied(url)
    except RunFolderError:
        return None
    assert flaws(copy) == []
    return contents(copy)


# away with the seal after the marker, then three files, away with the stale one, the seal, away with the marker
@pytest.mark.parametrize(
    ("changes", "left"),
    [*[(n, "first") for n in range(2)], *[(n, None) for n in range(2, 7)], *[(n, "second") for n in range(7, 9)]],
)
def test_a_publication_that_is_cut_leaves_the_earlier_run_the_new_one_or_none(tmp_path, fragile, changes, left):
    sealed(tmp_path / "first", {"tables/old": "a", "tables/both": "b"})
    sealed(tmp_path / "second", {"tables/both": "c"})
    publish(tmp_path / "first", "fragile://run")
    Fragile.changes_left = changes

    with nullcontext() if changes == 8 else pytest.raises(RunFolderError, match="written to: the line went dead"):
        publish(tmp_path / "second", "fragile://run")

    assert found_at("fragile://run") == (left and contents(tmp_path / left))
    Fragile.changes_left = 100
    if left is None:
        check_free("fragile://run", overwrite=False)  # the next study may take the place
    publish(tmp_path / "second", "fragile://run")
    assert found_at("fragile://run") == contents(tmp_path / "second")
    assert {name.removeprefix("/run/") for name in fragile.find("/run")} == set(contents(tmp_path / "second"))


def test_a_file_that_does_not_arrive_whole_is_named_and_nothing_is_sealed(tmp_path, fragile, monkeypatch):
    folder = sealed(tmp_path / "run", {"tables/sweep.parquet": "four"})
    monkeypatch.setattr(Fragile, "cut", "sweep.parquet")

    assert refusal(publish, folder, "fragile://run") == (
        "fragile://run/tables/sweep.parquet has 3 bytes, and 4 were written: write it again."
    )
    assert refusal(here, "fragile://run").startswith("There is no finished run at fragile://run: ")


def test_what_is_damaged_elsewhere_is_named(tmp_path, memory):
    publish(sealed(tmp_path / "run", {"a": "1", "b": "22", "c": "3", "d": "4"}), "memory://bucket/run")
    memory.pipe_file("/bucket/run/a", b"2")
    memory.pipe_file("/bucket/run/b", b"2")
    memory.rm_file("/bucket/run/c")

    assert refusal(here, "memory://bucket/run") == (
        "The run at memory://bucket/run is damaged, or was replaced while it was read: a has changed: its SHA-256 is "
        "not that of what was written; b has 1 bytes, and 2 were written; c is missing. `synapse verify` names every "
        "file."
    )
    memory.rm_file("/bucket/run/d")
    assert "; c is missing; and 1 files more. `synapse verify`" in refusal(here, "memory://bucket/run")
    assert flaws(copied("memory://bucket/run"))[2:] == ["c is missing", "d is missing"]


def test_a_seal_that_cannot_be_read_is_told(memory):
    for seen, told in ((b"<html>", "cannot be read"), (b"[1]", "is not a list of files")):
        memory.pipe_file(f"/bucket/{SEAL}", seen)
        assert f"while it was read: {SEAL} {told}" in refusal(here, "memory://bucket")


@pytest.mark.parametrize("name", ["../../outside", "/etc/outside", "a/../../outside", "..\\outside", "C:\\outside", ""])
def test_a_seal_that_names_files_outside_of_the_folder_is_not_trusted(memory, name):
    memory.pipe_file(f"/bucket/run/{SEAL}", json.dumps({name: {"size": 1, "sha256": ""}}).encode())

    assert refusal(here, "memory://bucket/run") == (
        f"memory://bucket/run/{SEAL} names {name!r}, which is no file inside the folder: do not trust it."
    )


def test_places_that_cannot_be_reached_are_told_with_the_reason():
    fsspec.register_implementation("lost", "no_such_package.Lost", clobber=True, errtxt="Install lostfs to access lost")
    advice = ". Check the path and your access to it, and for one elsewhere that the package it needs is installed."
    assert refusal(here, "lost://run") == "lost://run could not be reached: Install lostfs to access lost" + advice
    assert refusal(here, "nope://run") == "nope://run could not be reached: Protocol not known: nope" + advice
    assert refusal(check_free, "lost://run", overwrite=True).startswith("lost://run could not be reached: Install")


def test_a_copy_is_made_once_until_another_run_is_there(tmp_path, memory):
    publish(sealed(tmp_path / "first", {}), "memory://run")
    copy = here("memory://run")
    assert here("memory://run/") == copy
    assert copied("memory://run") != copy
    publish(sealed(tmp_path / "second", {"tables/sweep.parquet": ""}), "memory://run")
    assert here("memory://run") != copy


def test_a_run_appears_elsewhere_whole_and_is_replaced_only_when_asked(memory):
    with new_run("memory://deep/run") as draft:
        sealed(draft, {})
        assert memory.find("/") == []
    assert set(memory.find("/")) == {f"/deep/run/{name}" for name in ("manifest.json", "scorecard.json", SEAL)}
    assert not draft.exists()
    assert refusal(check_free, "memory://deep/run", overwrite=False) == (
        "'memory://deep/run' already holds a run; give another place with --out, or --overwrite."
    )
    with new_run("memory://deep/run", overwrite=True) as draft:
        sealed(draft, {"new": ""})
    assert (here("memory://deep/run") / "new").exists()


def test_a_run_that_dies_leaves_nothing_elsewhere(memory):
    with pytest.raises(RuntimeError, match="half way"), new_run("memory://run") as draft:
        raise RuntimeError("half way")
    assert memory.find("/") == []
    assert not draft.exists()


def test_somebodys_files_elsewhere_are_never_replaced(memory):
    memory.pipe_file("/run/thesis.tex", b"years of work")
    for place in ("memory://run", "memory://run/thesis.tex"):
        assert refusal(check_free, place, overwrite=True) == (
            f"{place!r} exists and is no run folder; give another place with --out."
        )
    assert memory.find("/") == ["/run/thesis.tex"]


def test_a_place_that_cannot_be_written_to_is_refused_before_anything_is_computed(fragile):
    check_writable("fragile://run")
    assert fragile.find("/") == []
    Fragile.changes_left = 0
    assert refusal(check_free, "fragile://run", overwrite=False).startswith(
        "fragile://run could not be written to: the line went dead."
    )


def test_a_run_that_could_not_be_published_stays_on_this_machine(fragile, caplog):
    with pytest.raises(RunFolderError, match="the line went dead"), new_run("fragile://run") as draft:
        sealed(draft, {"tables/sweep.parquet": "hours of work"})
        Fragile.changes_left = 2
    assert caplog.messages == [f"The run is not at fragile://run; it is whole in {draft}."]
    assert flaws(draft) == []
    assert names_at("fragile://run") == set()
    shutil.rmtree(draft)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture
def served(tmp_path):
    """The address of a web server of the files in the temporary folder."""
    pytest.importorskip("aiohttp", reason="the http file system of fsspec needs aiohttp")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join(timeout=5)


def test_a_run_on_a_web_server_is_read_and_not_written(tmp_path, served):
    folder = sealed(tmp_path / "run", {f"logits.zarr/c/{i}": "x" * i for i in range(40)})

    assert contents(here(f"{served}/run")) == contents(folder)
    assert refusal(here, f"{served}/none").startswith(f"There is no finished run at {served}/none: ")
    assert refusal(check_free, f"{served}/other", overwrite=True).startswith(
        f"{served}/other could not be written to: "
    )
    (folder / "logits.zarr" / "c" / "7").unlink()
    assert flaws(copied(f"{served}/run")) == ["logits.zarr/c/7 is missing"]
