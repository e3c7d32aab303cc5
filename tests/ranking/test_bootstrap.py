import os
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from planted import planted_classifier, planted_examples
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

import synapse.ranking.bootstrap as bootstrap
from synapse.errors import ConvergenceError, DataError, SettingsError
from synapse.measure.agreement import kuncheva
from synapse.probe.probe import fit_joint_probes, fit_probes
from synapse.probe.solver import solve
from synapse.ranking import RankingMethod, Scores
from synapse.ranking.bootstrap import agreement_of_noise, rank_stability, runs_the_model
from synapse.ranking.gradients import Taylor
from synapse.ranking.selection import RedundancyFiltered
from synapse.ranking.weights import LinearWeight
from synapse.recording import record
from synapse.types import Activations

LABELS = ("a", "b", "c")


def some_activations(targets, *, layers=2, width=20, strength=0.0, seed=0):
    """Return noise in which units 4 and 7 stand for classes 1 and 2, by `strength` deviations."""
    rng, targets = np.random.default_rng(seed), np.asarray(targets)
    values = rng.normal(size=(layers, len(targets), width)).astype(np.float32)
    values[:, :, 4] += np.float32(strength) * (targets == 1)
    values[:, :, 7] += np.float32(strength) * (targets == 2)
    return Activations(values, np.eye(3, dtype=np.float32)[targets], targets, LABELS, "source")


def overlapping(n=90, **options):
    return some_activations(np.arange(n) % 3, strength=1.0, **options)


@dataclass(frozen=True)
class Seen(RankingMethod):
    """Keeps the examples of every draw."""

    draws: list = field(default_factory=list)

    @property
    def name(self):
        return "seen"

    def scores(self, evidence):
        self.draws.append(evidence.activations)
        return Scores(np.random.default_rng(0).random((evidence.activations.n_layers, 4, evidence.activations.width)))


def drawn(activations, draws, seed=0):
    seen = Seen()
    rank_stability(activations, method=seen, draws=draws, seed=seed)
    return seen.draws[1:]  # the first ranking is that of all examples


def ranks_of(scores):
    return np.argsort(np.argsort(-scores))


@pytest.mark.parametrize("method", ["cumulative-mass", "linear", "mean-difference"])
def test_two_units_that_are_always_first_share_the_first_two_ranks(method):
    activations = some_activations(np.arange(120) % 3, strength=6.0)

    found = rank_stability(activations, method=method, probes=fit_probes(activations), draws=40, size=2)

    frame = found.to_frame()
    planted = frame[(frame["label"] == "") & frame["unit"].isin([4, 7])]
    assert set(planted["low"]) == {0}
    assert set(planted["high"]) == {1}
    assert set(planted["top_probability"]) == {1.0}
    assert [found.kuncheva(layer).value for layer in (0, 1)] == [1.0, 1.0]
    assert found.settled(0).to_dict() == {
        "value": 2, "low": None, "high": None, "n": 40, "unit": "units", "note": "of 2"
    }  # fmt: skip


def test_noise_agrees_by_what_draws_share_and_no_more():
    activations = some_activations(np.arange(600) % 2, width=300, layers=4)

    found = rank_stability(activations, method="mean-difference", draws=30)

    indices = [found.kuncheva(layer).value for layer in range(4)]
    assert np.mean(indices) == pytest.approx(agreement_of_noise(30, 300), abs=0.04)


def test_the_agreement_of_noise_is_that_of_normal_scores_with_a_shared_part():
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(200, 1, 100))
    scores = np.abs(shared + rng.normal(size=(200, 8, 100)))
    tops = np.argsort(np.argsort(-scores, axis=2), axis=2) < 10

    simulated = [kuncheva(sets) for sets in tops]

    margin = 4 * np.std(simulated) / np.sqrt(200)
    assert agreement_of_noise(10, 100) == pytest.approx(np.mean(simulated), abs=margin)


@dataclass(frozen=True)
class OnlyTheFourth(RankingMethod):
    @property
    def name(self):
        return "only-the-fourth"

    def scores(self, evidence):
        scores = np.zeros((evidence.activations.n_layers, 4, evidence.activations.width))
        scores[:, 0, 4] = 1.0
        return Scores(scores)


