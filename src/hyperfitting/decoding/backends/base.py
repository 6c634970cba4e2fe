"""The interface of a backend, and the model with a cache that the decoding strategies call."""

import inspect
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from hyperfitting.decoding.config import DecodeConfig
from hyperfitting.models.layers import cache_argument


class CachedModel:
    """A model with the cache of one batch: tokens in, next-token logits out.

    Attention keeps keys and values, state-space models a state of constant size. The first call
    takes the contexts, each later one a single token per text: Mamba cannot append several.

    Args:
        model: in evaluation mode.
        cache: empty; None: the model creates its own.
    """

    def __init__(self, model: PreTrainedModel, cache: Cache | None) -> None:
        self._model, self._cache = model, cache
        self._cache_argument = cache_argument(model)
        self._n_rows = 0
        # only the last position of a context is needed, and the logits of all may not fit in memory
        has_option = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._options = {"logits_to_keep": 1} if has_option else {}

    def __call__(self, tokens: Tensor) -> Tensor:
        """Append tokens (B, T) to the cache; return the next-token logits (B, V), float32."""
        logits: Tensor = self._forward(tokens).logits[:, -1].float()
        return logits

    def forward_with_states(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (B, V), and last hidden states (B, T, H) normalized to length 1."""
        output = self._forward(tokens, output_hidden_states=True)
        states = torch.nn.functional.normalize(output.hidden_states[-1].float(), dim=-1)
        return output.logits[:, -1].float(), states

    def expand(self, n: int) -> None:
        """Repeat each row of the cache ``n`` times."""
        self.select(torch.arange(self._n_rows).repeat_interleave(n))

    def select(self, rows: Tensor) -> None:
        """Fill the cache with its rows ``rows`` (B,), in this order."""
        self._filled_cache().reorder_cache(rows)

    def _forward(self, tokens: Tensor, **options: Any) -> Any:
        cache = {self._cache_argument: self._cache}
        output = self._model(input_ids=tokens, use_cache=True, **cache, **options, **self._options)
        self._cache, self._n_rows = output[self._cache_argument], len(tokens)
        return output

    def _filled_cache(self) -> Cache:
        if self._cache is None:
            raise TypeError(f"{type(self._model).__name__} has no cache")
        return self._cache


class Backend(Protocol):
    """How the forward passes of one `continue_texts` call are executed."""

    def supports(
        self, model: PreTrainedModel, decode: DecodeConfig, n_rows: int, n_steps: int
    ) -> bool:
        """Return whether it applies and is faster than the plain forward pass.

        Args:
            model: on its device.
            decode: the strategy matters.
            n_rows: rows of a full batch: texts times candidates.
            n_steps: steps of all batches together.
        """
        ...

    def prepare(self, model: PreTrainedModel, n_rows: int) -> AbstractContextManager[None]:
        """Modify a model for the duration of the context, once for all batches."""
        ...

    def start(self, model: PreTrainedModel, max_length: int) -> CachedModel:
        """Return the model with an empty cache for one batch of ``max_length`` tokens a text."""
        ...
