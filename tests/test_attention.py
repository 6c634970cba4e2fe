"""Grouped-query attention in float32 on CUDA: by a fused kernel, with the same result."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hyperfitting.decoding.backends.cuda_graph import CudaGraphBackend
from hyperfitting.models import attention
from hyperfitting.models.base import BaseModel
from hyperfitting.models.loading import load

N_HEADS, N_KV_HEADS = 8, 2


def layer(n_groups: int = N_HEADS // N_KV_HEADS) -> nn.Module:
    module = nn.Module()
    module.num_key_value_groups, module.is_causal = n_groups, True
    return module


def inputs(dtype: torch.dtype = torch.float32, n_kv_heads: int = N_KV_HEADS) -> list[Tensor]:
    """Return query (2, 8, 6, 16), key and value (2, n_kv_heads, 6, 16)."""
    generator = torch.Generator().manual_seed(0)
    heads = (N_HEADS, n_kv_heads, n_kv_heads)
    return [
        torch.randn(2, n, 6, 16, generator=generator, dtype=dtype).requires_grad_() for n in heads
    ]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """What torch's attention is called with: heads of the keys, and whether they are grouped."""
    recorded: list[tuple[int, bool]] = []
    compute = nn.functional.scaled_dot_product_attention

    def record(query: Tensor, key: Tensor, *args: Any, **options: Any) -> Tensor:
        recorded.append((key.shape[1], options.get("enable_gqa", False)))
        return compute(query, key, *args, **options)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", record)
    return recorded


@pytest.mark.parametrize("length", [6, 1])
def test_repeated_keys_and_values_give_the_same_attention(
    calls: list[tuple[int, bool]], length: int
) -> None:
    results = []
    for function in (sdpa_attention_forward, attention.cuda_sdpa):
        tensors = inputs()
        query = tensors[0][:, :, -length:]
        output = function(layer(), query, *tensors[1:], None, scaling=0.3, dropout=0.0)[0]
        output.square().sum().backward()
        results.append([output, *(t.grad for t in tensors)])
    # transformers groups them, which torch's fused kernels do not support in float32
    assert calls == [(N_KV_HEADS, True), (N_HEADS, False)]
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("n_groups", "dtype", "mask"),
    [
        (4, torch.bfloat16, None),  # flash attention supports it
        (1, torch.float32, None),
        (4, torch.float32, torch.ones(1, 1, 6, 6, dtype=torch.bool)),  # transformers repeats
        (4, torch.bfloat16, torch.ones(1, 1, 6, 6, dtype=torch.bool)),
    ],
)
def test_all_else_is_left_to_transformers(
    calls: list[tuple[int, bool]], n_groups: int, dtype: torch.dtype, mask: Tensor | None
) -> None:
    tensors = inputs(dtype, N_HEADS // n_groups)
    expected = sdpa_attention_forward(layer(n_groups), *tensors, mask)[0]
    assert torch.equal(attention.cuda_sdpa(layer(n_groups), *tensors, mask)[0], expected)
    assert calls[0] == calls[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["none", "booleans", "addends"])
def test_a_decoding_step_groups_the_query_heads(
    calls: list[tuple[int, bool]], kind: str, dtype: torch.dtype
) -> None:
    query, key, value = (tensor.detach() for tensor in inputs(dtype))
    query = query.transpose(1, 2).contiguous().transpose(1, 2)[:, :, -1:]  # strides as in models
    attended = torch.tensor([True, True, False, True, False, True]).view(1, 1, 1, 6)
    addends = torch.zeros(1, 1, 1, 6, dtype=dtype).masked_fill(~attended, -torch.inf)
    mask = {"none": None, "booleans": attended, "addends": addends}[kind]
    exact_mask = addends.double() if kind == "addends" else mask
    doubles = (tensor.double() for tensor in (query, key, value))
    exact = sdpa_attention_forward(layer(), *doubles, exact_mask, is_causal=False, scaling=0.3)[0]
    del calls[:]
    output = attention.cuda_sdpa(layer(), query, key, value, mask, scaling=0.3)[0]
    if dtype == torch.float32:
        assert calls == []
    else:  # transformers groups them too, without copies of the cache
        assert calls == [(N_KV_HEADS, mask is None)]
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(output.double(), exact, rtol=tolerance, atol=tolerance)


@torch.inference_mode()
def test_decoding_over_a_static_cache_uses_it(
    any_base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(any_base).eval()
    tokens = torch.arange(30).view(3, 10)
    plain = model(input_ids=tokens, use_cache=False).logits
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", attention.cuda_sdpa)
    cached = CudaGraphBackend().start(model, 12)
    torch.testing.assert_close(cached(tokens[:, :7]), plain[:, 6], rtol=1e-4, atol=1e-4)
    for i in range(7, 10):
        logits = cached(tokens[:, i : i + 1])
        torch.testing.assert_close(logits, plain[:, i], rtol=1e-4, atol=1e-4)


def test_the_unused_part_of_a_static_cache_is_not_repeated(calls: list[tuple[int, bool]]) -> None:
    query, key, value = inputs()
    query = query[:, :, :3]
    expected = sdpa_attention_forward(layer(), query, key, value, None)[0]
    lengths: list[int] = []
    repeat = attention.repeat_kv
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            attention, "repeat_kv", lambda x, n: lengths.append(x.shape[2]) or repeat(x, n)
        )
        output = attention.cuda_sdpa(layer(), query, key, value, None)[0]
    torch.testing.assert_close(output, expected)
    assert lengths == [3, 3]


def test_autocast_to_half_precision_needs_no_repetition(calls: list[tuple[int, bool]]) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):  # rotary embeddings are float32 in it
        attention.cuda_sdpa(layer(), *inputs(), None)
    assert calls == [(N_KV_HEADS, True)]


def test_only_cuda_is_treated_differently(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "cuda_sdpa", lambda *_: ("on CUDA", None))
    on_cuda: Any = SimpleNamespace(device=torch.device("cuda:1"))
    assert attention.sdpa(layer(), on_cuda, on_cuda, on_cuda, None)[0] == "on CUDA"
    tensors = inputs()
    expected = sdpa_attention_forward(layer(), *tensors, None)[0]
    assert torch.equal(attention.sdpa(layer(), *tensors, None)[0], expected)


def test_models_use_it(any_base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits and gradients of each architecture are the same with it."""
    model = load(any_base).eval()
    assert AttentionInterface()["sdpa"] is attention.sdpa
    tokens = torch.arange(24).view(2, 12)
    expected = model(input_ids=tokens).logits
    expected_loss = model(input_ids=tokens, labels=tokens).loss
    expected_grad = torch.autograd.grad(expected_loss, model.get_input_embeddings().weight)[0]
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", attention.cuda_sdpa)
    torch.testing.assert_close(model(input_ids=tokens).logits, expected, rtol=1e-5, atol=1e-5)
    loss = model(input_ids=tokens, labels=tokens).loss
    grad = torch.autograd.grad(loss, model.get_input_embeddings().weight)[0]
    torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-6)
