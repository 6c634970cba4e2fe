"""Artefacts are made once, whole or not at all, verified when read, and survive SIGKILL."""

import json
import multiprocessing
import os
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
from hyperfitting.store import (
    Artefact,
    Store,
    digest,
    fingerprint,
    look_anew,
    replacing,
    write_json,
)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(-1e9, 1e9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)  # fmt: skip


def artefact(
    store: Store, content: str = "x", log: Path | None = None, **config: object
) -> Artefact:
    def make(work: Path) -> None:
        if log:
            with log.open("a") as file:
                file.write("made\n")
        (work / "a.txt").write_text(content)
        (work / "sub").mkdir(exist_ok=True)
        (work / "sub" / "b.txt").write_text(content * 2)

    return store.artefact("thing", version=1, config=config, inputs={}, make=make)


@given(st.dictionaries(st.text(), json_values, max_size=5))
def test_an_id_does_not_depend_on_the_order_of_keys(value: dict[str, object]) -> None:
    assert digest(value) == digest(dict(reversed(value.items())))


@given(json_values, json_values)
def test_different_values_have_different_ids(a: object, b: object) -> None:
    assert (digest(a) == digest(b)) == (
        json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)
    )


def test_an_artefact_is_made_once(store: Store, tmp_path: Path) -> None:
    log = tmp_path / "log"
    for _ in range(3):
        assert artefact(store, log=log, k=1).file("a.txt").read_text() == "x"
    assert artefact(store, log=log, k=2).id != artefact(store, log=log, k=1).id
    assert log.read_text() == "made\n"


def test_what_determines_an_artefact_is_in_its_id(store: Store) -> None:
    def of(kind: str = "k", version: int = 1, config: int = 1, inputs: str = "i") -> str:
        return store.artefact(
            kind, version=version, config={"c": config}, inputs={"i": inputs}, make=lambda p: None
        ).id

    assert len({of(), of(kind="l"), of(version=2), of(config=2), of(inputs="j")}) == 5


