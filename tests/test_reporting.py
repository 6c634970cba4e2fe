"""Tables of records, and the colouring of continuations."""

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats

from hyperfitting.errors import UserError
from hyperfitting.metrics.uncertainty import bootstrap_mean
from hyperfitting.reporting import colouring, report, tables
from hyperfitting.reporting.sweeps import SweepRecords
from tests.records import a_sweep, record

HOSTILE = "<script>alert('x')</script> & \"quoted\" | pipe"


class Reader(HTMLParser):
    """What a browser would see: the tags, and the text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_colouring_is_escaped_and_loses_no_text() -> None:
    pieces = [HOSTILE, " b", " c"] * 4
    reader = Reader()
    reader.feed(colouring.html(pieces, [1, 2, 3] * 4))
    assert reader.text == "".join(pieces)
    assert set(reader.tags) == {"div", "span"}


def test_the_page_of_a_hostile_record_holds_no_script_and_loads_nothing() -> None:
    side = {"pieces": [HOSTILE, " b"], "tokens": [1, 2]}
    sample = {
        "set": HOSTILE, "context": HOSTILE, "reference": HOSTILE,
        "continuation": side, "original_continuation": side,
    }  # fmt: skip
    names = {key: {"name": HOSTILE} for key in ("model", "dataset", "decode")}
    page = colouring.page({"config": names, "samples": [sample, sample]})
    reader = Reader()
    reader.feed(page)
    assert "script" not in reader.tags
    assert reader.text.count(HOSTILE) == 2 * 3 + 2 * 5
    assert reader.tags.count("tr") == 3
    assert "default-src 'none'" in page
    assert not re.search(r"(src|href)\s*=", page)


def test_a_longer_repeat_is_darker() -> None:
    new = list(range(100, 130))
    for length, shade in ((1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (9, 3), (10, 4), (20, 4)):
        tokens = [*new[:20], 1, *new[:length], 2]
        assert colouring.shades(tokens) == [0] * 21 + [shade] * length + [0]
    for shade in range(1, len(colouring.SHADES) + 1):
        assert f".r{shade} " in colouring.STYLE


def test_as_many_pieces_as_tokens() -> None:
    with pytest.raises(ValueError, match="zip"):
        colouring.html(["a"], [1, 2])


COLUMNS = {
    "TTR": {"key": "gen/ttr", "times": 100, "format": "{:.1f}"},
    "at 16": {"key": "gen/ttr", "at": 16},
    "longest": {"key": "gen/dataset_overlap", "highest": True, "format": "{:.0f}"},
    "asked": {"key": "preference"},
    "never": {"key": "gen/ttr", "at": 99},
}
TABLE = {
    "caption": "A & B",
    "rows": ["model", "writer"],
    "columns": COLUMNS,
    "published": [
        {"model": "ours", "writer": "original", "TTR": 12.5},
        {"model": "theirs only", "writer": "hyperfitted", "TTR": "1 or 2"},
    ],
    "source": "someone",
}


@pytest.fixture
def half_done(tmp_path: Path) -> Path:
    return a_sweep(
        tmp_path / "sweeps" / "x",
        TABLE,
        original_0=record([0.1, 0.2, 0.4], 0.5),
        hyperfitted_0=record([0.6, 0.6, 0.6], 0.7),
        hyperfitted_1=record([0.7, 0.7, 0.7], 0.8),
        hyperfitted_2=record([0.8, 0.8, 0.8], 0.9),
    )


def test_several_members_make_a_cell_with_students_interval(half_done: Path) -> None:
    table = tables.table_of(SweepRecords.of(half_done), "main", TABLE)
    by_row = {tuple(row.labels.values()): row for row in table.rows}
    found = by_row["ours", "hyperfitted"].ours
    low, high = scipy.stats.t.interval(0.95, 2, 70, scipy.stats.sem([60, 70, 80]))
    assert found["TTR"].mean == pytest.approx(70)
    assert found["TTR"].ci95 == pytest.approx((low, high))
    assert found["at 16"].mean == pytest.approx(0.8)
    assert found["longest"].mean == 7
    assert found["asked"].missing == "no annotations yet"
    assert found["never"].missing == "not measured at 99"


def test_missing_cells_say_why_and_published_ones_are_marked(half_done: Path) -> None:
    out = report.write(half_done)
    assert out == half_done.parent.parent / "reports" / "x"
    text = (out / "main.md").read_text()
    assert "TTR (theirs)" in text
    assert "at 16 (theirs)" not in text  # nothing is published there
    theirs = next(line for line in text.splitlines() if "theirs only" in line)
    assert "(not at this scale)" in theirs
    assert "| 1 or 2 |" in theirs
    tex = (out / "main.tex").read_text()
    assert r"\toprule" in tex
    assert r"\caption{A \& B}" in tex
    lines = list(csv.DictReader((out / "main.csv").open()))
    ours = next(
        line for line in lines if line["writer"] == "hyperfitted" and line["column"] == "TTR"
    )
    assert float(ours["mean"]) == pytest.approx(70)
    assert [line["published"] for line in lines if line["column"] == "TTR"] == [
        "12.5",
        "",
        "1 or 2",
    ]
    page = (out / "README.md").read_text()
    assert "4 of 6 have finished" in page
    assert "- original_1: not run yet" in page


def test_of_several_members_those_that_are_there_count(half_done: Path) -> None:
    table = tables.table_of(SweepRecords.of(half_done), "main", TABLE)
    original = next(row for row in table.rows if row.labels["writer"] == "original")
    assert (original.ours["TTR"].members, original.ours["TTR"].ci95) == (1, None)
    assert "(1 of 3 members)" in tables.markdown(table)


def test_a_number_less_that_of_another_member_is_paired_by_text(half_done: Path) -> None:
    less = {"key": "gen/ttr", "less": {"writer": "hyperfitted"}}
    table = {"rows": ["writer", "seed"], "columns": {"less": less}}
    found = {
        (row.labels["writer"], row.labels["seed"]): row.ours["less"]
        for row in tables.table_of(SweepRecords.of(half_done), "main", table).rows
    }
    differences = np.array([0.1, 0.2, 0.4]) - 0.6
    assert found["original", "0"].mean == pytest.approx(differences.mean())
    expected = bootstrap_mean(differences, 500)
    assert expected is not None
    assert found["original", "0"].ci95 == pytest.approx(expected.ci95)
    assert found["hyperfitted", "1"].ci95 == (0, 0)
    assert found["original", "1"].missing == "not run yet"
    path = half_done / "hyperfitted_0" / "results.json"
    path.write_text(json.dumps(record([0.6, 0.6], 0.7)))
    row = tables.table_of(SweepRecords.of(half_done), "main", table).rows[0]
    assert row.ours["less"].missing == "of other texts than hyperfitted_0"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"columns": {"TTR": {"key": "gen/ttr", "less": {"writer": "orignal"}}}},
            "did you mean original",
        ),
        (
            {"columns": {"TTR": {"key": "k", "at": 3, "less": {"writer": "original"}}}},
            "columns.TTR=at: there is no such name",
        ),
        (
            {"published": [{"model": "ours", "writer": "orignal", "TTR": 1}]},
            "did you mean original",
        ),
        ({"published": [{"model": "ours", "writer": "original", "TRR": 1}]}, "did you mean TTR"),
        ({"rows": ["model", "writers"]}, "did you mean writer"),
        ({"columns": {"TTR": {"keys": "gen/ttr"}}}, "did you mean key"),
    ],
)
def test_a_description_that_makes_no_sense_is_said(
    tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    folder = a_sweep(tmp_path / "x", TABLE | change)
    with pytest.raises(UserError, match=says):
        report.write(folder)


def test_a_record_of_another_version_and_no_sweep_are_said(half_done: Path, tmp_path: Path) -> None:
    path = half_done / "original_0" / "results.json"
    path.write_text(json.dumps({"schema_version": 1}))
    with pytest.raises(UserError, match="another version of this software") as told:
        report.write(half_done)
    assert "valid: schema_version 2" in str(told.value)
    with pytest.raises(UserError, match="is no sweep"):
        report.write(tmp_path)
