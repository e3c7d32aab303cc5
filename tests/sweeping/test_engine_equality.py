"""The engine of sweeps gives the logits that plain torch hooks give, wherever and however it takes a shorter way.

Nothing that is expected here comes from the package: the modules are those that tests/architectures.py names, the
hooks, the rows and the formulas of the interventions are written down below once more, and every cell runs the whole
model. Of the package are only the padded inputs, and what is drawn at random where its documentation leaves that open.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from architecture_page import classifier_of
from architectures import TABLE, Architecture, Inputs, logits_of
from torch import Tensor, nn

from synapse.data.examples import Examples
from synapse.model.classifier import Batch, Classifier
from synapse.perturb.base import Place, noise_for
from synapse.ranking.base import Ranking
from synapse.sweeping import Cell, Kind, cumulative, sweep
from synapse.sweeping.kinds import RECIPES
from synapse.types import COMPONENTS, Activations, Component, Neurons, Scope

LABELS = tuple("abc")
UNDERSTOOD = [row for row in TABLE if row.refused is None]
ROWS = {row.name: row for row in TABLE}
CELLS_AT_ONCE = 48

pytestmark = pytest.mark.filterwarnings("ignore:Mean of empty slice")


# ------------------------------------------------------------------------------------------------------ the plain hooks


@dataclass(frozen=True)
class Spot:
    """Where a component of a layer is: the input or the output of one call of a module."""

    module: str
    call: int
    side: str


def spots(row: Architecture, component: Component) -> list[Spot]:
    """Return the place of a component in every layer, by the names of the table; none where there is no such site."""
    if component == "pooler":
        return [Spot(row.final, 0, "input")] if row.final else []
    names, side = {
        "residual": (row.block_names, "output"),
        "mlp": (row.mlp, "input"),
        "attention": (row.attention, "output"),
        "heads": (row.attention if row.n_heads else None, "input"),
    }[component]
    return [Spot(name, (names or ())[:layer].count(name), side) for layer, name in enumerate(names or ())]


NewValues = Callable[[np.ndarray, int, np.ndarray, int], np.ndarray]
"""(values of the neurons: (row, unit); which example of the batch; which of its rows; of how many) -> new values."""


@dataclass(frozen=True)
class HookedEdit:
    """What one cell does at one spot: new values for the units of the chosen rows."""

    neurons: Neurons
    scope: Scope
    new: NewValues


@dataclass
class Hooks:
    """Edits of stacked copies of a batch, one copy a cell, at one module: what `register_forward_hook` is given."""

    row: Architecture
    inputs: Inputs
    n_cells: int
    edits: dict[tuple[int, str], dict[int, HookedEdit]]
    """By call and side: the edit of each cell that has one there."""
    calls: int = -1

    def at_input(self, _module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        self.calls += 1
        edits = self.edits.get((self.calls, "input"))
        return (self.edited(arguments[0], edits), *arguments[1:]) if edits else None

    def at_output(self, _module: nn.Module, _arguments: Any, output: Any) -> Any:
        edits = self.edits.get((self.calls, "output"))
        if not edits:
            return None
        first = output[0] if isinstance(output, tuple) else output
        new = self.edited(first, edits)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    def edited(self, states: Tensor, edits: dict[int, HookedEdit]) -> Tensor:
        """Return the states with every cell's edit in its own copies of the examples."""
        is_turned = self.row.row_first and states.ndim == 3
        states = states.transpose(0, 1) if is_turned else states
        n_examples = len(next(iter(self.inputs.values())))
        # (cell x example, row, unit), (cell x example x row, unit) or (cell x example x window, row, unit)
        new = states.reshape(self.n_cells, n_examples, -1, states.shape[-1]).clone()
        for cell, edit in edits.items():
            chosen = self.chosen_rows(edit.scope, n_examples, new.shape[2])
            units = torch.tensor(edit.neurons.units)
            for example in range(n_examples):
                rows = chosen[example].nonzero().squeeze(1)
                values = new[cell, example][rows][:, units].numpy()
                replaced = edit.new(values, example, rows.numpy(), new.shape[2])
                new[cell, example, rows[:, None], units] = torch.from_numpy(replaced.astype(np.float32))
        new = new.reshape(states.shape)
        return new.transpose(0, 1) if is_turned else new

    def chosen_rows(self, scope: Scope, n_examples: int, n_rows: int) -> Tensor:
        """Return which rows a scope edits: (example, row); a vector for each example is one row."""
        if scope == "all" or n_rows == 1:
            return torch.ones(n_examples, n_rows, dtype=torch.bool)
        if scope == "non-padding":
            return self.row.real_rows(self.inputs, n_rows)
        return self.row.readout_rows(self.inputs, n_rows)


