"""The workloads of the probe benchmark: recorded states, and what every side makes of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import numpy as np
from peers.probe_tasks import EffectTask, FitTask, GaussianTask, LossTask, ProbeTask, Problem
from peers.scikit_learn import WITHIN
from workloads import LABELS, SHARED, Place, minilm, news_texts

import synapse as syn
from synapse.probe.solver import Solution, solve, solve_path, solve_resamples
from synapse.ranking.gaussian import greedy_gaussian
from synapse.types import Activations

EXAMPLES = 5000

LAYER = 2
"""The layer of the workloads that are about one: in the middle, where a probe's optimum is far from a single unit."""


@dataclass(frozen=True)
class Workload:
    """A task, our side of it, the peers that can do it, and when their answers agree."""

    name: str
    build: Callable[[bool], ProbeTask]
    ours: str
    peers: tuple[str, ...]
    compared: str
    tolerance: float
    dtype: str = "float64"


# -------------------------------------------------------------------------------------------------------------- states


@dataclass(frozen=True, eq=False)
class States:
    """Recorded activations, and in words what they are of."""

    activations: Activations
    words: str

    def standardised(self, layer: int, n: int | None = None) -> np.ndarray:
        """Return the first states of a layer with mean 0 and deviation 1, in float64."""
        values = self.activations.values[layer, :n].astype(np.float64)
        deviation = values.std(axis=0)
        return (values - values.mean(axis=0)) / np.where(deviation > 0, deviation, 1.0)


@cache
def states(quick: bool) -> States:
    """Return the readout states of MiniLM on AG News where both lie beside the repository, else made-up ones."""
    folder = SHARED / "models" / "minilm-agnews"
    if quick or not (folder / "model.safetensors").is_file():
        return synthetic(2, 400, 48) if quick else synthetic(6, EXAMPLES, 384)
    texts, labels = news_texts(EXAMPLES, part="train")
    classifier = syn.Classifier.from_pretrained(folder)
    activations = syn.record(classifier, syn.Examples(texts, labels, "AG News"))
    return States(activations, "states of MiniLM fine-tuned on AG News (384 units, 4 classes)")


def synthetic(n_layers: int, n: int, width: int) -> States:
    """Return seeded states as ill-conditioned as those of MiniLM: eigenvalues that fall with the square of their rank.

    The classes differ in the eight leading directions.
    """
    random = np.random.default_rng(0)
    targets = random.integers(0, len(LABELS), n)
    deviations = 1 / np.arange(1, width + 1)
    values = []
    for _ in range(n_layers):
        latent = random.normal(size=(n, width))
        latent[:, :8] += random.normal(size=(len(LABELS), 8))[targets]
        axes, _ = np.linalg.qr(random.normal(size=(width, width)))
        values.append((latent * deviations) @ axes)
    stacked = np.stack(values).astype(np.float32)
    activations = Activations(stacked, np.zeros((n, len(LABELS)), np.float32), targets, LABELS, "synthetic states")
    return States(activations, f"synthetic states with the spectrum of MiniLM's ({width} units, 4 classes)")


# --------------------------------------------------------------------------------------------------------------- tasks


def penalties(l1_ratio: float, only: int | None, quick: bool) -> FitTask:
    """Return a path of penalties for every layer, or for one alone."""
    recorded = states(quick)
    activations = recorded.activations
    path = (np.geomspace(0.1, 0.01, 3) if quick else np.geomspace(0.1, 0.001, 10)).tolist()
    layers = range(len(activations.values)) if only is None else [min(only, len(activations.values) - 1)]
    chains = tuple(_with_floors(recorded.standardised(layer), activations, path, l1_ratio) for layer in layers)
    place = f"{len(chains)} layers" if only is None else f"layer {layers[0]}"
    size = f"{place} x {len(path)} penalties from {path[0]:g} to {path[-1]:g}, l1_ratio {l1_ratio:g}"
    return FitTask(f"{size}, {len(activations.targets)} examples; {recorded.words}", chains)


def _with_floors(
    x: np.ndarray, activations: Activations, path: Sequence[float], l1_ratio: float
) -> tuple[Problem, ...]:
    problem = Problem(x, activations.targets, len(activations.labels), path[0], l1_ratio)
    found = solve_path(x, problem.targets, n_labels=problem.n_labels, penalties=path, l1_ratio=l1_ratio)
    return tuple(replace(problem, penalty=p, floor=found[p].objective - found[p].gap) for p in path)


