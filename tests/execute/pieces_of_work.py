"""Work and recipes for executors; workers import this file, so it imports little."""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Building:
    """A recipe that leaves a file behind each time it is built."""

    folder: Path

    def build(self):
        (self.folder / f"{os.getpid()}-{time.monotonic_ns()}").touch()
        return os.getpid()


@dataclass(frozen=True)
class Deadly:
    """A recipe whose building ends the process."""

    def build(self):
        os.kill(os.getpid(), signal.SIGKILL)


def square(shared, item):
    return item * item


def built_in(built, item):
    time.sleep(0.01)
    return built, os.getpid()


def asleep(seconds, item):
    time.sleep(seconds)
    return item


def asleep_for_itself(shared, item):
    time.sleep(item)
    return item


def threads(shared, item):
    import torch

    return torch.get_num_threads(), os.environ["OMP_NUM_THREADS"]


def gpus(shared, item):
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def array(shared, item):
    return np.full(200_000, item, dtype=np.float32)


def is_cut_down_once(folder, item):
    """End the worker at the first try of item 7."""
    time.sleep(0.02)
    if item == 7 and not (folder / "tried").exists():
        (folder / "tried").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return item * item


def killing(shared, item):
    if item == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def refusing(shared, item):
    if item == 3:
        raise ValueError("three is too many")
    return item


def noted(folder, item):
    """Leave a mark of every time that an item is run, and say which process did it."""
    time.sleep(0.05)
    with (folder / f"{os.getpid()}").open("a") as marks:
        marks.write(f"{item}\n")
    return item


def noted_and_long(folder, item):
    """Leave a mark of every time that an item is run, and take as long as the item says."""
    name, seconds = item
    with (folder / name).open("a") as marks:
        marks.write(f"{os.getpid()}\n")
    time.sleep(seconds)
    return os.getpid()


class OddError(Exception):
    """An error that cannot be put together again from its arguments."""

    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")


def raising_oddly(shared, item):
    raise OddError(item, item + 1)


def slow_in_one_process(shared, item):
    """Take long wherever the first item was taken, and little time elsewhere."""
    folder, seconds = shared
    try:
        os.close(os.open(folder / "taken", os.O_CREAT | os.O_EXCL))
        (folder / "slow").write_text(str(os.getpid()))
    except FileExistsError:
        time.sleep(0.02)
    is_slow = (folder / "slow").exists() and (folder / "slow").read_text() == str(os.getpid())
    time.sleep(seconds if is_slow else 0)
    return os.getpid()


def killing_in_company(deadly, item):
    if item == deadly:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def where(shared, item):
    """Say on which host an item is run."""
    import ray

    time.sleep(0.05)
    return ray.util.get_node_ip_address()
