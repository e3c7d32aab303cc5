"""A study, from a classifier and examples to a run folder: the only file that knows the order of the stages."""

import hashlib
import logging
import math
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int

from synapse.attack.defence import Defence, defence_table, defend_head
from synapse.attack.edits import HeadEdits, fit_head_edits
from synapse.attack.families import Target, find_attacks
from synapse.attack.head import FittedStep
from synapse.data.examples import Examples, sample_examples, shared_inputs
from synapse.elsewhere import place_of
from synapse.errors import ConvergenceError, RestoreError, SettingsError, SplitError
from synapse.execute import Executor
from synapse.forecasting import amount
from synapse.measure.agreement import agreement_table
from synapse.measure.attacks import attack_table
from synapse.measure.probes import probe_rows, probe_table
from synapse.measure.scorecard import component_figures, scorecard, sweep_table
from synapse.model.classifier import Classifier
from synapse.perturb.bits import FORMATS
from synapse.probe.controls import ProbeEvaluation, control_targets, evaluate_probes, input_types
from synapse.probe.probe import Probes, fit_probes, refit_probes
from synapse.ranking import METHODS, Ranking, rank
from synapse.ranking.bootstrap import RankStability, rank_stability, runs_the_model
from synapse.ranking.statistics import RandomOrder
from synapse.recording import default_shelf, record_components
from synapse.report.html import write_report
from synapse.settings import Amount, Settings
from synapse.store import FORMAT, check_free, new_run, write_json, write_logits, write_table
from synapse.sweeping import joined, plan, sweep
from synapse.types import Activations, Attacks, Component, Progress, Sweep

log = logging.getLogger(__name__)

_IN_MEMORY = 2**30
"""Bytes of states of one component and split that a study holds in memory."""

_PAIRS_KEPT = 400
"""Pairs of classes up to which the edits that were found are kept in the run folder."""

StageProgress = Callable[[str, int, int], None]
"""Called with the stage's name, the work done and the work there is."""

T = TypeVar("T")
Place = TypeVar("Place", bound=Path | str)


def run_study(
    classifier: Classifier,
    train: Examples,
    test: Examples,
    *,
    settings: Settings,
    out: Place,
    executor: Executor | None = None,
    progress: StageProgress = lambda _stage, _done, _total: None,
    command: str = "",
) -> Place:
    """Study a classifier and return `out`, where its run folder is; nothing is left there if the study ends otherwise.

    `out` is a path or, for a place elsewhere, a URL that fsspec knows, such as `s3://bucket/run`. What the sweeps have
    done lies beside the run, in `.NAME-sweep`, from where the same study goes on after it was killed; for a run
    elsewhere it lies in the cache, `settings.cache` or else `$SYNAPSE_CACHE`. `executor` runs what takes long
    (recording, probes and their refits, sweeps, attacks): by default this process.

    Neurons are ranked and attacks are fitted on `train`; everything is measured on `test`. The classifier's weights are
    compared by SHA-256 before and after.

    Raises:
        SplitError: `train` and `test` are the same examples.
        LabelError, SettingsError, RunFolderError: as the message says, before anything is computed.
        RestoreError: the classifier did not come back as it was.
    """
    check_free(out, overwrite=settings.overwrite)
    if train.fingerprint == test.fingerprint:
        raise SplitError(
            f"{train.name} and {test.name} hold the same examples; neurons must be measured on examples that did not "
            "choose them. Give one file alone to have it split."
        )
    test.targets(classifier.labels)  # labels and sites that are not there are refused now, not after minutes
    for component in settings.sites:
        classifier.sites(component)
    train = train.take(_sample(train, classifier, settings.train_examples, settings.seed))
    rows = _sample(test, classifier, settings.examples, settings.seed)
    swept = test.take(rows)
    attacked = _sample(swept, classifier, settings.attack_examples, settings.seed)
    timer, seed = _Timer(progress), settings.seed
    unfinished = _unfinished(out, settings)
    weights_hash = classifier.weights_hash()

    recorded = timer.stage("record", lambda step: _record_both(classifier, train, test, settings, executor, step))
    parts = [
        _studied(classifier, component, recorded[component], train, test, swept, settings, unfinished, executor, timer)
        for component in settings.sites
    ]
    whole = recorded[settings.sites[0]]  # logits and features are the same whichever component they came with
    target = Target(
        classifier,
        whole.train,
        whole.test,
        swept.take(attacked),
        whole.test.take(rows[attacked]),
        _feature_order(whole.train, settings),
        settings.noise_draws,
        seed,
        train.take(_sample(train, classifier, settings.attack_examples, seed)),
        parts[0].neuron_order if settings.sites[0] == "residual" else None,
    )
    attacks = Attacks()
    for name in settings.attacks:
        attacks += timer.stage(f"attack {name}", partial(_attacks, name, target, executor))
    defences = timer.stage("protect", lambda step: _defences(target, settings, step))
    edits = timer.stage("attack kept", lambda _: _kept_edits(classifier, whole, settings))
    if classifier.weights_hash() != weights_hash:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise RestoreError("The classifier's weights are not what they were before the study; discard its results.")
    outcome = joined([part.outcome for part in parts])
    ranking_table = pd.concat([part.ranking_table for part in parts], ignore_index=True)
    drawn = [part.drawn.to_frame() for part in parts if part.drawn is not None]
    tables = timer.stage(
        "measure",
        lambda _: {
            "probe": pd.concat([part.probe_table for part in parts], ignore_index=True),
            "ranking": ranking_table,
            "agreement": agreement_table(ranking_table),
            "sweep": sweep_table(outcome),
            "attack": attack_table(attacks, whole.test, seed=seed),
            **({"defence": defence_table(defences)} if defences else {}),
            **({"rank_stability": pd.concat(drawn, ignore_index=True)} if drawn else {}),
        },
    )
    card = timer.stage("scorecard", lambda _: _scorecard(whole.test, parts, tables["attack"], settings))
    with new_run(out, overwrite=settings.overwrite) as draft:
        for name, table in tables.items():
            write_table(draft, name, table)
        write_logits(draft, outcome, rows)
        if edits is not None:
            edits.save(draft / "attacks" / "head-edit")
        write_json(draft / "scorecard.json", card)
        manifest = _manifest(
            classifier, train, test, settings, command, weights_hash, timer.seconds, len(rows), outcome
        )
        write_json(draft / "manifest.json", manifest)
        write_report(draft)
    shutil.rmtree(unfinished, ignore_errors=True)
    return out