def test_units_of_equal_score_agree_by_chance_and_those_above_them_always():
    found = rank_stability(overlapping(width=40), method=OnlyTheFourth(), draws=300, size=5)

    by_chance = (1 + 4 * 4 / 39 - 25 / 40) / (5 - 25 / 40)  # unit 4, and 4 of the 39 others
    assert found.kuncheva(0).value == pytest.approx(by_chance, abs=0.02)
    assert found.nogueira(0).value == 1.0
    assert found.to_frame().query("unit == 9 and label == ''")["median"].between(10, 30).all()
    nothing = found.kuncheva(0, "a")
    assert (nothing.value, nothing.note) == (None, "the ranking has no order")
    assert found.nogueira(0, "a").note == "the scores choose no unit"


def test_ranks_are_those_of_a_plain_loop_with_scikit_learn():
    activations = overlapping()
    probes = fit_probes(activations, penalties=(0.02,), l1_ratio=0.0)

    found = rank_stability(activations, method="linear", probes=probes, draws=4)

    for draw, examples in enumerate(drawn(activations, 4)):
        for layer in (0, 1):
            scaler = StandardScaler().fit(activations.values[layer].astype(float))
            model = LogisticRegression(C=1 / (0.02 * 90), tol=1e-9, max_iter=10_000)
            model.fit(scaler.transform(examples.values[layer].astype(float)), examples.targets)
            weights = np.abs(model.coef_)
            np.testing.assert_array_equal(found.ranks[draw, layer, 0], ranks_of(weights.mean(axis=0)))
            np.testing.assert_array_equal(found.ranks[draw, layer, 1:], [ranks_of(row) for row in weights])


def test_a_warm_start_ends_where_a_cold_one_does():
    activations = overlapping()
    probes = fit_probes(activations, penalties=(0.02,))

    found = rank_stability(activations, method="linear", probes=probes, draws=4)

    for draw, examples in enumerate(drawn(activations, 4)):
        z = (examples.values[1].astype(float) - probes[1].mean) / probes[1].scale
        weights = np.abs(solve(z, examples.targets, n_labels=3, penalty=0.02).weights)
        for row, ranks in zip(weights, found.ranks[draw, 1, 1:], strict=True):
            n_weights = int((row > 0).sum())  # the order of the others is drawn
            np.testing.assert_array_equal(np.argsort(ranks)[:n_weights], np.argsort(-row, kind="stable")[:n_weights])


def test_examples_are_drawn_with_replacement_from_all_of_them_and_by_the_seed():
    activations = overlapping()

    first, again, other = (drawn(activations, 20, seed) for seed in (0, 0, 1))

    known = {values.tobytes() for values in activations.values[1]}
    assert all(values.tobytes() in known for values in first[0].values[1])
    assert {len(examples) for examples in first} == {90}
    assert len({tuple(np.bincount(examples.targets)) for examples in first}) > 1  # classes differ in size
    distinct = [len(np.unique(examples.values[0, :, 0])) / 90 for examples in first]
    assert np.mean(distinct) == pytest.approx(1 - np.exp(-1), abs=0.03)
    assert all((a.targets == b.targets).all() for a, b in zip(first, again, strict=True))
    assert any((a.targets != b.targets).any() for a, b in zip(first, other, strict=True))


def test_ranks_depend_on_the_seed_and_neither_on_other_layers_nor_threads_nor_batches(monkeypatch):
    activations = overlapping()
    probes = fit_probes(activations)
    found = rank_stability(activations, probes=probes, draws=8)
    last = replace(activations, values=activations.values[1:])

    alone = rank_stability(last, probes=replace(probes, probes=(replace(probes[1], layer=0),)), draws=8)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    monkeypatch.setattr(bootstrap, "_WEIGHTS_AT_ONCE", 3 * probes[0].weights.size * 2)  # three draws at a time
    batched = rank_stability(activations, probes=probes, draws=8)
    other = rank_stability(activations, probes=probes, draws=8, seed=1)

    np.testing.assert_array_equal(alone.ranks[:, 0], found.ranks[:, 1])
    np.testing.assert_array_equal(batched.ranks, found.ranks)
    assert (other.ranks != found.ranks).any()


@pytest.mark.parametrize("method", ["cumulative-mass", "probeless", "mean-difference", "roc-auc"])
def test_a_class_of_two_examples_can_be_lost_and_one_without_any_has_no_order(method):
    activations = some_activations([0] * 30 + [1] * 2, strength=3.0)
    probes = fit_probes(activations, penalties=(0.03,))

    found = rank_stability(activations, method=method, probes=probes, draws=60)

    lost = [draw for draw, examples in enumerate(drawn(activations, 60)) if (examples.targets == 0).all()]
    assert 2 < len(lost) < 20  # expected: 60 / e^2 = 8
    assert (np.sort(found.ranks, axis=3) == np.arange(20)).all()
    assert len({tuple(found.ranks[draw, 0, 2]) for draw in lost}) == len(lost)  # there is nothing to tell them by
    assert not found.by_score[lost][:, :, 2].any()
    assert found.kuncheva(0, "c").value is None
    assert found.kuncheva(0, "b").value is not None


