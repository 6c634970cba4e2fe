"""Content-addressed artifacts on disk: built once, whole or not at all, verified when read.

An artifact's id is a hash of exactly what determines it: its kind and that kind's format version,
its config, and the ids of its inputs. So the id is known before anything is built. An `Artifact` is
a handle: it reads, and never builds. A `Step` is an artifact with the function that builds it;
`Step.ensure` is the one place where that function is called. Nothing here knows models or texts.

    <store>/<kind>/<id>/            a finished artifact, with its manifest.json
    <store>/<kind>/<id>.partial/    one under construction; after a crash the next attempt gets the
                                    same folder with its content, to resume from
    <store>/<kind>/<id>.copy/       one being copied from a remote store
    <store>/<kind>/<id>.lock        held by the process that builds it
    <store>/<kind>/<id>.corrupt-*/  set aside because a file did not match its checksum
"""

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hyperfitting.errors import UserError
from hyperfitting.runtime.files import fsync_path, refresh_directory, write_json

MANIFEST = "manifest.json"
MANIFEST_VERSION = 2
PACKAGES = ("hyperfitting", "torch", "transformers", "tokenizers", "datasets", "numpy")

log = logging.getLogger(__name__)


def digest(value: Any) -> str:
    """Return the id of a JSON-serializable value: 16 hex digits of its canonical form's SHA-256."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(paths: Mapping[str, Path]) -> str:
    """Return an id of named files' contents. Each file is hashed once per process."""
    return digest(
        {name: _stamped_sha256(path, path.stat().st_mtime_ns) for name, path in paths.items()}
    )


@cache
def _stamped_sha256(path: Path, _mtime_ns: int) -> str:
    return file_sha256(path)


def package_versions() -> dict[str, str]:
    """Return the installed versions of the packages that can change a number."""
    versions = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


class DamagedArtifactError(Exception):
    """An artifact that was read is damaged or missing; it was set aside and must be built again."""

    def __init__(self, artifact: "Artifact", reason: str) -> None:
        self.artifact = artifact
        super().__init__(f"{artifact.kind} {artifact.id}: {reason}")


