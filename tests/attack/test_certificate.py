"""What the certificate promises: no edit below it changes a prediction, and one at it does."""

import numpy as np
import pytest
from planted import planted_classifier, planted_examples
from scipy.optimize import minimize

from synapse.attack.base import attacked, broken_budget
from synapse.attack.certificate import certified_radii, certify_head, head_bounds, least_for_share, needed_norms
from synapse.attack.head import STEPS, redirect_head
from synapse.errors import SettingsError
from synapse.perturb.weights import HeadEdit
from synapse.recording import record
from synapse.types import Activations

RNG = np.random.default_rng(9)


@pytest.fixture(scope="module")
def splits():
    classifier = planted_classifier()
    return record(classifier, planted_examples(60, seed=2)), record(classifier, planted_examples(60, seed=1))


@pytest.fixture(scope="module")
def weight():
    return planted_classifier().head_weight().numpy()


@pytest.mark.parametrize("rows", [None, (0, 2), (1,)])
@pytest.mark.parametrize("norm", ["frobenius", "entry"])
def test_no_edit_below_the_radius_changes_a_prediction_and_the_smallest_one_attains_it(rows, norm):
    for _ in range(20):
        weight, h = RNG.normal(size=(4, 5)), RNG.normal(size=(8, 5))
        z = h @ weight.T
        radii, rivals = certified_radii(z, h, rows=rows, norm=norm)
        may = np.zeros((4, 1))
        may[list(range(4) if rows is None else rows)] = 1
        for i in range(8):
            y, c = z[i].argmax(), rivals[i]
            if np.isinf(radii[i]):
                assert not may.any() or (not may[y] and not may[np.arange(4) != y].any())
                continue
            random = RNG.normal(size=(200, 4, 5)) * may
            aimed = (np.eye(4)[[c]] - np.eye(4)[[y]]).T * h[i] * may  # the worst there is
            aimed = aimed if norm == "frobenius" else np.sign(aimed)
            for edit in (*random, aimed):
                size = np.linalg.norm(edit) if norm == "frobenius" else np.abs(edit).max()
                assert ((weight + edit * radii[i] * 0.999 / size) @ h[i]).argmax() == y
            assert ((weight + aimed * radii[i] * 1.001 / size) @ h[i]).argmax() == c


def test_the_radius_is_what_a_general_solver_finds():
    weight, h = RNG.normal(size=(3, 4)), RNG.normal(size=4)
    z = weight @ h
    radii, _ = certified_radii(z[None], h[None])
    found = []
    for c in np.delete(np.arange(3), z.argmax()):
        over = {"type": "ineq", "fun": lambda v, c=c: ((weight + v.reshape(3, 4)) @ h)[[c, z.argmax()]] @ [1, -1]}
        found.append(np.linalg.norm(minimize(lambda v: v @ v, np.zeros(12), constraints=[over], tol=1e-14).x))
    assert radii[0] == pytest.approx(min(found), rel=1e-5)


@pytest.mark.parametrize(("rows", "features"), [((0, 2), None), (None, (1, 3)), ((1, 2), (0, 1, 3)), ((0,), (2,))])
def test_what_an_edit_of_some_rows_and_features_needs_is_what_a_general_solver_finds(rows, features):
    rng = np.random.default_rng(3)
    weight, h = rng.normal(size=(4, 4)), rng.normal(size=(3, 4)).astype(np.float32)
    z, labels = (h @ weight.T).astype(np.float32), tuple("abcd")
    may = np.ix_(range(4) if rows is None else rows, range(4) if features is None else features)
    for i, says in enumerate(z.argmax(axis=1)):
        test = Activations(np.zeros((1, 1, 4), dtype=np.float32), z[[i]], np.array([says]), labels, "", features=h[[i]])
        for target in np.delete(np.arange(4), says).tolist():

            def ahead(v, i=i, target=target):
                edited = weight.copy()
                edited[may] += v.reshape(weight[may].shape)
                now = edited @ h[i].astype(float)
                return np.delete(now[target] - now, target)

            start, over = rng.normal(size=weight[may].size), {"type": "ineq", "fun": ahead}
            found = minimize(lambda v: v @ v, start, constraints=[over], tol=1e-9).x
            (needed,) = needed_norms(test, weight, int(says), target, rows=rows, features=features)
            assert np.isfinite(needed) == (ahead(found).min() > -1e-5)
            if np.isfinite(needed):
                assert needed * np.linalg.norm(weight) == pytest.approx(np.linalg.norm(found), rel=1e-3)


