"""Content-addressed artifacts on disk: built once, whole or not at all, verified when read.

An artifact's id is a hash of exactly what determines it: its kind and that kind's format version,
its config, and the ids of its inputs. So the id is known before anything is built. An `Artifact` is
a handle: it reads, and never builds. A `Step` is an artifact with the function that builds it;
`Step.ensure` is the one place where that function is called. Nothing here knows models or texts.
(All in one file: handle, step and store share these folders and their locks.)

    <store>/<kind>/<id>/            a finished artifact, with its manifest.json
    <store>/<kind>/<id>.partial/    one under construction; after a crash the next attempt gets the
                                    same folder with its content, to resume from
    <store>/<kind>/<id>.copy/       one being copied from a remote store
    <store>/<kind>/<id>.lock        held by the process that builds it
    <store>/<kind>/<id>.corrupt-*   set aside because it was damaged
"""

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hyperfitting.errors import UserError, exhausted_resource
from hyperfitting.runtime.code_version import code_version
from hyperfitting.runtime.files import (
    OtherVersionError,
    folder_error,
    fsync_path,
    make_folder,
    refresh_directory,
    remove,
    write_json,
)
from hyperfitting.store.hashing import digest, file_sha256
from hyperfitting.store.manifest import (
    CODE,
    MANIFEST,
    MANIFEST_VERSION,
    FileEntry,
    Manifest,
    package_versions,
    read_manifest,
)

_ANOTHER_STORE = "another store=DIR"

