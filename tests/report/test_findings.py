from pathlib import Path

import pytest
from fabricated_run import UNUSED, N, build_run, change_json, figure

from synapse.report import summary_lines
from synapse.report.findings import key_numbers, resupplied
from synapse.report.run import open_run
from synapse.report.words import blocks, fraction, measured, number
from synapse.types import Figure


def set_headroom(run: Path, scope: str, layer: int, value: float) -> None:
    change_json(run / "scorecard.json", ["stability", "headroom", scope, str(layer)], figure(value))


def test_five_sentences_are_made_from_the_numbers(run_folder: Path) -> None:
    lines = summary_lines(run_folder)

    assert len(lines) == 5
    assert lines[0] == (
        "The unedited classifier has an accuracy of 0.90 [0.88, 0.92], n = 1,900, where always naming the "
        "most frequent class gets 0.40; its weakest class is “<script>alert(1)</script>” with a recall of "
        "0.85 [0.81, 0.89], n = 60."
    )


def test_an_unharmed_row_where_all_rows_matter_is_called_resupply(run_folder: Path) -> None:
    sentence = summary_lines(run_folder)[1]

    assert resupplied(open_run(run_folder)) == [0, 1]
    assert sentence == (
        "At blocks 0 and 1 ablation of the readout row ([CLS]) alone shows re-supply, not redundancy: "
        "losing the whole row costs no accuracy that can be told from zero (at most 0.01 [−0.03, 0.05], n "
        "= 200), while losing all rows costs at least 0.60 [0.56, 0.64], n = 200, because later blocks "
        "read the answer again from the other tokens."
    )


