"""The training loop against a plain one, and its promise: the same numbers, also after a kill."""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from hyperfitting.data.sequences import Sequences
from hyperfitting.errors import UserError
from hyperfitting.models import trainable
from hyperfitting.models.base import BaseModel
from hyperfitting.models.layers import blocks
from hyperfitting.models.loading import ModelState, load
from hyperfitting.progress import MetricsRow
from hyperfitting.runtime.linear_kernels import linear_forwards
from hyperfitting.store import Store
from hyperfitting.training import history, step
from hyperfitting.training import train as train_module
from hyperfitting.training.activation_cache import CacheLocation
from hyperfitting.training.config import TrainingConfig
from hyperfitting.training.step import TrainState, build_train_state, train_step
from hyperfitting.training.train import batches, tokens_between, train
from tests.conftest import Compose


@pytest.fixture
def cfg(compose: Compose) -> TrainingConfig:
    return compose(
        "preset=debug", "optimizer.lr=1e-3", "trainer.epochs=3", "trainer.batch_size=3",
        "trainer.val_prompt_len=6", "trainer.val_max_new_tokens=8", "hardware.device=cpu",
    ).training  # fmt: skip


DATA = Sequences(
    np.random.default_rng(0).integers(0, 256, (7, 16), dtype=np.int32),
    np.random.default_rng(1).integers(0, 256, (3, 16), dtype=np.int32),
)


def cache_location(work: Path, base: BaseModel) -> CacheLocation:
    return CacheLocation(Store(work.parent / "store"), {"model": base.id})


def run_training(
    cfg: TrainingConfig, base: BaseModel, work: Path
) -> tuple[list[MetricsRow], dict[str, torch.Tensor]]:
    """Train on `DATA`; return the rows and the trained parameters."""
    work.mkdir(parents=True, exist_ok=True)
    rows = list(train(cfg, DATA, base, work, cache_location(work, base)))
    assert list(history.read(work)) == rows
    return rows, load_file(work / "last.safetensors")


def step_losses(rows: list[MetricsRow]) -> list[float]:
    return [row["train/loss"] for row in rows if "epoch" not in row]


