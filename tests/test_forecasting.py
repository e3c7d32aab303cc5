"""What a study will cost, counted before it is run."""

import pytest
from planted import planted_classifier, planted_examples

from synapse.forecasting import ITEM_SECONDS, START_SECONDS, Forecast, Stage, forecast
from synapse.ranking import rank
from synapse.recording import record
from synapse.settings import make_settings
from synapse.sweeping import Cost, plan, sweep

QUICK = {"examples": 30, "train_examples": 120, "fractions": (0.1, 0.5, 1.0), "kinds": ("zero", "noise")}


def test_the_forecast_counts_what_the_sweep_then_runs():
    classifier, train, test = planted_classifier(), planted_examples(150, seed=1), planted_examples(60, seed=2)
    planned = forecast(classifier, train, test, make_settings(**QUICK))
    assert (planned.train_examples, planned.test_examples, planned.sweep_examples) == (120, 60, 30)
    # 2 blocks: a run at block 0 costs one block pass, a run at block 1 none; the clean pass costs 2 an example
    at_block_0 = planned.sweep.block_passes - 30 * 2
    assert 0 < at_block_0 < planned.sweep.runs
    assert planned.seconds > 0


def made_of(*stages, pace=0.5):
    return Forecast(0, 0, 0, Cost(0, 0, 0, 0), stages, pace, 0)


def test_so_many_workers_run_so_many_items_at_a_time_and_the_last_round_may_be_short():
    # 10 items of 6 passes at half a second: 3 s each; by four workers in rounds of 4, 4 and 2
    found = made_of(Stage("sweep", items=10, passes=60)).seconds_on(4)
    assert found == pytest.approx(START_SECONDS + 3 * 3 + 10 * ITEM_SECONDS)


def test_a_worker_of_another_pace_is_counted_at_that():
    planned = made_of(Stage("record", items=2, passes=10))
    assert planned.seconds_on(1, 0.01) == pytest.approx(START_SECONDS + 0.1 + 2 * ITEM_SECONDS)
    assert (planned.forward_passes, planned.seconds) == (10, 5.0)


def test_a_sweep_has_an_item_for_every_batch_and_place():
    classifier, train, test = planted_classifier(), planted_examples(150, seed=1), planted_examples(60, seed=2)
    settings = make_settings(**QUICK, methods=("mean-difference",), attacks=("logits",))
    record_stage, sweep_stage = forecast(classifier, train, test, settings).stages
    recorded = record(classifier, train)
    ranking = rank(recorded, method="mean-difference")
    found = sweep(classifier, test.take(range(30)), ranking, reference=recorded, cells=plan(ranking, settings.grid()))
    assert (record_stage.items, record_stage.passes) == (1, 180)
    assert sweep_stage.items == len(found.reuse)  # these 30 examples are one batch
