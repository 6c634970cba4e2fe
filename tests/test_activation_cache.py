"""Training from cached activations of the frozen layers, against running all layers."""

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from hyperfitting.errors import UserError
from hyperfitting.models.base import BaseModel
from hyperfitting.models.loading import load
from hyperfitting.progress import no_op
from hyperfitting.runtime.distributed import DistContext
from hyperfitting.training import activation_cache
from hyperfitting.training.activation_cache import build_activation_cache
from hyperfitting.training.config import TrainingConfig
from tests.training import DATA, cache_location, cfg, run_training, step_losses

__all__ = ["cfg"]


def late_stage(cfg: TrainingConfig, **trainer: Any) -> TrainingConfig:
    cfg.tuning = replace(cfg.tuning, method="late_stage", last_blocks=1)
    cfg.trainer = replace(cfg.trainer, **trainer)
    return cfg


@pytest.mark.parametrize("last_blocks", [1, 2])
def test_from_the_cache_every_loss_is_the_same(
    cfg: TrainingConfig, any_base: BaseModel, tmp_path: Path, last_blocks: int
) -> None:
    late_stage(cfg, activation_cache="off").tuning.last_blocks = last_blocks
    expected, weights = run_training(cfg, any_base, tmp_path / "a" / "w")
    assert not (tmp_path / "a" / "store").exists()
    cfg.trainer.activation_cache = "float32"
    rows, cached_weights = run_training(cfg, any_base, tmp_path / "b" / "w")
    assert (tmp_path / "b" / "store" / "activation_cache").is_dir()
    np.testing.assert_allclose(step_losses(rows), step_losses(expected), rtol=0, atol=1e-5)
    assert [set(row) for row in rows] == [set(row) for row in expected]
    for name, weight in weights.items():
        torch.testing.assert_close(cached_weights[name], weight, rtol=1e-3, atol=1e-4)


def test_late_stage_lora_from_the_cache_is_the_same(
    cfg: TrainingConfig, base: BaseModel, tmp_path: Path
) -> None:
    late_stage(cfg, activation_cache="off").tuning = replace(
        cfg.tuning, method="late_stage_lora", last_blocks=2, lora_rank=4
    )
    expected, _ = run_training(cfg, base, tmp_path / "a" / "w")
    cfg.trainer.activation_cache = "float32"
    rows, _ = run_training(cfg, base, tmp_path / "b" / "w")
    assert (tmp_path / "b" / "store" / "activation_cache").is_dir()
    np.testing.assert_allclose(step_losses(rows), step_losses(expected), rtol=0, atol=1e-5)


