from dataclasses import replace

import numpy as np
import pytest
from planted import B_UNIT, C_UNIT, planted_classifier, planted_examples, random_classifier, random_examples

from synapse.errors import ModelError, SettingsError, SplitError
from synapse.measure.faithfulness import faithfulness
from synapse.ranking.base import Ranking
from synapse.recording import record
from synapse.sweeping import KINDS, Cell, Grid, Kind, Reach, cost_of, plan, sweep
from synapse.types import Neurons

SMALL = Grid(
    fractions=(0.1, 0.5, 1.0),
    bottom_fractions=(0.5,),
    label_fractions=(0.5,),
    kind_fractions=(0.5,),
    random_sets=10,
)


def some_ranking(classifier, *, source="elsewhere"):
    shape = (classifier.n_layers, 1 + len(classifier.labels), classifier.width)
    return Ranking("made-up", np.random.default_rng(4).random(shape), classifier.labels, source)


@pytest.mark.parametrize("architecture", ["bert", "distilbert", "deberta", "gpt2"])
def test_every_cell_equals_its_intervention_applied_to_the_whole_model(architecture):
    classifier, examples = random_classifier(architecture), random_examples(11, seed=1)
    reference = record(classifier, random_examples(20, seed=2))
    cells = plan(some_ranking(classifier), SMALL, seed=3)
    swept = sweep(classifier, examples, some_ranking(classifier), reference=reference, cells=cells, seed=6)
    assert len(swept.cells) == len(cells)
    assert {kind.name for kind in KINDS} == set(swept.cells["kind"])
    for cell, logits in zip(cells, swept.logits, strict=True):
        with classifier.edited(cell.kind.of(cell.neurons, cell.scope, reference, seed=6)):
            whole = classifier.predict(examples)
        ran = cell.runs(len(examples))
        np.testing.assert_allclose(logits[ran], whole[ran], atol=3e-5)
        assert np.isnan(logits[~ran]).all()


def test_the_plain_engine_and_the_resumed_one_agree():
    classifier, examples = random_classifier("bert"), random_examples(9, seed=1)
    reference = record(classifier, random_examples(12, seed=2))
    options = {"reference": reference, "cells": plan(some_ranking(classifier), SMALL)}
    resumed = sweep(classifier, examples, some_ranking(classifier), **options)
    plain = sweep(classifier, examples, some_ranking(classifier), engine="plain", **options)
    np.testing.assert_allclose(resumed.logits, plain.logits, atol=2e-5)


@pytest.mark.parametrize("max_tokens", [1, 40, 5000])
def test_batch_size_and_order_of_the_examples_do_not_change_a_sweep(max_tokens):
    classifier, examples = random_classifier("bert"), random_examples(10, seed=1)
    reference = record(classifier, random_examples(12, seed=2))
    cells = [cell for cell in plan(some_ranking(classifier), SMALL) if cell.share is None]
    first = sweep(classifier, examples, some_ranking(classifier), reference=reference, cells=cells)
    classifier.max_tokens = max_tokens
    backwards = examples.take(np.arange(10)[::-1])
    second = sweep(classifier, backwards, some_ranking(classifier), reference=reference, cells=cells)
    np.testing.assert_allclose(second.logits[:, ::-1], first.logits, atol=3e-5)


@pytest.mark.parametrize(("wrong", "expected"), [({"rows"}, "prefix"), ({"rows", "prefix"}, "none")])
def test_what_gives_wrong_logits_is_not_reused_and_the_sweep_says_so(monkeypatch, caplog, wrong, expected):
    import synapse.sweeping.groups as module

    classifier, examples = random_classifier("bert"), random_examples(6, seed=1)
    reference = record(classifier, random_examples(12, seed=2))
    options = {"reference": reference, "cells": plan(some_ranking(classifier), SMALL)}
    right = sweep(classifier, examples, some_ranking(classifier), engine="plain", **options)
    good = module.run_logits

    def off(classifier, clean, runs, reuse):
        return good(classifier, clean, runs, reuse) + 0.01 * (runs.layer == 1 and reuse in wrong)

    monkeypatch.setattr(module, "run_logits", off)
    swept = sweep(classifier, examples, some_ranking(classifier), **options)
    np.testing.assert_allclose(swept.logits, right.logits, atol=2e-5)
    places = {f"residual of layer 1, {scope}" for scope in ("all", "readout", "readout-onward")}
    assert {place for place, reuse in swept.reuse.items() if reuse == expected} == places
    assert {place for place, reuse in swept.reuse.items() if reuse == "rows"} == set(swept.reuse) - places
    assert set(swept.run_plain) == (places if expected == "none" else set())
    warned = {record.getMessage()[:20] for record in caplog.records if record.levelname == "WARNING"}
    assert warned == ({"residual of layer 1,"} if expected == "none" else set())


