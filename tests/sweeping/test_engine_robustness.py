"""A sweep that is killed, that runs out of memory, that is stopped early, that fails, or that runs in half precision.

What is expected comes from an unbroken sweep, whose logits test_engine_equality.py holds against plain hooks, and from
counters and hooks of the tests' own inside the module.
"""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from planted import LABELS, random_classifier, random_examples, random_module, random_texts, token_preprocess
from torch import Tensor, nn

from synapse.data.examples import Examples
from synapse.errors import ModelError, ResourceError, RunFolderError, SettingsError
from synapse.measure import sweep_table
from synapse.model.classifier import Classifier
from synapse.ranking.base import Ranking
from synapse.sweeping import Cell, Kind, sweep
from synapse.types import Activations, Component, Neurons, Sweep

ZERO = Kind("zero")


def cell(neurons: Neurons, scope: str, kind: Kind = ZERO, **rest: Any) -> Cell:
    return Cell(neurons, scope, kind, "given", "", "top", -1, 0.5, **rest)


def made_up_reference(classifier: Classifier, component: Component = "residual") -> Activations:
    sites, draw = classifier.sites(component), np.random.default_rng(0)
    return Activations(
        values=draw.normal(size=(len(sites), 6, sites[0].width)).astype(np.float32),
        logits=np.zeros((6, len(classifier.labels)), dtype=np.float32),
        targets=np.arange(6) % len(classifier.labels),
        labels=classifier.labels,
        source="made up",
        row_mean=np.zeros((len(sites), sites[0].width), dtype=np.float32),
        row_deviation=np.ones((len(sites), sites[0].width), dtype=np.float32),
        component=component,
    )


class Setting:
    """A classifier, examples and a plan, so that a test says only what is special in it."""

    def __init__(self, architecture: str = "bert", *, n: int = 12, component: Component = "residual") -> None:
        self.classifier = random_classifier(architecture)
        self.classifier.max_tokens = 40  # several batches
        self.examples = random_examples(n, seed=3)
        self.reference = made_up_reference(self.classifier, component)
        scores = np.random.default_rng(1).random((self.reference.n_layers, 4, self.reference.width))
        self.ranking = Ranking("given", scores, LABELS, "made up", component)
        self.cells = [
            cell(self.ranking.top(k, layer=layer), scope, kind)
            for layer, scope, kind in ((0, "all", Kind("noise", 1.0)), (1, "readout", ZERO), (2, "readout", ZERO))
            for k in (1, 2, 4, 9, 15, 20)
        ]

    def swept(self, **options: Any) -> Sweep:
        given = {"reference": self.reference, "cells": self.cells} | options
        return sweep(self.classifier, self.examples, self.ranking, **given)


@pytest.fixture(scope="module")
def setting() -> Setting:
    return Setting()


@pytest.fixture(scope="module")
def unbroken(setting) -> Sweep:
    return setting.swept()


def linear_maps(module: nn.Module) -> list[nn.Module]:
    """Return the linear maps of a model, those of the library's own transposed class too."""
    return [part for part in module.modules() if type(part).__name__ in ("Linear", "Conv1D")]