def _unfinished(out: Path | str, settings: Settings) -> Path:
    """Return where sweeps are kept until the study ends, so that it goes on there if it is killed in its longest stage.

    The place is made from that of the run alone.
    """
    place = place_of(out)
    if isinstance(place, Path):
        return place.with_name(f".{place.name}-sweep")
    return (settings.cache or default_shelf()) / f".{hashlib.sha256(place.encode()).hexdigest()[:32]}-sweep"


@dataclass(frozen=True, eq=False)
class _Recorded:
    train: Activations
    test: Activations


def _record_both(
    classifier: Classifier,
    train: Examples,
    test: Examples,
    settings: Settings,
    executor: Executor | None,
    step: Progress,
) -> dict[Component, _Recorded]:
    total = len(train) + len(test)
    both = partial(record_components, classifier, components=settings.sites, keep=settings.cache, executor=executor)
    first = both(examples=train, progress=lambda done, _: step(done, total))
    second = both(examples=test, progress=lambda done, _: step(len(train) + done, total))
    return {component: _Recorded(_near(first[component]), _near(second[component])) for component in settings.sites}


def _near(activations: Activations) -> Activations:
    """Return activations in memory where they are few: a study reads them many times."""
    return activations.loaded() if 4 * math.prod(activations.values.shape) <= _IN_MEMORY else activations


@dataclass(frozen=True, eq=False)
class _Studied:
    """What a study has measured of one component."""

    component: Component
    outcome: Sweep
    probe_table: pd.DataFrame
    ranking_table: pd.DataFrame
    neuron_order: Int[np.ndarray, "layer unit"]
    """The neurons of every layer in the order of the first ranking."""
    drawn: RankStability | None


