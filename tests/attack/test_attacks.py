import numpy as np
import pytest
from planted import planted_classifier, planted_examples
from scipy.optimize import minimize

from synapse.attack.base import attacked, broken_budget, needed_budget
from synapse.attack.head import FittedStep, fitted_step, least_distance, redirect_head, required_step, smallest_step
from synapse.attack.logits import shift_attacks
from synapse.attack.noise import noise_attack
from synapse.errors import SettingsError
from synapse.measure.attacks import attack_table, smallest_budget
from synapse.perturb.logits import LogitShift
from synapse.perturb.weights import HeadEdit, WeightNoise
from synapse.recording import record
from synapse.types import Attacks, StrengthCurve

RNG = np.random.default_rng(0)


def test_the_needed_budget_is_where_a_fine_search_first_sees_the_target_win():
    logits, slopes = RNG.normal(size=(200, 4)), RNG.normal(size=(200, 4))
    needed = needed_budget(logits, slopes, target=2)
    grid = np.linspace(0, 12, 4001)
    wins = (logits[None] + grid[:, None, None] * slopes[None]).argmax(axis=2) == 2
    first = np.where(wins.any(axis=0), grid[wins.argmax(axis=0)], np.inf)
    seen = np.isfinite(first)
    assert seen.sum() > 50
    np.testing.assert_allclose(needed[seen], first[seen], atol=grid[1])
    assert (needed[~seen] > 11.9).all() or np.isinf(needed[~seen]).mean() > 0.9


def test_the_broken_budget_is_where_a_fine_search_first_sees_another_class():
    logits, slopes = RNG.normal(size=(200, 3)), RNG.normal(size=(200, 3))
    grid = np.linspace(0, 20, 4001)
    other = (logits[None] + grid[:, None, None] * slopes[None]).argmax(axis=2) != logits.argmax(axis=1)
    first = np.where(other.any(axis=0), grid[other.argmax(axis=0)], np.inf)
    broken = broken_budget(logits, slopes)
    seen = np.isfinite(first)
    np.testing.assert_allclose(broken[seen], first[seen], atol=grid[1])


def test_a_shift_needs_exactly_the_gap_and_its_success_is_the_gaps_distribution():
    test = record(planted_classifier(), planted_examples(60, seed=1))
    for attack in shift_attacks(test, seed=0):
        if attack.arm == "attack":
            z = test.logits[attack.examples]
            target = test.labels.index(attack.target)
            np.testing.assert_allclose(attack.needed[0], z.max(axis=1) - z[:, target], rtol=1e-6)


def test_the_predicted_shift_redirects_the_live_model_and_a_little_less_does_not():
    classifier, examples = planted_classifier(), planted_examples(30, seed=1)
    test = record(classifier, examples)
    attack = next(a for a in shift_attacks(test, seed=0) if (a.source, a.target, a.arm) == ("b", "c", "attack"))
    largest = float(attack.needed.max())
    for amount, share in ((largest * 1.001, 1.0), (float(attack.needed.min()) * 0.999, 0.0)):
        with classifier.edited(LogitShift("c", amount)):
            assert (classifier.predict(examples)[attack.examples].argmax(axis=1) == 2).mean() == share


def test_least_distance_meets_the_kkt_conditions_and_equals_a_general_solver():
    features, required = RNG.normal(size=(30, 8)) + 1.5, RNG.uniform(0.5, 2, size=30)
    step = least_distance(features, required)
    slack = features @ step - required
    assert slack.min() > -1e-8
    constraint = {"type": "ineq", "fun": lambda v: features @ v - required, "jac": lambda v: features}
    general = minimize(lambda v: v @ v / 2, np.ones(8), jac=lambda v: v, constraints=[constraint], tol=1e-12)
    np.testing.assert_allclose(step, general.x, atol=1e-5)
    # stationarity: the step is a non-negative combination of the active examples' features
    active = features[slack < 1e-6]
    weights, gap = np.linalg.lstsq(active.T, step, rcond=None)[:2]
    assert weights.min() > -1e-6
    assert np.sum(gap) < 1e-12


def test_impossible_requirements_have_no_step():
    assert least_distance(np.array([[1.0], [-1.0]]), np.array([1.0, 1.0])) is None


