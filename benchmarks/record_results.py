"""What the recording benchmark hands on: one result a workload, and the table of them."""

from collections.abc import Sequence
from dataclasses import dataclass

from results import Result, markdown_rows, place_of, time_of, versions_of

TOLERANCE = 1e-4
"""How far states may be from those that plain hooks give."""

FLOOR = "bare forward"


@dataclass(frozen=True)
class RecordResult(Result):
    """The figures of one workload of the recording benchmark.

    `grown_peak_mb` is our peak memory on `grown_examples`, where that was measured.
    """

    n_examples: int = 0
    grown_examples: int | None = None
    grown_peak_mb: float | None = None

    @property
    def difference_name(self) -> str:
        """What `max_abs_diff` is a difference of."""
        return "states differ"

    @property
    def share_of_floor(self) -> float | None:
        """Our throughput over that of the bare forward."""
        return self.peers[FLOOR] / self.ours_s if self.ours_s and FLOOR in self.peers else None

    def remarks(self) -> Sequence[str]:
        """Return the throughput, and what memory does on more examples."""
        said = [] if not self.ours_s else [f"{self.n_examples / self.ours_s:.1f} examples a second"]
        if self.share_of_floor is not None:
            said.append(f"{self.share_of_floor:.2f} of the throughput of the {FLOOR}")
        if self.grown_peak_mb is not None and self.peak_mb is not None:
            said.append(
                f"peak with {self.n_examples} examples {self.peak_mb:.0f} MiB, with {self.grown_examples} "
                f"{self.grown_peak_mb:.0f} MiB: {self.grown_peak_mb - self.peak_mb:+.0f} MiB"
            )
        return said


def markdown_table(results: Sequence[RecordResult]) -> str:
    """Return the figures as they stand in docs/benchmarks.md."""
    peers = list(
        dict.fromkeys(
            name for result in results for name in (*result.peers, *result.refused, *result.failed) if name != "synapse"
        )
    )
    head = ["workload", "synapse", *peers, f"of the {FLOOR}", "states differ", "peak MiB"]
    rows = [
        [
            f"`{result.workload}`",
            time_of(result, "synapse", result.ours_s),
            *(_peer(result, name) for name in peers),
            "" if result.share_of_floor is None else f"**{result.share_of_floor:.2f}**",
            "" if result.max_abs_diff is None else f"{result.max_abs_diff:.0e}",
            "" if result.peak_mb is None else f"{result.peak_mb:.0f}",
        ]
        for result in results
    ]
    lines = markdown_rows(head, rows)
    places = dict.fromkeys(place_of(result) for result in results)
    lines += ["", f"{'; '.join(places)}, float32; {versions_of(results)}.", ""]
    for result in results:
        settings = (f"{name}: {setting}" for name, setting in result.settings.items())
        lines.append(f"- `{result.workload}`: {'; '.join((result.description, *settings, *result.remarks()))}.")
    lines += [f"- {name} cannot: {reason}." for result in results for name, reason in result.refused.items()]
    return "\n".join(lines) + "\n"


def _peer(result: RecordResult, name: str) -> str:
    if name not in result.peers:
        return "cannot" if name in result.refused else "failed" if name in result.failed else ""
    seconds = result.peers[name]
    times = f", {seconds / result.ours_s:.1f}x" if result.ours_s else ""
    return time_of(result, name, seconds) + times
