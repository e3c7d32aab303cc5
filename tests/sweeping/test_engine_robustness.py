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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from planted import LABELS, planted_examples, random_classifier, random_examples, token_preprocess
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


class Killed(Exception):
    """Raised where a sweep is to break off."""


def break_off_at(share: float, done: int, total: int) -> None:
    if done >= share * total:
        raise Killed


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.95, 1.0])
def test_a_sweep_that_broke_off_goes_on_where_it_was_and_ends_bitwise_the_same(setting, unbroken, tmp_path, share):
    with pytest.raises(Killed):
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
        with pytest.raises(Killed):
            setting.swept(keep=tmp_path, progress=partial(break_off_at, share))
    np.testing.assert_array_equal(setting.swept(keep=tmp_path).logits, unbroken.logits)


@pytest.mark.parametrize("precision", [None, 0.3])
def test_a_sweep_with_a_precision_or_with_shares_of_the_examples_goes_on_too(tmp_path, precision):
    setting = Setting(n=40)
    shared = [cell(one.neurons, one.scope, one.kind, share=(i, 3, 1)) for i, one in enumerate(setting.cells)]
    options = {"cells": [*setting.cells[::3], *shared[::2]], "precision": precision}
    whole = setting.swept(**options)
    for share in (0.4, 0.6):
        with pytest.raises(Killed):
            setting.swept(keep=tmp_path, progress=partial(break_off_at, share), **options)
    resumed = setting.swept(keep=tmp_path, **options)
    np.testing.assert_array_equal(resumed.logits, whole.logits)
    np.testing.assert_array_equal(resumed.clean_logits, whole.clean_logits)


def test_what_another_plan_model_seed_or_precision_left_is_not_used(setting, unbroken, tmp_path):
    def moved() -> Setting:
        other = Setting()
        with torch.no_grad():
            other.classifier.module.classifier.bias[0] += 1
        return other

    def shuffled() -> Setting:
        other = Setting()
        other.examples = other.examples.take(np.arange(12)[::-1])
        return other

    others = [
        (setting, {"seed": 5}),
        (setting, {"cells": setting.cells[::-1]}),
        (setting, {"engine": "plain"}),
        (setting, {"autocast": "bf16"}),
        (setting, {"precision": 0.9}),
        (moved(), {}),
        (shuffled(), {}),
    ]
    for other, options in others:
        folder = tmp_path / "kept"
        setting.swept(keep=folder)
        fresh = other.swept(**options)
        np.testing.assert_array_equal(other.swept(keep=folder, **options).logits, fresh.logits)
        shutil.rmtree(folder)


def test_a_folder_with_somebodys_files_is_refused_and_left_as_it_was(setting, tmp_path):
    for name, content in {"thesis.txt": "mine", "sweep.json": json.dumps({"mine": 1}), "logits.npy": "mine"}.items():
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        (folder / name).write_text(content)
        with pytest.raises(RunFolderError, match="name another folder"):
            setting.swept(keep=folder)
        assert [path.name for path in folder.iterdir()] == [name]
        assert (folder / name).read_text() == content
    file = tmp_path / "a-file"
    file.write_text("mine")
    with pytest.raises(RunFolderError):
        setting.swept(keep=file)
    assert file.read_text() == "mine"


def test_files_beside_those_of_a_kept_sweep_are_left_alone(setting, unbroken, tmp_path):
    setting.swept(keep=tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    setting.swept(keep=tmp_path, seed=1)  # another sweep, which takes the place of the first
    np.testing.assert_array_equal(setting.swept(keep=tmp_path).logits, unbroken.logits)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def killed_everywhere(folder: str) -> None:
    """Kill a sweep at every file that it changes and at several forward calls, and go on each time.

    Half of the folders are new, half hold a finished sweep of another seed, which must not be taken for this one.
    """
    torch.set_num_threads(1)
    setting, root = Setting(), Path(folder)
    setting.cells = setting.cells[::3]
    first, second = setting.swept(seed=0).logits, setting.swept(seed=1).logits
    setting.swept(keep=root / "first", seed=0)
    for what, points, old in (("call", (1, 200, 400), ""), ("write", range(1, 30), ""), ("write", range(1, 30), "first")):
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
            shutil.copytree(kept, kept.with_suffix(".copy")) if there else None
            try:
                for seed, right, where in ((1, second, kept), (0, first, kept.with_suffix(".copy"))):
                    if not np.array_equal(setting.swept(keep=where, seed=seed).logits, right):
                        print(f"WRONG: seed {seed} after a kill at {what} {n} over {old or 'nothing'}: {there}")
            except Exception as error:
                print(f"WRONG: {error!r} after a kill at {what} {n} over {old or 'nothing'}: {there}")
            if not os.WIFSIGNALED(status):
                break
            print(f"killed at {what} {n}")


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


# ---------------------------------------------------------------------------------------------------- memory running out


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


def test_memory_that_runs_out_once_in_the_middle_of_a_sweep_costs_no_run(setting, unbroken, tmp_path):
    calls: list[int] = []

    def once(_rows: int) -> None:
        calls.append(1)
        if len(calls) in (150, 200, 260):
            raise torch.OutOfMemoryError("fake")

    with before_each_map(setting.classifier.module, once):
        swept = setting.swept(keep=tmp_path)
    assert len(calls) > 260
    np.testing.assert_allclose(swept.logits, unbroken.logits, atol=1e-5)
    np.testing.assert_array_equal(setting.swept(keep=tmp_path).logits, swept.logits)


# --------------------------------------------------------------------------------------------------- memory that is used


def peaks(n_examples: str, n_cells: str, n_cells_more: str, n_examples_more: str) -> None:
    """Print how much the peak memory of the process grew, in KiB, with more cells and then with more examples."""
    torch.set_num_threads(1)
    module = random_classifier("bert").module
    classifier = Classifier.from_module(
        module,
        preprocess=token_preprocess,
        labels=LABELS,
        sample=random_examples(4, seed=98).inputs,
    )
    reference = made_up_reference(classifier)
    scores = np.random.default_rng(1).random((3, 4, 32))
    ranking = Ranking("given", scores, LABELS, "made up")
    draw = np.random.default_rng(2)
    sets = [tuple(map(int, draw.permutation(32)[: draw.integers(1, 32)])) for _ in range(int(n_cells_more))]

    def grown(n: int, cells: int) -> int:
        plan = [cell(Neurons(i % 3, units), "readout") for i, units in enumerate(sets[:cells])]
        sweep(classifier, random_examples(n, seed=1), ranking, reference=reference, cells=plan)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    first = grown(int(n_examples), int(n_cells))
    second = grown(int(n_examples), int(n_cells_more))
    third = grown(int(n_examples_more), int(n_cells))
    print(first, second - first, third - second)


def test_peak_memory_grows_by_the_results_alone(setting):
    said = alone(peaks, 1500, 300, 600, 6000)
    print(said)
