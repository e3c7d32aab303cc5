"""Groups of runs that start at one place: how they share forward passes, and what proves that these may be trusted."""

import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from synapse.errors import ModelError, ResourceError
from synapse.model.classifier import LESS_MEMORY, Batch, Classifier
from synapse.model.hooks import Edit
from synapse.model.resume import CleanPass, Reuse, Runs, run_logits, runs_in_one_row
from synapse.perturb.base import Intervention, Place, noise_for
from synapse.sweeping.plan import Run
from synapse.types import Activations, Component, Scope

log = logging.getLogger(__name__)

TOLERANCE = 1e-4
"""Largest logit difference from the plain hooked forward at which runs that take over a clean pass are trusted.

Where the model itself runs in half precision it is what that rounds off: 8 units of its last place.
"""

PROOF_EXAMPLES = 4
"""Examples of the first batch on which that is tried, from its longest to its shortest.

Every group tries the set that comes nearest to half of the width, on one of them in turn: a small one hardly moves the
logits, and a state that is zeroed whole hides mistakes in what is computed from it.
"""

AGREEMENT_SETS = 4
"""Sets of a group, from the smallest to the largest, on which reduced precision is compared with float32."""

FEWEST_ROWS = 1024
"""Rows that a forward pass of runs may have at least: with fewer, matrix products do not reach their full speed."""

Level = Reuse | Literal["plain"]
"""What runs take over of a clean pass; `plain` where nothing could be trusted."""

LEVELS: tuple[Level, ...] = ("rows", "prefix", "none", "plain")
"""From the most to nothing."""

Results = Iterator[tuple[Int[np.ndarray, "pair"], Int[np.ndarray, "pair"], Float[np.ndarray, "pair label"]]]
"""Pairs of a run and an example of the batch, with their logits, a chunk at a time."""


