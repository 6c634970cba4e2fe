"""The training loop against a plain one, and the rows and weights that it leaves."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hyperfitting.errors import UserError
from hyperfitting.models import trainable
from hyperfitting.models.base import BaseModel
from hyperfitting.models.loading import load
from hyperfitting.models.trainable import overlay
from hyperfitting.training import history
from hyperfitting.training.batches import batches, tokens_between
from hyperfitting.training.config import TrainingConfig
from tests.training import DATA, cfg, plain_loop, run_training, step_losses

__all__ = ["cfg"]


@pytest.mark.parametrize("optimizer", ["torch.optim.Adam", "torch.optim.SGD"])
def test_full_tuning_equals_a_plain_loop(
    cfg: TrainingConfig, any_base: BaseModel, tmp_path: Path, optimizer: str
) -> None:
    cfg.optimizer = {"_target_": optimizer, "lr": 1e-3}
    rows, weights = run_training(cfg, any_base, tmp_path / "w")
    losses, expected = plain_loop(cfg, any_base)
    assert len(step_losses(rows)) == 9  # 7 sequences in batches of 3, 3, 1; three epochs
    np.testing.assert_allclose(step_losses(rows), losses, rtol=1e-4)
    assert set(weights) == set(expected)
    if optimizer == "torch.optim.SGD":  # Adam turns rounding noise into full-size updates
        for name, weight in weights.items():
            torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-6)


def test_any_torch_optimizer_is_a_config_with_its_own_arguments(
    cfg: TrainingConfig, base: BaseModel, tmp_path: Path
) -> None:
    cfg.optimizer = {"_target_": "torch.optim.SGD", "lr": 1e-2, "momentum": 0.9, "nesterov": True}
    rows, weights = run_training(cfg, base, tmp_path / "w")
    losses, expected = plain_loop(cfg, base)
    np.testing.assert_allclose(step_losses(rows), losses, rtol=1e-4)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-6)
    cfg.optimizer["momentum"] = 0.0
    cfg.optimizer["nesterov"] = False
    without, _ = run_training(cfg, base, tmp_path / "without")
    assert not np.allclose(step_losses(without), losses, rtol=1e-4)  # the arguments do matter


def test_a_training_repeats_to_the_same_bits(
    cfg: TrainingConfig, base: BaseModel, tmp_path: Path
) -> None:
    rows, weights = run_training(cfg, base, tmp_path / "a")
    again, same = run_training(cfg, base, tmp_path / "b")
    assert rows == again
    assert all(torch.equal(weights[name], same[name]) for name in weights)


def test_micro_batches_change_only_rounding(
    cfg: TrainingConfig, base: BaseModel, tmp_path: Path
) -> None:
    whole, _ = run_training(cfg, base, tmp_path / "a")
    cfg.hardware.micro_batch_size = 2
    parts, _ = run_training(cfg, base, tmp_path / "b")
    for row, expected in zip(parts, whole, strict=True):
        assert row["train/loss"] == pytest.approx(expected["train/loss"], rel=1e-4)


def test_validation_can_be_rarer_and_the_last_epoch_is_always_validated(
    cfg: TrainingConfig, base: BaseModel, tmp_path: Path
) -> None:
    every, weights = run_training(cfg, base, tmp_path / "a")
    cfg.trainer.eval_every_epochs = 2
    rows, same = run_training(cfg, base, tmp_path / "b")
    validated = [row for row in rows if "val/loss" in row]
    assert [row["epoch"] for row in validated] == [2, 3]
    assert validated == [row for row in every if row.get("epoch", 0) >= 2]
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    cfg.trainer.eval_every_epochs, cfg.trainer.target_loss = 3, 100.0
    assert "val/loss" in run_training(cfg, base, tmp_path / "c")[0][-1]


def test_a_swap_moves_sequences_between_the_first_two_batches(cfg: TrainingConfig) -> None:
    plain = [list(map(list, batches(7, epoch, cfg.trainer))) for epoch in (0, 1)]
    cfg.trainer.swaps = 1
    swapped = [list(map(list, batches(7, epoch, cfg.trainer))) for epoch in (0, 1)]
    (a, *rest), (b, *more), last = plain[0]
    assert swapped[0] == [[b, *rest], [a, *more], last]
    assert swapped[1] == plain[1]


def test_epoch_rows_hold_the_curves_of_figure_2(
    cfg: TrainingConfig, base: BaseModel, tmp_path: Path
) -> None:
    rows, weights = run_training(cfg, base, tmp_path / "w")
    epochs = [row for row in rows if "epoch" in row]
    assert [(row["epoch"], row["step"]) for row in epochs] == [(1, 3), (2, 6), (3, 9)]
    for row in epochs:
        assert set(row) == {
            "epoch", "step", "train/loss", "val/loss", "val/entropy", "gen/ttr", "gen/rep_2"
        }  # fmt: skip
    assert epochs[0]["train/loss"] == pytest.approx(np.mean(step_losses(rows)[:3]))
    model = load(base)
    trainable.overlay(model, weights)
    ids = torch.as_tensor(DATA.val).long()
    assert epochs[-1]["val/loss"] == pytest.approx(
        model.eval()(input_ids=ids, labels=ids).loss.item(), rel=1e-4
    )


def test_every_sequence_comes_once_an_epoch_in_an_order_of_the_seed(cfg: TrainingConfig) -> None:
    def order(seed: int, epoch: int) -> list[int]:
        trainer = replace(cfg.trainer, seed=seed)
        return [int(row) for rows in batches(7, epoch, trainer) for row in rows]

    assert sorted(order(0, 0)) == sorted(order(0, 1)) == list(range(7))
    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(s, e)) for s in (0, 1) for e in (0, 1)}) == 4


def test_tokens_between_steps_are_those_of_their_batches(cfg: TrainingConfig) -> None:
    sizes = [len(rows) for epoch in range(3) for rows in batches(7, epoch, cfg.trainer)]
    for start in range(10):
        assert tokens_between(cfg.trainer, (7, 16), start) == 16 * sum(sizes[start:])
        for end in range(start, 10):
            expected = 16 * sum(sizes[start:end])
            assert tokens_between(cfg.trainer, (7, 16), start, end) == expected


def test_the_weights_of_lowest_validation_loss_are_kept(
    cfg: TrainingConfig, base: BaseModel, tmp_path: Path
) -> None:
    cfg.trainer.epochs, cfg.optimizer["lr"] = 12, 3e-2
    rows, last = run_training(cfg, base, tmp_path / "w")
    losses = [row["val/loss"] for row in rows if "epoch" in row]
    best = int(np.argmin(losses)) + 1
    assert best < 12  # else best and last are the same
    cfg.trainer.epochs = best
    _, expected = run_training(cfg, base, tmp_path / "until best")
    kept = load_file(tmp_path / "w" / "best_val.safetensors")
    assert all(torch.equal(kept[name], expected[name]) for name in expected)
    assert not all(torch.equal(kept[name], last[name]) for name in last)


def test_late_stage_changes_only_what_it_trains(
    cfg: TrainingConfig, base: BaseModel, tmp_path: Path
) -> None:
    cfg.tuning = replace(cfg.tuning, method="late_stage", last_blocks=1)
    _, weights = run_training(cfg, base, tmp_path / "w")
    assert all(name.startswith(("model.layers.2.", "model.norm.")) for name in weights)
    base_weights = dict(load(base).named_parameters())
    assert all(not torch.equal(weights[name], base_weights[name]) for name in weights)


def test_training_stops_at_the_target_loss_only_if_configured(
    cfg: TrainingConfig, base: BaseModel, tmp_path: Path
) -> None:
    cfg.trainer.target_loss = 1e3
    rows, _ = run_training(cfg, base, tmp_path / "w")
    assert [row["epoch"] for row in rows if "epoch" in row] == [1]


@pytest.mark.parametrize(
    ("target", "key"),
    [("target_accuracy", "train/accuracy"), ("target_entropy", "val/entropy"),
     ("target_ttr", "gen/ttr")],
)  # fmt: skip
def test_training_stops_after_the_first_validation_that_reaches_a_target(
    cfg: TrainingConfig, base: BaseModel, tmp_path: Path, target: str, key: str
) -> None:
    """Token accuracy is that of the model itself on the training sequences."""
    cfg.optimizer["lr"], cfg.trainer.epochs = 1e-2, 4
    never = 0.0 if target == "target_entropy" else 1.0
    setattr(cfg.trainer, target, never)
    rows, weights = run_training(cfg, base, tmp_path / "all")
    values = [row[key] for row in rows if "epoch" in row]
    if target == "target_accuracy":
        model = load(base).eval()
        overlay(model, weights)
        tokens = torch.as_tensor(DATA.train).long()
        predicted = model(input_ids=tokens).logits[:, :-1].argmax(-1)
        assert values[-1] == pytest.approx((predicted == tokens[:, 1:]).float().mean().item())
    best = min(values[:3]) if target == "target_entropy" else max(values[:3])
    reached = 1 + values.index(best)
    setattr(cfg.trainer, target, best)
    rows, _ = run_training(cfg, base, tmp_path / "stopped")
    assert [row["epoch"] for row in rows if "epoch" in row] == list(range(1, reached + 1))
    epoch = {"epoch": 1, "train/loss": 0.0}
    assert not history.is_last(epoch, cfg.trainer)  # without its validation
    assert history.is_last(epoch | {key: best}, cfg.trainer)


@pytest.mark.parametrize(
    "optimizer",
    [
        {"_target_": "torch.optim.Adamm"},
        {"_target_": "torch.optim.Adam", "rate": 1},
        {"_target_": "os"},
    ],
)
def test_an_optimizer_that_cannot_be_built_is_named(
    cfg: TrainingConfig, base: BaseModel, tmp_path: Path, optimizer: dict[str, Any]
) -> None:
    cfg.optimizer = optimizer
    with pytest.raises(UserError, match=rf"optimizer={optimizer['_target_']}"):
        run_training(cfg, base, tmp_path / "w")
