"""W&B with the real SDK: what is logged, and that nothing that goes wrong costs a result."""

import json
import logging
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hyperfitting.config import TrackingConfig
from hyperfitting.tracking import tracked

KEY = "0123456789abcdef" * 2 + "01234567"
RECORD: dict[str, Any] = {
    "metrics": {"gen/ttr": {"mean": 0.6, "ci95": [0.5, 0.7], "n": 1}},
    "baseline": {"gen/ttr": {"mean": 0.3, "ci95": None, "n": 1}},
    "difference": {"gen/ttr": {"mean": 0.3, "ci95": [0.2, 0.4], "n": 1, "p": 0.01}},
    "slices": [
        {"set": None, "new_tokens": 96},
        {"set": "news", "new_tokens": 96, "metrics": {"gen/ttr": {"mean": 0.7}}},
        {"set": None, "new_tokens": 32, "metrics": {"gen/ttr": {"mean": 0.8}}},
    ],
    "per_text": {"metrics": {"gen/ttr": [0.6]}, "baseline": {"gen/ttr": [0.3]}},
    "samples": [
        {
            "context": "<script>", "reference": "r",
            "continuation": {"text": "c"}, "original_continuation": {"text": "o"},
        }
    ],
}  # fmt: skip
ROWS: list[dict[str, float]] = [
    {"step": 1, "train/loss": 3.0},
    {"step": 2, "train/loss": 2.0},
    {"epoch": 1, "step": 2, "train/loss": 2.5, "val/loss": 3.1, "val/entropy": 3.0, "gen/ttr": 0.4},
]


def track(cfg: TrackingConfig, folder: Path) -> Path | None:
    with tracked(cfg, "member", folder, {"seed": 1}) as tracker:
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


def logged(run: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Read history and summary back from an offline run's own file."""
    from wandb.proto import wandb_internal_pb2

    def values(items: Any) -> dict[str, Any]:
        return {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}

    history: list[dict[str, Any]] = []
    summary: dict[str, Any] = {}
    for message in messages(next(run.glob("*.wandb"))):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(message)
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


def test_an_offline_run_holds_curves_summary_and_continuations(tmp_path: Path) -> None:
    run = track(TrackingConfig(), tmp_path)
    assert run is not None
    history, summary = logged(run)
    assert [row["train/loss"] for row in history if "train/loss" in row] == [3.0, 2.0]
    (epoch,) = [row for row in history if "val/loss" in row]
    assert (epoch["train/epoch_loss"], epoch["val/loss"], epoch["gen/ttr"]) == (2.5, 3.1, 0.4)
    assert any("gen/continuations/path" in row for row in history)
    assert (summary["gen/ttr"], summary["gen/ttr_low"], summary["baseline/gen/ttr"]) == (
        0.6,
        0.5,
        0.3,
    )
    assert (summary["difference/gen/ttr_high"], summary["difference/gen/ttr_p"]) == (0.4, 0.01)
    assert (summary["news/gen/ttr"], summary["at_32/gen/ttr"]) == (0.7, 0.8)


def test_each_member_has_a_run_of_its_own(tmp_path: Path) -> None:
    runs = {track(TrackingConfig(), tmp_path / str(i)) for i in range(2)}
    assert len(runs) == 2


def test_disabled_writes_nothing(tmp_path: Path) -> None:
    assert track(TrackingConfig(mode="disabled"), tmp_path / "run") is None
    assert not (tmp_path / "run").exists()


def test_online_without_a_login_goes_on_offline(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = track(TrackingConfig(mode="online"), tmp_path)
    assert run is not None
    assert run.name.startswith("offline-run")
    assert "wandb login" in caplog.text
    assert len([r for r in caplog.records if r.levelno >= logging.WARNING]) == 1
    assert logged(run)[0]


def test_online_with_a_dead_server_goes_on_offline_soon_and_keeps_the_key_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as taken:  # a port where nothing answers
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{taken.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        start = time.monotonic()
        run = track(TrackingConfig(mode="online", timeout=3), tmp_path / "run")
        waited = time.monotonic() - start
    assert run is not None
    assert "offline" in caplog.text
    assert logged(run)[0]
    assert waited < 60  # not a benchmark: the SDK's own default would wait 90 s for the start alone
    for path in (tmp_path / "run").rglob("*"):
        assert path.is_dir() or KEY.encode() not in path.read_bytes(), path
    assert KEY not in caplog.text


def test_a_failure_in_the_middle_is_said_once_and_costs_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with tracked(TrackingConfig(), "member", tmp_path, {}) as tracker:
        tracker._run.finish()  # as if the service had died
        for row in ROWS:
            tracker.row(row)
        tracker.finish(RECORD)
    assert caplog.text.count("no longer tracked") == 1