log = logging.getLogger(__name__)


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

    @property
    def remote(self) -> Path | None:
        """Its folder in the first remote store that has it; none: it would be built.

        Its files are verified when they are copied; if one is damaged, it is built after all.
        """
        for folder in self._remotes:
            with suppress(UserError):  # it is not there, or damaged
                if read_manifest(folder).id == self.id:
                    return folder
        return None

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
        self._verify([name for name in self.manifest().files if name not in self._verified])
        return self.folder

    def build_seconds(self) -> float | None:
        """Return how long building it took, in seconds; none if it was interrupted and resumed."""
        manifest = self.manifest()
        return None if manifest.resumed else manifest.seconds

    def manifest(self) -> Manifest:
        """Return its manifest; if that is damaged, the artifact is set aside.

        Raises:
            DamagedArtifactError: it is not finished, or its manifest is damaged.
            UserError: it was written by another version of this software.
        """
        if not os.path.lexists(self.folder):
            raise DamagedArtifactError(self, "not built")
        try:
            manifest = read_manifest(self.folder)
            problem = "" if manifest.id == self.id else f"of artifact {manifest.id}"
        except OtherVersionError:
            raise
        except UserError as error:
            problem = error.problem
        if problem:
            self._set_aside(problem)
            raise DamagedArtifactError(self, problem)
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

        Raises:
            UserError: the store's folder cannot be written to.
        """
        self.check()
        if self.exists:
            yield None
            return
        make_folder(self.folder.parent, "store", _ANOTHER_STORE)
        with self._lock():
            refresh_directory(self.folder.parent)  # another machine may just have finished it
            if self.exists or any(map(self._copy_from, self._remotes)):
                yield None
                return
            partial = self.folder.with_name(f"{self.id}.partial")
            resumed = partial.is_dir()
            if not resumed:
                remove(partial)
            partial.mkdir(exist_ok=True)
            for leftover in partial.rglob(".*.partial"):  # of a process that was killed
                leftover.unlink()
            start = time.perf_counter()
            yield partial
            seconds = time.perf_counter() - start
            # the seconds before a kill are not counted, so they predict nothing
            n_flops = None if resumed or flops is None else flops()
            self._commit(partial, seconds, n_flops, resumed)

    def check(self) -> None:
        """Set a finished artifact aside whose manifest is damaged.

        Raises:
            UserError: it was written by another version of this software.
        """
        if os.path.lexists(self.folder):
            with suppress(DamagedArtifactError):
                self.manifest()

    @contextmanager
    def _lock(self) -> Iterator[None]:
        lock = FileLock(f"{self.folder}.lock")
        try:
            lock.acquire(timeout=1)
        except Timeout:
            log.warning("%s %s is being built by another process; waiting", self.kind, self.id)
            lock.acquire()
        except OSError as error:
            if exhausted_resource(error):
                raise
            raise folder_error(self.folder.parent, error, "store", _ANOTHER_STORE) from error
        try:
            yield
        finally:
            lock.release()

    def _copy_from(self, remote: Path) -> bool:
        """Copy it from a remote store that has it whole; return whether one has."""
        if not (remote / MANIFEST).is_file():
            return False
        copy = self.folder.with_name(f"{self.id}.copy")
        remove(copy)  # of a process that was killed
        try:
            manifest = read_manifest(remote)
            if manifest.id != self.id:
                raise ValueError(f"of artifact {manifest.id}")
            files = manifest.files
            for name in (*files, MANIFEST):
                _copy_file(remote / name, copy / name, files.get(name))
        except (OSError, ValueError, UserError) as error:
            if exhausted_resource(error):
                raise
            log.warning("%s is damaged (%s): not copied", remote, error)
            return False
        else:
            self._publish(copy, files)
        finally:
            remove(copy)
        log.info("copied %s %s from %s", self.kind, self.id, remote)
        return True

    def _commit(self, partial: Path, seconds: float, flops: float | None, resumed: bool) -> None:
        names = sorted(
            name
            for path in partial.rglob("*")
            if path.is_file() and (name := str(path.relative_to(partial))) != MANIFEST
        )
        for name in names:
            fsync_path(partial / name)
        manifest = Manifest(
            manifest_version=MANIFEST_VERSION,
            id=self.id,
            recipe=dict(self.recipe),
            packages=package_versions() | {CODE: code_version().digest},
            seconds=round(seconds, 3),
            flops=flops,
            files={
                name: FileEntry(
                    sha256=file_sha256(partial / name), bytes=(partial / name).stat().st_size
                )
                for name in names
            },
            resumed=resumed,
        )
        write_json(partial / MANIFEST, asdict(manifest))
        self._publish(partial, names)
        log.info("built %s %s in %.1f s", self.kind, self.id, seconds)

    def _publish(self, folder: Path, names: Sequence[str] | Mapping[str, Any]) -> None:
        folder.rename(self.folder)
        fsync_path(self.folder.parent)
        self._verified.update(names)

    def _verify(self, names: Sequence[str]) -> None:
        files = self.manifest().files
        for name in names:
            path = self.folder / name
            if name not in files:
                raise KeyError(f"{self.kind} {self.id} has no file {name}")
            reason = ""
            if not path.is_file():
                reason = f"{name} is missing"
            elif file_sha256(path) != files[name].sha256:
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
        with suppress(FileNotFoundError):  # another process was faster
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

    Raises:
        UserError: there can be no such folder.
    """

    def __init__(self, folder: Path | str, remote_stores: Sequence[Path | str] = ()) -> None:
        self.folder = Path(folder).absolute()
        try:
            self.folder.stat()
        except FileNotFoundError:
            pass  # it is created when something is built
        except OSError as error:
            raise folder_error(self.folder, error, "store", _ANOTHER_STORE) from error
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


def _copy_file(source: Path, target: Path, entry: FileEntry | None) -> None:
    """Copy a file and flush it to disk.

    Raises:
        OSError: it cannot be copied.
        ValueError: it is no file, or it does not match its checksum; no entry: it is not checked.
    """
    if not source.is_file():  # a pipe would be waited for
        raise ValueError(f"{source.name} is missing")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    if entry is not None and file_sha256(target) != entry.sha256:
        raise ValueError(f"{source.name} does not match its checksum")
    fsync_path(target)
