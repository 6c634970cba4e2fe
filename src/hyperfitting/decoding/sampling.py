"""Sampling the next token: filters (top-k, top-p, min-p, typical-p) and the draw.

Each filter takes logits (B, K) and sets the excluded tokens to -inf. They keep the tokens that
transformers' logits warpers keep (tests/test_decoding.py), which cost more: CPU time relative to a
step of SmolLM2-135M, batch 32, vocabulary 49,152, ours and theirs:

    top-k      1.2%   3.1%
    top-p       12%    66%   (76% if the 1,024 most likely tokens do not reach the mass)
    min-p      2.1%   4.2%
    typical-p   16%    70%   (79% likewise)
"""

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from hyperfitting.decoding.config import DecodeConfig
from hyperfitting.runtime.numerics import accumulation_dtype

_PARTIAL_SORT = 1024
"""Tokens that are sorted first on a CPU; all of them only if these do not reach the mass."""


def uniform_draws(seed: int, contexts: ArrayLike, n_draws: int) -> NDArray[np.float64]:
    """Return uniform draws in [0, 1) for each context: (B, n_draws).

    The stream of a context depends on the seed and its own tokens, not on its batch.

    Args:
        seed: `decode.seed`.
        contexts: (B, T) token ids.
        n_draws: draws per context, one per new token.
    """
    return np.stack(
        [
            np.random.default_rng([seed, *map(int, context)]).random(n_draws)
            for context in np.asarray(contexts)
        ]
    )


def sample_tokens(logits: Tensor, decode: DecodeConfig, u: Tensor) -> Tensor:
    """Sample a token for each row.

    Args:
        logits: (B, V), -inf for forbidden tokens.
        decode: temperature, top-k, top-p, min-p and typical-p, applied in this order.
        u: (B,) uniform draws in [0, 1], in the device's `accumulation_dtype`.

    Returns:
        (B,) token ids.
    """
    logits = logits / decode.temperature
    ids = None
    if decode.top_k is not None and decode.top_k < logits.shape[-1]:
        logits, ids = logits.topk(decode.top_k, dim=-1)  # (B, K)
    if decode.top_p < 1:
        logits = filter_top_p(logits, decode.top_p)
    if decode.min_p > 0:
        logits = filter_min_p(logits, decode.min_p)
    if decode.typical_p < 1:
        logits = filter_typical(logits, decode.typical_p)
    index = inverse_cdf(torch.softmax(logits, dim=-1), u)
    return index if ids is None else ids.gather(-1, index.unsqueeze(1)).squeeze(1)


def filter_top_p(logits: Tensor, top_p: float) -> Tensor:
    """Keep the smallest set of most likely tokens with this mass (Holtzman et al., 2020)."""
    surprisal = -torch.log_softmax(logits, dim=-1)
    return _keep_lowest(logits, surprisal, top_p)


def filter_typical(logits: Tensor, typical_p: float) -> Tensor:
    """Keep the tokens of surprisal closest to the entropy, up to a mass (Meister et al., 2023)."""
    log_p = torch.log_softmax(logits, dim=-1)
    entropy = torch.special.entr(log_p.exp()).sum(-1, keepdim=True)
    return _keep_lowest(logits, (-log_p - entropy).abs(), typical_p)


def filter_min_p(logits: Tensor, min_p: float) -> Tensor:
    """Keep tokens with at least this fraction of the top probability (Nguyen et al., 2024)."""
    threshold = logits.amax(-1, keepdim=True) + float(np.log(min_p))
    return logits.masked_fill(logits < threshold, -torch.inf)


def _keep_lowest(logits: Tensor, keys: Tensor, mass: float) -> Tensor:
    """Keep the fewest tokens of lowest key (B, K) that reach the mass; ties are kept together."""
    p = torch.softmax(logits, dim=-1)
    sorts_all = True
    if p.device.type == "cpu" and p.shape[-1] > _PARTIAL_SORT:  # bool() synchronizes a GPU
        lowest, ids = keys.topk(_PARTIAL_SORT, dim=-1, largest=False)  # ascending
        cumulative = p.gather(-1, ids).cumsum(-1)
        sorts_all = bool((cumulative[:, -1] < mass).any())
    if sorts_all:
        lowest, ids = keys.sort(dim=-1)
        cumulative = p.gather(-1, ids).cumsum(-1)
    last = (cumulative < mass).sum(-1, keepdim=True).clamp(max=lowest.shape[-1] - 1)
    return logits.masked_fill(keys > lowest.gather(-1, last), -torch.inf)


def inverse_cdf(p: Tensor, u: Tensor) -> Tensor:
    """Sample an index per row by inverting the cumulative distribution.

    Args:
        p: (B, K) probabilities, not necessarily normalized.
        u: (B,) uniform draws in [0, 1].

    Returns:
        (B,) indices, never of probability 0.
    """
    dtype = accumulation_dtype(p.device)
    cdf = p.to(dtype).cumsum(-1)
    total = cdf[:, -1:]
    # rounding must not reach the total: tokens of probability 0 may follow the last possible one
    target = torch.minimum(u.to(dtype).unsqueeze(1) * total, torch.nextafter(total, 0 * total))
    # if all tokens are forbidden, p and target are NaN; `AllowedCheck` reports it
    return torch.searchsorted(cdf, target, right=True).squeeze(1).clamp(max=p.shape[-1] - 1)