def test_what_fails_or_is_wrong_in_every_way_is_run_plain_or_refused(monkeypatch):
    import synapse.sweeping.groups as module

    classifier, examples = random_classifier("bert"), random_examples(6, seed=1)
    reference = record(classifier, random_examples(12, seed=2))
    options = {"reference": reference, "cells": plan(some_ranking(classifier), SMALL)}
    right = sweep(classifier, examples, some_ranking(classifier), engine="plain", **options)

    def fail(*_):
        raise RuntimeError("this model wants all of its rows")

    monkeypatch.setattr(module, "run_logits", fail)
    swept = sweep(classifier, examples, some_ranking(classifier), **options)
    np.testing.assert_array_equal(swept.logits, right.logits)
    assert set(swept.reuse.values()) == {"plain"}
    with pytest.raises(ModelError, match=r"exact engine was asked for.*layer 0, all \(rows: RuntimeError: this model"):
        sweep(classifier, examples, some_ranking(classifier), engine="exact", **options)


def test_each_example_meets_the_asked_number_of_random_sets_at_each_size():
    classifier = planted_classifier()
    cells = plan(some_ranking(classifier), Grid(random_sets=10, random_sets_per_example=3), seed=1)
    random = [c for c in cells if c.selection == "random" and c.kind == Kind("zero") and c.neurons.layer == 0]
    at_half = [c for c in random if c.fraction == 0.5 and c.scope == "all"]
    assert len(at_half) == 10
    assert len({c.neurons.units for c in at_half}) == 10
    np.testing.assert_array_equal(sum(c.runs(25).astype(int) for c in at_half), 3)


def test_sizes_that_come_to_the_same_number_of_neurons_are_swept_once_under_their_true_share():
    cells = plan(some_ranking(planted_classifier()), Grid(kinds=(Kind("zero"),)), seed=1)
    top = [c for c in cells if c.selection == "top" and c.label == "" and c.neurons.layer == 0 and c.scope == "all"]
    # of 16 units: 1 and 5 % are one unit, 95 to 99 % fifteen or all
    assert [len(c.neurons) for c in top] == [1, 2, 4, 8, 12, 14, 15, 16]
    assert all(c.fraction == len(c.neurons) / 16 for c in cells)


def one_kind(cells):
    return [c for c in cells if c.kind == Kind("zero") and c.selection != "bottom" and c.label == ""]


def test_rivals_are_swept_at_a_few_sizes_of_the_random_sets_in_all_rows_of_every_layer():
    ranking = some_ranking(random_classifier())  # 32 units
    rival = replace(ranking, method="rival", scores=-ranking.scores)
    cells = plan(ranking, Grid(), rivals=[rival], seed=1)
    assert cells[: -3 * 6] == plan(ranking, Grid(), seed=1)
    added = cells[-3 * 6 :]
    assert {(c.scope, c.kind.name, c.selection, c.label, c.method) for c in added} == {
        ("all", "zero", "top", "", "rival")
    }
    for layer in range(3):
        at = {len(c.neurons): c.neurons for c in added if c.neurons.layer == layer}
        assert list(at) == [3, 8, 16, 24, 29, 31]  # 10, 25, 50, 75, 90 and 98 % of 32
        random = {len(c.neurons) for c in one_kind(cells) if c.selection == "random" and c.neurons.layer == layer}
        assert set(at) <= random
        assert at[3] == ranking.bottom(3, layer=layer)


