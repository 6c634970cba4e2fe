"""The database of judgments: concurrent writers, a kill, and files that it refuses."""

import multiprocessing
import os
import signal
import sqlite3
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from hyperfitting.errors import UserError
from hyperfitting.preference.database import DATABASE_FILE, Database, ItemVersion
from hyperfitting.preference.items import Shown, Task
from tests.annotation_app import judgment
from tests.preference_study import CHOICES, make_study


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
