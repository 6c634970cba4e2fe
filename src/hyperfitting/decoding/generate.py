"""Continue contexts with a model: a batched loop over its key-value cache.

The contexts of one call have one length, so nothing is padded. A strategy turns logits into
tokens; the loop knows nothing of what it does, and neither knows about tokenizers or files.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from hyperfitting.config import DecodeConfig
from hyperfitting.progress import Advance

Strategy = Callable[[Tensor, int], Tensor]
"""(logits (B, V), step) -> next tokens (B,)"""
Tokens = NDArray[np.int32]


@torch.inference_mode()
def continue_texts(
    model: PreTrainedModel,
    contexts: Tokens,
    new_tokens: int,
    decode: DecodeConfig,
    batch_size: int,
    advance: Advance | None = None,
) -> list[list[int]]:
    """Return a continuation of each context, in their order.

    Args:
        model: a causal language model in evaluation mode.
        contexts: (N, T) token ids.
        new_tokens: length of a continuation, in tokens.
        decode: how tokens are chosen.
        batch_size: contexts continued at once; it changes the speed, not the texts.
        advance: told of every new token.

    Returns:
        N lists of ``new_tokens`` ids; shorter ones where ``decode.stop_at_eos`` let a text end.

    Raises:
        FloatingPointError: the model's logits hold NaN.
    """
    eos = end_tokens(model)
    out: list[list[int]] = []
    for start in range(0, len(contexts), batch_size):
        batch = contexts[start : start + batch_size]
        choose = strategy(decode, start, len(batch), new_tokens)
        tokens = _continue_batch(
            model, batch, new_tokens, choose, eos if not decode.stop_at_eos else [], advance
        )
        out += [_until(row, eos) if decode.stop_at_eos else row for row in tokens.tolist()]
    return out


def _continue_batch(
    model: PreTrainedModel,
    contexts: Tokens,
    new_tokens: int,
    choose: Strategy,
    forbidden: list[int],
    advance: Advance | None,
) -> Tensor:
    """Return (B, new_tokens) token ids that continue contexts (B, T)."""
    device = next(model.parameters()).device
    tokens = torch.as_tensor(contexts, dtype=torch.long, device=device)  # (B, T)
    made: list[Tensor] = []
    cache = None
    for step in range(new_tokens):
        output = model(input_ids=tokens, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits = output.logits[:, -1].float()  # (B, V)
        if bool(torch.isnan(logits).any()):
            raise FloatingPointError(f"the model's logits hold NaN at new token {step + 1}")
        logits[:, forbidden] = -torch.inf
        tokens = choose(logits, step).unsqueeze(1)  # (B, 1)
        made.append(tokens)
        if advance:
            advance(len(contexts))
    return torch.cat(made, dim=1)


def end_tokens(model: PreTrainedModel) -> list[int]:
    """Return the ids that end a text, from the model's own generation settings."""
    eos = model.generation_config.eos_token_id if model.can_generate() else None
    if eos is None:
        eos = model.config.eos_token_id
    ids = [] if eos is None else eos if isinstance(eos, list) else [eos]
    return [i for i in ids if 0 <= i < model.config.vocab_size]


def _until(tokens: list[int], eos: list[int]) -> list[int]:
    ends = [i for i, token in enumerate(tokens) if token in eos]
    return tokens[: ends[0]] if ends else tokens


def strategy(decode: DecodeConfig, first: int, texts: int, new_tokens: int) -> Strategy:
    """Return the function that chooses tokens for the texts numbered from ``first``."""
    if decode.strategy == "greedy":
        return lambda logits, step: logits.argmax(dim=-1)
    # one stream of uniform numbers a text, so that a draw does not depend on the batch
    draws = np.stack(
        [np.random.default_rng([decode.seed, first + i]).random(new_tokens) for i in range(texts)]
    )

    def sample(logits: Tensor, step: int) -> Tensor:
        u = torch.as_tensor(draws[:, step], dtype=torch.float32, device=logits.device)
        return inverse_cdf(*nucleus(logits / decode.temperature, decode.top_k, decode.top_p), u)

    return sample


def nucleus(logits: Tensor, top_k: int | None, top_p: float) -> tuple[Tensor, Tensor]:
    """Return the probabilities of the tokens that top-k and then top-p leave, and their ids.

    As in transformers, and so in the paper: top-p counts within what top-k left, and keeps the
    token that crosses the mass.

    Args:
        logits: (B, V).
        top_k: how many of the most likely tokens stay; none: all.
        top_p: mass in (0, 1].

    Returns:
        (B, K) probabilities in falling order, 0 where cut off, not renormalised; (B, K) ids.
    """
    k = min(top_k or logits.shape[-1], logits.shape[-1])
    top, ids = logits.topk(k, dim=-1)  # (B, K), sorted
    p = torch.softmax(top, dim=-1)
    before = p.cumsum(-1) - p  # mass of the more likely ones
    return torch.where(before < top_p, p, 0.0), ids


def inverse_cdf(p: Tensor, ids: Tensor, u: Tensor) -> Tensor:
    """Draw one id a row by inverting the cumulative distribution.

    Args:
        p: (B, K) probabilities, not necessarily normalised.
        ids: (B, K) the ids they belong to.
        u: (B,) uniform draws in [0, 1).

    Returns:
        (B,) ids.
    """
    cdf = p.cumsum(-1)
    drawn = (cdf <= u.unsqueeze(1) * cdf[:, -1:]).sum(-1, keepdim=True)  # (B, 1)
    last = (p > 0).sum(-1, keepdim=True) - 1  # rounding must not reach a token cut off
    return ids.gather(-1, torch.minimum(drawn, last)).squeeze(-1)
