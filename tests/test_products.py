"""Products by either library: what torch's own say, forward and backward."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hyperfitting import models, products
from hyperfitting.config import RunConfig
from hyperfitting.forwards import running
from hyperfitting.models import BaseModel
from hyperfitting.training import compiled
from tests.test_fast_training import losses
from tests.test_training import cfg, train

__all__ = ["cfg"]
pytestmark = pytest.mark.skipif(
    not torch.backends.mkl.is_available(), reason="this torch is not for x86"
)


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever processor this is."""
    monkeypatch.setattr(products, "library", lambda: "onednn")


@given(
    st.integers(0, 10_000),
    st.lists(st.integers(1, 5), min_size=1, max_size=3),
    st.integers(1, 9),
    st.integers(1, 9),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_onednns_linear_is_torchs_with_its_gradients(
    seed: int, rows: list[int], n_in: int, n_out: int, bias: bool, frozen: bool, turned: bool
) -> None:
    torch.manual_seed(seed)
    x = torch.randn(*rows, n_in, requires_grad=True)
    stored = torch.randn(*((n_in, n_out) if turned else (n_out, n_in)), requires_grad=not frozen)
    weight = stored.t() if turned else stored  # as GPT-2 keeps it
    b = torch.randn(n_out, requires_grad=not frozen) if bias else None
    parts = [part for part in (x, stored, b) if part is not None and part.requires_grad]
    wanted = nn.functional.linear(x, weight, b)
    found = products._onednn(x, weight, b)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    slope = torch.randn_like(wanted)
    for ours, theirs in zip(
        torch.autograd.grad(found, parts, slope),
        torch.autograd.grad(wanted, parts, slope),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_every_architecture_learns_the_same_by_either_library(
    cfg: RunConfig, any_base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg.optimizer = {"_target_": "torch.optim.SGD", "lr": 0.05}
    monkeypatch.setattr(products, "library", lambda: "mkl")
    assert not products.of(models.load(any_base), "float32")
    expected, weights = train(cfg, any_base, tmp_path / "a")
    monkeypatch.setattr(products, "library", lambda: "onednn")
    assert products.of(models.load(any_base), "float32")
    rows, found = train(cfg, any_base, tmp_path / "b")
    np.testing.assert_allclose(losses(rows), losses(expected), rtol=1e-5)
    for name, weight in weights.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("onednn")
def test_they_are_for_float32_alone(base: BaseModel) -> None:
    model = models.load(base)
    assert not products.of(model, "bfloat16")
    assert not products.of(model.to(torch.bfloat16), "float32")


@pytest.mark.slow
@pytest.mark.usefixtures("onednn")
def test_one_compiled_block_still_serves_all(base: BaseModel) -> None:
    model, tokens = models.load(base), torch.arange(20).view(2, 10)
    with running(products.of(model, "float32")):
        expected = model(input_ids=tokens, use_cache=False).logits
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        with compiled.Compiled(model, on=True).used():
            found = model(input_ids=tokens, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
