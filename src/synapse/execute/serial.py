"""Work that is run in this process, one item after the other."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from synapse.execute.base import Executor, Item, Outcome, Report, Result, Tally, Work, build, outcome_of, unreported


@dataclass(frozen=True)
class SerialExecutor(Executor):
    """Runs the items in their order; a context that does nothing, so that it stands where others are opened.

    `threads_per_worker` is the number of threads of torch while an item runs; None leaves it as it is.
    """

    threads_per_worker: int | None = None

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
