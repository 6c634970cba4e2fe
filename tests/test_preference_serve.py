"""The command line of `hyperfit-preference serve`: progress, mistakes and export."""

import io
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from rich.console import Console

from hyperfitting.preference import cli
from hyperfitting.preference.database import DATABASE_FILE, Database
from hyperfitting.preference.items import JUDGMENTS_FILE, TASK_FILE, write_task
from hyperfitting.preference.judgments import read_judgments
from hyperfitting.preference.serve import progress_table
from tests.annotation_app import Served, judgment, serving_studies
from tests.preference_study import make_study


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Served]]:
    with serving_studies(tmp_path) as start:
        yield start


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


def test_export_alone_serves_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = make_study()
    database = Database(folder / DATABASE_FILE, task)
    database.save(judgment(task, task.items_of("bob")[0], "equal", "bob"), 0, "form", 1.0)
    database.close()
    result = run(folder, "--export", capsys=capsys)
    assert (result.status, result.stderr) == (0, "")
    assert "1 new" in result.stdout
    assert len(read_judgments(folder / JUDGMENTS_FILE)) == 1
