"""Small pieces of work with which `synapse.testing.check_executor` tries an executor; light to import in a worker."""

import os
import uuid
from dataclasses import dataclass


@dataclass(frozen=True)
class Token:
    """A recipe that builds another value each time: the process, and a name that no other one has."""

    def build(self) -> tuple[int, str]:
        """Return them."""
        return os.getpid(), uuid.uuid4().hex


@dataclass(frozen=True)
class Unbuildable:
    """A recipe that cannot be built."""

    def build(self) -> None:
        """Raise."""
        raise LookupError("there is nothing to build from")


def added(shared: int, item: int) -> int:
    """Return the sum."""
    return shared + item


def token(built: tuple[int, str], item: int) -> tuple[int, str, int]:
    """Return what was built, and the process that runs."""
    return *built, os.getpid()


def odd_refused(shared: None, item: int) -> int:
    """Return an even number."""
    if item % 2:
        raise ValueError(f"{item} is odd")
    return item
