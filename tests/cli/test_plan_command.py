"""`synapse plan`, and who runs a study."""

import pytest
import yaml
from test_commands import call, files, model_folder  # noqa: F401

import synapse.settings
from synapse.execute import RayExecutor


@pytest.fixture
def study(tmp_path, model_folder, files):  # noqa: F811
    train, test = files
    settings = {"model": str(model_folder), "train": str(train), "test": str(test), "examples": 20}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path / "study.yaml"


def test_a_plan_counts_the_work_and_starts_nothing(study, monkeypatch, capsys):
    assert call(monkeypatch, "plan", study, "--workers", 3, "--rate", 0.5) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "record 1 120 " in shown  # 90 and 30 examples in one window
    # one window is one worker's, at two seconds an example; and 2 ms for handing it out
    assert "kB 240" in shown
    assert "3 workers, each 0.5 examples a second (as given; here " in shown
    assert sorted(path.name for path in study.parent.iterdir()) == ["study.yaml"]


@pytest.mark.parametrize("options", [("--workers", 0), ("--rate", 0), ("--rate", -1)])
def test_workers_and_rates_that_cannot_be_are_refused(study, monkeypatch, capsys, options):
    assert call(monkeypatch, "plan", study, *options) == 1
    assert "numbers above 0 were expected." in " ".join(capsys.readouterr().err.split())


def test_a_cluster_that_is_named_needs_the_number_of_workers(study, monkeypatch, capsys):
    assert call(monkeypatch, "run", study, "--executor", "ray", "--address", "127.0.0.1:1") == 1
    assert "and not how many workers to start there; give --workers." in " ".join(capsys.readouterr().err.split())


def test_what_is_said_of_workers_reaches_them(study, monkeypatch):
    asked = []

    class Asked(RayExecutor):
        def __enter__(self):
            asked.append(self)
            raise KeyboardInterrupt

    monkeypatch.setattr(synapse.settings, "RayExecutor", Asked)
    options = ["--executor", "ray", "--workers", 3, "--gpus-per-worker", 0.5, "--cpus-per-worker", 2]
    options += ["--threads-per-worker", 4, "--address", "auto", "--worker-logs", study.parent / "logs"]
    assert call(monkeypatch, "run", study, *options) == 130
    (one,) = asked
    assert (one.workers, one.gpus_per_worker, one.cpus_per_worker, one.threads_per_worker) == (3, 0.5, 2, 4)
    assert (one.address, one.logs) == ("auto", study.parent / "logs")
