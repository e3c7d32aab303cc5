"""Work that is run by workers on a Ray cluster: Ray places them and carries what they are given, here they are fed.

A worker is an actor that keeps what it built. It has two tasks at a time, the one that it runs and the next, so that it
never waits; a task is as many items as take about `TASK_SECONDS`, by the time that the worker has needed so far. What
goes wrong:

- *A worker is lost* (killed, out of memory, its node gone): another takes its place, and what it had is given out
  again. The item that it was running is blamed, and given up when that happened to it `attempts` times. Of a task of
  several items nobody knows which one it was, so they are given out again in smaller tasks.
- *A worker is slow*: once no items are left, whoever is free takes over what others have not begun, and runs a second
  time what they have had for too long; the first answer counts.
- *The driver is interrupted*: the workers end, and so does a cluster that was started here. If it is killed, Ray does
  the same.
"""

import faulthandler
import logging
import math
import os
import sys
import tempfile
import time
import traceback
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from importlib import import_module
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from synapse.errors import ResourceError, SettingsError
from synapse.execute.base import (
    Executor,
    Failed,
    Item,
    Outcome,
    Recipe,
    Report,
    Result,
    Tally,
    Work,
    build,
    outcome_of,
    unreported,
)

log = logging.getLogger(__name__)

TASK_SECONDS = 0.25
"""What a task takes, about: some hundred times what it costs to hand one out, and little to lose or to wait for."""

_MOST_ITEMS = 4096
"""Items of a task at most, however quick they are."""

_GROWTH = 8
"""A worker's next task has at most so many times as many items as the last: one item may say little of others."""

_BOX = 4
"""A task is handed back unfinished after so many times `TASK_SECONDS`."""

_PIECES = 16
"""Tasks into which that of a lost worker is cut."""

_OVERDUE = 3.0
"""A task is run by a free worker too once it took so many times as long as that one would expect, and a second. It
expects what its latest tasks took for an item, or what its longest took: items are not alike."""

_POLL_SECONDS = 0.2
"""How often it is looked for such tasks, while nothing comes in."""

LOCAL_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Where this is off, Ray takes the loopback interface for the network, and opens no port on another one.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # Ray's own default for a cluster like this one, but for a warning that it prints unless it was asked for.
    "RAY_AUTH_MODE": "token",
}
"""What Ray is told for a cluster that is started here, in variables that it reads when it is imported."""


