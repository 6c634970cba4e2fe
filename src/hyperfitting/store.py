"""Content-addressed artefacts on disk: made once, whole or not at all, verified when read.

An artefact's id is a hash of exactly what determines it: its kind and that kind's format version,
its config, and the ids of what it is made from. So the id is known before anything is made, and
whoever needs the files asks for them. This file knows nothing of models, texts or metrics.

    <store>/<kind>/<id>/            a finished artefact, with its manifest.json
    <store>/<kind>/<id>.partial/    one in the making; what its maker left there after a crash is
                                    given back to it on the next try
    <store>/<kind>/<id>.copy/       one that is copied from another store
    <store>/<kind>/<id>.lock        held by the process that makes it
    <store>/<kind>/<id>.corrupt-*/  set aside because a file did not match its checksum
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hyperfitting.errors import UserError

MANIFEST = "manifest.json"
MANIFEST_VERSION = 1
PACKAGES = ("hyperfitting", "torch", "transformers", "tokenizers", "datasets", "numpy")

log = logging.getLogger(__name__)


def digest(value: Any) -> str:
    """Return the id of a JSON-serialisable value: 16 hex digits of its canonical form's SHA-256."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(paths: Mapping[str, Path]) -> str:
    """Return an id of named files' contents. Each content is hashed once per process."""
    return digest(
        {name: _stamped_sha256(path, path.stat().st_mtime_ns) for name, path in paths.items()}
    )


@cache
def _stamped_sha256(path: Path, _mtime_ns: int) -> str:
    return file_sha256(path)


