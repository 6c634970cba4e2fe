"""The judgments of a study's annotation page, in SQLite: durable, none lost, none doubled.

Write-ahead logging with `synchronous=FULL`: when `save` has returned, the judgment has been flushed
to disk. Every page shows an item at a version, the number of its judgments so far; what a page
sends counts only if that is still the version, so that of two tabs the second is refused. A
judgment that is undone stays as a superseded row. It knows nothing about HTTP.
"""

import hashlib
import os
import secrets
import sqlite3
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from hyperfitting.errors import UserError, exhausted_resource
from hyperfitting.preference.items import Task
from hyperfitting.preference.judgments import Judgment

DATABASE_FILE = "annotations.sqlite"
_APPLICATION = 0x48594650
"""SQLite's application id of these files ("HYFP")."""
_VERSION = 1
_BUSY_SECONDS = 10.0
"""How long a write waits for another process's."""
_SCHEMA = f"""
CREATE TABLE study (task TEXT NOT NULL, key BLOB NOT NULL);
CREATE TABLE annotators (
  name TEXT PRIMARY KEY, page TEXT NOT NULL UNIQUE, token_hash BLOB NOT NULL
);
CREATE TABLE judgments (
  id INTEGER PRIMARY KEY,
  annotator TEXT NOT NULL, item TEXT NOT NULL, version INTEGER NOT NULL,
  form TEXT NOT NULL, -- signature of the page that sent it
  judgment TEXT NOT NULL, -- a line of judgments.jsonl
  server_seconds REAL NOT NULL, -- from when the page was sent to when the judgment came
  exported TEXT, superseded TEXT, -- when
  UNIQUE (annotator, item, version)
);
CREATE UNIQUE INDEX one_current_judgment ON judgments (annotator, item) WHERE superseded IS NULL;
PRAGMA application_id = {_APPLICATION};
PRAGMA user_version = {_VERSION};
"""

Outcome = Literal["saved", "repeated", "stale"]
"""What became of a request; `repeated`: the same request had been saved before."""


@dataclass(frozen=True)
class ItemVersion:
    """An item as a page shows it."""

    item: str
    version: int
    """Judgments of the item by this annotator so far, superseded ones included."""


@dataclass(frozen=True)
class AnnotatorState:
    """What an annotator has done so far."""

    judged: frozenset[str]
    """Items with a judgment that is not superseded."""
    versions: dict[str, int]
    """By item that was ever judged."""
    undoable: ItemVersion | None
    """The last judgment, unless it has been exported."""

    def version_of(self, item: str) -> ItemVersion:
        """Return an item at its version."""
        return ItemVersion(item, self.versions.get(item, 0))


