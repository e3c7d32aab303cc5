"""Work in this process: one outcome an item, in their order, and failures that do not stop the rest."""

from itertools import count, islice

import pytest
import torch
from pieces_of_work import Building, built_in, refusing, square, threads

from synapse.execute import Counts, Done, Executor, Failed, SerialExecutor
from synapse.testing import check_executor


def test_the_serial_executor_holds_the_contract():
    check_executor(SerialExecutor())


def test_outcomes_come_in_the_order_of_the_items():
    outcomes = list(SerialExecutor().map(square, [3, 1, 2]))
    assert [(outcome.position, outcome.result) for outcome in outcomes] == [(0, 9), (1, 1), (2, 4)]


def test_a_failure_names_its_item_and_keeps_the_error_as_it_was_raised():
    outcomes = list(SerialExecutor().map(refusing, range(1, 6)))
    assert [type(outcome) for outcome in outcomes] == [Done, Done, Failed, Done, Done]
    failed = outcomes[2]
    assert str(failed) == "Item 2 (3): ValueError: three is too many"
    assert (failed.item, failed.is_poisoned) == (3, False)
    assert failed.error.__traceback__ is not None


def test_an_item_is_read_when_its_outcome_is_asked_for():
    read = []
    outcomes = SerialExecutor().map(square, (read.append(i) or i for i in count()))
    assert [outcome.result for outcome in islice(outcomes, 3)] == [0, 1, 4]
    assert read == [0, 1, 2]


def test_a_recipe_is_built_once(tmp_path):
    assert len(list(SerialExecutor().map(built_in, range(5), shared=Building(tmp_path)))) == 5
    assert len(list(tmp_path.iterdir())) == 1


def test_an_interrupt_is_no_outcome():
    with pytest.raises(KeyboardInterrupt):
        list(SerialExecutor().map(interrupted, [1]))


def interrupted(shared, item):
    raise KeyboardInterrupt


def test_items_run_with_the_threads_asked_for_and_the_caller_with_its_own(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    before = torch.get_num_threads()
    outcomes = SerialExecutor(threads_per_worker=3).map(threads, [0])
    assert next(outcomes).result[0] == 3
    assert torch.get_num_threads() == before


def test_progress_counts_what_is_done_and_what_failed():
    seen = []
    with SerialExecutor() as executor:
        list(executor.map(refusing, range(5), report=seen.append))
    assert [(counts.done, counts.failed) for counts in seen] == [(1, 0), (2, 0), (3, 0), (3, 1), (4, 1)]


def test_items_per_second_are_those_that_are_through():
    assert Counts(done=7, failed=3, seconds=2.0).per_second == 5.0
    assert Counts().per_second == 0.0


# ----------------------------------------------------------------------------------------- executors that are broken


class Broken(Executor):
    """A serial executor, to break one thing of."""

    def map(self, work, items, *, shared=None, report=lambda _: None):
        yield from SerialExecutor().map(work, items, shared=shared, report=report)


class LosesOne(Broken):
    def map(self, work, items, **options):
        yield from islice(super().map(work, items, **options), 1, None)


class GivesOneTwice(Broken):
    def map(self, work, items, **options):
        for outcome in super().map(work, items, **options):
            yield outcome
            if outcome.position == 2:
                yield outcome


class MixesPositions(Broken):
    def map(self, work, items, **options):
        for outcome in super().map(work, items, **options):
            yield Done(outcome.position ^ 1, outcome.result) if isinstance(outcome, Done) else outcome


class ReadsEverything(Broken):
    def map(self, work, items, **options):
        yield from super().map(work, list(islice(items, 2_000_000)), **options)


class StopsAtAFailure(Broken):
    def map(self, work, items, **options):
        for outcome in super().map(work, items, **options):
            if isinstance(outcome, Failed):
                raise outcome.error
            yield outcome


class ForgetsTheItem(Broken):
    def map(self, work, items, **options):
        for outcome in super().map(work, items, **options):
            yield Failed(outcome.position, None, outcome.error) if isinstance(outcome, Failed) else outcome


class BuildsEachTime(Broken):
    def map(self, work, items, *, shared=None, report=lambda _: None):
        for position, item in enumerate(items):
            report(Counts(position + 1))
            for outcome in super().map(work, [item], shared=shared):
                done = isinstance(outcome, Done)
                yield Done(position, outcome.result) if done else Failed(position, item, outcome.error)


class DoesNotBuild(Broken):
    def map(self, work, items, *, shared=None, report=lambda _: None):
        shared = (0, "") if hasattr(shared, "build") else shared
        yield from super().map(work, items, shared=shared, report=report)


class SaysNothing(Broken):
    def map(self, work, items, *, shared=None, report=lambda _: None):
        yield from super().map(work, items, shared=shared)


BROKEN = [
    (LosesOne(), "loses items: 199 outcomes of 200 items"),
    (GivesOneTwice(), "gives 201 outcomes of 200 items: one each was expected"),
    (MixesPositions(), "gives item 0 the result of another one"),
    (ReadsEverything(), "reads 2000000 items of a generator of which 20 outcomes were taken"),
    (StopsAtAFailure(), "raises what one item raised, in place of going on: yield a `Failed`"),
    (ForgetsTheItem(), "does not say which item failed"),
    (BuildsEachTime(), "builds a recipe more than once in a process"),
    (DoesNotBuild(), "does not give the work what the recipe builds"),
    (SaysNothing(), "does not report how far it is"),
]


@pytest.mark.parametrize(("broken", "clause"), BROKEN, ids=[type(broken).__name__ for broken, _ in BROKEN])
def test_every_clause_of_the_contract_is_seen_to_fail(broken, clause):
    with pytest.raises(AssertionError) as caught:
        check_executor(broken)
    assert str(caught.value).startswith(f"{type(broken).__name__} {clause}")