def test_the_smallest_step_covers_its_share_and_is_shorter_than_the_mean_direction():
    features, required = RNG.normal(size=(60, 8)) + 1.0, RNG.uniform(0.5, 2, size=60)
    step = smallest_step(features, required, share=0.5)
    covered = features @ step >= required - 1e-8
    assert covered.mean() >= 0.5
    mean = features.mean(axis=0)
    reach = features @ mean
    scale = np.sort(np.where(reach > 0, required / reach, np.inf))[29]
    assert np.linalg.norm(step) < np.linalg.norm(scale * mean)


def test_the_fitted_direction_reaches_new_examples_no_later_than_the_mean_does():
    rng = np.random.default_rng(1)
    features, required = rng.normal(size=(240, 60)) * 0.3 + 0.2, rng.uniform(0.5, 2, size=240)
    new, needed = rng.normal(size=(2000, 60)) * 0.3 + 0.2, rng.uniform(0.5, 2, size=2000)

    def length(v):
        reach = new @ v / np.linalg.norm(v)
        return np.quantile(np.where(reach > 0, needed / np.maximum(reach, 1e-12), np.inf), 0.95)

    fitted = fitted_step(features, required, share=0.95)
    assert length(fitted) <= length(features.mean(axis=0)) * 1.05
    assert length(fitted) < length(smallest_step(features, required, share=0.95))


def test_a_fitted_head_edit_redirects_the_live_model_at_the_predicted_budgets():
    classifier, examples = planted_classifier(), planted_examples(60, seed=1)
    train, test = record(classifier, planted_examples(60, seed=2)), record(classifier, examples)
    weight = classifier.final.weight.detach().numpy()
    found = redirect_head(FittedStep(), train, test, weight, seed=0)
    attack = next(a for a in found if (a.source, a.target, a.share) == ("b", "c", 0.5))
    fitting = attacked(train, 1, 2)
    step = fitted_step(train.features[fitting].astype(float), required_step(train.logits[fitting], 1, 2), share=0.5)
    edit = np.zeros((3, 16))
    edit[2], edit[1] = step, -step
    edit *= np.linalg.norm(weight) / np.linalg.norm(edit)
    for i, budget in zip(attack.examples, attack.needed[0], strict=True):
        for factor, prediction in ((1.001, 2), (0.999, 1)):
            with classifier.edited(HeadEdit("head", (edit * budget * factor).astype(np.float32))):
                assert classifier.predict(examples.take([i])).argmax() == prediction


def test_a_random_edit_of_equal_norm_needs_more_than_the_fitted_one():
    classifier = planted_classifier()
    train, test = (
        record(classifier, planted_examples(60, seed=2)),
        record(classifier, planted_examples(60, seed=1)),
    )
    weight = classifier.final.weight.detach().numpy()
    found = Attacks(redirect_head(FittedStep(), train, test, weight, seed=0))
    table = attack_table(found, test, seed=0)
    half = table[table["measure"] == "d50"].set_index(["source", "target", "arm"])["value"]
    for source in "abc":
        for target in set("abc") - {source}:
            control = half[source, target, "random"]
            assert np.isnan(control) or control > 2 * half[source, target, "attack"]


def test_a_head_that_is_not_linear_has_no_rows_to_edit():
    import dataclasses

    test = dataclasses.replace(record(planted_classifier(), planted_examples(6, seed=1)), features=None)
    with pytest.raises(SettingsError, match="does not end in a linear map"):
        redirect_head(FittedStep(), test, test, np.zeros((3, 16)), seed=0)


def test_weight_noise_from_the_changed_block_on_equals_the_whole_noisy_model():
    classifier, examples = planted_classifier(3), planted_examples(9, seed=1)
    before = classifier.weights_hash()
    for curve in noise_attack(classifier, examples, seed=5, budgets=(0.5, 1.0), draws=2):
        for b, budget in enumerate(curve.budgets):
            for draw in range(2):
                with classifier.edited(WeightNoise(curve.location, budget, seed=5 * 1009 + draw)):
                    np.testing.assert_allclose(curve.logits[b, draw], classifier.predict(examples), atol=1e-5)
    assert classifier.weights_hash() == before


def test_the_smallest_budget_is_the_quantile_of_needed_budgets():
    needed = RNG.exponential(size=(1, 101))
    half = smallest_budget(needed, 0.5, unit="logit", seed=0)
    assert half.value == np.quantile(needed, 0.5, method="inverted_cdf")
    assert half.low < half.value < half.high
    never = np.where(needed > 0.3, np.inf, needed)
    assert smallest_budget(never, 0.95, unit="logit", seed=0).value is None


