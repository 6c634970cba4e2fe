"""Preference studies on annotation platforms: what is exported, imported, and left out."""

import csv
import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from hyperfitting.errors import UserError
from hyperfitting.preference.cli import main
from hyperfitting.preference.csv_files import guard, unguard
from hyperfitting.preference.exchange import PLATFORMS, export_task, import_answers
from hyperfitting.preference.items import (
    CHOICES,
    JUDGMENTS_FILE,
    Choice,
    Form,
    Shown,
    Task,
    content_hash,
    read_task,
    resolve,
    write_task,
)
from hyperfitting.preference.judgments import read_judgments
from hyperfitting.preference.label_studio import labeling_config
from tests.awkward_study import awkward_task, make_item, make_task

Rows = list[dict[str, str]]
Answers = dict[tuple[str, str], Shown]
"""By annotator and item, the choice as it is shown."""


def answers_of(task: Task) -> Answers:
    """Answers in which every choice occurs."""
    choices = CHOICES[task.question.form]
    return {
        (name, item.id): choices[(n + at) % len(choices)]
        for at, name in enumerate(task.annotators)
        for n, item in enumerate(task.items_of(name))
    }


def fill_csv(folder: Path, answers: Answers) -> list[Path]:
    for path in sorted(folder.glob("*.csv")):
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            row["preference"] = answers[row["annotator"], row["item"]]
            row["seconds"] = "4.5"
        write_csv(path, rows)
    return sorted(folder.glob("*.csv"))


def write_csv(path: Path, rows: Rows) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def annotation(number: int, shown: str, **fields: Any) -> dict[str, Any]:
    """An annotation as Label Studio exports it."""
    result = [
        {"from_name": "preference", "to_name": "context", "value": {"choices": [shown]}}
    ]  # fmt: skip
    return {
        "id": number, "completed_by": 1, "result": result, "was_cancelled": False,
        "lead_time": 4.5, "created_at": "2026-11-28T00:26:02.454563Z", "ground_truth": False,
    } | fields  # fmt: skip


def fill_label_studio(folder: Path, answers: Answers) -> list[Path]:
    paths = sorted(folder.glob("*.json"))
    for account, path in enumerate(paths):
        tasks = json.loads(path.read_text("utf-8"))
        for number, task in enumerate(tasks):
            shown = answers[task["data"]["annotator"], task["data"]["item"]]
            task["id"] = number
            task["annotations"] = [annotation(number, shown, completed_by=account)]
        path.write_text(json.dumps(tasks), "utf-8")
    return paths


def fill_potato(folder: Path, answers: Answers) -> list[Path]:
    rows = [json.loads(line) for line in (folder / "items.jsonl").read_text("utf-8").splitlines()]
    for name in {row["annotator"] for row in rows}:
        labels, behavior = {}, {}
        for row in rows:
            if row["annotator"] == name:
                shown = answers[name, row["item"]]
                labels[row["id"]] = [
                    [{"schema": "preference", "name": shown}, shown],
                    [{"schema": "preference", "name": "another"}, False],
                ]
                behavior[row["id"]] = {"total_time_ms": 4500, "session_end": 1.7e9}
        state = {
            "user_id": name,
            "instance_id_to_label_to_value": labels,
            "instance_id_to_behavioral_data": behavior,
        }
        path = folder / "annotation_output" / name / "user_state.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(state), "utf-8")
    return [folder]


FILL: dict[str, Callable[[Path, Answers], list[Path]]] = {
    "csv": fill_csv, "label-studio": fill_label_studio, "potato": fill_potato
}  # fmt: skip


@pytest.mark.parametrize("form", ["p1", "fine"])
@pytest.mark.parametrize("platform", PLATFORMS)
def test_what_people_choose_on_a_platform_is_what_is_imported(
    tmp_path: Path, platform: str, form: Form
) -> None:
    write_task(tmp_path, awkward_task(form=form))
    task = read_task(tmp_path)
    export_task(task, platform, tmp_path / "out")
    answers = answers_of(task)
    paths = FILL[platform](tmp_path / "out", answers)
    accepted, left_out = import_answers(tmp_path, platform, paths)
    assert left_out == []
    assert read_judgments(tmp_path / JUDGMENTS_FILE) == accepted
    imported: dict[tuple[str, str], Choice] = {(j.annotator, j.item): j.choice for j in accepted}
    assert imported == {
        (name, id): resolve(shown, task.left(name, task.item(id)))
        for (name, id), shown in answers.items()
    }
    assert {(j.seconds, j.source) for j in accepted} == {(4.5, platform.replace("-", "_"))}