def losses(quick: bool) -> LossTask:
    """Return all layers, whose loss is to come down to NeuroX's."""
    recorded = states(quick)
    activations = recorded.activations
    values = np.stack([recorded.standardised(layer) for layer in range(len(activations.values))])
    n_layers, n, _ = values.shape
    words = f"{n_layers} layers, {n} examples, the loss that NeuroX ends at or a lower one; {recorded.words}"
    return LossTask(words, values.astype(np.float32), activations.targets, len(activations.labels), "NeuroX")


def bootstrap(quick: bool) -> FitTask:
    """Return resamples of a layer, at the penalty that `fit_probes` chooses for it."""
    recorded = states(quick)
    layer = min(LAYER, len(recorded.activations.values) - 1)
    activations = replace(recorded.activations, values=recorded.activations.values[[layer]])
    penalty = syn.fit_probes(activations)[0].penalty
    x, targets, n_labels = recorded.standardised(layer), activations.targets, len(activations.labels)
    n, n_resamples = len(x), 12 if quick else 100
    counts = np.random.default_rng(1).multinomial(n, np.full(n, 1 / n), size=n_resamples)
    full = solve(x, targets, n_labels=n_labels, penalty=penalty)
    found = solve_resamples(x, targets, counts, n_labels=n_labels, penalty=penalty, start=full)
    chains = tuple((_resample(x, targets, n_labels, penalty, c, s),) for c, s in zip(counts, found, strict=True))
    size = f"{n_resamples} resamples of {n} examples, layer {layer}, penalty {penalty:g}, l1_ratio 0.5"
    return FitTask(f"{size}; {recorded.words}", chains, full)


def _resample(
    x: np.ndarray, targets: np.ndarray, n_labels: int, penalty: float, counts: np.ndarray, found: Solution
) -> Problem:
    return Problem(x, targets, n_labels, penalty, 0.5, counts, found.objective - found.gap)


def gaussian(quick: bool) -> GaussianTask:
    """Return the choice of units by a Gaussian probe."""
    recorded = states(quick)
    n, dimensions = (400, 8) if quick else (2000, 50)
    layer = min(LAYER, len(recorded.activations.values) - 1)
    values, targets = recorded.standardised(layer, n), recorded.activations.targets[:n]
    held_out = greedy_gaussian(values, targets, dimensions=1).held_out
    words = f"{dimensions} of {values.shape[1]} units, {n} examples, layer {layer}; {recorded.words}"
    return GaussianTask(words, values, targets, dimensions, held_out)


def effects(n: int, n_quick: int, quick: bool) -> EffectTask:
    """Return the neurons of the last two layers."""
    setting = minilm(Place(quick=quick), n_quick if quick else n)
    classifier, examples = setting.classifier, setting.examples
    activations = syn.record(classifier, examples)
    layers = (classifier.n_layers - 2, classifier.n_layers - 1)
    words = f"zero for each of the {activations.width} neurons of the last two layers; {setting.description}"
    return EffectTask(words, classifier, examples, activations, layers)


ABOVE = "nats above the certified optimum"

WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload(
            "probe-penalties",
            partial(penalties, 0.5, None),
            "peers.ours_probe:Paths",
            (),
            ABOVE,
            WITHIN,
        ),
        Workload(
            "probe-penalties-layer",
            partial(penalties, 0.5, LAYER),
            "peers.ours_probe:Paths",
            ("scikit-learn saga",),
            ABOVE,
            WITHIN,
        ),
        Workload(
            "probe-penalties-ridge",
            partial(penalties, 0.0, None),
            "peers.ours_probe:Paths",
            ("scikit-learn lbfgs",),
            ABOVE,
            WITHIN,
        ),
        Workload(
            "probe-neurox",
            losses,
            "peers.ours_probe:LooseRidge",
            ("NeuroX",),
            "nats above NeuroX's loss",
            0.0,
        ),
        Workload(
            "probe-bootstrap",
            bootstrap,
            "peers.ours_probe:Resamples",
            ("synapse, 10 cold fits", "scikit-learn saga, 10 cold fits"),
            ABOVE,
            WITHIN,
        ),
        Workload(
            "probe-bootstrap-refit",
            bootstrap,
            "peers.ours_probe:EachResample",
            ("scikit-learn saga, refits",),
            ABOVE,
            WITHIN,
        ),
        Workload(
            "probe-gaussian",
            gaussian,
            "peers.ours_probe:Gaussian",
            ("brute force, scipy", "brute force, torch"),
            "bits of information",
            1e-8,
        ),
        Workload(
            "single-neuron-effects",
            partial(effects, 8, 2),
            "peers.ours_probe:SingleEffects",
            ("captum",),
            "logits of margin",
            1e-4,
            "float32",
        ),
        Workload(
            "single-neuron-effects-512",
            partial(effects, 512, 4),
            "peers.ours_probe:SingleEffects",
            (),
            "",
            0.0,
            "float32",
        ),
    )
}
