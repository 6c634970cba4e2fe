"""A training that is interrupted, damaged or diverges: it resumes to the same bits."""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hyperfitting.errors import UserError
from hyperfitting.models.base import BaseModel
from hyperfitting.progress import MetricsRow
from hyperfitting.training import train as train_module
from hyperfitting.training.config import TrainingConfig
from hyperfitting.training.step import train_step
from hyperfitting.training.train import train
from tests.training import DATA, cache_location, cfg, interrupt_at, run_training

__all__ = ["cfg"]


def test_a_resumed_training_ends_bit_identical(
    cfg: TrainingConfig, base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg.trainer.dropout = True
    expected_rows, expected = run_training(cfg, base, tmp_path / "whole")
    interrupt_at(monkeypatch, 8)  # in the third epoch
    with pytest.raises(KeyboardInterrupt):
        run_training(cfg, base, tmp_path / "cut")
    monkeypatch.undo()
    best, checkpoint, *metrics = sorted(p.name for p in (tmp_path / "cut").iterdir())
    assert best == "best_val.safetensors"
    assert re.fullmatch(r"checkpoint-[36]\.0-of-1\.pt", checkpoint)  # rarer if writing took long
    assert metrics == ["history.jsonl", "validation.json"]
    rows, weights = run_training(cfg, base, tmp_path / "cut")
    assert rows == expected_rows
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert not list((tmp_path / "cut").glob("checkpoint*"))


@pytest.mark.parametrize("tail", ['{"step": 7, "tra', '{"step": 7, "train/loss": 9.0}\n' * 3])
def test_history_rows_after_the_checkpoint_are_dropped(
    cfg: TrainingConfig, base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tail: str
) -> None:
    """Half a line, and whole ones, of steps that a killed process took after its checkpoint."""
    expected, _ = run_training(cfg, base, tmp_path / "whole")
    interrupt_at(monkeypatch, 7)
    with pytest.raises(KeyboardInterrupt):
        run_training(cfg, base, tmp_path / "cut")
    monkeypatch.undo()
    with (tmp_path / "cut" / "history.jsonl").open("a") as file:
        file.write(tail)
    validation = tmp_path / "cut" / "validation.json"
    saved = json.loads(validation.read_text())
    validation.write_text(json.dumps(saved | {"3": {"val/loss": -1.0}}))
    assert run_training(cfg, base, tmp_path / "cut")[0] == expected


def test_a_checkpoint_whose_history_is_lost_starts_anew(
    cfg: TrainingConfig, base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    expected, _ = run_training(cfg, base, tmp_path / "whole")
    interrupt_at(monkeypatch, 8)
    with pytest.raises(KeyboardInterrupt):
        run_training(cfg, base, tmp_path / "cut")
    monkeypatch.undo()
    (tmp_path / "cut" / "history.jsonl").write_text("")
    assert run_training(cfg, base, tmp_path / "cut")[0] == expected
    assert "starts over" in caplog.text


def test_a_complete_training_is_not_repeated(
    cfg: TrainingConfig, base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, _ = run_training(cfg, base, tmp_path / "w")
    monkeypatch.setattr(train_module, "train_step", None)
    assert run_training(cfg, base, tmp_path / "w")[0] == rows


def test_a_damaged_checkpoint_is_logged_and_training_starts_anew(
    cfg: TrainingConfig, base: BaseModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected, _ = run_training(cfg, base, tmp_path / "whole")
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "checkpoint-1.0-of-1.pt").write_bytes(b"PK half a file")
    rows, _ = run_training(cfg, base, tmp_path / "w")
    assert rows == expected
    assert "starts over" in caplog.text


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_epoch(
    cfg: TrainingConfig, base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = 0

    def diverges(*arguments: Any) -> torch.Tensor:
        nonlocal taken
        taken += 1
        return torch.tensor(math.nan) if taken == 5 else train_step(*arguments)

    monkeypatch.setattr(train_module, "train_step", diverges)
    with pytest.raises(
        UserError, match=r"(?s)epoch 2, step 5: .*nan; an earlier state is kept.*optimizer\.lr"
    ):
        run_training(cfg, base, tmp_path / "w")
    assert (tmp_path / "w" / "checkpoint-3.0-of-1.pt").is_file()


def test_non_finite_logits_in_validation_are_a_divergence_of_that_epoch(
    cfg: TrainingConfig, base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverged(*_: Any) -> MetricsRow:
        raise FloatingPointError("the logits hold NaN")

    monkeypatch.setattr(train_module, "validate", diverged)
    with pytest.raises(UserError, match=r"epoch 1, step 3: in validation, the logits hold NaN"):
        run_training(cfg, base, tmp_path / "w")


def test_a_real_divergence_is_detected(
    cfg: TrainingConfig, base: BaseModel, tmp_path: Path
) -> None:
    cfg.optimizer["lr"] = 1e30
    with pytest.raises(UserError, match=r"training diverged in epoch 1, step"):
        run_training(cfg, base, tmp_path / "w")


def test_a_consumer_that_stops_early_leaves_a_training_that_resumes(
    cfg: TrainingConfig, base: BaseModel, tmp_path: Path
) -> None:
    expected, _ = run_training(cfg, base, tmp_path / "whole")
    (tmp_path / "cut").mkdir()
    rows: Iterator[MetricsRow] = train(
        cfg, DATA, base, tmp_path / "cut", cache_location(tmp_path / "cut", base)
    )
    assert [next(rows) for _ in range(6)] == expected[:6]
    rows.close()
    assert run_training(cfg, base, tmp_path / "cut")[0] == expected