def _studied(
    classifier: Classifier,
    component: Component,
    recorded: _Recorded,
    train: Examples,
    test: Examples,
    swept: Examples,
    settings: Settings,
    unfinished: Path,
    executor: Executor | None,
    timer: "_Timer",
) -> _Studied:
    """Probe, rank and sweep one component; what the sweep has done is kept in `unfinished`."""
    seed, name = settings.seed, f" {component}" if len(settings.sites) > 1 else ""
    probes = timer.stage(f"probe{name}", lambda _: fit_probes(recorded.train, seed=seed, executor=executor))
    evaluations = timer.stage(f"controls{name}", lambda _: _evaluated(probes, recorded, train, test, seed))
    rankings = timer.stage(f"rank{name}", lambda _: _rankings(classifier, train, recorded.train, probes, settings))
    drawn = timer.stage(f"rank again{name}", lambda step: _drawn(recorded.train, probes, settings, executor, step))
    rivals = [ranking for ranking in rankings if ranking.method in settings.rivals]
    outcome = timer.stage(
        f"sweep{name}",
        lambda step: sweep(
            classifier,
            swept,
            rankings[0],
            reference=recorded.train,
            cells=plan(rankings[0], settings.grid(), rivals=rivals, seed=seed),
            engine=settings.engine,
            precision=settings.precision,
            autocast=settings.autocast,
            keep=unfinished / component,
            executor=executor,
            seed=seed,
            progress=step,
        ),
    )
    return _Studied(
        component,
        outcome,
        _probe_table(evaluations, component, recorded.train.n_layers, len(classifier.labels), seed),
        pd.concat([ranking.to_frame() for ranking in rankings], ignore_index=True),
        np.stack([rankings[0].order(layer) for layer in range(recorded.train.n_layers)]),
        drawn,
    )


def _rankings(
    classifier: Classifier, train: Examples, recorded: Activations, probes: Probes, settings: Settings
) -> list[Ranking]:
    methods = [RandomOrder(settings.seed) if name == "random" else name for name in settings.methods]
    return [rank(recorded, method=method, probes=probes, classifier=classifier, examples=train) for method in methods]


def _drawn(
    recorded: Activations, probes: Probes, settings: Settings, executor: Executor | None, step: Progress
) -> RankStability | None:
    """Return the ranks of many draws by the first method; None where there are none to be had, or none are wanted."""
    method = METHODS[settings.methods[0]]
    if settings.rank_draws == 0:
        return None
    if runs_the_model(method):
        log.info("Rankings by %s are not made again: every draw would run the model.", method.name)
        return None
    try:
        return rank_stability(
            recorded,
            method=method,
            probes=probes,
            draws=settings.rank_draws,
            seed=settings.seed,
            executor=executor,
            progress=step,
        )
    except ConvergenceError as error:  # of one draw, for which a study need not end
        log.warning("%s The study goes on without draws.", error)
        return None


def _evaluated(
    probes: Probes, recorded: _Recorded, train: Examples, test: Examples, seed: int
) -> tuple[ProbeEvaluation, ...]:
    """Return what the probes and their control probes say of the test examples."""
    train_types, test_types = input_types(train, test, seed=seed)
    train_control, test_control = control_targets(train_types, test_types, recorded.train.targets, seed=seed)
    controls = refit_probes(probes, recorded.train, train_control)
    # A model that says one thing of all examples has no decision to probe for.
    decides = len(np.unique(recorded.train.predictions)) > 1
    of_model = fit_probes(recorded.train, seed=seed, target="model") if decides else None
    return evaluate_probes(probes, controls, recorded.test, test_control, of_model)


def _probe_table(
    evaluations: Sequence[ProbeEvaluation], component: Component, n_layers: int, n_labels: int, seed: int
) -> pd.DataFrame:
    table = probe_table(
        [
            row
            for evaluation in evaluations
            for row in probe_rows(
                layer=evaluation.layer,
                n_layers=n_layers,
                outcomes=evaluation.outcomes(),
                predictions=evaluation.predictions,
                targets=evaluation.targets,
                n_labels=n_labels,
                settings={
                    "penalty": evaluation.penalty,
                    "gradient_norm": evaluation.gradient_norm,
                    "nonzero_units": evaluation.nonzero_units,
                },
                seed=seed,
            )
        ]
    )
    table.insert(0, "component", component)
    return table


def _scorecard(
    test: Activations, parts: Sequence[_Studied], attacks: pd.DataFrame, settings: Settings
) -> dict[str, Any]:
    """Return the figures of the first component with those of the whole classifier, and those of further components."""
    first, *others = [
        component_figures(
            probe_table=part.probe_table,
            ranking_table=part.ranking_table,
            sweep=part.outcome,
            method=settings.methods[0],
            rank_stability=None if part.drawn is None else part.drawn.figures(),
            seed=settings.seed,
        )
        for part in parts
    ]
    card = scorecard(
        test_logits=test.known_logits,
        test_targets=test.targets,
        labels=test.labels,
        attack_table=attacks,
        component=parts[0].component,
        figures=first,
        seed=settings.seed,
    )
    further = {part.component: figures for part, figures in zip(parts[1:], others, strict=True)}
    return card | ({"components": further} if further else {})


