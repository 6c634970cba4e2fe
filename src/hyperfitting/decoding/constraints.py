"""What a decoding may not write, or less readily: scores in, scores out.

They see all tokens so far, context included, as in transformers.
"""

import torch
from torch import Tensor


def penalise_repetition(scores: Tensor, history: Tensor, penalty: float) -> Tensor:
    """Make tokens that are there already less likely (Keskar et al., 2019).

    Args:
        scores: (B, V) logits or log-probabilities.
        history: (B, T) ids of context and continuation so far.
        penalty: positive scores are divided by it, negative ones multiplied.
    """
    there = scores.gather(1, history)
    return scores.scatter(1, history, torch.where(there < 0, there * penalty, there / penalty))


def forbid_repeated_ngrams(scores: Tensor, history: Tensor, n: int) -> Tensor:
    """Set to -inf every token that would end an n-gram which is there already.

    Args:
        scores: (B, V), changed in place.
        history: (B, T) ids of context and continuation so far.
        n: length of the n-grams.
    """
    length = history.shape[1]
    if length >= n:
        grams = history.unfold(1, n, 1)  # (B, T - n + 1, n)
        begun = history[:, length - n + 1 :]  # (B, n - 1)
        row, at = (grams[..., :-1] == begun.unsqueeze(1)).all(-1).nonzero(as_tuple=True)
        scores[row, grams[row, at, -1]] = -torch.inf
    return scores
