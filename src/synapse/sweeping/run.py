"""Sweep: the logits of every example under every cell of a plan.

Each run starts at the layer it edits, and the runs of one layer and scope share forward passes.
"""

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int

from synapse.data.examples import Examples
from synapse.errors import SettingsError, SplitError
from synapse.model.classifier import Classifier
from synapse.model.hooks import Edit, Site, edited_sites
from synapse.model.resume import CleanPass, clean_pass, resume, resume_layer
from synapse.perturb.activations import AffineEdit, Intervention, noise_for
from synapse.ranking.base import Ranking
from synapse.sweeping.plan import FRACTIONS, Cell, Grid, Reach, Run, cells_frame, merged_runs, plan
from synapse.types import Activations, Component, Progress, Scope, Sweep, silent

log = logging.getLogger(__name__)

Results = Iterator[tuple[Int[np.ndarray, "pair"], Int[np.ndarray, "pair"], Float[np.ndarray, "pair label"]]]
"""Pairs of a run and an example of the batch, with their logits, a chunk at a time."""

TOLERANCE = 1e-4
"""Largest logit difference from the plain hooked forward at which the resumed one is trusted."""


PROOF_EXAMPLES = 8
"""Examples of the first batch on which that is tried."""


def sweep(
    classifier: Classifier,
    examples: Examples,
    ranking: Ranking,
    *,
    reference: Activations,
    cells: Iterable[Cell] | None = None,
    fractions: Sequence[float] = FRACTIONS,
    engine: str = "resume",
    seed: int = 0,
    progress: Progress = silent,
) -> Sweep:
    """Return the logits of the examples under every cell.

    `cells` is a plan of your own; without one, the default grid with these `fractions` is swept. `reference` (the
    training examples) gives the means and deviations that `mean` and `noise` use. `engine` is `resume` (start at the
    edited layer) or `plain` (the whole model under hooks for every cell). The first runs of each layer and scope are
    compared with `plain`; where their logits differ by more than `TOLERANCE`, these are run plain, with a warning.

    Raises:
        SplitError: the examples are those that the ranking was made from.
        SettingsError: an unknown engine.
    """
    if examples.fingerprint == ranking.source:
        raise SplitError(
            f"The neurons were ranked on {examples.name}, and the sweep was to measure them on the same examples; use "
            "examples that the ranking has not seen, or the result flatters the ranking."
        )
    if engine not in ("resume", "plain"):
        raise SettingsError(f"There is no engine {engine!r}; 'resume' or 'plain' was expected.")
    planned = list(plan(ranking, Grid(fractions=tuple(fractions)), seed=seed) if cells is None else cells)
    targets = examples.targets(classifier.labels)
    if ranking.component != reference.component:
        raise SettingsError(
            f"The ranking is of {ranking.component!r}, the reference activations of {reference.component!r}; both "
            "must be of one component: record the reference with the same `component=`."
        )
    runs = merged_runs(planned, len(examples), Reach.of(classifier, ranking.component))
    groups = _grouped(runs, reference, classifier, seed=seed, plain=engine == "plain")
    results = np.full((len(runs), len(examples), len(classifier.labels)), np.nan, dtype=np.float32)
    clean_logits = np.empty((len(examples), len(classifier.labels)), dtype=np.float32)
    done, total = 0, sum(int(run.examples.sum()) for run in runs)
    for batch in classifier.batches(examples.inputs):
        clean = clean_pass(classifier, batch)
        clean_logits[batch.index] = clean.logits.float().cpu().numpy()
        for group in groups:
            for run, example, logits in group.results(classifier, clean):
                results[run, batch.index[example]] = logits
                done += len(run)
                progress(done, total)
    logits = np.empty((len(planned), *results.shape[1:]), dtype=np.float32)
    for row, merged in enumerate(runs):
        logits[list(merged.cells)] = results[row]
    frame = cells_frame(planned, len(classifier.sites(ranking.component)))
    run_plain = tuple(
        f"{group.component} of layer {group.layer}, {group.scope}" for group in groups if group.trusted is False
    )
    return Sweep(frame, logits, clean_logits, targets, classifier.labels, tuple(dict.fromkeys(run_plain)))


def joined(sweeps: Sequence[Sweep]) -> Sweep:
    """Return sweeps of several components over the same examples as one, their cells one after the other."""
    first = sweeps[0]
    return Sweep(
        pd.concat([each.cells for each in sweeps], ignore_index=True),
        np.concatenate([each.logits for each in sweeps]),
        first.clean_logits,
        first.targets,
        first.labels,
        tuple(place for each in sweeps for place in each.run_plain),
    )