@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_second_import_adds_nothing(tmp_path: Path, platform: str) -> None:
    task = awkward_task()
    write_task(tmp_path, task)
    export_task(task, platform, tmp_path / "out")
    paths = FILL[platform](tmp_path / "out", answers_of(task))
    n = len(import_answers(tmp_path, platform, paths)[0])
    content = (tmp_path / JUDGMENTS_FILE).read_bytes()
    accepted, left_out = import_answers(tmp_path, platform, paths)
    assert accepted == []
    assert len(left_out) == n == 2 * len(task.items)
    assert all("before" in each.reason for each in left_out)
    assert (tmp_path / JUDGMENTS_FILE).read_bytes() == content


@pytest.mark.parametrize("platform", PLATFORMS)
def test_an_export_shows_nothing_that_is_hidden(tmp_path: Path, platform: str) -> None:
    task = awkward_task()
    export_task(task, platform, tmp_path / "out")
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) >= 2
    for path in files:
        content = path.read_text("utf-8")
        assert not re.search(r"hidden|tuned|\breference|\bfirst\b|\bsecond\b", content), path


@pytest.mark.parametrize("platform", PLATFORMS)
def test_an_export_overwrites_nothing(tmp_path: Path, platform: str) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists already"):
        export_task(awkward_task(), platform, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]
    assert list((tmp_path / "out").iterdir()) == []


def change(name: str, value: str) -> Callable[[Rows], object]:
    return lambda rows: rows[2].update({name: value})


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (change("item", "0123456789abcdef"), "has no item 0123456789abcdef"),
        (change("task", "another"), "of another task"),
        (change("annotator", "mallory"), "no annotator mallory"),
        (change("text_a", "changed"), "text_a is not what the task shows alice"),
        (change("context", ""), "context is not what"),
        (change("preference", ""), "no choice was made"),
        (change("preference", "both_bad"), "preference has no choice 'both_bad'"),
        (change("seconds", "soon"), "'soon' is no number"),
        (change("seconds", "-1"), "seconds"),
        (change("seconds", "nan"), "seconds"),
        (lambda rows: rows.append(rows[2] | {"preference": "equal"}), "alice has judged"),
    ],
)
def test_an_import_leaves_out_what_does_not_belong_and_nothing_else(
    tmp_path: Path, edit: Callable[[Rows], object], reason: str
) -> None:
    task = make_task([make_item(n, f"a {n}", f"the other {n}") for n in range(6)], ("alice",))
    write_task(tmp_path, task)
    export_task(task, "csv", tmp_path / "out")
    path = fill_csv(tmp_path / "out", answers_of(task))[0]
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    edit(rows)
    write_csv(path, rows)
    accepted, left_out = import_answers(tmp_path, "csv", [path])
    (out,) = left_out
    assert re.search(reason, out.reason)
    assert out.where.startswith("alice.csv line")
    assert len(accepted) == len(rows) - 1


def test_an_account_that_answers_for_two_annotators_is_left_out(tmp_path: Path) -> None:
    task = awkward_task()
    write_task(tmp_path, task)
    export_task(task, "label-studio", tmp_path / "out")
    paths = fill_label_studio(tmp_path / "out", answers_of(task))
    tasks = json.loads(paths[1].read_text("utf-8"))
    tasks[3]["annotations"][0]["completed_by"] = {"id": 0, "email": "alice@example.com"}
    tasks[4]["annotations"][0]["completed_by"] = 7
    tasks[5]["annotations"][0]["was_cancelled"] = True
    tasks[6]["annotations"].append(annotation(99, "equal", completed_by=1))
    tasks[7]["annotations"] = []
    paths[1].write_text(json.dumps(tasks), "utf-8")
    accepted, left_out = import_answers(tmp_path, "label-studio", paths)
    reasons = [each.reason for each in left_out]
    assert reasons[0] == "account 0 answers for alice already"
    assert reasons[1] == "account 7 answers for bob, who is 1"
    assert reasons[2] == "skipped by the annotator"
    assert "bob has judged" in reasons[3]
    assert left_out[3].where == "bob.json task 6, annotation 99"
    assert len(accepted) == 2 * len(task.items) - 4


def test_answers_under_another_login_are_left_out(tmp_path: Path) -> None:
    task = awkward_task()
    write_task(tmp_path, task)
    export_task(task, "potato", tmp_path / "out")
    fill_potato(tmp_path / "out", answers_of(task))
    path = tmp_path / "out/annotation_output/bob/user_state.json"
    path.write_text(
        path.read_text("utf-8").replace('"user_id": "bob"', '"user_id": "eve"'), "utf-8"
    )
    accepted, left_out = import_answers(tmp_path, "potato", [tmp_path / "out"])
    assert {each.reason for each in left_out} == {"answered by eve, but it is for bob"}
    assert {j.annotator for j in accepted} == {"alice"}