def interrupt_at(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Make the ``number``-th train step from now on raise KeyboardInterrupt."""
    taken = 0

    def interrupted(*arguments: Any) -> float:
        nonlocal taken
        taken += 1
        if taken == number:
            raise KeyboardInterrupt
        return train_step(*arguments)

    monkeypatch.setattr(train_module, "train_step", interrupted)


def plain_loop(cfg: TrainingConfig, base: BaseModel) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Hyperfitting as anyone would write it: transformers' own loss, one batch at a time."""
    model = load(base).eval()  # no dropout
    kwargs = {k: v for k, v in cfg.optimizer.items() if k != "_target_"}
    kinds = {"torch.optim.Adam": torch.optim.Adam, "torch.optim.SGD": torch.optim.SGD}
    optimizer = kinds[cfg.optimizer["_target_"]](model.parameters(), **kwargs)
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
    assert "starts anew" in caplog.text


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
    assert "starts anew" in caplog.text


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_epoch(
    cfg: TrainingConfig, base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = 0

    def diverges(*arguments: Any) -> float:
        nonlocal taken
        taken += 1
        return math.nan if taken == 5 else train_step(*arguments)

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


def test_training_stops_at_the_target_loss_only_if_configured(
    cfg: TrainingConfig, base: BaseModel, tmp_path: Path
) -> None:
    cfg.trainer.target_loss = 1e3
    rows, _ = run_training(cfg, base, tmp_path / "w")
    assert [row["epoch"] for row in rows if "epoch" in row] == [1]


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


def test_clipping_bounds_the_step(cfg: TrainingConfig, base: BaseModel, tmp_path: Path) -> None:
    cfg.optimizer = {"_target_": "torch.optim.SGD", "lr": 1.0}
    cfg.trainer.clip_norm, cfg.trainer.epochs, cfg.trainer.batch_size = 0.01, 1, 7
    _, weights = run_training(cfg, base, tmp_path / "w")
    base_weights = dict(load(base).named_parameters())
    moved = torch.sqrt(sum(((weights[n] - base_weights[n].detach()) ** 2).sum() for n in weights))
    assert moved.item() == pytest.approx(0.01, rel=1e-3)


class MatmulDtypes(TorchDispatchMode):
    """Records the dtypes in which matrix products are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__.split(".")[0] in ("mm", "addmm", "bmm", "baddbmm"):
            self.dtypes.add(args[-1].dtype)
        return func(*args, **(kwargs or {}))


def one_step(cfg: TrainingConfig, base: BaseModel, work: Path) -> tuple[TrainState, float]:
    state = build_train_state(cfg, base, DATA.train, cache_location(work, base))
    state.model.train()
    rows = np.arange(3)
    return state, train_step(state, torch.as_tensor(DATA.train[rows]).long(), rows)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_matrix_products_are_computed_in_the_configured_precision(
    cfg: TrainingConfig, base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    precision: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(
        "hyperfitting.runtime.linear_kernels.matmul_library", lambda: "mkl"
    )  # torch's own products are those that can be recorded
    cfg.trainer.precision = precision
    with MatmulDtypes() as recorded:
        state, _ = one_step(cfg, base, tmp_path / "w")
    dtypes = recorded.dtypes - ({torch.float32} if precision == "bfloat16" else set())
    assert dtypes == {getattr(torch, precision)}
    assert not linear_forwards(state.model, precision)
    assert {p.dtype for p in state.trained.values()} == {torch.float32}


def test_autocast_keeps_float32_weights_and_learns(
    cfg: TrainingConfig, base: BaseModel, tmp_path: Path
) -> None:
    exact, _ = run_training(cfg, base, tmp_path / "exact")
    cfg.trainer.precision, cfg.trainer.epochs = "bfloat16", 6
    rows, weights = run_training(cfg, base, tmp_path / "w")
    assert step_losses(rows)[0] != step_losses(exact)[0]  # it is computed in another precision
    assert step_losses(rows)[0] == pytest.approx(step_losses(exact)[0], rel=0.05)
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    losses = [row["train/loss"] for row in rows if "epoch" in row]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activation_checkpointing_recomputes_each_block_in_the_backward_pass(
    cfg: TrainingConfig, base: BaseModel, tmp_path: Path, checkpointing: bool
) -> None:
    expected, _ = run_training(cfg, base, tmp_path / "expected")
    cfg.hardware.activation_checkpointing = checkpointing
    state = build_train_state(cfg, base, DATA.train, cache_location(tmp_path, base))
    state.model.train()
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    for block in blocks(state.model):
        block.self_attn.register_forward_hook(count)
    rows = next(batches(7, 0, cfg.trainer))
    loss = train_step(state, torch.as_tensor(DATA.train[rows]).long(), rows)
    assert calls == 3 * (2 if checkpointing else 1)
    assert loss == pytest.approx(expected[0]["train/loss"], rel=1e-6)


def test_out_of_memory_halves_the_micro_batch_and_repeats_the_step(
    cfg: TrainingConfig, base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    expected, _ = run_training(cfg, base, tmp_path / "a")
    real = step._accumulate_gradients

    def limited(state: TrainState, *arguments: Any) -> torch.Tensor:
        if state.micro_batch_size > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(state, *arguments)

    monkeypatch.setattr(step, "_accumulate_gradients", limited)
    rows, _ = run_training(cfg, base, tmp_path / "b")
    np.testing.assert_allclose(step_losses(rows), step_losses(expected), rtol=1e-4)
    assert "micro_batch_size=1" in caplog.text


@pytest.mark.parametrize("method", ["lora", "late_stage_lora"])
def test_lora_trains_adapters_that_merge_into_the_same_model(
    cfg: TrainingConfig, any_base: BaseModel, tmp_path: Path, method: str
) -> None:
    cfg.tuning = replace(cfg.tuning, method=method, lora_rank=4)
    if method == "late_stage_lora":
        cfg.tuning.last_blocks = 1
    cfg.optimizer["lr"] = 1e-2
    rows, adapters = run_training(cfg, any_base, tmp_path / "w")
    assert all("lora_" in name for name in adapters)
    layers = {name.split(".lora_")[0] for name in adapters}
    assert len(layers) % (1 if method == "late_stage_lora" else 3) == 0
    assert step_losses(rows)[-1] < step_losses(rows)[0]
    ids = torch.as_tensor(DATA.val).long()
    separate = load(any_base)
    trainable.select_trainable(separate, cfg.tuning)
    trainable.overlay(separate, adapters)
    expected = separate.eval()(input_ids=ids).logits

    tuned = Store(tmp_path / "s").artifact("tuned", version=0, config={}, inputs={})
    with tuned.building() as work:
        assert work is not None
        (work / "last.safetensors").hardlink_to(tmp_path / "w" / "last.safetensors")
    state = ModelState(any_base, cfg.tuning, tuned, "last.safetensors")
    merged = state.load(torch.device("cpu"))
    torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    plain = load(any_base)
    assert [name for name, _ in merged.named_parameters()] == [
        name for name, _ in plain.named_parameters()
    ]
    assert not torch.allclose(plain.eval()(input_ids=ids).logits, expected, atol=1e-3)


def test_a_consumer_that_stops_early_leaves_a_training_that_resumes(
    cfg: TrainingConfig, base: BaseModel, tmp_path: Path
) -> None:
    expected, _ = run_training(cfg, base, tmp_path / "whole")
    (tmp_path / "cut").mkdir()
    rows: Iterator[MetricsRow] = train(
        cfg, DATA, base, tmp_path / "cut", cache_location(tmp_path / "cut", base)
    )
    assert [next(rows) for _ in range(6)] == expected[:6]
    rows.close()  # type: ignore[attr-defined]
    assert run_training(cfg, base, tmp_path / "cut")[0] == expected