@dataclass(eq=False)
class _Group:
    """Runs of one site and scope. Run i stands in row `rows[i]` of the results; row i of `edit` is its intervention.

    `asked` says which of all examples each run is about. `noise_seed` is None where nothing is random. `trusted` says
    whether resuming gives the plain forward's logits; None as long as it was not compared.
    """

    component: Component
    layer: int
    scope: Scope
    noise_seed: int | None
    rows: Int[np.ndarray, "run"]
    interventions: list[Intervention]
    asked: Bool[np.ndarray, "run all"]
    edit: AffineEdit
    trusted: bool | None

    def results(self, classifier: Classifier, clean: CleanPass) -> Results:
        """Yield the logits of all runs on the batch's examples, each run on those it asks for."""
        run, example = np.nonzero(self.asked[:, clean.batch.index])
        if len(run) and self.trusted is None:
            self.trusted = self._agrees_with_plain(classifier, clean, run, example)
        if not self.trusted:
            yield from self._plain(classifier, clean, run, example)
            return
        noise = self._noise(classifier, clean)
        size = max(1, classifier.max_tokens // clean.n_tokens)
        for start in range(0, len(run), size):
            chunk = slice(start, start + size)
            yield (
                self.rows[run[chunk]],
                example[chunk],
                self._resumed(classifier, clean, run[chunk], example[chunk], noise),
            )

    def _resumed(
        self,
        classifier: Classifier,
        clean: CleanPass,
        run: Int[np.ndarray, "pair"],
        example: Int[np.ndarray, "pair"],
        noise: dict[int, torch.Tensor],
    ) -> Float[np.ndarray, "pair label"]:
        chosen = torch.from_numpy(example).to(classifier.device)
        edit = self.edit.take(torch.from_numpy(run).to(classifier.device))
        sites = classifier.sites(self.component)
        edits: list[tuple[Site, Edit]] = [
            (
                sites[layer],
                partial(self._edited, classifier, sites[layer], edit, noise[layer][chosen] if noise else None),
            )
            for layer in self._edited_layers(classifier)
        ]
        below = resume_layer(classifier, self.component, self.layer)
        states = None if below < 0 else clean.states[below][chosen]
        with torch.inference_mode(), edited_sites(classifier.module, edits):
            return resume(classifier, clean, below, states, chosen).float().cpu().numpy()

    def _edited(
        self, classifier: Classifier, site: Site, edit: AffineEdit, noise: torch.Tensor | None, states: torch.Tensor
    ) -> torch.Tensor:
        rows = classifier.rows(classifier.current_batch, site, states.shape[1], self.scope)
        return edit(states, rows, noise)

    def _plain(
        self,
        classifier: Classifier,
        clean: CleanPass,
        run: Int[np.ndarray, "pair"],
        example: Int[np.ndarray, "pair"],
    ) -> Results:
        for one in np.unique(run):
            mine = example[run == one]
            with classifier.edited(self.interventions[one]):
                logits = classifier.forward(clean.batch).float().cpu().numpy()
            yield np.full(len(mine), self.rows[one]), mine, logits[mine]

    def _agrees_with_plain(
        self,
        classifier: Classifier,
        clean: CleanPass,
        run: Int[np.ndarray, "pair"],
        example: Int[np.ndarray, "pair"],
    ) -> bool:
        """Compare a few runs, from the smallest set to the largest, with the plain hooked forward."""
        asked = np.unique(example)[:PROOF_EXAMPLES]
        run, example = run[np.isin(example, asked)], np.searchsorted(asked, example[np.isin(example, asked)])
        clean = clean.take(torch.from_numpy(asked).to(classifier.device))
        sizes = np.array([len(intervention.neurons) for intervention in self.interventions])
        by_size = np.unique(run)[np.argsort(sizes[np.unique(run)], kind="stable")]
        few = np.isin(run, by_size[np.linspace(0, len(by_size) - 1, 3).astype(int)])
        resumed = self._resumed(classifier, clean, run[few], example[few], self._noise(classifier, clean))
        plain = np.concatenate([logits for _, _, logits in self._plain(classifier, clean, run[few], example[few])])
        worst = float(np.abs(plain - resumed).max())
        agrees = worst <= TOLERANCE  # false for NaN, which agrees with nothing
        if not agrees:
            log.warning(
                "%s of layer %d, scope %s: resumed logits differ from the plain forward by %.1e (at most %.0e is "
                "trusted); it is run plain, which is slower.",
                *(self.component, self.layer, self.scope, worst, TOLERANCE),
            )
        return agrees

    def _edited_layers(self, classifier: Classifier) -> range:
        n_layers = len(classifier.sites(self.component))
        return range(self.layer, n_layers if self.scope == "readout-onward" else self.layer + 1)

    def _noise(self, classifier: Classifier, clean: CleanPass) -> dict[int, torch.Tensor]:
        """Return the noise of every example of the batch at each edited layer; nothing where none is needed."""
        if self.noise_seed is None:
            return {}
        sites = classifier.sites(self.component)
        noise = {}
        for layer in self._edited_layers(classifier):
            n_tokens = 1 if sites[layer].layout == "example unit" else clean.n_tokens
            noise[layer] = noise_for(classifier, clean.batch, self.component, layer, n_tokens, seed=self.noise_seed)
        return noise


def _grouped(
    runs: Sequence[Run], reference: Activations, classifier: Classifier, *, seed: int, plain: bool
) -> list[_Group]:
    members: dict[tuple[int, Scope, bool], list[int]] = defaultdict(list)
    for row, run in enumerate(runs):
        members[run.layer, run.scope, run.kind.name == "noise"].append(row)
    groups = []
    for (layer, scope, noisy), rows in sorted(members.items()):
        chosen = [runs[row] for row in rows]
        interventions = [run.intervention(reference, seed=seed) for run in chosen]
        component = chosen[0].neurons.component
        width = classifier.sites(component)[layer].width
        edit = AffineEdit.stacked([each.edit(width) for each in interventions]).to(classifier.device)
        asked = np.stack([run.examples for run in chosen])
        groups.append(
            _Group(
                component,
                layer,
                scope,
                seed if noisy else None,
                np.array(rows),
                interventions,
                asked,
                edit,
                False if plain else None,
            )
        )
    return groups