def test_units_inside_a_block_that_the_other_rows_make_up_for_are_not_called_redundant(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run", components={"residual": (3, 64), "mlp": (3, 256)}, model={"readout": "last"})

    sentence = summary_lines(run, "mlp")[1]

    assert sentence == (
        "At blocks 0 and 1 losing the hidden feed-forward units at the readout row (the last that is no padding) costs "
        "no accuracy that can be told from zero (at most 0.01 [−0.04, 0.04], n = 200), while losing the hidden "
        "feed-forward units in all rows costs at least 0.30 [0.26, 0.34], n = 200: the other rows make up for it, so "
        "the first loss alone says nothing about redundancy."
    )


def test_where_the_head_reads_every_row_nothing_is_called_resupply(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run", model={"readout": "mean"})

    lines = summary_lines(run)

    assert resupplied(open_run(run)) == []
    assert lines[1] == (
        "At blocks 0 and 1 losing all rows (all that are no padding) costs no accuracy that can be told from zero (at "
        "most 0.01 [−0.03, 0.05], n = 200); all rows are lost at once, so this is no re-supply."
    )
    assert lines[2].startswith("From relative depth 1.00 on all rows carry the decision: losing all rows at block 2")
    assert "readout row" not in " ".join(lines)


def test_several_readout_rows_are_named_as_such(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run", model={"readout": "first-two"})

    assert summary_lines(run)[1].startswith("At blocks 0 and 1 losing the readout rows (the first two) costs no")


def test_the_input_of_the_final_map_has_no_blocks_and_no_rows(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run", components={"residual": (3, 64), "pooler": (1, 64)})

    lines = summary_lines(run, "pooler")

    assert lines[1].startswith("Nothing comes after the input of the final linear map")
    assert lines[2].startswith("Losing the input of the final linear map costs 0.50 [0.46, 0.54], n = 200; 25 %")
    assert "block" not in " ".join(lines)
    assert "readout" not in " ".join(lines)
    assert "Commitment depth" not in {card.name for card in key_numbers(open_run(run, "pooler"))}


def test_sentences_on_the_whole_model_stand_with_the_first_component(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run", components={"heads": (3, 64), "mlp": (3, 64)})

    assert len(summary_lines(run)) == 5
    assert len(summary_lines(run, "mlp")) == 4
    assert "Smallest redirect" in {card.name for card in key_numbers(open_run(run))}
    assert "Smallest redirect" not in {card.name for card in key_numbers(open_run(run, "mlp"))}


def test_a_row_that_matters_at_every_block_is_no_resupply(run_folder: Path) -> None:
    for layer in (0, 1):
        set_headroom(run_folder, "readout", layer, 0.2)

    assert resupplied(open_run(run_folder)) == []
    assert summary_lines(run_folder)[1].startswith(
        "Every block needs the readout row: losing it once costs at least 0.20"
    )


def test_a_block_that_nothing_depends_on_is_not_called_resupply(run_folder: Path) -> None:
    for layer in (0, 1):
        set_headroom(run_folder, "all", layer, 0.05)  # the interval lies above zero, but the loss is small

    assert resupplied(open_run(run_folder)) == []
    assert "cannot be told apart" in summary_lines(run_folder)[1]


def test_without_the_scope_of_all_rows_nothing_is_called_redundant(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run", scopes=("readout",))

    assert "may be re-supply and is no evidence of redundancy" in summary_lines(run)[1]


@pytest.mark.parametrize(
    ("quality", "verdict"),
    [
        (0.1, "removing ranked units costs more than removing random ones"),
        (0.01, "the ranking cannot be told from a random order"),
        (-0.1, "the ranking misleads"),
    ],
)
def test_a_ranking_is_judged_against_random_units(run_folder: Path, quality: float, verdict: str) -> None:
    keys = ["stability", "ordering_quality", "readout", "2"]
    change_json(run_folder / "scorecard.json", keys, figure(quality))

    assert verdict in summary_lines(run_folder)[2]


TWO = ("cumulative-mass", "probeless")


def test_the_most_faithful_of_several_rankings_is_named_with_its_lead(tmp_path: Path) -> None:
    sentence = summary_lines(build_run(tmp_path / "run", methods=TWO))[3]

    assert sentence == (
        "Of 2 rankings probeless is the most faithful: removing the units that it ranks highest costs more of what "
        "there is to lose than removing random ones, by 0.23 [0.18, 0.28], n = 200 (all rows, this block; mean over "
        "the blocks where there is something to lose); the next, cumulative-mass, costs less by 0.10 [0.05, 0.15], "
        "n = 200."
    )


def test_a_ranking_that_leads_by_nothing_sure_is_not_called_better_than_the_next(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run", methods=TWO)
    change_json(run / "scorecard.json", ["faithfulness", "best_overall", "all", "lead"], figure(0.02))

    sentence = summary_lines(run)[3]

    assert "it cannot be told from cumulative-mass, the next (lead 0.02 [−0.02, 0.06], n = 200)." in sentence


def test_where_the_best_ranking_is_no_better_than_chance_none_is_called_faithful(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run", methods=TWO)
    change_json(run / "scorecard.json", ["faithfulness", "overall", "all", "probeless"], figure(0.01))

    sentence = summary_lines(run)[3]

    assert sentence.startswith("None of 2 rankings can be told from a random order: removing the units that the best, ")
    assert "does not beyond doubt cost more of what there is to lose" in sentence


def drawn_run(path: Path, **shape: object) -> Path:
    return build_run(path, rank_draws=50, **shape)  # type: ignore[arg-type]


def test_a_ranking_that_was_made_again_is_said_to_be_stable_or_not(tmp_path: Path) -> None:
    sentence = summary_lines(drawn_run(tmp_path / "run"))[3]

    assert sentence == (
        "Ranked again by cumulative-mass on 50 draws of the training examples, the highest tenth of the units comes "
        "out the same in part at block 2: Kuncheva's index is 0.60 [0.57, 0.63] (1: always the same; 0.16: as units "
        "that are all noise would), and 4 of 6 units are there in 95 % of the draws or more; it is lowest at block 0, "
        "0.40."
    )


@pytest.mark.parametrize(
    ("index", "words"),
    [
        (0.9, "nearly the same"),
        (0.3, "mostly different"),
        (0.18, "no more alike than noise would"),  # its interval begins at 0.15
    ],
)
def test_how_much_alike_rankings_are_is_said_beside_what_noise_would_give(
    tmp_path: Path, index: float, words: str
) -> None:
    run = drawn_run(tmp_path / "run")
    change_json(run / "scorecard.json", ["rank_stability", "kuncheva", "2"], figure(index, 0.03))

    assert f"comes out {words} at block 2" in summary_lines(run)[3]


def test_a_ranking_without_an_order_has_no_sentence_on_its_stability(tmp_path: Path) -> None:
    run = drawn_run(tmp_path / "run", n_layers=1)
    change_json(run / "scorecard.json", ["rank_stability", "kuncheva", "0"], UNUSED)

    assert not [line for line in summary_lines(run) if "Ranked again" in line]


def test_the_redirect_that_is_named_is_the_smallest_one(run_folder: Path) -> None:
    keys = ["vulnerability", "head_edit", "d50", "spam", "ham"]
    change_json(run_folder / "scorecard.json", keys, figure(0.003, 0.001))

    assert "turns half of “spam” into “ham” is 0.003 of the norm of its weights" in summary_lines(run_folder)[4]


@pytest.mark.parametrize(
    "section", ["clean", "stability", "faithfulness", "redundancy", "specialisation", "vulnerability"]
)
def test_a_missing_section_costs_its_sentences_only(tmp_path: Path, section: str) -> None:
    run = build_run(tmp_path / "run", methods=TWO)
    change_json(run / "scorecard.json", [section], ...)

    assert 4 <= len(summary_lines(run)) <= 6


def test_an_unused_place_never_becomes_a_key_number(run_folder: Path) -> None:
    change_json(run_folder / "scorecard.json", ["redundancy", "removable", "readout", "2", "value"], None)
    change_json(run_folder / "scorecard.json", ["redundancy", "removable", "all"], {})

    assert "Removable share" not in {card.name for card in key_numbers(open_run(run_folder))}


def test_numbers_are_written_as_a_paper_writes_them() -> None:
    assert measured(Figure(0.891, 0.858, 0.919, 1900, "accuracy")) == "0.89 [0.86, 0.92], n = 1,900"
    assert measured(Figure(None, None, None, N, "", "not used here")) == "not used here"
    assert [number(x) for x in (-0.031, -0.001, 0.0, 1234.5, 0.0042, None)] == [
        "−0.03",
        "−0.001",
        "0.00",
        "1,234.50",
        "0.004",
        "–",
    ]
    assert [fraction(x) for x in (0.005, 0.25, 1.0)] == ["0.5 %", "25 %", "100 %"]
    assert [blocks(x) for x in ([3], [0, 1], [0, 1, 2], [0, 2, 5])] == [
        "block 3",
        "blocks 0 and 1",
        "blocks 0 to 2",
        "blocks 0, 2 and 5",
    ]
