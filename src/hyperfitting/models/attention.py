"""Attention on CUDA with grouped queries, where torch has no fused kernel that groups them.

torch's fused kernels with grouped queries are for half precision: transformers' `sdpa` then runs
the math kernel, which holds (B, n_heads, T, T) scores and, in training, saves them. With keys and
values repeated for each query head the memory-efficient kernel runs, which holds none.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

_UNGROUPED = nn.Module()
"""Stands for an attention layer with as many key-value heads as query heads."""


def register() -> None:
    """Make `sdpa` the function behind transformers' attention implementation `sdpa`."""
    AttentionInterface.register("sdpa", sdpa)


def sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Compute attention: on CUDA by `cuda_sdpa`, elsewhere as transformers does."""
    function = cuda_sdpa if query.device.type == "cuda" else sdpa_attention_forward
    output: tuple[Tensor, None] = function(module, query, key, value, attention_mask, **options)
    return output


def cuda_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Compute transformers' `sdpa` attention, by `one_token_attention` or repeated keys and values.

    Args:
        module: the attention layer; `num_key_value_groups` is its query heads per key-value head.
        query: (B, n_heads, T, D).
        key: (B, n_kv_heads, L, D).
        value: (B, n_kv_heads, L, D).
        attention_mask: with one, transformers repeats keys and values itself.
        is_causal: whether tokens attend to preceding ones only; none: as the layer has it.
        options: of transformers, such as `scaling` and `dropout`.

    Returns:
        (B, T, n_heads, D), and None.
    """
    n_groups = getattr(module, "num_key_value_groups", 1)
    is_float32 = query.dtype == torch.float32 and not torch.is_autocast_enabled(query.device.type)
    if n_groups > 1 and is_float32:
        if query.shape[2] == 1 and _is_plain(query, value, attention_mask, options):
            scaling = options.get("scaling")
            return one_token_attention(query, key, value, attention_mask, scaling), None
        if attention_mask is None:
            if is_causal is None:
                is_causal = getattr(module, "is_causal", True)
            length = query.shape[2]
            if is_causal and 1 < length < key.shape[2]:  # the unused part of a static cache
                key, value = key[:, :, :length], value[:, :, :length]
            module, key, value = _UNGROUPED, repeat_kv(key, n_groups), repeat_kv(value, n_groups)
    output: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, is_causal=is_causal, **options
    )
    return output


def _is_plain(query: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]) -> bool:
    """Return whether `one_token_attention` computes all that is asked for."""
    return (
        not query.requires_grad
        and options.get("position_bias") is None
        and options.get("softcap") is None
        and value.shape[-1] == query.shape[-1]
        and (mask is None or mask.shape[1] == 1)
    )


def one_token_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None
) -> Tensor:
    """Compute the attention of a decoding step, grouped query heads as rows of one product.

    A step reads the whole cache, so that its time is that of memory traffic: repeating keys and
    values for every query head, as fused kernels with a mask require, multiplies it.

    Args:
        query: (B, n_heads, 1, D).
        key: (B, n_kv_heads, L, D).
        value: (B, n_kv_heads, L, D).
        mask: (B or 1, 1, 1, L), booleans that are True where a token attends, or addends; or none.
        scaling: of the scores; none: 1 / sqrt(D).

    Returns:
        (B, 1, n_heads, D); products and softmax are computed in float32.
    """
    batch, n_heads, _, size = query.shape
    grouped = query.reshape(batch, key.shape[1], -1, size).float()  # (B, n_kv_heads, G, D)
    scores = grouped @ key.float().transpose(-1, -2)  # (B, n_kv_heads, G, L)
    scores *= size**-0.5 if scaling is None else scaling
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores += mask
    output = scores.softmax(-1) @ value.float()  # (B, n_kv_heads, G, D)
    return output.reshape(batch, 1, n_heads, size).to(query.dtype)
