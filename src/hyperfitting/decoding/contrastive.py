"""Contrastive search (Su et al., 2022)."""

import torch
from torch import Tensor

from hyperfitting.decoding.backends.base import CachedModel
from hyperfitting.decoding.config import DecodeConfig
from hyperfitting.decoding.constraints import Constraints
from hyperfitting.decoding.token_buffer import TokenBuffer
from hyperfitting.progress import Advance


def contrastive_search(
    model: CachedModel,
    contexts: Tensor,
    max_new_tokens: int,
    decode: DecodeConfig,
    constraints: Constraints,
    advance: Advance,
) -> tuple[Tensor, Tensor]:
    """Continue contexts (B, T) with the candidate of best (1 - alpha) p - alpha * similarity.

    The candidates are the K = `decode.top_k` most likely tokens; similarity is the highest cosine
    of a candidate's last hidden state with those of all preceding tokens. Each candidate takes a
    forward pass.

    Returns:
        New tokens (B, max_new_tokens), and their `STEP_STATS` (S, B, max_new_tokens).
    """
    n_texts, alpha = len(contexts), decode.penalty_alpha
    buffer = TokenBuffer(contexts, max_new_tokens)
    logits, states = model.forward_with_states(contexts)  # (B, V), (B, T, H)
    k = min(decode.num_candidates, logits.shape[-1])
    first_row = torch.arange(n_texts, device=contexts.device) * k  # (B,)
    model.expand(k)
    check_allowed = constraints.allowed_check(max_new_tokens)
    for step in range(max_new_tokens):
        scores = constraints(buffer.tokens, logits)
        p, ids = torch.softmax(scores, -1).topk(k, dim=-1)  # (B, K)
        check_allowed(scores.gather(1, ids[:, :1]), step)
        next_logits, next_states = model.forward_with_states(ids.view(-1, 1))  # B * K rows
        candidate_states = next_states.view(n_texts, k, -1)  # (B, K, H)
        similarity = torch.einsum("bkh,bth->bkt", candidate_states, states).amax(-1)  # (B, K)
        objective = ((1 - alpha) * p - alpha * similarity).masked_fill(p == 0, -torch.inf)
        best = objective.argmax(-1)  # (B,)
        buffer.append(ids.gather(1, best.unsqueeze(1)).squeeze(1), logits)
        rows = first_row + best  # (B,)
        model.select(rows.repeat_interleave(k))
        logits = next_logits[rows]
        states = torch.cat([states, next_states[rows]], dim=1)  # (B, T + 1, H)
        advance(n_texts)
    return buffer.result()
