"""One side of a benchmark: what both scripts ask of it."""

from abc import ABC, abstractmethod
from functools import partial
from importlib.metadata import version
from typing import Any, ClassVar

import timing


class RefusedError(Exception):
    """A peer said, when asked, that it cannot take this task; the message is the peer's own."""


class Side(ABC):
    """One side of a benchmark, prepared for one task; whatever it prepares is outside of the timing."""

    name: ClassVar[str]
    package: ClassVar[str]
    together = 1
    """Parts of a task that it takes on at once, where it has a choice."""
    parts: float = 1
    """What its time is divided by, where times are given for a part of the task."""

    @classmethod
    def version(cls) -> str:
        """Return the version of the package that is measured."""
        return version(cls.package)

    @property
    def setting(self) -> str:
        """How it was run, in a few words, where it had a choice."""
        return f"{self.together} at once" if self.together > 1 else ""

    def prepare(self, task: Any) -> None:
        """Warm up on a small task; a side with a choice tries it here and keeps the fastest."""
        self.run(task)

    @abstractmethod
    def run(self, task: Any) -> Any:
        """Return the answer: what is timed."""

    def peak_mb(self, task: Any) -> float:
        """Return the peak memory of a run, in MiB."""
        return timing.peak_mb(partial(self.run, task), task.device)

    def close(self) -> None:  # noqa: B027
        """Undo what was prepared."""
