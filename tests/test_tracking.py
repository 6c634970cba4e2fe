"""W&B with the real SDK: what is logged, and that nothing that goes wrong costs a result."""

import json
import logging
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import wandb

from hyperfitting.config import TrackingConfig
from hyperfitting.tracking import MOST_POINTS, Identity, tracked
from tests.conftest import Compose
from tests.records import continuation

KEY = "0123456789abcdef" * 2 + "01234567"
RECORD: dict[str, Any] = {
    "config": {"dataset": {"n_train": 2, "seq_len": 8, "name": "d"},
               "model": {"name": "m"}, "decode": {"name": "greedy"}},
    "timings": {"making_seconds": {"tuned": 4.0}},
    "history": [{"epoch": 1, "step": 2, "train/loss": 2.5}],
    "artefacts": {},
    "metrics": {"gen/ttr": {"mean": 0.6, "ci95": [0.5, 0.7], "n": 1}},
    "baseline": {"gen/ttr": {"mean": 0.3, "ci95": None, "n": 1}},
    "difference": {"gen/ttr": {"mean": 0.3, "ci95": [0.2, 0.4], "n": 1, "p": 0.01}},
    "slices": [
        {"set": None, "new_tokens": 96},
        {"set": "news", "new_tokens": 96, "metrics": {"gen/ttr": {"mean": 0.7}}},
        {"set": None, "new_tokens": 32, "metrics": {"gen/ttr": {"mean": 0.8}}},
    ],
    "overlap_histogram": {"metrics": [0, 0, 1], "baseline": [1]},
    "per_text": {"metrics": {"gen/ttr": [0.6]}, "baseline": {"gen/ttr": [0.3]}},
    "samples": [
        {
            "set": "news", "context": "<script>", "reference": "r",
            "continuation": continuation("c"), "original_continuation": continuation("o"),
        }
    ],
}  # fmt: skip
ROWS: list[dict[str, float]] = [
    {"step": 1, "train/loss": 3.0},
    {"step": 2, "train/loss": 2.0},
    {"epoch": 1, "step": 2, "train/loss": 2.5, "val/loss": 3.1, "val/entropy": 3.0, "gen/ttr": 0.4},
]


@pytest.fixture
def who(compose: Compose, tmp_path: Path) -> Identity:
    (tmp_path / "member").mkdir()
    config = compose("preset=debug", "tracking=offline")
    return Identity("member", tmp_path / "member", config, {"model": "m", "hydra/x": "y"})


def track(who: Identity, **fields: Any) -> Path | None:
    """Track a whole run, with some fields of the tracking changed."""
    config = replace(who.config, tracking=TrackingConfig(**fields))
    with tracked(replace(who, config=config)) as tracker:
        for row in ROWS:
            tracker.row(row)
        tracker.finish(RECORD)
        return tracker.folder


def messages(path: Path) -> Iterator[bytes]:
    """Yield the messages of a .wandb file: LevelDB's log format after a header of 7 bytes."""
    data, at, message = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        message += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole message, or its last part
            yield message
            message = b""


def records(run: Path) -> Iterator[Any]:
    """Yield what W&B wrote into an offline run's own file."""
    from wandb.proto import wandb_internal_pb2

    wandb.teardown()  # W&B's service may write until it ends, as it does with the process
    for message in messages(next(run.glob("*.wandb"))):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(message)
        yield record


