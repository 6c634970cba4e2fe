"""Tables of records: cells, their intervals, and the config of a table."""

import csv
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats

from hyperfitting.errors import UserError
from hyperfitting.metrics.estimate import Estimate
from hyperfitting.metrics.uncertainty import bootstrap_mean
from hyperfitting.record.downstream import Downstream
from hyperfitting.record.files import RECORD_FILE, write_record
from hyperfitting.record.schema import SCHEMA_VERSION
from hyperfitting.reporting import latex, tables
from hyperfitting.reporting.report import write_report
from hyperfitting.reporting.spec import parse_report
from hyperfitting.reporting.sweep_records import load_sweep
from tests.programs import find_program
from tests.records import (
    make_config,
    make_mechanism,
    make_predictions,
    make_record,
    make_samples,
    make_slice,
    make_task,
    ttr_record,
    write_sweep,
)
from tests.report_tables import (
    COLUMNS,
    TABLE,
    cells_by_labels,
    mean_of,
    table_spec,
    write_half_done,
)

RESULTS = Path(__file__).resolve().parents[1] / "docs/results"


@pytest.fixture
def half_done(tmp_path: Path) -> Path:
    return write_half_done(tmp_path / "sweeps" / "x")


def test_a_cell_of_several_runs_has_students_interval(half_done: Path) -> None:
    cells = cells_by_labels(load_sweep(half_done), TABLE)["ours", "tuned"]
    low, high = scipy.stats.t.interval(0.95, 2, 70, scipy.stats.sem([60, 70, 80]))
    assert mean_of(cells["TTR"]) == pytest.approx(70)
    assert cells["TTR"].estimate is not None
    assert cells["TTR"].estimate.ci95 == pytest.approx((low, high))
    assert cells["TTR"].estimate.n == 3
    assert mean_of(cells["at 16"]) == pytest.approx(0.8)
    assert mean_of(cells["longest"]) == 7
    assert cells["preference"].missing == "no annotations yet"
    assert cells["never"].missing == "not measured at 99"


def test_published_numbers_stand_in_a_block_with_only_their_columns(half_done: Path) -> None:
    out = write_report(half_done)
    assert out == half_done.parent.parent / "reports" / "x"
    ours, theirs = (out / "main.md").read_text().split("*Published*: someone")
    assert "another" not in ours and "1 or 2" not in ours
    assert "not at this scale" not in ours + theirs
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in theirs.split("\n")]
    assert ["model", "system", "TTR"] in rows  # no other column has published numbers
    assert ["ours", "base", "12.5"] in rows and ["another", "tuned", "1 or 2"] in rows
    lines = list(csv.DictReader((out / "main.csv").open()))
    tuned = next(line for line in lines if line["system"] == "tuned" and line["column"] == "TTR")
    assert float(tuned["mean"]) == pytest.approx(70)
    published = [line["published"] for line in lines if line["column"] == "TTR"]
    assert published == ["12.5", "", "1 or 2"]
    readme = (out / "README.md").read_text()
    assert "4 of 6 have finished" in readme
    assert "- base_1: not run yet" in readme


def test_a_column_without_a_number_is_named_below_the_table(half_done: Path) -> None:
    text = tables.to_markdown(tables.build_table(load_sweep(half_done), "m", table_spec(TABLE)))
    assert "Without a number: preference (no annotations yet)." in text
    assert "Without a number: never (not measured at 99)." in text
    assert text.count("no annotations yet") == 1


def test_the_source_of_a_markdown_table_is_aligned(half_done: Path) -> None:
    text = tables.to_markdown(tables.build_table(load_sweep(half_done), "m", table_spec(TABLE)))
    for block in re.findall(r"(?:^\|.*\|\n?)+", text, re.MULTILINE):
        lines = block.splitlines()
        assert len(lines) > 2
        bars = {tuple(i for i, c in enumerate(line) if c == "|") for line in lines}
        assert len(bars) == 1
        assert re.fullmatch(r"\| -+ \| -+ (\| -+: )+\|", lines[1])


@pytest.mark.parametrize(
    ("base", "tuned", "best"),
    [
        ([0.1, 0.2, 0.4], [0.5, 0.6, 0.9], {"tuned"}),  # each text is better
        ([0.1, 0.5, 0.9], [0.2, 0.6, 1.0], {"tuned"}),  # though the intervals overlap
        ([0.1, 0.9, 0.1], [0.9, 0.2, 0.3], set()),  # not told apart: none is the best
    ],
)
def test_the_best_is_bold_with_what_is_not_told_apart_by_text(
    tmp_path: Path, base: list[float], tuned: list[float], best: set[str]
) -> None:
    records = {"base_0": ttr_record(base, 0.5), "tuned_0": ttr_record(tuned, 0.5)}
    sweep = load_sweep(write_sweep(tmp_path / "x", {}, records))
    spec = table_spec({"rows": ["system", "seed"], "columns": {"TTR": {"key": "gen/ttr"}}})
    rows = tables.build_table(sweep, "main", spec).rows
    assert {row.labels["system"] for row in rows if row.best} == best