def _attacks(name: str, target: Target, executor: Executor | None, step: Progress) -> Attacks:
    return find_attacks(name, target, executor=executor, progress=step)


def _defences(target: Target, settings: Settings, step: Progress) -> list[Defence]:
    """Return what protects the final map, where attacks on it are asked for; of its bits, where theirs are."""
    if not {"head", "bits"} & set(settings.attacks) or target.classifier.final is None:
        return []
    formats = FORMATS if "bits" in settings.attacks else ()
    train, test, order = target.train, target.test, target.feature_order
    return defend_head(target.classifier, train, test, order, step, formats=formats, seed=target.seed)


def _kept_edits(classifier: Classifier, recorded: _Recorded, settings: Settings) -> HeadEdits | None:
    """Return the fitted edits of the head, for the run folder; None where none are wanted or none are to be had."""
    pairs = len(classifier.labels) * (len(classifier.labels) - 1)
    if "head" not in settings.attacks or classifier.final is None:
        return None
    if pairs > _PAIRS_KEPT:
        log.info("The edits of %d pairs of classes are not kept; at most %d are.", pairs, _PAIRS_KEPT)
        return None
    try:
        return fit_head_edits(FittedStep(), recorded.train, recorded.test, classifier)
    except SettingsError as error:  # no pair can be redirected, for which a study need not end
        log.warning("No edits of the head are kept: %s", error)
        return None


def _feature_order(recorded: Activations, settings: Settings) -> Int[np.ndarray, "feature"] | None:
    """Return the features of the final linear map in the order of a probe of them, by the first method that can."""
    if recorded.features is None or "head" not in settings.attacks:
        return None
    features = replace(
        recorded,
        values=np.asarray(recorded.features, dtype=np.float32)[None],
        component="pooler",
        row_mean=None,
        row_deviation=None,
        class_moments=None,
    )
    method = next((name for name in settings.methods if not runs_the_model(METHODS[name])), "cumulative-mass")
    return rank(features, method=method, probes=fit_probes(features, seed=settings.seed)).order(0)


@dataclass(eq=False)
class _Timer:
    """Runs stages one after the other, reporting their progress and keeping their seconds."""

    progress: StageProgress
    seconds: dict[str, float] = field(default_factory=dict)

    def stage(self, name: str, work: Callable[[Progress], T]) -> T:
        with self.measuring(name):
            return work(lambda done, total: self.progress(name, done, total))

    @contextmanager
    def measuring(self, name: str) -> Iterator[None]:
        self.progress(name, 0, 0)
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 3)


def _sample(examples: Examples, classifier: Classifier, asked: Amount, seed: int) -> Int[np.ndarray, "example"]:
    return sample_examples(examples.targets(classifier.labels), amount(asked, len(examples)), seed=seed)


def _manifest(
    classifier: Classifier,
    train: Examples,
    test: Examples,
    settings: Settings,
    command: str,
    weights_hash: str,
    seconds: dict[str, float],
    n_swept: int,
    outcome: Sweep,
) -> dict[str, Any]:
    packages = ("torch", "transformers", "numpy", "scipy", "scikit-learn", "zarr", "pandas")
    studied = {
        component: {"n_layers": len(classifier.sites(component)), "width": classifier.sites(component)[0].width}
        for component in settings.sites
    }
    return {
        "format": FORMAT,
        "status": "complete",
        "title": settings.title or classifier.name,
        "command": command,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "synapse_version": version("synapse"),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "machine": {
            "processor": platform.machine(),
            "threads": torch.get_num_threads(),
            "device": str(classifier.device),
        },
        "seed": settings.seed,
        "settings": settings.model_dump(mode="json"),
        "model": {"hash": weights_hash, **classifier.describe()},
        "data": {
            "train": {"name": train.name, "hash": train.fingerprint, "n": len(train)},
            "test": {"name": test.name, "hash": test.fingerprint, "n": len(test)},
            "shared_inputs": shared_inputs(train, test),
        },
        "labels": list(classifier.labels),
        **studied[settings.sites[0]],
        "components": studied,
        "sweep": {
            "examples": n_swept,
            "cells": len(outcome.cells),
            "sampled": n_swept < len(test),
            "run_plain": list(outcome.run_plain),
            "reuse": dict(outcome.reuse),
            "reasons": dict(outcome.reasons),
            "agreement": None if outcome.agreement is None else asdict(outcome.agreement),
        },
        "timings": {**seconds, "total": round(sum(seconds.values()), 3)},
    }
