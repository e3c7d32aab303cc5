"""The pieces that a sweep is run in: the runs of one group on one batch, here or in another process."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from synapse.data.examples import Examples
from synapse.errors import ResourceError
from synapse.model.classifier import LESS_MEMORY, Batch, Classifier, in_halves
from synapse.model.replica import Replica
from synapse.model.resume import CleanPass, clean_pass
from synapse.sweeping.groups import FEWEST_ROWS, PROOF_EXAMPLES, Group, Level, refuse_infinite
from synapse.types import Agreement, Component

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Reduced precisions, by name."""


@dataclass(frozen=True)
class Item:
    """What is run at a time: a group (None: the clean pass alone) on the examples of a batch.

    `runs` are those of the group that go on, by their positions in it; None stands for all.
    """

    examples: tuple[int, ...]
    group: int | None
    runs: tuple[int, ...] | None = None


@dataclass(frozen=True, eq=False)
class Found:
    """What an item gave: logits of runs that were not asked for on an example are NaN.

    `reuse` and `reason` are those of the group on this batch; where a batch differs from the one of the proof, less is
    taken over than was proved.
    """

    clean_logits: Float[np.ndarray, "example label"]
    logits: Float[np.ndarray, "run example label"] | None = None
    reuse: Level | None = None
    reason: str = ""


@dataclass(frozen=True, eq=False)
class Sweeping:
    """What the items of a sweep share: a recipe that travels to the processes that run them."""

    replica: Replica
    examples: Examples
    targets: Int[np.ndarray, "example"]
    groups: Sequence[Group]
    reuse: Component | None
    autocast: str | None
    planned_on: str
    """The kind of device for which passes were sized."""

    def build(self) -> "Runner":
        """Return what runs them."""
        classifier = self.replica.build()
        if classifier.device.type != self.planned_on:
            for group in self.groups:
                group.size.rows = max(FEWEST_ROWS, classifier.max_tokens)
        return Runner(self, Passes(classifier, self.reuse, self.autocast))


class Runner:
    """Runs items, and keeps the clean pass of the latest batch, which those of its other groups need too."""

    def __init__(self, shared: Sweeping, passes: "Passes") -> None:
        self.shared, self.passes = shared, passes
        self.latest: tuple[tuple[int, ...], Batch, CleanPass] | None = None

    def clean(self, examples: tuple[int, ...]) -> Iterator[tuple[Batch, CleanPass]]:
        """Yield a batch and its clean pass, in parts where memory does not hold it whole."""
        if self.latest is not None and self.latest[0] == examples:
            yield self.latest[1:]
            return
        self.latest = None  # room for the next
        classifier, shared = self.passes.classifier, self.shared
        batch = classifier.batch(shared.examples.inputs, np.array(examples), shared.targets)
        for part, clean, _ in self.passes.clean(batch):
            if len(part.index) == len(examples):
                self.latest = (examples, part, clean)
            yield part, clean


def run_item(runner: Runner, item: Item) -> Found:
    """Return the logits of an item.

    Raises:
        ModelError: logits that are not finite.
        ResourceError: memory does not suffice for a single run.
    """
    labels = runner.passes.classifier.labels
    place = {example: row for row, example in enumerate(item.examples)}
    found = Found(np.empty((len(item.examples), len(labels)), dtype=np.float32))
    if item.group is not None:
        # A copy: what a group learns from one batch must not hang on who ran which.
        group = copy(runner.shared.groups[item.group])
        logits = np.full((len(group.runs), *found.clean_logits.shape), np.nan, dtype=np.float32)
    with runner.passes.classifier.studied(), runner.passes.precision():
        for part, clean in runner.clean(item.examples):
            rows = np.array([place[example] for example in part.index.tolist()])
            found.clean_logits[rows] = clean.logits.float().cpu().numpy()
            if item.group is None:
                continue
            asked = group.asked(part.index) & _going_on(item, group)[:, None]
            for run, example, its_logits in group.results(runner.passes.classifier, clean, asked):
                refuse_infinite(group, its_logits, part.index[example])
                logits[run, rows[example]] = its_logits
    return found if item.group is None else Found(found.clean_logits, logits, group.reuse, group.reason)


def _going_on(item: Item, group: Group) -> Bool[np.ndarray, "run"]:
    if item.runs is None:
        return np.ones(len(group.runs), dtype=bool)
    going_on = np.zeros(len(group.runs), dtype=bool)
    going_on[list(item.runs)] = True
    return going_on


@dataclass(frozen=True, eq=False)
class Passes:
    """How a sweep runs the model: what it keeps of clean passes, and in which precision."""

    classifier: Classifier
    reuse: Component | None
    autocast: str | None

    def precision(self) -> AbstractContextManager[None]:
        """Return a context in which the model runs in the precision asked for."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.classifier.device.type, AUTOCAST[self.autocast])

    def clean(self, batch: Batch) -> Iterator[tuple[Batch, CleanPass, bool]]:
        """Yield the clean pass of a batch, and whether it is the last: in halves if memory runs out."""
        return in_halves(batch, partial(clean_pass, self.classifier, reuse=self.reuse))

    def prove(self, groups: Sequence[Group], batch: Batch) -> Agreement | None:
        """Let every group choose what it takes over, on a few examples in full precision.

        Return how reduced precision compares with it on the same runs, where it was asked for.
        """
        # The first and the last of the batch differ most in length: the one has no padding, the other has most.
        few = np.unique(np.linspace(0, len(batch.index) - 1, PROOF_EXAMPLES).astype(int))
        try:
            batch = batch.take(torch.from_numpy(few).to(self.classifier.device))
            clean = clean_pass(self.classifier, batch, reuse=self.reuse)
            for group in groups:
                group.prove(self.classifier, clean)
        except (torch.OutOfMemoryError, MemoryError) as error:
            if len(few) == 1:
                raise ResourceError(f"Memory ran out with a single example; {LESS_MEMORY}.") from error
            return self.prove(groups, batch.take(torch.arange(len(few) // 2, device=self.classifier.device)))
        if self.autocast is None:
            return None
        full = [group.sample(self.classifier, clean) for group in groups]
        with self.precision():
            clean = clean_pass(self.classifier, batch, reuse=self.reuse)
            reduced = [group.sample(self.classifier, clean) for group in groups]
        exact, coarse = np.concatenate(full), np.concatenate(reduced)
        same = float((exact.argmax(axis=1) == coarse.argmax(axis=1)).mean())
        return Agreement(self.autocast, same, float(np.abs(exact - coarse).max()), len(exact))