def test_no_number_is_the_best_of_a_metric_without_direction(tmp_path: Path) -> None:
    slices = [make_slice({"gen/entropy": Estimate(e, (e, e), 3)}) for e in (1.0, 2.0)]
    records = {
        f"{system}_0": make_record([part], make_samples(3))
        for system, part in zip(("base", "tuned"), slices, strict=True)
    }
    sweep = load_sweep(write_sweep(tmp_path / "x", {}, records))
    spec = table_spec({"rows": ["system"], "columns": {"entropy": {"key": "gen/entropy"}}})
    assert "**" not in tables.to_markdown(tables.build_table(sweep, "main", spec))


@pytest.mark.server
def test_latex_compiles_a_table_of_hostile_texts_and_those_of_all_results(
    half_done: Path, tmp_path: Path
) -> None:
    pdflatex = find_program("pdflatex")
    characters = "".join(map(chr, range(33, 127))) + "".join(map(chr, range(0xA1, 0x100)))
    texts = [
        f"{characters} \u2212\u2264\u2265\u2248\u2192\u221e \u2013\u201c\u20ac\u2026 \u4e2d",
        "[x]",
        "*",
        "--",
    ]
    table = TABLE | {"caption": texts[0], "source": "[" + texts[0]}
    table["columns"] = {text: {"key": "gen/ttr"} for text in texts} | COLUMNS
    built = tables.build_table(load_sweep(half_done), "main", table_spec(table))
    (tmp_path / "hostile.tex").write_text(latex.to_latex(built), "utf-8")
    committed = sorted(RESULTS.rglob("*.tex"))
    assert len(committed) > 20
    pages = [rf"\input{{{path}}}\clearpage" for path in (tmp_path / "hostile.tex", *committed)]
    start = r"\documentclass{article}\usepackage{booktabs}\begin{document}"
    document = "\n".join([start, *pages, r"\end{document}", ""])
    (tmp_path / "t.tex").write_text(document, "utf-8")
    result = subprocess.run(
        [pdflatex, "-interaction=nonstopmode", "-halt-on-error", "-file-line-error", "t.tex"],
        cwd=tmp_path, capture_output=True, text=True, errors="replace", timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-2000:]
    n_pages = re.search(r"\((\d+) pages", result.stdout)
    assert n_pages is not None and int(n_pages[1]) >= len(pages)


