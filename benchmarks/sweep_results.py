"""What the sweep benchmark hands on: one result a workload, and what makes two answers agree."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from peers.base import Answer
from results import Result, markdown_rows, place_of, time_of, versions_of

TOLERANCE = 1e-4
"""Largest difference of logits from the plain hooks' in float32 with which a side counts as measured."""

LEAST_EFFECT = 100 * TOLERANCE
"""A workload whose edits move no logit as far as this would not tell an edit that was left out."""


@dataclass(frozen=True)
class SweepResult(Result):
    """The figures of one workload of the sweep.

    Differences are the largest of the logits from those under plain hooks. `changed` counts predictions that differ
    from those under plain hooks although their margin is above the tolerance. `share_of_rate` is `flops` over our time
    over `matrix_rate`.
    """

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

    @property
    def difference_name(self) -> str:
        """What `max_abs_diff` is a difference of."""
        return "logits differ"

    def size(self) -> str:
        """Return how large the task was, on what it ran."""
        return f"{self.n_cells} cells x {self.n_examples} examples in {self.n_batches} batches, {super().size()}"

    def remarks(self) -> Sequence[str]:
        """Return what else there is to say, a line each."""
        said = [f"run plain: {place}" for place in self.run_plain]
        if self.share_of_rate is not None and self.matrix_rate is not None and self.flops is not None:
            said.append(
                f"{self.flops / 1e9:.1f} GFLOP left, at {100 * self.share_of_rate:.0f} % of the measured "
                f"{self.matrix_rate / 1e9:.1f} GFLOP/s"
            )
        if self.equal_to_float32 is not None:
            said.append(
                f"{100 * self.equal_to_float32:.2f} % of predictions as in float32; "
                f"float32 plain hooks take {self.float32_peer_s:.3f} s, {self.ratio_to_float32_peer:.2f} x ours"
            )
        return said

    def doubts(self) -> Sequence[str]:
        """Return why the figures mean nothing though all sides were measured, a sentence each."""
        said = []
        if self.changed:
            said.append(f"{self.changed} predictions of synapse differ although their margin is above the tolerance")
        if self.ours_s is not None and self.largest_effect < LEAST_EFFECT:
            said.append(
                f"the edits move no logit by more than {self.largest_effect:.1e}, so that an edit left out would not "
                "show"
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


def markdown_table(results: Sequence[SweepResult]) -> str:
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
    rows = []
    for result in results:
        cells = [f"`{result.workload}`", time_of(result, "synapse", result.ours_s)]
        cells += [time_of(result, name, result.peers.get(name)) if name in result.peers else "cannot" for name in names]
        cells += [
            "" if result.ratio_to_fastest_peer is None else f"**{result.ratio_to_fastest_peer:.1f}**",
            "" if result.max_abs_diff is None else f"{result.max_abs_diff:.0e}",
            str(result.changed) if result.equal_to_float32 is None else f"{100 * (1 - result.equal_to_float32):.2f} %",
            "" if result.peak_mb is None else f"{result.peak_mb:.0f}",
            "" if result.share_of_rate is None else f"{100 * result.share_of_rate:.0f} %",
        ]
        rows.append(cells)
    lines = [*markdown_rows(head, rows), "", f"{place_of(results[0])}, {results[0].dtype}; {versions_of(results[:1])}."]
    lines += ["", *(f"- `{result.workload}`: {result.description}; {result.n_cells} cells." for result in results)]
    refusals = dict.fromkeys((name, reason) for result in results for name, reason in result.refused.items())
    lines += [""] * bool(refusals) + [f"- {name} cannot: {reason}." for name, reason in refusals]
    return "\n".join(lines) + "\n"
