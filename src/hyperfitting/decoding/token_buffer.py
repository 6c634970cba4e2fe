"""The tokens of a batch while it is decoded, and the distributions that they were chosen from."""

import torch
from torch import Tensor

from hyperfitting.metrics.distribution import STEP_STATS, step_stats


class TokenBuffer:
    """Contexts and their continuations so far, with `STEP_STATS` (S of them) of every new token.

    Args:
        contexts: (R, T) token ids.
        max_new_tokens: length of the continuations.
    """

    def __init__(self, contexts: Tensor, max_new_tokens: int) -> None:
        n_rows, self.context_len = contexts.shape
        self._length = self.context_len
        new_tokens = contexts.new_empty(n_rows, max_new_tokens)
        self._tokens = torch.cat([contexts, new_tokens], dim=1)  # (R, T + new)
        self._stats = torch.empty(
            len(STEP_STATS), n_rows, max_new_tokens, device=contexts.device
        )  # (S, R, new)

    @property
    def tokens(self) -> Tensor:
        """Contexts and continuations so far: (R, length)."""
        return self._tokens[:, : self._length]

    def append(self, tokens: Tensor, logits: Tensor) -> None:
        """Append tokens (R,), chosen from logits (R, V) without constraints."""
        step = self._length - self.context_len
        self._tokens[:, self._length] = tokens
        self._stats[:, :, step] = step_stats(logits, tokens)
        self._length += 1

    def select(self, rows: Tensor) -> None:
        """Keep these rows (R',), in this order."""
        self._tokens, self._stats = self._tokens[rows], self._stats[:, rows]

    def result(self) -> tuple[Tensor, Tensor]:
        """Return the continuations (R, new) and their stats (S, R, new).

        Raises:
            FloatingPointError: the logits held NaN or infinity.
        """
        nan_steps = torch.isnan(self._stats).any(0).any(0).nonzero()
        if len(nan_steps):
            raise FloatingPointError(
                "the logits hold NaN or infinity: there is no distribution "
                f"(NaN at new token {int(nan_steps[0]) + 1})"
            )
        return self._tokens[:, self.context_len :], self._stats
