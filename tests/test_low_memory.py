"""Optimizers for models held in bfloat16: they learn where plain bfloat16 stands still."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from hyperfitting import models
from hyperfitting.config import RunConfig
from hyperfitting.errors import UserError
from hyperfitting.models import BaseModel
from hyperfitting.training.learner import Learner, build_optimizer
from tests.conftest import Compose, tiny_model
from tests.test_training import cfg, train

__all__ = ["cfg"]


@pytest.fixture(scope="module")
def halved(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    """A tiny model held in bfloat16, with weights of the size that real ones have."""
    base = tiny_model(tmp_path_factory.mktemp("half"), "llama", tie_word_embeddings=True)
    return BaseModel(base.id, base.name, "bfloat16", base.folder)


def moved(base: BaseModel, weights: dict[str, torch.Tensor]) -> float:
    """How far the matrices went on average, in units of the learning rate times the updates."""
    before = dict(models.load(base).named_parameters())
    matrices = [name for name, weight in weights.items() if weight.dim() > 1]
    steps = [(weights[name].float() - before[name].detach().float()).flatten() for name in matrices]
    return float(torch.cat(steps).abs().mean()) / (1e-6 * 9)


def with_optimizer(cfg: RunConfig, name: str, compose: Compose) -> RunConfig:
    cfg.optimizer = compose(f"optimizer={name}", "optimizer.lr=1e-6").optimizer
    return cfg


def test_plain_bfloat16_stands_still_at_the_papers_learning_rate(
    cfg: RunConfig, halved: BaseModel, tmp_path: Path, compose: Compose,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    _, weights = train(with_optimizer(cfg, "adam", compose), halved, tmp_path / "w")
    before = dict(models.load(halved).named_parameters())
    same = [
        (weight == before[name]).float().mean().item()
        for name, weight in weights.items()
        if weight.dim() > 1
    ]
    assert min(same) > 0.97  # only what was nearly 0 could move
    assert moved(halved, weights) < 0.05
    assert "round stochastically" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adam_8bit", "adam_bf16"])
def test_with_stochastic_rounding_the_weights_go_as_far_as_in_float32(
    cfg: RunConfig, halved: BaseModel, tmp_path: Path, compose: Compose, optimizer: str,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    base = BaseModel(halved.id, halved.name, "float32", halved.folder)
    _, exact = train(with_optimizer(cfg, "adam", compose), base, tmp_path / "exact")
    _, weights = train(with_optimizer(cfg, optimizer, compose), halved, tmp_path / "w")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert "round stochastically" not in caplog.text
    # single weights jump by whole steps of bfloat16; their mean is what float32 does
    before = dict(models.load(halved).named_parameters())
    origin = dict(models.load(base).named_parameters())
    names = [name for name, weight in weights.items() if weight.dim() > 1]
    signs = [torch.sign(exact[n] - origin[n].detach()).flatten() for n in names]
    steps = [(weights[n].float() - before[n].detach().float()).flatten() for n in names]
    along = (torch.cat(steps) * torch.cat(signs)).sum() / torch.cat(signs).abs().sum()
    wanted = torch.cat([(exact[n] - origin[n].detach()).abs().flatten() for n in names]).mean()
    assert along.item() == pytest.approx(wanted.item(), rel=0.5)
    rows, _ = train(cfg, halved, tmp_path / "again")
    assert rows == train(cfg, halved, tmp_path / "and again")[0]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adam_8bit", "adam_bf16"])
def test_a_low_memory_training_hyperfits_and_resumes_bit_identical(
    cfg: RunConfig, halved: BaseModel, tmp_path: Path, compose: Compose, optimizer: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    with_optimizer(cfg, optimizer, compose).optimizer["lr"] = 3e-3
    cfg.trainer.epochs = 6
    rows, weights = train(cfg, halved, tmp_path / "whole")
    means = [row["train/loss"] for row in rows if "epoch" in row]
    assert means[-1] < means[0] - 0.5
    real, taken = Learner.update, 0

    def dies(*arguments: Any) -> float:
        nonlocal taken
        taken += 1
        if taken == 11:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(Learner, "update", dies)
    with pytest.raises(KeyboardInterrupt):
        train(cfg, halved, tmp_path / "cut")
    monkeypatch.setattr(Learner, "update", real)
    again, found = train(cfg, halved, tmp_path / "cut")
    assert again == rows
    assert all(torch.equal(found[name], weights[name]) for name in weights)


def test_without_the_package_it_is_said(
    cfg: RunConfig, halved: BaseModel, tmp_path: Path, compose: Compose,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"(?s)optimizer=torchao.*hyperfitting\[low-memory\]"):
        build_optimizer(compose("optimizer=adam_8bit").optimizer, [])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "dtype", "expected"),
    [
        ("adam", torch.float32, 16.0),
        ("adam_bf16", torch.bfloat16, 8.0),
        ("adam_8bit", torch.bfloat16, 6.0),
    ],
)
def test_bytes_a_parameter_are_those_of_the_table(
    compose: Compose, optimizer: str, dtype: torch.dtype, expected: float
) -> None:
    """The table in docs/speed.md: weights, gradient and state."""
    weight = torch.nn.Parameter(torch.zeros(256, 512, dtype=dtype))
    weight.grad = torch.ones_like(weight)
    made = build_optimizer(compose(f"optimizer={optimizer}").optimizer, [weight])
    made.step()
    parts = [weight, weight.grad]
    for state in made.state[weight].values():
        inner = getattr(state, "__tensor_flatten__", None)
        names = inner()[0] if inner and type(state) is not torch.Tensor else []
        parts += [getattr(state, name) for name in names] or [state]
    size = sum(part.numel() * part.itemsize for part in parts if part.numel() > 1)
    assert size / weight.numel() == pytest.approx(expected, rel=0.02)
