"""Sweep: the logits of every example under every cell of a plan.

Runs whose first edits are at one place share forward passes and take over what their edits leave as it was.
"""

import logging
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int

from synapse.data.examples import Examples
from synapse.errors import SettingsError, SplitError, near
from synapse.execute import Executor, for_models
from synapse.measure.sequential import AnytimeChange
from synapse.model.classifier import Classifier, hash_tensors
from synapse.model.replica import Replica
from synapse.perturb.base import check_neurons
from synapse.ranking.base import Ranking
from synapse.sweeping.groups import LEVELS, Group, grouped, refuse_unproved
from synapse.sweeping.items import AUTOCAST, Found, Item, Passes, Sweeping, run_item
from synapse.sweeping.plan import FRACTIONS, Cell, Grid, Reach, Run, cells_frame, merged_runs, plan
from synapse.sweeping.results import CLEAN, SweepResults, identity_of
from synapse.types import Activations, Progress, Sweep, silent

log = logging.getLogger(__name__)

ENGINES: dict[str, str] = {
    "auto": "what is proved to give the plain forward's logits is taken over, the rest is run plain",
    "exact": "the same, and an error where nothing can be taken over",
    "plain": "the whole model under hooks for every cell",
}

WAVE = 64
"""Examples after which a sweep with a precision looks which cells may stop."""