def package_versions() -> dict[str, str]:
    """Return the installed versions of the packages that can change a number."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def fsync_path(path: Path) -> None:
    """Make a file's content, or a folder's entries, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def look_anew(folder: Path) -> None:
    """Have the system forget what it remembers of a folder that other machines write to.

    A client of NFS answers for up to a minute from what it has seen, also that something was not
    there. When it changes the folder itself, it learns that others have.
    """
    with suppress(OSError):  # it is not there, or not to be written to
        descriptor, name = tempfile.mkstemp(prefix=".look.", suffix=".partial", dir=folder)
        os.close(descriptor)
        Path(name).unlink()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a path to write to; it becomes ``path`` only when all of it is on disk.

    It is written beside, fsynced and renamed; on an error nothing is left. Several processes may
    write the same file at once: one of them is the last.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield beside
        fsync_path(beside)
        beside.rename(path)
        fsync_path(path.parent)
    finally:
        beside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write readable JSON, whole or not at all.

    Raises:
        ValueError: a number is NaN or infinite, which JSON cannot say.
    """
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


class Artefact:
    """A handle on something that is, or can be, made. Files are made and verified on demand."""

    def __init__(
        self,
        folder: Path,
        kind: str,
        recipe: Mapping[str, Any],
        make: Callable[[Path], None],
        work: Callable[[], float] | None = None,
        elsewhere: Sequence[Path] = (),
    ) -> None:
        self.kind = kind
        self.work = work
        self.recipe = recipe
        self.id = digest(recipe)
        self.folder = folder / kind / self.id
        self._elsewhere = [store / kind / self.id for store in elsewhere]
        self._make = make
        self._verified: set[str] = set()

    @property
    def exists(self) -> bool:
        """Whether it is made already (its files are verified only when they are read)."""
        return (self.folder / MANIFEST).is_file()

    def file(self, name: str) -> Path:
        """Return the path of one of its files, made if need be, and verified."""
        while name not in self._verified:
            self.ensure()
            if self._intact([name]):
                self._verified.add(name)
        return self.folder / name

    def path(self) -> Path:
        """Return the path of its folder, made if need be, every file of it verified."""
        while True:
            self.ensure()
            names = [name for name in self.manifest()["files"] if name not in self._verified]
            if self._intact(names):
                self._verified.update(names)
                return self.folder

    def seconds(self) -> float:
        """Return how long making it took, in seconds."""
        return float(self.manifest()["seconds"])

    def manifest(self) -> dict[str, Any]:
        """Return its manifest.

        Raises:
            UserError: it was written by a version of this software that is not known here.
        """
        manifest: dict[str, Any] = json.loads((self.folder / MANIFEST).read_text("utf-8"))
        if manifest.get("manifest_version") != MANIFEST_VERSION:
            raise UserError(
                f"artefact {self.folder} was written in format "
                f"{manifest.get('manifest_version')!r}, which this version does not know",
                valid=f"format {MANIFEST_VERSION}",
                hint="use the version of hyperfitting that wrote it, another store=DIR, "
                "or delete that folder to have it made again",
            )
        return manifest

    def ensure(self) -> None:
        """Make it, unless it is there. Of several processes, one makes it and the others wait."""
        if self.folder.exists():
            self._check_manifest()
        if self.exists:
            return
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with self._lock():
            look_anew(self.folder.parent)  # another machine may have made it just now
            if not self.exists and not any(map(self._fetch, self._elsewhere)):
                self._build()

    @contextmanager
    def _lock(self) -> Iterator[None]:
        lock = FileLock(f"{self.folder}.lock")
        try:
            lock.acquire(timeout=1)
        except Timeout:
            log.warning("%s %s is being made by another process; waiting", self.kind, self.id)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def _fetch(self, made: Path) -> bool:
        """Copy it from where it is made already, if it is there whole; return whether it was."""
        if not (made / MANIFEST).is_file():
            return False
        copy = self.folder.with_name(f"{self.id}.copy")
        shutil.rmtree(copy, ignore_errors=True)  # of one who was killed
        shutil.copytree(made, copy)
        files = json.loads((copy / MANIFEST).read_text("utf-8"))["files"]
        damaged = [name for name, is_ in files.items() if file_sha256(copy / name) != is_["sha256"]]
        if damaged:
            log.warning("%s is damaged (%s): it is not copied", made, ", ".join(damaged))
            shutil.rmtree(copy)
            return False
        for name in (*files, MANIFEST):
            fsync_path(copy / name)
        copy.rename(self.folder)
        fsync_path(self.folder.parent)
        self._verified.update(files)
        log.info("copied %s %s from %s", self.kind, self.id, made)
        return True

    def _build(self) -> None:
        partial = self.folder.with_name(f"{self.id}.partial")
        begun_before = partial.exists()
        partial.mkdir(exist_ok=True)
        for cut_short in partial.rglob(".*.partial"):
            cut_short.unlink()
        start = time.perf_counter()
        self._make(partial)
        seconds = time.perf_counter() - start
        names = sorted(
            str(path.relative_to(partial)) for path in partial.rglob("*") if path.is_file()
        )
        names = [name for name in names if name != MANIFEST]
        for name in names:
            fsync_path(partial / name)
        write_json(
            partial / MANIFEST,
            {
                "manifest_version": MANIFEST_VERSION,
                "id": self.id,
                "recipe": self.recipe,
                "packages": package_versions(),
                "seconds": round(seconds, 3),
                # what was done before a kill is not in the seconds: they say no speed then
                "work": None if begun_before or self.work is None else self.work(),
                "files": {
                    name: {
                        "sha256": file_sha256(partial / name),
                        "bytes": (partial / name).stat().st_size,
                    }
                    for name in names
                },
            },
        )
        partial.rename(self.folder)
        fsync_path(self.folder.parent)
        self._verified.update(names)
        log.info("made %s %s in %.1f s", self.kind, self.id, seconds)

    def _check_manifest(self) -> None:
        try:
            intact = self.manifest()["id"] == self.id
        except (OSError, ValueError, KeyError, AttributeError):
            intact = False
        if not intact:
            self._set_aside("its manifest is damaged")

    def _intact(self, names: list[str]) -> bool:
        files = self.manifest()["files"]
        for name in names:
            path = self.folder / name
            if name not in files:
                raise KeyError(f"{self.kind} {self.id} has no file {name}")
            if not path.is_file():
                self._set_aside(f"{name} is missing")
                return False
            if file_sha256(path) != files[name]["sha256"]:
                self._set_aside(f"{name} does not match its checksum")
                return False
        return True

    def _set_aside(self, why: str) -> None:
        aside = self.folder.with_name(f"{self.id}.corrupt-{time.time_ns()}")
        log.warning(
            "artefact %s is corrupted (%s): set aside as %s and made again",
            self.folder,
            why,
            aside.name,
        )
        self.folder.rename(aside)
        self._verified.clear()


class Store:
    """The folder of all artefacts.

    Args:
        folder: where they are made.
        elsewhere: other stores, from which one that is there is copied. They are only read.
    """

    def __init__(self, folder: Path | str, elsewhere: Sequence[str] = ()) -> None:
        self.folder = Path(folder).absolute()
        self._elsewhere = [Path(other).expanduser().absolute() for other in elsewhere]

    def artefact(
        self,
        kind: str,
        *,
        version: int,
        config: Mapping[str, Any],
        inputs: Mapping[str, str],
        make: Callable[[Path], None],
        work: Callable[[], float] | None = None,
    ) -> Artefact:
        """Return the handle of an artefact; nothing is made yet.

        Args:
            kind: what it is, such as `corpus`; the name of its folder.
            version: of the kind's format and algorithm; raising it makes every id new.
            config: all values that determine it, JSON-serialisable.
            inputs: the ids of what it is made from.
            make: fills the folder it is given. After a crash it is called again with the same
                folder and what the last try left there, and may go on from that.
            work: counts what making it takes, in any unit that is the same for all of its kind;
                kept beside the seconds that it took, to tell the next one's time.
        """
        recipe = {"kind": kind, "version": version, "config": config, "inputs": inputs}
        return Artefact(self.folder, kind, recipe, make, work, self._elsewhere)
