"""Generate one continuation, streamed token by token."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hyperfitting.decoding.autoregressive import greedy_search, sample
from hyperfitting.decoding.backends import select_backend
from hyperfitting.decoding.backends.base import CachedModel
from hyperfitting.decoding.citation_blocker import CitationBlocker
from hyperfitting.decoding.config import DecodeConfig
from hyperfitting.decoding.constraints import Constraints
from hyperfitting.decoding.generate import continue_texts, eos_ids

OnTokens = Callable[[list[int]], None]
"""Receives the continuation so far, after each token."""


class _Ended(Exception):
    """The text has ended with EOS."""


class _StreamingModel(CachedModel):
    """A model that reports the tokens it is given: those that were chosen.

    Args:
        model: to call.
        on_tokens: receives the continuation so far.
        end_ids: ids that end the text, if it may end.
    """

    def __init__(self, model: CachedModel, on_tokens: OnTokens, end_ids: Sequence[int]) -> None:
        self._observed, self._on_tokens, self._end_ids = model, on_tokens, end_ids
        self.continuation: list[int] | None = None

    def __call__(self, tokens: Tensor) -> Tensor:
        """Append tokens (1, T); return the next-token logits (1, V)."""
        if self.continuation is None:  # the context
            self.continuation = []
        else:
            token = int(tokens[0, 0])
            if token in self._end_ids:
                raise _Ended
            self.continuation.append(token)
            self._on_tokens(self.continuation)
        return self._observed(tokens)


@torch.inference_mode()
def stream_continuation(
    model: PreTrainedModel,
    context: Sequence[int],
    max_new_tokens: int,
    decode: DecodeConfig,
    on_tokens: OnTokens,
    blocker: CitationBlocker | None = None,
) -> list[int]:
    """Return the continuation that `continue_texts` gives this context by itself.

    Args:
        model: a causal language model in evaluation mode.
        context: token ids, at least one.
        max_new_tokens: length of the continuation, in tokens.
        decode: strategy, filters and constraints. Beam and contrastive search choose no token
            before the end: they report the whole continuation.
        on_tokens: called with the continuation so far, in tokens, after each of them.
        blocker: forbids continuations of the training data.

    Raises:
        FloatingPointError: the model's logits hold NaN or infinity.
        UserError: all tokens are forbidden.
    """
    contexts = np.array([context], np.int32)  # (1, T)
    strategy = {"greedy": greedy_search, "sample": sample}.get(decode.strategy)
    if strategy is None:
        generated = continue_texts(model, contexts, max_new_tokens, decode, 1, None, blocker)
        on_tokens(generated.tokens[0])
        return generated.tokens[0]
    constraints = Constraints(decode, eos_ids(model), len(context), blocker)
    end_ids = constraints.eos_ids if decode.stop_at_eos else []
    backend = select_backend(model, decode, 1, max_new_tokens)
    with backend.prepare(model, 1):
        cached = backend.start(model, len(context) + max_new_tokens)
        observed = _StreamingModel(cached, on_tokens, end_ids)
        input_ids = torch.as_tensor(contexts, dtype=torch.long, device=model.device)
        try:
            tokens, _ = strategy(
                observed, input_ids, max_new_tokens, decode, constraints, lambda n, **_: None
            )
        except _Ended:
            return observed.continuation or []
    continuation: list[int] = tokens[0].tolist()
    if continuation[-1] in end_ids:
        continuation.pop()
    on_tokens(continuation)
    return continuation
