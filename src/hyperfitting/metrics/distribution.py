"""How sharp next-token distributions are, and how well they predict (Carlsson et al., Table 3).

Works on torch tensors on any device, in float32 at least, without keeping more than one copy of
the logits.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sharpness:
    """Per position, each shaped like the targets. Losses and entropies in nats."""

    loss: Tensor
    """Negative log-likelihood of the target."""
    entropy: Tensor
    """Of the whole distribution."""
    top1_mass: Tensor
    """Probability of the most likely token."""
    top3_mass: Tensor
    """Of the three most likely tokens together."""
    top5_mass: Tensor
    """Of the five most likely tokens together."""


def sharpness(logits: Tensor, targets: Tensor) -> Sharpness:
    """Return loss, entropy and top-k mass at every position.

    Args:
        logits: (..., V) scores of the next token, any float type.
        targets: (...) ids of the tokens that came next.

    Raises:
        FloatingPointError: a logit is NaN or infinite, so that no distribution is defined.
    """
    log_p = torch.log_softmax(logits.float(), dim=-1)  # (..., V)
    if bool(torch.isnan(log_p).any()):
        raise FloatingPointError("the logits hold NaN or infinity: there is no distribution")
    top = log_p.topk(min(5, log_p.shape[-1]), dim=-1).values.exp().cumsum(-1)  # (..., 5)
    loss = -log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    p = log_p.exp()
    # a forbidden token has p = 0 and log p = -inf; its share of the entropy is 0
    entropy = -torch.where(p > 0, p * log_p, 0.0).sum(-1)

    def mass(k: int) -> Tensor:
        return top[..., min(k, top.shape[-1]) - 1]

    return Sharpness(loss, entropy, mass(1), mass(3), mass(5))
