"""What a benchmark hands on: one result a workload, whether it may be believed, and tables of it."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any


@dataclass(frozen=True)
class Result:
    """The figures of one workload; times are medians in seconds, memory is in MiB.

    `ours_s` and `peers` (name: seconds) hold only what was measured and agreed; `refused` and `failed` say why a peer
    is not among them. `ratio_to_fastest_peer` is the fastest peer's time over ours, `max_abs_diff` how far our answer
    is off, `peer_diffs` the same of the peers, and both are at most `tolerance`. `spread` is (least, most) of the
    repeats, `repeats` how many there were, `settings` how a side was run where it had a choice.
    """

    workload: str
    description: str
    ours_s: float | None
    peers: dict[str, float]
    ratio_to_fastest_peer: float | None
    max_abs_diff: float | None
    peak_mb: float | None
    fastest_peer: str | None = None
    refused: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    peer_diffs: dict[str, float] = field(default_factory=dict)
    peers_peak_mb: dict[str, float] = field(default_factory=dict)
    spread: dict[str, tuple[float, float]] = field(default_factory=dict)
    repeats: dict[str, int] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)
    tolerance: float = 0.0
    threads: int = 1
    device: str = "cpu"
    dtype: str = "float32"
    quick: bool = False
    machine: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the result as it stands in the JSON file."""
        return asdict(self)

    @property
    def difference_name(self) -> str:
        """What `max_abs_diff` is a difference of."""
        return "differ"

    def size(self) -> str:
        """Return how large the task was, on what it ran."""
        return f"{self.device}, {self.dtype}, {self.threads} thread{'s' if self.threads > 1 else ''}"

    def remarks(self) -> Sequence[str]:
        """Return what else there is to say, a line each."""
        return ()

    def doubts(self) -> Sequence[str]:
        """Return why the figures mean nothing though all sides were measured, a sentence each."""
        return ()


def problems(result: Result, asked: Sequence[str]) -> list[str]:
    """Return what is wrong with a result, a sentence each: empty is what a run must be to count.

    `asked` are the peers that had to be measured, or to refuse when they were asked.
    """
    said = [f"{name} failed: {reason}" for name, reason in result.failed.items()]
    silent = [name for name in asked if not {name} & {*result.peers, *result.refused, *result.failed}]
    said += [f"{name} was not measured" for name in silent]
    if result.ours_s is None and "synapse" not in result.failed:
        said.append("synapse was not measured")
    return [*said, *result.doubts()]


def summary(seconds: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """Return the median and (least, most)."""
    return median(seconds), (min(seconds), max(seconds))


def text_table(results: Sequence[Result]) -> str:
    """Return the figures for a terminal."""
    lines = []
    for result in results:
        lines += ["", f"{result.workload}: {result.description}", f"  {result.size()}"]
        rows = [("", "seconds", "least..most", "x ours", result.difference_name, "peak MiB")]
        sides = ({} if result.ours_s is None else {"synapse": result.ours_s}) | result.peers
        for name, seconds in sides.items():
            ours = name == "synapse"
            difference = result.max_abs_diff if ours else result.peer_diffs.get(name)
            peak = result.peak_mb if ours else result.peers_peak_mb.get(name)
            least, most = result.spread[name]
            rows.append(
                (
                    name + (f" ({result.settings[name]})" if name in result.settings else ""),
                    f"{seconds:.3f}",
                    f"{least:.3f}..{most:.3f} of {result.repeats[name]}",
                    "" if result.ours_s is None else f"{seconds / result.ours_s:.2f}",
                    "" if difference is None else f"{difference:.0e}",
                    "" if peak is None else f"{peak:.0f}",
                )
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        for row in rows:
            first, *others = (
                cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            lines.append("  " + "  ".join((first, *others)).rstrip())
        lines += [f"  {name} cannot: {reason}" for name, reason in result.refused.items()]
        lines += [f"  {name} FAILED: {reason}" for name, reason in result.failed.items()]
        lines += [f"  {remark}" for remark in result.remarks()]
    return "\n".join(lines).lstrip("\n")


def markdown_rows(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a table."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return [lines[0], "|" + "---|" * len(head), *lines[1:]]


def place_of(result: Result) -> str:
    """Return the machine, and how much of it was used."""
    place = result.machine.get("gpu") or f"{result.machine.get('cpu')}, {result.machine.get('cores')} cores"
    return f"{place}; {result.threads} thread(s)"


def versions_of(results: Sequence[Result]) -> str:
    """Return the versions of everything that was measured."""
    versions: dict[str, str] = {}
    for result in results:
        versions |= result.versions
    return ", ".join(f"{name} {number}" for name, number in versions.items())


def time_of(result: Result, name: str, seconds: float | None) -> str:
    """Return a time as it stands in a table, with its spread where there is one."""
    if seconds is None:
        return "failed"
    least, most = result.spread[name]
    return f"{seconds:.2f} s ({least:.2f} to {most:.2f})" if result.repeats[name] > 1 else f"{seconds:.2f} s"


def with_table(text: str, table: str, mark: str) -> str:
    """Return a page with the table between its marks replaced; a page without marks is replaced altogether."""
    begin, end = f"<!-- {mark}: begin -->", f"<!-- {mark}: end -->"
    if begin not in text or end not in text:
        return table
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n{table}{end}{after}"
