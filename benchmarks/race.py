"""Sides of a benchmark take turns at a task: who can take part, how long each needs, and who is out."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any

import timing
from peers.side import RefusedError, Side
from results import summary

OURS = "synapse"

FAR_BEHIND = 2.0
"""A peer that takes this many times as long as the fastest in the first round is out of the race: it runs no more."""


@dataclass(eq=False, kw_only=True)
class Race:
    """What was found so far about each side, by name."""

    threads: int
    repeats: int
    memory: bool
    sides: dict[str, Side] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    peaks: dict[str, float] = field(default_factory=dict)
    times: dict[str, list[float]] = field(default_factory=dict)
    answers: dict[str, Any] = field(default_factory=dict)

    def enter(self, name: str, where: str, make_task: Callable[[], Any]) -> None:
        """Let a side take part; it is imported only now (`module:class`), so that one that is missing is said so."""
        module, _, kind = where.partition(":")
        try:
            side = getattr(import_module(module), kind)
            self.versions[side.package] = side.version()
            self.sides[name] = side(make_task())
        except RefusedError as reason:
            self.refused[name] = str(reason)
        except Exception as error:  # any failure of a peer is reported, and fails the run
            self.failed[name] = f"{type(error).__name__}: {error}"

    def attempt(self, name: str, work: Callable[[Side], Any]) -> Any:
        """Return what the work gives; a side that fails is left out from now on, and the run fails at its end."""
        try:
            return work(self.sides[name])
        except Exception as error:
            self.failed[name] = f"{type(error).__name__}: {error}"
            self.sides.pop(name).close()
            self.times.pop(name, None)
            return None

    def run_rounds(self, task: Any) -> None:
        """Time every side once, then again, in turns."""
        for round_number in range(self.repeats):
            for name in [name for name in self.sides if round_number == 0 or not self._is_far_behind(name)]:
                measured = self.attempt(name, lambda side: timing.seconds(partial(side.run, task), task.device))
                if measured is None:
                    continue
                took, answer = measured
                known = getattr(answer, "seconds", None)
                self.times.setdefault(name, []).append((took if known is None else known) / self.sides[name].parts)
                self.answers[name] = answer
                self.note(name, answer)

    def note(self, name: str, answer: Any) -> None:
        """Do something with the answer of a round."""

    def strike(self, name: str, reason: str) -> None:
        """Do not count a side as measured."""
        self.failed[name] = reason
        self.times.pop(name, None)

    def _is_far_behind(self, name: str) -> bool:
        others = [times[0] for peer, times in self.times.items() if peer != OURS]
        return name != OURS and self.times[name][0] > FAR_BEHIND * min(others)

    def figures(self) -> dict[str, Any]:
        """Return the fields of a result that say the same in every benchmark."""
        measured = {name: summary(times) for name, times in self.times.items()}
        ours_s = measured[OURS][0] if OURS in measured else None
        peers = {name: middle for name, (middle, _) in measured.items() if name != OURS}
        fastest = min(peers, key=lambda name: peers[name]) if peers else None
        return {
            "ours_s": ours_s,
            "peers": peers,
            "fastest_peer": fastest,
            "ratio_to_fastest_peer": peers[fastest] / ours_s if fastest and ours_s else None,
            "peak_mb": self.peaks.get(OURS),
            "peers_peak_mb": without_ours(self.peaks),
            "refused": self.refused,
            "failed": self.failed,
            "spread": {name: spread for name, (_, spread) in measured.items()},
            "repeats": {name: len(times) for name, times in self.times.items()},
            "settings": {name: side.setting for name, side in self.sides.items() if side.setting},
            "threads": self.threads,
        }


def without_ours(found: dict[str, float]) -> dict[str, float]:
    """Return what was found about the peers."""
    return {name: value for name, value in found.items() if name != OURS}