def logged(run: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Read history and summary back from an offline run's own file."""

    def values(items: Any) -> dict[str, Any]:
        return {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}

    history: list[dict[str, Any]] = []
    summary: dict[str, Any] = {}
    for record in records(run):
        if record.HasField("history"):
            history.append(values(record.history.item))
        summary |= values(record.summary.update)
    return history, summary


@pytest.fixture(autouse=True)
def no_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    wandb.teardown()  # it has read the environment of the test before


def test_an_offline_run_holds_curves_summary_and_continuations(who: Identity) -> None:
    run = track(who)
    assert run is not None
    history, summary = logged(run)
    assert [row["train/loss"] for row in history if "train/loss" in row] == [3.0, 2.0]
    (epoch,) = [row for row in history if "epoch/val/loss" in row]
    assert {k: v for k, v in epoch.items() if not k.startswith("_")} == {
        "epoch": 1, "step": 2, "epoch/train/loss": 2.5, "epoch/val/loss": 3.1,
        "epoch/val/entropy": 3.0, "epoch/gen/ttr": 0.4,
    }  # fmt: skip
    assert {"texts/path", "texts_coloured/path", "overlap/original/values"} <= set(history[-1])
    assert (summary["gen/ttr"], summary["gen/ttr_low"], summary["baseline/gen/ttr"]) == (
        0.6,
        0.5,
        0.3,
    )
    assert (summary["difference/gen/ttr_high"], summary["difference/gen/ttr_p"]) == (0.4, 0.01)
    assert (summary["news/gen/ttr"], summary["at_32/gen/ttr"]) == (0.7, 0.8)
    assert summary["speed/training_tokens_per_second"] == 16 / 4


def test_each_run_is_its_own_and_a_member_begun_again_is_the_same(who: Identity) -> None:
    assert len({track(who), track(who)}) == 2
    member = replace(who, sweep="s", job_type="member", folder=who.folder / "m")
    member.folder.mkdir()
    first = track(member)
    second = track(member)
    assert first is not None
    assert second is not None
    assert first.name.rpartition("-")[2] == second.name.rpartition("-")[2] == member.id
    assert list(member.folder.glob("wandb/offline-run-*")) == [second]  # it tells all of the first
    (told,) = [record.run for record in records(second) if record.HasField("run")]
    assert (told.run_id, told.run_group, told.job_type) == (member.id, "s", "member")
    assert list(told.tags) == ["s"]
    member.config.optimizer["lr"] = 0.5
    assert track(member) != second


def test_the_number_of_a_row_is_its_step(who: Identity) -> None:
    history, _ = logged(track(who) or Path())
    assert [row["_step"] for row in history if "step" in row] == [0, 1, 2]


def test_a_long_training_sends_no_more_points_than_it_may(who: Identity) -> None:
    who.config.trainer.epochs, who.config.trainer.batch_size = 5000, who.config.dataset.n_train
    with tracked(who) as tracker:
        for step in range(1, 5001):
            tracker.row({"step": step, "train/loss": 1.0})
            tracker.row({"epoch": step, "step": step, "train/loss": 1.0})
        run = tracker.folder
    history, _ = logged(run or Path())
    assert 990 < sum("train/loss" in row for row in history) <= MOST_POINTS + 1
    assert 990 < sum("epoch/train/loss" in row for row in history) <= MOST_POINTS


def test_disabled_writes_nothing(who: Identity) -> None:
    assert track(who, mode="disabled") is None
    assert not list(who.folder.iterdir())


def test_online_without_a_login_goes_on_offline(
    who: Identity, caplog: pytest.LogCaptureFixture
) -> None:
    run = track(who, mode="online")
    assert run is not None
    assert run.name.startswith("offline-run")
    assert "wandb login" in caplog.text
    assert len([r for r in caplog.records if r.levelno >= logging.WARNING]) == 1
    assert logged(run)[0]


def test_online_with_a_dead_server_goes_on_offline_soon_and_keeps_the_key_secret(
    who: Identity, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as taken:  # a port where nothing answers
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setenv("WANDB_BASE_URL", url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        start = time.monotonic()
        run = track(who, mode="online", timeout=3)
        waited = time.monotonic() - start
    assert run is not None
    assert url in caplog.text
    assert "offline" in caplog.text
    assert logged(run)[0]
    assert waited < 60  # not a benchmark: the SDK's own default would wait 90 s for the start alone
    for path in who.folder.rglob("*"):
        assert path.is_dir() or KEY.encode() not in path.read_bytes(), path
    assert KEY not in caplog.text


def test_a_failure_in_the_middle_is_said_once_and_costs_nothing(
    who: Identity, caplog: pytest.LogCaptureFixture
) -> None:
    with tracked(who) as tracker:
        tracker._run.finish()  # as if the service had died
        for row in ROWS:
            tracker.row(row)
        tracker.finish(RECORD)
    assert caplog.text.count("no longer tracked") == 1


def test_what_is_shown_beside_a_run_is_worth_grouping_by(who: Identity) -> None:
    shown = replace(who, labels={"writer": "greedy"}).shown
    assert shown["choice"] == {"model": "m"}
    assert shown["label"] == {"writer": "greedy"}
    assert shown["dataset"]["n_train"] == who.config.dataset.n_train
