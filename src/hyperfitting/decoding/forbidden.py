"""Forbidden tokens: scores of -inf, and the check that a text has a token left.

Neither synchronizes with a GPU at each step: shapes do not depend on how much is forbidden, and the
result of the check is read back every 32 steps.
"""

import torch
from torch import Tensor

from hyperfitting.decoding.config import DecodeConfig
from hyperfitting.errors import UserError

_STEPS_PER_READ = {"cpu": 1}
_DEFAULT_STEPS_PER_READ = 32


def forbid(scores: Tensor, tokens: Tensor, is_forbidden: Tensor) -> None:
    """Set the scores of forbidden tokens to -inf.

    Args:
        scores: (B, V), modified in place.
        tokens: (B, F) token ids of each text, repeated or not.
        is_forbidden: (B, F) which of them are forbidden; the others stay as they are.
    """
    limit = torch.full(tokens.shape, torch.inf, dtype=scores.dtype, device=scores.device)
    limit.masked_fill_(is_forbidden, -torch.inf)
    scores.scatter_reduce_(1, tokens, limit, "amin")


class AllowedCheck:
    """Checks that the chosen tokens of a batch are not forbidden themselves.

    On a GPU an error comes up to 32 steps late, but names its step.

    Args:
        decode: what forbids, for the message.
        n_steps: new tokens of each text.
    """

    def __init__(self, decode: DecodeConfig, n_steps: int) -> None:
        self._decode, self._n_steps = decode, n_steps
        self._unread: list[Tensor] = []  # whether a text had no token left, at each step

    def __call__(self, chosen_scores: Tensor, step: int) -> None:
        """Check one step.

        Args:
            chosen_scores: constrained scores of the best token of each text, any shape.
            step: from 0.

        Raises:
            UserError: one is -inf, at this step or an earlier one, so all tokens are forbidden.
        """
        self._unread.append(torch.isneginf(chosen_scores).any())
        interval = _STEPS_PER_READ.get(chosen_scores.device.type, _DEFAULT_STEPS_PER_READ)
        if len(self._unread) < interval and step + 1 < self._n_steps:
            return
        findings = torch.stack(self._unread).tolist()
        self._unread.clear()
        if True in findings:
            decode, n_allowed = self._decode, step + 1 - len(findings) + findings.index(True)
            raise UserError(
                f"every token is forbidden after {n_allowed} new ones: no text can be continued",
                field="decode.no_repeat_ngram_size, decode.citation_blocker.n",
                value=f"{decode.no_repeat_ngram_size}, {decode.citation_blocker.n}",
                hint="a longer n-gram for each, or decode.stop_at_eos=true",
            )
