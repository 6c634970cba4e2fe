"""Drawing the next token: which tokens may be drawn, and the draw itself.

Each filter takes logits (B, K) and returns them with -inf where a token is cut off. They mean what
they mean in transformers, and so in the papers.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hyperfitting.config import DecodeConfig

# The likeliest tokens nearly always reach a mass that is asked for; sorting all takes ten times as
# long (batch 32, vocabulary 49,152).
_FEW = 1024


def streams(seed: int, contexts: NDArray[np.int32], draws: int) -> NDArray[np.float64]:
    """Return uniform draws in [0, 1) for each context: (B, draws).

    A context's stream depends on the seed and its own tokens, not on the batch it is in.
    """
    return np.stack(
        [np.random.default_rng([seed, *map(int, context)]).random(draws) for context in contexts]
    )


def sample(logits: Tensor, decode: DecodeConfig, u: Tensor) -> Tensor:
    """Draw a token for each row.

    Args:
        logits: (B, V), -inf for what is forbidden.
        decode: temperature, top-k, top-p, min-p and typical-p, applied in this order.
        u: (B,) uniform draws in [0, 1), float64.

    Returns:
        (B,) token ids.
    """
    logits = logits / decode.temperature
    ids = None
    if decode.top_k is not None and decode.top_k < logits.shape[-1]:
        logits, ids = logits.topk(decode.top_k, dim=-1)  # (B, K)
    if decode.top_p < 1:
        logits = keep_top_p(logits, decode.top_p)
    if decode.min_p > 0:
        logits = keep_min_p(logits, decode.min_p)
    if decode.typical_p < 1:
        logits = keep_typical(logits, decode.typical_p)
    drawn = inverse_cdf(torch.softmax(logits, dim=-1), u)
    return drawn if ids is None else ids.gather(-1, drawn.unsqueeze(1)).squeeze(1)


def keep_top_p(logits: Tensor, mass: float) -> Tensor:
    """Keep the fewest most likely tokens that together reach a mass (Holtzman et al., 2020)."""
    surprise = -torch.log_softmax(logits, dim=-1)
    return _keep_lowest(logits, surprise, mass)


def keep_typical(logits: Tensor, mass: float) -> Tensor:
    """Keep the tokens closest in surprise to the entropy that together reach a mass."""
    log_p = torch.log_softmax(logits, dim=-1)
    entropy = torch.special.entr(log_p.exp()).sum(-1, keepdim=True)
    return _keep_lowest(logits, (-log_p - entropy).abs(), mass)


def keep_min_p(logits: Tensor, share: float) -> Tensor:
    """Keep the tokens at least ``share`` times as likely as the likeliest."""
    least = logits.amax(-1, keepdim=True) + float(np.log(share))
    return logits.masked_fill(logits < least, -torch.inf)


def _keep_lowest(logits: Tensor, keys: Tensor, mass: float) -> Tensor:
    """Keep the tokens of lowest key, as few as reach the mass. Equal keys stay together."""
    p = torch.softmax(logits, dim=-1)
    few = min(_FEW, p.shape[-1])
    lowest, ids = keys.topk(few, dim=-1, largest=False)  # (B, few), rising
    reached = p.gather(-1, ids).cumsum(-1)
    if few < p.shape[-1] and bool((reached[:, -1] < mass).any()):
        lowest, ids = keys.sort(dim=-1)
        reached = p.gather(-1, ids).cumsum(-1)
    needed = (reached < mass).sum(-1, keepdim=True).clamp(max=lowest.shape[-1] - 1)
    return logits.masked_fill(keys > lowest.gather(-1, needed), -torch.inf)


def inverse_cdf(p: Tensor, u: Tensor) -> Tensor:
    """Draw an index a row by inverting the cumulative distribution.

    Args:
        p: (B, K) probabilities, not necessarily normalised.
        u: (B,) uniform draws in [0, 1].

    Returns:
        (B,) indices, never one whose probability is 0.
    """
    cdf = p.double().cumsum(-1)
    total = cdf[:, -1:]
    # rounding must not reach the end of the line, where tokens of probability 0 may stand
    aim = torch.minimum(u.double().unsqueeze(1) * total, torch.nextafter(total, 0 * total))
    # where every token is forbidden p is NaN and so is the aim: any index will do
    return torch.searchsorted(cdf, aim, right=True).squeeze(1).clamp(max=p.shape[-1] - 1)