def hooked_logits(
    module: nn.Module, row: Architecture, inputs: Inputs, cells: Sequence[dict[Spot, HookedEdit]]
) -> np.ndarray:
    """Return the logits (cell, example, label) of whole forward passes, each cell's edits made by plain hooks."""
    parts = []
    for start in range(0, len(cells), CELLS_AT_ONCE):
        some = cells[start : start + CELLS_AT_ONCE]
        names = dict.fromkeys(spot.module for cell in some for spot in cell)
        with ExitStack() as stack, torch.no_grad():
            for name in names:
                edits: dict[tuple[int, str], dict[int, HookedEdit]] = {}
                for position, cell in enumerate(some):
                    for spot, edit in cell.items():
                        if spot.module == name:
                            edits.setdefault((spot.call, spot.side), {})[position] = edit
                hooks, part = Hooks(row, inputs, len(some), edits), module.get_submodule(name)
                stack.callback(part.register_forward_pre_hook(hooks.at_input).remove)
                stack.callback(part.register_forward_hook(hooks.at_output).remove)
            stacked = {name: torch.cat([value] * len(some)) for name, value in inputs.items()}
            logits = logits_of(module(**stacked)).float()
        parts.append(logits.reshape(len(some), -1, logits.shape[-1]).numpy())
    return np.concatenate(parts)


@pytest.fixture(autouse=True)
def no_fast_path():
    """Keep torch's encoder from its fast path, which passes the modules inside a block by."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


# -------------------------------------------------------------------------------------------- the interventions by hand


@dataclass(frozen=True)
class Formula:
    """The new values of a cell's neurons, by the formulas of docs/interventions.md, in float64.

    Of the package are the draws alone: which donor, which noise, which permutation, which rotation.
    """

    kind: Kind
    neurons: Neurons
    scope: Scope
    reference: Activations
    seed: int
    batch: Batch
    classifier: Classifier

    def __call__(self, values: np.ndarray, example: int, rows: np.ndarray, n_rows: int) -> np.ndarray:
        x, kind, layer, units = values.astype(np.float64), self.kind, self.neurons.layer, list(self.neurons.units)
        states = self.reference.values[layer][:, units].astype(np.float64)
        mean, deviation = states.mean(axis=0), states.std(axis=0)
        if self.scope in ("all", "non-padding") or self.reference.reads_several_rows:
            mean, deviation = self.reference.row_mean[layer][units], self.reference.row_deviation[layer][units]
        classes = np.array(self.reference.labels)[self.reference.targets]
        match kind.name:
            case "zero":
                return np.zeros_like(x)
            case "scale":
                return kind.strength * x
            case "sign-flip":
                return -x
            case "mean":
                return np.tile(mean, (len(x), 1))
            case "noise":
                return x + kind.strength * deviation * self.draws(example, n_rows)[rows]
            case "class-mean":
                return np.tile(states[classes == kind.label].mean(axis=0), (len(x), 1))
            case "steer":
                step = states[classes == kind.label].mean(axis=0) - states[classes != kind.label].mean(axis=0)
                return x + kind.strength * step
            case "patch":
                return np.tile(states[int(kind.strength)], (len(x), 1))
            case "clamp":
                low, high = np.quantile(states, [kind.strength, 1 - kind.strength], axis=0)
                return np.minimum(np.maximum(x, low), high)
            case "quantise":
                levels = np.linspace(states.min(axis=0), states.max(axis=0), 2 ** int(kind.strength))  # (level, unit)
                nearest = np.abs(levels[:, None] - x).argmin(axis=0)  # (row, unit)
                return np.take_along_axis(levels, nearest, axis=0)
            case "resample" | "resample-other":
                donor = self.donor(example)
                if kind.name == "resample-other":
                    assert classes[donor] != self.classifier.labels[int(self.batch.labels[example])]
                return np.tile(states[donor], (len(x), 1))
            case "permute":
                order = self.intervention().order()
                assert sorted(order) == list(range(len(units)))
                return x[:, order]
            case "rotate":
                matrix = self.intervention().matrix()
                turned = len(units) // 2 * 2  # of an odd set one direction stays
                trace = turned * math.cos(math.radians(kind.strength)) + len(units) - turned
                np.testing.assert_allclose(matrix @ matrix.T, np.eye(len(units)), atol=1e-12)
                assert math.isclose(np.trace(matrix), trace, abs_tol=1e-9)
                return x @ matrix.T
        raise AssertionError(f"no formula for {kind.name}")

    def intervention(self) -> Any:
        return self.kind.of(self.neurons, self.scope, self.reference, seed=self.seed)

    def donor(self, example: int) -> int:
        """Return which of the reference examples is the donor: all are donors where there are at most 64."""
        assert len(self.reference) <= 64
        place = Place(self.neurons.layer, None, self.batch.keys, self.batch.labels)
        return self.intervention().donors_of(place)[example]

    def draws(self, example: int, n_rows: int) -> np.ndarray:
        """Return the noise of all rows of an example: (row, unit)."""
        layer, component = self.neurons.layer, self.neurons.component
        drawn = noise_for(self.classifier, self.batch, component, layer, n_rows, seed=self.seed)
        return drawn[example][:, list(self.neurons.units)].double().numpy()


def hooked_edits(row: Architecture, cell: Cell, **known: Any) -> dict[Spot, HookedEdit]:
    """Return what a cell edits: its neurons, those of later layers, and with `readout-onward` the same ones there."""
    places = spots(row, cell.neurons.component)
    edited = [cell.neurons, *cell.further]
    scope: Scope = "readout" if cell.scope == "readout-onward" else cell.scope
    if cell.scope == "readout-onward":
        later = range(cell.neurons.layer + 1, len(places))
        edited += [Neurons(layer, cell.neurons.units, cell.neurons.component) for layer in later]
    return {
        places[neurons.layer]: HookedEdit(neurons, scope, Formula(cell.kind, neurons, scope, **known))
        for neurons in edited
    }


def expected_logits(
    row: Architecture,
    classifier: Classifier,
    examples: Examples,
    cells: Sequence[Cell],
    reference: Activations,
    *,
    seed: int = 0,
    alone: bool = False,
) -> np.ndarray:
    """Return the logits (cell, example, label) by plain hooks, in the package's batches or each example `alone`."""
    logits = np.full((len(cells), len(examples), len(LABELS)), np.nan, dtype=np.float32)
    targets = examples.targets(classifier.labels)
    groups = [[i] for i in range(len(examples))] if alone else [range(len(examples))]
    for group in groups:
        inputs = [examples.inputs[i] for i in group]
        for batch in classifier.batches(inputs, targets[list(group)]):
            known = {"reference": reference, "seed": seed, "batch": batch, "classifier": classifier}
            edits = [hooked_edits(row, cell, **known) for cell in cells]
            found = hooked_logits(classifier.module, row, dict(batch.inputs), edits)
            logits[:, np.asarray(group)[batch.index]] = found
    return logits


