"""The configuration files of `examples/scale-out`: what they name exists, and Ray's part of them runs."""

import os
import re
import shlex
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import pytest
import typer.main
import yaml

from synapse.cli.app import app
from synapse.demo.domains import domains
from synapse.settings import make_settings

FOLDER = Path(__file__).parents[1] / "examples" / "scale-out"
RUN = typer.main.get_command(app).commands["run"]


def known_options(command):
    """Return the options of a `synapse run` that do not exist."""
    words = shlex.split(command.replace("\\\n", " "))
    known = {option for parameter in RUN.params for option in parameter.opts}
    return {word for word in words[words.index("run") :] if word.startswith("--")} - known


def test_the_study_file_holds_settings_that_exist():
    settings = make_settings(**yaml.safe_load((FOLDER / "study.yaml").read_text()))
    assert (settings.executor, settings.address, settings.examples) == ("ray", "auto", "all")


def test_the_script_for_slurm_is_one_that_a_shell_reads_and_runs_what_exists():
    script = FOLDER / "slurm.sh"
    subprocess.run(["bash", "-n", script], check=True)
    (command,) = re.findall(r"synapse run .*", script.read_text())
    assert known_options(command) == set()


def test_the_job_for_kuberay_has_a_cluster_whose_workers_are_those_that_the_study_asks_for():
    job = yaml.safe_load((FOLDER / "kuberay.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    command, cluster = job["spec"]["entrypoint"], job["spec"]["rayClusterSpec"]
    assert known_options(command) == set()
    (group,) = cluster["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    assert f"--workers {group['replicas']} " in command
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    pods = [cluster["headGroupSpec"]["template"]["spec"], group["template"]["spec"]]
    for pod in pods:
        volumes = {volume["name"] for volume in pod["volumes"]}
        assert {mount["name"] for each in pod["containers"] for mount in each["volumeMounts"]} <= volumes


@pytest.mark.cluster
@pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")
def test_the_study_joins_a_cluster_that_runs_and_ends_well(tmp_path):
    domain = next(domain for domain in domains() if hasattr(domain, "folder"))
    for part in ("train", "test"):
        examples = domain.examples(part).take(range(60))
        table = pd.DataFrame({"text": list(examples.inputs), "label": list(examples.labels)})
        table.to_csv(tmp_path / f"{part}.csv", index=False)
    study = yaml.safe_load((FOLDER / "study.yaml").read_text()) | {
        "model": str(domain.folder),
        "train": str(tmp_path / "train.csv"),
        "test": str(tmp_path / "test.csv"),
        "out": str(tmp_path / "run"),
        "cache": str(tmp_path / "cache"),
        "rank_draws": 2,
        "examples": 10,
        "attacks": ["logits"],
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    programs, address = Path(sys.executable).parent, "127.0.0.1:26379"
    environment = os.environ | {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "token"}
    options = shlex.split("--head --block --port 26379 --node-ip-address 127.0.0.1 --num-cpus 2 --disable-usage-stats")
    options += shlex.split("--include-dashboard false --object-store-memory 100000000")
    with subprocess.Popen([programs / "ray", "start", *options], env=environment) as head:
        try:
            study_run = [programs / "synapse", "run", tmp_path / "study.yaml", "--address", address, "--workers", "2"]
            ended = _run_when_there(study_run, environment)
        finally:
            head.terminate()  # it ends its own processes, and nobody else's
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert (tmp_path / "run" / "report.html").is_file()


def _run_when_there(command, environment):
    """Run a command that joins a cluster, once that is up."""
    for _ in range(10):
        ended = subprocess.run(command, env=environment, timeout=300, capture_output=True, text=True)
        if "There is no Ray cluster to join" not in ended.stderr:
            break
        time.sleep(1)
    return ended