@dataclass(eq=False)
class PassSize:
    """How many token rows a forward pass of runs may have: one for all groups, halved when memory runs out."""

    rows: int

    def halve(self, where: str, error: BaseException, *, runs: int) -> None:
        """Halve it, after a pass of so many runs failed.

        Raises:
            ResourceError: that was a single one.
        """
        if runs == 1:
            raise ResourceError(f"Memory ran out with a single run of {where}; {LESS_MEMORY}.") from error
        self.rows = max(1, self.rows // 2)
        log.warning("Memory ran out in %s; it goes on with at most %d rows in a pass.", where, self.rows)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@dataclass(eq=False)
class Group:
    """Runs whose first edit is at one site, in one scope.

    `rows` are their positions among all runs of the sweep. `reuse` says what they take over of a clean pass, None as
    long as that was not tried, `plain` where nothing could be trusted; `reason` then says why. `size` is that of a
    forward pass, and `turn` says which example the group is proved on.
    """

    component: Component
    layer: int
    scope: Scope
    rows: Int[np.ndarray, "run"]
    runs: Sequence[Run]
    reference: Activations
    seed: int
    size: PassSize
    turn: int
    reuse: Level | None = None
    reason: str = ""

    @property
    def name(self) -> str:
        """Where the runs begin, in words."""
        return f"{self.component} of layer {self.layer}, {self.scope}"

    def asked(self, examples: Int[np.ndarray, "example"]) -> Bool[np.ndarray, "run example"]:
        """Return which of these examples (by their position among all) each run is about."""
        return np.stack([run.examples[examples] for run in self.runs])

    def results(self, classifier: Classifier, clean: CleanPass, asked: Bool[np.ndarray, "run example"]) -> Results:
        """Yield the logits of the runs on the batch's examples, each run on those it is asked for."""
        run, example = np.nonzero(asked)
        if self.reuse == "plain":
            yield from self._plain(classifier, clean.batch, run, example)
            return
        members, start = _Members(self, classifier, clean), 0
        while start < len(run):
            chunk = slice(start, start + self._chunk_size(classifier, clean))
            try:
                logits = self.reused(members, run[chunk], example[chunk])
            except (torch.OutOfMemoryError, MemoryError) as error:
                self.size.halve(self.name, error, runs=min(chunk.stop, len(run)) - start)
                continue
            except Exception as error:  # on a batch that differs from the one of the proof: see `prove`
                if self.reuse != "rows":
                    raise
                self.prove(classifier, clean, ("prefix", "none"), f"rows: {_named(error)}")
                yield from self.results(classifier, clean, _later(asked, run, example, start))
                return
            yield run[chunk], example[chunk], logits
            start = chunk.stop

    def interventions(self, run: int) -> dict[int, Intervention]:
        """Return what a run does, by layer."""
        return self.runs[run].interventions(self.reference, seed=self.seed)

    def _chunk_size(self, classifier: Classifier, clean: CleanPass) -> int:
        alone = self.reuse == "rows" and runs_in_one_row(
            classifier, clean, self.component, self.layer, in_readout_row=self.in_readout_row
        )
        return max(1, self.size.rows // (1 if alone else clean.n_tokens))

    @property
    def in_readout_row(self) -> bool:
        """Whether the edits change the readout row alone, if there is one."""
        return self.scope in ("readout", "readout-onward")

    def reused(
        self, members: "_Members", run: Int[np.ndarray, "pair"], example: Int[np.ndarray, "pair"]
    ) -> Float[np.ndarray, "pair label"]:
        """Return the logits of pairs of a run and an example, in the order of the runs, taking over the clean pass."""
        classifier, clean = members.classifier, members.clean
        firsts = np.flatnonzero(np.diff(run, prepend=-1)).tolist()
        spans = [
            _Span(start, stop, members[int(run[start])])
            for start, stop in zip(firsts, [*firsts[1:], len(run)], strict=True)
        ]
        onward = self.scope == "readout-onward"
        layers = (
            range(self.layer, len(classifier.sites(self.component)))
            if onward
            else sorted({layer for span in spans for layer in span.interventions})
        )
        chunk = _Chunk(members, self.component, self.scope, spans, example)
        edits: dict[int, Edit] = {layer: partial(chunk.edited, layer) for layer in layers}
        chosen = torch.from_numpy(example).to(classifier.device)
        runs = Runs(self.component, self.layer, edits, chosen, self.in_readout_row)
        assert self.reuse is not None
        assert self.reuse != "plain"
        with torch.inference_mode():
            return run_logits(classifier, clean, runs, self.reuse).float().cpu().numpy()

    def _plain(
        self, classifier: Classifier, batch: Batch, run: Int[np.ndarray, "pair"], example: Int[np.ndarray, "pair"]
    ) -> Results:
        for one in np.unique(run).tolist():
            mine = example[run == one]
            its_own = batch.take(torch.from_numpy(mine).to(classifier.device))
            yield np.full(len(mine), one), mine, plain_logits(classifier, its_own, self.interventions(one))

    def sample(self, classifier: Classifier, clean: CleanPass) -> Float[np.ndarray, "pair label"]:
        """Return the logits of runs with a few sets on all examples of a clean pass, as the sweep runs them."""
        order = np.argsort([len(run.neurons) for run in self.runs], kind="stable")
        few = np.unique(order[np.linspace(0, len(order) - 1, min(AGREEMENT_SETS, len(order))).astype(int)])
        n_examples = len(clean.batch.index)
        run, example = np.repeat(few, n_examples), np.tile(np.arange(n_examples), len(few))
        if self.reuse == "plain":
            return np.concatenate([logits for _, _, logits in self._plain(classifier, clean.batch, run, example)])
        return self.reused(_Members(self, classifier, clean), run, example)

    def _tried(self, members: "_Members", run: int, example: int) -> Float[np.ndarray, "1 label"]:
        """Return the logits of a pair as the sweep runs it: in company, of another example and of another run.

        Where memory does not suffice for that, alone.
        """
        another, other = (run + 1) % len(self.runs), (example + 1) % len(members.clean.batch.index)
        company = sorted({(run, example), (run, other), (another, example)})
        try:
            found = self.reused(members, *np.array(company).T)
        except (torch.OutOfMemoryError, MemoryError):
            return self.reused(members, np.array([run]), np.array([example]))
        return found[[company.index((run, example))]]

    def prove(
        self,
        classifier: Classifier,
        clean: CleanPass,
        levels: Sequence[Reuse] = ("rows", "prefix", "none"),
        failed: str = "",
    ) -> None:
        """Choose what the runs take over: the most whose logits are those of the plain hooked forward.

        `failed` says what went wrong before, with what is not among the `levels`.
        """
        half = classifier.sites(self.component)[self.layer].width / 2
        run = min(range(len(self.runs)), key=lambda each: abs(len(self.runs[each].neurons) - half))
        n_examples = len(clean.batch.index)
        example = n_examples - 1 - self.turn % n_examples
        members, reasons = _Members(self, classifier, clean), [failed] if failed else []
        alone = clean.batch.take(torch.tensor([example], device=classifier.device))
        expected = plain_logits(classifier, alone, members[run])
        refuse_infinite(self, expected, clean.batch.index[[example]])
        # Weights in half precision round differently in every batch.
        eps = torch.finfo(clean.states[0].dtype).eps
        tolerance = max(TOLERANCE, 8 * eps * (1 + float(np.abs(expected).max())))
        in_one_row = runs_in_one_row(classifier, clean, self.component, self.layer, in_readout_row=self.in_readout_row)
        for reuse in levels:
            if reuse == "rows" and not (in_one_row or clean.knows_rows):
                continue
            self.reuse = reuse
            try:
                gap = float(np.abs(self._tried(members, run, example) - expected).max())
            except (torch.OutOfMemoryError, MemoryError):
                raise
            except Exception as error:  # the model's own code may fail in any way on single rows
                reasons.append(f"{reuse}: {_named(error)}")
                log.debug("%s, %s", self.name, reasons[-1], exc_info=True)
                continue
            if gap <= tolerance:  # false for NaN, which agrees with nothing
                break
            reasons.append(f"{reuse}: logits differ by {gap:.1e}, of which {tolerance:.0e} are trusted")
        else:
            self.reuse = "plain"
        self.reason = "; ".join(reasons)
        if self.reuse in ("none", "plain"):
            log.warning("%s: the whole model is run for each intervention, which is slow (%s).", self.name, self.reason)
        elif self.reason:
            log.info("%s: %s is reused (%s).", self.name, self.reuse, self.reason)


def plain_logits(
    classifier: Classifier, batch: Batch, interventions: Mapping[int, Intervention]
) -> Float[np.ndarray, "example label"]:
    """Return the logits of a batch under interventions, by the whole model and its live hooks."""
    with classifier.edited(*interventions.values()):
        return classifier.forward(batch).float().cpu().numpy()


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _later(
    asked: Bool[np.ndarray, "run example"],
    run: Int[np.ndarray, "pair"],
    example: Int[np.ndarray, "pair"],
    start: int,
) -> Bool[np.ndarray, "run example"]:
    """Return which runs are asked for on which examples, without the pairs before `start`."""
    later = np.zeros_like(asked)
    later[run[start:], example[start:]] = True
    return later


def refuse_infinite(group: Group, logits: np.ndarray, index: Int[np.ndarray, "pair"]) -> None:
    """Refuse logits that are no numbers: NaN stands for examples that a cell was not run on."""
    broken = np.flatnonzero(~np.isfinite(logits).all(axis=1))
    if len(broken):
        raise ModelError(
            f"Under an intervention at {group.name} the logits of example {int(index[broken[0]])} are not finite (NaN "
            "or infinity); use a smaller strength, and float32 or bf16 in place of fp16."
        )


def refuse_unproved(groups: Sequence[Group]) -> None:
    """Refuse to run what was asked to be exact and reuses nothing.

    Raises:
        ModelError: the first of them, and why.
    """
    for group in groups:
        if group.reuse in ("none", "plain"):
            raise ModelError(
                f"The exact engine was asked for, and it is not that of the plain forward for {group.name} "
                f"({group.reason}); use the engine 'auto' or 'plain'."
            )


def grouped(
    runs: Sequence[Run], reference: Activations, classifier: Classifier, *, seed: int, plain: bool
) -> list[Group]:
    """Return the runs in groups, by the place of their first edit."""
    size = PassSize(max(classifier.max_tokens, FEWEST_ROWS))
    members: dict[tuple[int, Scope], list[int]] = defaultdict(list)
    for row, run in enumerate(runs):
        members[run.layer, run.scope].append(row)
    return [
        Group(
            runs[rows[0]].neurons.component,
            layer,
            scope,
            np.array(rows),
            [runs[row] for row in rows],
            reference,
            seed,
            size,
            turn,
            "plain" if plain else None,
        )
        for turn, ((layer, scope), rows) in enumerate(sorted(members.items()))
    ]


class _Members:
    """What the runs of a group need on one clean pass, made once: their interventions by layer, and their noise."""

    def __init__(self, group: Group, classifier: Classifier, clean: CleanPass) -> None:
        self.group, self.classifier, self.clean = group, classifier, clean
        self.made: dict[int, dict[int, Intervention]] = {}
        self.draws: dict[tuple[int, int], torch.Tensor] = {}

    def __getitem__(self, run: int) -> dict[int, Intervention]:
        if run not in self.made:
            self.made[run] = self.group.interventions(run)
        return self.made[run]

    def noise(self, layer: int, n_tokens: int, *, seed: int) -> torch.Tensor:
        """Return the draws of all examples at a layer, (example, token, unit)."""
        if (layer, seed) not in self.draws:
            self.draws[layer, seed] = noise_for(
                self.classifier, self.clean.batch, self.group.component, layer, n_tokens, seed=seed
            )
        return self.draws[layer, seed]


@dataclass(frozen=True, eq=False)
class _Span:
    """Pairs from `start` to `stop` that are under the same interventions."""

    start: int
    stop: int
    interventions: Mapping[int, Intervention]


@dataclass(frozen=True, eq=False)
class _Chunk:
    """Pairs of a run and an example that share forward passes."""

    members: _Members
    component: Component
    scope: Scope
    spans: Sequence[_Span]
    example: Int[np.ndarray, "pair"]

    def edited(self, layer: int, states: torch.Tensor) -> torch.Tensor:
        """Return what passes the site of a layer, each span under its own intervention."""
        classifier = self.members.classifier
        batch = classifier.current_batch
        site = classifier.sites(self.component)[layer]
        # One row that stands for all of its example is the one to edit.
        rows = None if states.shape[1] == 1 else classifier.rows(batch, site, states.shape[1], self.scope)
        parts = []
        for span in self.spans:
            part = states[span.start : span.stop]
            intervention = self._at(layer, span)
            if intervention is not None:
                place = Place(
                    layer,
                    None if rows is None else rows[span.start : span.stop],
                    batch.keys[span.start : span.stop],
                    None if batch.labels is None else batch.labels[span.start : span.stop],
                    partial(self._noise, layer, span, states.shape[1]),
                )
                part = intervention.edited(part, place)
            parts.append(part)
        return torch.cat(parts)

    def _at(self, layer: int, span: _Span) -> Intervention | None:
        if self.scope == "readout-onward":
            (intervention,) = span.interventions.values()
            return intervention
        return span.interventions.get(layer)

    def _noise(self, layer: int, span: _Span, n_rows: int, seed: int) -> torch.Tensor:
        """Return the draws for the rows that are there: all of each example, or the one that the head reads."""
        clean, classifier = self.members.clean, self.members.classifier
        site = classifier.sites(self.component)[layer]
        n_tokens = 1 if site.layout == "example unit" else clean.n_tokens
        example = torch.from_numpy(self.example[span.start : span.stop]).to(classifier.device)
        draws = self.members.noise(layer, n_tokens, seed=seed)
        if n_rows == n_tokens:
            return draws[example]
        assert clean.row is not None
        return draws[example, clean.row[example]].unsqueeze(1)
