"""One input before and under interventions, on a classifier whose logits are (1, 4 x #B, 4 x #C) by construction."""

import json

import numpy as np
import pytest
import torch
from planted import B_UNIT, C_UNIT, LABELS, WIDTH, PlantedClassifier
from scipy.special import softmax

from synapse.errors import SettingsError
from synapse.measure.intervals import clopper_pearson
from synapse.model.classifier import Classifier
from synapse.perturb.activations import Noise, Scale, Zero
from synapse.types import Neurons
from synapse.whatif import log_odds, random_sets, what_if

FILLER = 39
IDS = {"[CLS]": 0, "bad": 1, "cat": 2}


class WordPreprocess:
    """Turns words into ids; 'bad' is the token of class b, 'cat' that of class c, all others say nothing."""

    def __init__(self):
        self.seen = []

    def __call__(self, inputs):
        rows = [self.ids(item) for item in inputs]
        self.seen += list(inputs)
        longest = max(map(len, rows))
        # Padding is a filler too, so that the row behind [CLS], which is the last one, says nothing.
        return {"ids": torch.tensor([row + [FILLER] * (longest - len(row) + 1) for row in rows])}

    def lengths(self, inputs):
        return np.array([len(self.ids(item)) for item in inputs])

    def ids(self, item):
        words = item if isinstance(item, str) else " ".join(item)
        return [0, *(IDS.get(word, 7) for word in words.split())]


@pytest.fixture
def classifier():
    return Classifier.from_module(
        PlantedClassifier(1).eval(),
        preprocess=WordPreprocess(),
        labels=LABELS,
        sample=["a bad word", "one cat and one more word", "none at all", "a bad cat is here"],
    )


B = Neurons(0, (B_UNIT,))


def test_logits_before_and_after_are_those_that_the_model_is_built_for(classifier):
    result = what_if(classifier, "one bad and bad thing", [Zero(B)])
    assert result.before == pytest.approx([1, 8, 0], abs=1e-5)
    assert result.after == pytest.approx([1, 0, 0], abs=1e-5)
    assert (result.prediction_before, result.prediction_after, result.flipped) == ("b", "a", True)
    assert result.change == pytest.approx(-np.log(np.e + 1) - (8 - np.log(np.e + 1)), abs=1e-5)


def test_the_evidence_of_a_word_is_what_the_log_odds_lose_without_it(classifier):
    """Each 'bad' adds 4 to one logit and nothing to the others, so its evidence is 4; half of that at half the gain."""
    result = what_if(classifier, "one bad and bad thing", [Scale(B, factor=0.5)])
    assert [word.text for word in result.words] == ["one", "bad", "and", "bad", "thing"]
    assert result.evidence_before == pytest.approx([0, 4, 0, 4, 0], abs=1e-5)
    assert result.evidence_after == pytest.approx([0, 2, 0, 2, 0], abs=1e-5)
    assert result.moved["place"].tolist()[:2] == [1, 3]
    assert result.moved["change"].tolist() == pytest.approx([-2, -2, 0, 0, 0], abs=1e-5)
    p = softmax([1, 8, 0])[1], softmax([1, 4, 0])[1]
    assert result.moved["probability_before"][0] == pytest.approx(p[0] - p[1], abs=1e-6)


def test_a_random_set_flips_the_prediction_where_it_holds_the_planted_neuron(classifier):
    neurons = Neurons(0, (B_UNIT, 1, 2, 3))
    sets = random_sets(classifier, [neurons], draws=30, seed=4)
    hits = sum(B_UNIT in drawn.units for (drawn,) in sets)
    assert 0 < hits < 30
    result = what_if(classifier, "one bad thing", [Zero(neurons)], draws=30, seed=4)
    low, high = clopper_pearson(hits, 30)
    flips = result.control_flips
    assert (flips.value, flips.low, flips.high, flips.n) == (hits / 30, low, high, 30)
    assert result.as_far == hits


def test_random_sets_have_the_site_and_size_and_are_equal_for_equal_sets(classifier):
    other = Neurons(0, (1, 2))
    sets = random_sets(classifier, [B, other, B], draws=10, seed=0)
    assert len(set(sets)) > 5
    for first, second, third in sets:
        assert (len(first), len(second), first.layer) == (1, 2, 0)
        assert first == third
    assert sets == random_sets(classifier, [B, other, B], draws=10, seed=0)
    assert sets != random_sets(classifier, [B, other, B], draws=10, seed=1)


def test_interventions_act_together(classifier):
    result = what_if(classifier, "bad cat and cat", [Zero(Neurons(0, (C_UNIT,))), Scale(B, factor=-1.0)])
    assert result.before == pytest.approx([1, 4, 8], abs=1e-5)
    assert result.after == pytest.approx([1, -4, 0], abs=1e-5)


def test_noise_is_the_same_when_a_word_is_left_out(classifier):
    """So a word that says nothing has no evidence under noise either."""
    result = what_if(classifier, "one bad and thing", [Noise(B, strength=1.0, deviations=(2.0,), seed=3)])
    assert abs(result.after[1] - result.before[1]) > 0.1
    assert result.after[1] - result.without_after[:, 1] == pytest.approx([0, 4, 0, 0], abs=1e-4)