def test_rivals_take_the_sizes_and_the_scope_that_a_small_grid_has():
    ranking = some_ranking(planted_classifier())  # 16 units
    rival = replace(ranking, method="rival")
    small = Grid(scopes=("readout",), fractions=(0.2, 0.6, 1.0))
    added = [c for c in plan(ranking, small, rivals=[rival]) if c.method == "rival"]
    assert [(c.neurons.layer, len(c.neurons), c.scope) for c in added] == [
        (layer, size, "readout") for layer in (0, 1) for size in (3, 10)
    ]
    everything = Grid(fractions=(1.0,))
    assert plan(ranking, everything, rivals=[rival]) == plan(ranking, everything)


def test_three_rivals_cost_little_beside_the_first_ranking():
    classifier = random_classifier()
    ranking = some_ranking(classifier)
    rng = np.random.default_rng(1)
    rivals = [replace(ranking, method=f"rival {i}", scores=rng.random(ranking.scores.shape)) for i in range(3)]
    reach = Reach.of(classifier, "residual")
    alone = cost_of(plan(ranking, Grid()), 64, reach)
    beside = cost_of(plan(ranking, Grid(), rivals=rivals), 64, reach)
    assert 1.05 < beside.runs / alone.runs < 1.2


def test_in_the_live_model_the_right_ranking_is_best_and_the_reversed_one_worse_than_chance():
    classifier, examples = planted_classifier(), planted_examples(60, seed=1)
    ranking = some_ranking(classifier)
    scores = 0.01 * ranking.scores
    scores[:, :, [B_UNIT, C_UNIT]] += 1
    right, reverse = (replace(ranking, method=name, scores=s) for name, s in (("right", scores), ("reverse", -scores)))
    cells = plan(reverse, Grid(kinds=(Kind("zero"),)), rivals=[ranking, right], seed=1)
    reference = record(classifier, planted_examples(20, seed=2))
    found = faithfulness(sweep(classifier, examples, reverse, reference=reference, cells=cells))
    for best in (found.best_overall["all"], *found.best["all"].values()):
        assert (best.method, best.second) == ("right", "made-up")
        assert best.lead.low > 0
    overall = found.overall["all"]
    assert overall["right"].low > 0
    assert overall["reverse"].high < 0
    # of 16 units the right order loses all there is to lose with the first 2, the reversed one half of it with 15
    areas = 1 - 0.5 * 2 / 16, 0.25 * 1 / 16 + 0.75 * 1 / 16
    assert overall["right"].value - overall["reverse"].value == pytest.approx(areas[0] - areas[1])


