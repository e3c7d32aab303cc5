"""The tables of the cheapest attacks and of what to protect, as a reader sees them."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fabricated_run import change_json

from synapse.report import write_report
from synapse.report.attacks import PROTECTION_COLUMNS, cheapest_attacks, markdown, protections
from synapse.report.run import open_run

COLUMNS = "what location chosen draw protected of before after unit searched source target"
NORM, EDITS, FLIPS = "||dW||/||W||", np.inf, 400.0


def defence(*rows: tuple) -> pd.DataFrame:
    table = pd.DataFrame(rows, columns=COLUMNS.split())
    return table.assign(factor=table["after"] / table["before"])


TABLE = defence(
    ("features", "head", "energy", -1, 30, 32, 0.35, 3.6, NORM, EDITS, "spam", "ham"),
    *(("features", "head", "random order", d, 30 + d % 3, 32, 0.35, 3.6, NORM, EDITS, "a", "b") for d in range(10)),
    *(("features", "head", "random", d, 16, 32, 0.35, 0.5, NORM, EDITS, "spam", "ham") for d in range(10)),
    ("rows", "head", "dearest", -1, 2, 2, 0.35, np.inf, NORM, EDITS, "", ""),
    ("bits", "head, int8", "highest", -1, 1, 8, 1.0, 1.0, "bits", FLIPS, "spam", "ham"),
    ("bits", "head, int8", "highest", -1, 2, 8, 1.0, 1.0, "bits", FLIPS, "spam", "ham"),
    ("bits", "head, int8", "highest", -1, 3, 8, 1.0, 12.0, "bits", FLIPS, "ham", "spam"),
    *(("bits", "head, int8", "random", d, 3, 8, 1.0, 1.0 + d % 2, "bits", FLIPS, "spam", "ham") for d in range(10)),
    ("weights", "head, int8", "used first", -1, 1200, 2000, 80.0, np.inf, "bits", FLIPS, "", ""),
    ("weights", "head, int8", "random", 0, 1200, 2000, 80.0, np.inf, "bits", FLIPS, "", ""),
    ("weights", "head, int8", "random", 1, 1200, 2000, 80.0, 96.0, "bits", FLIPS, "ham", "spam"),
)


def test_every_protection_stands_beside_random_ones() -> None:
    features, rows, first, bits, weights = [tuple(row) for row in protections(TABLE)]

    amounts = ("30 of 32", "0.35 ‖ΔW‖ / ‖W‖", "3.60 ‖ΔW‖ / ‖W‖", "× 10.3", "spam → ham")
    named = ("features that the final map reads", "head", "largest on average")
    assert features == (*named, *amounts, "31 [30, 32] do as much")
    assert rows[3:] == ("2 of 2", "0.35 ‖ΔW‖ / ‖W‖", "impossible", "–", "–", "–")
    assert first[3:] == ("1 of 8", "1 bit", "1 bit", "× 1.0", "spam → ham", "–")
    named = ("bits of each of its weights", "head, int8", "the highest")
    assert bits == (*named, "3 of 8", "1 bit", "12 bits", "× 12.0", "ham → spam", "× 1.0 [× 1.0, × 2.0]")
    assert weights[3:8] == ("1,200 of 2,000", "80 bits", "none found in 400 bits", "none found", "–")
    assert weights[8] == "× 1.2 [× 1.2, none found]"
    assert protections(pd.DataFrame()) == []


def test_the_rows_are_a_table_in_markdown() -> None:
    head, line, *rows = markdown(protections(TABLE), PROTECTION_COLUMNS).splitlines()

    assert head == f"| {' | '.join(PROTECTION_COLUMNS)} |"
    assert line == f"|{' --- |' * len(PROTECTION_COLUMNS)}"
    assert rows[1].endswith("| impossible | – | – | – |")


def test_the_page_says_what_to_protect_where_it_was_tried(run_folder: Path) -> None:
    assert "What to protect" not in write_report(run_folder).read_text(encoding="utf-8")

    TABLE.to_parquet(run_folder / "tables" / "defence.parquet")
    page = write_report(run_folder).read_text(encoding="utf-8")

    assert '<h2 id="protect">What to protect</h2>' in page
    assert "<td>31 [30, 32] do as much</td>" in page
    assert "<td>none found in 400 bits</td>" in page


@pytest.mark.parametrize(("value", "shown"), [(1.0, "1 bit"), (88.0, "88 bits"), (1200.0, "1,200 bits")])
def test_one_bit_is_one_bit(run_folder: Path, value: float, shown: str) -> None:
    figure = {"value": value, "low": None, "high": None, "n": 20, "unit": "bits"}
    found = {"source": "spam", "target": "ham", "detail": "", "measure": "d95", "budget": figure}
    change_json(run_folder / "scorecard.json", ("vulnerability", "cheapest"), {"bit-flips": {"head": found}})

    (row,) = cheapest_attacks(open_run(run_folder))

    assert (row.what, row.which, row.size) == ("bits flipped", "spam → ham", shown)
