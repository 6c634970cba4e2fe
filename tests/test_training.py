"""The loop against a plain one, and its promise: the same numbers, also after a kill."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hyperfitting import models, parameters
from hyperfitting.config import RunConfig
from hyperfitting.data.corpus import Corpus
from hyperfitting.errors import UserError
from hyperfitting.models import BaseModel
from hyperfitting.progress import Row, silent
from hyperfitting.store import Store
from hyperfitting.training import loop
from hyperfitting.training.learner import Learner
from hyperfitting.training.trunk import KeptIn
from tests.conftest import Compose


@pytest.fixture
def cfg(compose: Compose) -> RunConfig:
    return compose(
        "preset=debug", "optimizer.lr=1e-3", "trainer.epochs=3", "trainer.batch_size=3",
        "trainer.epoch_context_len=6", "trainer.epoch_new_tokens=8", "hardware.device=cpu",
    )  # fmt: skip


DATA = Corpus(
    np.random.default_rng(0).integers(0, 256, (7, 16), dtype=np.int32),
    np.random.default_rng(1).integers(0, 256, (3, 16), dtype=np.int32),
)


def train(cfg: RunConfig, base: BaseModel, work: Path) -> tuple[list[Row], dict[str, torch.Tensor]]:
    work.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    kept_in = KeptIn(Store(work.parent / "store"), {"model": base.id})
    loop.train(cfg, DATA, base, work, silent, rows.append, kept_in)
    assert json.loads((work / "history.json").read_text()) == rows
    return rows, load_file(work / "last.safetensors")


def plain(cfg: RunConfig, base: BaseModel) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Hyperfitting as anyone would write it: transformers' own loss, one batch at a time."""
    model = models.load(base).eval()  # no dropout
    kind = {"torch.optim.Adam": torch.optim.Adam, "torch.optim.SGD": torch.optim.SGD}
    optimizer = kind[cfg.optimizer["_target_"]](model.parameters(), lr=cfg.optimizer["lr"])
    losses = []
    for epoch in range(cfg.trainer.epochs):
        order = np.random.default_rng([cfg.trainer.seed, epoch]).permutation(len(DATA.train))
        for start in range(0, len(order), cfg.trainer.batch_size):
            ids = torch.as_tensor(DATA.train[order[start : start + cfg.trainer.batch_size]]).long()
            loss = model(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses, {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("optimizer", ["torch.optim.Adam", "torch.optim.SGD"])
def test_full_tuning_does_what_a_plain_loop_does(
    cfg: RunConfig, any_base: BaseModel, tmp_path: Path, optimizer: str
) -> None:
    cfg.optimizer = {"_target_": optimizer, "lr": 1e-3}
    rows, weights = train(cfg, any_base, tmp_path / "w")
    losses, expected = plain(cfg, any_base)
    updates = [row["train/loss"] for row in rows if "epoch" not in row]
    assert len(updates) == 9  # 7 sequences in batches of 3, 3, 1; three epochs
    np.testing.assert_allclose(updates, losses, rtol=1e-4)
    assert set(weights) == set(expected)
    if optimizer == "torch.optim.SGD":  # Adam makes whole steps of gradients that are but rounding
        for name, weight in weights.items():
            torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-6)


def test_micro_batches_change_nothing_but_rounding(
    cfg: RunConfig, base: BaseModel, tmp_path: Path
) -> None:
    whole, _ = train(cfg, base, tmp_path / "a")
    cfg.hardware.micro_batch_size = 2
    parts, _ = train(cfg, base, tmp_path / "b")
    for one, two in zip(whole, parts, strict=True):
        assert one["train/loss"] == pytest.approx(two["train/loss"], rel=1e-4)


def test_looks_may_be_rarer_and_the_last_epoch_always_has_one(
    cfg: RunConfig, base: BaseModel, tmp_path: Path
) -> None:
    always, weights = train(cfg, base, tmp_path / "a")
    cfg.trainer.look_every = 2
    rows, same = train(cfg, base, tmp_path / "b")
    looks = [row for row in rows if "val/loss" in row]
    assert [row["epoch"] for row in looks] == [2, 3]
    assert looks == [row for row in always if row.get("epoch", 0) >= 2]
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    cfg.trainer.look_every, cfg.trainer.target_loss = 3, 100.0
    assert "val/loss" in train(cfg, base, tmp_path / "c")[0][-1]


def test_a_swap_moves_sequences_between_the_first_two_batches(cfg: RunConfig) -> None:
    plain = [list(map(list, loop.batches(7, epoch, cfg.trainer))) for epoch in (0, 1)]
    cfg.trainer.swaps = 1
    swapped = [list(map(list, loop.batches(7, epoch, cfg.trainer))) for epoch in (0, 1)]
    (a, *rest), (b, *more), last = plain[0]
    assert swapped[0] == [[b, *rest], [a, *more], last]
    assert swapped[1] == plain[1]


def test_epoch_rows_hold_the_curves_of_figure_2(
    cfg: RunConfig, base: BaseModel, tmp_path: Path
) -> None:
    rows, _ = train(cfg, base, tmp_path / "w")
    epochs = [row for row in rows if "epoch" in row]
    assert [(row["epoch"], row["step"]) for row in epochs] == [(1, 3), (2, 6), (3, 9)]
    for row in epochs:
        assert set(row) == {
            "epoch", "step", "train/loss", "val/loss", "val/entropy", "gen/ttr", "gen/rep_2"
        }  # fmt: skip
    updates = [row["train/loss"] for row in rows if "epoch" not in row]
    assert epochs[0]["train/loss"] == pytest.approx(np.mean(updates[:3]))
    model = models.load(base)
    parameters.overlay(model, load_file(tmp_path / "w" / "last.safetensors"))
    ids = torch.as_tensor(DATA.val).long()
    assert epochs[-1]["val/loss"] == pytest.approx(
        model.eval()(input_ids=ids, labels=ids).loss.item(), rel=1e-4
    )


def test_every_sequence_comes_once_an_epoch_in_an_order_of_the_seed(cfg: RunConfig) -> None:
    def order(seed: int, epoch: int) -> list[int]:
        trainer = replace(cfg.trainer, seed=seed)
        return [int(row) for rows in loop.batches(7, epoch, trainer) for row in rows]

    assert sorted(order(0, 0)) == sorted(order(0, 1)) == list(range(7))
    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(s, e)) for s in (0, 1) for e in (0, 1)}) == 4


