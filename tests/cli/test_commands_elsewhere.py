"""The commands on runs that lie elsewhere."""

import fsspec
import pytest
from test_commands import QUICK, call, files, model_folder  # noqa: F401

URL = "memory://bucket/tiny"


@pytest.fixture
def memory(tmp_path, monkeypatch):
    """The file system in memory of fsspec, empty again afterwards; commands work in a temporary folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SYNAPSE_CACHE", str(tmp_path / "cache"))
    system = fsspec.filesystem("memory")
    yield system
    system.rm("/", recursive=True)


def test_a_run_is_written_elsewhere_and_every_command_reads_it_there(
    monkeypatch,
    memory,
    model_folder,  # noqa: F811
    files,  # noqa: F811
    tmp_path,
    capsys,
):
    run = ["run", model_folder, "--train", files[0], "--test", files[1], *QUICK]
    assert call(monkeypatch, *run, "--out", URL) == 0
    assert f"\nReport: {URL}/report.html\n" in capsys.readouterr().out
    assert call(monkeypatch, *run, "--out", URL) == 1
    assert f"Error: '{URL}' already holds a run; give another place with --out" in capsys.readouterr().err

    assert call(monkeypatch, "report", URL, "--figures", "figures") == 0
    assert "Report: tiny-report.html\nFigure: figures/headroom.svg" in capsys.readouterr().out
    assert (tmp_path / "tiny-report.html").read_bytes() == memory.cat_file("/bucket/tiny/report.html")

    assert call(monkeypatch, "compare", URL, URL) == 0
    assert "Report: runs/comparison/comparison.html" in capsys.readouterr().out

    assert call(monkeypatch, "whatif", model_folder, "w1 w2 w3", "--zero", "layer=1,top=2", "--run", URL) == 0
    assert "2 of 32 residual neurons of layer 1, ranked highest by cumulative-mass" in capsys.readouterr().out

    assert call(monkeypatch, "verify", URL) == 0
    assert capsys.readouterr().out == f"{URL}: whole\n"
    memory.pipe_file("/bucket/tiny/tables/sweep.parquet", b"cut")
    memory.rm_file("/bucket/tiny/tables/attack.parquet")
    assert call(monkeypatch, "verify", URL) == 1
    first, *found = capsys.readouterr().out.splitlines()
    assert first == f"{URL}: damaged"
    assert [line.strip() for line in found if "attack" in line] == ["tables/attack.parquet is missing"]
    assert [line for line in found if line.startswith("  tables/sweep.parquet has 3 bytes, and ")]


def test_what_is_no_run_elsewhere_is_told_in_one_line(monkeypatch, memory, capsys):
    memory.pipe_file("/bucket/thesis.tex", b"years of work")
    for command, told in {
        ("verify", "memory://bucket"): "There is no finished run at memory://bucket: no checksums.json is there",
        ("report", "nope://bucket"): "nope://bucket could not be reached: Protocol not known: nope",
        ("report", "runs/none", "--out", "s3://b/page.html"): "s3://b/page.html is elsewhere, and a report can be",
        ("demo", "--out", "s3://b"): "s3://b is elsewhere, and a demonstration can be written on this machine only",
        ("run", "m", "--test", "t.csv", "--out", "memory://bucket"): "'memory://bucket' exists and is no run folder",
    }.items():
        assert call(monkeypatch, *command) == 1, command
        assert told in capsys.readouterr().err, command
    assert memory.find("/") == ["/bucket/thesis.tex"]
