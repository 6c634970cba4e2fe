"""A preference study with its database and annotation page, in this process."""

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from starlette.testclient import TestClient

from hyperfitting.preference.app import create_app
from hyperfitting.preference.database import DATABASE_FILE, Database
from hyperfitting.preference.items import Item, Shown, Task
from hyperfitting.preference.judgments import Answer, make_judgment
from tests.preference_study import ScriptedAnnotator, make_study


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


def judgment(task: Task, item: Item, shown: Shown, annotator: str = "alice") -> Any:
    return make_judgment(task, item, annotator, Answer(shown), "page")


@contextmanager
def serving_studies(folder: Path) -> Iterator[Callable[..., Served]]:
    """Return a function that serves a study in a folder, until the block ends."""
    served = []

    def start(task: Task | None = None, **app: Any) -> Served:
        served.append(Served(folder, task or make_study(), **app))
        return served[-1]

    yield start
    for one in served:
        one.clients.close()
        one.database.close()
