"""What a study will cost, before it is run: items, forward passes, bytes, and the time on so many workers.

The unit of work is a forward pass of one example. A stage is cut into items that nothing can be gained from cutting
further; so many workers run so many of them at a time, and the last round may leave some of them idle:

    seconds = start + sum over stages of rounds * (passes / items) * seconds a pass
            + items * seconds an item + bytes / bytes a second,      rounds = ceil(items / workers)

Probes, rankings, measures and families of attacks other than weight noise are not counted.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from synapse.attack.noise import noise_cost
from synapse.data.examples import Examples
from synapse.model.classifier import Classifier
from synapse.model.resume import clean_pass
from synapse.perturb.weights import places
from synapse.ranking import Ranking
from synapse.ranking.statistics import RandomOrder
from synapse.recording import layout_of
from synapse.settings import Amount, Settings
from synapse.sweeping import Cost, Reach, cost_of, plan
from synapse.types import Component

START_SECONDS = 8.0
"""What a worker takes to start, load its libraries and build the model, about; workers start at the same time."""

ITEM_SECONDS = 0.002
"""What it costs to hand an item out and take its answer back, at most."""

BYTES_PER_SECOND = 2e8
"""Results that the driver takes in and writes in a second, about."""

SAMPLE = 64
"""Examples on which a forward pass is timed."""


@dataclass(frozen=True)
class Stage:
    """A stage of a study: what it is cut into, its work in forward passes of an example, and what comes back."""

    name: str
    items: int
    passes: int
    moved_bytes: int = 0

    def seconds(self, workers: int, seconds_per_pass: float) -> float:
        """Return how long so many workers need."""
        if not self.items:
            return 0.0
        work = math.ceil(self.items / workers) * (self.passes / self.items) * seconds_per_pass
        return work + self.items * ITEM_SECONDS + self.moved_bytes / BYTES_PER_SECOND


@dataclass(frozen=True)
class Forecast:
    """What a study will run; `seconds_per_pass` is what one example takes here, in one process."""

    train_examples: int
    test_examples: int
    sweep_examples: int
    sweep: Cost
    stages: tuple[Stage, ...]
    seconds_per_pass: float
    disk_bytes: int
    """What the recordings take, if they are kept and not there yet."""

    @property
    def forward_passes(self) -> int:
        """The work in full forward passes of one example."""
        return sum(stage.passes for stage in self.stages)

    @property
    def seconds(self) -> float:
        """How long it takes here, in one process."""
        return self.forward_passes * self.seconds_per_pass

    def seconds_on(self, workers: int, seconds_per_pass: float | None = None) -> float:
        """Return how long so many workers need, each of which takes so long for a pass (by default, as here)."""
        pace = self.seconds_per_pass if seconds_per_pass is None else seconds_per_pass
        return START_SECONDS + sum(stage.seconds(workers, pace) for stage in self.stages)


def forecast(classifier: Classifier, train: Examples, test: Examples, settings: Settings) -> Forecast:
    """Return what a study will run; a forward pass is timed on a sample of the test examples."""
    n_train, n_test = amount(settings.train_examples, len(train)), len(test)
    n_sweep = amount(settings.examples, len(test))
    seconds_per_pass, per_batch = _timed(classifier, test)
    cost = _cost_of_sweeps(classifier, test, settings, n_sweep)
    layout = layout_of(classifier, n_train + n_test, settings.sites)
    stages = [
        Stage("record", layout.n_windows, n_train + n_test, 0 if settings.cache else layout.n_bytes),
        Stage(
            "sweep",
            math.ceil(n_sweep / per_batch) * cost.places,
            round(cost.block_passes / classifier.n_layers),
            4 * len(classifier.labels) * cost.runs,
        ),
    ]
    if "weight-noise" in settings.attacks:
        attacked = amount(settings.attack_examples, n_sweep)
        blocks = noise_cost(classifier, attacked, draws=settings.noise_draws)
        stages.append(Stage("weight noise", len(places(classifier)), round(blocks / classifier.n_layers)))
    disk = layout.n_bytes if settings.cache else 0
    return Forecast(n_train, n_test, n_sweep, cost, tuple(stages), seconds_per_pass, disk)


def amount(asked: Amount, available: int) -> int:
    """Return how many examples are used."""
    return available if asked == "all" else min(asked, available)


def _cost_of_sweeps(classifier: Classifier, test: Examples, settings: Settings, n_sweep: int) -> Cost:
    first = next(iter(classifier.batches(test.inputs[:1])))
    clean = clean_pass(classifier, first, reuse="residual")
    costs = []
    for component in settings.sites:
        ranking, *rivals = [_any_ranking(classifier, component, i) for i in range(1 + len(settings.rivals))]
        cells = plan(ranking, settings.grid(), rivals=rivals, seed=settings.seed)
        costs.append(cost_of(cells, n_sweep, Reach.of(classifier, component, clean)))
    return _sum(costs)


def _sum(costs: Sequence[Cost]) -> Cost:
    return Cost(
        sum(cost.cells for cost in costs),
        sum(cost.runs for cost in costs),
        sum(cost.block_passes for cost in costs),
        sum(cost.places for cost in costs),
    )


def _any_ranking(classifier: Classifier, component: Component, seed: int) -> Ranking:
    """Return a ranking of the right shape: what a plan costs does not depend on the order."""
    sites = classifier.sites(component)
    scores = np.random.default_rng(seed).random((len(sites), 1 + len(classifier.labels), sites[0].width))
    return Ranking(RandomOrder().name, scores, classifier.labels, source="", component=component)


def _timed(classifier: Classifier, examples: Examples) -> tuple[float, float]:
    """Return the seconds that a forward pass of an example takes, and how many examples share a batch."""
    rows = np.linspace(0, len(examples) - 1, min(SAMPLE, len(examples))).astype(int)
    batches = list(classifier.batches(examples.take(rows).inputs))
    clean_pass(classifier, batches[0])  # the first pass pays for warming up
    start = time.perf_counter()
    for batch in batches:
        clean_pass(classifier, batch)
    return (time.perf_counter() - start) / len(rows), len(rows) / len(batches)
