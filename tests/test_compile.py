"""torch.compile of the trained blocks: the same losses, and eager execution where it fails."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from hyperfitting.models.base import BaseModel
from hyperfitting.training.compile import should_compile
from hyperfitting.training.config import TrainingConfig
from tests.training import cfg, run_training, step_losses

__all__ = ["cfg"]


def test_compiled_blocks_have_the_same_losses_and_decoding_runs_eagerly(
    cfg: TrainingConfig, base: BaseModel, tmp_path: Path
) -> None:
    expected, _ = run_training(cfg, base, tmp_path / "a")
    cfg.hardware.compile = True
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    rows, _ = run_training(cfg, base, tmp_path / "b")
    np.testing.assert_allclose(step_losses(rows), step_losses(expected), rtol=1e-4)
    # shapes of a whole and of a last batch, in three epochs with decoding between them
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4


def test_where_torch_cannot_compile_training_continues_eagerly(
    cfg: TrainingConfig, base: BaseModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected, _ = run_training(cfg, base, tmp_path / "a")
    torch._dynamo.reset()
    cfg.hardware.compile = True
    with (
        torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",), "fx_graph_cache": False}),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        rows, _ = run_training(cfg, base, tmp_path / "b")
    assert rows == expected
    assert "cannot compile" in caplog.text


def test_full_tuning_needs_no_list_of_blocks(
    cfg: TrainingConfig, base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = run_training(cfg, base, tmp_path / "a")
    monkeypatch.setattr("hyperfitting.models.layers.find_blocks", lambda model: None)
    cfg.hardware.compile = True
    rows, _ = run_training(cfg, base, tmp_path / "b")
    assert rows == expected


def test_only_long_trainings_are_compiled_unless_configured(cfg: TrainingConfig) -> None:
    cpu, trained = torch.device("cpu"), [nn.Parameter(torch.empty(134_500_000, device="meta"))]
    cfg.trainer.epochs = 7
    assert not should_compile(cfg, cpu, trained, n_tokens=16 * 128)
    cfg.trainer.epochs = 20
    assert should_compile(cfg, cpu, trained, n_tokens=2000 * 256)
    cfg.hardware.compile = False
    assert not should_compile(cfg, cpu, trained, n_tokens=2000 * 256)
