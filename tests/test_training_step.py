"""Settings of the training step: clipping, precision, checkpointing, micro-batches, LoRA."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hyperfitting.errors import UserError
from hyperfitting.models import trainable
from hyperfitting.models.base import BaseModel
from hyperfitting.models.config import TuningConfig
from hyperfitting.models.layers import blocks
from hyperfitting.models.loading import ModelState, load
from hyperfitting.runtime.linear_kernels import linear_forwards
from hyperfitting.store.artifact import Store
from hyperfitting.training import step
from hyperfitting.training.artifact import training_job
from hyperfitting.training.batches import batches
from hyperfitting.training.config import TrainingConfig
from hyperfitting.training.step import TrainState, build_train_state, train_step
from tests.training import DATA, cache_location, cfg, interrupt_at, run_training, step_losses

__all__ = ["cfg"]


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


def one_step(cfg: TrainingConfig, base: BaseModel, work: Path) -> tuple[TrainState, torch.Tensor]:
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
    loss = float(train_step(state, torch.as_tensor(DATA.train[rows]).long(), rows))
    assert calls == 3 * (2 if checkpointing else 1)
    assert loss == pytest.approx(expected[0]["train/loss"], rel=1e-6)


def test_activation_checkpointing_is_enabled_in_older_transformers_too() -> None:
    calls: list[str] = []
    older: Any = SimpleNamespace(gradient_checkpointing_enable=lambda: calls.append("enabled"))
    trainable.checkpoint_activations(older)
    assert calls == ["enabled"]


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


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"),
    ],
)
def test_out_of_memory_in_the_optimizer_step_is_not_repeated(
    cfg: TrainingConfig, base: BaseModel, tmp_path: Path, error: RuntimeError
) -> None:
    """Its state may be half made, and some parameters updated."""
    state = build_train_state(cfg, base, DATA.train, cache_location(tmp_path, base))
    calls = 0

    def fail(*_: Any, **__: Any) -> None:
        nonlocal calls
        calls += 1
        raise error

    state.optimizer.step = fail
    rows, micro_batch_size = np.arange(3), state.micro_batch_size
    with pytest.raises(UserError, match=r"(?s)optimizer=Adam: out of memory in its step.*kB"):
        train_step(state, torch.as_tensor(DATA.train[rows]).long(), rows)
    assert (calls, state.micro_batch_size) == (1, micro_batch_size)


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


def test_adapters_of_bfloat16_weights_are_float32_and_lose_no_update(
    cfg: TrainingConfig, base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adam's first updates of 1e-5 are below half the spacing of most bfloat16 values of A."""
    low = BaseModel.local("low", base.folder(), "bfloat16")
    cfg.tuning = replace(cfg.tuning, method="lora", lora_rank=4)
    cfg.optimizer["lr"] = 1e-5
    initial = {n: p.detach() for n, p in trainable.select_trainable(load(low), cfg.tuning).items()}
    _, adapters = run_training(cfg, low, tmp_path / "whole")
    assert {tensor.dtype for tensor in adapters.values()} == {torch.float32}
    for name, tensor in adapters.items():
        assert (tensor != initial[name]).float().mean() > 0.99, name
    assert all(torch.equal(t, t.bfloat16().float()) for t in initial.values())  # as peft casts them
    state, _ = one_step(cfg, low, tmp_path / "w")
    assert {parameter.dtype for parameter in state.trained.values()} == {torch.float32}
    assert {m["exp_avg_sq"].dtype for m in state.optimizer.state.values()} == {torch.float32}
    assert state.model.dtype == torch.bfloat16  # and so are the hidden states between blocks
    interrupt_at(monkeypatch, 8)
    with pytest.raises(KeyboardInterrupt):
        run_training(cfg, low, tmp_path / "cut")
    monkeypatch.undo()
    _, resumed = run_training(cfg, low, tmp_path / "cut")
    assert all(torch.equal(resumed[name], adapters[name]) for name in adapters)


def test_adapters_are_merged_into_bfloat16_weights_with_one_rounding(base: BaseModel) -> None:
    low = BaseModel.local("low", base.folder(), "bfloat16")
    model, tuning = load(low), TuningConfig("lora", lora_rank=4, lora_alpha=8)
    generator = torch.Generator().manual_seed(0)
    adapters = {
        name: torch.randn(p.shape, generator=generator) / 50
        for name, p in trainable.select_trainable(model, tuning).items()
    }
    trainable.overlay(model, adapters)
    trainable.merge_adapters(model)
    merged = dict(model.named_parameters())
    for name, weight in load(low).named_parameters():
        a, b = (adapters.get(name.replace("weight", f"lora_{x}.default.weight")) for x in "AB")
        exact = weight.double() if a is None else weight.double() + 2 * b.double() @ a.double()
        rounded = exact.to(torch.bfloat16)  # but where float32's rounding of the product decides
        assert (merged[name] == rounded).float().mean() > 0.99, name


@pytest.mark.parametrize(
    ("dtype", "expected"), [("float32", set()), ("bfloat16", {"trained_dtype"})]
)
def test_the_id_says_so_where_adapters_have_another_dtype_than_the_model(
    cfg: TrainingConfig, base: BaseModel, store: Store, dtype: str, expected: set[str]
) -> None:
    cfg.tuning = replace(cfg.tuning, method="lora")
    sequences = store.artifact("sequences", version=0, config={}, inputs={})
    low = BaseModel.local("low", base.folder(), dtype)
    job = training_job(cfg, sequences, low, store)
    assert job.tuned.recipe["config"].keys() == {"tuning", "optimizer", "trainer"} | expected
