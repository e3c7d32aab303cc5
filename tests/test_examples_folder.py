"""The recipes of `examples/` run, and what is found in their modules is what their author built."""

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"


def recipe(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def data(request) -> Path:
    folder = Path(__file__).parents[2] / "shared" / "data" / request.param
    if not folder.is_dir():
        pytest.skip(f"no data set {request.param} beside the repository")
    return folder


@pytest.fixture(autouse=True)
def threads_and_random_numbers_as_before():
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("name", "data", "readout", "width", "mlp_width"),
    [("ecg_signal", "ecg5000", "mean", 32, 64), ("system_calls", "adfa_ld", "first", 64, 128)],
    indirect=["data"],
)
def test_a_recipe_trains_finds_its_own_anatomy_and_leaves_a_report(
    name, data, readout, width, mlp_width, tmp_path, capsys
):
    main = recipe(name).main
    run = main([str(data), "--out", str(tmp_path), "--quick"])
    printed = capsys.readouterr().out

    blocks = [f"encoder.layers.{block}" for block in range(3)]
    found = json.loads((run / "manifest.json").read_text())["model"]
    assert (found["blocks"], found["readout"], found["width"]) == (blocks, readout, width)
    assert re.search(rf"widths: {{.*'mlp': {mlp_width}\b", printed)
    assert "'mlp': ['encoder.layers.0.linear2'," in printed
    assert (run / "report.html").stat().st_size > 10_000
    assert {path.name for path in (tmp_path / "model").iterdir()} == {"model.safetensors", "config.json"}
    assert re.search(r"Test accuracy 0\.\d{3} .*\nmacro-F1 0\.\d{3}", printed)
    assert len(re.findall(r"^[012] +-?\d\.\d", printed, flags=re.MULTILINE)) == 3  # headroom, a row for each block


def test_a_second_start_takes_the_weights_that_are_there(tmp_path, monkeypatch, capsys):
    heartbeats = recipe("ecg_signal")
    train = heartbeats.syn.Examples(torch.randn(8, 20).numpy(), ("a", "b") * 4, "beats")
    first = heartbeats.trained(tmp_path, train, ("a", "b"), epochs=1)
    assert "Training on 8 heartbeats." in capsys.readouterr().out

    def never(*_):
        raise AssertionError("it was trained again")

    monkeypatch.setattr(heartbeats, "fit", never)
    second = heartbeats.trained(tmp_path, train, ("a", "b"), epochs=1)
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())
    with pytest.raises(AssertionError, match="trained again"):
        heartbeats.trained(tmp_path, train, ("a", "b"), epochs=2)
