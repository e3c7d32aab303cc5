from pathlib import Path
from xml.etree import ElementTree

import pytest
from fabricated_run import build_run

from synapse.errors import SettingsError
from synapse.report import paper_figures


def test_both_figures_are_drawn_in_each_format(run_folder: Path, tmp_path: Path) -> None:
    paths = paper_figures(run_folder, tmp_path / "out", ("svg", "png"))

    assert [path.name for path in paths] == [
        "headroom.svg",
        "headroom.png",
        "ablation-curves.svg",
        "ablation-curves.png",
    ]
    assert ElementTree.parse(paths[0]).getroot().tag.endswith("svg")
    assert paths[1].read_bytes().startswith(b"\x89PNG")


def test_the_same_run_gives_the_same_bytes(run_folder: Path, tmp_path: Path) -> None:
    first = paper_figures(run_folder, tmp_path / "first")
    second = paper_figures(run_folder, tmp_path / "second")

    assert [a.read_bytes() == b.read_bytes() for a, b in zip(first, second, strict=True)] == [True, True]


def test_a_name_with_dollars_is_no_formula(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run", title="costs $5 or $\\bad{ more")

    assert len(paper_figures(run, tmp_path / "out")) == 2


def test_a_figure_without_numbers_is_left_out(run_folder: Path, tmp_path: Path) -> None:
    (run_folder / "tables" / "sweep.parquet").unlink()

    assert [path.name for path in paper_figures(run_folder, tmp_path / "out")] == ["headroom.svg"]


def test_an_unknown_format_is_refused_with_near_names(run_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"cannot be written as 'svgg'; choose among .* Did you mean 'svg"):
        paper_figures(run_folder, tmp_path / "out", ("svgg",))


def test_a_block_that_is_not_there_is_refused(run_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        paper_figures(run_folder, tmp_path / "out", layers=[3])

    assert str(caught.value) == "There is no block 3: the run has blocks 0 to 2."


def test_figures_of_further_components_carry_their_names(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run", components={"mlp": (4, 64), "pooler": (1, 64)})

    paths = paper_figures(run, tmp_path / "out", layers=[1, 3])

    names = ["headroom", "ablation-curves", "headroom-pooler", "ablation-curves-pooler"]
    assert [path.stem for path in paths] == names
