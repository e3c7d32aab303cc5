"""What a benchmark hands on: one result a workload, whether it may be believed, and tables of it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import numpy as np
from peers.base import Answer

TOLERANCE = 1e-4
"""Largest difference of logits from the plain hooks' in float32 with which a side counts as measured."""

LEAST_EFFECT = 100 * TOLERANCE
"""A workload whose edits move no logit as far as this would not tell an edit that was left out."""


@dataclass(frozen=True)
class Result:
    """The figures of one workload; times are medians in seconds, memory is in MiB.

    `ours_s` and `peers` (name: seconds) hold only what was measured and agreed; `refused` and `failed` say why a peer
    is not among them. `ratio_to_fastest_peer` is the fastest peer's time over ours, `max_abs_diff` the largest
    difference of our logits from those under plain hooks, `peer_diffs` that of the peers. `changed` counts predictions
    that differ from those under plain hooks although their margin is above the tolerance. `spread` is (least, most) of
    the repeats, `repeats` how many there were. `share_of_rate` is `flops` over our time over `matrix_rate`.
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
    n_cells: int = 0
    n_examples: int = 0
    n_batches: int = 0
    largest_effect: float = 0.0
    changed: int = 0
    tolerance: float = TOLERANCE
    equal_to_float32: float | None = None
    float32_peer_s: float | None = None
    ratio_to_float32_peer: float | None = None
    run_plain: tuple[str, ...] = ()
    flops: int | None = None
    matrix_rate: float | None = None
    share_of_rate: float | None = None
    threads: int = 1
    device: str = "cpu"
    dtype: str = "float32"
    quick: bool = False
    machine: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the result as it stands in the JSON file."""
        return asdict(self)


def problems(result: Result, asked: Sequence[str]) -> list[str]:
    """Return what is wrong with a result, a sentence each: empty is what a run must be to count.

    `asked` are the peers that had to be measured, or to refuse when they were asked.
    """
    said = [f"{name} failed: {reason}" for name, reason in result.failed.items()]
    silent = [name for name in asked if not {name} & {*result.peers, *result.refused, *result.failed}]
    said += [f"{name} was not measured" for name in silent]
    if result.ours_s is None and "synapse" not in result.failed:
        said.append("synapse was not measured")
    if result.changed:
        said.append(f"{result.changed} predictions of synapse differ although their margin is above the tolerance")
    if result.ours_s is not None and result.largest_effect < LEAST_EFFECT:
        said.append(
            f"the edits move no logit by more than {result.largest_effect:.1e}, so that an edit left out would not show"
        )
    return said


def largest_difference(answer: Answer, reference: Answer) -> float:
    """Return the largest difference of two answers' logits, clean or edited; infinite where there is a NaN."""
    worst = max(
        float(np.abs(answer.logits - reference.logits).max()), float(np.abs(answer.clean - reference.clean).max())
    )
    return worst if np.isfinite(worst) else float("inf")


def changed_predictions(answer: Answer, reference: Answer, tolerance: float) -> int:
    """Return how many predictions differ where the reference's two best labels are further apart than the tolerance."""
    best = np.sort(reference.logits, axis=-1)
    margin = best[..., -1] - best[..., -2]
    differ = answer.logits.argmax(axis=-1) != reference.logits.argmax(axis=-1)
    return int((differ & (margin > tolerance)).sum())


def equal_predictions(answer: Answer, reference: Answer) -> float:
    """Return the share of equal predictions."""
    return float((answer.logits.argmax(axis=-1) == reference.logits.argmax(axis=-1)).mean())


def summary(seconds: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """Return the median and (least, most)."""
    return median(seconds), (min(seconds), max(seconds))


def text_table(results: Sequence[Result]) -> str:
    """Return the figures for a terminal."""
    lines = []
    for result in results:
        lines += ["", f"{result.workload}: {result.description}"]
        lines.append(
            f"  {result.n_cells} cells x {result.n_examples} examples in {result.n_batches} batches, {result.device}, "
            f"{result.dtype}, {result.threads} thread{'s' if result.threads > 1 else ''}"
        )
        rows = [("", "seconds", "least..most", "x ours", "logits differ", "peak MiB")]
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
        lines += [f"  run plain: {place}" for place in result.run_plain]
        if result.share_of_rate is not None and result.matrix_rate is not None and result.flops is not None:
            lines.append(
                f"  {result.flops / 1e9:.1f} GFLOP left, at {100 * result.share_of_rate:.0f} % of the measured "
                f"{result.matrix_rate / 1e9:.1f} GFLOP/s"
            )
        if result.equal_to_float32 is not None:
            lines.append(
                f"  {100 * result.equal_to_float32:.2f} % of predictions as in float32; "
                f"float32 plain hooks take {result.float32_peer_s:.3f} s, {result.ratio_to_float32_peer:.2f} x ours"
            )
    return "\n".join(lines).lstrip("\n")


def markdown_table(results: Sequence[Result]) -> str:
    """Return the figures as they stand in docs/benchmarks.md."""
    names = list(dict.fromkeys(name for result in results for name in (*result.peers, *result.refused)))
    head = [
        "workload",
        "synapse",
        *names,
        "fastest peer / synapse",
        "logits differ",
        "predictions differ",
        "peak MiB",
        "share of rate",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for result in results:
        cells = [f"`{result.workload}`", _time(result, "synapse", result.ours_s)]
        cells += [_time(result, name, result.peers.get(name)) if name in result.peers else "cannot" for name in names]
        cells += [
            "" if result.ratio_to_fastest_peer is None else f"**{result.ratio_to_fastest_peer:.1f}**",
            "" if result.max_abs_diff is None else f"{result.max_abs_diff:.0e}",
            str(result.changed) if result.equal_to_float32 is None else f"{100 * (1 - result.equal_to_float32):.2f} %",
            "" if result.peak_mb is None else f"{result.peak_mb:.0f}",
            "" if result.share_of_rate is None else f"{100 * result.share_of_rate:.0f} %",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    first = results[0]
    place = first.machine.get("gpu") or f"{first.machine.get('cpu')}, {first.machine.get('cores')} cores"
    versions = ", ".join(f"{name} {number}" for name, number in first.versions.items())
    lines += ["", f"{place}; {first.threads} thread(s), {first.dtype}; {versions}."]
    lines += ["", *(f"- `{result.workload}`: {result.description}; {result.n_cells} cells." for result in results)]
    refusals = dict.fromkeys((name, reason) for result in results for name, reason in result.refused.items())
    lines += [""] * bool(refusals) + [f"- {name} cannot: {reason}." for name, reason in refusals]
    return "\n".join(lines) + "\n"


def with_table(text: str, table: str, mark: str) -> str:
    """Return a page with the table between its marks replaced; a page without marks is replaced altogether."""
    begin, end = f"<!-- {mark}: begin -->", f"<!-- {mark}: end -->"
    if begin not in text or end not in text:
        return table
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n{table}{end}{after}"


def _time(result: Result, name: str, seconds: float | None) -> str:
    if seconds is None:
        return "failed"
    least, most = result.spread[name]
    return f"{seconds:.2f} s ({least:.2f} to {most:.2f})" if result.repeats[name] > 1 else f"{seconds:.2f} s"
