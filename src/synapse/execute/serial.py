"""Work that is run in this process: one item after the other, or on its threads."""

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from types import TracebackType
from typing import Any

from threadpoolctl import threadpool_limits

from synapse.errors import SettingsError
from synapse.execute.base import Executor, Item, Outcome, Report, Result, Tally, Work, build, outcome_of, unreported


@dataclass(frozen=True)
class SerialExecutor(Executor):
    """Runs the items in their order; a context that does nothing, so that it stands where others are opened.

    `threads_per_worker` is the number of threads of torch while an item runs; None leaves it as it is.
    """

    threads_per_worker: int | None = None
    workers: int = field(default=1, init=False)

    def __enter__(self) -> Executor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def map(
        self, work: Work[Item, Result], items: Iterable[Item], *, shared: Any = None, report: Report = unreported
    ) -> Iterator[Outcome[Result]]:
        """Yield what became of every item, in their order."""
        tally = Tally(report)
        with _torch_threads(self.threads_per_worker):
            built = build(shared)
        for position, item in enumerate(items):
            with _torch_threads(self.threads_per_worker):
                outcome = outcome_of(work, built, position, item)
            tally.add(outcome)
            yield outcome


@dataclass(frozen=True)
class ThreadExecutor(Executor):
    """Runs items on threads of this process, each with one thread of linear algebra; outcomes come in their order.

    For work that leaves Python, such as many small matrix products: one thread an item beats many threads a product,
    most of all on a busy machine. What is shared is one value for all threads.
    """

    workers: int = os.cpu_count() or 1

    def map(
        self, work: Work[Item, Result], items: Iterable[Item], *, shared: Any = None, report: Report = unreported
    ) -> Iterator[Outcome[Result]]:
        """Yield what became of every item, in their order."""
        tally, built, numbered = Tally(report), build(shared), enumerate(items)
        coming: deque[Future[Outcome[Result]]] = deque()
        with threadpool_limits(limits=1, user_api="blas"), ThreadPoolExecutor(self.workers) as pool:
            try:
                while True:
                    for position, item in islice(numbered, 2 * self.workers - len(coming)):
                        coming.append(pool.submit(outcome_of, work, built, position, item))
                    if not coming:
                        return
                    outcome = coming.popleft().result()
                    tally.add(outcome)
                    yield outcome
            finally:
                pool.shutdown(cancel_futures=True)


def for_models(executor: Executor | None) -> Executor:
    """Return what runs work that edits a live model: this process by default, and never threads that share the model.

    Raises:
        SettingsError: the executor runs several items at a time in this process.
    """
    found = executor or SerialExecutor()
    if found.workers > 1 and not found.is_remote:
        raise SettingsError(
            f"{type(found).__name__} was given to run a model in {found.workers} threads, whose edits would mix; a "
            "SerialExecutor or a RayExecutor was expected."
        )
    return found


@contextmanager
def _torch_threads(n: int | None) -> Iterator[None]:
    if n is None:
        yield
        return
    import torch  # takes seconds to load, which work without it need not wait for

    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)
