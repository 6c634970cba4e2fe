"""The annotation page: what is shown, saved, refused, undone and exported."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hyperfitting.preference.items import JUDGMENTS_FILE, resolve
from hyperfitting.preference.judgments import Answer, append, make_judgment, read_judgments
from hyperfitting.preference.serve import export_judgments
from tests.annotation_app import Served, serving_studies
from tests.preference_study import CHOICES, make_study, shown_texts


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Served]]:
    with serving_studies(tmp_path) as start:
        yield start


def test_every_answer_is_saved_before_the_next_item_and_exported_with_its_side(
    serve: Callable[..., Served], tmp_path: Path
) -> None:
    served = serve()
    annotators = {name: served.annotator(name) for name in ("alice", "bob")}
    answers = {}
    for number, item_number in enumerate(range(6)):
        for name, annotator in annotators.items():  # both work at the same time
            item = served.task.items_of(name)[item_number]
            left = served.task.left(name, item)
            assert shown_texts(annotator.html) == list(item.shown(left).values())
            choice = CHOICES[number % 3]
            assert annotator.judge(choice, seconds="12.5").status_code == 303
            assert served.rows()[-1][:4] == (name, item.id, 1, choice)
            answers[name, item.id] = (resolve(choice, left), left, 12.5)
    assert "You have answered everything" in annotators["alice"].html
    path = tmp_path / JUDGMENTS_FILE
    assert export_judgments(served.task, served.database, path) == (12, [])
    judgments = read_judgments(path)
    assert {(j.annotator, j.item): (j.choice, j.left, j.seconds) for j in judgments} == answers
    assert {j.source for j in judgments} == {"page"}
    assert export_judgments(served.task, served.database, path) == (0, [])
    assert read_judgments(path) == judgments


def test_aspects_are_optional_and_saved_resolved(
    serve: Callable[..., Served], tmp_path: Path
) -> None:
    served = serve(make_study(form="fine", aspects=("fluency", "repetition")))
    annotator = served.annotator()
    first, second = served.task.items_of("alice")[:2]
    annotator.judge("both_bad", fluency="left", repetition="")
    annotator.judge("equal", repetition="right", coherence="right")  # of which one is not asked
    assert annotator.judge("left", fluency="both_bad").status_code == 400
    export_judgments(served.task, served.database, tmp_path / JUDGMENTS_FILE)
    left = [served.task.left("alice", item) for item in (first, second)]
    assert [j.aspects for j in read_judgments(tmp_path / JUDGMENTS_FILE)] == [
        {"fluency": resolve("left", left[0])},
        {"repetition": resolve("right", left[1])},
    ]


def test_without_a_script_the_time_is_that_of_the_server(serve: Callable[..., Served]) -> None:
    served = serve()
    annotator = served.annotator()
    time.sleep(0.05)
    annotator.judge("left")
    assert 0.05 <= served.database.finalize()[0].seconds < 5
    for wrong in ("-1", "nan", "inf", "soon"):
        assert annotator.judge("left", seconds=wrong).status_code == 400
    assert len(served.rows()) == 1


def test_a_paused_page_shows_no_item_and_resumes_at_the_same(serve: Callable[..., Served]) -> None:
    annotator = serve().annotator()
    annotator.judge("left")
    before = shown_texts(annotator.html)
    paused = annotator.client.get(annotator.page + "pause").text
    assert shown_texts(paused) == []
    assert "1 of 6" in paused
    annotator.load()
    assert shown_texts(annotator.html) == before


def test_a_page_tells_nothing_that_is_hidden_from_annotators(serve: Callable[..., Served]) -> None:
    task = make_study()
    html = serve(task).annotator().html
    body = html.partition("<body>")[2].partition("<script>")[0].replace("seconds", "")
    for hidden in ("hidden-", "tuned", "reference", "normal", "first", "second"):
        assert hidden not in body
    later = [item for item in task.items if item.context not in shown_texts(html)]
    assert len(later) == 5
    assert not any(item.context in html or item.id in html for item in later)


def test_a_stale_tab_is_told_so_and_changes_nothing(serve: Callable[..., Served]) -> None:
    served = serve()
    tab, stale = served.annotator(), served.annotator()
    tab.judge("left")
    response = stale.send("judge", choice="right")
    assert response.status_code == 409
    assert "out of date" in response.text
    assert shown_texts(response.text) == shown_texts(tab.html)  # it goes on where the other is
    tab.send("undo")
    assert stale.send("judge", choice="right").status_code == 409  # undone is not unanswered
    assert [row[3:] for row in served.rows()] == [("left", 1)]


def test_a_request_that_is_sent_again_is_saved_once(serve: Callable[..., Served]) -> None:
    served = serve()
    annotator = served.annotator()
    for _ in range(3):
        assert annotator.send("judge", choice="left").status_code == 303
    assert annotator.send("judge", choice="right").status_code == 409
    assert [row[3:] for row in served.rows()] == [("left", 0)]


def test_undo_keeps_the_answer_as_superseded_and_asks_again(serve: Callable[..., Served]) -> None:
    served = serve()
    annotator = served.annotator()
    assert annotator.fields("undo") == {}  # nothing to undo yet
    first = shown_texts(annotator.html)
    annotator.judge("left")
    second = shown_texts(annotator.html)
    annotator.judge("left")
    for _ in range(2):  # a double click undoes one answer
        assert annotator.send("undo").status_code == 303
    annotator.load()
    assert shown_texts(annotator.html) == second
    annotator.send("undo")
    annotator.load()
    assert shown_texts(annotator.html) == first
    annotator.judge("right")
    items = [item.id for item in served.task.items_of("alice")]
    assert served.rows() == [
        ("alice", items[0], 1, "left", 1),
        ("alice", items[1], 1, "left", 1),
        ("alice", items[0], 2, "right", 0),
    ]
    assert [j.shown for j in served.database.finalize()] == ["right"]


def test_an_undo_of_another_tab_than_the_last_answers_is_refused(
    serve: Callable[..., Served],
) -> None:
    served = serve()
    tab = served.annotator()
    tab.judge("left")
    stale = served.annotator()
    tab.judge("right")
    assert stale.send("undo").status_code == 409
    assert [row[3:] for row in served.rows()] == [("left", 0), ("right", 0)]


def test_an_exported_answer_can_no_longer_be_undone(
    serve: Callable[..., Served], tmp_path: Path
) -> None:
    served = serve()
    annotator = served.annotator()
    annotator.judge("left")
    export_judgments(served.task, served.database, tmp_path / JUDGMENTS_FILE)
    assert annotator.send("undo").status_code == 409
    annotator.load()
    assert annotator.fields("undo") == {}
    annotator.judge("right")
    assert annotator.send("undo").status_code == 303
    assert [row[3:] for row in served.rows()] == [("left", 0), ("right", 1)]


def test_an_answer_that_was_imported_before_is_left_out_of_the_export(
    serve: Callable[..., Served], tmp_path: Path
) -> None:
    served = serve()
    item = served.task.items_of("alice")[0]
    imported = make_judgment(served.task, item, "alice", Answer("equal"), "csv")
    append(tmp_path / JUDGMENTS_FILE, [imported])
    annotator = served.annotator()
    annotator.judge("left")
    annotator.judge("left")
    added, (rejected,) = export_judgments(served.task, served.database, tmp_path / JUDGMENTS_FILE)
    assert added == 1
    assert rejected.judgment.item == item.id
    assert read_judgments(tmp_path / JUDGMENTS_FILE)[0] == imported


def test_a_full_disk_is_told_and_nothing_is_confirmed(serve: Callable[..., Served]) -> None:
    served = serve(make_study(n_items=40))
    annotator = served.annotator()
    writer = served.database._writer
    (pages,) = writer.execute("PRAGMA page_count").fetchone()
    writer.execute(f"PRAGMA max_page_count = {pages}")
    responses = []
    while not responses or responses[-1].status_code == 303:
        responses.append(annotator.judge("left"))
    assert responses[-1].status_code == 503
    assert "could not be saved" in responses[-1].text
    assert len(served.rows()) == len(responses) - 1
    assert annotator.judge("left").status_code == 503
    writer.execute("PRAGMA max_page_count = 100000")
    assert annotator.judge("left").status_code == 303
    assert len(served.rows()) == len(responses)
