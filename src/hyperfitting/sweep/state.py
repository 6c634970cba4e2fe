"""How far a member is: files in its folder that any process, on any machine, can read.

results.json    it has finished, with the config that is in there
status.json     what it last said: running (and how far), interrupted, failed (and why)
.lock           held by the process that runs it, and let go by the system when that dies
"""

import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from hyperfitting.config import RunConfig
from hyperfitting.errors import UserError
from hyperfitting.progress import Advance
from hyperfitting.results import FILE_NAME, read
from hyperfitting.store import write_json

SPEC, SPEC_VERSION = "sweep.json", 1
"""What a sweep's folder says of the sweep, and the version of its format."""
STATUS = "status.json"
_LOCK = ".lock"
_EVERY = 1.0
"""Seconds between two words on how far a task is."""
_NO_MATTER = ("tracking", "hardware", "store", "fetch_from", "plan", "scale")
"""Parts of a config that change no number."""

Kind = Literal["waiting", "running", "finished", "failed", "interrupted"]


@dataclass
class Status:
    """What is known of a member."""

    kind: Kind = "waiting"
    task: str = ""
    """What it does now, or did last."""
    done: int = 0
    total: int = 0
    unit: str = ""
    shown: dict[str, float] = field(default_factory=dict)
    """Numbers worth a look, such as the loss."""
    began: float = 0.0
    """When it was last begun, in seconds since 1970."""
    said: float = 0.0
    """When this was written."""
    attempts: int = 0
    reason: str = ""
    """Why it failed."""
    host: str = ""
    pid: int = 0


class Folder:
    """A member's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def record(self) -> Path:
        """Where its record is, or will be."""
        return self.path / FILE_NAME

    def status(self) -> Status:
        """Return how far it is."""
        said = self.said()
        if self.record.is_file():
            said.kind = "finished"
        elif said.kind == "running" and not self.is_held():
            said.kind = "interrupted"
        return said

    def said(self) -> Status:
        """Return what it last said of itself; its process may have died since."""
        try:
            return Status(**json.loads((self.path / STATUS).read_text("utf-8")))
        except (OSError, ValueError, TypeError):
            return Status()

    def say(self, status: Status) -> None:
        """Write how far it is. A full disk or a folder that is gone must not stop the work."""
        with suppress(OSError):
            write_json(self.path / STATUS, asdict(status) | {"said": time.time()})

    def give_up(self, times: int) -> None:
        """Say that it has failed, because its process has died so many times."""
        status = self.status()
        status.kind = "failed"
        status.reason = (
            f"its process died {times} times, last while {status.task or 'beginning'}\n"
            "  try:   if it took too much memory: a lower hardware.micro_batch_size, "
            "tuning=late_stage, fewer members at once"
        )
        self.path.mkdir(parents=True, exist_ok=True)  # it may never have begun
        self.say(status)

    def is_held(self) -> bool:
        """Return whether a process runs it now."""
        if not (self.path / _LOCK).exists():
            return False
        with self.claimed() as mine:
            return not mine

    @contextmanager
    def claimed(self) -> Iterator[bool]:
        """Be the only one that runs it, in this context; false if another process is."""
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / _LOCK)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def is_finished(self, cfg: RunConfig) -> bool:
        """Return whether its record is there, and is of this config."""
        return self.outdated(cfg) == ""

    def outdated(self, cfg: RunConfig) -> str | None:
        """Return why its record is not that of a config: "" if it is; none: there is no record."""
        if not self.record.exists():
            return None
        try:
            record = read(self.record)
        except UserError as error:
            return error.problem
        changed = sorted(_differences(record["config"], cfg))
        if changed:
            some = ", ".join(changed[:5]) + (", …" if len(changed) > 5 else "")
            return f"of another config (changed: {some})"
        return ""

    def set_aside(self) -> Path:
        """Move the record away, so that the member runs again; return where it is now."""
        number = 1
        while (aside := self.path / f"results.before-{number}.json").exists():
            number += 1
        self.record.rename(aside)
        return aside


def labels_of(member: Path) -> dict[str, str]:
    """Return what sets a member apart, by the sweep's axes; {} if its sweep does not say."""
    try:
        spec = json.loads((member.parent / SPEC).read_text("utf-8"))
        return next(dict(m["labels"]) for m in spec["members"] if m["name"] == member.name)
    except (OSError, ValueError, LookupError, TypeError, StopIteration):
        return {}


def _differences(old: Mapping[str, Any], new: Any, at: str = "") -> Iterator[str]:
    """Yield the fields that differ between a record's config and another, and change a number.

    A field that the record is too old to have had its default.
    """
    yield from (f"{at}{name}" for name in old if name not in new.__dataclass_fields__)
    for one in fields(new):
        if not at and one.name in _NO_MATTER:
            continue
        before, after = old.get(one.name, _default(one)), getattr(new, one.name)
        if is_dataclass(after) and isinstance(before, Mapping):
            yield from _differences(before, after, f"{at}{one.name}.")
        elif _plain(before) != _plain(after):
            yield f"{at}{one.name}"


def _default(one: Field[Any]) -> Any:
    return one.default if one.default_factory is MISSING else one.default_factory()


def _plain(value: Any) -> Any:
    """Return a config's value as a record holds it."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    return value


class Reporter:
    """Tells a member's folder what it does; the progress of a run that nobody looks at."""

    def __init__(self, folder: Folder) -> None:
        self._folder, self._within = folder, False
        attempts = folder.status().attempts + 1
        self.status = Status(
            "running",
            "beginning",
            began=time.time(),
            attempts=attempts,
            host=socket.gethostname(),
            pid=os.getpid(),
        )
        folder.say(self.status)

    @contextmanager
    def progress(self, task: str, total: int, unit: str) -> Iterator[Advance]:
        """Show one task; see `hyperfitting.progress.Progress`."""
        if self._within:  # a look at validation is part of the training that it interrupts
            yield self._pass
            return
        outer, self._within = self.status, True
        self.status = Status(
            **asdict(outer) | {"task": task, "total": total, "done": 0, "unit": unit, "shown": {}}
        )
        self._folder.say(self.status)
        last = time.monotonic()

        def advance(n: int, **shown: float) -> None:
            nonlocal last
            self.status.done += n
            self.status.shown.update(shown)
            if time.monotonic() - last >= _EVERY:
                last = time.monotonic()
                self._folder.say(self.status)

        try:
            yield advance
        finally:
            self.status, self._within = outer, False

    @staticmethod
    def _pass(n: int, **shown: float) -> None:
        """Say nothing."""

    def failed(self, reason: str) -> None:
        """Say that it failed, and why."""
        self._folder.say(Status(**asdict(self.status) | {"kind": "failed", "reason": reason}))

    def finished(self) -> None:
        """Say that it has finished."""
        self._folder.say(Status(**asdict(self.status) | {"kind": "finished"}))
