"""The annotation page: what is saved, refused, undone and exported, and what protects it."""

import base64
import hashlib
import io
import multiprocessing
import os
import signal
import socket
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from rich.console import Console
from starlette.testclient import TestClient

from hyperfitting.errors import UserError
from hyperfitting.preference import cli
from hyperfitting.preference.app import create_app
from hyperfitting.preference.database import DATABASE_FILE, Database, ItemVersion
from hyperfitting.preference.items import (
    JUDGMENTS_FILE,
    TASK_FILE,
    Item,
    Shown,
    Task,
    resolve,
    write_task,
)
from hyperfitting.preference.judgments import Answer, append, make_judgment, read_judgments
from hyperfitting.preference.serve import export_judgments, progress_table
from tests.preference_study import CHOICES, Parsed, ScriptedAnnotator, make_study, shown_texts

HOSTILE = (
    "</script></p><script>window.evil = 1</script><img src=x onerror=alert(1)> {{ 7 * 7 }} & \"' "
)


class Served:
    """A study with its database and application; clients are of one server."""

    def __init__(self, folder: Path, task: Task, **app: Any) -> None:
        self.folder, self.task = folder, task
        self.database = Database(folder / DATABASE_FILE, task)
        self.tokens = self.database.issue_tokens(list(task.annotators))
        self.app = create_app(task, self.database, **app)
        self.clients = ExitStack()

    def client(self, **options: Any) -> TestClient:
        client = TestClient(self.app, raise_server_exceptions=False, **options)
        return self.clients.enter_context(client)  # one event loop for all its requests

    def annotator(self, name: str = "alice") -> ScriptedAnnotator:
        """Return an annotator in a browser of their own."""
        return ScriptedAnnotator(self.client(), f"/join/{self.tokens[name]}")

    def rows(self) -> list[tuple[Any, ...]]:
        """Return annotator, item, version, choice and whether it is superseded, in order."""
        with sqlite3.connect(self.folder / DATABASE_FILE) as connection:
            return connection.execute(
                "SELECT annotator, item, version, json_extract(judgment, '$.shown'), "
                "superseded IS NOT NULL FROM judgments ORDER BY id"
            ).fetchall()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Served]]:
    served = []

    def start(task: Task | None = None, **app: Any) -> Served:
        served.append(Served(tmp_path, task or make_study(), **app))
        return served[-1]

    yield start
    for one in served:
        one.clients.close()
        one.database.close()


def judgment(task: Task, item: Item, shown: Shown, annotator: str = "alice") -> Any:
    return make_judgment(task, item, annotator, Answer(shown), "page")


# ---- the work of an annotator


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


# ---- two tabs, retries, undo


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


def _answer_once(path: Path, task: Task, ready: Any, go: Any, outcomes: Any) -> None:
    database = Database(path, task)
    ready.put(True)
    go.wait()
    answer = judgment(task, task.items[0], "left")
    outcomes.put(database.save(answer, 0, f"form of {os.getpid()}", 1.0))


