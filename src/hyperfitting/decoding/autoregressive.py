"""Greedy decoding and sampling: one token at a time, as in nanoGPT's `generate`."""

from collections.abc import Callable

import torch
from torch import Tensor

from hyperfitting.decoding.backends.base import CachedModel
from hyperfitting.decoding.config import DecodeConfig
from hyperfitting.decoding.constraints import Constraints
from hyperfitting.decoding.sampling import sample_tokens, uniform_draws
from hyperfitting.decoding.token_buffer import TokenBuffer
from hyperfitting.progress import Advance
from hyperfitting.runtime.numerics import accumulation_dtype


def greedy_search(
    model: CachedModel,
    contexts: Tensor,
    max_new_tokens: int,
    decode: DecodeConfig,
    constraints: Constraints,
    advance: Advance,
) -> tuple[Tensor, Tensor]:
    """Continue contexts (B, T) with the most likely token at each step.

    Returns:
        New tokens (B, max_new_tokens), and their `STEP_STATS` (S, B, max_new_tokens).
    """

    def choose(scores: Tensor, step: int) -> Tensor:
        return scores.argmax(-1)

    return _generate(model, contexts, max_new_tokens, choose, constraints, advance)


def sample(
    model: CachedModel,
    contexts: Tensor,
    max_new_tokens: int,
    decode: DecodeConfig,
    constraints: Constraints,
    advance: Advance,
) -> tuple[Tensor, Tensor]:
    """Continue contexts (B, T) with a draw from the filtered distribution at each step.

    Returns:
        New tokens (B, max_new_tokens), and their `STEP_STATS` (S, B, max_new_tokens).
    """
    draws = uniform_draws(decode.seed, contexts.tolist(), max_new_tokens)
    device = contexts.device
    u = torch.from_numpy(draws).to(accumulation_dtype(device)).to(device)  # (B, max_new_tokens)

    def choose(scores: Tensor, step: int) -> Tensor:
        return sample_tokens(scores, decode, u[:, step])

    return _generate(model, contexts, max_new_tokens, choose, constraints, advance)


def _generate(
    model: CachedModel,
    contexts: Tensor,
    max_new_tokens: int,
    choose: Callable[[Tensor, int], Tensor],
    constraints: Constraints,
    advance: Advance,
) -> tuple[Tensor, Tensor]:
    """Choose one token per text and step. ``choose``: from scores (B, V) and step to ids (B,)."""
    buffer = TokenBuffer(contexts, max_new_tokens)
    check_allowed = constraints.allowed_check(max_new_tokens)
    tokens = contexts  # (B, T)
    for step in range(max_new_tokens):
        logits = model(tokens)  # (B, V)
        scores = constraints(buffer.tokens, logits)  # (B, V), -inf for forbidden tokens
        tokens = choose(scores, step).unsqueeze(1)  # (B, 1)
        check_allowed(scores.gather(1, tokens), step)
        buffer.append(tokens.squeeze(1), logits)
        advance(len(tokens))
    return buffer.result()