def test_there_is_no_control_where_all_units_are_edited(classifier):
    result = what_if(classifier, "one bad thing", [Zero(Neurons(0, tuple(range(WIDTH))))])
    assert len(result.controls) == 0
    assert result.control_flips.value is None
    assert result.notes == ("There is no random control: all units are edited, and no other set has that size.",)


def test_the_model_comes_back(classifier):
    before = classifier.weights_hash(), classifier.predict(["one bad thing"])
    what_if(classifier, "one bad thing", [Zero(B)])
    assert classifier.weights_hash() == before[0]
    assert (classifier.predict(["one bad thing"]) == before[1]).all()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in classifier.module.modules())


@pytest.mark.parametrize(
    ("text", "mask", "expected"),
    [
        ("a bad cat", None, ["bad cat", "a cat", "a bad"]),
        ("a bad cat", "[MASK]", ["[MASK] bad cat", "a [MASK] cat", "a bad [MASK]"]),
        ("id=1' OR", None, ["=1' OR", "id1' OR", "id=' OR", "id=1 OR", "id=1'"]),
        ("a\nbad", None, ["bad", "a"]),
        ("猫は bad", None, ["は bad", "猫 bad", "猫は"]),
        (("a bad", "cat"), None, [("bad", "cat"), ("a", "cat"), ("a bad", "")]),
    ],
)
def test_words_are_left_out_one_at_a_time(classifier, text, mask, expected):
    classifier.preprocess.seen.clear()
    result = what_if(classifier, text, [Zero(B)], mask=mask)
    assert set(classifier.preprocess.seen) == {text, *expected}
    assert len(result.words) == len(expected)
    for word in result.words:
        whole = text if isinstance(text, str) else text[word.part]
        assert whole[word.start : word.end] == word.text


def test_a_long_string_is_taken_letter_by_letter_and_a_long_text_in_groups(classifier):
    assert [w.text for w in what_if(classifier, "ACGT" * 10, [Zero(B)]).words] == list("ACGT" * 10)
    long = what_if(classifier, " ".join(f"w{i}" for i in range(250)), [Zero(B)])
    assert len(long.words) == 100
    assert long.words[0].text == "w0 w1 w2"
    assert long.notes == ("The text has 250 words; neighbours are left out together, in 100 groups.",)


def test_of_other_inputs_than_texts_nothing_is_left_out():
    from planted import planted_classifier, planted_examples

    ids = planted_examples(3, seed=1).inputs
    result = what_if(planted_classifier(), ids[1], [Zero(Neurons(1, (B_UNIT,)))])
    assert result.flipped
    assert len(result.moved) == 0
    assert result.notes == ("Words are left out of texts and pairs of texts; of arrays nothing is.",)


def test_a_single_word_is_not_left_out(classifier):
    result = what_if(classifier, "bad", [Zero(B)])
    assert result.flipped
    assert result.notes == ("The text is a single word, so there is none to leave out.",)


def test_everything_can_be_written_as_json(classifier):
    result = what_if(classifier, "one bad thing", [Zero(B)])
    found = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert found["before"]["prediction"] == "b"
    assert found["after"]["logits"]["b"] == pytest.approx(0, abs=1e-5)
    assert sum(found["after"]["probabilities"].values()) == pytest.approx(1)
    assert found["flipped"] is True
    assert found["control"]["draws"] == 20
    assert found["words"]["rows"][0]["word"] == "bad"
    assert found["interventions"][0]["kind"] == "zero"


def test_log_odds_are_those_of_the_softmax():
    logits = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    p = softmax(logits.astype(np.float64), axis=1)[:, 2]
    assert log_odds(logits, 2) == pytest.approx(np.log(p / (1 - p)))
    assert log_odds(np.array([3.0, 100.0]), 1) == pytest.approx(97)


def test_wrong_calls_get_one_clear_sentence(classifier):
    with pytest.raises(SettingsError, match="No intervention was given; one or more were expected"):
        what_if(classifier, "one bad thing", [])
    with pytest.raises(SettingsError, match="The seed is -1; 0 or more was expected"):
        what_if(classifier, "one bad thing", [Zero(B)], seed=-1)
    with pytest.raises(SettingsError, match="1 random controls were given; 10 or more say something about chance"):
        what_if(classifier, "one bad thing", [Zero(B)], controls=[[Zero(B)]])
    with pytest.raises(SettingsError, match="9 random draws were asked for; 10 or more say something about chance"):
        what_if(classifier, "one bad thing", [Zero(B)], draws=9)
    with pytest.raises(SettingsError, match="Layer 3 was asked for"):
        what_if(classifier, "one bad thing", [Zero(Neurons(3, (1,)))])


def test_with_the_whole_readout_gone_only_the_biases_of_a_real_head_speak(shared):
    """BERT's pooler is tanh(W h + b): with h = 0 the logits are those of tanh(b), whatever the text."""
    classifier = Classifier.from_pretrained(shared / "models" / "tiny-http")
    module = classifier.module
    with torch.no_grad():
        expected = module.classifier(torch.tanh(module.bert.pooler.dense.bias)).numpy()
    last = classifier.n_layers - 1
    whole = Neurons(last, tuple(range(classifier.width)))
    result = what_if(classifier, "/item.jsp?id=1' OR 1=1 --", [Zero(whole)])
    assert result.prediction_before == "sqli"
    assert result.after == pytest.approx(expected, abs=1e-5)
    assert np.abs(result.evidence_after).max() < 1e-5 < np.abs(result.evidence_before).max()
