import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from fabricated_run import change_json

from synapse.report import write_report
from synapse.report.figures import headroom
from synapse.report.html import figures_json, top_units, unbroken
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


def test_every_figure_has_a_caption_and_every_missing_one_a_sentence(run_folder: Path) -> None:
    (run_folder / "tables" / "sweep.parquet").unlink()

    page = Page(write_report(run_folder))

    tags = [tag for tag, _ in page.elements]
    assert tags.count("figure") == 10  # nine panels and the table of units
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


def test_top_units_are_the_first_ten_of_each_ranking(run_folder: Path) -> None:
    found = top_units(open_run(run_folder))

    assert len(found) == 3 * 4  # blocks; all classes and three of them
    first = found[0]
    assert (first.layer, first.label, len(first.units)) == (0, "all classes", 10)
    assert first.units[:2] == ((0, "1.000"), (7, "0.500"))


def test_a_number_and_its_interval_stay_on_one_line() -> None:
    assert unbroken("x 0.89 [0.86, 0.92], n = 1,900") == "x 0.89 [0.86,\u00a00.92], n\u00a0=\u00a01,900"
