"""Forward passes over given texts: token statistics, next tokens, hidden states."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hyperfitting.errors import exhausted_resource
from hyperfitting.metrics.distribution import TokenStats, token_stats
from hyperfitting.models.layers import input_tokens
from hyperfitting.progress import Advance
from hyperfitting.runtime.distributed import is_sharded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKEN_STATS = tuple(field.name for field in fields(TokenStats))

Result = TypeVar("Result")

log = logging.getLogger(__name__)


@torch.inference_mode()
def compute_token_stats(
    model: PreTrainedModel,
    texts: NDArray[np.int32],
    batch_size: int,
    advance: Advance | None = None,
) -> dict[str, NDArray[np.float64]]:
    """Return statistics of the next-token distribution at every token of each text but its first.

    Args:
        model: a causal language model in evaluation mode.
        texts: (N, T) token ids, T at least 2.
        batch_size: texts per forward pass; halved when GPU memory runs out.
        advance: reports tokens.

    Returns:
        For each of `TOKEN_STATS` (losses and entropies in nats) an array (N, T - 1). Ranks of a
        model in half precision are those of `token_stats` with ties by id.

    Raises:
        FloatingPointError: the model's logits hold NaN or infinity.
    """
    n, length = texts.shape
    stats = {name: np.empty((n, length - 1)) for name in TOKEN_STATS}
    ties_by_id = next(model.parameters()).dtype != torch.float32

    def compute(rows: slice, logits: Tensor, targets: Tensor) -> None:
        # one text at a time: a float32 copy of (B, T, V) is large
        by_text = [
            token_stats(scores, tokens, ties_by_id)
            for scores, tokens in zip(logits, targets, strict=True)
        ]
        for name in TOKEN_STATS:
            stats[name][rows] = torch.stack([getattr(text, name) for text in by_text]).cpu().numpy()
        if np.isnan(stats["loss"][rows]).any():
            raise FloatingPointError("the logits hold NaN or infinity: there is no distribution")

    for_each_batch(model, texts, batch_size, compute, advance)
    return stats


@torch.inference_mode()
def for_each_batch(
    model: PreTrainedModel,
    texts: NDArray[np.int32],
    batch_size: int,
    compute: Callable[[slice, Tensor, Tensor], None],
    advance: Advance | None = None,
) -> None:
    """Call a function with the next-token logits of each batch of texts.

    Args:
        model: a causal language model in evaluation mode.
        texts: (N, T) token ids, T at least 2.
        batch_size: texts per forward pass; halved when GPU memory runs out.
        compute: called with the rows of a batch, the logits (B, T - 1, V) of every token but the
            first, and these tokens (B, T - 1). If memory runs out in it, it is called again.
        advance: reports tokens.
    """
    device = next(model.parameters()).device

    def compute_batch(rows: slice) -> None:
        batch = torch.as_tensor(texts[rows], dtype=torch.long, device=device)  # (B, T)
        inputs = input_tokens(model, batch)
        logits = model(input_ids=inputs, use_cache=False).logits  # (B, T or T - 1, V)
        compute(rows, logits[:, : batch.shape[1] - 1], batch[:, 1:])
        if advance:
            advance(batch.numel())

    for _ in in_batches(compute_batch, len(texts), batch_size, model):
        pass


@torch.inference_mode()
def topk_next_tokens(
    model: PreTrainedModel, text: NDArray[np.int32], k: int
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Return the ``k`` most likely next tokens after each token of a text but its last.

    Args:
        model: a causal language model in evaluation mode.
        text: (T,) token ids.
        k: number of tokens; at most the vocabulary size.

    Returns:
        Their ids (T - 1, k), most likely first, and their probabilities (T - 1, k).
    """
    device = next(model.parameters()).device
    tokens = torch.as_tensor(text[None, :-1], dtype=torch.long, device=device)
    logits = model(input_ids=tokens, use_cache=False).logits[0].float()  # (T - 1, V)
    probabilities, ids = torch.softmax(logits, -1).topk(min(k, logits.shape[-1]), dim=-1)
    return ids.int().cpu().numpy(), probabilities.cpu().numpy()


@torch.inference_mode()
def last_hidden_states(
    model: PreTrainedModel,
    texts: list[list[int]],
    batch_size: int,
    advance: Advance | None = None,
) -> NDArray[np.float32]:
    """Return the last hidden state at the last token of each text, as features for MAUVE.

    Args:
        model: a causal language model in evaluation mode.
        texts: N lists of token ids, none empty.
        batch_size: texts per forward pass; halved when GPU memory runs out.
        advance: reports texts.

    Returns:
        (N, H).
    """
    device = next(model.parameters()).device
    features: list[NDArray[np.float32]] = []

    def compute(batch_rows: slice) -> None:
        batch = texts[batch_rows]
        longest = max(map(len, batch))
        # a causal model: padding on the right changes no earlier state
        padded = torch.tensor(
            [text + [0] * (longest - len(text)) for text in batch], device=device
        )  # (B, T)
        states = model(input_ids=padded, use_cache=False, output_hidden_states=True).hidden_states
        last = torch.tensor([len(text) - 1 for text in batch], device=device)
        rows = torch.arange(len(batch), device=device)
        features.append(states[-1][rows, last].float().cpu().numpy())  # (B, H)
        if advance:
            advance(len(batch))

    for _ in in_batches(compute, len(texts), batch_size, model):
        pass
    return np.concatenate(features)


def in_batches(
    compute: Callable[[slice], Result], n: int, batch_size: int, model: PreTrainedModel
) -> Iterator[Result]:
    """Yield the results of a function of the rows of each batch, halved if they do not fit.

    Args:
        compute: does a forward pass over the rows of one batch.
        n: number of rows.
        batch_size: rows of a batch, at most.
        model: what ``compute`` runs; not repeated if it is sharded, as the other ranks are further
            on.
    """
    start = 0
    while start < n:
        rows = slice(start, min(start + batch_size, n))
        try:
            result = compute(rows)
        except RuntimeError as error:
            n_rows = rows.stop - start
            if exhausted_resource(error) != "memory" or n_rows == 1 or is_sharded(model):
                raise
            batch_size = math.ceil(n_rows / 2)
            log.warning("out of GPU memory: retrying with batches of %d texts", batch_size)
        else:
            start = rows.stop
            yield result
