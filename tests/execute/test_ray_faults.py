"""What goes wrong on a cluster, on purpose: several nodes as processes of this machine, workers and nodes taken away.

Slow; `python -m pytest -m cluster` runs these tests and no others. Everything listens on the loopback interface.
"""

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from itertools import count, islice
from pathlib import Path

import pytest
from pieces_of_work import killing_in_company, noted, slow_in_one_process, square

from synapse.execute import Done, Failed, RayExecutor
from synapse.execute.ray import LOCAL_SETTINGS
from synapse.testing import check_executor

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed"),
    pytest.mark.skipif(not Path("/proc/self").exists(), reason="processes are looked up in /proc"),
]

HERE = str(Path(__file__).parent)


@pytest.fixture
def cluster(monkeypatch):
    """A head node without CPUs; tests add nodes with one CPU each."""
    monkeypatch.setenv("PYTHONPATH", HERE)
    if "ray" not in sys.modules:  # what it is told is read when it is imported
        for name, value in {**LOCAL_SETTINGS, "RAY_AUTH_MODE": "disabled"}.items():
            os.environ.setdefault(name, value)
    found = import_module("ray.cluster_utils").Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
    )
    yield found
    found.shutdown()


@contextmanager
def joined(cluster, workers, **options):
    with RayExecutor(workers=workers, address=cluster.address, **options) as executor:
        yield executor


def is_alive(pid):
    """Return whether a worker still runs; one that nobody has buried yet does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state != "Z" and b"ray::" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def wait_until(is_so, seconds=60.0):
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "this was to be so by now"
        time.sleep(0.1)


def check_all_once(outcomes, n_items):
    """Nothing is lost, nothing comes twice, and every result is that of its item."""
    assert sorted(outcome.position for outcome in outcomes) == list(range(n_items))
    assert [o for o in outcomes if isinstance(o, Failed)] == []
    assert all(outcome.result == outcome.position for outcome in outcomes)


class Killer(threading.Thread):
    """Kills a worker that has left marks in a folder, at random moments, so many times."""

    def __init__(self, folder, times, seed=5):
        super().__init__(daemon=True)
        self.folder, self.times, self.random, self.killed = folder, times, random.Random(seed), []

    def run(self):
        while len(self.killed) < self.times:
            time.sleep(self.random.uniform(0.1, 1.0))
            alive = list(filter(is_alive, processes(self.folder)))
            if alive:
                self.killed.append(self.random.choice(sorted(alive)))
                os.kill(self.killed[-1], signal.SIGKILL)


def test_a_cluster_of_two_nodes_holds_the_contract(cluster):
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    with joined(cluster, 2) as executor:
        check_executor(executor)
    assert len(cluster.list_all_nodes()) == 3  # a cluster that was joined goes on


def test_workers_killed_at_twenty_random_moments_lose_nothing_and_give_nothing_twice(cluster, tmp_path):
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    killer, given = Killer(tmp_path, 20), count()
    killer.start()
    until_all_are_killed = iter(lambda: next(given) if killer.is_alive() else -1, -1)
    reports = []
    with joined(cluster, 2, attempts=20) as executor:
        outcomes = list(executor.map(noted, until_all_are_killed, shared=tmp_path, report=reports.append))
    check_all_once(outcomes, next(given))
    assert len(killer.killed) == 20
    assert reports[-1].lost_workers >= 19  # the last one may have been killed after its last answer


def test_a_node_that_is_taken_away_takes_nothing_with_it_and_a_new_one_is_used(cluster, tmp_path):
    nodes, end, given = [cluster.add_node(num_cpus=1) for _ in range(3)], time.monotonic() + 120, count()

    def go_on():
        return len(processes(tmp_path)) < 4 and time.monotonic() < end

    with joined(cluster, 3) as executor:
        begun = executor.map(noted, iter(lambda: next(given) if go_on() else -1, -1), shared=tmp_path)
        outcomes = list(takewhile_fewer(begun, tmp_path, 3))
        cluster.remove_node(nodes[0], allow_graceful=False)
        outcomes += islice(begun, 100)  # by those that are left
        assert len(processes(tmp_path)) == 3
        cluster.add_node(num_cpus=1)
        outcomes += begun
    check_all_once(outcomes, next(given))
    assert len(processes(tmp_path)) == 4


def processes(folder):
    """Return the workers that have left marks in a folder."""
    return {int(mark.name) for mark in folder.iterdir()}


def takewhile_fewer(outcomes, folder, n):
    """Yield outcomes until so many workers have left marks."""
    for outcome in outcomes:
        yield outcome
        if len(processes(folder)) == n:
            return


def test_of_many_tiny_items_the_one_that_ends_its_worker_is_found_and_given_up(cluster):
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    with joined(cluster, 2) as executor:
        outcomes = list(executor.map(killing_in_company, range(20_000), shared=12_345))
    (failed,) = (outcome for outcome in outcomes if isinstance(outcome, Failed))
    assert (failed.position, failed.item, failed.lost_workers) == (12_345, 12_345, 3)
    assert sorted(outcome.position for outcome in outcomes) == list(range(20_000))


def test_a_worker_that_is_slow_does_not_hold_up_the_items_of_the_others(cluster, tmp_path):
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    with joined(cluster, 2) as executor:
        list(executor.map(noted, range(40), shared=tmp_path))  # both are awake
        began = time.monotonic()
        outcomes = list(executor.map(slow_in_one_process, range(60), shared=(tmp_path, 20.0)))
    assert time.monotonic() - began < 12
    assert sorted(outcome.position for outcome in outcomes) == list(range(60))
    assert len({outcome.result for outcome in outcomes}) == 1  # the slow one's item was overtaken


def test_the_memory_of_the_driver_does_not_grow_with_the_number_of_items(cluster):
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    at = {}
    with joined(cluster, 2) as executor:
        for number, outcome in enumerate(executor.map(square, range(100_000)), start=1):
            assert isinstance(outcome, Done)
            if number in (10_000, 100_000):
                at[number] = resident_bytes()
    assert number == 100_000
    assert at[100_000] - at[10_000] < 8 * 2**20


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# ------------------------------------------------------------------------------------------- the driver is interrupted

DRIVER = """
import sys
from pathlib import Path
from pieces_of_work import noted
from synapse.execute import RayExecutor

