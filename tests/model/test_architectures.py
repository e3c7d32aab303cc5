"""Every architecture of the table is understood, and each finding holds against plain hooks on the table's own
names."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import transformers
from architecture_page import PAGE, classifier_of, line, refused_line, reuse_of
from architectures import N_LABELS, TABLE, Architecture, logits_of
from torch import Tensor, nn

from synapse.data.examples import Examples
from synapse.errors import AnatomyError
from synapse.model.classifier import Batch, Classifier
from synapse.model.hooks import study_mode
from synapse.model.resume import clean_pass, resume
from synapse.perturb.activations import Scale, Zero
from synapse.ranking.base import Ranking
from synapse.recording import record
from synapse.sweeping import Grid, Kind, plan, sweep
from synapse.types import Neurons

LABELS = tuple("abc")[:N_LABELS]
LINES = PAGE.read_text(encoding="utf-8").splitlines() if PAGE.is_file() else []
UNDERSTOOD = [row for row in TABLE if row.refused is None]


@dataclass(frozen=True)
class Case:
    row: Architecture
    module: nn.Module
    classifier: Classifier
    batch: Batch


@pytest.fixture(scope="module", params=UNDERSTOOD, ids=lambda row: row.name)
def case(request) -> Case:
    classifier = classifier_of(request.param)
    batch = max(classifier.batches(request.param.inputs(12, 1)), key=lambda batch: len(batch.index))
    return Case(request.param, classifier.module, classifier, batch)


def run(case: Case) -> Tensor:
    """Return the module's own logits, as a user would get them, with torch's encoder kept from skipping hooks."""
    with torch.no_grad(), study_mode(case.module):
        return logits_of(case.module(**case.batch.inputs))


def change(values: Tensor) -> Tensor:
    return values.roll(1, dims=-1) * 1.5 - 0.2


@contextmanager
def changed(module: nn.Module, call: int, side: str) -> Iterator[None]:
    """Change the output, or the input, of one call of a module: a hook of the test's own."""
    calls = []

    def is_it() -> bool:
        calls.append(None)
        return len(calls) - 1 == call

    def at_output(_module, _inputs, output):
        if not is_it():
            return None
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    def at_input(_module, inputs):
        return (change(inputs[0]), *inputs[1:]) if is_it() else None

    hook = module.register_forward_hook(at_output) if side == "output" else module.register_forward_pre_hook(at_input)
    yield
    hook.remove()