def test_noise_depends_on_the_seed():
    classifier, examples = planted_classifier(), planted_examples(6, seed=1)
    reference = record(classifier, planted_examples(20, seed=2))
    cells = [Cell(Neurons(1, (B_UNIT,)), "readout", Kind("noise", 1.0), "", "", "top", -1, 1 / 16)]
    options = {"reference": reference, "cells": cells}
    first, again, other = (
        sweep(classifier, examples, some_ranking(classifier), seed=seed, **options).logits for seed in (0, 0, 7)
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.01


def test_cells_that_skip_the_first_examples_are_run_too():
    classifier, examples = planted_classifier(), planted_examples(20, seed=1)
    cells = [Cell(Neurons(0, (B_UNIT,)), "all", Kind("zero"), "", "", "random", 0, 1 / 16, share=(1, 20, 1))]
    reference = record(classifier, planted_examples(6, seed=2))
    swept = sweep(classifier, examples, some_ranking(classifier), reference=reference, cells=cells)
    assert np.flatnonzero(~np.isnan(swept.logits[0, :, 0])).tolist() == [19]


def test_random_sets_are_nested_and_the_same_for_every_scope():
    classifier = planted_classifier()
    cells = [c for c in plan(some_ranking(classifier), SMALL, seed=1) if c.selection == "random" and c.draw == 4]
    by_size = {(c.neurons.layer, c.scope, c.fraction): set(c.neurons.units) for c in cells}
    assert by_size[0, "all", 2 / 16] < by_size[0, "all", 0.5]
    assert by_size[0, "all", 0.5] == by_size[0, "readout", 0.5]


def test_at_the_last_layer_the_three_scopes_are_run_once():
    classifier = planted_classifier()
    everything = Neurons(1, tuple(range(16)))
    cells = [
        Cell(everything, scope, Kind("zero"), "", "", "top", -1, 1.0) for scope in ("readout", "readout-onward", "all")
    ]
    cost = cost_of(cells, 5, Reach.of(classifier, "residual"))
    assert (cost.cells, cost.runs) == (3, 5)
    examples = planted_examples(5, seed=1)
    swept = sweep(
        classifier,
        examples,
        some_ranking(classifier),
        reference=record(classifier, planted_examples(6, seed=2)),
        cells=cells,
    )
    np.testing.assert_array_equal(swept.logits[0], swept.logits[2])
    np.testing.assert_allclose(swept.logits[0], np.tile([1.0, 0.0, 0.0], (5, 1)))


def test_neurons_may_not_be_measured_on_the_examples_that_chose_them():
    classifier, examples = planted_classifier(), planted_examples(6, seed=1)
    reference = record(classifier, examples)
    with pytest.raises(SplitError, match="ranked on planted-1"):
        sweep(classifier, examples, some_ranking(classifier, source=examples.fingerprint), reference=reference)


def test_impossible_grids_and_engines_are_refused():
    with pytest.raises(SettingsError, match=r"include some outside \(0, 1\]"):
        Grid(fractions=(0.5, 1.5))
    with pytest.raises(SettingsError, match="11 random sets an example were asked for"):
        Grid(random_sets_per_example=11)
    classifier, examples = planted_classifier(), planted_examples(6, seed=1)
    with pytest.raises(SettingsError, match="no engine 'warp'"):
        sweep(
            classifier,
            examples,
            some_ranking(classifier),
            reference=record(classifier, examples),
            engine="warp",
        )
    with pytest.raises(SettingsError, match="no intervention 'zeroo'.*Did you mean 'zero'"):
        Kind("zeroo").of(Neurons(0, (1,)), "readout", record(classifier, examples))


def test_the_model_is_unchanged_after_a_sweep_that_dies_half_way():
    classifier, examples = planted_classifier(), planted_examples(40, seed=1)
    before = classifier.weights_hash()

    def die(done, _total):
        if done > 100:
            raise MemoryError("half way")

    with pytest.raises(MemoryError, match="half way"):
        sweep(
            classifier,
            examples,
            some_ranking(classifier),
            reference=record(classifier, planted_examples(6, seed=2)),
            progress=die,
        )
    assert classifier.weights_hash() == before
    modules = list(classifier.module.modules())
    assert all(not m._forward_hooks and not m._forward_pre_hooks and "forward" not in m.__dict__ for m in modules)


def test_ablating_the_planted_neuron_takes_its_class_and_leaves_the_others():
    classifier, examples = planted_classifier(), planted_examples(30, seed=1)
    cells = [Cell(Neurons(1, (B_UNIT,)), "readout", Kind("zero"), "", "", "top", -1, 1 / 16)]
    reference = record(classifier, planted_examples(6, seed=2))
    swept = sweep(classifier, examples, some_ranking(classifier), reference=reference, cells=cells)
    clean = swept.clean_logits.argmax(axis=1)
    np.testing.assert_array_equal(swept.logits[0].argmax(axis=1), np.where(clean == 1, 0, clean))


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
@pytest.mark.parametrize("component", ["mlp", "heads", "pooler"])
def test_noise_inside_a_block_and_before_the_final_map_is_that_of_the_plain_forward(architecture, component):
    classifier, examples = random_classifier(architecture), random_examples(6, seed=1)
    reference = record(classifier, random_examples(12, seed=2), component=component)
    scores = np.random.default_rng(0).random((reference.n_layers, 4, reference.width))
    ranking = Ranking("given", scores, classifier.labels, reference.source, component)
    cells = [
        Cell(ranking.top(0.5, layer=layer), scope, Kind("noise", 1.0), "given", "", "top", -1, 0.5)
        for layer in range(reference.n_layers)
        for scope in ("readout", "all")
    ]
    fast, plain = (
        sweep(classifier, examples, ranking, reference=reference, cells=cells, engine=engine)
        for engine in ("exact", "plain")
    )
    assert fast.run_plain == ()
    np.testing.assert_allclose(fast.logits, plain.logits, atol=2e-5)
    assert np.abs(fast.logits - fast.clean_logits).max(axis=(1, 2)).min() > 1e-3