@pytest.mark.parametrize(("ci", "outcome"), [("true", pytest.fail), ("", pytest.skip)])
def test_only_outside_of_ci_a_missing_program_skips_a_test(
    ci: str, outcome: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CI", ci)
    with pytest.raises(outcome.Exception, match="not installed: nowhere or elsewhere"):
        find_program("nowhere", "elsewhere")


def test_a_cell_counts_the_runs_that_have_finished(half_done: Path) -> None:
    table = tables.build_table(load_sweep(half_done), "main", table_spec(TABLE))
    base = next(row for row in table.rows if row.labels["system"] == "base").cells["TTR"]
    assert base.estimate is not None
    assert (base.n_finished, base.n_runs, base.estimate.ci95) == (1, 3, None)
    assert "(1 of 3 runs)" in tables.to_markdown(table)


def test_a_difference_between_runs_is_paired_by_text(half_done: Path) -> None:
    column = {"key": "gen/ttr", "minus": {"system": "tuned"}}
    table = {"rows": ["system", "seed"], "columns": {"minus": column}}
    cells = {
        labels: row["minus"]
        for labels, row in cells_by_labels(load_sweep(half_done), table).items()
    }
    differences = np.array([0.1, 0.2, 0.4]) - 0.6
    assert mean_of(cells["base", "0"]) == pytest.approx(differences.mean())
    expected = bootstrap_mean(differences, 500)
    assert expected is not None
    base, tuned = cells["base", "0"].estimate, cells["tuned", "1"].estimate
    assert base is not None
    assert tuned is not None
    assert base.ci95 == pytest.approx(expected.ci95)
    assert tuned.ci95 == (0, 0)
    assert cells["base", "1"].missing == "not run yet"
    write_record(half_done / "tuned_0", ttr_record([0.6, 0.6], 0.7), make_predictions())
    cell = cells_by_labels(load_sweep(half_done), table)["base", "0"]["minus"]
    assert cell.missing == "of other texts than tuned_0"


def test_a_rank_correlation_is_over_the_runs_that_set_the_field(tmp_path: Path) -> None:
    names = ("base_0", "base_1", "base_2", "tuned_0", "tuned_1")
    strengths = dict(zip(names, (0.1, 0.2, 0.3, 0.4, None), strict=True))
    ttr = dict(zip(names, (0.5, 0.9, 0.4, 0.2, 0.99), strict=True))
    records = {
        name: ttr_record(
            [ttr[name] - 0.3, ttr[name] + 0.3],
            0.5,
            config=make_config(decode={"name": "x", "control": {"strength": strength}}),
        )
        for name, strength in strengths.items()
    }
    sweep = load_sweep(write_sweep(tmp_path / "sweep", {}, records))
    column = {"key": "gen/ttr", "spearman": "decode.control.strength"}
    table = {"rows": [], "columns": {"rho": column, "none": column | {"spearman": "decode.seed"}}}
    ((_, row),) = cells_by_labels(sweep, table).items()
    estimate = row["rho"].estimate
    assert estimate is not None and estimate.n == 4
    ranks = np.array([2, 1, 3, 4])  # of -ttr
    expected = -np.corrcoef([1, 2, 3, 4], ranks)[0, 1]
    assert estimate.mean == pytest.approx(expected)
    assert estimate.ci95 == pytest.approx((expected, expected))  # both texts have the same order
    assert row["rho"].note == "interval over texts"
    assert row["none"].missing == "too few different values"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"columns": {"TTR": {"key": "gen/ttr", "minus": {"system": "bsae"}}}},
            "columns.TTR.minus.system=bsae(.|\n)*did you mean base",
        ),
        (
            {"columns": {"TTR": {"key": "k", "length": 3, "minus": {"system": "base"}}}},
            "columns.TTR.minus=(.|\n)*length cannot be set",
        ),
        (
            {"published": [{"model": "ours", "system": "bsae", "TTR": 1}]},
            "tables.main.published.system=bsae(.|\n)*did you mean base",
        ),
        ({"published": [{"model": "ours", "system": "base", "TRR": 1}]}, "did you mean TTR"),
        ({"rows": ["model", "systems"]}, "tables.main.rows=systems(.|\n)*did you mean system"),
        (
            {"columns": {"TTR": {"keys": "gen/ttr"}}},
            "hydra.sweeper.report.tables.main.columns.TTR=keys(.|\n)*did you mean key",
        ),
        ({"columns": {"TTR": {"key": "k", "side": "basis"}}}, "columns.TTR.side=basis"),
        ({"columns": {"TTR": {"key": "k", "format": "{.__class__}"}}}, "TTR.format=.*no format"),
        (
            {"columns": {"TTR": {"key": "k", "statistic": "max", "spearman": "seed"}}},
            "columns.TTR.spearman=(.|\n)*statistic cannot be set",
        ),
        ({"column": {}}, "tables.main=column(.|\n)*did you mean columns"),
        ({"columns": ["TTR"]}, "tables.main.columns=.*is not a mapping"),
    ],
)
def test_an_invalid_table_is_an_error_that_names_the_field(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    folder = write_sweep(tmp_path / "x", {"tables": {"main": TABLE | change}}, {})
    with pytest.raises(UserError, match=message):
        write_report(folder)


@pytest.mark.parametrize("form", ["{:.3f}", "{:+.2f}", "{:.1e}", "{:.0%}"])
def test_a_format_is_a_precision_and_a_presentation(form: str) -> None:
    columns = {"TTR": {"key": "gen/ttr", "format": form}}
    spec = table_spec({"rows": ["seed"], "columns": columns}).columns["TTR"]
    assert float(spec.number_format.format(0.5).rstrip("%")) in (0.5, 50)


@pytest.mark.parametrize("form", ["", "x", "{}", "{:f}", "{0.real}", "{:.3f} ", "{:>99.3f}", 3])
def test_other_formats_are_refused(form: Any) -> None:
    with pytest.raises(UserError, match=r"columns\.TTR\.format="):
        table_spec({"rows": ["seed"], "columns": {"TTR": {"key": "gen/ttr", "format": form}}})


def test_a_record_of_another_version_and_a_folder_without_a_sweep_are_errors(
    half_done: Path, tmp_path: Path
) -> None:
    (half_done / "base_0" / RECORD_FILE).write_text(json.dumps({"schema_version": 1}))
    with pytest.raises(UserError, match="another version of this software") as caught:
        write_report(half_done)
    assert f"valid: schema_version {SCHEMA_VERSION}" in str(caught.value)
    with pytest.raises(UserError, match="is no sweep"):
        write_report(tmp_path)


def test_a_table_has_what_compares_both_models_over_all_texts_only(tmp_path: Path) -> None:
    record = ttr_record([0.1, 0.2, 0.4], 0.5, mechanism=make_mechanism())
    columns = {"L2": {"key": "mech/last_block_l2"}, "at 16": {"key": "mech/last_block_l2",
               "length": 16}}  # fmt: skip
    report = {"tables": {"t": {"rows": ["system", "seed"], "columns": columns}}}
    folder = write_sweep(tmp_path / "x", report, {"tuned_0": record})
    rows = tables.build_table(load_sweep(folder), "t", parse_report(report).tables["t"]).rows
    (cells,) = (r.cells for r in rows if r.labels == {"system": "tuned", "seed": "0"})
    assert cells["L2"].texts("{:.1f}") == ("22.0", "[21.0, 23.0]")
    assert cells["at 16"].estimate is None


def test_the_training_loss_is_that_of_the_last_epoch(tmp_path: Path) -> None:
    record = ttr_record([0.1, 0.2, 0.4], 0.5)
    assert record.history[-1]["train/loss"] == 0.5
    sweep = load_sweep(write_sweep(tmp_path / "x", {}, {"tuned_0": record}))
    columns = {"loss": {"key": "train/loss"}}
    cells = cells_by_labels(sweep, {"rows": ["system", "seed"], "columns": columns})
    assert mean_of(cells["tuned", "0"]["loss"]) == 0.5


def test_runs_with_the_same_number_are_one_measurement(half_done: Path) -> None:
    for seed in range(3):
        folder = half_done / f"base_{seed}"
        folder.mkdir(exist_ok=True)
        write_record(folder, ttr_record([0.1, 0.2, 0.4], 0.5), make_predictions())
    cell = cells_by_labels(load_sweep(half_done), TABLE)["ours", "base"]["TTR"]
    one_run = bootstrap_mean(np.array([0.1, 0.2, 0.4]), 200)
    assert cell.estimate is not None and one_run is not None and one_run.ci95 is not None
    assert cell.estimate.ci95 == pytest.approx([100 * end for end in one_run.ci95])
    assert (cell.estimate.n, cell.n_finished) == (3, 3)


def test_an_interval_over_seeds_ends_at_the_largest_possible_value(tmp_path: Path) -> None:
    mauve = [0.99, 0.97, 0.90]
    half = scipy.stats.t.ppf(0.975, 2) * np.std(mauve, ddof=1) / 3**0.5
    assert np.mean(mauve) + half > 1
    records = {
        f"tuned_{seed}": ttr_record(
            [0.1, 0.2, 0.4], 0.5, slices=[make_slice({"gen/mauve": Estimate(value, None, 100)})]
        )
        for seed, value in enumerate(mauve)
    }
    columns = {"MAUVE, %": {"key": "gen/mauve", "scale": 100}}
    report = {"tables": {"t": {"rows": ["model", "system"], "columns": columns}}}
    sweep = load_sweep(write_sweep(tmp_path / "x", report, records))
    cell = cells_by_labels(sweep, report["tables"]["t"])["ours", "tuned"]["MAUVE, %"]
    assert cell.estimate is not None
    assert cell.estimate.ci95 == pytest.approx((100 * (np.mean(mauve) - half), 100))


def test_a_column_of_a_task_is_of_its_questions_and_says_where_it_is_at_chance(
    tmp_path: Path,
) -> None:
    def both(mean: float) -> dict[str, dict[str, Estimate]]:
        of_side = {"down/likelihood": Estimate(mean, (mean - 0.1, mean + 0.1), 50)}
        return {"tuned": of_side, "base": of_side}

    downstream = Downstream(
        harness="0", tasks={"hard": make_task(True), "easy": make_task(False)},
        estimates=both(0.5), by_name={"hard": both(0.3), "easy": both(0.7)},
    )  # fmt: skip
    columns = {
        name: {"key": "down/likelihood", "task": name, "format": "{:.1f}"}
        for name in ("hard", "easy", "absent")
    } | {"all": {"key": "down/likelihood", "format": "{:.1f}"}}
    report = {"tables": {"t": {"rows": ["system", "seed"], "columns": columns}}}
    record = ttr_record([0.1, 0.2, 0.4], 0.5, downstream=downstream)
    folder = write_sweep(tmp_path / "x", report, {"tuned_0": record})
    rows = tables.build_table(load_sweep(folder), "t", parse_report(report).tables["t"]).rows
    (cells,) = (r.cells for r in rows if r.labels == {"system": "tuned", "seed": "0"})
    assert cells["hard"].texts("{:.1f}") == ("0.3", "[0.2, 0.4] (at chance)")
    assert cells["easy"].texts("{:.1f}") == ("0.7", "[0.6, 0.8]")
    assert cells["all"].texts("{:.1f}")[0] == "0.5"
    assert cells["absent"].missing == "not measured"
    for column, match in (
        ({"key": "gen/ttr", "task": "a"}, "only metrics down"),
        ({"key": "down/likelihood", "task": "a", "length": 96}, "length cannot be set"),
    ):
        with pytest.raises(UserError, match=match):
            parse_report({"tables": {"t": {"rows": [], "columns": {"x": column}}}})