def test_of_many_threads_and_processes_one_answers_an_item(tmp_path: Path) -> None:
    task = make_study()
    path = tmp_path / DATABASE_FILE
    database = Database(path, task)
    fork = multiprocessing.get_context("fork")
    ready, go, outcomes = fork.Queue(), fork.Event(), fork.Queue()
    processes = [
        fork.Process(target=_answer_once, args=(path, task, ready, go, outcomes)) for _ in range(3)
    ]
    for process in processes:
        process.start()
    for _ in processes:
        ready.get(timeout=60)
    go.set()
    answer = judgment(task, task.items[0], "right")
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda i: database.save(answer, 0, f"form {i}", 1.0), range(8)))
    results += [outcomes.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert sorted(results) == ["saved"] + ["stale"] * 10
    assert len(database.finalize()) == 1
    database.close()


class DatabaseAgainstModel(RuleBasedStateMachine):
    """Any order of answers, retries, undos and exports by two annotators in stale and fresh tabs.

    The model is the list of an annotator's current judgments, and a counter for each item.
    """

    folders: Iterator[Path]
    task = make_study(n_items=3)

    @initialize()
    def start(self) -> None:
        self.database = Database(next(self.folders) / DATABASE_FILE, self.task)
        self.current: dict[str, list[list[Any]]] = {name: [] for name in self.task.annotators}
        self.versions: dict[tuple[str, str], int] = {}
        self.forms: dict[tuple[Any, ...], str] = {}

    def teardown(self) -> None:
        if hasattr(self, "database"):
            self.database.close()

    who = st.sampled_from(["alice", "bob"])

    @rule(who=who, number=st.integers(0, 2), age=st.integers(0, 2), choice=st.sampled_from(CHOICES))
    def answer(self, who: str, number: int, age: int, choice: Shown) -> None:
        """Answer an item from a page that is ``age`` versions old."""
        item = self.task.items[number]
        version = max(self.versions.get((who, item.id), 0) - age, 0)
        form = f"{who} {number} {version}"  # as signed: the same for the same page
        outcome = self.database.save(judgment(self.task, item, choice, who), version, form, 1.0)
        now = [one for one in self.current[who] if one[0] == item.id]
        if version == self.versions.get((who, item.id), 0) and not now:
            assert outcome == "saved"
            self.versions[who, item.id] = version + 1
            self.current[who].append([item.id, version + 1, choice, False])
        elif now and now[0][1:3] == [version + 1, choice]:
            assert outcome == "repeated"
        else:
            assert outcome == "stale"

    @rule(who=who, number=st.integers(0, 2), version=st.integers(1, 3))
    def undo(self, who: str, number: int, version: int) -> None:
        item = self.task.items[number].id
        outcome = self.database.undo(who, ItemVersion(item, version))
        last = self.current[who][-1] if self.current[who] else None
        if last and last[:2] == [item, version] and not last[3]:
            assert outcome == "saved"
            self.current[who].pop()
        elif version <= self.versions.get((who, item), 0) and [item, version] not in [
            one[:2] for one in self.current[who]
        ]:
            assert outcome == "repeated"
        else:
            assert outcome == "stale"

    @rule()
    def export(self) -> None:
        exported = self.database.finalize()
        assert {(j.annotator, j.item, j.shown) for j in exported} == {
            (who, one[0], one[2]) for who, current in self.current.items() for one in current
        }
        for current in self.current.values():
            for one in current:
                one[3] = True

    @rule()
    def restart(self) -> None:
        self.database.close()
        self.database = Database(self.database.path, self.task)

    @invariant()
    def agree(self) -> None:
        for who, current in getattr(self, "current", {}).items():
            state = self.database.state(who)
            assert state.judged == {one[0] for one in current}
            last = current[-1] if current and not current[-1][3] else None
            assert state.undoable == (last and ItemVersion(last[0], last[1]))


def test_the_database_agrees_with_a_model(tmp_path_factory: pytest.TempPathFactory) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    DatabaseAgainstModel.folders = iter(lambda: tmp_path_factory.mktemp("model"), None)
    run_state_machine_as_test(
        DatabaseAgainstModel,
        settings=settings(max_examples=12, stateful_step_count=30, deadline=None),
    )


# ---- faults


def _judge_until_killed(path: Path, task: Task, saved: Any) -> None:
    database = Database(path, task)
    for item in task.items_of("alice"):
        database.save(judgment(task, item, "left"), 0, "form", 1.0)
        saved.send(item.id)
    time.sleep(60)


def test_what_was_confirmed_before_a_kill_is_there(tmp_path: Path) -> None:
    task = make_study(n_items=200)
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    args = (tmp_path / DATABASE_FILE, task, sender)
    process = fork.Process(target=_judge_until_killed, args=args)
    process.start()
    confirmed = [receiver.recv() for _ in range(10)]
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    sender.close()
    while receiver.poll():
        try:
            confirmed.append(receiver.recv())
        except EOFError:
            break
    database = Database(tmp_path / DATABASE_FILE, task)
    items = [one.item for one in database.finalize()]
    assert items[: len(confirmed)] == confirmed
    assert len(items) - len(confirmed) in (0, 1)  # saved, and killed before that was told
    assert database._writer.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
    database.close()


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


# ---- protection


def test_hostile_texts_are_escaped_everywhere(serve: Callable[..., Served]) -> None:
    annotator = serve(make_study(words=HOSTILE, aspects=("fluency",))).annotator()
    page = Parsed(annotator.html)
    assert all(HOSTILE in text for text in shown_texts(annotator.html))
    assert page.tags.count("script") == 1
    assert "img" not in page.tags
    assert not any(name.startswith("on") or name in ("src", "style") for name, _ in page.attributes)
    assert {value for name, value in page.attributes if name == "href"} <= {"data:,", "pause", "./"}


def test_a_lone_surrogate_in_a_text_is_shown_as_a_question_mark(
    serve: Callable[..., Served],
) -> None:
    assert "?Once" in shown_texts(serve(make_study(words="\ud800")).annotator().html)[0]


def test_every_response_has_the_security_headers(serve: Callable[..., Served]) -> None:
    served = serve()
    annotator = served.annotator()
    client = annotator.client
    path = annotator.page
    page = Parsed(client.get(path).text)
    hashes = {
        kind: "sha256-" + base64.b64encode(hashlib.sha256("".join(code).encode()).digest()).decode()
        for kind, code in page.code.items()
    }
    policy = (
        f"default-src 'none'; script-src '{hashes['script']}'; style-src '{hashes['style']}'; "
        "img-src data:; connect-src 'self'; form-action 'self'; base-uri 'none'; "
        "frame-ancestors 'none'"
    )
    join = f"/join/{served.tokens['bob']}"
    responses = {
        200: client.get(path),
        303: client.get(join, follow_redirects=False),
        401: client.get("/a/0123456789ab/"),
        403: client.post(path + "judge", data={"choice": "left"}),
        404: client.get("/"),
        405: client.get(path + "judge"),
        409: (annotator.send("judge", choice="left"), annotator.send("judge", choice="right"))[1],
        413: client.post(path + "judge", content=b"x" * 10_000),
    }
    served.database.close()
    responses[503] = client.get(path)
    for status, response in responses.items():
        assert response.status_code == status
        assert response.headers["content-security-policy"] == policy
        assert response.headers["cache-control"] == "no-store"
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["referrer-policy"] == "no-referrer"
        assert response.headers["x-frame-options"] == "DENY"


def test_there_is_no_other_page_and_no_directory(serve: Callable[..., Served]) -> None:
    client = serve().annotator().client
    paths = ("/", "/a/", "/join/", "/static/", "/a/../annotations.sqlite", "/assets/annotate.js")
    for path in (*paths, "/docs", "/openapi.json", "/join/x/../../"):
        assert client.get(path).status_code == 404


def test_a_form_that_the_server_did_not_make_for_this_annotator_is_refused(
    serve: Callable[..., Served],
) -> None:
    served = serve()
    alice, bob = served.annotator("alice"), served.annotator("bob")
    theirs = bob.fields("judge")
    other_version = alice.fields("judge") | {"version": "1"}
    other_item = alice.fields("judge") | {"item": served.task.items[3].id}
    for fields in ({}, theirs, other_version, other_item, {"signature": "é"}):
        response = alice.client.post(alice.page + "judge", data={**fields, "choice": "left"})
        assert response.status_code == 403
    for site, status in (("cross-site", 403), ("same-site", 403), ("same-origin", 303)):
        alice.client.headers["sec-fetch-site"] = site
        assert alice.send("judge", choice="left").status_code == status
    for fields in (
        {"choice": "best"},
        {},
    ):  # the latter is Enter in a radio group, without a script
        assert alice.send("judge", **fields).status_code == 400
    assert alice.client.post(bob.page + "judge", data=theirs).status_code == 401
    assert [row[:1] for row in served.rows()] == [("alice",)]


def test_two_annotators_work_in_one_browser(serve: Callable[..., Served]) -> None:
    served = serve()
    browser = served.client()
    alice, bob = (
        ScriptedAnnotator(browser, f"/join/{served.tokens[name]}") for name in ("alice", "bob")
    )
    alice.judge("left")
    bob.judge("right")
    assert [(row[0], row[3]) for row in served.rows()] == [("alice", "left"), ("bob", "right")]


def test_forms_that_are_too_large_or_malformed_are_refused(serve: Callable[..., Served]) -> None:
    served = serve()
    annotator = served.annotator()
    url = annotator.page + "judge"

    def chunks() -> Iterator[bytes]:  # without a Content-Length
        yield from [b"choice=" + b"x" * 1000] * 5

    assert annotator.client.post(url, content=chunks()).status_code == 413
    assert annotator.send("judge", choice="left" * 2000).status_code == 413
    bad = [
        "&".join(f"a{i}=1" for i in range(30)),
        "choice=left&choice=right",
        "a",
        "a=\udcff",
        "é=1",
    ]
    for body in bad:
        content = body.encode("utf-8", "surrogateescape")
        assert annotator.client.post(url, content=content).status_code == 400
    assert served.rows() == []


def test_a_client_that_asks_too_often_is_told_to_wait(
    serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve()
    alice, bob = served.annotator("alice"), served.annotator("bob")
    now = time.monotonic()
    monkeypatch.setattr("hyperfitting.preference.security.monotonic", lambda: now)
    while (response := alice.load()).status_code == 200:
        pass
    assert response.status_code == 429
    assert response.headers["retry-after"] == "1"
    assert bob.load().status_code == 200
    now += 1  # second
    assert [alice.load().status_code for _ in range(11)] == [200] * 10 + [429]
    guesses = [bob.client.get(f"/join/{i}").status_code for i in range(21)]
    assert guesses == [404] * 20 + [429]


def test_links_are_kept_as_hashes_alone_and_can_be_replaced(serve: Callable[..., Served]) -> None:
    served = serve()
    annotator = served.annotator()
    annotator.judge("left")
    token = served.tokens["alice"]
    files = list(served.folder.glob(f"{DATABASE_FILE}*"))
    assert len(files) == 3  # with the write-ahead log
    for file in files:
        assert token.encode() not in file.read_bytes()
        assert file.stat().st_mode & 0o077 == 0
    assert served.database.issue_tokens(["alice"]) == {}
    served.tokens |= served.database.issue_tokens([], renew=["alice"])
    assert annotator.load().status_code == 401
    assert served.client().get(f"/join/{token}").status_code == 404
    assert "1 of 6" in served.annotator().html


@pytest.mark.parametrize("is_https", [False, True])
def test_behind_a_proxy_with_a_path_links_and_cookies_have_it(
    serve: Callable[..., Served], is_https: bool
) -> None:
    served = serve(is_https=is_https)
    scheme = "https" if is_https else "http"
    client = served.client(root_path="/study", base_url=f"{scheme}://lab.example")
    annotator = ScriptedAnnotator(client, f"/study/join/{served.tokens['alice']}")
    assert annotator.page.startswith(f"{scheme}://lab.example/study/a/")
    (cookie,) = client.cookies.jar
    assert f"lab.example{cookie.path}" == annotator.page.split("//")[1]
    assert cookie.secure == is_https
    assert "HttpOnly" in cookie._rest
    response = annotator.judge("left")
    assert response.headers["location"] == "./"
    assert "1 of 6" in annotator.html


# ---- the command line


def test_the_terminal_shows_how_far_everybody_is(serve: Callable[..., Served]) -> None:
    served = serve()
    served.annotator().judge("left")
    console = Console(file=io.StringIO(), width=80)
    console.print(progress_table(served.task, served.database))
    alice, bob = console.file.getvalue().splitlines()
    assert "1 of 6" in alice
    assert alice.rstrip().endswith("s ago")
    assert bob.rstrip().endswith("0 of 6")


def run(folder: Path, *arguments: str, capsys: pytest.CaptureFixture[str]) -> SimpleNamespace:
    with pytest.raises(SystemExit) as end, mock.patch.dict(os.environ):
        cli.main(["serve", str(folder), *arguments])
    output = capsys.readouterr()
    return SimpleNamespace(status=end.value.code, stdout=output.out, stderr=output.err)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_task(tmp_path / "study", make_study())
    return tmp_path / "study"


def test_a_users_mistake_is_one_clear_message(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        mistakes = {
            ("--port", port): "cannot be listened on: Address already in use",
            ("--host", "192.0.2.1"): "cannot be listened on",
            ("--port", "99999"): "cannot be listened on",
            ("--annotators", "alicia"): "did you mean alice?",
            ("--new-links", "carol"): "valid: alice, bob",
            ("--public-url", "lab.example"): "valid: https://HOST/PATH",
        }
        for arguments, message in mistakes.items():
            result = run(folder, "--port", "0", *arguments, capsys=capsys)
            assert result.status == 1
            assert message in result.stderr
            assert "Traceback" not in result.stderr
    assert run(folder.parent, capsys=capsys).stderr.count(TASK_FILE) >= 1  # no study there


def test_a_damaged_task_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / TASK_FILE
    path.write_text(path.read_text().replace("another text 1", "another text 2"))
    result = run(folder, capsys=capsys)
    assert result.status == 1
    assert "task.json is not valid" in result.stderr


def test_a_database_of_another_study_or_none_or_damaged_is_refused(tmp_path: Path) -> None:
    path = tmp_path / DATABASE_FILE
    task = make_study(n_items=100)
    database = Database(path, task)
    for item in task.items_of("alice"):
        database.save(judgment(task, item, "left"), 0, "form", 1.0)
    database.close()
    with pytest.raises(UserError, match="judgments of another task"):
        Database(path, make_study(n_items=2))
    with sqlite3.connect(tmp_path / "other.sqlite") as other:
        other.execute("CREATE TABLE t (a)")
    with pytest.raises(UserError, match="no database of this version"):
        Database(tmp_path / "other.sqlite", task)
    (tmp_path / "text.sqlite").write_text("no database " * 100)
    with pytest.raises(UserError, match="not a database"):
        Database(tmp_path / "text.sqlite", task)
    content = bytearray(path.read_bytes())
    content[4096 * 4 : 4096 * 8] = bytes(4096 * 4)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"damaged|malformed"):
        Database(path, task)
    with pytest.raises(UserError, match="cannot be used"):
        Database(tmp_path, task)  # a folder


def test_export_alone_serves_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = make_study()
    database = Database(folder / DATABASE_FILE, task)
    database.save(judgment(task, task.items_of("bob")[0], "equal", "bob"), 0, "form", 1.0)
    database.close()
    result = run(folder, "--export", capsys=capsys)
    assert (result.status, result.stderr) == (0, "")
    assert "1 new" in result.stdout
    assert len(read_judgments(folder / JUDGMENTS_FILE)) == 1
