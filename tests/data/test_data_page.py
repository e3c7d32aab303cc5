"""The page of data: its Python examples run."""

import json
import re
from pathlib import Path

import fsspec
import pandas as pd

PAGE = Path(__file__).parents[2] / "docs" / "data.md"


def test_the_python_examples_of_the_page_of_data_run(tmp_path, monkeypatch, capsys):
    rows = [{"text": f"text {i}", "label": "xy"[i % 2]} for i in range(20)]
    pd.DataFrame(rows).to_csv(tmp_path / "train.csv", index=False)
    lines = [json.dumps({"sentence": row["text"], "class": row["label"]}) for row in rows]
    (tmp_path / "test.jsonl").write_text("\n".join(lines))
    (tmp_path / "shards").mkdir()
    for i in range(2):
        pd.DataFrame(rows[i::2] + rows[:2]).to_parquet(tmp_path / "shards" / f"train-{i}.parquet")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}

    for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL):
        exec(code, names)

    fsspec.filesystem("memory").rm("/", recursive=True)
    assert capsys.readouterr().out == "20 text text 0 x\n"
    assert (names["first"], names["some"]) == ("text 0", ("text 5", "text 3", "text 8"))
    assert (len(names["train"]), len(names["test"])) == (15, 5)
