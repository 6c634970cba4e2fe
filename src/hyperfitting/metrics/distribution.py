"""Next-token distributions: loss, entropy, top-k mass, rank (Carlsson et al., Table 3).

On torch tensors of any device, in float32 at least, with at most one copy of the logits. torch is
imported where it is called, so that the registry of metrics loads without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TokenStats:
    """Statistics of the predicted distribution at each position; each shaped like the targets."""

    loss: Tensor
    """Negative log-likelihood of the target, in nats."""
    entropy: Tensor
    """Entropy of the whole distribution, in nats."""
    top1_mass: Tensor
    """Probability of the most likely token."""
    top3_mass: Tensor
    """Probability of the three most likely tokens together."""
    top5_mass: Tensor
    """Probability of the five most likely tokens together."""
    rank: Tensor
    """Rank of the target: 1 plus the number of tokens that are more likely; with ties by id also
    of those as likely with a lower id."""
    top1: Tensor
    """Id of the most likely token."""


def token_stats(logits: Tensor, targets: Tensor, ties_by_id: bool = False) -> TokenStats:
    """Return loss, entropy, top-k mass, rank and top token at every position.

    Args:
        logits: (..., V) next-token logits, any float dtype.
        targets: (...) ids of the tokens that came next.
        ties_by_id: of equally likely tokens the lower id ranks first, as it does in greedy
            decoding. For models in half precision, of which the two most likely tokens are often
            tied.

    Returns:
        Where a logit is NaN or infinite, so that no distribution is defined, all but ranks and ids
        are NaN: the caller checks it, which on a GPU waits for the result.
    """
    log_p = logits.float().log_softmax(dim=-1)  # (..., V)
    top = log_p.topk(min(5, log_p.shape[-1]), dim=-1)  # (..., 5)
    mass = top.values.exp().cumsum(-1)  # (..., 5)
    log_p_target = log_p.gather(-1, targets.unsqueeze(-1))  # (..., 1)

    def top_mass(k: int) -> Tensor:
        return mass[..., min(k, mass.shape[-1]) - 1]

    return TokenStats(
        loss=-log_p_target.squeeze(-1),
        entropy=entropy(log_p),
        top1_mass=top_mass(1),
        top3_mass=top_mass(3),
        top5_mass=top_mass(5),
        rank=_rank(log_p, log_p_target, targets if ties_by_id else None),
        top1=log_p.argmax(-1) if ties_by_id else top.indices[..., 0],
    )


STEP_STATS = ("loss", "entropy", "top1_mass", "rank")
"""The fields of `TokenStats` that are kept of each decoding step."""


def step_stats(logits: Tensor, chosen: Tensor) -> Tensor:
    """Return `STEP_STATS` at each position: equal to `token_stats`, in fewer passes.

    Args:
        logits: (R, V) next-token logits, float32.
        chosen: (R,) ids of the tokens that were chosen.

    Returns:
        (4, R); the loss is NaN where a logit is NaN or infinite.
    """
    import torch

    log_p = logits.log_softmax(dim=-1)  # (R, V)
    log_p_chosen = log_p.gather(-1, chosen.unsqueeze(-1))  # (R, 1)
    top1_mass = log_p.amax(-1).exp()
    return torch.stack(
        [-log_p_chosen.squeeze(-1), entropy(log_p), top1_mass, _rank(log_p, log_p_chosen)]
    )


def entropy(log_p: Tensor) -> Tensor:
    """Return the entropy (...), in nats, of distributions given as log-probabilities (..., V)."""
    # a masked token has p = 0 and log p = -inf; its term is 0
    return -(log_p.exp() * log_p).nansum(-1)


def _rank(log_p: Tensor, log_p_target: Tensor, targets: Tensor | None = None) -> Tensor:
    """Return the rank of targets (...) of log-probabilities (..., 1); ties by id if given."""
    import torch

    is_before = log_p > log_p_target
    if targets is not None:
        ids = torch.arange(log_p.shape[-1], device=log_p.device)
        is_before |= (log_p == log_p_target) & (ids < targets.unsqueeze(-1))
    return 1 + is_before.count_nonzero(dim=-1)


def top1_agreement(first: ArrayLike, second: ArrayLike) -> NDArray[np.float64]:
    """Return how often the most likely tokens of two models are equal (Carlsson et al., Figure 5).

    Args:
        first: (N, T) ids of one model's most likely token at each position of N texts.
        second: (N, T) the same of another model, on the same texts.

    Returns:
        (N,) shares from 0 to 1, one per text.

    Raises:
        ValueError: the shapes differ, so these are not predictions on the same texts.
    """
    a, b = np.asarray(first), np.asarray(second)
    if a.shape != b.shape:
        raise ValueError(f"predictions of shapes {a.shape} and {b.shape} are not of the same texts")
    agreement: NDArray[np.float64] = (a == b).mean(axis=-1, dtype=np.float64)
    return agreement