class Database:
    """Judgments, annotators' links, and the key that signs pages.

    Methods can be called from several threads, and several processes may use one file.

    Args:
        path: of the file; it is created if it does not exist.
        task: the study.

    Raises:
        UserError: it is no such database, is damaged, or is of another study.
    """

    def __init__(self, path: Path, task: Task) -> None:
        self.path, self._task = path, task
        self._lock, self._read_lock = threading.Lock(), threading.Lock()
        try:
            # readable by its owner alone, as SQLite then makes the files beside it
            path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
            self._writer, self._reader = self._connect(), self._connect()
            self._create()
            self._check()
        except (sqlite3.Error, OSError) as error:
            if exhausted_resource(error):
                raise
            raise self._error(f"cannot be used: {error}", "another --database FILE") from error
        ((self.key,),) = self._read("SELECT key FROM study")

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self.path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )
        (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
        if mode != "wal":
            raise self._error(
                "its file system has no write-ahead log", "--database on a local disk"
            )
        connection.execute("PRAGMA synchronous = FULL")
        return connection

    def _create(self) -> None:
        """Create the tables if the file is empty."""
        with self._transaction() as connection:
            if connection.execute("SELECT count(*) FROM sqlite_master").fetchone() != (0,):
                return
            for statement in _SCHEMA.split(";\n"):
                connection.execute(statement)
            connection.execute(
                "INSERT INTO study VALUES (?, ?)",
                (self._task.content_hash, secrets.token_bytes(32)),
            )

    def _check(self) -> None:
        application, version, damage = (
            self._read(f"PRAGMA {name}")[0][0]
            for name in ("application_id", "user_version", "quick_check(1)")
        )
        if (application, version) != (_APPLICATION, _VERSION):
            raise self._error("is no database of this version of hyperfit-preference serve")
        if damage != "ok":
            raise self._error(f"is damaged: {damage}", "a copy of it")
        ((task,),) = self._read("SELECT task FROM study")
        if task != self._task.content_hash:
            raise self._error(f"has the judgments of another task ({task})")

    def _error(self, problem: str, hint: str = "another --database FILE, or none yet") -> UserError:
        return UserError(problem, field="--database", value=self.path, hint=hint)

    def close(self) -> None:
        """Close the file; what was saved is in it."""
        self._reader.close()
        self._writer.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Write in this context all or nothing; at its end it has been flushed to disk."""
        with self._lock:
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield self._writer
                self._writer.execute("COMMIT")
            finally:
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")

    def _read(self, query: str, *values: str | bytes) -> list[tuple[Any, ...]]:
        with self._read_lock:
            return self._reader.execute(query, values).fetchall()

    # ---- annotators and their links

    def issue_tokens(
        self, annotators: Collection[str], renew: Collection[str] = ()
    ) -> dict[str, str]:
        """Return new tokens by annotator; only their hashes are kept.

        Args:
            annotators: who get one if they have none yet.
            renew: who get one in any case; their old one opens nothing any more.
        """
        known = {name for (name,) in self._read("SELECT name FROM annotators")}
        names = [name for name in annotators if name not in known]
        tokens = {name: secrets.token_urlsafe(24) for name in dict.fromkeys([*names, *renew])}
        with self._transaction() as connection:
            for name, token in tokens.items():
                digest = _digest(token)
                page = hashlib.sha256(digest).hexdigest()[:12]
                connection.execute("REPLACE INTO annotators VALUES (?, ?, ?)", (name, page, digest))
        return tokens

    def page_of(self, token: str) -> str | None:
        """Return the name of the page that a token opens, if it opens one."""
        rows = self._read("SELECT page FROM annotators WHERE token_hash = ?", _digest(token))
        return rows[0][0] if rows else None

    def annotator_of(self, page: str, token: str) -> str | None:
        """Return whose page it is, if the token opens it."""
        query = "SELECT name FROM annotators WHERE page = ? AND token_hash = ?"
        rows = self._read(query, page, _digest(token))
        return rows[0][0] if rows else None

    # ---- judgments

    def state(self, annotator: str) -> AnnotatorState:
        """Return what an annotator has done so far."""
        rows = self._read(
            "SELECT item, version, superseded IS NULL, exported IS NULL FROM judgments "
            "WHERE annotator = ? ORDER BY id",
            annotator,
        )
        current = [
            ItemVersion(item, version) for item, version, is_current, _ in rows if is_current
        ]
        exported = {item for item, _, _, is_open in rows if not is_open}
        last = current[-1] if current else None
        return AnnotatorState(
            judged=frozenset(shown.item for shown in current),
            versions={item: version for item, version, *_ in rows},
            undoable=last if last and last.item not in exported else None,
        )

    def save(self, judgment: Judgment, version: int, form: str, server_seconds: float) -> Outcome:
        """Save a judgment durably.

        Args:
            judgment: of an annotator and an item of the study.
            version: at which the page showed the item.
            form: the page's signature: the same request sent again is recognized by it.
            server_seconds: since the page was sent.
        """
        key = (judgment.annotator, judgment.item)
        with self._transaction() as connection:
            last = connection.execute(
                "SELECT version, form, judgment, superseded IS NULL FROM judgments "
                "WHERE annotator = ? AND item = ? ORDER BY version DESC LIMIT 1",
                key,
            ).fetchone() or (0, "", "", False)
            if last[0] == version and not last[3]:
                connection.execute(
                    "INSERT INTO judgments "
                    "(annotator, item, version, form, judgment, server_seconds) "
                    "VALUES (?, ?, ?, ?, ?, ?)",
                    (*key, version + 1, form, judgment.model_dump_json(), server_seconds),
                )
                return "saved"
        if last[0] == version + 1 and last[1] == form and last[3]:
            before = Judgment.model_validate_json(last[2])
            if (before.shown, before.aspects) == (judgment.shown, judgment.aspects):
                return "repeated"
        return "stale"

    def undo(self, annotator: str, shown: ItemVersion) -> Outcome:
        """Supersede an annotator's last judgment, which a page showed, durably."""
        with self._transaction() as connection:
            last = connection.execute(
                "SELECT id, item, version FROM judgments "
                "WHERE annotator = ? AND superseded IS NULL AND exported IS NULL "
                "ORDER BY id DESC LIMIT 1",
                (annotator,),
            ).fetchone()
            if last and last[1:] == (shown.item, shown.version):
                connection.execute(
                    "UPDATE judgments SET superseded = ? WHERE id = ?", (_now(), last[0])
                )
                return "saved"
            undone = connection.execute(
                "SELECT superseded FROM judgments WHERE annotator = ? AND item = ? AND version = ?",
                (annotator, shown.item, shown.version),
            ).fetchone()
        return "repeated" if undone and undone[0] else "stale"

    def progress(self) -> dict[str, tuple[int, datetime]]:
        """Return the number of judgments by annotator, and when the last was given."""
        rows = self._read(
            "SELECT annotator, count(*), max(json_extract(judgment, '$.created')) FROM judgments "
            "WHERE superseded IS NULL GROUP BY annotator"
        )
        return {name: (count, datetime.fromisoformat(last)) for name, count, last in rows}

    def finalize(self) -> list[Judgment]:
        """Return all judgments that are not superseded, in order; they can no longer be undone."""
        with self._transaction() as connection:
            connection.execute(
                "UPDATE judgments SET exported = ? WHERE superseded IS NULL AND exported IS NULL",
                (_now(),),
            )
            rows = connection.execute(
                "SELECT judgment FROM judgments WHERE superseded IS NULL ORDER BY id"
            ).fetchall()
        return [Judgment.model_validate_json(judgment) for (judgment,) in rows]


def _digest(token: str) -> bytes:
    """Return the hash of a token; being random, it needs no slow one."""
    return hashlib.sha256(token.encode("utf-8", "replace")).digest()


def _now() -> str:
    return datetime.now(UTC).isoformat()
