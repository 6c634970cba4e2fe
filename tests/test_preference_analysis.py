"""The analysis of a study, and what tables and pages of a report show of it."""

from pathlib import Path
from typing import Any

import pytest

from hyperfitting.errors import UserError
from hyperfitting.preference.analyze import analyze
from hyperfitting.preference.cli import main
from hyperfitting.preference.comparisons import Resampling
from hyperfitting.preference.items import FOLDER, JUDGMENTS_FILE, Task, read_task, write_task
from hyperfitting.preference.judgments import Judgment, append
from hyperfitting.preference.results import PEOPLE, Analysis, read_analysis, write_analysis
from hyperfitting.record.files import write_record
from hyperfitting.reporting.cells import table_cell
from hyperfitting.reporting.report import write_report
from hyperfitting.reporting.spec import ColumnSpec
from hyperfitting.reporting.sweep_records import load_sweep
from tests.preference import (
    DATASETS,
    LENGTH,
    QUESTION,
    always_left,
    careful,
    judge_all,
    judge_by_model,
    study,
    study_record,
    write_study_sweep,
)
from tests.records import make_predictions

FAST = Resampling(60)
COLUMN: dict[str, Any] = {"key": "preference", "scale": 100, "format": "{:.1f}"}
REPORT = {"tables": {"main": {"rows": ["system", "seed"], "columns": {"preferred": COLUMN}}}}
RECORDS = {"base_0": study_record(0), "tuned_0": study_record(1)}


@pytest.fixture(scope="module")
def task() -> Task:
    return study(records=RECORDS)


@pytest.fixture(scope="module")
def people(task: Task) -> list[Judgment]:
    return judge_all(task, {"ann": careful, "bob": careful, "cem": always_left})


@pytest.fixture(scope="module")
def analysis(task: Task, people: list[Judgment]) -> Analysis:
    judge = judge_by_model(task, "judge:m", always_left)
    return analyze(task, [*people, *judge], RECORDS, FAST)


def test_shares_are_counts_of_the_judgments(
    task: Task, people: list[Judgment], analysis: Analysis
) -> None:
    group = analysis.group(PEOPLE)
    assert group is not None
    for run in ("base_0", "tuned_0"):
        for dataset in (None, *DATASETS):
            items = {
                item.id
                for item in task.items
                if item.kind == "normal"
                and item.first.origin.run == run
                and dataset in (None, item.dataset)
            }
            choices = [j.choice for j in people if j.item in items]
            row = group.comparison(run, LENGTH, dataset)
            assert row is not None
            assert (row.wins, row.losses) == (choices.count("first"), choices.count("second"))
            assert row.judgments == len(choices) == 3 * row.items
            assert row.preferred_or_equal.mean == pytest.approx(row.wins / row.judgments)
    assert [row.system.run for row in group.strengths] == ["tuned_0", "", "base_0"]


def test_the_rule_of_the_task_excludes_the_one_who_always_chose_left(analysis: Analysis) -> None:
    group = analysis.group(PEOPLE)
    assert group is not None
    excluded = [a.name for a in group.annotators if a.excluded]
    assert excluded in ([], ["cem"])  # by chance both checks may have had the real text left
    without = {(c.first.run, c.dataset): c for c in group.comparisons_without_excluded}
    if excluded:
        assert without["tuned_0", None].preferred.mean == 1
        assert without["tuned_0", None].annotators == 2


def test_a_judge_that_looks_at_the_side_alone_is_refused(analysis: Analysis) -> None:
    (judge,) = analysis.judges
    assert judge.flip_rate is not None
    assert judge.flip_rate.mean == 1
    assert "100% of" in judge.refused
    assert judge.left is not None
    assert judge.left.mean == 1
    assert judge.with_ties.alpha is None


def test_a_judge_that_agrees_with_itself_is_not_refused(task: Task) -> None:
    (judge,) = analyze(task, judge_by_model(task, "judge:m", careful), {}, FAST).judges
    assert judge.flip_rate is not None
    assert judge.flip_rate.mean == 0
    assert judge.refused == ""


def test_only_people_are_excluded_for_being_fast(task: Task) -> None:
    people = judge_all(task, {"ann": careful}, seconds=1.0)
    judge = judge_by_model(task, "judge:m", careful, seconds=1.0)
    groups = analyze(task, [*people, *judge], {}, FAST).groups
    excluded = {a.name: a.excluded for group in groups for a in group.annotators}
    assert excluded == {"ann": ["took 1.0 s per item"], "judge:m": []}


def test_a_judge_is_analyzed_on_the_items_that_it_answered_in_both_orders(task: Task) -> None:
    judgments = judge_by_model(task, "judge:m", careful)
    (judge,) = analyze(task, judgments[:5], {}, FAST).judges
    assert judge.judgments == 5
    assert sum(row.judgments for row in judge.comparisons if row.dataset is None) == 4


def test_aspects_have_shares_of_their_own() -> None:
    question = QUESTION.model_copy(update={"aspects": ("fluency", "coherence")})
    task = study(records=RECORDS, question=question)
    judgments = judge_all(task, {"ann": careful, "bob": careful})
    fluent = [
        j.model_copy(update={"aspects": {"fluency": "equal" if j.annotator == "ann" else "second"}})
        for j in judgments
    ]
    for row in analyze(task, fluent, {}, FAST).groups[0].comparisons:
        assert row.aspects["fluency"].mean == 0.5
        assert set(row.aspects) == {"fluency"}