@dataclass(frozen=True)
class RayExecutor:
    """Workers on a Ray cluster, there for the length of a `with` block, which gives the executor."""

    workers: int
    """How many processes work at a time."""
    address: str | None = None
    """The cluster to join: `auto` for the one that runs on this machine, or host:port. None is the one that this
    process or the variable RAY_ADDRESS knows; where there is none, a cluster is started on this machine, which no other
    machine can reach and which ends with the block."""
    cpus_per_worker: float = 1.0
    """CPUs that Ray sets aside for a worker; a fraction lets several share one."""
    gpus_per_worker: float = 0.0
    """The same for GPUs; with 0 a worker sees none."""
    threads_per_worker: int = 1
    """Threads of torch and of linear algebra in each. Results are bitwise those of other workers, and of a serial run,
    only with the same number."""
    attempts: int = 3
    """How many workers an item may end before it is given up."""
    patience: float = 600.0
    """Seconds to wait while there is no worker at all, for a cluster that is full or still growing."""
    logs: Path | None = None
    """A folder for one log file a worker, which all machines share."""
    object_store_bytes: int = 512 * 2**20
    """Memory of a cluster that is started here for results and shared values on their way."""
    _opened: ExitStack = field(default_factory=ExitStack, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Refuse numbers that cannot be."""
        for name in ("workers", "threads_per_worker", "attempts"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} is {getattr(self, name)}; 1 or more was expected.")
        for name in ("cpus_per_worker", "gpus_per_worker"):
            if getattr(self, name) < 0:
                raise SettingsError(f"{name} is {getattr(self, name)}; 0 or more was expected, fractions too.")

    def __enter__(self) -> Executor:
        return self._opened.enter_context(self._running())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.close()

    @contextmanager
    def _running(self) -> Iterator[Executor]:
        with _connected(self) as ray:
            crew = _Crew(ray, self)
            try:
                yield crew
            finally:
                crew.end()

    @property
    def placement(self) -> dict[str, Any]:
        """What Ray is asked for to start a worker."""
        # They are read when the libraries are loaded, which is after this and in the worker.
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        variables = dict.fromkeys(names, str(self.threads_per_worker))
        if not self.gpus_per_worker:
            variables["CUDA_VISIBLE_DEVICES"] = ""  # or all workers would crowd on the first one
        return {
            "num_cpus": self.cpus_per_worker,
            "num_gpus": self.gpus_per_worker,
            "max_restarts": 0,
            "max_task_retries": 0,
            "scheduling_strategy": "SPREAD",
            "runtime_env": {"env_vars": variables},
        }


@contextmanager
def _connected(executor: RayExecutor) -> Iterator[Any]:
    """Connect to the cluster, or start one, and give the library; undo what was done."""
    is_local = executor.address is None and "RAY_ADDRESS" not in os.environ
    if is_local and "ray" not in sys.modules:  # which reads them when it is imported
        for name, value in LOCAL_SETTINGS.items():
            os.environ.setdefault(name, value)
    ray = _library()
    if ray.is_initialized():
        yield ray
    elif is_local:
        with _folder() as folder, _shut_down(ray):
            _start_cluster(ray, executor, folder)
            yield ray
    else:
        with _shut_down(ray):
            _join_cluster(ray, executor.address or "auto")
            yield ray


_QUIET = {"log_to_driver": False, "configure_logging": False}


def _start_cluster(ray: Any, executor: RayExecutor, folder: str) -> None:
    ray.init(
        address="local",
        num_cpus=max(1, math.ceil(executor.workers * executor.cpus_per_worker)),
        num_gpus=None if executor.gpus_per_worker else 0,
        object_store_memory=executor.object_store_bytes,
        include_dashboard=False,
        _temp_dir=f"{folder}/r",  # Ray lets everybody in there, the folder itself does not
        **_QUIET,
    )
    if ray.util.get_node_ip_address() != "127.0.0.1":
        log.warning("Ray was imported before it could be told to keep to this machine: its ports are open to others.")


def _join_cluster(ray: Any, address: str) -> None:
    try:
        ray.init(address=address, **_QUIET)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ResourceError(
            f"There is no Ray cluster to join at {address!r} ({_first_line(error)}); start one with `ray start "
            "--head`, set RAY_AUTH_MODE=token if it asks for its token, or give no address to use this machine alone."
        ) from error


@contextmanager
def _shut_down(ray: Any) -> Iterator[None]:
    """Leave the cluster at the end, and end it if it was started here."""
    try:
        yield
    finally:
        ray.shutdown()


def _folder() -> tempfile.TemporaryDirectory[str]:
    """Return a folder for what a cluster writes, sockets too, whose paths must be short."""
    short = min(tempfile.gettempdir(), "/tmp", key=len) if os.name == "posix" else None
    return tempfile.TemporaryDirectory(prefix="ray-", dir=short, ignore_cleanup_errors=True)


def _library() -> Any:
    try:
        return import_module("ray")
    except ModuleNotFoundError as error:
        raise SettingsError("ray is not installed; install it with `pip install 'synapse[ray]'`.") from error


# ------------------------------------------------------------------------------------------------------- in the worker


class _Hands:
    """What runs in a worker's process."""

    def __init__(self, name: str, logs: Path | None) -> None:
        self.key, self.built = "", None
        self.crashes: TextIO | None = None
        if logs is not None:
            logs.mkdir(parents=True, exist_ok=True)
            path = logs / f"{name}.log"
            self.crashes = path.open("a", encoding="utf-8")
            faulthandler.enable(self.crashes)
            logging.basicConfig(
                filename=path, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True
            )
            logging.captureWarnings(capture=True)
        log.info("%s begins in process %d.", name, os.getpid())

    def prepare(self, key: str, shared: list[Any]) -> None:
        """Build what is shared, unless it is there; `shared` holds the reference to it."""
        if self.key != key:
            self.key, self.built = "", None  # room for the next
            self.built = build(_library().get(shared[0]))
            self.key = key

    def run(
        self, key: str, shared: list[Any], work: Work[Any, Any], items: list[tuple[int, Any]]
    ) -> tuple[float, list[Outcome[Any]]]:
        """Return the seconds and the outcomes of the items, or of the first of them where they take too long."""
        self.prepare(key, shared)
        began, outcomes = time.perf_counter(), []
        for position, item in items:
            outcome = outcome_of(work, self.built, position, item)
            if isinstance(outcome, Failed):
                log.error("%s", outcome, exc_info=outcome.error)
                outcome = Failed(position, item, _portable(outcome.error))
            outcomes.append(outcome)
            if time.perf_counter() - began > _BOX * TASK_SECONDS:
                break
        seconds = time.perf_counter() - began
        log.info("%d of %d items in %.3f s, from item %d on.", len(outcomes), len(items), seconds, items[0][0])
        return seconds, outcomes


def _portable(error: Exception) -> Exception:
    """Return the error without its frames, which cannot travel: where it was raised is in its notes."""
    trace = "".join(traceback.format_exception(error))
    wire = _library().cloudpickle
    try:
        found: Exception = wire.loads(wire.dumps(error))
    except Exception:  # whatever an error's own code does when it is put together again
        found = RuntimeError(f"{type(error).__name__}: {error}")
    found.add_note(f"In a worker:\n{trace}")
    return found


# ------------------------------------------------------------------------------------------------------- in the driver


@dataclass(eq=False)
class _Task:
    """Items with their positions; `losses` workers were lost over it, `holders` have it now."""

    items: list[tuple[int, Any]]
    losses: int = 0
    holders: int = 0
    given: float = 0.0
    is_done: bool = False


@dataclass(eq=False)
class _Worker:
    """A place for a worker: the actor that has it, the tasks that it was given, the oldest first, and its pace.

    `pace` is the seconds of an item, of late, and `longest` those of its longest task.
    `starting` is the answer that is awaited of an actor that builds what is shared.
    """

    name: str
    actor: Any = None
    starting: Any = None
    tasks: dict[Any, _Task] = field(default_factory=dict)
    pace: float = math.inf
    longest: float = 0.0
    size: int = 1

    @property
    def is_ready(self) -> bool:
        """Whether tasks may be given."""
        return self.actor is not None and self.starting is None

    def learn(self, n_items: int, seconds: float) -> None:
        """Choose the size of the next task by the time that one took."""
        self.longest = max(self.longest, seconds)
        pace = max(seconds, 1e-9) / n_items
        self.pace = pace if math.isinf(self.pace) else (self.pace + pace) / 2
        self.size = max(1, min(_MOST_ITEMS, _GROWTH * self.size, round(TASK_SECONDS / self.pace)))


class _Crew(Executor):
    """The workers, kept from one map to the next."""

    is_remote = True

    def __init__(self, ray: Any, executor: RayExecutor) -> None:
        self.ray, self.executor = ray, executor
        self.workers = executor.workers
        self.places = [_Worker(f"worker-{place}") for place in range(executor.workers)]
        self.hands = ray.remote(_Hands).options(**executor.placement)
        self.shared: Any = None
        self.reference: Any = None
        self.is_mapping = False

    def map(
        self, work: Work[Item, Result], items: Iterable[Item], *, shared: Any = None, report: Report = unreported
    ) -> Iterator[Outcome[Result]]:
        """Yield what became of every item, in the order in which they are through."""
        if self.is_mapping:
            raise SettingsError("These workers are in the middle of another map; take that to its end, or close it.")
        self.is_mapping = True
        try:
            self._share(shared)
            yield from _Map(self, work, items, Tally(report)).outcomes()
        finally:
            self.is_mapping = False
            for worker in self.places:  # what is still run is run for nobody
                if worker.tasks:
                    self.dismiss(worker)

    def _share(self, shared: Any) -> None:
        """Put what is shared where workers find it, unless it is the recipe that they have."""
        is_known = isinstance(shared, Recipe) and type(shared) is type(self.shared) and shared == self.shared
        if not is_known:
            self.shared, self.reference = shared, self.ray.put(shared)
        for worker in self.places:
            worker.pace, worker.longest, worker.size = math.inf, 0.0, 1

    @property
    def key(self) -> str:
        """What is shared, by name."""
        return str(self.reference.hex())

    def start(self, worker: _Worker) -> None:
        """Let a worker build what is shared, in a new process if it has none."""
        if worker.actor is None:
            worker.actor = self.hands.remote(worker.name, self.executor.logs)
        worker.starting = worker.actor.prepare.remote(self.key, [self.reference])

    def dismiss(self, worker: _Worker) -> None:
        """End a worker's process."""
        if worker.actor is not None:
            with suppress(self.ray.exceptions.RayError, ValueError):
                self.ray.kill(worker.actor)
        worker.actor = worker.starting = None
        worker.tasks.clear()

    def end(self) -> None:
        """End all of them."""
        for worker in self.places:
            self.dismiss(worker)


class _Map:
    """One map: what is still to be given out, and to whom."""

    def __init__(self, crew: _Crew, work: Work[Any, Any], items: Iterable[Any], tally: Tally) -> None:
        self.crew, self.ray, self.workers, self.work, self.tally = crew, crew.ray, crew.places, work, tally
        self.source = enumerate(items)
        self.waiting: deque[_Task] = deque()
        self.is_exhausted = False
        self.lost_starts = 0
        self.last_ready = time.monotonic()

    def outcomes(self) -> Iterator[Outcome[Any]]:
        """Yield what became of the items."""
        self.waiting.extend(_Task([first]) for first in islice(self.source, 1))
        if not self.waiting:
            return
        for worker in self.workers:
            self.crew.start(worker)
        while self.waiting or not self.is_exhausted or self.is_awaiting:
            found = self.awaited()
            self.feed()  # before the caller takes his time
            for outcome in found:
                self.tally.add(outcome)
                yield outcome

    @property
    def is_awaiting(self) -> bool:
        """Whether there is a task that nobody has answered; that of a worker whom another overtook is none."""
        return any(not task.is_done for worker in self.workers for task in worker.tasks.values())

    # ------------------------------------------------------------------------------------------- what is given out

    def feed(self) -> None:
        """Give every worker that is ready a task, and then each a second one."""
        for depth in (1, 2):
            for worker in self.workers:
                if worker.is_ready and len(worker.tasks) < depth:
                    task = self.next_task(worker)
                    if task is not None:
                        self.give(worker, task)

    def next_task(self, worker: _Worker) -> _Task | None:
        """Return what a worker should do next, if there is anything."""
        if self.waiting:
            return self.waiting.popleft()
        if not self.is_exhausted:
            items = list(islice(self.source, worker.size))
            self.is_exhausted = len(items) < worker.size
            if items:
                return _Task(items)
        return None if worker.tasks else self.taken_over(worker)

    def taken_over(self, worker: _Worker) -> _Task | None:
        """Return a task of others for a worker that is free: one that is not begun, or else one that is overdue."""
        for other in self.workers:
            for reference, task in list(other.tasks.items())[:0:-1]:
                self.ray.cancel(reference)
                del other.tasks[reference]
                task.holders -= 1
                return task
        late = [task for other in self.workers for task in other.tasks.values() if self.is_overdue(task, worker)]
        return min(late, key=_when_given, default=None)

    def is_overdue(self, task: _Task, free: _Worker) -> bool:
        """Return whether one worker alone has a task for so long that a free one should run it too."""
        expected = 1.0 + _OVERDUE * max(len(task.items) * free.pace, free.longest)
        return task.holders == 1 and not task.is_done and time.monotonic() - task.given > expected

    def give(self, worker: _Worker, task: _Task) -> None:
        """Hand a task to a worker."""
        crew = self.crew
        reference = worker.actor.run.remote(crew.key, [crew.reference], self.work, task.items)
        worker.tasks[reference] = task
        task.holders += 1
        task.given = time.monotonic()

    # ------------------------------------------------------------------------------------------------ what comes in

    def awaited(self) -> list[Outcome[Any]]:
        """Return the outcomes of the answer that comes in next; none where nothing does for a while."""
        by_reference = {reference: worker for worker in self.workers for reference in worker.tasks}
        by_reference |= {worker.starting: worker for worker in self.workers if worker.starting is not None}
        if any(worker.is_ready for worker in self.workers):
            self.last_ready = time.monotonic()
        elif time.monotonic() - self.last_ready > self.crew.executor.patience:
            self.refuse_to_wait()
        ready, _ = self.ray.wait(list(by_reference), timeout=_POLL_SECONDS)
        return [outcome for reference in ready for outcome in self.answered(by_reference[reference], reference)]

    def answered(self, worker: _Worker, reference: Any) -> list[Outcome[Any]]:
        """Return the outcomes in an answer of a worker, which may be that it was lost."""
        errors = self.ray.exceptions
        try:
            answer = self.ray.get(reference)
        except errors.RayTaskError as error:  # not that of an item, which would be an outcome: nothing could be built
            raise error.cause from error
        except errors.RayError as error:
            return self.lost(worker, error)
        if reference == worker.starting:
            worker.starting, self.lost_starts = None, 0
            return []
        task, (seconds, outcomes) = worker.tasks.pop(reference), answer
        task.holders -= 1
        worker.learn(len(outcomes), seconds)
        if task.is_done:
            return []
        task.is_done = True
        rest = task.items[len(outcomes) :]
        if rest:
            self.waiting.append(_Task(rest))
        return list(outcomes)

    def lost(self, worker: _Worker, error: Exception) -> list[Outcome[Any]]:
        """Put another in the place of a worker; return the outcome of an item that was given up over it."""
        log.warning("%s was lost, and what it had is run again (%s).", worker.name, _first_line(error))
        self.tally.lost_workers += 1
        tasks, was_starting = list(worker.tasks.values()), worker.starting is not None
        self.crew.dismiss(worker)
        if was_starting:
            self.refuse_many_lost_starts(error)
        self.crew.start(worker)
        found: list[Outcome[Any]] = []
        for place, task in enumerate(tasks):
            task.holders -= 1
            task.losses += place == 0  # the one that was running
            if not task.is_done and not task.holders:
                found += self.once_more(task, error, is_blamed=place == 0)
        return found

    def once_more(self, task: _Task, error: Exception, *, is_blamed: bool) -> list[Outcome[Any]]:
        """Let a task of a lost worker be given out again, in pieces if it may have been the reason; or give it up."""
        if not is_blamed:
            self.waiting.appendleft(task)
        elif len(task.items) > 1:
            length = math.ceil(len(task.items) / _PIECES)
            self.waiting.extend(
                _Task(task.items[start : start + length]) for start in range(0, len(task.items), length)
            )
        elif task.losses < self.crew.executor.attempts:
            self.waiting.append(task)
        else:
            ((position, item),) = task.items
            reason = ResourceError(
                f"Each of {task.losses} workers that ran the item {item!r} was lost ({_first_line(error)}); it was "
                "given up. If memory ran out, give workers fewer or smaller items."
            )
            return [Failed(position, item, reason, task.losses)]
        return []

    def refuse_many_lost_starts(self, error: Exception) -> None:
        """Refuse to go on where no worker gets as far as its first task."""
        self.lost_starts += 1
        most = self.crew.executor.attempts * len(self.workers)
        if self.lost_starts >= most:
            raise ResourceError(
                f"{self.lost_starts} workers in turn were lost before they had built what their work shares "
                f"({_first_line(error)}); see that one of them fits into the memory of its machine."
            ) from error

    def refuse_to_wait(self) -> None:
        """Refuse to wait longer for a cluster that has no room."""
        executor, there = self.crew.executor, self.ray.cluster_resources()
        raise ResourceError(
            f"No worker could be started in {executor.patience:g} s: each asks for {executor.cpus_per_worker:g} CPUs "
            f"and {executor.gpus_per_worker:g} GPUs, and the cluster has {there.get('CPU', 0):g} and "
            f"{there.get('GPU', 0):g} in all; ask for less, or wait until it is free."
        )


def _when_given(task: _Task) -> float:
    return task.given


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
