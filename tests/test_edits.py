"""Edits in words, and the rankings and examples that they need."""

import json

import numpy as np
import pytest
from planted import B_UNIT, LABELS, WIDTH, planted_classifier, planted_examples

from synapse.edits import Edit, parse_edit, rankings_for, read_ranking, references_for
from synapse.errors import RunFolderError, SettingsError
from synapse.perturb.activations import Mean, Noise, Scale, Zero
from synapse.ranking.base import Ranking
from synapse.report.run import open_run
from synapse.store import write_json, write_table
from synapse.sweeping.kinds import Kind
from synapse.types import Neurons


@pytest.fixture(scope="module")
def classifier():
    return planted_classifier()


def a_ranking(method="probeless", seed=0) -> Ranking:
    scores = (
        np.random.default_rng(seed).integers(0, 9, size=(2, 1 + len(LABELS), WIDTH)).astype(np.float64)
    )  # with ties
    return Ranking(method, scores, LABELS, source="of-train")


def write_run(folder, classifier, rankings, **changes):
    """Write as much of a run folder as its rankings take."""
    import pandas as pd

    folder.mkdir()
    manifest = {
        "format": 1,
        "status": "complete",
        "labels": list(classifier.labels),
        "n_layers": classifier.n_layers,
        "width": classifier.width,
        "components": {"residual": {"n_layers": classifier.n_layers, "width": classifier.width}},
        "model": {"hash": classifier.weights_hash()},
        "data": {"train": {"hash": "of-train"}},
        "settings": {},
    }
    write_json(folder / "manifest.json", manifest | changes)
    write_json(folder / "scorecard.json", {"format": 1})
    if rankings:
        write_table(folder, "ranking", pd.concat([ranking.to_frame() for ranking in rankings], ignore_index=True))
    return folder


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        ("zero", "layer=5,top=50,class=sqli", Edit(Kind("zero"), 5, "top", 50, label="sqli")),
        ("zero", "layer=0,bottom=10%", Edit(Kind("zero"), 0, "bottom", 0.1)),
        ("zero", "layer=0, random=0.25, scope=all", Edit(Kind("zero"), 0, "random", 0.25, scope="all")),
        ("zero", "layer=1,units=1,2,7-9,component=mlp", Edit(Kind("zero"), 1, "units", 0, (1, 2, 7, 8, 9), "", "mlp")),
        ("zero", "layer=1,units=all", Edit(Kind("zero"), 1, "units")),
        ("zero", "top=5,class=a,b,layer=2", Edit(Kind("zero"), 2, "top", 5, label="a,b")),
        ("zero", "units=3,component=pooler", Edit(Kind("zero"), 0, "units", 0, (3,), "", "pooler")),
        ("scale", "layer=2,units=4,factor=-0.5", Edit(Kind("scale", -0.5), 2, "units", 0, (4,))),
        ("scale", "layer=2,units=4,strength=2", Edit(Kind("scale", 2.0), 2, "units", 0, (4,))),
        ("noise", "layer=2,units=4", Edit(Kind("noise", 1.0), 2, "units", 0, (4,))),
        ("steer", "layer=2,units=4,strength=1,towards=b", Edit(Kind("steer", 1.0, "b"), 2, "units", 0, (4,))),
    ],
)
def test_an_edit_in_words_means_what_it_says(kind, text, expected):
    assert parse_edit(kind, text) == expected


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("zero", "layer=5,topp=3", "--e layer=5,topp=3: there is no 'topp'; .* Did you mean 'top'"),
        ("zero", "layer=5", "it names no neurons; one of top=, bottom=, random=, units= is needed"),
        ("zero", "layer=5,top=3,units=1", "it names top= and units=; one of"),
        ("zero", "top=3", "no layer is named; layer=0 is the first block"),
        ("zero", "layer=5,units=1,class=a", "class= says whose ranking is meant, so it goes with top= or bottom="),
        ("zero", "layer=x,top=3", "layer is 'x'; a whole number was expected"),
        ("zero", "layer=1,top=many", r"top is 'many'; a count \(50\), a share \(0.1\) or per cent \(10%\)"),
        ("zero", "layer=1,units=a", "units holds 'a'; indices such as 1,2,3 or 1-9, or all"),
        ("zero", "layer=1,units=9-1", "units holds '9-1', which ends before it begins; write 1-9"),
        ("zero", "layer=1,layer=2,top=1", "layer= stands there twice; give the option twice for two edits"),
        ("zero", "5", "'5' is no name=value; something like layer=5,top=50 was expected"),
        ("zero", "layer=1,top=1,component=mlps", "there is no component 'mlps'; .* Did you mean 'mlp'"),
        ("zero", "layer=1,top=1,scope=row", "there is no scope 'row'; there are readout"),
        ("zero", "layer=1,top=1,strength=2", "'zero' has no strength; leave it out"),
        ("scale", "layer=1,top=1", "the factor is missing; add factor=NUMBER"),
        ("steer", "layer=1,top=1,strength=1", "no class is named; add towards=CLASS"),
        ("zeros", "layer=1,top=1", "There is no intervention 'zeros'; .* Did you mean 'zero'"),
    ],
)
def test_wrong_words_get_one_clear_sentence(kind, text, message):
    with pytest.raises(SettingsError, match=message):
        parse_edit(kind, text, option="--e")


