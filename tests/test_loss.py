"""The chunked loss against cross-entropy of whole logits."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hyperfitting.models.base import BaseModel
from hyperfitting.models.loading import load
from hyperfitting.training import loss
from hyperfitting.training.loss import NextTokenLoss, chunked_cross_entropy
from tests.conftest import ARCHITECTURES, tiny_model
from tests.training import DATA


@given(st.integers(0, 10_000), st.integers(1, 40), st.booleans(), st.integers(1, 7))
def test_the_chunked_loss_is_cross_entropy_with_its_gradients(
    seed: int, rows: int, with_bias: bool, chunk: int
) -> None:
    torch.manual_seed(seed)
    states, weight, bias = (
        torch.randn(*shape, requires_grad=True) for shape in ((rows, 6), (11, 6), (11,))
    )
    targets = torch.randint(0, 11, (rows,))
    bias_or_none = bias if with_bias else None
    inputs = [states, weight, bias] if with_bias else [states, weight]
    expected = nn.functional.cross_entropy(
        nn.functional.linear(states, weight, bias_or_none), targets, reduction="sum"
    )
    expected_grads = torch.autograd.grad(3 * expected, inputs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "CHUNK_BYTES", {"cpu": chunk * 16 * 4 * 11})
        actual = chunked_cross_entropy(states, weight, bias_or_none, targets)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        grads = torch.autograd.grad(3 * actual, inputs)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_biased_output_layer_has_a_loss_under_autocast(dtype: torch.dtype) -> None:
    """As those of Phi and GPT-J."""
    torch.manual_seed(0)
    states, weight, bias = torch.randn(5, 6), torch.randn(11, 6), torch.randn(11)
    weight.requires_grad_()
    bias.requires_grad_()
    targets = torch.randint(0, 11, (5,))
    with torch.autocast("cpu", dtype):
        actual = chunked_cross_entropy(states, weight, bias, targets)
    expected = nn.functional.cross_entropy(states @ weight.T + bias, targets, reduction="sum")
    assert actual.item() == pytest.approx(expected.item(), rel=0.02)
    actual.backward()
    assert bias.grad is not None
    np.testing.assert_allclose(
        bias.grad, torch.autograd.grad(expected, bias)[0], rtol=0.1, atol=0.05
    )


def test_every_architecture_here_has_a_chunked_loss(any_base: BaseModel) -> None:
    model = load(any_base).eval()
    ids = torch.as_tensor(DATA.train[:3]).long()
    next_token_loss = NextTokenLoss(model)
    assert next_token_loss._layer is model.get_output_embeddings()
    assert (next_token_loss(ids) / ids[:, 1:].numel()).item() == pytest.approx(
        model(input_ids=ids, labels=ids).loss.item(), rel=1e-5
    )


def test_an_architecture_that_caps_its_logits_has_a_loss_of_whole_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ARCHITECTURES, "gemma2", ARCHITECTURES["llama"] | {"head_dim": 8})
    model = load(tiny_model(tmp_path, "gemma2", final_logit_softcapping=2.0)).eval()
    ids = torch.as_tensor(DATA.train[:3]).long()
    next_token_loss = NextTokenLoss(model)
    assert next_token_loss._layer is None
    assert (next_token_loss(ids) / ids[:, 1:].numel()).item() == pytest.approx(
        model(input_ids=ids, labels=ids).loss.item(), rel=1e-5
    )


def test_chunks_of_the_gradient_are_summed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of weights in bfloat16 too, as several processes all-gather them. In bfloat16 a sum of equal
    numbers stops growing after some 256."""
    rows = 16 * 1024
    states, weight = torch.ones(rows, 8), torch.zeros(4, 8, dtype=torch.bfloat16)
    weight.requires_grad_()
    targets = torch.zeros(rows, dtype=torch.long)
    monkeypatch.setattr(loss, "CHUNK_BYTES", {"cpu": 16 * 4 * 4})  # 1024 chunks
    with torch.autocast("cpu", torch.bfloat16):
        actual = torch.autograd.grad(chunked_cross_entropy(states, weight, None, targets), weight)
    whole = weight.detach().float().requires_grad_()
    expected = nn.functional.cross_entropy(states @ whole.T, targets, reduction="sum")
    (expected_grad,) = torch.autograd.grad(expected, whole)
    assert actual[0].dtype == torch.bfloat16
    torch.testing.assert_close(actual[0].float(), expected_grad, rtol=0.01, atol=0)
