import json

import numpy as np
import pandas as pd
import pytest
import zarr

from synapse.errors import RunFolderError
from synapse.store import new_run, write_json, write_logits, write_table
from synapse.types import Sweep


def fill(run):
    write_json(run / "scorecard.json", {"format": 1})
    write_json(run / "manifest.json", {"format": 1})


def test_a_run_that_dies_leaves_nothing_behind(tmp_path):
    with pytest.raises(RuntimeError, match="half way"), new_run(tmp_path / "run") as draft:
        write_json(draft / "scorecard.json", {})
        raise RuntimeError("half way")
    assert list(tmp_path.iterdir()) == []


def test_a_run_appears_whole_and_an_old_one_is_replaced_only_when_asked(tmp_path):
    place = tmp_path / "deep" / "run"
    with new_run(place) as draft:
        fill(draft)
        assert not place.exists()
    assert {path.name for path in place.iterdir()} == {"scorecard.json", "manifest.json", "checksums.json"}
    with pytest.raises(RunFolderError, match="already holds a run"), new_run(place):
        pass
    with new_run(place, overwrite=True) as draft:
        fill(draft)
        (draft / "new").write_text("")
    assert (place / "new").exists()


def test_somebodys_files_are_never_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunFolderError, match="is no run folder"), new_run(tmp_path, overwrite=True):
        pass
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_json_has_no_nan(tmp_path):
    write_json(tmp_path / "x.json", {"a": float("nan"), "b": [np.float32(1.5), np.int64(2)], "c": {"d": float("inf")}})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": None, "b": [1.5, 2], "c": {"d": None}}


def test_tables_and_logits_come_back_as_written(tmp_path):
    table = pd.DataFrame({"layer": [0, 1], "label": ["", "a|b"], "value": [0.5, float("nan")]})
    write_table(tmp_path, "probe", table)
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "tables" / "probe.parquet"), table)
    logits = np.random.default_rng(0).normal(size=(3, 4, 2)).astype(np.float32)
    logits[1, 2] = np.nan
    sweep = Sweep(pd.DataFrame(), logits, logits[0], np.array([0, 1, 1, 0]), ("a", "b"))
    write_logits(tmp_path, sweep, np.array([3, 5, 7, 9]))
    group = zarr.open_group(str(tmp_path / "logits.zarr"), mode="r")
    np.testing.assert_array_equal(group["cells"][:], logits)
    np.testing.assert_array_equal(group["rows"][:], [3, 5, 7, 9])
    assert group.attrs["labels"] == ["a", "b"]