@pytest.fixture
def batches_computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the batches whose activations are computed."""
    sizes: list[int] = []
    real = activation_cache._activations

    def counted(model: Any, n_frozen: int, tokens: torch.Tensor) -> torch.Tensor:
        sizes.append(len(tokens))
        return real(model, n_frozen, tokens)

    monkeypatch.setattr(activation_cache, "_activations", counted)
    return sizes


def test_the_frozen_layers_run_once(
    cfg: TrainingConfig, base: BaseModel, tmp_path: Path, batches_computed: list[int]
) -> None:
    run_training(late_stage(cfg), base, tmp_path / "w")
    assert batches_computed == [1, 7]  # one sequence to probe the model; then all seven
    cfg.optimizer["lr"], cfg.trainer.seed = 1e-4, 5
    run_training(cfg, base, tmp_path / "v")
    assert batches_computed == [1, 7, 1]  # another learning rate and order share the cache


def test_a_damaged_cache_is_computed_again(
    cfg: TrainingConfig, base: BaseModel, tmp_path: Path, batches_computed: list[int]
) -> None:
    expected, _ = run_training(late_stage(cfg), base, tmp_path / "w")
    (file,) = (tmp_path / "store" / "activation_cache").rglob("train.npy")
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\1")
    rows, _ = run_training(cfg, base, tmp_path / "v")
    assert rows == expected
    assert batches_computed == [1, 7, 1, 7]


def test_a_bfloat16_cache_is_half_the_size_and_near(
    cfg: TrainingConfig, base: BaseModel, tmp_path: Path
) -> None:
    expected, _ = run_training(late_stage(cfg, activation_cache="off"), base, tmp_path / "a" / "w")
    cfg.trainer.activation_cache = "bfloat16"
    rows, _ = run_training(cfg, base, tmp_path / "b" / "w")
    np.testing.assert_allclose(step_losses(rows), step_losses(expected), rtol=2e-2)
    assert step_losses(rows) != step_losses(expected)
    (file,) = (tmp_path / "b" / "store" / "activation_cache").rglob("train.npy")
    assert np.load(file).nbytes == 7 * 16 * 32 * 2


def test_full_tuning_and_dropout_have_no_cache(
    cfg: TrainingConfig, base: BaseModel, tmp_path: Path
) -> None:
    run_training(cfg, base, tmp_path / "w")
    run_training(late_stage(cfg, dropout=True), base, tmp_path / "v")
    assert not (tmp_path / "store").exists()


def test_a_model_that_cannot_start_in_the_middle_runs_all_blocks(
    cfg: TrainingConfig, base: BaseModel, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    expected, _ = run_training(late_stage(cfg, activation_cache="off"), base, tmp_path / "a" / "w")
    monkeypatch.setattr(
        activation_cache, "_activations", lambda model, n_frozen, tokens: torch.zeros(1, 8, 32)
    )
    cfg.trainer.activation_cache = "float32"
    rows, _ = run_training(cfg, base, tmp_path / "b" / "w")
    assert rows == expected
    assert "all blocks are run in every epoch" in caplog.text


def test_a_cache_too_large_for_the_disk_is_refused_before_any_work(
    cfg: TrainingConfig, base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_training(late_stage(cfg), base, tmp_path / "w")
    full_disk = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: full_disk)
    run_training(cfg, base, tmp_path / "again")  # a cache that exists needs no space
    monkeypatch.setattr("hyperfitting.training.train.build_train_state", None)  # nothing is loaded
    with pytest.raises(
        UserError, match=r"(?s)trainer\.activation_cache=float32: .*14\.3 kB.* 1\.0 kB.*store=DIR"
    ):
        run_training(cfg, base, tmp_path / "elsewhere" / "w")


def test_a_killed_cache_is_computed_again_whole(
    cfg: TrainingConfig, base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late_stage(cfg).hardware.evaluation_batch_size = 2
    model, location = load(base), cache_location(tmp_path / "w", base)
    real, computed = activation_cache._activations, 0

    def killed(*arguments: Any) -> torch.Tensor:
        nonlocal computed
        computed += 1
        if computed == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(activation_cache, "_activations", killed)
    with pytest.raises(KeyboardInterrupt):
        build_activation_cache(cfg, model, "float32", DATA.train, location, no_op)
    cache = build_activation_cache(cfg, model, "float32", DATA.train, location, no_op)
    assert cache is not None
    ids = torch.as_tensor(DATA.train).long()
    expected = model(input_ids=ids, output_hidden_states=True).hidden_states[2].detach()
    torch.testing.assert_close(cache.read(np.arange(7), expected), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cache_on_the_device_gives_the_same_bits(
    cfg: TrainingConfig, base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    dtype: str,
) -> None:  # fmt: skip
    expected, _ = run_training(late_stage(cfg, activation_cache=dtype), base, tmp_path / "w")
    copies: list[torch.Tensor] = []
    real = activation_cache.memmap_to_device

    def copied(array: Any, device: torch.device) -> torch.Tensor:
        copies.append(real(array, device))
        return copies[-1]

    monkeypatch.setattr(activation_cache, "_has_room", lambda model, n_bytes: True)
    monkeypatch.setattr(activation_cache, "memmap_to_device", copied)
    assert run_training(cfg, base, tmp_path / "v")[0] == expected
    assert [copy.shape for copy in copies] == [(7, 16, 32)]


@pytest.mark.parametrize(("device", "expected"), [("cuda", True), ("cpu", False)])
def test_a_cache_is_on_a_gpu_that_has_room_beside_training(
    monkeypatch: pytest.MonkeyPatch, device: str, expected: bool
) -> None:
    trained, frozen = torch.nn.Linear(100, 1, bias=False), torch.nn.Linear(500, 1, bias=False)
    parameters = [*trained.parameters(), *frozen.requires_grad_(False).parameters()]
    model: Any = SimpleNamespace(device=torch.device(device), parameters=lambda: parameters)
    monkeypatch.setattr("hyperfitting.runtime.memory.free_bytes", lambda device: 5200)
    assert activation_cache._has_room(model, 1000) is expected  # (5200 - 3 * 400) / 4
    assert not activation_cache._has_room(model, 1001)


@pytest.mark.parametrize(
    ("precision", "dtype", "shared"),
    [("bfloat16", "float32", False), ("float32", "float32", True), ("bfloat16", "bfloat16", True)],
)
def test_one_process_and_several_share_a_cache_only_if_they_compute_in_one_dtype(
    cfg: TrainingConfig, base: BaseModel, tmp_path: Path, precision: str, dtype: str, shared: bool
) -> None:
    """Several all-gather float32 weights as bfloat16; one process keeps float32 states."""
    cfg.trainer.precision = precision
    location = cache_location(tmp_path / "w", base)
    one = location.artifact(late_stage(cfg), 2, dtype)
    assert one.recipe["config"].keys() == {"n_blocks", "dtype", "precision"}
    assert (location.artifact(cfg, 2, dtype, DistContext(0, 2)).id == one.id) == shared
