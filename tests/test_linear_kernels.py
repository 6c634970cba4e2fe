"""oneDNN linear layers against torch's own, forward and backward."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hyperfitting.models.base import BaseModel
from hyperfitting.models.loading import load
from hyperfitting.runtime import linear_kernels
from hyperfitting.training.config import TrainingConfig
from tests.training import cfg, run_training, step_losses

__all__ = ["cfg"]
pytestmark = pytest.mark.skipif(
    not torch.backends.mkl.is_available(), reason="this torch is not for x86"
)


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use oneDNN on any processor."""
    monkeypatch.setattr(linear_kernels, "matmul_library", lambda: "onednn")


@given(
    st.integers(0, 10_000),
    st.lists(st.integers(1, 5), min_size=1, max_size=3),
    st.integers(1, 9),
    st.integers(1, 9),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_the_onednn_linear_equals_torchs_with_its_gradients(
    seed: int, rows: list[int], n_in: int, n_out: int, bias: bool, frozen: bool, transposed: bool
) -> None:
    torch.manual_seed(seed)
    x = torch.randn(*rows, n_in, requires_grad=True)
    shape = (n_in, n_out) if transposed else (n_out, n_in)
    stored = torch.randn(*shape, requires_grad=not frozen)
    weight = stored.t() if transposed else stored  # GPT-2 stores it transposed
    b = torch.randn(n_out, requires_grad=not frozen) if bias else None
    inputs = [tensor for tensor in (x, stored, b) if tensor is not None and tensor.requires_grad]
    expected = nn.functional.linear(x, weight, b)
    output = linear_kernels._onednn_linear(x, weight, b)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    grad = torch.randn_like(expected)
    for actual_grad, expected_grad in zip(
        torch.autograd.grad(output, inputs, grad),
        torch.autograd.grad(expected, inputs, grad),
        strict=True,
    ):
        torch.testing.assert_close(actual_grad, expected_grad, rtol=1e-4, atol=1e-5)


def test_every_architecture_trains_to_the_same_losses_with_either_library(
    cfg: TrainingConfig, any_base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg.optimizer = {"_target_": "torch.optim.SGD", "lr": 0.05}
    monkeypatch.setattr(linear_kernels, "matmul_library", lambda: "mkl")
    assert not linear_kernels.linear_forwards(load(any_base), "float32")
    expected, weights = run_training(cfg, any_base, tmp_path / "a")
    monkeypatch.setattr(linear_kernels, "matmul_library", lambda: "onednn")
    assert linear_kernels.linear_forwards(load(any_base), "float32")
    rows, other_weights = run_training(cfg, any_base, tmp_path / "b")
    np.testing.assert_allclose(step_losses(rows), step_losses(expected), rtol=1e-5)
    for name, weight in weights.items():
        torch.testing.assert_close(other_weights[name], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("onednn")
def test_only_float32_models_use_it(base: BaseModel) -> None:
    model = load(base)
    assert not linear_kernels.linear_forwards(model, "bfloat16")
    assert not linear_kernels.linear_forwards(model.to(torch.bfloat16), "float32")