@contextmanager
def before_each_map(module: nn.Module, act: Callable[[int], None]) -> Iterator[None]:
    """Call `act` with the number of rows before each linear map of the module runs."""
    handles = [part.register_forward_pre_hook(partial(_act, act)) for part in linear_maps(module)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _act(act: Callable[[int], None], _module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
    act(arguments[0].numel() // arguments[0].shape[-1])


def rows_run(setting: Setting, **options: Any) -> int:
    """Return how many rows went through linear maps in a sweep."""
    rows: list[int] = []
    with before_each_map(setting.classifier.module, rows.append):
        setting.swept(**options)
    return sum(rows)


def state_of(module: nn.Module) -> dict[str, Any]:
    """Return everything of a module, and of what it shares with others, that a sweep might leave changed."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    parts = dict(module.named_modules())
    return {
        "names": list(parts),
        "classes": [type(part) for part in parts.values()],
        "weights": {name: value.numpy().tobytes() for name, value in module.state_dict().items()},
        "gradients": [parameter.requires_grad for parameter in module.parameters()],
        "types": [parameter.dtype for parameter in module.parameters()],
        "training": [part.training for part in parts.values()],
        "hooks": [(len(part._forward_hooks), len(part._forward_pre_hooks)) for part in parts.values()],
        "forwards": [name for name, part in parts.items() if "forward" in part.__dict__],
        "attributes": [sorted(part.__dict__) for part in parts.values()],
        "attention": module.config._attn_implementation if hasattr(module, "config") else None,
        "attentions": sorted(ALL_ATTENTION_FUNCTIONS.keys()),
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "threads": torch.get_num_threads(),
    }


# -------------------------------------------------------------------------------------------------- killed, and resumed


class KilledError(Exception):
    """Raised where a sweep is to break off."""


def break_off_at(share: float, done: int, total: int) -> None:
    if done >= share * total:
        raise KilledError


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.95, 1.0])
def test_a_sweep_that_broke_off_goes_on_where_it_was_and_ends_bitwise_the_same(setting, unbroken, tmp_path, share):
    with pytest.raises(KilledError):
        setting.swept(keep=tmp_path / "kept", progress=partial(break_off_at, share))
    rows: list[int] = []
    with before_each_map(setting.classifier.module, rows.append):
        resumed = setting.swept(keep=tmp_path / "kept")
    np.testing.assert_array_equal(resumed.logits, unbroken.logits)
    np.testing.assert_array_equal(resumed.clean_logits, unbroken.clean_logits)
    assert resumed.reuse == unbroken.reuse
    # What a sweep always runs are its proofs; a call of a place that was under way may have to be made again.
    everything, proofs = rows_run(setting), rows_run(setting, keep=tmp_path / "kept")
    assert proofs < 0.5 * everything
    assert sum(rows) - proofs <= (1.1 - share) * (everything - proofs)


def test_a_sweep_that_breaks_off_again_and_again_gets_to_its_end(setting, unbroken, tmp_path):
    for share in (0.05, 0.2, 0.2, 0.7):
        with pytest.raises(KilledError):
            setting.swept(keep=tmp_path, progress=partial(break_off_at, share))
    np.testing.assert_array_equal(setting.swept(keep=tmp_path).logits, unbroken.logits)


@pytest.mark.parametrize("precision", [None, 0.3])
def test_a_sweep_with_a_precision_or_with_shares_of_the_examples_goes_on_too(tmp_path, precision):
    setting = Setting(n=40)
    shared = [cell(one.neurons, one.scope, one.kind, share=(i, 3, 1)) for i, one in enumerate(setting.cells)]
    options = {"cells": [*setting.cells[::3], *shared[::2]], "precision": precision}
    whole = setting.swept(**options)
    for share in (0.4, 0.6):
        with pytest.raises(KilledError):
            setting.swept(keep=tmp_path, progress=partial(break_off_at, share), **options)
    resumed = setting.swept(keep=tmp_path, **options)
    np.testing.assert_array_equal(resumed.logits, whole.logits)
    np.testing.assert_array_equal(resumed.clean_logits, whole.clean_logits)


def test_what_another_plan_model_seed_or_precision_left_is_not_used(tmp_path):
    def smaller() -> Setting:
        other = Setting()
        other.cells = other.cells[::6]
        return other

    def moved() -> Setting:
        other = smaller()
        with torch.no_grad():
            other.classifier.module.classifier.bias[0] += 1
        return other

    def shuffled() -> Setting:
        other = smaller()
        other.examples = other.examples.take(np.arange(12)[::-1])
        return other

    setting = smaller()
    others = [
        (setting, {"seed": 5}),
        (setting, {"cells": setting.cells[::-1]}),
        (setting, {"autocast": "bf16"}),
        (setting, {"precision": 0.9}),
        (moved(), {}),
        (shuffled(), {}),
    ]
    setting.swept(keep=tmp_path / "first")
    for number, (other, options) in enumerate(others):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "first", folder)
        fresh = other.swept(**options)
        np.testing.assert_array_equal(other.swept(keep=folder, **options).logits, fresh.logits)


def test_somebodys_files_in_the_folder_are_left_as_they_were(setting, unbroken, tmp_path):
    files = {"thesis.txt": "mine", "sweep.json": json.dumps({"mine": 1}), "logits.npy": "mine"}
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    for seed in (0, 1):
        setting.swept(keep=tmp_path, seed=seed)
    np.testing.assert_array_equal(setting.swept(keep=tmp_path).logits, unbroken.logits)
    assert {name: (tmp_path / name).read_text() for name in files} == files


def test_a_file_in_the_place_of_the_folder_is_refused_and_left_as_it_was(setting, tmp_path):
    file = tmp_path / "a-file"
    file.write_text("mine")
    with pytest.raises(RunFolderError, match="a-file"):
        setting.swept(keep=file)
    assert file.read_text() == "mine"


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()  # before the process is forked


def killed_everywhere(folder: str) -> None:
    """Kill a sweep at every file that it changes and at several forward calls, and go on each time.

    Half of the folders are new, half hold a finished sweep of another seed, which must not be taken for this one.
    """
    torch.set_num_threads(1)
    setting, root = Setting(), Path(folder)
    setting.cells = setting.cells[::3]
    first, second = setting.swept(seed=0).logits, setting.swept(seed=1).logits
    setting.swept(keep=root / "first", seed=0)
    every = range(1, 40)
    for what, points, old in (("call", (1, 100, 200), ""), ("write", every, ""), ("write", every, "first")):
        for n in points:
            kept = root / f"{what}-{n}-{old}"
            if old:
                shutil.copytree(root / old, kept)
            child = os.fork()
            if child == 0:
                die_at(what, n, kept, setting)
                setting.swept(keep=kept, seed=1)
                os._exit(0)
            _, status = os.waitpid(child, 0)
            there = sorted(path.name for path in kept.iterdir()) if kept.exists() else []
            tries = [(1, second, kept)]
            if old:
                tries.append((0, first, kept.with_suffix(".copy")))
                if there:
                    shutil.copytree(kept, kept.with_suffix(".copy"))
            try:
                for seed, right, where in tries:
                    if not np.array_equal(setting.swept(keep=where, seed=seed).logits, right):
                        say(f"WRONG: seed {seed} after a kill at {what} {n} over {old or 'nothing'}: {there}")
            except Exception as error:
                say(f"WRONG: {error!r} after a kill at {what} {n} over {old or 'nothing'}: {there}")
            if not os.WIFSIGNALED(status):
                break
            say(f"killed at {what} {n}")


def die_at(what: str, n: int, kept: Path, setting: Setting) -> None:
    """Send SIGKILL to this process at the n-th change of a file in the folder, or at the n-th call of a linear map."""
    seen = []

    def count(*_: Any) -> None:
        seen.append(None)
        if len(seen) >= n:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        moves = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "os.truncate")
        if (writes or moves) and str(arguments[0]).startswith(str(kept)):
            count()

    if what == "write":
        sys.addaudithook(audit)
    else:
        for part in linear_maps(setting.classifier.module):
            part.register_forward_pre_hook(count)


def alone(function: Callable[..., Any], *arguments: Any) -> str:
    """Return what a function of this file prints in a process of its own."""
    call = f"import {Path(__file__).stem} as here; here.{function.__name__}(*{[str(a) for a in arguments]!r})"
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([sys.executable, "-c", call], env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the test forks")
def test_a_process_that_is_killed_anywhere_leaves_a_folder_in_which_the_next_one_goes_on(tmp_path):
    said = alone(killed_everywhere, tmp_path).splitlines()
    assert sum(line.startswith("killed at") for line in said) >= 8
    assert not [line for line in said if line.startswith("WRONG")]


# --------------------------------------------------------------------------------------------------- memory running out


def refuse_above(most: int, error: type[Exception], rows: int) -> None:
    if rows > most:
        raise error("fake")


ERRORS = {"torch": torch.OutOfMemoryError, "python": MemoryError}


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
@pytest.mark.parametrize("engine", ["auto", "plain"])
def test_where_memory_runs_out_passes_get_smaller_and_the_logits_stay(setting, unbroken, caplog, error, engine):
    rows: list[int] = []
    before = state_of(setting.classifier.module)
    with before_each_map(setting.classifier.module, rows.append):
        setting.swept(engine=engine)
    for most in (max(rows) // 2, 40, 15):  # an example has up to 12 rows
        with before_each_map(setting.classifier.module, partial(refuse_above, most, error)):
            swept = setting.swept(engine=engine)
        np.testing.assert_allclose(swept.logits, unbroken.logits, atol=1e-5)
        if engine == "auto":
            assert swept.reuse == unbroken.reuse
    assert "Memory ran out" in caplog.text
    assert state_of(setting.classifier.module) == before


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
@pytest.mark.parametrize("engine", ["auto", "exact", "plain"])
def test_where_not_even_one_run_fits_a_clear_sentence_says_so(setting, error, engine):
    before = state_of(setting.classifier.module)
    handles = before_each_map(setting.classifier.module, partial(refuse_above, 5, error))
    with handles, pytest.raises(ResourceError) as raised:
        setting.swept(engine=engine)
    assert str(raised.value).startswith("Memory")
    assert str(raised.value).count(". ") == 0
    assert state_of(setting.classifier.module) == before


def test_memory_that_runs_out_now_and_then_costs_no_run(setting, unbroken, tmp_path):
    calls: list[int] = []
    with before_each_map(setting.classifier.module, calls.append):
        setting.swept()
    n = len(calls)

    def now_and_then(_rows: int) -> None:
        calls.append(1)
        if len(calls) in (n // 8, n // 2, n - 20):
            raise torch.OutOfMemoryError("fake")

    for options in ({}, {"keep": tmp_path}):
        calls.clear()
        with before_each_map(setting.classifier.module, now_and_then):
            swept = setting.swept(**options)
        assert len(calls) > n
        np.testing.assert_allclose(swept.logits, unbroken.logits, atol=1e-5)
    np.testing.assert_array_equal(setting.swept(keep=tmp_path).logits, swept.logits)


# -------------------------------------------------------------------------------------------------- memory that is used


def sets_of_units(n: int, width: int) -> list[tuple[int, ...]]:
    """Return that many different sets, so that each cell is a run of its own."""
    draw = np.random.default_rng(2)
    sets = [tuple(map(int, draw.permutation(width)[: draw.integers(width // 3, width // 2)])) for _ in range(n)]
    assert len({frozenset(units) for units in sets}) == n
    return sets


def traced_peaks(_folder: str) -> None:
    """Print the peak of numpy's arrays and Python's objects: with few, twice the cells, four times the examples, and
    where two of the cells are equal."""
    torch.set_num_threads(1)
    setting, sets = Setting(), sets_of_units(200, 32)
    setting.classifier.max_tokens = 2000
    plans = [(10, sets[:10]), (300, sets[:100]), (300, sets), (1200, sets[:100]), (1200, [*sets[:99], sets[0]])]
    for n_examples, units in plans:
        setting.examples = random_examples(n_examples, seed=1)
        cells = [cell(Neurons(2, some), "readout") for some in units]
        tracemalloc.start()
        setting.swept(cells=cells)
        sys.stdout.write(f"{tracemalloc.get_traced_memory()[1]} ")
        tracemalloc.stop()


@pytest.fixture(scope="module")
def traced(tmp_path_factory) -> list[int]:
    return list(map(int, alone(traced_peaks, tmp_path_factory.mktemp("traced")).split()))


def test_what_a_sweep_keeps_is_its_results_and_little_else(traced):
    """The docstring of `sweep` states 4 bytes a cell, example and label; a second copy would double that."""
    _, few, more_cells, more_examples, _ = traced
    results = 300 * 100 * 3 * 4
    assert more_cells - few < 1.3 * results + 100 * 12_000  # the plan itself is some KB a cell
    assert more_examples - few < 3 * 1.3 * results + 250_000  # and the texts


def test_equal_cells_do_not_double_the_results(traced):
    results = 1200 * 100 * 3 * 4  # 1.4 MB
    assert traced[4] - traced[3] < 0.3 * results


def peaks(_folder: str) -> None:
    """Print by how many MiB the peak of this process grew with 4 times the cells, then with 32 times the examples."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 256}
    config = transformers.BertConfig(vocab_size=100, num_labels=3, pad_token_id=0, **sizes)
    classifier = Classifier.from_module(
        transformers.BertForSequenceClassification(config).eval(),
        preprocess=token_preprocess,
        labels=LABELS,
        sample=random_examples(4, seed=98).inputs,
    )
    classifier.max_tokens = 1024
    reference = made_up_reference(classifier)
    ranking = Ranking("given", np.random.default_rng(1).random((3, 4, 128)), LABELS, "made up")
    sets = sets_of_units(1600, 128)

    def peak(n_examples: int, n_cells: int) -> int:
        texts = random_texts(n_examples, seed=1, shortest=30, longest=32)
        examples = Examples(texts, tuple(LABELS[i % 3] for i in range(n_examples)), "long")
        cells = [cell(Neurons(1 + i % 2, units), "readout") for i, units in enumerate(sets[:n_cells])]
        sweep(classifier, examples, ranking, reference=reference, cells=cells)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

    few = peak(64, 400)
    more_cells = peak(64, 1600)
    more_examples = peak(2048, 10)
    sys.stdout.write(f"{more_cells - few} {more_examples - more_cells}")


def test_peak_memory_does_not_grow_with_the_number_of_cells_or_examples(tmp_path):
    """The rows of one block under all runs would take 38 MiB, the states of one block for all examples 32."""
    with_cells, with_examples = map(int, alone(peaks, tmp_path).split())
    assert with_cells < 25
    assert with_examples < 20


# -------------------------------------------------------------------------------------------------------- early answers


@pytest.fixture(scope="module")
def long() -> tuple[Setting, Sweep]:
    setting = Setting(n=500)
    setting.classifier.max_tokens = 500
    everything = Neurons(1, tuple(range(32)))
    setting.cells = [
        *(cell(setting.ranking.top(k, layer=layer), "all") for layer in (1, 2) for k in (1, 2, 4, 9, 15, 20, 26, 30)),
        cell(everything, "all", Kind("scale", 1.0)),  # changes nothing
        cell(everything, "all", Kind("scale", -1.0), share=(1, 5, 2)),
    ]
    return setting, setting.swept()


def losses(swept: Sweep) -> np.ndarray:
    """Return 1 where an answer was lost, -1 where one was won, 0 else, NaN where nothing ran: (cell, example)."""
    right = (swept.logits.argmax(axis=2) == swept.targets).astype(float)
    right[np.isnan(swept.logits[:, :, 0])] = np.nan
    return (swept.clean_logits.argmax(axis=1) == swept.targets) - right


def test_with_a_precision_cells_stop_early_and_say_how_many_examples_they_used(long):
    setting, full = long
    swept = setting.swept(precision=0.05)
    ran, might = ~np.isnan(swept.logits[:, :, 0]), ~np.isnan(full.logits[:, :, 0])
    assert (np.isnan(swept.logits).all(axis=2) == ~ran).all()
    assert (ran <= might).all()
    np.testing.assert_allclose(swept.logits[ran], full.logits[ran], atol=1e-5)
    np.testing.assert_array_equal(swept.clean_logits, full.clean_logits)
    np.testing.assert_array_equal(sweep_table(swept)["n"], ran.sum(axis=1))
    assert ran.sum() < 0.9 * might.sum()
    # log(40) / (3/4 * 0.05) = 98 examples of 500 without an end, 82 with one, where no example changes
    assert 82 <= ran[16].sum() == ran.sum(axis=1)[:17].min() <= 150
    off = np.abs(np.nanmean(losses(swept), axis=1) - np.nanmean(losses(full), axis=1))
    assert np.mean(off <= 0.05) >= 0.9
    assert off.max() <= 0.1  # both lie in an interval of that width, but for one cell in twenty


def test_the_order_of_the_file_does_not_bias_a_cell_that_stops_early(long):
    setting, full = long
    worst = int(np.nanmean(np.abs(losses(full)), axis=1).argmax())
    other = Setting(n=1)
    other.classifier, other.cells = setting.classifier, [setting.cells[worst]]
    order = np.argsort(losses(full)[worst], kind="stable")  # all gains first, all losses last
    other.examples = setting.examples.take(order)
    for seed in (0, 1):
        swept = other.swept(precision=0.08, seed=seed)
        ran = ~np.isnan(swept.logits[0, :, 0])
        assert 50 < ran.sum() < 450
        assert abs(np.nanmean(losses(swept)) - np.nanmean(losses(full)[worst])) <= 0.08
        assert abs(np.flatnonzero(ran).mean() - 250) < 40  # from all over the file


def test_which_examples_are_spared_depends_on_the_seed_alone(long):
    setting, _ = long
    ran = [~np.isnan(setting.swept(precision=0.1, seed=seed).logits) for seed in (0, 0, 3)]
    np.testing.assert_array_equal(ran[0], ran[1])
    assert (ran[0] != ran[2]).any()


def test_a_precision_that_cannot_be_reached_runs_everything(long):
    setting, full = long
    np.testing.assert_array_equal(setting.swept(precision=1e-4).logits, full.logits)


# --------------------------------------------------------------------------------------- reduced precision, and refusal


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_in_half_precision_the_sweep_says_how_well_it_agrees_and_the_model_stays(architecture):
    setting = Setting(architecture, n=40)
    before, full = state_of(setting.classifier.module), setting.swept()
    swept = setting.swept(autocast="bf16")
    assert full.agreement is None
    assert (swept.agreement.precision, swept.agreement.same <= 1) == ("bf16", True)
    assert swept.agreement.runs >= 6
    assert swept.agreement.same > 0.9
    difference = np.abs(swept.logits - full.logits).max()
    assert 0 < difference < 0.05 * (1 + np.abs(full.logits).max())  # bf16 has 8 bits
    assert 0 < swept.agreement.largest <= 1.001 * difference  # it is that of some of these runs
    assert np.mean(swept.logits.argmax(axis=2) == full.logits.argmax(axis=2)) > 0.95
    assert swept.logits.dtype == np.float32
    assert state_of(setting.classifier.module) == before


class Tallied(nn.Module):
    """A block that counts its calls in a pass over the model, and, where it `is_odd`, answers by that count."""

    def __init__(self, block: nn.Module, tally: list[int], *, is_first: bool) -> None:
        super().__init__()
        self.block, self.tally, self.is_first, self.is_odd = block, tally, is_first, False

    def forward(self, hidden: Tensor, *arguments: Any, **options: Any) -> Any:
        if self.is_first:
            self.tally.clear()
        self.tally.append(1)
        output = self.block(hidden, *arguments, **options)
        factor = 1 + 0.1 * len(self.tally) * self.is_odd
        return (output[0] * factor, *output[1:]) if isinstance(output, tuple) else output * factor


def test_where_nothing_can_be_reused_the_whole_model_runs_and_the_exact_engine_refuses():
    module, tally = random_module("bert"), []
    layers = module.bert.encoder.layer
    for position, block in enumerate(list(layers)):
        layers[position] = Tallied(block, tally, is_first=position == 0)
    setting = Setting()
    setting.classifier = Classifier.from_module(
        module, preprocess=token_preprocess, labels=LABELS, sample=random_examples(4, seed=98).inputs
    )
    for block in layers:
        block.is_odd = True  # after loading, which would have refused it
    before = state_of(module)
    swept = setting.swept()
    places = {place for place in swept.reuse if "layer 2" not in place}
    assert {place for place, reuse in swept.reuse.items() if reuse in ("none", "plain")} >= places
    assert set(swept.run_plain) >= places
    for one, logits in zip(setting.cells, swept.logits, strict=True):
        if one.kind == ZERO:
            handle = layers[one.neurons.layer].register_forward_hook(partial(zeroed_first_row, one.neurons.units))
            expected = [module(**token_preprocess([text])).logits.detach() for text in setting.examples.inputs]
            handle.remove()
            np.testing.assert_allclose(logits, torch.cat(expected), atol=3e-5)
    with pytest.raises(ModelError, match="exact"):
        setting.swept(engine="exact")
    assert state_of(module) == before


def zeroed_first_row(units: Sequence[int], _module: nn.Module, _arguments: Any, output: Any) -> Any:
    states = (output[0] if isinstance(output, tuple) else output).clone()
    states[:, 0, list(units)] = 0
    return (states, *output[1:]) if isinstance(output, tuple) else states


# --------------------------------------------------------------------------------------------------------------- errors


class BrokenError(Exception):
    """Of nobody's making but this file's."""


@pytest.mark.parametrize("options", [{}, {"engine": "plain"}, {"autocast": "bf16"}], ids=["auto", "plain", "bf16"])
@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_the_model_comes_back_after_an_error_at_any_call(architecture, options):
    setting = Setting(architecture)
    setting.cells = setting.cells[::5]
    module, calls = setting.classifier.module, []
    before = state_of(module)
    with before_each_map(module, calls.append):
        whole = setting.swept(**options)
    n, failed = len(calls), 0
    assert n > 100
    for error, k in [(BrokenError, k) for k in range(0, n, n // 7)] + [
        (RuntimeError, k) for k in (1, n // 3, n // 2, n - 1)
    ]:
        with before_each_map(module, CallCounter(k, error)):
            try:
                swept = setting.swept(**options)
            except (BrokenError, RuntimeError):
                failed += 1
            else:  # what fails while it is proved may be done without
                np.testing.assert_allclose(swept.logits, whole.logits, atol=2e-2 if "autocast" in options else 1e-5)
        assert state_of(module) == before
    assert failed >= 4
    np.testing.assert_array_equal(setting.swept(**options).logits, whole.logits)
    with pytest.raises(SettingsError, match="called directly"):  # no batch is left behind
        _ = setting.classifier.current_batch


class CallCounter:
    """Raises at one call."""

    def __init__(self, at: int, error: type[Exception]) -> None:
        self.left, self.error = at, error

    def __call__(self, _rows: int) -> None:
        self.left -= 1
        if self.left == -1:
            raise self.error("broken on purpose")


def test_an_interrupted_sweep_leaves_the_model_as_it_was(setting):
    before = state_of(setting.classifier.module)
    for k in (3, 90, 200):
        with (
            before_each_map(setting.classifier.module, CallCounter(k, KeyboardInterrupt)),
            pytest.raises(KeyboardInterrupt),
        ):
            setting.swept()
        assert state_of(setting.classifier.module) == before
