"""What the probe benchmark hands on: one result a workload, and the table of them."""

from collections.abc import Sequence
from dataclasses import dataclass

from results import Result, markdown_rows, place_of, time_of, versions_of


@dataclass(frozen=True)
class ProbeResult(Result):
    """The figures of one workload of the probe benchmark.

    `compared` says what `max_abs_diff` and `peer_diffs` are, `said` is what the answers say, and `doubted` why they
    prove nothing.
    """

    compared: str = ""
    said: tuple[str, ...] = ()
    doubted: tuple[str, ...] = ()

    @property
    def difference_name(self) -> str:
        """What `max_abs_diff` is a difference of."""
        return self.compared or "differ"

    def remarks(self) -> Sequence[str]:
        """Return what else there is to say, a line each."""
        return self.said

    def doubts(self) -> Sequence[str]:
        """Return why the figures mean nothing though all sides were measured, a sentence each."""
        return self.doubted


def markdown_table(results: Sequence[ProbeResult]) -> str:
    """Return the figures as they stand in docs/benchmarks.md."""
    head = ["workload", "synapse", "peer", "fastest peer / synapse", "off by at most", "peak MiB"]
    rows = [
        [
            f"`{result.workload}`",
            _side(result, "synapse", result.ours_s),
            "<br>".join(f"{name}: {_side(result, name, seconds)}" for name, seconds in result.peers.items()),
            "" if result.ratio_to_fastest_peer is None else f"**{result.ratio_to_fastest_peer:.1f}**",
            "" if result.max_abs_diff is None else f"{result.max_abs_diff:.0e} ({result.compared})",
            "" if result.peak_mb is None else f"{result.peak_mb:.0f}",
        ]
        for result in results
    ]
    lines = markdown_rows(head, rows)
    places = dict.fromkeys(place_of(result) for result in results)
    lines += ["", f"{'; '.join(places)}; {versions_of(results)}.", ""]
    for result in results:
        lines.append(f"- `{result.workload}`: {'; '.join((result.description, result.dtype, *result.said))}.")
    lines += [f"- {name} cannot: {reason}." for result in results for name, reason in result.refused.items()]
    return "\n".join(lines) + "\n"


def _side(result: ProbeResult, name: str, seconds: float | None) -> str:
    setting = f", {result.settings[name]}" if name in result.settings else ""
    return time_of(result, name, seconds) + setting
