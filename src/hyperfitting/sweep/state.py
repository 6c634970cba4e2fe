"""The state of a sweep's runs: files in their folders that any process, on any machine, can read.

results.json    the run has finished, with the config that is in the record
status.json     its last reported status: running (and how far), interrupted, failed (and why)
.lock           held by the process that executes it, released by the system when that dies
"""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout
from pydantic import TypeAdapter, ValidationError

from hyperfitting.config import RunConfig
from hyperfitting.errors import UserError
from hyperfitting.fields import differing_fields
from hyperfitting.progress import Advance, ignore_advance
from hyperfitting.record.files import RECORD_FILE, read_record
from hyperfitting.runtime.files import write_json
from hyperfitting.sweep.spec import read_sweep_spec

STATUS_FILE = "status.json"
_LOCK_FILE = ".lock"
_WRITE_INTERVAL = 1.0
"""Minimum seconds between two status files within a task."""

StatusKind = Literal["waiting", "running", "finished", "failed", "interrupted"]


@dataclass
class Status:
    """The status of a run."""

    kind: StatusKind = "waiting"
    task: str = ""
    """Its current or last task, such as `training`."""
    done: int = 0
    total: int = 0
    """Units of the task; 0: unknown."""
    unit: str = ""
    shown: dict[str, float] = field(default_factory=dict)
    """Values to display, such as the loss."""
    started: float = 0.0
    """When its last attempt started, in seconds since the epoch."""
    updated: float = 0.0
    """When this was written, in seconds since the epoch."""
    attempts: int = 0
    reason: str = ""
    """Why it failed."""
    host: str = ""
    pid: int = 0


_STATUS = TypeAdapter(Status)


class RunFolder:
    """The folder of a run within a sweep."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def record_path(self) -> Path:
        """Where its record is, or will be."""
        return self.path / RECORD_FILE

    def status(self) -> Status:
        """Return its status; a run that is reported as running without a lock is interrupted."""
        status = self.read_status()
        if self.record_path.is_file():
            status.kind = "finished"
        elif status.kind == "running" and not self.is_locked():
            status.kind = "interrupted"
        return status

    def read_status(self) -> Status:
        """Return the status that was last written; its process may have died since."""
        try:
            return _STATUS.validate_json((self.path / STATUS_FILE).read_bytes())
        except (OSError, ValidationError):
            return Status()

    def write_status(self, status: Status, fsync: bool = True) -> None:
        """Write a status. A full disk or a missing folder does not stop the run.

        Args:
            status: to write.
            fsync: False: do not wait for the disk, as a GPU would wait too.
        """
        values = asdict(status) | {"updated": time.time()}
        with suppress(OSError):
            write_json(self.path / STATUS_FILE, values, fsync)

    def reset_status(self) -> None:
        """Replace how it ended before: its process may die before it has written a status."""
        status = self.read_status()
        if status.kind not in ("finished", "failed"):
            return
        with self.lock() as acquired:
            if acquired:
                self.write_status(Status(attempts=status.attempts))

    def mark_failed(self, attempts: int) -> None:
        """Write that it failed because its process died in every one of ``attempts`` attempts."""
        status = self.status()
        reason = (
            f"its process died {attempts} times, last while {status.task or 'starting'}\n"
            "  try:   if it ran out of memory: a lower hardware.micro_batch_size, "
            "tuning=late_stage, fewer runs at the same time"
        )
        self.path.mkdir(parents=True, exist_ok=True)  # it may have died before it had a folder
        self.write_status(replace(status, kind="failed", reason=reason))

    def is_locked(self) -> bool:
        """Return whether a process executes it now."""
        if not (self.path / _LOCK_FILE).exists():
            return False
        with self.lock() as acquired:
            return not acquired

    @contextmanager
    def lock(self) -> Iterator[bool]:
        """Lock it for this process; yield False if another process holds the lock."""
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / _LOCK_FILE)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    @contextmanager
    def require_lock(self, field: str) -> Iterator[None]:
        """Lock it for this process.

        Args:
            field: of the config, in which the folder is set.

        Raises:
            UserError: another process holds the lock.
        """
        with self.lock() as acquired:
            if not acquired:
                raise UserError(
                    "another process is running in this folder",
                    field=field,
                    value=self.path,
                    hint=f"another {field}=DIR, or wait until it has ended",
                )
            yield

    def is_finished(self, cfg: RunConfig) -> bool:
        """Return whether it has a record, of this config."""
        return self.record_path.exists() and not self.stale_reason(cfg)

    def stale_reason(self, cfg: RunConfig) -> str:
        """Return why its record is not that of a config; "" if it is, or if there is no record."""
        if not self.record_path.exists():
            return ""
        try:
            record = read_record(self.record_path)
        except UserError as error:
            return error.problem
        changed = sorted(differing_fields(record.config, cfg))
        if not changed:
            return ""
        names = ", ".join(changed[:5]) + (", …" if len(changed) > 5 else "")
        return f"of another config (changed: {names})"

    def set_aside(self) -> Path:
        """Rename its record, so that it runs again; return the new path."""
        number = 1
        while (aside := self.path / f"results.stale-{number}.json").exists():
            number += 1
        self.record_path.rename(aside)
        return aside


def labels_of(folder: Path) -> dict[str, str]:
    """Return the labels of the run in a folder, by axis; {} if its sweep is unknown."""
    try:
        runs = read_sweep_spec(folder.parent).runs
    except UserError:
        return {}
    return next((dict(run.labels) for run in runs if run.name == folder.name), {})


class StatusReporter:
    """Writes the progress and the outcome of a run to its folder."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder, self._in_task = folder, False
        self.status = Status(
            kind="running",
            task="starting",
            started=time.time(),
            attempts=folder.status().attempts + 1,
            host=socket.gethostname(),
            pid=os.getpid(),
        )
        folder.write_status(self.status)

    @contextmanager
    def progress(self, task: str, total: int, unit: str) -> Iterator[Advance]:
        """Report one task; see `hyperfitting.progress.ProgressReporter`."""
        if self._in_task:  # such as validation, within training
            yield ignore_advance
            return
        outer, self._in_task = self.status, True
        self.status = replace(outer, task=task, total=total, done=0, unit=unit, shown={})
        self._folder.write_status(self.status)
        last = time.monotonic()

        def advance(n: int, **shown: float) -> None:
            nonlocal last
            self.status.done += n
            self.status.shown.update(shown)
            if time.monotonic() - last >= _WRITE_INTERVAL:
                last = time.monotonic()
                self._folder.write_status(self.status, fsync=False)

        try:
            yield advance
        finally:
            self.status, self._in_task = outer, False

    def failed(self, reason: str) -> None:
        """Report that the run failed."""
        self._folder.write_status(replace(self.status, kind="failed", reason=reason))

    def finished(self) -> None:
        """Report that the run finished."""
        self._folder.write_status(replace(self.status, kind="finished"))