# ------------------------------------------------------------------------------------------------ inputs made for tests


def examples_of(row: Architecture, n: int, seed: int) -> Examples:
    return Examples(row.inputs(n, seed), tuple(LABELS[i % 3] for i in range(n)), f"{row.name}-{seed}")


def made_up_reference(classifier: Classifier, component: Component, *, n: int = 12, spread: float = 1.0) -> Activations:
    """Return recorded numbers that nobody recorded: they reach the logits through the interventions alone."""
    sites = classifier.sites(component)
    draw, width = np.random.default_rng(COMPONENTS.index(component)), sites[0].width
    numbers = {
        "values": draw.normal(scale=spread, size=(len(sites), n, width)),
        "logits": draw.normal(size=(n, 3)),
        "row_mean": draw.normal(scale=spread, size=(len(sites), width)),
        "row_deviation": draw.uniform(0.5 * spread, 2 * spread, size=(len(sites), width)),
    }
    return Activations(
        **{name: value.astype(np.float32) for name, value in numbers.items()},
        targets=np.arange(n) % 3,
        labels=LABELS,
        source="made up",
        component=component,
        reads_several_rows=classifier.anatomy.readout not in ("first", "last"),
    )


def ranking_of(reference: Activations, seed: int = 0) -> Ranking:
    scores = np.random.default_rng(seed).random((reference.n_layers, 1 + len(LABELS), reference.width))
    return Ranking("made-up", scores, LABELS, reference.source, reference.component)


def cell(neurons: Neurons, scope: Scope, kind: Kind | str = "zero", **rest: Any) -> Cell:
    return Cell(neurons, scope, Kind(kind) if isinstance(kind, str) else kind, "given", "", "top", -1, 0.5, **rest)


def close(found: np.ndarray, expected: np.ndarray, cells: Sequence[Cell], tolerance: float = 1e-5) -> None:
    """Compare relative to the largest logit, and name the cell that is farthest off."""
    assert found.shape == expected.shape
    off = np.abs(found - expected).max(axis=(1, 2)) / (1 + np.abs(expected).max())
    worst = int(np.argmax(off))  # NaN counts as the largest
    assert off[worst] <= tolerance, f"{off[worst]:.1e} at cell {worst} of {(off > tolerance).sum()}: {cells[worst]}"


# -------------------------------------------------------------------------------------------------------- architectures


@pytest.fixture(scope="module", params=UNDERSTOOD, ids=lambda row: row.name)
def known(request) -> tuple[Architecture, Classifier]:
    return request.param, classifier_of(request.param)


def test_half_of_the_units_of_every_site_zeroed_gives_the_logits_of_plain_hooks(known):
    row, classifier = known
    examples = examples_of(row, 4, seed=3)
    for component in COMPONENTS:
        places = spots(row, component)
        assert (component in classifier.anatomy.sites) == bool(places)
        if not places:
            continue
        reference = made_up_reference(classifier, component)
        ranking = ranking_of(reference)
        scopes = ("readout", "readout-onward", "all") if component != "pooler" else ("readout",)
        cells = [cell(ranking.top(0.5, layer=layer), scope) for scope in scopes for layer in range(len(places))]
        swept = sweep(classifier, examples, ranking, reference=reference, cells=cells)
        expected = expected_logits(row, classifier, examples, cells, reference)
        close(swept.logits, expected, cells)
        assert np.abs(expected - swept.clean_logits).max(axis=(1, 2)).min() > 1e-4