class Artifact:
    """A handle on an artifact: its id and folder, known before it exists. It never builds.

    Args:
        store: folder of the store.
        kind: such as `sequences`; the name of its folder.
        recipe: kind, version, config and inputs; determines the id.
        remote_stores: stores from which it may be copied instead of built.
    """

    def __init__(
        self, store: Path, kind: str, recipe: Mapping[str, Any], remote_stores: Sequence[Path] = ()
    ) -> None:
        self.kind = kind
        self.recipe = recipe
        self.id = digest(recipe)
        self.folder = store / kind / self.id
        self._remotes = [remote / kind / self.id for remote in remote_stores]
        self._verified: set[str] = set()

    @property
    def exists(self) -> bool:
        """Whether it is finished (its files are verified only when they are read)."""
        return (self.folder / MANIFEST).is_file()

    def file(self, name: str) -> Path:
        """Return the path of one of its files, verified against its checksum.

        Raises:
            DamagedArtifactError: it is not finished, or the file is damaged.
            KeyError: it has no such file.
        """
        if name not in self._verified:
            self._verify([name])
        return self.folder / name

    def path(self) -> Path:
        """Return its folder, every file verified.

        Raises:
            DamagedArtifactError: it is not finished, or a file is damaged.
        """
        self._verify([name for name in self._files() if name not in self._verified])
        return self.folder

    def build_seconds(self) -> float:
        """Return how long building it took, in seconds."""
        return float(self.manifest()["seconds"])

    def manifest(self) -> dict[str, Any]:
        """Return its manifest.

        Raises:
            UserError: it was written by another version of this software.
        """
        manifest: dict[str, Any] = json.loads((self.folder / MANIFEST).read_text("utf-8"))
        if manifest.get("manifest_version") != MANIFEST_VERSION:
            raise UserError(
                f"artifact {self.folder} was written in format "
                f"{manifest.get('manifest_version')!r}, which this version does not know",
                valid=f"format {MANIFEST_VERSION}",
                hint="use the version of hyperfitting that wrote it, another store=DIR, "
                "or delete that folder to have it built again",
            )
        return manifest

    @contextmanager
    def building(self, flops: Callable[[], float] | None = None) -> Iterator[Path | None]:
        """Yield the folder to fill, or None if there is nothing to do.

        Holds the artifact's lock: of several processes one builds, the others wait. When the
        context ends without an error, the folder becomes the finished artifact, with its manifest;
        on an error it stays as `.partial` for the next attempt.

        Args:
            flops: estimates the floating-point operations of the build; recorded with the seconds
                that it took, to predict the next one's duration.
        """
        self.check()
        if self.exists:
            yield None
            return
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with self._lock():
            refresh_directory(self.folder.parent)  # another machine may just have finished it
            if self.exists or any(map(self._copy_from, self._remotes)):
                yield None
                return
            partial = self.folder.with_name(f"{self.id}.partial")
            resumed = partial.exists()
            partial.mkdir(exist_ok=True)
            for leftover in partial.rglob(".*.partial"):
                leftover.unlink()
            start = time.perf_counter()
            yield partial
            seconds = time.perf_counter() - start
            # the seconds before a kill are not counted, so they predict nothing
            self._commit(partial, seconds, None if resumed or flops is None else flops())

    def check(self) -> None:
        """Set a finished artifact aside whose manifest is damaged.

        Raises:
            UserError: it was written by another version of this software.
        """
        if not self.folder.exists():
            return
        try:
            intact = self.manifest()["id"] == self.id
        except (OSError, ValueError, KeyError, AttributeError):
            intact = False
        if not intact:
            self._set_aside("its manifest is damaged")

    @contextmanager
    def _lock(self) -> Iterator[None]:
        lock = FileLock(f"{self.folder}.lock")
        try:
            lock.acquire(timeout=1)
        except Timeout:
            log.warning("%s %s is being built by another process; waiting", self.kind, self.id)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def _copy_from(self, remote: Path) -> bool:
        """Copy it from a remote store that has it whole; return whether one has."""
        if not (remote / MANIFEST).is_file():
            return False
        copy = self.folder.with_name(f"{self.id}.copy")
        shutil.rmtree(copy, ignore_errors=True)  # of a process that was killed
        shutil.copytree(remote, copy)
        files = json.loads((copy / MANIFEST).read_text("utf-8"))["files"]
        damaged = [n for n, entry in files.items() if file_sha256(copy / n) != entry["sha256"]]
        if damaged:
            log.warning("%s is damaged (%s): not copied", remote, ", ".join(damaged))
            shutil.rmtree(copy)
            return False
        for name in (*files, MANIFEST):
            fsync_path(copy / name)
        self._publish(copy, files)
        log.info("copied %s %s from %s", self.kind, self.id, remote)
        return True

    def _commit(self, partial: Path, seconds: float, flops: float | None) -> None:
        names = sorted(
            name
            for path in partial.rglob("*")
            if path.is_file() and (name := str(path.relative_to(partial))) != MANIFEST
        )
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
                "flops": flops,
                "files": {
                    name: {
                        "sha256": file_sha256(partial / name),
                        "bytes": (partial / name).stat().st_size,
                    }
                    for name in names
                },
            },
        )
        self._publish(partial, names)
        log.info("built %s %s in %.1f s", self.kind, self.id, seconds)

    def _publish(self, folder: Path, names: Sequence[str] | Mapping[str, Any]) -> None:
        folder.rename(self.folder)
        fsync_path(self.folder.parent)
        self._verified.update(names)

    def _files(self) -> dict[str, Any]:
        self.check()
        if not self.exists:
            raise DamagedArtifactError(self, "not built")
        files: dict[str, Any] = self.manifest()["files"]
        return files

    def _verify(self, names: Sequence[str]) -> None:
        files = self._files()
        for name in names:
            path = self.folder / name
            if name not in files:
                raise KeyError(f"{self.kind} {self.id} has no file {name}")
            reason = ""
            if not path.is_file():
                reason = f"{name} is missing"
            elif file_sha256(path) != files[name]["sha256"]:
                reason = f"{name} does not match its checksum"
            if reason:
                self._set_aside(reason)
                raise DamagedArtifactError(self, reason)
            self._verified.add(name)

    def _set_aside(self, reason: str) -> None:
        aside = self.folder.with_name(f"{self.id}.corrupt-{time.time_ns()}")
        log.warning(
            "artifact %s is corrupted (%s): set aside as %s, to be built again",
            self.folder,
            reason,
            aside.name,
        )
        self.folder.rename(aside)
        self._verified.clear()


@dataclass(frozen=True)
class Step:
    """An artifact and the function that builds it."""

    artifact: Artifact
    build: Callable[[Path], None]
    """Fills the folder that it is given. After a crash it is called again with the same folder and
    what the last attempt left there, and may resume from that."""
    flops: Callable[[], float] | None = None
    """Estimates the floating-point operations of the build, for the plan."""

    def ensure(self) -> Artifact:
        """Build the artifact unless it exists, and return it."""
        with self.artifact.building(self.flops) as work:
            if work is not None:
                self.build(work)
        return self.artifact


class Store:
    """The folder of all artifacts.

    Args:
        folder: where they are built.
        remote_stores: other stores, from which a finished artifact is copied. They are only read.
    """

    def __init__(self, folder: Path | str, remote_stores: Sequence[Path | str] = ()) -> None:
        self.folder = Path(folder).absolute()
        self.remote_stores = [Path(remote).expanduser().absolute() for remote in remote_stores]

    def artifact(
        self, kind: str, *, version: int, config: Mapping[str, Any], inputs: Mapping[str, str]
    ) -> Artifact:
        """Return the handle of an artifact.

        Args:
            kind: such as `sequences`; the name of its folder.
            version: of the kind's format and algorithm; raising it changes every id.
            config: all values that determine it, JSON-serializable.
            inputs: the ids of what it is built from.
        """
        recipe = {"kind": kind, "version": version, "config": config, "inputs": inputs}
        return Artifact(self.folder, kind, recipe, self.remote_stores)