def test_neurons_are_those_of_the_ranking(classifier):
    ranking = a_ranking()
    for text, expected in (
        ("layer=1,top=5,class=b", ranking.top(5, layer=1, label="b")),
        ("layer=0,bottom=25%", ranking.bottom(4, layer=0)),
        ("layer=1,units=2,5-6", Neurons(1, (2, 5, 6))),
        ("layer=1,units=all", Neurons(1, tuple(range(WIDTH)))),
    ):
        assert parse_edit("zero", text).neurons(classifier, ranking, seed=0) == expected
    drawn = parse_edit("zero", "layer=1,random=6").neurons(classifier, None, seed=0)
    assert len(set(drawn.units)) == 6
    assert drawn != parse_edit("zero", "layer=1,random=6").neurons(classifier, None, seed=1)


def test_what_is_not_there_is_refused(classifier):
    with pytest.raises(
        SettingsError, match="top=3 asks for neurons by their rank, but no ranking is there; give the run"
    ):
        parse_edit("zero", "layer=1,top=3").neurons(classifier, None, seed=0)
    with pytest.raises(SettingsError, match="Layer 7 was asked for; the classifier has the layers 0 to 1"):
        parse_edit("zero", "layer=7,units=3").neurons(classifier, None, seed=0)
    with pytest.raises(
        SettingsError, match="'noise' needs numbers of other examples .*; give a labelled file with --ref"
    ):
        parse_edit("noise", "layer=1,units=3").on(Neurons(1, (3,)), None, seed=0)


def test_kinds_without_numbers_need_no_examples(classifier):
    neurons = Neurons(1, (3,))
    assert parse_edit("zero", "layer=1,units=3").on(neurons, None, seed=0) == Zero(neurons)
    made = parse_edit("scale", "layer=1,units=3,factor=2,scope=all").on(neurons, None, seed=0)
    assert made == Scale(neurons, scope="all", factor=2.0)


def test_means_and_deviations_are_those_of_the_reference_examples(classifier):
    examples = planted_examples(30, seed=5)
    edits = [parse_edit("mean", "layer=0,units=5"), parse_edit("noise", "layer=0,units=5,strength=3")]
    references = references_for(edits, examples, classifier)
    # Unit B of [CLS] counts the tokens of class b: 1 in a third of the examples, else 0.
    mean, noise = (edit.on(Neurons(0, (B_UNIT,)), references["residual"], seed=2) for edit in edits)
    assert isinstance(mean, Mean)
    assert mean.means == pytest.approx([1 / 3], abs=1e-5)
    assert isinstance(noise, Noise)
    assert noise.deviations == pytest.approx([np.sqrt(2 / 9)], abs=1e-5)
    assert (noise.strength, noise.seed) == (3.0, 2)
    assert references_for([parse_edit("zero", "layer=0,units=5")], examples, classifier) == {}


def test_a_ranking_is_read_as_it_was_written(tmp_path, classifier):
    written = [a_ranking("linear", 1), a_ranking("probeless", 2)]
    run = open_run(write_run(tmp_path / "run", classifier, written))
    for method, ranking in (("linear", written[0]), ("probeless", written[1]), (None, written[0])):
        read = read_ranking(run, classifier, method=method)
        assert (read.method, read.labels, read.source) == (ranking.method, LABELS, "of-train")
        for layer in range(2):
            for label in ("", *LABELS):
                assert read.order(layer, label).tolist() == ranking.order(layer, label).tolist()


def test_a_run_that_does_not_fit_is_refused(tmp_path, classifier):
    other = write_run(tmp_path / "other", classifier, [a_ranking()], model={"hash": "0123456789abcdef"})
    with pytest.raises(
        RunFolderError, match="weights hash to 0123456789ab, and this one's hash to .*; its neurons are"
    ):
        read_ranking(open_run(other), classifier)
    empty = write_run(tmp_path / "empty", classifier, [])
    with pytest.raises(RunFolderError, match="holds no ranking of 'residual'; run the study again"):
        read_ranking(open_run(empty), classifier)
    run = write_run(tmp_path / "run", classifier, [a_ranking()])
    with pytest.raises(SettingsError, match=r"has no ranking 'probles'; it has probeless. Did you mean 'probeless'"):
        read_ranking(open_run(run), classifier, method="probles")
    edits = [parse_edit("zero", "layer=1,top=3,component=mlp")]
    with pytest.raises(SettingsError, match="has no component 'mlp'; it has residual"):
        rankings_for(edits, run, classifier)


def test_rankings_are_read_only_where_neurons_are_asked_for_by_rank(tmp_path, classifier):
    run = write_run(tmp_path / "run", classifier, [a_ranking()])
    by_rank, by_name = parse_edit("zero", "layer=1,top=3"), parse_edit("zero", "layer=1,units=3")
    assert set(rankings_for([by_rank, by_name], run, classifier)) == {"residual"}
    assert rankings_for([by_name], run, classifier) == {}
    assert rankings_for([by_rank], None, classifier) == {}
    assert json.loads((run / "manifest.json").read_text())["status"] == "complete"
