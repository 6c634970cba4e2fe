"""Beam search."""

import torch
from torch import Tensor

from hyperfitting.decoding.backends.base import CachedModel
from hyperfitting.decoding.config import DecodeConfig
from hyperfitting.decoding.constraints import Constraints
from hyperfitting.decoding.token_buffer import TokenBuffer
from hyperfitting.progress import Advance


def beam_search(
    model: CachedModel,
    contexts: Tensor,
    max_new_tokens: int,
    decode: DecodeConfig,
    constraints: Constraints,
    advance: Advance,
) -> tuple[Tensor, Tensor]:
    """Continue contexts (B, T) with the continuation of highest mean log-probability in the beam.

    W = `decode.num_beams` hypotheses of highest log-probability are kept per text. With
    `decode.stop_at_eos` a finished hypothesis keeps its score and its place in the beam.

    Returns:
        New tokens (B, max_new_tokens), and their `STEP_STATS` (S, B, max_new_tokens).
    """
    n_texts, n_beams, device = len(contexts), decode.num_beams, contexts.device
    buffer = TokenBuffer(contexts.repeat_interleave(n_beams, 0), max_new_tokens)  # B * W rows
    beam_scores = torch.full((n_texts, n_beams), -torch.inf, dtype=torch.float32, device=device)
    beam_scores[:, 0] = 0  # the beams of a text are identical at first: only one may branch
    finished = torch.zeros(n_texts * n_beams, dtype=torch.bool, device=device)
    lengths = torch.zeros(n_texts * n_beams, device=device)
    first_row = torch.arange(n_texts, device=device).unsqueeze(1) * n_beams  # (B, 1)
    logits = model(contexts).repeat_interleave(n_beams, 0)  # (B * W, V)
    model.expand(n_beams)
    check_allowed = constraints.allowed_check(max_new_tokens)
    eos = constraints.eos_index(device)  # (E,)
    may_end = decode.stop_at_eos and len(eos) > 0
    for step in range(max_new_tokens):
        scores = constraints(buffer.tokens, torch.log_softmax(logits, -1))
        if may_end:
            scores.masked_fill_(finished.unsqueeze(1), -torch.inf)
            scores[:, constraints.eos_ids[0]].masked_fill_(finished, 0)
        vocab_size = scores.shape[-1]
        total = (beam_scores.view(-1, 1) + scores).view(n_texts, n_beams * vocab_size)
        beam_scores, best = total.topk(n_beams, dim=-1)  # (B, W)
        check_allowed(beam_scores[:, 0], step)
        rows = (first_row + best // vocab_size).flatten()  # (B * W,)
        tokens = (best % vocab_size).flatten()  # (B * W,)
        buffer.select(rows)
        buffer.append(tokens, logits[rows])
        lengths, finished = lengths[rows] + ~finished[rows], finished[rows]
        if may_end:
            finished = finished | torch.isin(tokens, eos)
        advance(n_texts)
        if step + 1 < max_new_tokens:
            model.select(rows)
            logits = model(tokens.unsqueeze(1))
    best = (beam_scores / lengths.view(n_texts, n_beams)).argmax(-1, keepdim=True)  # (B, 1)
    buffer.select((first_row + best).flatten())
    return buffer.result()
