"""Workers on a cluster of this machine: what an executor promises, and what Ray's own one does on top."""

import logging
import sys
import time
from importlib import import_module
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from pieces_of_work import (
    Building,
    Deadly,
    array,
    asleep,
    asleep_for_itself,
    built_in,
    gpus,
    is_cut_down_once,
    killing,
    noted_and_long,
    raising_oddly,
    refusing,
    square,
    threads,
)

from synapse.errors import ResourceError, SettingsError
from synapse.execute import Failed, RayExecutor, SerialExecutor
from synapse.testing import check_executor

# Not `importorskip`: what a cluster of this machine is told must be said before Ray is imported.
pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="module")
def crew(logs):
    """Two workers of a cluster of this machine, which all tests here share."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))  # workers import the pieces of work from here
        with RayExecutor(workers=2, threads_per_worker=2, logs=logs) as executor:
            yield executor


def both_awake(crew):
    """Return the processes of both workers, found while both work: short work one of them could take alone."""
    found = set()
    for _ in range(10):
        found |= {pid for _, pid in results(crew.map(built_in, range(300), shared=0)).values()}
        if len(found) == 2:
            return found
    raise AssertionError(f"One worker did all the work: {found}.")


def results(outcomes):
    return {outcome.position: outcome.result for outcome in outcomes}


def test_the_workers_hold_the_contract(crew):
    check_executor(crew)


def test_both_workers_work_and_give_what_this_process_gives(crew):
    found = results(crew.map(square, range(500)))
    assert found == results(SerialExecutor().map(square, range(500)))
    assert len(both_awake(crew)) == 2


def test_workers_keep_what_they_built_for_the_next_map(crew, tmp_path):
    pids = both_awake(crew)
    for _ in range(2):
        found = results(crew.map(built_in, range(300), shared=Building(tmp_path))).values()
        assert {built for built, _ in found} == {pid for _, pid in found} == pids
    assert len(list(tmp_path.iterdir())) == 2


def test_an_item_as_long_as_others_were_is_run_once_and_no_worker_is_ended_over_it(crew, tmp_path):
    awake = both_awake(crew)
    items = [("first", 2.0), ("second", 2.0), *((f"quick {i}", 0.01) for i in range(40)), ("last", 2.5)]
    assert len(list(crew.map(noted_and_long, items, shared=tmp_path))) == len(items)
    time.sleep(0.5)  # a second run would have begun by now
    assert {path.name: len(path.read_text().split()) for path in tmp_path.iterdir()} == {name: 1 for name, _ in items}
    assert both_awake(crew) == awake


def test_a_quick_item_does_not_wait_for_a_slow_one(crew):
    order = [outcome.position for outcome in crew.map(asleep_for_itself, [1.5, *[0.01] * 20])]
    assert sorted(order) == list(range(21))
    assert order[-1] == 0


def test_items_left_over_go_to_whoever_is_free(crew):
    both_awake(crew)
    began = time.monotonic()
    assert len(list(crew.map(asleep, range(4), shared=0.8))) == 4
    assert time.monotonic() - began < 2.6  # 1.6 by two, 3.2 by one, 2.4 if one had kept three


def test_a_worker_that_is_killed_is_replaced_and_its_items_run_again(crew, tmp_path, caplog):
    reports = []
    outcomes = list(crew.map(is_cut_down_once, range(30), shared=tmp_path, report=reports.append))
    assert sorted(outcome.position for outcome in outcomes) == list(range(30))
    assert results(outcomes) == {i: i * i for i in range(30)}
    assert reports[-1].lost_workers == 1
    assert "was lost, and what it had is run again" in caplog.text


def test_an_item_that_ends_every_worker_is_given_up_and_the_rest_is_done(crew):
    outcomes = list(crew.map(killing, range(8)))
    assert sorted(outcome.position for outcome in outcomes) == list(range(8))
    (failed,) = (outcome for outcome in outcomes if isinstance(outcome, Failed))
    assert (failed.position, failed.item, failed.lost_workers, failed.is_poisoned) == (5, 5, 3, True)
    assert str(failed.error).startswith("Each of 3 workers that ran the item 5 was lost (")
    assert isinstance(failed.error, ResourceError)


def test_a_failure_says_where_in_the_worker_it_was_raised_and_the_log_does_too(crew, logs):
    (failed,) = (outcome for outcome in crew.map(refusing, range(5)) if isinstance(outcome, Failed))
    assert str(failed) == "Item 3 (3): ValueError: three is too many"
    assert 'raise ValueError("three is too many")' in failed.error.__notes__[0]
    written = "".join(path.read_text() for path in logs.iterdir())
    assert "ERROR synapse.execute.ray: Item 3 (3): ValueError: three is too many\nTraceback" in written
    assert {path.name for path in logs.iterdir()} == {"worker-0.log", "worker-1.log"}


def test_an_error_that_cannot_travel_is_told_in_words(crew):
    (failed,) = crew.map(raising_oddly, [1])
    assert str(failed) == "Item 0 (1): RuntimeError: OddError: 1 and 2"


def test_workers_that_die_over_what_they_build_are_not_replaced_for_ever(crew):
    with RayExecutor(workers=1, attempts=1, cpus_per_worker=0.0) as executor, pytest.raises(ResourceError) as caught:
        list(executor.map(square, range(5), shared=Deadly()))
    assert str(caught.value).startswith("1 workers in turn were lost before they had built what their work shares (")


def test_every_worker_has_the_threads_that_were_asked_for(crew):
    assert set(results(crew.map(threads, range(8))).values()) == {(2, "2")}
    assert torch.get_num_threads() == 1  # those of this process stay


def test_a_worker_that_asks_for_no_gpu_sees_none(crew):
    assert set(results(crew.map(gpus, range(4))).values()) == {""}


def test_arrays_come_back_whole(crew):
    for outcome in crew.map(array, range(6)):
        np.testing.assert_array_equal(outcome.result, np.full(200_000, outcome.position, np.float32))


def test_a_map_that_is_left_half_way_stops_and_the_next_one_starts_clean(crew):
    left = crew.map(asleep, range(1000), shared=0.05)
    assert len(list(islice(left, 3))) == 3
    left.close()
    assert results(crew.map(square, range(10))) == {i: i * i for i in range(10)}


def test_a_second_map_at_a_time_is_refused(crew):
    first = crew.map(square, range(5))
    next(first)
    with pytest.raises(SettingsError, match="^These workers are in the middle of another map; take that to its end"):
        list(crew.map(square, range(5)))
    assert len(list(first)) == 4


def test_items_that_are_done_are_not_given_again(crew):
    done = {outcome.result for outcome in islice(crew.map(asleep, range(20), shared=0.01), 8)}
    rest = [item for item in range(20) if item not in done]
    again = {outcome.result for outcome in crew.map(asleep, rest, shared=0.01)}
    assert done | again == set(range(20))
    assert not done & again


def test_a_cluster_without_room_is_not_waited_for_for_ever(crew):
    full = RayExecutor(workers=1, gpus_per_worker=1.0, patience=0.5)
    with full as executor, pytest.raises(ResourceError) as caught:
        list(executor.map(square, [1]))
    assert str(caught.value) == (
        "No worker could be started in 0.5 s: each asks for 1 CPUs and 1 GPUs, and the cluster has 2 and 0 in all; ask "
        "for less, or wait until it is free."
    )


def test_the_cluster_is_on_the_loopback_interface(crew):
    ray = import_module("ray")
    assert ray.util.get_node_ip_address() == "127.0.0.1"
    assert ray.cluster_resources()["CPU"] == 2


def test_a_cluster_that_is_not_there_cannot_be_joined(monkeypatch):
    ray = import_module("ray")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "init", unreachable)
    with pytest.raises(ResourceError) as caught, RayExecutor(workers=1, address="127.0.0.1:9"):
        pass
    assert str(caught.value) == (
        "There is no Ray cluster to join at '127.0.0.1:9' (nobody answers); start one with `ray start --head`, set "
        "RAY_AUTH_MODE=token if it asks for its token, or give no address to use this machine alone."
    )


def unreachable(**_):
    raise ConnectionError("nobody answers\nfor long")


def test_a_missing_library_prints_how_it_is_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SettingsError) as caught, RayExecutor(workers=1):
        pass
    assert str(caught.value) == "ray is not installed; install it with `pip install 'synapse[ray]'`."


def test_executors_are_values():
    assert RayExecutor(workers=2) == RayExecutor(workers=2)
    assert len({RayExecutor(workers=2), RayExecutor(workers=2), RayExecutor(workers=3)}) == 2


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"workers": 0}, "workers is 0; 1 or more was expected."),
        ({"workers": 1, "threads_per_worker": 0}, "threads_per_worker is 0; 1 or more was expected."),
        ({"workers": 1, "gpus_per_worker": -0.5}, "gpus_per_worker is -0.5; 0 or more was expected, fractions too."),
    ],
)
def test_numbers_that_cannot_be_are_refused(numbers, message):
    with pytest.raises(SettingsError) as caught:
        RayExecutor(**numbers)
    assert str(caught.value) == message


def test_nothing_of_ray_stays_in_the_log_of_this_process(crew, caplog):
    with caplog.at_level(logging.WARNING):
        list(crew.map(square, range(5)))
    assert caplog.records == []