def test_no_attack_that_is_found_is_below_what_is_proved(splits, weight):
    train, test = splits
    attacks = [one for step in STEPS for one in redirect_head(step, train, test, weight, seed=0)]
    bounds = {(bound.source, bound.target, bound.share): bound.budget for bound in head_bounds(test, weight)}
    for rows in (None, "pair"):
        for one in attacks:
            source, target = test.labels.index(one.source), test.labels.index(one.target)
            radii = certify_head(test, weight, rows=(source, target) if rows else None).radii
            assert (one.needed >= radii[one.examples] * (1 - 1e-9)).all()
            assert (one.broken_at >= radii[one.others] * (1 - 1e-9)).all()
            for share in (0.5, 0.95):
                bound = bounds[one.source, one.target, share]
                for needed in one.needed:
                    assert least_for_share(needed, share) >= bound * (1 - 1e-9)


def test_the_live_model_keeps_its_predictions_below_the_radius_of_the_whole_set(splits, weight):
    _, test = splits
    classifier, examples = planted_classifier(), planted_examples(60, seed=1)
    certificate = certify_head(test, weight)
    i = int(certificate.radii.argmin())
    edit = np.zeros_like(weight)
    edit[certificate.rivals[i]], edit[test.predictions[i]] = test.features[i], -test.features[i]
    edit *= np.linalg.norm(weight) / np.linalg.norm(edit) * certificate.whole_set
    for factor, changed in ((0.999, 0), (1.001, 1)):
        with classifier.edited(HeadEdit("head", edit * factor)):
            now = classifier.predict(examples).argmax(axis=1)
        assert (now != test.predictions).sum() >= changed
        assert changed or (now == test.predictions).all()


def test_the_curve_bounds_what_any_one_edit_flips(splits, weight):
    _, test = splits
    certificate = certify_head(test, weight)
    budgets = np.geomspace(0.01, 3, 20)
    bound = certificate.flips_at_most(budgets)
    assert (np.diff(bound) >= 0).all()
    for _ in range(50):
        edit = RNG.normal(size=weight.shape)
        slopes = test.features @ (edit * np.linalg.norm(weight) / np.linalg.norm(edit)).T
        needed = broken_budget(test.logits, slopes)
        assert ((needed[:, None] <= budgets).mean(axis=0) <= bound).all()
    assert certificate.least_for(0.5) == np.quantile(certificate.radii, 0.5, method="inverted_cdf")
    assert certificate.flips_at_most(np.array([certificate.whole_set * 0.999]))[0] == 0


def test_with_the_bias_less_is_needed(splits, weight):
    _, test = splits
    without, with_bias = certify_head(test, weight), certify_head(test, weight, with_bias=True)
    h = np.linalg.norm(test.features.astype(float), axis=1)
    np.testing.assert_allclose(with_bias.radii, without.radii * h / np.sqrt(h**2 + 1))


def test_what_has_no_answer_has_none(splits, weight):
    import dataclasses

    _, test = splits
    radii, _ = certified_radii(np.array([[1.0, 0.0]]), np.zeros((1, 3)))
    assert np.isinf(radii).all()  # no feature, nothing to change
    assert np.isinf(certify_head(test.take(np.arange(0)), weight).whole_set)
    assert np.isnan(least_for_share(np.empty(0), 0.5))
    assert len(needed_norms(test.take(attacked(test, 0, 1)), weight, 1, 0)) == 0
    with pytest.raises(SettingsError, match=r"The rows \[7\] were asked for; the head has the rows 0 to 2"):
        certify_head(test, weight, rows=(7,))
    no_features = dataclasses.replace(test, features=None)
    for refused in (
        lambda: certify_head(no_features, weight),
        lambda: head_bounds(no_features, weight),
    ):
        with pytest.raises(SettingsError, match="nothing to certify"):
            refused()
