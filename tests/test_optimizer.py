"""Optimizers for bfloat16 weights: they train where plain bfloat16 does not move."""

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hyperfitting.errors import UserError
from hyperfitting.models.base import BaseModel
from hyperfitting.models.loading import load
from hyperfitting.training.config import TrainingConfig
from hyperfitting.training.optimizer import build_optimizer
from tests.conftest import Compose, tiny_model
from tests.training import cfg, interrupt_at, run_training

__all__ = ["cfg"]


@pytest.fixture(scope="module")
def half_base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    """A tiny model in bfloat16, with weights of realistic magnitude."""
    base = tiny_model(tmp_path_factory.mktemp("half"), "llama", tie_word_embeddings=True)
    return replace(base, dtype="bfloat16")


@pytest.fixture(scope="module")
def few_shapes_base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    """The same with three shapes of parameters: the step of each is compiled."""
    folder = tmp_path_factory.mktemp("shapes")
    base = tiny_model(folder, "llama", intermediate_size=32, num_key_value_heads=4)
    return replace(base, dtype="bfloat16")


@pytest.fixture(params=["force_eager", pytest.param("default", marks=pytest.mark.exhaustive)])
def compiled_or_not(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whether torchao compiles the step of each parameter."""
    with torch.compiler.set_stance(request.param):
        yield


def moved(base: BaseModel, weights: dict[str, torch.Tensor]) -> float:
    """Mean distance that matrices moved, in units of learning rate times optimizer steps."""
    base_weights = dict(load(base).named_parameters())
    matrices = [name for name, weight in weights.items() if weight.dim() > 1]
    steps = [
        (weights[name].float() - base_weights[name].detach().float()).flatten() for name in matrices
    ]
    return float(torch.cat(steps).abs().mean()) / (1e-6 * 9)


def with_optimizer(cfg: TrainingConfig, name: str, compose: Compose) -> TrainingConfig:
    cfg.optimizer = compose(f"optimizer={name}", "optimizer.lr=1e-6").optimizer
    return cfg


def test_plain_bfloat16_does_not_move_at_the_papers_learning_rate(
    cfg: TrainingConfig, half_base: BaseModel, tmp_path: Path, compose: Compose
) -> None:
    _, weights = run_training(with_optimizer(cfg, "adam", compose), half_base, tmp_path / "w")
    base_weights = dict(load(half_base).named_parameters())
    unchanged = [
        (weight == base_weights[name]).float().mean().item()
        for name, weight in weights.items()
        if weight.dim() > 1
    ]
    assert min(unchanged) > 0.97  # only weights near 0 can move
    assert moved(half_base, weights) < 0.05


@pytest.mark.slow
@torch.compiler.set_stance("force_eager")  # compiled: in test_a_low_memory_training
@pytest.mark.parametrize("optimizer", ["adam_8bit", "adam_bf16"])
def test_with_stochastic_rounding_the_weights_move_as_far_as_in_float32(
    cfg: TrainingConfig, half_base: BaseModel, tmp_path: Path, compose: Compose, optimizer: str
) -> None:
    base = replace(half_base, dtype="float32")
    _, exact = run_training(with_optimizer(cfg, "adam", compose), base, tmp_path / "exact")
    _, weights = run_training(with_optimizer(cfg, optimizer, compose), half_base, tmp_path / "w")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    # single weights move by whole bfloat16 steps; their mean is that of float32
    base_weights = dict(load(half_base).named_parameters())
    float32_weights = dict(load(base).named_parameters())
    names = [name for name, weight in weights.items() if weight.dim() > 1]
    signs = [torch.sign(exact[n] - float32_weights[n].detach()).flatten() for n in names]
    steps = [(weights[n].float() - base_weights[n].detach().float()).flatten() for n in names]
    mean_move = (torch.cat(steps) * torch.cat(signs)).sum() / torch.cat(signs).abs().sum()
    expected_move = torch.cat(
        [(exact[n] - float32_weights[n].detach()).abs().flatten() for n in names]
    ).mean()
    assert mean_move.item() == pytest.approx(expected_move.item(), rel=0.5)
    rows, _ = run_training(cfg, half_base, tmp_path / "again")
    assert rows == run_training(cfg, half_base, tmp_path / "and again")[0]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adam_8bit", "adam_bf16"])
@pytest.mark.usefixtures("compiled_or_not")
def test_a_low_memory_training_hyperfits_and_resumes_bit_identical(
    cfg: TrainingConfig, few_shapes_base: BaseModel, tmp_path: Path, compose: Compose,
    optimizer: str, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    with_optimizer(cfg, optimizer, compose).optimizer["lr"] = 3e-3
    cfg.trainer.epochs = 6
    rows, weights = run_training(cfg, few_shapes_base, tmp_path / "whole")
    means = [row["train/loss"] for row in rows if "epoch" in row]
    assert means[-1] < means[0] - 0.5
    interrupt_at(monkeypatch, 11)
    with pytest.raises(KeyboardInterrupt):
        run_training(cfg, few_shapes_base, tmp_path / "cut")
    monkeypatch.undo()
    resumed_rows, resumed = run_training(cfg, few_shapes_base, tmp_path / "cut")
    assert resumed_rows == rows
    assert all(torch.equal(resumed[name], weights[name]) for name in weights)


def test_a_missing_package_is_named(
    cfg: TrainingConfig, half_base: BaseModel, tmp_path: Path, compose: Compose,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"(?s)optimizer=torchao.*hyperfitting\[low-memory\]"):
        build_optimizer(compose("optimizer=adam_8bit").optimizer, [])


@pytest.mark.slow
@torch.compiler.set_stance("force_eager")
@pytest.mark.parametrize(
    ("optimizer", "dtype", "expected"),
    [
        ("adam", torch.float32, 16.0),
        ("adam_bf16", torch.bfloat16, 8.0),
        ("adam_8bit", torch.bfloat16, 6.0),
    ],
)
def test_bytes_per_parameter_are_those_of_the_table(
    compose: Compose, optimizer: str, dtype: torch.dtype, expected: float
) -> None:
    """The table in docs/speed.md: weights, gradient and state."""
    weight = torch.nn.Parameter(torch.zeros(256, 512, dtype=dtype))
    weight.grad = torch.ones_like(weight)
    built = build_optimizer(compose(f"optimizer={optimizer}").optimizer, [weight])
    built.step()
    tensors = [weight, weight.grad]
    for state in built.state[weight].values():
        inner = getattr(state, "__tensor_flatten__", None)
        names = inner()[0] if inner and type(state) is not torch.Tensor else []
        tensors += [getattr(state, name) for name in names] or [state]
    size = sum(t.numel() * t.itemsize for t in tensors if t.numel() > 1)
    assert size / weight.numel() == pytest.approx(expected, rel=0.02)
