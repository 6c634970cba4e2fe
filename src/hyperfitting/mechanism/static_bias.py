"""A logit bias that is the same at every position, as a control (Li et al., ICML 2026).

It is the mean logit offset, tuned minus base, of the tokens that gain most rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hyperfitting.decoding.generate import n_unscored_ids
from hyperfitting.errors import UserError
from hyperfitting.evaluation.forward import for_each_batch
from hyperfitting.progress import Advance

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class LogitMeans:
    """Means over all positions of some texts, of every token of the vocabulary."""

    logits: NDArray[np.float64]
    """(V,) its logit."""
    ranks: NDArray[np.float64]
    """(V,) its rank, from 1 (the most likely token)."""


def logit_means(
    model: PreTrainedModel,
    texts: Sequence[NDArray[np.int32]],
    batch_size: int,
    advance: Advance | None = None,
) -> LogitMeans:
    """Return the mean logit and rank of every token, in one pass whose memory does not grow.

    Args:
        model: a causal language model in evaluation mode.
        texts: (N, T) token ids of each dataset, T at least 2.
        batch_size: texts per forward pass.
        advance: reports tokens.
    """
    n_vocabulary = model.config.get_text_config().vocab_size - n_unscored_ids(model)
    device = model.device
    sums = torch.zeros(2, n_vocabulary, dtype=torch.float64)
    places = torch.arange(1, n_vocabulary + 1, device=device)

    def compute(rows: slice, logits: Tensor, _: Tensor) -> None:
        batch_sums = torch.zeros_like(sums)
        for scores in logits:  # (T - 1, V)
            order = scores.argsort(dim=-1, descending=True, stable=True)
            ranks = torch.empty_like(order).scatter_(-1, order, places.expand_as(order))
            batch_sums[0] += scores.sum(0, dtype=torch.float64).cpu()
            batch_sums[1] += ranks.sum(0).cpu()
        sums.add_(batch_sums)  # last: memory may run out before

    n_positions = 0
    for tokens in texts:
        for_each_batch(model, tokens, batch_size, compute, advance)
        n_positions += tokens[:, 1:].size
    means = (sums / n_positions).numpy()
    return LogitMeans(*means)


def static_bias(
    base: LogitMeans, tuned: LogitMeans, n_tokens: int, center: bool = False
) -> NDArray[np.float32]:
    """Return the mean logit offset (V,) of the tokens that gain most rank, and 0 for all others.

    Args:
        base: of the base model.
        tuned: of the tuned model, on the same texts.
        n_tokens: tokens with an offset.
        center: subtract the mean offset of the whole vocabulary.

    Raises:
        UserError: the vocabulary has fewer tokens.
    """
    if n_tokens > len(base.ranks):
        raise UserError(
            "more tokens than the vocabulary has",
            field="decode.control.n_tokens",
            value=n_tokens,
            valid=f"1 to {len(base.ranks)}",
        )
    gained = np.argsort(tuned.ranks - base.ranks, kind="stable")[:n_tokens]  # most first
    bias = np.zeros(len(base.logits), np.float32)
    offsets = tuned.logits - base.logits
    bias[gained] = offsets[gained] - (offsets.mean() if center else 0)
    return bias