@pytest.mark.parametrize("damage", ["change", "delete", "truncate", "manifest", "no manifest"])
def test_a_damaged_artefact_is_named_set_aside_and_made_again(
    store: Store, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    made = artefact(store).path()
    victim = made / "sub" / "b.txt"
    if damage == "change":
        victim.write_text("xy")
    elif damage == "delete":
        victim.unlink()
    elif damage == "truncate":
        victim.write_text("")
    elif damage == "manifest":
        (made / "manifest.json").write_text("{")
    else:
        (made / "manifest.json").unlink()
    again = artefact(store)
    assert (again.path() / "sub" / "b.txt").read_text() == "xx"
    assert str(made) in caplog.text
    assert "corrupted" in caplog.text
    assert len(list(made.parent.glob("*.corrupt-*"))) == 1


def test_only_the_file_that_is_read_is_verified(store: Store) -> None:
    made = artefact(store).path()
    (made / "sub" / "b.txt").write_text("damaged")
    assert artefact(store).file("a.txt").read_text() == "x"


def test_an_artefact_of_an_unknown_version_is_refused_and_left_alone(store: Store) -> None:
    made = artefact(store).path()
    manifest = json.loads((made / "manifest.json").read_text())
    write_json(made / "manifest.json", manifest | {"manifest_version": 99})
    with pytest.raises(UserError, match=r"(?s)99.*format 1.*store="):
        artefact(store).path()
    assert (made / "a.txt").exists()


def test_a_failing_maker_leaves_no_artefact(store: Store) -> None:
    def make(work: Path) -> None:
        (work / "half.txt").write_text("half")
        raise RuntimeError("no")

    failing = store.artefact("thing", version=1, config={}, inputs={}, make=make)
    with pytest.raises(RuntimeError, match="no"):
        failing.ensure()
    assert not failing.exists


def test_a_file_replaces_another_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": float("nan")})
    with pytest.raises(KeyError), replacing(path) as beside:
        beside.write_text("half")
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


def _make_slowly(folder: Path, log: Path) -> None:
    def make(work: Path) -> None:
        with log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        (work / "a.txt").write_text("half")
        time.sleep(0.5)
        (work / "a.txt").write_text("whole")

    found = Store(folder).artefact("slow", version=1, config={}, inputs={}, make=make)
    assert found.file("a.txt").read_text() == "whole"


def test_processes_that_want_the_same_make_it_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    log = tmp_path / "log"
    workers = [context.Process(target=_make_slowly, args=(tmp_path / "s", log)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert len(log.read_text().splitlines()) == 1


def test_a_killed_maker_leaves_no_artefact_and_the_next_one_makes_it(tmp_path: Path) -> None:
    log = tmp_path / "log"
    worker = multiprocessing.get_context("spawn").Process(
        target=_make_slowly, args=(tmp_path / "s", log)
    )
    worker.start()
    while not log.exists():
        time.sleep(0.01)
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    worker.join(60)
    assert [p.suffix for p in (tmp_path / "s" / "slow").iterdir() if p.is_dir()] == [".partial"]
    _make_slowly(tmp_path / "s", log)


def test_what_another_store_has_is_copied_not_made(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = tmp_path / "log"
    other = Store(tmp_path / "other")
    there = artefact(other, log=log)
    there.ensure()
    (store.folder / "thing" / f"{there.id}.copy").mkdir(parents=True)  # of one who was killed
    near = Store(store.folder, [str(tmp_path / "empty"), str(other.folder)])
    assert (artefact(near, log=log).path() / "sub" / "b.txt").read_text() == "xx"
    assert log.read_text() == "made\n"
    assert not list(store.folder.rglob("*.copy"))

    artefact(other, log=log, c=2).ensure()
    (artefact(other, c=2).folder / "a.txt").write_text("damaged there")
    assert artefact(near, log=log, c=2).file("a.txt").read_text() == "x"
    assert log.read_text() == "made\n" * 3
    assert "is damaged (a.txt)" in caplog.text


TAKES = 1.0
"""Seconds."""


def _want_all(folder: Path, log: Path, number: int) -> None:
    """Want the same three artefacts in an order of one's own; log each making, and each wait."""

    def make(name: str) -> Callable[[Path], None]:
        def made(work: Path) -> None:
            said("begun", name)
            time.sleep(TAKES)
            (work / "a.txt").write_text(name)
            said("made", name)

        return made

    def said(what: str, name: str, seconds: float = 0.0) -> None:
        with log.open("a") as file:
            file.write(json.dumps([what, name, os.getpid(), seconds]) + "\n")

    for name in np.random.default_rng(number).permutation(["x", "y", "z"]).tolist():
        found = Store(folder).artefact(
            "slow", version=1, config={"name": name}, inputs={}, make=make(name)
        )
        start = time.monotonic()
        assert found.file("a.txt").read_text() == name
        said("had", name, time.monotonic() - start)


@pytest.mark.parametrize("killed", [False, True])
def test_eight_processes_that_want_the_same_three_artefacts(tmp_path: Path, killed: bool) -> None:
    """Each is made once, and nobody waits for longer than making takes, be its maker killed."""
    context = multiprocessing.get_context("spawn")
    log = tmp_path / "log"
    wanting = [
        context.Process(target=_want_all, args=(tmp_path / "s", log, number)) for number in range(8)
    ]
    for process in wanting:
        process.start()

    def told() -> list[list[Any]]:
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    victim = 0
    if killed:
        while not told():
            time.sleep(0.01)
        victim = told()[0][2]
        os.kill(victim, signal.SIGKILL)
    for process in wanting:
        process.join(120)
    assert sorted(p.exitcode or 0 for p in wanting) == [-signal.SIGKILL] * killed + [0] * (
        8 - killed
    )
    events = told()
    made = [name for what, name, _, _ in events if what == "made"]
    assert sorted(made) == ["x", "y", "z"]
    begun = [(name, pid) for what, name, pid, _ in events if what == "begun"]
    assert len(begun) == 3 + killed
    # a killed maker's work is begun again by one who waits: twice what making takes, at most
    slack = 1.5  # the system's scheduling, with eight processes on a shared machine
    waits = [seconds for what, _, _, seconds in events if what == "had"]
    assert max(waits) < TAKES * (1 + killed) + slack


def test_looking_anew_leaves_nothing_and_needs_nothing(tmp_path: Path) -> None:
    """What it is for takes an NFS: `tests/nfs/run.sh`."""
    before = tmp_path.stat().st_mtime_ns
    look_anew(tmp_path)
    assert tmp_path.stat().st_mtime_ns > before
    assert list(tmp_path.iterdir()) == []
    look_anew(tmp_path / "not there")
    assert list(tmp_path.iterdir()) == []
