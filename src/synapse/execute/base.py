"""What every executor does: a function, items and what they share in; one outcome for each item out."""

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, TypeVar, runtime_checkable

log = logging.getLogger(__name__)

Item = TypeVar("Item", bound=Hashable)
Result = TypeVar("Result")

Work = Callable[[Any, Item], Result]
"""Takes what was built of `shared`, and an item; a function of a module, so that every worker can import it."""


@runtime_checkable
class Recipe(Protocol):
    """A small value that travels in place of what is built from it, such as the folder of a model."""

    def build(self) -> Any:
        """Return what the work is given."""


@dataclass(frozen=True, eq=False)
class Done(Generic[Result]):
    """An item that is through: its position among the items, and what the work returned."""

    position: int
    result: Result


@dataclass(frozen=True, eq=False)
class Failed:
    """An item that gave no result: its position, itself, and why.

    `error` is what the work raised, with the place where it did in its notes. For an item that ended `lost_workers`
    workers it is a ResourceError; otherwise that number is 0.
    """

    position: int
    item: Hashable
    error: Exception
    lost_workers: int = 0

    @property
    def is_poisoned(self) -> bool:
        """Whether the item was given up because its workers did not survive it."""
        return self.lost_workers > 0

    def __str__(self) -> str:
        return f"Item {self.position} ({self.item!r}): {type(self.error).__name__}: {self.error}"


Outcome = Done[Result] | Failed
"""What became of an item."""


@dataclass(frozen=True)
class Counts:
    """How far a map is: items done and failed, workers that were lost and replaced, seconds since it began."""

    done: int = 0
    failed: int = 0
    lost_workers: int = 0
    seconds: float = 0.0

    @property
    def per_second(self) -> float:
        """Items a second, done or failed."""
        return (self.done + self.failed) / self.seconds if self.seconds > 0 else 0.0


Report = Callable[[Counts], None]
"""Told how far a map is, after every item."""


def unreported(_counts: Counts) -> None:
    """Say nothing."""


class Executor(ABC):
    """Runs work on items, one outcome each; `synapse.testing.check_executor` checks what is promised here.

    An item that fails is an outcome like any other, and the rest goes on. Outcomes come in any order. What is left of
    a map that is not taken to its end is not run.
    """

    workers: int
    """How many items are run at a time."""
    is_remote: ClassVar[bool] = False
    """Whether items are run in other processes, which have only what they are sent."""

    @abstractmethod
    def map(
        self, work: Work[Item, Result], items: Iterable[Item], *, shared: Any = None, report: Report = unreported
    ) -> Iterator[Outcome[Result]]:
        """Yield what became of every item, as `work(built, item)` returns or raises.

        `shared` is a recipe: every worker calls its `build()` once, and gives the work what that returned. A value
        without that method is handed over as it is, a copy for each worker. The work must change neither.

        `items` may be a generator, also one without an end: it is read as outcomes are taken, and little further.
        Results come back several at a time where items are quick; arrays in them may be read-only.

        A worker may be lost in the middle of an item, or be so slow that another one takes it over. So an item can be
        run more than once, even at the same time, and still has one outcome: what the work writes must be the same
        each time, and be put in place whole.

        Raises:
            Exception: what `build()` raised.
            ResourceError: no worker could be had, or none survived building what is shared.
        """

    def results(
        self, work: Work[Item, Result], items: Iterable[Item], *, shared: Any = None, report: Report = unreported
    ) -> Iterator[Done[Result]]:
        """Yield what is done, as `map` does, and raise what an item raised.

        In other processes the rest is run first, since it is paid for; here there is nothing to wait for.

        Raises:
            Exception: that of the first item that failed; all of them are logged.
        """
        failed: list[Failed] = []
        for outcome in self.map(work, items, shared=shared, report=report):
            if isinstance(outcome, Done):
                yield outcome
                continue
            failed.append(outcome)
            if not self.is_remote:
                break
        if len(failed) > 1:
            for each in failed:
                log.error("%s", each)
            log.error("%d items failed, of which the first is the reason given.", len(failed))
        if failed:
            raise min(failed, key=_position).error


def _position(outcome: Failed) -> int:
    return outcome.position


def build(shared: Any) -> Any:
    """Return what a recipe builds; any other value is its own recipe."""
    return shared.build() if isinstance(shared, Recipe) else shared


def outcome_of(work: Work[Item, Result], built: Any, position: int, item: Item) -> Outcome[Result]:
    """Return what becomes of an item that is run here and now."""
    try:
        return Done(position, work(built, item))
    except Exception as error:
        return Failed(position, item, error)


class Tally:
    """Counts outcomes as they pass, and reports."""

    def __init__(self, report: Report) -> None:
        self.report, self.began = report, time.monotonic()
        self.done = self.failed = self.lost_workers = 0

    def add(self, outcome: Outcome[Any]) -> None:
        """Count an outcome."""
        if isinstance(outcome, Failed):
            self.failed += 1
        else:
            self.done += 1
        self.report(Counts(self.done, self.failed, self.lost_workers, time.monotonic() - self.began))
