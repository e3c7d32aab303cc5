"""The engine of sweeps gives the logits that plain torch hooks give, wherever and however it takes a shorter way.

Nothing that is expected here comes from the package: the modules are those that tests/architectures.py names, the
hooks, the rows and the formulas of the interventions are written down below once more, and every cell runs the whole
model. Of the package are only the padded inputs, and what is drawn at random where its documentation leaves that open.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
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
            units = torch.tensor(edit.neurons.units, dtype=torch.long)
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

SCOPES: tuple[Scope, ...] = ("readout", "readout-onward", "all")
AT_EVERY_SCOPE = (
    "BERT",
    "ModernBERT, mean pooling",
    "XLNet",
    "OPT",
    "Llama, left padding",
    "T5",
    "nn.TransformerEncoder",
)
"""One of each layout of rows; to save time, scopes take turns from layer to layer in the others."""


@pytest.fixture(scope="module", params=UNDERSTOOD, ids=lambda row: row.name)
def known(request) -> tuple[Architecture, Classifier]:
    return request.param, classifier_of(request.param)


@pytest.mark.parametrize("component", COMPONENTS)
def test_half_of_the_units_zeroed_gives_the_logits_of_plain_hooks(known, component):
    row, classifier = known
    places = spots(row, component)
    assert (component in classifier.anatomy.sites) == bool(places)
    if not places:
        pytest.skip(f"no site {component!r}")
    examples, reference = examples_of(row, 4, seed=3), made_up_reference(classifier, component)
    ranking, turn = ranking_of(reference), UNDERSTOOD.index(row) + COMPONENTS.index(component)
    cells = [
        cell(ranking.top(0.5, layer=layer), scope)
        for layer in range(len(places))
        for position, scope in enumerate(SCOPES)
        if row.name in AT_EVERY_SCOPE or (turn + layer) % len(SCOPES) == position
    ]
    if row.name not in AT_EVERY_SCOPE and component in ("attention", "heads"):
        cells = cells[turn % 2 :: 2]
    swept = sweep(classifier, examples, ranking, reference=reference, cells=cells)
    expected = expected_logits(row, classifier, examples, cells, reference)
    close(swept.logits, expected, cells)
    assert np.abs(expected - swept.clean_logits).max(axis=(1, 2)).min() > 1e-4


# -------------------------------------------------------------------------------------------------------- interventions

KINDS = (
    Kind("zero"),
    Kind("mean"),
    Kind("class-mean", label="b"),
    Kind("resample"),
    Kind("resample-other"),
    Kind("noise", 0.7),
    Kind("scale", -1.5),
    Kind("sign-flip"),
    Kind("clamp", 0.3),
    Kind("quantise", 2.0),
    Kind("steer", 1.3, "c"),
    Kind("patch", 4.0),
    Kind("rotate", 50.0),
    Kind("permute"),
)
SEVERAL = ("BERT", "GPT-2", "Llama, left padding", "ViT")


@pytest.fixture(scope="module", params=SEVERAL)
def one_of_several(request) -> tuple[Architecture, Classifier]:
    return ROWS[request.param], classifier_of(ROWS[request.param])


def test_every_kind_has_a_formula_here():
    own = {name for name, recipe in RECIPES.items() if recipe.make.__module__.startswith("synapse.")}
    assert {kind.name for kind in KINDS} == own


@pytest.mark.parametrize("component", ["residual", "mlp"])
@pytest.mark.parametrize("scope", ["readout", "readout-onward", "all", "non-padding"])
def test_every_kind_of_intervention_gives_the_logits_of_its_formula_in_plain_hooks(one_of_several, component, scope):
    row, classifier = one_of_several
    examples, reference = examples_of(row, 6, seed=5), made_up_reference(classifier, component, spread=2.0)
    width = reference.width
    sets = ((width - 1, 0, 7, 6, 20), (11,), tuple(range(width)))  # a list in an order of its own, one neuron, all
    cells = [
        cell(Neurons(layer, units, component), scope, kind)
        for kind in KINDS
        if kind.fits(scope)
        for layer in (0, 2)
        for units in sets
    ]
    swept = sweep(classifier, examples, ranking_of(reference), reference=reference, cells=cells, seed=4)
    expected = expected_logits(row, classifier, examples, cells, reference, seed=4)
    close(swept.logits, expected, cells)


# ------------------------------------------------------------------------------------------ batches, padding, and order


def batch_sizes(classifier: Classifier, examples: Examples) -> set[int]:
    return {len(batch.index) for batch in classifier.batches(examples.inputs)}


@pytest.mark.parametrize(
    ("name", "component"),
    [
        ("BERT", "residual"),
        ("BERT", "mlp"),
        ("GPT-2", "mlp"),
        ("Llama", "residual"),
        ("Llama, left padding", "residual"),
        ("Llama, left padding", "mlp"),
        ("XLNet", "residual"),
    ],
)
def test_batches_their_padding_and_the_order_of_examples_do_not_change_the_logits(name, component):
    row = ROWS[name]
    classifier, everyone = classifier_of(row), examples_of(row, 34, seed=6)
    reference = made_up_reference(classifier, component)
    ranking = ranking_of(reference)
    cells = [
        cell(ranking.top(0.5, layer=0), "readout"),
        cell(ranking.top(0.5, layer=0), "all", Kind("noise", 1.0)),
        cell(ranking.top(0.3, layer=1), "readout-onward"),
        cell(ranking.top(0.9, layer=2), "readout", Kind("noise", 1.0)),
        cell(ranking.top(0.9, layer=1), "readout", Kind("resample-other")),
    ]
    expected = expected_logits(row, classifier, everyone, cells, reference, alone=True)  # nothing is padded there
    longest = int(row.preprocess.lengths(everyone.inputs).max())
    for size, n in ((1, 3), (3, 7), (32, 34)):
        classifier.max_tokens = size * longest if size > 1 else 1
        order = np.random.default_rng(size).permutation(34)[:n]
        examples = everyone.take(order)
        if size == 1:
            assert batch_sizes(classifier, examples) == {1}
        elif classifier.anatomy.pads:
            assert max(batch_sizes(classifier, examples)) >= size
        swept = sweep(classifier, examples, ranking, reference=reference, cells=cells)
        close(swept.logits, expected[:, order], cells)


# ----------------------------------------------------------------------------------------------------- plans of a kind


def test_cells_of_several_layers_have_their_own_neurons_in_each(one_of_several):
    row, classifier = one_of_several
    examples = examples_of(row, 5, seed=7)
    for component in ("residual", "mlp"):
        reference = made_up_reference(classifier, component)
        ranking = ranking_of(reference)
        chosen = ((3, 1), (0, 9, 4), (30,))
        first, second, third = (Neurons(layer, units, component) for layer, units in enumerate(chosen))
        cells = [
            cell(first, "readout", further=(second,)),
            cell(first, "all", further=(third,)),
            cell(second, "non-padding", Kind("scale", 3.0), further=(third,)),
            cell(first, "all", Kind("noise", 1.0), further=(second, third)),
            cell(first, "readout", Kind("steer", 2.0, "a"), further=(second, third)),
            cell(second, "readout", Kind("patch", 3.0), further=(third,)),
            *cumulative(ranking, "readout", Kind("zero"), 0.5),
            *cumulative(ranking, "all", Kind("mean"), 0.25, label="b"),
            *cumulative(ranking, "readout", Kind("resample"), 0.25),
        ]
        swept = sweep(classifier, examples, ranking, reference=reference, cells=cells, seed=2)
        close(swept.logits, expected_logits(row, classifier, examples, cells, reference, seed=2), cells)


def test_cumulative_cells_take_the_top_of_each_layers_own_ranking(one_of_several):
    row, classifier = one_of_several
    examples, reference = examples_of(row, 3, seed=8), made_up_reference(classifier, "residual")
    ranking = ranking_of(reference)
    best = [np.argsort(-ranking.scores[layer, 1 + LABELS.index("b")], kind="stable")[:8] for layer in range(3)]
    neurons = [Neurons(layer, tuple(map(int, units))) for layer, units in enumerate(best)]
    by_hand = [cell(neurons[layer], "all", further=tuple(neurons[layer + 1 :])) for layer in range(3)]
    cells = cumulative(ranking, "all", Kind("zero"), 0.25, label="b")
    swept = sweep(classifier, examples, ranking, reference=reference, cells=cells)
    close(swept.logits, expected_logits(row, classifier, examples, by_hand, reference), by_hand)


def test_equal_cells_share_their_logits_and_unlike_ones_in_one_plan_do_not_mix(one_of_several):
    row, classifier = one_of_several
    examples, reference = examples_of(row, 7, seed=9), made_up_reference(classifier, "residual")
    ranking = ranking_of(reference)
    of_a_class = {label: ranking.top(0.5, layer=1, label=label) for label in ("", *LABELS)}
    cells = [
        *(cell(neurons, scope) for neurons in of_a_class.values() for scope in ("readout", "all")),
        cell(Neurons(1, of_a_class["a"].units[::-1]), "readout"),  # the same set in another order
        cell(Neurons(1, ()), "all"),  # nothing is edited
        cell(Neurons(1, (4, 2)), "readout", Kind("permute")),
        cell(Neurons(1, (2, 4)), "readout", Kind("permute")),
        cell(ranking.bottom(3, layer=0), "all", share=(0, 3, 1)),
        cell(ranking.bottom(3, layer=0), "all", share=(1, 3, 2)),
        cell(ranking.bottom(3, layer=2), "readout-onward", share=(2, 3, 1)),
    ]
    swept = sweep(classifier, examples, ranking, reference=reference, cells=cells)
    expected = expected_logits(row, classifier, examples, cells, reference)
    for position, (turn, per_example) in zip((-3, -2, -1), ((0, 1), (1, 2), (2, 1)), strict=True):
        ran = (np.arange(7) + turn) % 3 < per_example
        assert np.isnan(swept.logits[position][~ran]).all()
        expected[position][~ran] = 0
    close(np.nan_to_num(swept.logits), expected, cells)
    same = [cells.index(one) for one in cells if set(one.neurons.units) == set(of_a_class["a"].units)]
    np.testing.assert_array_equal(swept.logits[same[0]], swept.logits[same[-1]])
    np.testing.assert_allclose(swept.logits[9], swept.clean_logits, atol=1e-5 * (1 + np.abs(expected).max()))


def test_the_clean_logits_are_those_of_the_module_alone(one_of_several):
    row, classifier = one_of_several
    examples, reference = examples_of(row, 7, seed=9), made_up_reference(classifier, "residual")
    cells = [cell(Neurons(1, (1,)), "readout")]
    swept = sweep(classifier, examples, ranking_of(reference), reference=reference, cells=cells)
    with torch.no_grad():
        alone = [logits_of(classifier.module(**row.preprocess([one]))) for one in examples.inputs]
    expected = torch.cat(alone).numpy()
    np.testing.assert_allclose(swept.clean_logits, expected, atol=1e-5 * (1 + np.abs(expected).max()))
    np.testing.assert_array_equal(swept.targets, np.arange(7) % 3)
