import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from fabricated_run import as_before_components, build_run, change_json

from synapse.report import write_report
from synapse.report.figures import headroom
from synapse.report.html import TopUnit, figures_json, judged_rankings, top_units, unbroken
from synapse.report.run import open_run


class Page(HTMLParser):
    """Collects the elements of a page, its visible text and the text of its scripts."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: list[str] = []
        self._inside = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""
        self.text += "" if tag in ("code", "em", "strong", "span") else " "

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text += data


def test_the_report_is_one_file_in_the_run_folder(run_folder: Path) -> None:
    before = {path.name for path in run_folder.iterdir()}

    path = write_report(run_folder)

    assert path == run_folder / "report.html"
    assert {path.name for path in run_folder.iterdir()} == before | {"report.html"}


def test_the_report_goes_where_it_is_told(run_folder: Path, tmp_path: Path) -> None:
    path = write_report(run_folder, tmp_path / "deep" / "page.html")

    assert path == tmp_path / "deep" / "page.html"
    assert path.is_file()


def test_the_page_refers_to_nothing_outside_itself(run_folder: Path) -> None:
    page = Page(write_report(run_folder))

    references = [a[key] for _, a in page.elements for key in ("src", "href", "action", "data") if key in a]
    assert all(reference is not None and reference.startswith("#") for reference in references)
    assert not [tag for tag, _ in page.elements if tag in ("link", "iframe", "img", "object", "base")]
    policy = next(a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_the_plotting_library_is_there_once(run_folder: Path) -> None:
    page = Page(write_report(run_folder))

    assert sum("plotly.js v" in script[:200] for script in page.scripts) == 1


def test_names_from_the_user_are_text_and_never_markup(run_folder: Path) -> None:
    page = Page(write_report(run_folder))

    assert "A <b>made-up</b> run" in page.text
    assert "“<script>alert(1)</script>”" in page.text
    assert "alert(1)" not in "".join(script for script in page.scripts if "plotly.js v" not in script[:200]).replace(
        "&lt;script&gt;alert(1)&lt;/script&gt;", ""
    )
    assert not [tag for tag, _ in page.elements if tag == "b"]


def test_a_script_element_cannot_be_ended_by_its_data(run_folder: Path) -> None:
    change_json(run_folder / "scorecard.json", ["stability", "headroom", "all", "0", "note"], "</script>")
    panel = headroom(open_run(run_folder))

    text = str(figures_json(panel))

    assert "<" not in text
    assert json.loads(text).keys() == {""}


def test_the_page_says_what_was_done_with_the_manifests_numbers(run_folder: Path) -> None:
    text = " ".join(Page(write_report(run_folder)).text.split())

    for part in (
        "3 blocks of 64 units · 3 classes · 1,900 test examples · 2026-01-02",
        "for 5,000 examples of a split kept for choosing units (train.csv)",
        "except that 3 inputs stand in both splits",
        "The examples of the sweep are a sample of the test split.",
        "What is not claimed",
        "parameters 1,234,567",
        "sweep.scopes readout, all",
        "identity edit changes nothing bitwise",
    ):
        assert part in text


def words_of(path: Path) -> str:
    return " ".join(Page(path).text.split())


def test_one_component_makes_one_page_that_names_it_and_links_nowhere(run_folder: Path) -> None:
    page = Page(write_report(run_folder))

    assert "A <b>made-up</b> run residual: the output of each block" in " ".join(page.text.split())
    assert not [a for _, a in page.elements if a.get("class") == "pages"]


def test_a_folder_from_before_components_makes_the_same_page(run_folder: Path) -> None:
    now = write_report(run_folder).read_text(encoding="utf-8")

    assert write_report(as_before_components(run_folder)).read_text(encoding="utf-8") == now


def test_every_component_has_a_page_and_all_pages_link_to_each_other(tmp_path: Path) -> None:
    shapes = {"residual": (2, 64), "mlp": (2, 256), "pooler": (1, 64)}
    run = build_run(tmp_path / "run", components=shapes)

    first = write_report(run)

    names = {"report.html", "report-mlp.html", "report-pooler.html"}
    assert first.name == "report.html"
    assert {path.name for path in run.glob("*.html")} == names
    for name in names:
        page = Page(run / name)
        links = {a["href"] for tag, a in page.elements if tag == "a" and not (a["href"] or "").startswith("#")}
        assert links == names - {name}
    text = words_of(run / "report-mlp.html")
    assert "mlp: the hidden units of each block's feed-forward network Model made-up · 2 blocks of 256 hidden" in text


def test_pages_of_components_stand_beside_the_one_that_is_asked_for(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run", components={"mlp": (2, 64), "heads": (2, 64)}, model={"n_heads": 4})

    write_report(run, tmp_path / "out" / "my #1.html")

    assert {path.name for path in (tmp_path / "out").iterdir()} == {"my #1.html", "my #1-heads.html"}
    assert 'href="my%20%231.html"' in (tmp_path / "out" / "my #1-heads.html").read_text(encoding="utf-8")
    assert "16 units each: unit 16 is the first of head 1." in words_of(tmp_path / "out" / "my #1-heads.html")


def test_what_is_of_the_whole_model_is_told_on_the_first_page_alone(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run", components={"residual": (2, 64), "attention": (2, 64)})
    first = words_of(write_report(run))
    further = words_of(run / "report-attention.html")

    for title in ("How small an edit of the head redirects a class", "Smallest redirect"):
        assert title in first
        assert title not in further
    assert "they stand on the page of residual ." in further.replace("residual.", "residual .")


@pytest.mark.parametrize(
    ("component", "readout", "recorded", "scopes"),
    [
        (
            "residual",
            "last",
            "Its state at the readout row, the token row that the head reads (the last that is no padding), was",
            "An edit acts on the readout row at one block, on the readout row at that block and all later ones",
        ),
        (
            "residual",
            "mean",
            "Its state, averaged over the token rows that the head reads (all that are no padding), was recorded",
            "an edit of the readout rows and an edit of all rows are the same, and stand here once",
        ),
        (
            "mlp",
            "first-two",
            "The values of its hidden feed-forward units, averaged over the readout rows, the token rows that the head "
            "reads (the first two), were recorded in each block",
            "Where a residual connection passes by these units",
        ),
        (
            "pooler",
            "first",
            "The input of its final linear map, which gives the logits, was recorded",
            "all scopes are the same edit, which stands here once",
        ),
    ],
)
def test_the_method_is_told_for_the_component_and_the_rows_that_were_read(
    tmp_path: Path, component: str, readout: str, recorded: str, scopes: str
) -> None:
    layers = 1 if component == "pooler" else 2
    run = build_run(tmp_path / "run", components={component: (layers, 64)}, model={"readout": readout})

    text = words_of(write_report(run))

    assert recorded in text
    assert scopes in text
    assert ("[CLS]" in text) == (readout == "first")


def test_the_page_says_what_was_found_in_the_model_and_done_to_it(run_folder: Path) -> None:
    blocks = [f"encoder.layer.{layer}" for layer in range(12)]
    found = {
        "readout": "mean-but-first",
        "n_heads": 8,
        "sites": {"residual": blocks, "mlp": ["block.down"] * 3},
        "missing": {"attention": "no module projects <what> was mixed"},
        "notes": ["the weights are stored as float16 and run as float32"],
        "pads": False,
    }
    for name, value in found.items():
        change_json(run_folder / "manifest.json", ["model", name], value)

    text = words_of(write_report(run_folder))

    for part in (
        "readout mean-but-first: the mean of all rows that are no padding, the first left out",
        "attention heads of a block 8",
        "residual output of encoder.layer.0, encoder.layer.1 … encoder.layer.11 (12)",
        "mlp input of block.down (3 calls)",
        "attention not found: no module projects <what> was mixed",
        "The weights are stored as float16 and run as float32. Examples of unequal length never share a batch, because "
        "padding would move the logits.",
    ):
        assert part in text


def test_every_figure_has_a_caption_and_every_missing_one_a_sentence(run_folder: Path) -> None:
    (run_folder / "tables" / "sweep.parquet").unlink()

    page = Page(write_report(run_folder))

    tags = [tag for tag, _ in page.elements]
    assert tags.count("figure") == 13  # twelve panels and the table of units
    assert tags.count("figcaption") == 8
    assert page.text.count("The run folder has no sweep table with ranked units. This figure is left out.") == 2


@pytest.mark.parametrize("key", ["model", "data", "sweep", "versions", "settings", "timings", "created", "title"])
def test_a_thin_manifest_still_makes_a_page(run_folder: Path, key: str) -> None:
    change_json(run_folder / "manifest.json", [key], ...)

    assert write_report(run_folder).stat().st_size > 1_000_000


def test_an_empty_scorecard_still_makes_a_page(run_folder: Path) -> None:
    (run_folder / "scorecard.json").write_text('{"format": 1}')
    for table in (run_folder / "tables").iterdir():
        table.unlink()

    text = Page(write_report(run_folder)).text

    assert "The scorecard holds no figures to make sentences of." in text
    assert "The run folder has no ranking table. This table is left out." in text


def test_a_table_says_which_of_several_rankings_is_best_at_each_block_and_over_all(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run", methods=("cumulative-mass", "probeless"))

    rows = judged_rankings(open_run(run))
    text = words_of(write_report(run))

    assert [row.place for row in rows] == ["mean of all blocks", "block 0", "block 1", "block 2"]
    assert [row.best for row in rows] == [1, 0, 1, 1]
    assert rows[1].qualities == ("0.20 [0.15, 0.25]", "0.10 [0.05, 0.15]")
    assert rows[1].lead == "0.10 [0.05, 0.15], n = 200 before probeless"
    assert "Which ranking is best here block cumulative-mass probeless the best leads by mean of all blocks" in text
    assert "The first ranking was then swept in full, and the others at a few sizes" in text


def test_two_rankings_that_cannot_be_told_apart_are_said_to_be_so(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run", methods=("cumulative-mass", "probeless"))
    change_json(run / "scorecard.json", ["faithfulness", "best", "all", "2", "lead", "low"], -0.01)

    last = judged_rankings(open_run(run))[-1]

    assert last.lead == "0.20 [−0.01, 0.25], n = 200 before cumulative-mass, not told apart"


def test_a_block_without_anything_to_lose_says_so_in_the_table(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run", methods=("cumulative-mass", "probeless"))
    unused = {"value": None, "low": None, "high": None, "n": 9, "unit": "", "note": "not used here"}
    qualities = dict.fromkeys(("cumulative-mass", "probeless"), unused)
    change_json(run / "scorecard.json", ["faithfulness", "quality", "all", "0"], qualities)
    change_json(run / "scorecard.json", ["faithfulness", "best", "all", "0"], ...)

    first = judged_rankings(open_run(run))[1]

    assert (first.qualities, first.best, first.lead) == (("not used here",) * 2, None, "–")


def test_one_ranking_alone_has_no_table_of_the_best(run_folder: Path) -> None:
    assert judged_rankings(open_run(run_folder)) == []
    text = words_of(write_report(run_folder))
    assert "Which ranking is best" not in text
    assert "The first ranking was then judged in the live model" in text


def test_top_units_are_the_first_ten_of_each_ranking(run_folder: Path) -> None:
    found = top_units(open_run(run_folder))

    assert len(found) == 3 * 4  # blocks; all classes and three of them
    first = found[0]
    assert (first.layer, first.label, len(first.units)) == (0, "all classes", 10)
    assert first.units[:2] == (TopUnit(0, "1.000"), TopUnit(7, "0.500"))


def test_units_of_a_ranking_that_was_made_again_stand_with_the_places_they_took(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run", methods=("cumulative-mass", "probeless"), rank_draws=50)

    found = top_units(open_run(run))
    text = words_of(write_report(run))

    assert [unit.ranks for unit in found[0].units[:4]] == ["1–4", "1–5", "1–6", "2–7"]
    assert not any(unit.ranks for row in found if row.method == "probeless" for unit in row.units)
    assert "was made again on 50 draws of the examples that chose the units" in text
    assert "the places that it took in 95 % of them" in text
    assert "Would the ranking come out the same tomorrow?" in text


def test_a_page_without_draws_tells_of_none(run_folder: Path) -> None:
    text = words_of(write_report(run_folder))

    assert "was made again on" not in text
    assert "places that it took" not in text


def test_a_number_and_its_interval_stay_on_one_line() -> None:
    assert unbroken("x 0.89 [0.86, 0.92], n = 1,900") == "x 0.89 [0.86,\u00a00.92], n\u00a0=\u00a01,900"