folder, done, address = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] or None
there = set(done.read_text().split()) if done.exists() else set()
items = (item for item in range(300) if str(item) not in there)
with RayExecutor(workers=2, address=address) as executor, done.open("a") as marks:
    import ray
    (folder.parent / "session").write_text(ray.get_runtime_context().gcs_address)
    for outcome in executor.map(noted, items, shared=folder):
        marks.write(f"{outcome.result}\\n")
        marks.flush()
"""


def driver(tmp_path, address=""):
    folder, done = tmp_path / "marks", tmp_path / "done"
    folder.mkdir(exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": HERE}
    command = [sys.executable, "-c", DRIVER, str(folder), str(done), address]
    return subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)


def until_under_way(running, tmp_path):
    """Wait until both workers of a driver have worked, and return their processes."""
    wait_until(lambda: running.poll() is None and len(processes(tmp_path / "marks")) == 2, 120)
    wait_until(lambda: (tmp_path / "done").read_text() != "")
    return processes(tmp_path / "marks")


def is_listening(address):
    """Return whether anybody waits for connections at a local host:port."""
    with socket.socket() as tried:
        host, _, port = address.rpartition(":")
        return tried.connect_ex((host, int(port))) == 0


@pytest.mark.parametrize("blow", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda blow: blow.name)
def test_a_driver_that_is_stopped_takes_its_cluster_with_it_and_the_next_one_goes_on(blow, tmp_path):
    first = driver(tmp_path)
    pids = until_under_way(first, tmp_path)
    address = (tmp_path / "session").read_text()
    assert is_listening(address)
    first.send_signal(blow)
    first.wait(60)
    wait_until(lambda: not any(map(is_alive, pids)) and not is_listening(address))
    done = (tmp_path / "done").read_text().split()
    assert 0 < len(done) < 300
    second = driver(tmp_path)
    assert second.wait(180) == 0
    assert sorted(map(int, (tmp_path / "done").read_text().split())) == list(range(300))


def test_a_driver_that_is_stopped_leaves_a_cluster_that_it_joined(cluster, tmp_path):
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    running = driver(tmp_path, cluster.address)
    pids = until_under_way(running, tmp_path)
    running.send_signal(signal.SIGKILL)
    running.wait(60)
    wait_until(lambda: not any(map(is_alive, pids)))
    with joined(cluster, 2) as executor:
        assert len(list(executor.map(square, range(50)))) == 50
