"""Artifacts are built once, whole or not at all, verified when read, and survive SIGKILL."""

import json
import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyperfitting.errors import UserError
from hyperfitting.runtime.files import refresh_directory, replacing, write_json
from hyperfitting.store.artifact import DamagedArtifactError, Step, Store
from hyperfitting.store.hashing import digest, fingerprint

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(-1e9, 1e9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)  # fmt: skip


def step(store: Store, content: str = "x", log: Path | None = None, **config: object) -> Step:
    def build(work: Path) -> None:
        if log:
            with log.open("a") as file:
                file.write("built\n")
        (work / "a.txt").write_text(content)
        (work / "sub").mkdir(exist_ok=True)
        (work / "sub" / "b.txt").write_text(content * 2)

    return Step(store.artifact("thing", version=1, config=config, inputs={}), build)


@given(st.dictionaries(st.text(), json_values, max_size=5))
def test_an_id_does_not_depend_on_the_order_of_keys(value: dict[str, object]) -> None:
    assert digest(value) == digest(dict(reversed(value.items())))


@given(json_values, json_values)
def test_different_values_have_different_ids(a: object, b: object) -> None:
    assert (digest(a) == digest(b)) == (
        json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)
    )


def test_an_artifact_is_built_once(store: Store, tmp_path: Path) -> None:
    log = tmp_path / "log"
    for _ in range(3):
        assert step(store, log=log, k=1).ensure().file("a.txt").read_text() == "x"
    assert step(store, k=2).artifact.id != step(store, k=1).artifact.id
    assert log.read_text() == "built\n"


def test_reading_builds_nothing(store: Store, tmp_path: Path) -> None:
    log = tmp_path / "log"
    artifact = step(store, log=log).artifact
    with pytest.raises(DamagedArtifactError, match="not built"):
        artifact.file("a.txt")
    with pytest.raises(DamagedArtifactError, match="not built"):
        artifact.path()
    assert not log.exists()


def test_what_determines_an_artifact_is_in_its_id(store: Store) -> None:
    def id_of(kind: str = "k", version: int = 1, config: int = 1, inputs: str = "i") -> str:
        return store.artifact(kind, version=version, config={"c": config}, inputs={"i": inputs}).id

    assert len({id_of(), id_of("l"), id_of(version=2), id_of(config=2), id_of(inputs="j")}) == 5


@pytest.mark.parametrize("damage", ["change", "delete", "truncate", "manifest", "no manifest"])
def test_a_damaged_artifact_is_named_set_aside_and_built_again(
    store: Store, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = step(store).ensure().path()
    victim = folder / "sub" / "b.txt"
    if damage == "change":
        victim.write_text("xy")
    elif damage == "delete":
        victim.unlink()
    elif damage == "truncate":
        victim.write_text("")
    elif damage == "manifest":
        (folder / "manifest.json").write_text("{")
    else:
        (folder / "manifest.json").unlink()
    again = step(store)
    with pytest.raises(DamagedArtifactError):
        again.artifact.path()
    assert (again.ensure().path() / "sub" / "b.txt").read_text() == "xx"
    assert str(folder) in caplog.text
    assert "corrupted" in caplog.text
    assert len(list(folder.parent.glob("*.corrupt-*"))) == 1


DAMAGED_MANIFESTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no files": lambda m: {k: v for k, v in m.items() if k != "files"},
    "no seconds": lambda m: {k: v for k, v in m.items() if k != "seconds"},
    "text for seconds": lambda m: m | {"seconds": "many"},
    "list of files": lambda m: m | {"files": ["a.txt"]},
    "file without checksum": lambda m: m | {"files": {"a.txt": {}}},
    "file elsewhere": lambda m: m | {"files": {"../x": {"sha256": "0", "bytes": 1}}},
    "of another artifact": lambda m: m | {"id": "0" * 16},
}