def test_a_method_made_of_another_reads_the_probes_that_the_other_needs():
    activations = overlapping()
    probes = fit_probes(activations)

    found = rank_stability(activations, method=RedundancyFiltered(LinearWeight()), probes=probes, draws=5)
    plain = rank_stability(activations, method="linear", probes=probes, draws=5)

    # no two units of noise are redundant
    weighted = plain.by_score[:, :, :, None] > plain.ranks
    np.testing.assert_array_equal(found.ranks[weighted], plain.ranks[weighted])


def test_intervals_are_percentiles_of_the_ranks():
    found = rank_stability(overlapping(), method="probeless", draws=100)

    for share, ends in zip((0.025, 0.5, 0.975), found.intervals, strict=True):
        np.testing.assert_array_equal(ends, np.quantile(found.ranks, share, axis=0, method="inverted_cdf"))


def test_the_frame_lists_every_unit_by_its_rank_among_all_examples():
    found = rank_stability(overlapping(), method="probeless", draws=10)

    frame = found.to_frame()

    assert len(frame) == 2 * 4 * 20
    row = frame[(frame["layer"] == 1) & (frame["label"] == "c") & (frame["rank"] == 3)].iloc[0]
    assert row["unit"] == found.ranking.order(1, "c")[3]
    mine = found.ranks[:, 1, 3, row["unit"]]
    assert row["top_probability"] == (mine < 2).mean()  # a tenth of 20
    assert (row["low"], row["high"], row["k"], row["draws"]) == (mine.min(), mine.max(), 2, 10)


def test_the_work_done_is_reported():
    steps = []
    rank_stability(overlapping(), method="probeless", draws=3, progress=lambda done, total: steps.append((done, total)))
    assert steps == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"method": Taylor()},
            "The ranking 'taylor' asks for the classifier, and each of 100 draws would run the model again: give a "
            "method that reads the activations or probes, such as 'cumulative-mass'.",
        ),
        ({"method": "probeless", "draws": 1}, "1 draws were asked for: give 2 or more, for example 100."),
        (
            {"method": "probeless", "size": 1.0},
            "A top of 20 among 20 units says nothing of their order: give 1 to 19.",
        ),
        ({"method": "linear"}, "The ranking 'linear' was given no probes; pass `probes=`."),
    ],
)
def test_what_cannot_be_drawn_again_is_refused(options, message):
    with pytest.raises(SettingsError) as caught:
        rank_stability(overlapping(), **options)

    assert str(caught.value) == message


def test_an_unknown_method_is_refused_with_the_nearest_name():
    with pytest.raises(SettingsError, match="no ranking method 'probles'.*Did you mean 'probeless'"):
        rank_stability(overlapping(), method="probles")


def test_a_method_that_filters_a_live_one_is_a_live_one():
    assert runs_the_model(RedundancyFiltered(Taylor()))
    assert not runs_the_model(RedundancyFiltered(LinearWeight()))


def test_probes_that_cannot_be_fitted_again_are_refused(monkeypatch):
    activations = overlapping()
    probes = fit_probes(activations)

    with pytest.raises(SettingsError, match="A joint probe cannot be fitted again layer by layer"):
        rank_stability(activations, probes=fit_joint_probes(activations, penalties=(0.05,)))
    with pytest.raises(DataError, match="The probes were fitted on other activations"):
        rank_stability(replace(activations, source="other"), probes=probes)
    monkeypatch.setattr(
        bootstrap,
        "solve_resamples",
        lambda z, y, counts, **_: [solve(z, y, n_labels=3, penalty=0.01, max_iterations=1)],
    )
    with pytest.raises(ConvergenceError, match="in one of 1 draws of the examples, with penalty"):
        rank_stability(activations, probes=probes, draws=2)


def test_the_planted_neurons_would_come_first_again():
    train = record(planted_classifier(), planted_examples(150, seed=1))

    found = rank_stability(train, probes=fit_probes(train), draws=20, size=2)

    assert found.settled(1).value == 2
    assert found.kuncheva(1).value == 1.0