def hook_count(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(found, expected, atol=tolerance * (1 + float(expected.abs().max())), rtol=0)


def test_blocks_sites_readout_and_final_map_are_those_that_a_reader_of_the_source_names(case):
    anatomy, row = case.classifier.anatomy, case.row
    found = {name: tuple(site.module for site in sites) for name, sites in anatomy.sites.items()}
    assert anatomy.blocks == row.block_names
    assert len(anatomy.blocks) == row.n_blocks
    assert (anatomy.width, anatomy.readout, anatomy.final) == (row.width, row.readout, row.final)
    assert found.get("mlp") == row.mlp
    assert found.get("attention") == row.attention
    assert found.get("heads") == (row.attention if row.n_heads else None)
    assert anatomy.n_heads == (row.n_heads if row.attention else None)
    assert ("pooler" in found) == (row.final is not None)
    assert set(anatomy.missing) == {"mlp", "attention", "heads", "pooler"} - set(found)
    if row.mlp:
        assert {site.width for site in anatomy.sites["mlp"]} == {row.mlp_width}
    if row.padding_changes_answers:
        assert not anatomy.pads


# What is refused, and which rows the library pads, changed with its fifth version, for which the page is made.
needs_version_of_page = pytest.mark.skipif(
    int(transformers.__version__.split(".")[0]) < 5, reason="the page of architectures is made with transformers 5"
)


@needs_version_of_page
def test_the_page_of_architectures_says_what_was_found(case):
    assert line(case.row, case.classifier) in LINES, "run `make architectures`"


def test_which_rows_are_read_is_what_the_table_says_for_every_example(case):
    states = clean_pass(case.classifier, case.batch).states[-1]
    weights = case.classifier.readout_weights(case.batch, case.classifier.sites()[-1], states.shape[1])
    expected = case.row.readout_rows(case.batch.inputs, states.shape[1])
    if case.classifier.anatomy.rows.mask is None:  # then a batch holds no padding
        expected = torch.ones_like(expected) if case.row.readout == "mean" else expected
    assert torch.equal(weights > 0, expected)
    np.testing.assert_allclose(weights.sum(dim=1), 1, atol=1e-6)


def test_recorded_states_are_bitwise_those_that_the_library_gives(case):
    if case.row.hidden_states is None:
        pytest.skip("the library gives no state for each block")
    with study_mode(case.module):
        own = case.row.hidden_states(case.module, dict(case.batch.inputs))[: case.row.n_comparable]
    states = clean_pass(case.classifier, case.batch).states
    assert own
    for recorded, expected in zip(states, own, strict=False):
        expected = expected.transpose(0, 1) if case.row.row_first and expected.shape != recorded.shape else expected
        assert torch.equal(recorded[:, : expected.shape[1]], expected)


def test_logits_are_bitwise_the_modules_own_and_stay_so_under_an_edit_that_changes_nothing(case):
    clean = run(case)
    assert torch.equal(case.classifier.forward(case.batch), clean)
    for component, sites in case.classifier.anatomy.sites.items():
        for layer, site in enumerate(sites):
            everything = Neurons(layer, tuple(range(site.width)), component)
            with case.classifier.edited(Scale(everything, scope="all", factor=1.0)):
                assert torch.equal(case.classifier.forward(case.batch), clean)


@pytest.mark.parametrize("component", ["residual", "mlp", "attention"])
def test_an_edit_of_a_site_is_that_of_a_plain_hook_there_and_resuming_gives_the_same(case, component):
    names = {"residual": case.row.block_names, "mlp": case.row.mlp, "attention": case.row.attention}[component]
    if names is None:
        pytest.skip(f"no site {component!r}")
    clean, classifier = clean_pass(case.classifier, case.batch), case.classifier
    everyone = torch.arange(len(case.batch.index))
    for layer, name in enumerate(names):
        call = names[:layer].count(name)
        with changed(case.module.get_submodule(name), call, "input" if component == "mlp" else "output"):
            plain = run(case)
        assert (plain - clean.logits).abs().max() > 1e-4
        if component == "residual":
            close(resume(classifier, clean, layer, change(clean.states[layer]), everyone), plain)
        everything = Neurons(layer, tuple(range(classifier.sites(component)[layer].width)), component)
        with classifier.edited(Zero(everything, scope="all")):
            assert (classifier.forward(case.batch) - clean.logits).abs().max() > 1e-4


def test_the_last_recorded_state_and_the_head_give_the_logits(case):
    clean = clean_pass(case.classifier, case.batch)
    everyone = torch.arange(len(case.batch.index))
    close(resume(case.classifier, clean, case.classifier.n_layers - 1, clean.states[-1], everyone), run(case))
    if case.classifier.final is not None:
        close(case.classifier.final(clean.features).detach(), run(case))


def test_resuming_with_examples_in_another_order_gives_their_logits(case):
    clean = clean_pass(case.classifier, case.batch)
    order = torch.tensor([*reversed(range(len(case.batch.index))), 0])
    for layer in range(-1, case.classifier.n_layers):
        states = None if layer < 0 else clean.states[layer][order]
        close(resume(case.classifier, clean, layer, states, order), clean.logits[order])


def test_batches_and_their_padding_do_not_change_predictions(case):
    inputs = case.row.inputs(12, 1)
    together = case.classifier.predict(inputs)
    alone = np.concatenate([case.classifier.predict([one]) for one in inputs])
    np.testing.assert_allclose(together, alone, atol=1e-4 * (1 + np.abs(alone).max()), rtol=0)


def test_the_module_comes_back_after_an_error_in_the_middle_of_a_pass(case):
    before, hooks = case.classifier.weights_hash(), hook_count(case.module)
    clean = run(case)

    def fail(*_):
        raise ZeroDivisionError

    handle = case.module.get_submodule(case.row.block_names[-1]).register_forward_hook(fail)
    edit = Zero(Neurons(0, (0, 1)), scope="readout-onward")
    with pytest.raises(ZeroDivisionError), case.classifier.edited(edit):
        case.classifier.forward(case.batch)
    with pytest.raises(ZeroDivisionError):
        clean_pass(case.classifier, case.batch)
    handle.remove()
    assert hook_count(case.module) == hooks
    assert all(
        "forward" not in m.__dict__ or m.__dict__["forward"].__module__ != "synapse.model.hooks"
        for m in case.module.modules()
    )
    assert case.classifier.weights_hash() == before
    assert torch.equal(run(case), clean)


@needs_version_of_page
def test_single_rows_are_computed_where_the_source_says_that_it_can_be(case):
    # One fused attention a block, whose keys and values of the other rows can be kept, and a head that reads one row.
    config = getattr(case.module, "config", None)
    is_fused = getattr(config, "_attn_implementation", None) == "sdpa" and case.row.family != "encoder-decoder"
    reads_one = case.row.readout in ("first", "last")
    is_causal = case.row.family == "causal decoder"
    expected = {(True, True): "every block" if is_causal else "last block", (True, False): "head"}
    # The first two pad their inputs themselves, the last hands on a bias for pairs of rows.
    wants_all_rows = case.row.name in ("Longformer", "BigBird, block-sparse", "T5")
    found = reuse_of(case.row, case.classifier)
    assert found == ("–" if wants_all_rows else expected.get((reads_one, is_fused), "–"))


def test_a_sweep_of_every_component_equals_the_plain_hooked_forward(case):
    labels = tuple(LABELS[i % N_LABELS] for i in range(4))
    train = Examples(case.row.inputs(4, 2), labels, "train")
    test = Examples(case.row.inputs(4, 3), labels, "test")
    row_reuse = reuse_of(case.row, case.classifier)
    for component in case.classifier.anatomy.sites:
        reference = record(case.classifier, train, component=component)
        scores = np.random.default_rng(0).random((reference.n_layers, 1 + N_LABELS, reference.width))
        ranking = Ranking("given", scores, LABELS, reference.source, component)
        sizes = {"fractions": (0.5,), "bottom_fractions": (), "label_fractions": (), "random_sets": 1}
        scopes = ("readout", "readout-onward", "all") if component == "residual" else ("readout",)
        cells = plan(ranking, Grid(scopes=scopes, kinds=(Kind("zero"),), **sizes))
        fast, plain = (
            sweep(case.classifier, test, ranking, reference=reference, cells=cells, engine=engine)
            for engine in ("exact", "plain")
        )
        reused = {place.split(", ")[0]: how for place, how in fast.reuse.items()}
        at_the_end = reused.pop(f"{component} of layer {reference.n_layers - 1}")
        rows = "rows" if row_reuse in ("last block", "every block") else "prefix"
        assert set(reused.values()) <= {rows}
        is_head = component in ("residual", "pooler")
        # Models that pad their own inputs take a single row in some batches and not in others.
        assert at_the_end == ("rows" if row_reuse == "head" and is_head else rows) or (row_reuse == "–" and is_head)
        scale = 1 + np.nanmax(np.abs(plain.logits))
        np.testing.assert_allclose(fast.logits, plain.logits, atol=1e-5 * scale, rtol=0)


@pytest.mark.parametrize("row", [row for row in TABLE if row.refused is not None], ids=lambda row: row.name)
def test_what_is_no_transformer_with_blocks_of_its_own_is_refused(row):
    with pytest.raises(AnatomyError, match=row.refused):
        classifier_of(row)


@needs_version_of_page
def test_the_page_of_architectures_names_what_is_refused():
    assert {refused_line(row) for row in TABLE if row.refused is not None} <= set(LINES)


def test_the_table_is_as_long_as_promised():
    assert len(TABLE) >= 35