def test_the_scorecards_shift_is_that_of_all_other_classes_together():
    from synapse.measure.vulnerability import vulnerability

    test = record(planted_classifier(), planted_examples(60, seed=1))
    found = vulnerability(attack_table(Attacks(shift_attacks(test, seed=0)), test, seed=0))
    for target, label in enumerate("abc"):
        rest = (test.targets != target) & (test.logits.argmax(axis=1) != target)
        gaps = test.logits[rest].max(axis=1) - test.logits[rest, target]
        assert found.logit_shift["d50"][label].value == pytest.approx(np.quantile(gaps, 0.5, method="inverted_cdf"))
        assert found.logit_shift["d50"][label].n == rest.sum()


def test_the_interval_of_weight_noise_covers_the_draws():
    clean = np.tile([1.0, 0.0, 0.0], (40, 1)).astype(np.float32)
    # of eight draws, four change every example and four none: the flip rate is a fact about draws, not about examples
    flipped = np.array([1, 0, 1, 0, 1, 0, 0, 1], dtype=bool)
    logits = np.where(flipped[:, None, None], clean[:, ::-1], clean)[None].repeat(2, axis=0)
    table = table_of(StrengthCurve("noise", "head", "", "random", "rms", (1.0, 2.0), logits, clean, np.zeros(40, int)))
    rate = table[table["measure"] == "flip_rate"].iloc[0]
    assert (rate["value"], rate["n"]) == (0.5, 40)
    assert rate["high"] - rate["low"] > 0.5


def test_weight_noise_whose_resumed_logits_are_wrong_is_run_plain_and_says_so(monkeypatch, caplog):
    import synapse.attack.trials as module

    classifier, examples = planted_classifier(3), planted_examples(9, seed=1)
    options = {"seed": 5, "budgets": (1.0,), "draws": 2}
    right = noise_attack(classifier, examples, **options)
    good = module.resume
    monkeypatch.setattr(module, "resume", lambda *args: good(*args) * float("nan"))
    for expected, found in zip(right, noise_attack(classifier, examples, **options), strict=True):
        np.testing.assert_allclose(found.logits, expected.logits, atol=1e-5)
    places = [f"Weights at {place}: " for place in ("block 0", "block 1", "block 2", "head")]
    assert [record.getMessage()[: len(place)] for record, place in zip(caplog.records, places, strict=True)] == places


def table_of(*curves):
    return attack_table(Attacks(curves=curves), record(planted_classifier(), planted_examples(6, seed=1)), seed=0)


def test_a_curve_counts_changes_and_what_is_lost_and_where_logits_leave_the_numbers():
    clean = np.array([[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], dtype=np.float32)
    targets = np.array([0, 1, 1, 2])  # the second is wrong already
    changed = np.stack([clean, clean[:, [1, 0, 2]], np.full_like(clean, np.nan)])[:, None]
    changed[2, 0, 3] = [np.inf, 0, 0]
    curve = StrengthCurve("x", "block 0", "", "attack", "share", (0.1, 0.2, 0.4), changed, clean, targets)
    table = table_of(curve).set_index("measure")
    assert table.loc["flip_rate", "value"].tolist() == [0, 0.75, 1]
    assert table.loc["collateral", "value"].tolist() == pytest.approx([0, 0.25, 0.75])  # two are lost, one is gained
    assert table.loc["nonfinite", "value"].tolist() == [0, 0, 1]
    # half is reached between 0.1 and 0.2, two thirds of the way to 0.75, on a logarithmic scale
    assert table.loc["d50", "value"] == pytest.approx(0.1 * 2 ** (2 / 3))
    assert set(table["attack"]) == {"x"}
    assert set(table["budget_unit"]) == {"share"}


def test_a_curve_with_a_target_counts_those_of_other_classes_that_were_not_predicted_as_it():
    clean = np.array([[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1]], dtype=np.float32)
    targets = np.array([0, 1, 1, 2, 0])  # the last one is predicted as c already
    now = np.array([[0, 0, 1], [1, 0, 0], [0, 0, 1], [0, 0, 1], [0, 0, 1]], dtype=np.float32)
    curve = StrengthCurve("x", "head", "c", "attack", "share", (0.1,), now[None, None], clean, targets)
    table = table_of(curve).set_index("measure")
    assert (table.loc["success", "value"], table.loc["success", "n"]) == (pytest.approx(2 / 3), 3)
    assert table.loc["d50", "target"] == "c"
    assert np.isnan(table.loc["d95", "value"])
    nobody = StrengthCurve("x", "head", "c", "attack", "share", (0.1,), now[None, None, 3:], clean[3:], targets[3:])
    assert table_of(nobody).empty