def test_judgments_of_another_task_are_left_out_and_listed(
    task: Task, people: list[Judgment]
) -> None:
    stray = people[0].model_copy(update={"task": "0" * 16})
    result = analyze(task, [stray, *people[:3]], {}, FAST)
    assert result.left_out == ["judgment 1: of another task (0000000000000000)"]
    assert result.groups[0].judgments == 3


def cell(folder: Path, system: str, **column: Any) -> Any:
    return table_cell(
        load_sweep(folder), {"system": system, "seed": "0"}, ColumnSpec(**COLUMN | column)
    )


@pytest.fixture
def sweep(tmp_path: Path, task: Task) -> Path:
    folder = write_study_sweep(tmp_path / "sweeps" / "x", REPORT)
    write_task(folder / FOLDER, task)
    return folder


def test_a_cell_is_filled_from_the_analysis_and_marked(sweep: Path, analysis: Analysis) -> None:
    assert cell(sweep, "tuned").texts("{:.1f}")[1] == "(no annotations yet)"
    write_analysis(sweep / FOLDER, analysis)
    group = analysis.group(PEOPLE)
    assert group is not None
    row = group.comparison("tuned_0", LENGTH, None)
    assert row is not None
    filled = cell(sweep, "tuned")
    assert filled.estimate.mean == pytest.approx(100 * row.preferred_or_equal.mean)
    assert f"n {row.judgments}, 3 annotators, alpha " in filled.note
    assert "judge:m refused: it flips 100%" in filled.note
    assert cell(sweep, "tuned", length=5).missing == "not asked"
    assert cell(sweep, "tuned", dataset="news").estimate.n == row.judgments / 2
    report = write_report(sweep)
    assert f"n {row.judgments}, 3 annotators" in (report / "main.md").read_text()
    page = (report / "index.html").read_text()
    assert f"people, against reference at {LENGTH} tokens:" in page
    assert "judge:m, a model (refused: it answers 100%" in (report / "README.md").read_text()


def test_a_cell_says_that_its_annotators_are_scripts(sweep: Path) -> None:
    task = study(records=RECORDS, annotators={"ann": "script", "bob": "script"}, votes=2)
    judgments = judge_all(task, {"ann": careful, "bob": careful})
    write_analysis(sweep / FOLDER, analyze(task, judgments, RECORDS, FAST))
    assert "2 scripts, alpha" in cell(sweep, "tuned").note
    assert "scripts" in cell(sweep, "tuned").texts("{:.1f}")[1]


def test_a_judge_never_fills_the_cell(sweep: Path, task: Task) -> None:
    judge = judge_by_model(task, "judge:m", careful)
    write_analysis(sweep / FOLDER, analyze(task, judge, RECORDS, FAST))
    empty = cell(sweep, "tuned")
    assert empty.estimate is None
    assert empty.texts("{:.1f}")[1].startswith("(no annotations yet; judge:m, a model: 100.0 [")


def test_a_cell_of_texts_that_have_changed_is_empty(sweep: Path, analysis: Analysis) -> None:
    write_analysis(sweep / FOLDER, analysis)
    write_record(sweep / "tuned_0", study_record(7), make_predictions())
    assert cell(sweep, "tuned").missing == "other texts were judged than this record's"


def test_the_commands_go_from_a_sweep_to_the_analysis(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_study_sweep(tmp_path / "x", REPORT)
    command = ["make", str(folder), "--annotators", "ann", "bob", "cem", "--checks", "2"]
    assert status([*command, "--repeats", "1"]) == 0
    assert status(command) != 0  # never overwritten
    assert status(["analyze", str(folder)]) != 0
    assert "there are no judgments yet" in capsys.readouterr().err
    task = read_task(folder / FOLDER)
    append(
        folder / FOLDER / JUDGMENTS_FILE, judge_all(task, dict.fromkeys(task.annotators, careful))
    )
    assert status(["analyze", str(folder), "--resamples", "100"]) == 0
    analysis = read_analysis(folder / FOLDER)
    assert analysis is not None
    predictors = {c.metric: c.spearman.mean for c in analysis.groups[0].correlations}
    assert predictors["gen/ttr"] > 0.8  # what repeats three words was never preferred
    assert predictors["gen/rep_2"] < -0.8
    assert status(["plan", "--study", str(folder), "--annotators", "3"]) == 0
    out = capsys.readouterr().out
    assert "3 annotators" in out
    assert "to tell 34.0% from 38.0%" in out


@pytest.mark.parametrize(
    ("command", "option", "value", "lowest"),
    [
        ("make", "--items", "0", 1),
        ("make", "--checks", "-1", 0),
        ("make", "--repeats", "-1", 0),
        ("make", "--seed", "-1", 0),
        ("analyze", "--resamples", "0", 100),
        ("analyze", "--seed", "-1", 0),
    ],
)
def test_a_number_out_of_range_names_its_option(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
    option: str,
    value: str,
    lowest: int,
) -> None:
    needed = ["--annotators", "ann"] if command == "make" else []
    assert status([command, str(tmp_path), *needed, option, value]) == 1
    error = capsys.readouterr().err
    assert f"{option}={value}: out of range" in error
    assert f"valid: {lowest} or more" in error


def status(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    return int(exit_info.value.code or 0)


def test_a_damaged_analysis_is_an_error_that_says_what_to_do(sweep: Path) -> None:
    (sweep / FOLDER / "preference.json").write_text("{}")
    with pytest.raises(UserError, match="hyperfit-preference analyze"):
        cell(sweep, "tuned")