def test_aspects_come_back_resolved(tmp_path: Path) -> None:
    task = make_task([make_item(0, "one", "two")], ("alice",), aspects=("fluency", "coherence"))
    write_task(tmp_path, task)
    export_task(task, "csv", tmp_path / "out")
    path = tmp_path / "out/alice.csv"
    with path.open(encoding="utf-8", newline="") as file:
        (row,) = csv.DictReader(file)
    row |= {"preference": "equally GOOD", "fluency": "B", "coherence": ""}
    write_csv(path, [row])
    ((judgment,), _) = import_answers(tmp_path, "csv", [path])
    assert judgment.choice == "equal"
    right = resolve("right", task.left("alice", task.items[0]))
    assert judgment.aspects == {"fluency": right}


def test_mechanical_turks_columns_are_read(tmp_path: Path) -> None:
    task = make_task([make_item(0, "=one", "two")], ("alice",))
    write_task(tmp_path, task)
    export_task(task, "csv", tmp_path / "out")
    with (tmp_path / "out/alice.csv").open(encoding="utf-8", newline="") as file:
        (row,) = csv.DictReader(file)
    answers = ("preference", "seconds")
    batch = {f"Input.{k}": v for k, v in row.items() if k not in answers}
    batch |= {"HITId": "3X", "WorkerId": "A1", "WorkTimeInSeconds": "12"}
    batch |= {"Answer.preference": "left"}
    write_csv(tmp_path / "batch.csv", [batch])
    ((judgment,), left_out) = import_answers(tmp_path, "csv", [tmp_path / "batch.csv"])
    assert (judgment.shown, judgment.seconds, left_out) == ("left", 12, [])


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_no_cell_is_a_formula_and_every_text_comes_back(text: str) -> None:
    cell = guard(text)
    assert not cell.lstrip(" ").startswith(tuple("=+-@\t\r\n＝＋－＠"))
    assert unguard(cell) == text


@hypothesis_settings(max_examples=30)
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=2, max_size=2))
def test_any_text_survives_a_csv_file(
    texts: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("study")
    task = make_task([make_item(0, *texts, context="".join(texts))], ("alice",))
    write_task(folder, task)
    export_task(task, "csv", folder / "out")
    accepted, left_out = import_answers(folder, "csv", fill_csv(folder / "out", answers_of(task)))
    assert (len(accepted), left_out) == (1, [])


@pytest.mark.parametrize(
    ("platform", "content", "problem"),
    [
        ("csv", b"task,item\n1,2\n", "lacks the column"),
        ("csv", b"\xff\xfe\x00", "is not UTF-8"),
        ("csv", b'task,annotator,item,context,text_a,text_b,preference\n"1', "cannot be read"),
        ("csv", b"task,annotator,item,context,text_a,text_b,preference\n1,2\n", "2 cells of 7"),
        ("csv", b"task,task,annotator,item,context,text_a,text_b,preference\n", "twice"),
        ("label-studio", b"[{]", "is no export of Label Studio"),
        ("label-studio", b'[{"id": 1, "preference": "left"}]', "0.data"),
        ("potato", b"", "cannot be read"),
    ],
)
def test_a_file_that_is_none_of_the_platform_imports_nothing(
    tmp_path: Path, platform: str, content: bytes, problem: str
) -> None:
    write_task(tmp_path, awkward_task())
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(UserError, match=problem):
        import_answers(tmp_path, platform, [tmp_path / "file"])
    assert not (tmp_path / JUDGMENTS_FILE).exists()


def test_label_studios_configuration_asks_with_choices_of_our_names() -> None:
    question = awkward_task(form="fine", aspects=("repetition",)).question
    root = ET.fromstring(labeling_config(question))  # noqa: S314 (our own)
    choices = {c.get("name"): [o.get("alias") for o in c] for c in root.iter("Choices")}
    assert choices == {
        "preference": ["left", "right", "equal", "both_bad"],
        "repetition": ["left", "equal", "right"],
    }
    shown = [element.get("value") for element in root.iter("Text")]
    assert shown == ["$context", "$text_a", "$text_b"]


def test_potatos_instances_are_each_annotators_own(tmp_path: Path) -> None:
    task = awkward_task()
    export_task(task, "potato", tmp_path / "out")
    config = json.loads((tmp_path / "out/config.yaml").read_text("utf-8"))
    groups = config["batch_assignment"]["groups"]
    assert [group["annotators"] for group in groups] == [["alice"], ["bob"]]
    assert groups[0]["instances"] == [content_hash(["alice", i.id]) for i in task.items]


def test_the_command_line_says_what_it_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = awkward_task()
    write_task(tmp_path, task)
    with pytest.raises(SystemExit) as end:
        main(["export", str(tmp_path), "--to", "csv"])
    assert end.value.code == 0
    paths = fill_csv(tmp_path / "csv", answers_of(task))
    with pytest.raises(SystemExit) as end:
        main(["import", str(tmp_path), "--from", "csv", *map(str, paths), str(paths[0])])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert f"imported   {2 * len(task.items)} judgments" in out
    assert out.count("left out   alice.csv line") == len(task.items)
