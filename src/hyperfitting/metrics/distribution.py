"""How sharp next-token distributions are, and how well they predict (Carlsson et al., Table 3).

Works on torch tensors on any device, in float32 at least, without keeping more than one copy of
the logits.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
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
    rank: Tensor
    """Of the target: 1 plus the number of tokens more likely than it."""
    top1: Tensor
    """Id of the most likely token."""


def sharpness(logits: Tensor, targets: Tensor) -> Sharpness:
    """Return loss, entropy, top-k mass and rank at every position.

    Args:
        logits: (..., V) scores of the next token, any float type.
        targets: (...) ids of the tokens that came next.

    Raises:
        FloatingPointError: a logit is NaN or infinite, so that no distribution is defined.
    """
    log_p = torch.log_softmax(logits.float(), dim=-1)  # (..., V)
    likeliest = log_p.topk(min(5, log_p.shape[-1]), dim=-1)  # (..., 5)
    if bool(torch.isnan(likeliest.values[..., 0]).any()):  # topk puts NaN before all numbers
        raise FloatingPointError("the logits hold NaN or infinity: there is no distribution")
    top = likeliest.values.exp().cumsum(-1)
    target = log_p.gather(-1, targets.unsqueeze(-1))  # (..., 1)
    rank, entropy = _rank(log_p, target), _entropy(log_p)

    def mass(k: int) -> Tensor:
        return top[..., min(k, top.shape[-1]) - 1]

    return Sharpness(
        -target.squeeze(-1), entropy, mass(1), mass(3), mass(5), rank, likeliest.indices[..., 0]
    )


CHOICE_MEASURES = ("loss", "entropy", "top1_mass", "rank")
"""Of `Sharpness`, what is kept of a distribution that a token was chosen from."""


def choice_measures(logits: Tensor, chosen: Tensor) -> Tensor:
    """Return `CHOICE_MEASURES` at each position: the same as `sharpness`, in fewer passes.

    Args:
        logits: (R, V) scores of the next token, float32.
        chosen: (R,) ids of the tokens that were chosen.

    Returns:
        (4, R); the loss is NaN where a logit is NaN or infinite.
    """
    log_p = torch.log_softmax(logits, dim=-1)  # (R, V)
    target = log_p.gather(-1, chosen.unsqueeze(-1))  # (R, 1)
    top1 = log_p.amax(-1).exp()
    return torch.stack([-target.squeeze(-1), _entropy(log_p), top1, _rank(log_p, target)])


def _entropy(log_p: Tensor) -> Tensor:
    # a forbidden token has p = 0 and log p = -inf; its share of the entropy is 0
    return -(log_p.exp() * log_p).nansum(-1)


def _rank(log_p: Tensor, target: Tensor) -> Tensor:
    return 1 + torch.count_nonzero(log_p > target, dim=-1)


def top1_agreement(first: ArrayLike, second: ArrayLike) -> NDArray[np.float64]:
    """Return how often two models' most likely tokens are the same (Carlsson et al., Figure 5).

    Args:
        first: (N, T) ids of one model's most likely token at each position of N texts.
        second: (N, T) the same of another model, on the same texts.

    Returns:
        (N,) shares from 0 to 1, one a text.

    Raises:
        ValueError: the shapes differ, so the models did not read the same texts.
    """
    a, b = np.asarray(first), np.asarray(second)
    if a.shape != b.shape:
        raise ValueError(f"predictions of shapes {a.shape} and {b.shape} are not of the same texts")
    agreement: NDArray[np.float64] = (a == b).mean(axis=-1, dtype=np.float64)
    return agreement