def test_the_state_of_lowest_validation_loss_is_kept(
    cfg: RunConfig, base: BaseModel, tmp_path: Path
) -> None:
    cfg.trainer.epochs, cfg.optimizer["lr"] = 12, 3e-2
    rows, last = train(cfg, base, tmp_path / "w")
    losses = [row["val/loss"] for row in rows if "epoch" in row]
    best = int(np.argmin(losses)) + 1
    assert best < 12  # or there is nothing to see
    cfg.trainer.epochs = best
    _, expected = train(cfg, base, tmp_path / "until best")
    kept = load_file(tmp_path / "w" / "best_val.safetensors")
    assert all(torch.equal(kept[name], expected[name]) for name in expected)
    assert not all(torch.equal(kept[name], last[name]) for name in last)


def test_late_stage_changes_only_what_it_trains(
    cfg: RunConfig, base: BaseModel, tmp_path: Path
) -> None:
    cfg.tuning = replace(cfg.tuning, method="late_stage", last_blocks=1)
    _, weights = train(cfg, base, tmp_path / "w")
    assert all(name.startswith(("model.layers.2.", "model.norm.")) for name in weights)
    original = dict(models.load(base).named_parameters())
    assert all(not torch.equal(weights[name], original[name]) for name in weights)


def test_a_resumed_training_ends_bit_identical(
    cfg: RunConfig, base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg.trainer.dropout = True
    expected_rows, expected = train(cfg, base, tmp_path / "whole")
    real_update, taken = Learner.update, 0

    def dies(*arguments: Any) -> float:
        nonlocal taken
        taken += 1
        if taken == 8:  # in the third epoch
            raise KeyboardInterrupt
        return real_update(*arguments)

    monkeypatch.setattr(Learner, "update", dies)
    with pytest.raises(KeyboardInterrupt):
        train(cfg, base, tmp_path / "cut")
    monkeypatch.setattr(Learner, "update", real_update)
    best, kept = sorted(p.name for p in (tmp_path / "cut").iterdir())
    assert best == "best_val.safetensors"
    assert re.fullmatch(r"checkpoint-[36]\.0-of-1\.pt", kept)  # one that took long is rarer
    rows, weights = train(cfg, base, tmp_path / "cut")
    assert rows == expected_rows
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert not list((tmp_path / "cut").glob("checkpoint*"))


def test_a_damaged_checkpoint_is_said_and_training_starts_anew(
    cfg: RunConfig, base: BaseModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected, _ = train(cfg, base, tmp_path / "whole")
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "checkpoint-1.0-of-1.pt").write_bytes(b"PK half a file")
    rows, _ = train(cfg, base, tmp_path / "w")
    assert rows == expected
    assert "starts anew" in caplog.text


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_epoch(
    cfg: RunConfig, base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_update, taken = Learner.update, 0

    def diverges(*arguments: Any) -> float:
        nonlocal taken
        taken += 1
        return math.nan if taken == 5 else real_update(*arguments)

    monkeypatch.setattr(Learner, "update", diverges)
    with pytest.raises(
        UserError, match=r"(?s)epoch 2, update 5: .*nan; an earlier state is kept.*optimizer\.lr"
    ):
        train(cfg, base, tmp_path / "w")
    assert (tmp_path / "w" / "checkpoint-3.0-of-1.pt").is_file()


def test_a_real_divergence_is_found(cfg: RunConfig, base: BaseModel, tmp_path: Path) -> None:
    cfg.optimizer["lr"] = 1e30
    with pytest.raises(UserError, match=r"training diverged in epoch 1, update"):
        train(cfg, base, tmp_path / "w")


def test_training_stops_at_the_target_loss_only_if_asked(
    cfg: RunConfig, base: BaseModel, tmp_path: Path
) -> None:
    cfg.trainer.target_loss = 1e3
    rows, _ = train(cfg, base, tmp_path / "w")
    assert [row["epoch"] for row in rows if "epoch" in row] == [1]


def test_any_torch_optimizer_is_a_config(cfg: RunConfig, base: BaseModel, tmp_path: Path) -> None:
    cfg.optimizer = {"_target_": "torch.optim.SGD", "lr": 1e-3, "momentum": 0.9}
    first, _ = train(cfg, base, tmp_path / "a")
    again, _ = train(cfg, base, tmp_path / "b")
    assert first == again


@pytest.mark.parametrize(
    "optimizer",
    [
        {"_target_": "torch.optim.Adamm"},
        {"_target_": "torch.optim.Adam", "rate": 1},
        {"_target_": "os"},
    ],
)
def test_an_optimizer_that_cannot_be_built_is_named(
    cfg: RunConfig, base: BaseModel, tmp_path: Path, optimizer: dict[str, Any]
) -> None:
    cfg.optimizer = optimizer
    with pytest.raises(UserError, match=rf"optimizer={optimizer['_target_']}"):
        train(cfg, base, tmp_path / "w")


def test_clipping_bounds_the_step(cfg: RunConfig, base: BaseModel, tmp_path: Path) -> None:
    cfg.optimizer = {"_target_": "torch.optim.SGD", "lr": 1.0}
    cfg.trainer.clip_norm, cfg.trainer.epochs, cfg.trainer.batch_size = 0.01, 1, 7
    _, weights = train(cfg, base, tmp_path / "w")
    before = dict(models.load(base).named_parameters())
    moved = torch.sqrt(sum(((weights[n] - before[n].detach()) ** 2).sum() for n in weights))
    assert moved.item() == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("precision", ["bfloat16"])
def test_autocast_keeps_float32_weights_and_learns(
    cfg: RunConfig, base: BaseModel, tmp_path: Path, precision: str
) -> None:
    cfg.trainer.precision, cfg.trainer.epochs = precision, 6
    rows, weights = train(cfg, base, tmp_path / "w")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    losses = [row["train/loss"] for row in rows if "epoch" in row]
    assert losses[-1] < losses[0]