@pytest.mark.parametrize("damage", DAMAGED_MANIFESTS)
@pytest.mark.parametrize("where", ["local", "remote"])
def test_an_artifact_with_a_damaged_manifest_is_built_again(
    store: Store, tmp_path: Path, damage: str, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    log = tmp_path / "log"
    built_in = store if where == "local" else Store(tmp_path / "remote")
    folder = step(built_in, log=log).ensure().path()
    manifest = json.loads((folder / "manifest.json").read_text())
    write_json(folder / "manifest.json", DAMAGED_MANIFESTS[damage](manifest))
    again = step(Store(store.folder, [tmp_path / "remote"]), log=log).ensure()
    assert (again.path() / "sub" / "b.txt").read_text() == "xx"
    assert again.manifest().seconds >= 0
    assert log.read_text() == "built\n" * 2
    assert str(folder) in caplog.text
    assert len(list(store.folder.glob("thing/*.corrupt-*"))) == (where == "local")


@pytest.mark.parametrize("ends", [".partial", ".copy", ""])
@pytest.mark.parametrize("kind", ["file", "link to nothing"])
def test_what_lies_where_a_folder_belongs_is_no_obstacle(
    store: Store, tmp_path: Path, kind: str, ends: str
) -> None:
    path = step(store).artifact.folder
    path = path.with_name(path.name + ends)
    path.parent.mkdir(parents=True)
    if kind == "file":
        path.write_text("x")
    else:
        path.symlink_to("nowhere")
    remote = Store(tmp_path / "remote")
    if ends == ".copy":
        step(remote).ensure()
    artifact = step(Store(store.folder, [remote.folder])).ensure()
    assert artifact.file("a.txt").read_text() == "x"
    assert not list(store.folder.glob("thing/*.copy"))
    assert not list(store.folder.glob("thing/*.partial"))


def test_an_interrupted_copy_is_removed(store: Store, tmp_path: Path) -> None:
    remote = step(Store(tmp_path / "remote")).ensure()
    (remote.folder / "sub" / "b.txt").unlink()
    os.mkfifo(remote.folder / "sub" / "b.txt")  # it would be waited for
    local = step(Store(store.folder, [tmp_path / "remote"])).ensure()
    assert (local.path() / "sub" / "b.txt").read_text() == "xx"
    assert not list(store.folder.rglob("*.copy"))


def test_leftovers_of_atomic_writes_are_removed_before_a_build_resumes(store: Store) -> None:
    artifact = step(store).artifact
    partial = artifact.folder.with_name(f"{artifact.id}.partial")
    (partial / "sub").mkdir(parents=True)
    (partial / "sub" / ".checkpoint.pt.123.partial").write_text("of a process that was killed")
    with artifact.building() as work:
        assert work is not None
        assert list(work.rglob("*")) == [work / "sub"]


def test_an_artifact_is_not_set_aside_because_files_cannot_be_opened(store: Store) -> None:
    artifact = step(store).ensure()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            artifact.check()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert artifact.exists


@pytest.mark.parametrize("path", ["file", "file/store", "link", "x" * 300, "/proc/store"])
def test_a_store_that_cannot_be_written_to_is_an_error_that_names_it(
    tmp_path: Path, path: str
) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("nowhere/at/all")
    with pytest.raises(UserError) as raised:
        step(Store(tmp_path / path)).ensure()
    assert len(str(raised.value).splitlines()[0]) < 100 + 2 * len(str(tmp_path / path))
    assert str(raised.value).startswith(f"store={tmp_path / path}")
    assert raised.value.hint == "another store=DIR"


def test_only_the_file_that_is_read_is_verified(store: Store) -> None:
    folder = step(store).ensure().path()
    (folder / "sub" / "b.txt").write_text("damaged")
    assert step(store).artifact.file("a.txt").read_text() == "x"


def test_an_artifact_of_an_unknown_version_is_refused_and_left_alone(store: Store) -> None:
    folder = step(store).ensure().path()
    manifest = json.loads((folder / "manifest.json").read_text())
    write_json(folder / "manifest.json", manifest | {"manifest_version": 99})
    with pytest.raises(UserError, match=r"(?s)99.*manifest_version 2.*store="):
        step(store).ensure()
    assert (folder / "a.txt").exists()


def test_a_failing_build_leaves_no_artifact(store: Store) -> None:
    def build(work: Path) -> None:
        (work / "half.txt").write_text("half")
        raise RuntimeError("no")

    failing = Step(store.artifact("thing", version=1, config={}, inputs={}), build)
    with pytest.raises(RuntimeError, match="no"):
        failing.ensure()
    assert not failing.artifact.exists


def test_the_next_attempt_resumes_from_the_partial_folder(store: Store) -> None:
    artifact = store.artifact("thing", version=1, config={}, inputs={})
    with pytest.raises(KeyError), artifact.building() as work:
        assert work is not None
        (work / "first.txt").write_text("1")
        raise KeyError
    with artifact.building(lambda: 7.0) as work:
        assert work is not None
        assert (work / "first.txt").read_text() == "1"
    with artifact.building() as work:
        assert work is None
    # the seconds before the crash are unknown
    assert (artifact.manifest().flops, artifact.build_seconds()) == (None, None)
    other = Step(
        store.artifact("thing", version=2, config={}, inputs={}), lambda _: None, lambda: 7.0
    )
    assert other.ensure().manifest().flops == 7.0
    seconds = other.artifact.build_seconds()
    assert seconds is not None and seconds >= 0


def test_a_file_replaces_another_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": float("nan")})
    with pytest.raises(KeyError), replacing(path) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_a_fingerprint_follows_content_not_time(tmp_path: Path) -> None:
    one, two = tmp_path / "1", tmp_path / "2"
    one.write_text("same")
    two.write_text("same")
    os.utime(two, (1, 1))
    assert fingerprint({"f": one}) == fingerprint({"f": two})
    two.write_text("other")
    assert fingerprint({"f": one}) != fingerprint({"f": two})
    assert fingerprint({"f": one}) != fingerprint({"g": one})


def _build_slowly(folder: Path, log: Path) -> None:
    def build(work: Path) -> None:
        with log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        (work / "a.txt").write_text("half")
        time.sleep(0.5)
        (work / "a.txt").write_text("whole")

    slow = Step(Store(folder).artifact("slow", version=1, config={}, inputs={}), build)
    assert slow.ensure().file("a.txt").read_text() == "whole"


def test_concurrent_processes_build_an_artifact_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    log = tmp_path / "log"
    workers = [context.Process(target=_build_slowly, args=(tmp_path / "s", log)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert len(log.read_text().splitlines()) == 1


def test_after_sigkill_no_artifact_exists_and_the_next_process_builds_it(tmp_path: Path) -> None:
    log = tmp_path / "log"
    worker = multiprocessing.get_context("spawn").Process(
        target=_build_slowly, args=(tmp_path / "s", log)
    )
    worker.start()
    while not log.exists():
        time.sleep(0.01)
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    worker.join(60)
    assert [p.suffix for p in (tmp_path / "s" / "slow").iterdir() if p.is_dir()] == [".partial"]
    _build_slowly(tmp_path / "s", log)


def test_an_artifact_of_a_remote_store_is_copied_not_built(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = tmp_path / "log"
    remote = Store(tmp_path / "remote")
    artifact = step(remote, log=log).ensure()
    (store.folder / "thing" / f"{artifact.id}.copy").mkdir(parents=True)  # of a killed process
    local = Store(store.folder, [str(tmp_path / "empty"), str(remote.folder)])
    assert (step(local, log=log).ensure().path() / "sub" / "b.txt").read_text() == "xx"
    assert log.read_text() == "built\n"
    assert not list(store.folder.rglob("*.copy"))

    damaged = step(remote, log=log, c=2).ensure()
    (damaged.folder / "a.txt").write_text("damaged there")
    assert step(local, log=log, c=2).ensure().file("a.txt").read_text() == "x"
    assert log.read_text() == "built\n" * 3
    assert "is damaged (a.txt does not match its checksum)" in caplog.text


BUILD_SECONDS = 1.0


def _ensure_all(folder: Path, log: Path, seed: int) -> None:
    """Ensure the same three artifacts in an order of its own; log each build and each read."""

    def event(what: str, name: str) -> None:
        with log.open("a") as file:
            file.write(json.dumps([what, name, os.getpid()]) + "\n")

    def builder(name: str) -> Callable[[Path], None]:
        def build(work: Path) -> None:
            event("started", name)
            time.sleep(BUILD_SECONDS)
            (work / "a.txt").write_text(name)
            event("built", name)

        return build

    for name in np.random.default_rng(seed).permutation(["x", "y", "z"]).tolist():
        artifact = Store(folder).artifact("slow", version=1, config={"name": name}, inputs={})
        assert Step(artifact, builder(name)).ensure().file("a.txt").read_text() == name
        event("read", name)


@pytest.mark.parametrize("killed", [False, True])
def test_eight_processes_share_the_build_of_three_artifacts(tmp_path: Path, killed: bool) -> None:
    """Each is built once, even if its builder dies while others wait."""
    context = multiprocessing.get_context("forkserver")  # of tests/cli.py: it imports once
    log = tmp_path / "log"
    processes = [
        context.Process(target=_ensure_all, args=(tmp_path / "s", log, seed)) for seed in range(8)
    ]
    for process in processes:
        process.start()

    def events() -> list[list[Any]]:
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    if killed:
        while not events():
            time.sleep(0.01)
        os.kill(events()[0][2], signal.SIGKILL)
    for process in processes:
        process.join(120)
    assert sorted(p.exitcode or 0 for p in processes) == [-signal.SIGKILL] * killed + [0] * (
        8 - killed
    )
    built = [name for what, name, _ in events() if what == "built"]
    assert sorted(built) == ["x", "y", "z"]
    assert len([what for what, _, _ in events() if what == "started"]) == 3 + killed
    # a killed builder's work is started again by a waiting process
    assert len([what for what, _, _ in events() if what == "read"]) >= 3 * (8 - killed)


def test_refreshing_a_directory_leaves_nothing_and_needs_nothing(tmp_path: Path) -> None:
    """Its purpose needs an NFS mount: `tests/nfs/run.sh`."""
    before = tmp_path.stat().st_mtime_ns
    refresh_directory(tmp_path)
    assert tmp_path.stat().st_mtime_ns > before
    assert list(tmp_path.iterdir()) == []
    refresh_directory(tmp_path / "missing")
    assert list(tmp_path.iterdir()) == []
