"""The scripts that make tables of the documentation run, and write where they say."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"


def script(name):
    spec = importlib.util.spec_from_file_location(Path(name).stem, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def threads_as_before():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_the_table_of_bit_flips_stands_between_its_marks(shared, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- bits -->\nold\n<!-- end of bits -->\nafter\n")
    data = shared / "data" / "http_attacks"
    options = ["--formats", "float16", "int8", "--fitting", "60", "--scoring", "80", "--most", "2"]
    files = ["--train", f"{data}/train.csv", "--test", f"{data}/test.csv", "--markdown", str(page)]
    script("bit_search").main(["--model", str(shared / "models" / "tiny-http"), *files, *options])

    text = page.read_text()
    assert text.startswith("before\n<!-- bits -->\n\n")
    assert text.endswith("\n\n<!-- end of bits -->\nafter\n")
    assert "old" not in text
    rows = re.findall(r"^\| (float16|int8) \| (\d) \| (\d+) of (\d+) \(", text, flags=re.MULTILINE)
    assert [row[0] for row in rows] == ["float16", "int8"]
    for _, flips, redirected, attacked in rows:
        assert 1 <= int(flips) <= 2
        assert int(redirected) <= int(attacked) <= 80
    assert f"{rows[0][2]} of {rows[0][3]}" in capsys.readouterr().out


def test_a_million_rows_are_predicted_without_being_run(capsys):
    main = script("scale-out/million_rows").main
    main(["--rows", "5000", "--layers", "2", "--rate", "100", "--workers", "4", "--swept", "10", "100"])
    first, second = capsys.readouterr().out.split("\n4,000 training and 1,000 test rows, ")[1:]
    assert first.startswith("10 of them swept")
    assert second.startswith("100 of them swept")
    # 5 windows of up to 1,024 rows on 4 workers: two rounds of 1,000 rows at 100 a second, and what comes on top
    seconds = {int(found) for found in re.findall(r"^record +5 +5,000 .* (\d+)$", first + second, flags=re.MULTILINE)}
    assert seconds == {20}
