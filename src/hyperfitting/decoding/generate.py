"""Continue contexts with a model: batches, their size, and the strategy and backend of each.

The contexts of one call have the same length, so there is no padding. Nothing here knows about
tokenizers or files.
"""

import logging
import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from hyperfitting.decoding.autoregressive import greedy_search, sample
from hyperfitting.decoding.backends import select_backend
from hyperfitting.decoding.backends.base import Backend
from hyperfitting.decoding.beam import beam_search
from hyperfitting.decoding.cache import cache_bytes
from hyperfitting.decoding.citation_blocker import CitationBlocker
from hyperfitting.decoding.config import DecodeConfig
from hyperfitting.decoding.constraints import Constraints
from hyperfitting.decoding.contrastive import contrastive_search
from hyperfitting.errors import UserError, exhausted_resource
from hyperfitting.metrics.distribution import STEP_STATS
from hyperfitting.progress import Advance, ignore_advance
from hyperfitting.runtime import memory

Tokens = NDArray[np.int32]
_STRATEGIES = {
    "greedy": greedy_search,
    "sample": sample,
    "beam": beam_search,
    "contrastive": contrastive_search,
}
_MAX_ROWS = {"cpu": 64, "cuda": 512}
"""Rows of a batch beyond which throughput no longer grows, by device type."""
_MEMORY_FRACTION = 0.5
"""Fraction of the free memory that a batch may use."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Continuations:
    """Continuations of N contexts."""

    tokens: list[list[int]]
    """N lists of ids: ``max_new_tokens`` each, or fewer where a text ended with EOS."""
    stats: dict[str, NDArray[np.float32]]
    """For each of `STEP_STATS` (N, max_new_tokens): of the model's distribution before constraints
    and filters, and of the token chosen. NaN after the end of a text."""
    batch_sizes: list[int]
    """Contexts of each batch, in order; they sum to N."""


@torch.inference_mode()
def continue_texts(
    model: PreTrainedModel,
    contexts: Tokens,
    max_new_tokens: int,
    decode: DecodeConfig,
    batch_size: int | None = None,
    advance: Advance | None = None,
    blocker: CitationBlocker | None = None,
) -> Continuations:
    """Generate a continuation of each context, in order.

    Args:
        model: a causal language model in evaluation mode.
        contexts: (N, T) token ids, T at least 1.
        max_new_tokens: length of a continuation, in tokens.
        decode: strategy, filters and constraints.
        batch_size: maximum number of contexts in a batch; changes no text on a CPU (on a GPU see
            docs/decoding.md). None: the largest that fits into memory and is of use, halved when
            GPU memory runs out.
        advance: called with the number of new tokens, at each step.
        blocker: forbids continuations of the training data.

    Raises:
        FloatingPointError: the model's logits hold NaN or infinity.
        UserError: all tokens are forbidden, so no text can be continued; or a batch of the given
            size does not fit into memory.
        ValueError: the contexts are empty.
    """
    n_texts, context_len = contexts.shape
    if context_len == 0:
        raise ValueError("a context has 1 token or more; these have none")
    fixed_size = batch_size
    if batch_size is None:
        batch_size = fitting_batch_size(model, context_len + max_new_tokens, decode.num_candidates)
    batch_size = even_batch_size(n_texts, batch_size)
    n_rows = batch_size * decode.num_candidates
    n_steps = math.ceil(n_texts / batch_size) * max_new_tokens
    backend = select_backend(model, decode, n_rows, n_steps)
    constraints = Constraints(decode, eos_ids(model), context_len, blocker)

    tokens: list[list[int]] = []
    batch_sizes: list[int] = []
    stats = [np.empty((len(STEP_STATS), 0, max_new_tokens), np.float32)]
    with backend.prepare(model, n_rows):
        while len(tokens) < n_texts:
            batch = contexts[len(tokens) : len(tokens) + batch_size]
            try:
                batch_tokens, batch_stats = _continue_batch(
                    model,
                    backend,
                    batch,
                    max_new_tokens,
                    decode,
                    constraints,
                    advance or ignore_advance,
                )  # (B, new), (S, B, new)
            except RuntimeError as error:
                if exhausted_resource(error) != "memory":
                    raise
                if fixed_size is not None:
                    raise _does_not_fit(fixed_size) from error
                if batch_size == 1:
                    raise
                batch_size = math.ceil(batch_size / 2)
                log.warning("out of GPU memory: retrying with batches of %d texts", batch_size)
                continue
            for row, text in enumerate(batch_tokens.tolist()):
                length = _length_before(text, constraints.eos_ids) if decode.stop_at_eos else None
                tokens.append(text[:length])
                batch_stats[:, row, len(tokens[-1]) :] = torch.nan
            stats.append(batch_stats.cpu().numpy())
            batch_sizes.append(len(batch))
    all_stats = np.concatenate(stats, axis=1)  # (S, N, new)
    return Continuations(tokens, dict(zip(STEP_STATS, all_stats, strict=True)), batch_sizes)


def _continue_batch(
    model: PreTrainedModel,
    backend: Backend,
    contexts: Tokens,
    max_new_tokens: int,
    decode: DecodeConfig,
    constraints: Constraints,
    advance: Advance,
) -> tuple[Tensor, Tensor]:
    """Return new tokens (B, max_new_tokens) and their stats (S, B, max_new_tokens)."""
    device = next(model.parameters()).device
    input_ids = torch.as_tensor(contexts, dtype=torch.long, device=device)  # (B, T)
    cached_model = backend.start(model, contexts.shape[1] + max_new_tokens)
    strategy = _STRATEGIES[decode.strategy]
    return strategy(cached_model, input_ids, max_new_tokens, decode, constraints, advance)


def _does_not_fit(batch_size: int) -> UserError:
    return UserError(
        "out of memory: a batch of that many texts does not fit",
        field="hardware.generation_batch_size",
        value=batch_size,
        hint="a lower one, or in one process null: batches are sized by the free memory",
    )


def fitting_batch_size(model: PreTrainedModel, length: int, num_candidates: int) -> int:
    """Return the largest number of texts in a batch that fits into memory and is of use.

    Args:
        model: on its device.
        length: tokens of a context and its continuation.
        num_candidates: rows per text.
    """
    max_rows = _MAX_ROWS.get(model.device.type, 64)
    # the cache, and some copies of the logits in float32
    row_bytes = cache_bytes(model, length) + 8 * 4 * model.config.vocab_size
    fitting_rows = int(_MEMORY_FRACTION * memory.free_bytes(model.device) // row_bytes)
    return max(1, min(max_rows, fitting_rows) // num_candidates)


def even_batch_size(n: int, max_batch_size: int) -> int:
    """Return the batch size that splits ``n`` texts evenly into the fewest batches."""
    return math.ceil(n / math.ceil(n / max_batch_size)) if n else 1


def eos_ids(model: PreTrainedModel) -> list[int]:
    """Return the ids that end a text, from the model's generation config or its config."""
    eos = model.generation_config.eos_token_id if model.can_generate() else None
    if eos is None:
        eos = model.config.eos_token_id
    ids = [] if eos is None else eos if isinstance(eos, list) else [eos]
    return [i for i in ids if 0 <= i < model.config.vocab_size]


def n_unscored_ids(model: PreTrainedModel) -> int:
    """Return how many ids the model reads but gives no logit: SOS of an image model."""
    head = model.get_output_embeddings()
    n_scored = model.config.vocab_size if head is None else head.weight.shape[0]
    return max(0, int(model.get_input_embeddings().num_embeddings) - int(n_scored))


def _length_before(tokens: list[int], ids: list[int]) -> int:
    """Return the number of tokens before the first of ``ids``."""
    return next((i for i, token in enumerate(tokens) if token in ids), len(tokens))
