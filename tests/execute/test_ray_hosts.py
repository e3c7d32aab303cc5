"""Hosts with networks of their own, of which one is cut off in the middle of the work.

Each host is a network namespace of this machine, joined to the others by a bridge: nothing outside sees them.
"""

import os
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PROGRAMS = Path(sys.executable).parent
HEAD, PORT = "10.213.77.1", 26377
QUICK_TO_NOTICE = {  # that a host has gone: what Ray waits for, which would be a minute
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}

DRIVER = f"""
import sys
from pathlib import Path
from pieces_of_work import where
from synapse.execute import Done, RayExecutor

seen = {{}}
with RayExecutor(workers=2, address="{HEAD}:{PORT}") as executor:
    for outcome in executor.map(where, range(int(sys.argv[1]))):
        assert isinstance(outcome, Done), outcome
        seen.setdefault(outcome.result, []).append(outcome.position)
        if len(seen) == 2:
            Path(sys.argv[2]).touch()  # both hosts work: now one may be cut off
assert sorted(sum(seen.values(), [])) == list(range(int(sys.argv[1])))
print("hosts", *sorted(seen))
"""


def network(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def can_make_hosts():
    """Return whether this user may make network namespaces here."""
    if os.name != "posix" or os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    try:
        network("netns", "add", "synapse-try")
        network("netns", "del", "synapse-try")
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed"),
    pytest.mark.skipif(not can_make_hosts(), reason="network namespaces cannot be made here"),
]


@pytest.fixture
def hosts():
    """Three hosts with the addresses 10.213.77.1 to 3, at a switch of their own."""
    names = [f"synapse-{number}" for number in (1, 2, 3)]
    network("netns", "add", "synapse-switch")
    network("-n", "synapse-switch", "link", "add", "bridge", "type", "bridge")
    network("-n", "synapse-switch", "link", "set", "bridge", "up")
    try:
        for number, name in enumerate(names, start=1):
            network("netns", "add", name)
            plug = f"to-{number}"
            ends = ("link", "add", "cable", "netns", name, "type", "veth", "peer", plug, "netns", "synapse-switch")
            network(*ends)
            network("-n", "synapse-switch", "link", "set", plug, "master", "bridge", "up")
            network("-n", name, "link", "set", "lo", "up")
            network("-n", name, "addr", "add", f"10.213.77.{number}/24", "dev", "cable")
            network("-n", name, "link", "set", "cable", "up")
        yield names
    finally:
        for name in (*names, "synapse-switch"):
            with suppress(subprocess.CalledProcessError):
                network("netns", "del", name)


@contextmanager
def running(host, command, **more):
    """Run a command on a host for the length of a block."""
    environment = os.environ | QUICK_TO_NOTICE | {"PYTHONPATH": str(HERE), "RAY_AUTH_MODE": "disabled"} | more
    with subprocess.Popen(
        ["ip", "netns", "exec", host, *map(str, command)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.terminate()


def test_of_three_hosts_one_is_cut_off_and_nothing_is_lost(hosts, tmp_path):
    start = [PROGRAMS / "ray", "start", "--block", "--disable-usage-stats", "--object-store-memory", "100000000"]
    joining = ["--address", f"{HEAD}:{PORT}", "--num-cpus", "1"]
    as_head = ["--head", "--port", PORT, "--num-cpus", "0", "--include-dashboard", "false"]
    both_work = tmp_path / "both work"
    with ExitStack() as stack:
        for number, host in enumerate(hosts, start=1):
            # Machines that share a disk would not share this folder.
            place = ["--node-ip-address", f"10.213.77.{number}"]
            options = [*as_head, "--temp-dir", tmp_path.parent / "ray"] if number == 1 else joining
            stack.enter_context(running(host, [*start, *options, *place]))
            time.sleep(8 if number == 1 else 1)
        driver = stack.enter_context(running(hosts[0], [sys.executable, "-c", DRIVER, "400", both_work]))
        while not both_work.exists():
            assert driver.poll() is None, driver.communicate()[0]
            time.sleep(0.1)
        network("-n", "synapse-switch", "link", "set", "to-3", "down")
        said, _ = driver.communicate(timeout=120)
    assert driver.returncode == 0, said
    assert "hosts 10.213.77.2 10.213.77.3" in said
