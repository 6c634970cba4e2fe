"""A logit bias that is the same at every position, as a control (Li et al., ICML 2026).

It is the mean logit offset, tuned minus base, of the tokens that gain most rank. A mean over ranks
is dominated by the tail of the vocabulary, which decoding never samples: a change from rank 36,000
to 27,000 weighs 90 times as much as one from 101 to 1. The log-rank weights relative changes, the
reciprocal rank little but the first ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hyperfitting.decoding.generate import n_unscored_ids
from hyperfitting.errors import UserError
from hyperfitting.evaluation.forward import for_each_batch
from hyperfitting.mechanism.ranks import token_ranks
from hyperfitting.progress import Advance
from hyperfitting.runtime.numerics import accumulation_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_PENALTIES: dict[str, Callable[[Tensor], Tensor]] = {
    "rank": lambda ranks: ranks,
    "log_rank": torch.log,
    "reciprocal_rank": lambda ranks: -1 / ranks,
}
"""By `decode.control.gain`: what falls when a token gains rank (from 1, the most likely)."""


@dataclass(frozen=True)
class LogitMeans:
    """Means over all positions of some texts, of every token of the vocabulary."""

    logits: NDArray[np.float64]
    """(V,) its logit."""
    rank: NDArray[np.float64]
    """(V,) its rank, from 1 (the most likely token)."""
    log_rank: NDArray[np.float64]
    """(V,) natural logarithm of its rank."""
    reciprocal_rank: NDArray[np.float64]
    """(V,) the reciprocal of its rank, negated: lower is better, as in the others."""


def logit_means(
    model: PreTrainedModel,
    texts: Sequence[NDArray[np.int32]],
    batch_size: int,
    advance: Advance | None = None,
) -> LogitMeans:
    """Return the mean logit and ranks of every token, in one pass whose memory does not grow.

    Args:
        model: a causal language model in evaluation mode.
        texts: (N, T) token ids of each dataset, T at least 2.
        batch_size: texts per forward pass.
        advance: reports tokens.
    """
    n_vocabulary = model.config.get_text_config().vocab_size - n_unscored_ids(model)
    dtype = accumulation_dtype(model.device)
    sums = torch.zeros(1 + len(_PENALTIES), n_vocabulary, dtype=torch.float64)
    ranks = torch.arange(n_vocabulary, device=model.device) + 1.0
    penalties = [penalty(ranks) for penalty in _PENALTIES.values()]  # (V,) float32 each

    def compute(rows: slice, logits: Tensor, _: Tensor) -> None:
        batch_sums = torch.zeros_like(sums)
        for scores in logits:  # (T - 1, V)
            places = token_ranks(scores) - 1
            batch_sums[0] += scores.sum(0, dtype=dtype).cpu()
            for row, penalty in enumerate(penalties, 1):
                batch_sums[row] += penalty[places].sum(0, dtype=dtype).cpu()
        sums.add_(batch_sums)  # last: memory may run out before

    n_positions = 0
    for tokens in texts:
        for_each_batch(model, tokens, batch_size, compute, advance)
        n_positions += tokens[:, 1:].size
    means = (sums / n_positions).numpy()
    return LogitMeans(means[0], **dict(zip(_PENALTIES, means[1:], strict=True)))


def tokens_that_gain(
    base: LogitMeans, tuned: LogitMeans, n_tokens: int, gain: str = "rank"
) -> NDArray[np.intp]:
    """Return the ids (n_tokens,) of the tokens that gain most, the largest gain first.

    Args:
        base: of the base model.
        tuned: of the tuned model, on the same texts.
        n_tokens: how many.
        gain: of which mean: `rank`, `log_rank` or `reciprocal_rank`.

    Raises:
        UserError: the vocabulary has fewer tokens.
    """
    if n_tokens > len(base.logits):
        raise UserError(
            "more tokens than the vocabulary has",
            field="decode.control.n_tokens",
            value=n_tokens,
            valid=f"1 to {len(base.logits)}",
        )
    change = getattr(tuned, gain) - getattr(base, gain)
    return np.argsort(change, kind="stable")[:n_tokens]


def static_bias(
    base: LogitMeans, tuned: LogitMeans, tokens: NDArray[np.intp], center: bool = False
) -> NDArray[np.float32]:
    """Return the mean logit offset (V,), tuned minus base, of some tokens, and 0 for all others.

    Args:
        base: of the base model.
        tuned: of the tuned model, on the same texts.
        tokens: their ids.
        center: subtract the mean offset of the whole vocabulary.
    """
    bias = np.zeros(len(base.logits), np.float32)
    offsets = tuned.logits - base.logits
    bias[tokens] = offsets[tokens] - (offsets.mean() if center else 0)
    return bias
