import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fabricated_run import build_run, change_json

from synapse.errors import SettingsError
from synapse.report import comparison_table, write_comparison


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    return [
        build_run(tmp_path / "shallow", title="shallow <i>model</i>"),
        build_run(tmp_path / "deep", title="deep", n_layers=6, labels=("a", "b")),
    ]


def compared(runs: list[Path], out: Path) -> list[dict[str, Any]]:
    write_comparison(runs, out)
    content = json.loads((out / "comparison.json").read_text())
    found: list[dict[str, Any]] = content["runs"]
    return found


def test_a_comparison_is_a_page_with_the_numbers_beside_it(runs: list[Path], tmp_path: Path) -> None:
    path = write_comparison(runs, tmp_path / "out")

    assert path == tmp_path / "out" / "comparison.html"
    assert {p.name for p in path.parent.iterdir()} == {"comparison.html", "comparison.json"}
    page = path.read_text(encoding="utf-8")
    assert "shallow &lt;i&gt;model&lt;/i&gt;" in page
    assert "<i>model" not in page


def test_accuracies_are_put_on_the_scale_from_chance_to_one(runs: list[Path], tmp_path: Path) -> None:
    numbers = compared(runs, tmp_path)[0]["numbers"]

    # accuracy 0.9 [0.88, 0.92], chance 0.4
    above = numbers["above_chance_accuracy"]
    assert (above["value"], above["low"], above["high"]) == pytest.approx((0.5 / 0.6, 0.48 / 0.6, 0.52 / 0.6))
    # headroom 0.5 of the 0.5 that lie above chance; of all rows 0.6
    assert numbers["headroom_readout_last"]["value"] == pytest.approx(1.0)
    assert numbers["headroom_all_first"]["value"] == pytest.approx(1.2)
    # shift 2.0 at a median clean margin of 4
    assert numbers["logit_shift_d50_margins"]["value"] == pytest.approx(0.5)


def test_curves_run_over_relative_depth_and_share(runs: list[Path], tmp_path: Path) -> None:
    shallow, deep = compared(runs, tmp_path)

    assert [p["x"] for p in shallow["curves"]["headroom_all"]] == pytest.approx([1 / 3, 2 / 3, 1])
    assert [p["x"] for p in deep["curves"]["probe_above_chance"]] == pytest.approx(np.arange(1, 7) / 6)
    damage = deep["curves"]["damage_last"]
    assert (damage[0]["x"], damage[0]["value"]) == (0, 0)
    assert (damage[-1]["x"], damage[-1]["value"]) == pytest.approx((1, 1))  # 0.5 lost of 0.5
    assert damage[-1]["low"] == pytest.approx(1 - 0.03 / 0.5)


def test_what_one_run_lacks_is_null_for_it_and_kept_for_the_other(runs: list[Path], tmp_path: Path) -> None:
    change_json(runs[0] / "scorecard.json", ["vulnerability"], ...)
    (runs[0] / "tables" / "sweep.parquet").unlink()

    shallow, deep = compared(runs, tmp_path)

    assert shallow["numbers"]["head_edit_d50"] is None
    assert shallow["curves"]["damage_last"] == []
    assert deep["numbers"]["head_edit_d50"]["value"] == pytest.approx(0.13)


def test_a_place_that_is_not_used_says_so(runs: list[Path], tmp_path: Path) -> None:
    unused = {"value": None, "low": None, "high": None, "n": 200, "unit": "", "note": "not used here"}
    change_json(runs[0] / "scorecard.json", ["redundancy", "removable", "readout", "2"], unused)

    page = write_comparison(runs, tmp_path / "out").read_text(encoding="utf-8")

    assert '<span class="none">not used here</span>' in page


def test_the_terminal_table_has_a_row_a_run(runs: list[Path]) -> None:
    table = comparison_table(runs)

    assert list(table.index) == ["shallow <i>model</i>", "deep"]
    assert table.loc["deep", "accuracy"] == "0.90 [0.88, 0.92]"
    assert table.loc["deep", "removable share, last block"] == "0.25 [0.05, 0.45]"


def test_runs_of_different_first_components_are_compared_with_a_caution(runs: list[Path], tmp_path: Path) -> None:
    inner = build_run(tmp_path / "inner", title="inner", components={"mlp": (3, 64), "residual": (3, 64)})

    alike = write_comparison(runs, tmp_path / "alike").read_text(encoding="utf-8")
    page = write_comparison([runs[1], inner], tmp_path / "out").read_text(encoding="utf-8")

    assert "different sites" not in alike
    assert (
        "The runs are compared at different sites: “deep” at residual (the output of each block); “inner” at mlp (the "
        "hidden units of each block&#39;s feed-forward network). Their numbers do not measure the same."
    ) in page
    content = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [run["component"] for run in content["runs"]] == ["residual", "mlp"]


def test_captions_of_a_comparison_name_the_units_that_the_runs_share(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run", components={"mlp": (3, 64)})

    page = write_comparison([run], tmp_path / "out").read_text(encoding="utf-8")

    assert "when all hidden units of a block&#39;s feed-forward network are set to zero in all rows" in page


def test_no_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        write_comparison([], tmp_path)

    assert str(caught.value) == "There are no runs to compare. Give at least one run folder, better two."


def test_runs_without_any_measurement_make_a_page_without_figures(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run")
    (run / "scorecard.json").write_text('{"format": 1}')

    page = write_comparison([run], tmp_path / "out").read_text(encoding="utf-8")

    assert page.count("This figure is left out.") == 5