def sweep(
    classifier: Classifier,
    examples: Examples,
    ranking: Ranking,
    *,
    reference: Activations,
    cells: Iterable[Cell] | None = None,
    fractions: Sequence[float] = FRACTIONS,
    engine: str = "auto",
    precision: float | None = None,
    autocast: str | None = None,
    keep: Path | str | None = None,
    executor: Executor | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Sweep:
    """Return the logits of the examples under every cell.

    `cells` is a plan of your own; without one, the default grid with these `fractions` is swept. `reference` (the
    training examples) gives the numbers that kinds such as `mean` and `noise` use.

    `engine` is one of `ENGINES`. One run of each site and scope is compared with the plain hooked forward; what its
    logits do not bear out within 1e-4 is not used, and `Sweep.reuse` says what was. Working memory is that of one
    batch and one forward pass, each of at most `classifier.max_tokens` rows (or 1,024), whatever the number of examples
    and cells; the results take 4 bytes a cell, example and label, in files with `keep`.

    With a `precision`, examples come in a random order, and a cell stops once the 95 % confidence sequence of its
    change of accuracy over these examples has at most that half-width (see `synapse.measure.sequential`); the logits of
    the examples that it was spared are NaN. `autocast` (`bf16`, `fp16`) runs the model in reduced precision, and
    `Sweep.agreement` says how that compares with float32. `keep` is a folder that holds what is done, each sweep in a
    folder of its own there: the same call goes on after it was killed, and ends with the same logits. `executor` runs
    the pieces, each the runs of one site on one batch: by default this process, one after the other.

    Raises:
        SplitError: the examples are those that the ranking was made from.
        SettingsError: an unknown engine or precision.
        ModelError: the engine `exact`, and a site at which nothing can be taken over.
        ResourceError: memory does not suffice for a single run.
    """
    _check(examples, ranking, reference, engine, autocast)
    executor = for_models(executor)
    planned = list(plan(ranking, Grid(fractions=tuple(fractions)), seed=seed) if cells is None else cells)
    _check_cells(planned, ranking, classifier)
    targets = examples.targets(classifier.labels)
    runs = merged_runs(planned, len(examples), Reach.of(classifier, ranking.component))
    groups = grouped(runs, reference, classifier, seed=seed, plain=engine == "plain")
    reuse = ranking.component if engine != "plain" else None
    shared = Sweeping(Replica(classifier), examples, targets, groups, reuse, autocast, classifier.device.type)
    stopping = None if precision is None else _Stopping(runs, targets, precision)
    sizes = (len(planned), len(examples), len(classifier.labels), len(groups))
    if keep is None:
        results = SweepResults.in_memory(*sizes)
    else:
        options = (engine, precision, autocast, seed, classifier.max_tokens, str(classifier.device))
        identity = _identity(classifier, examples, reference, runs, options)
        results = SweepResults.in_folder(Path(keep) / identity[:16], identity, *sizes)
    waves = [np.arange(len(examples))] if precision is None else _waves(len(examples), seed)
    collected = _Collected(groups, runs, results, progress)
    going_on = np.ones(len(runs), dtype=bool)
    agreement = None
    for wave in waves:
        batches = [wave[index] for index in classifier.buckets(examples.take(wave).inputs)]
        if engine != "plain" and groups and groups[0].reuse is None and batches:
            with classifier.studied():
                first = classifier.batch(examples.inputs, batches[0], targets)
                agreement = Passes(classifier, reuse, autocast).prove(groups, first)
        if engine == "exact":
            refuse_unproved(groups)
        items = collected.items_left(batches, going_on)
        for done in executor.results(run_item, items, shared=shared):
            collected.add(items[done.position], done.result)
        if stopping is not None:
            going_on = stopping.after(wave, results)
    return Sweep(
        cells_frame(planned, len(classifier.sites(ranking.component))),
        _by_cell(results, runs),
        np.array(results.clean_logits),
        targets,
        classifier.labels,
        {group.name: str(how) for group, how in zip(groups, collected.reuse, strict=True)},
        {group.name: why for group, why in zip(groups, collected.reasons, strict=True) if why},
        agreement,
        None if stopping is None else stopping.intervals(runs, len(planned)),
    )


def joined(sweeps: Sequence[Sweep]) -> Sweep:
    """Return sweeps of several components over the same examples as one, their cells one after the other."""
    first = sweeps[0]
    return Sweep(
        pd.concat([each.cells for each in sweeps], ignore_index=True),
        np.concatenate([each.logits for each in sweeps]),
        first.clean_logits,
        first.targets,
        first.labels,
        {place: how for each in sweeps for place, how in each.reuse.items()},
        {place: why for each in sweeps for place, why in each.reasons.items()},
        min((each.agreement for each in sweeps if each.agreement), key=lambda found: found.same, default=None),
        None
        if first.changes is None
        else np.concatenate([each.changes for each in sweeps if each.changes is not None]),
    )


def _check(examples: Examples, ranking: Ranking, reference: Activations, engine: str, autocast: str | None) -> None:
    if examples.fingerprint == ranking.source:
        raise SplitError(
            f"The neurons were ranked on {examples.name}, and the sweep was to measure them on the same examples; use "
            "examples that the ranking has not seen, or the result flatters the ranking."
        )
    if engine not in ENGINES:
        raise SettingsError(
            f"There is no engine {engine!r}; one of {', '.join(ENGINES)} was expected.{near(engine, ENGINES)}"
        )
    if autocast is not None and autocast not in AUTOCAST:
        raise SettingsError(f"There is no reduced precision {autocast!r}; one of {', '.join(AUTOCAST)} was expected.")
    if ranking.component != reference.component:
        raise SettingsError(
            f"The ranking is of {ranking.component!r}, the reference activations of {reference.component!r}; both "
            "must be of one component: record the reference with the same `component=`."
        )


def _check_cells(cells: Sequence[Cell], ranking: Ranking, classifier: Classifier) -> None:
    """Refuse cells that edit another component than the ranking's, or neurons that are not there."""
    for cell in cells:
        for neurons in (cell.neurons, *cell.further):
            if neurons.component != ranking.component:
                raise SettingsError(
                    f"A cell edits {neurons.component!r}, and the ranking is of {ranking.component!r}; a sweep is of "
                    "one component: make one for each, and join them with `synapse.sweeping.joined`."
                )
            check_neurons(neurons, classifier)


def _waves(n_examples: int, seed: int) -> list[Int[np.ndarray, "wave"]]:
    """Return the positions of the examples in a random order, cut into waves."""
    order = np.random.default_rng((seed, n_examples)).permutation(n_examples)
    return [order[start : start + WAVE] for start in range(0, n_examples, WAVE)]


def _identity(
    classifier: Classifier, examples: Examples, reference: Activations, runs: Sequence[Run], options: tuple[object, ...]
) -> str:
    """Return a hash of what the logits of a sweep depend on."""
    return identity_of(
        {
            "version": version("synapse"),
            "weights": classifier.weights_hash(),
            "sites": repr((classifier.sites(reference.component), classifier.anatomy.rows)),
            "examples": examples.fingerprint,
            # What the model says of some of them: that depends on the preprocessing, and on what is applied to it.
            "logits": hash_tensors({"": torch.from_numpy(classifier.predict(_some(examples)))}),
            "reference": [reference.source, reference.component, _hash_of(reference)],
            "runs": [repr((run.neurons, run.further, run.scope, run.kind)) for run in runs],
            "asked": [np.flatnonzero(run.examples).tolist() for run in runs if not run.examples.all()],
            "options": options,
        }
    )


def _some(examples: Examples, n: int = 4) -> Examples:
    return examples.take(np.unique(np.linspace(0, len(examples) - 1, n).astype(int)))


def _hash_of(reference: Activations) -> str:
    layers = [hash_tensors({"": torch.from_numpy(values)}) for values in reference.values]  # one in memory at a time
    arrays = {name: getattr(reference, name) for name in ("targets", "row_mean", "row_deviation")}
    whole = {name: torch.from_numpy(array) for name, array in arrays.items() if array is not None}
    return identity_of({"layers": layers, "others": hash_tensors(whole)})


class _Collected:
    """What has come in of a sweep: logits, what each group took over in the worst case, and how far it is."""

    def __init__(self, groups: Sequence[Group], runs: Sequence[Run], results: SweepResults, progress: Progress) -> None:
        self.groups, self.results, self.progress = groups, results, progress
        self.cell = np.array([run.cells[0] for run in runs], dtype=np.int64)
        self.learned: dict[int, Found] = {}
        self.done, self.total = 0, sum(int(run.examples.sum()) for run in runs)

    def items_left(self, batches: Sequence[np.ndarray], going_on: Bool[np.ndarray, "run"]) -> list[Item]:
        """Return what is to be run of these batches, without what was done before."""
        items, known = [], 0
        for batch in batches:
            examples = tuple(batch.tolist())
            left = [position for position in range(len(self.groups)) if not self.results.is_done(batch, position)]
            for position, group in enumerate(self.groups):
                mine = going_on[group.rows]
                if position in left:
                    items.append(Item(examples, position, None if mine.all() else tuple(np.flatnonzero(mine).tolist())))
                else:
                    known += int((group.asked(batch) & mine[:, None]).sum())
            if not left and not self.results.is_done(batch, CLEAN):
                items.append(Item(examples, None))
        self._report(known)
        return items

    def add(self, item: Item, found: Found) -> None:
        """Put away what an item gave."""
        examples = np.array(item.examples)
        if not self.results.is_done(examples, CLEAN):
            self.results.clean_logits[examples] = found.clean_logits
            self.results.finish(examples, CLEAN)
        if item.group is None or found.logits is None:
            return
        group = self.groups[item.group]
        self.results.logits[np.ix_(self.cell[group.rows], examples)] = found.logits
        self.results.finish(examples, item.group)
        if found.reuse != group.reuse:
            known = self.learned.setdefault(item.group, found)
            self.learned[item.group] = max(known, found, key=_how_little)
        self._report(int(np.isfinite(found.logits[:, :, 0]).sum()))

    @property
    def reuse(self) -> list[str | None]:
        """What each group took over, on the batch where that was least."""
        return [(self.learned.get(position, group)).reuse for position, group in enumerate(self.groups)]

    @property
    def reasons(self) -> list[str]:
        """Why that was no more."""
        return [(self.learned.get(position, group)).reason for position, group in enumerate(self.groups)]

    def _report(self, runs: int) -> None:
        if runs:
            self.done += runs
            self.progress(self.done, self.total)


def _how_little(found: Found) -> int:
    return LEVELS.index(found.reuse) if found.reuse is not None else -1


def _by_cell(results: SweepResults, runs: Sequence[Run]) -> Float[np.ndarray, "cell example label"]:
    """Return the logits of every cell; what was run once for several cells is written to all of them."""
    for run in runs:
        first, *others = run.cells
        for other in others:
            results.logits[other] = results.logits[first]
    logits = results.logits.view()
    logits.flags.writeable = False  # it may be the file from which the sweep would go on
    return logits


class _Stopping:
    """Says after every wave which runs go on: those whose change of accuracy is not known precisely enough."""

    def __init__(self, runs: Sequence[Run], targets: Int[np.ndarray, "example"], precision: float) -> None:
        self.cell = [run.cells[0] for run in runs]
        self.asked = np.stack([run.examples for run in runs])
        self.targets = targets
        self.changes = AnytimeChange(len(runs), self.asked.sum(axis=1), precision)
        self.going_on = np.ones(len(runs), dtype=bool)

    def after(self, wave: Int[np.ndarray, "wave"], results: SweepResults) -> Bool[np.ndarray, "run"]:
        """Return which runs go on, with the logits of a wave known."""
        right = results.clean_logits[wave].argmax(axis=1) == self.targets[wave]
        for run in np.flatnonzero(self.going_on):
            mine = wave[self.asked[run, wave]]
            still = results.logits[self.cell[run], mine].argmax(axis=1) == self.targets[mine]
            differences = right[self.asked[run, wave]].astype(np.float64) - still
            self.changes.update(differences[None], np.array([run]))
        self.going_on = ~self.changes.is_precise()
        return self.going_on

    def intervals(self, runs: Sequence[Run], n_cells: int) -> Float[np.ndarray, "cell 2"]:
        """Return the confidence sequence of every cell's change of accuracy, as far as it got."""
        ends = self.changes.interval()
        by_cell = np.empty((n_cells, 2))
        for row, run in enumerate(runs):
            by_cell[list(run.cells)] = -ends[row, ::-1]  # what was lost is counted positive there
        return by_cell
