"""The key-value cache of a batch, allocated once for all tokens that it will hold."""

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer


# (mypy skips transformers, so its classes are Any)
class PreallocatedLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one block, (B, n_kv_heads, max_length, D), filled up to a length."""

    def __init__(self, max_length: int) -> None:
        super().__init__()
        self._max_length, self._length = max_length, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the tensors; batch size, heads, dtype and device are those of the states."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (
            states.new_empty(*states.shape[:2], self._max_length, states.shape[-1])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values (B, n_kv_heads, T, D); return views of all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self._length = self._length, self._length + key_states.shape[2]
        self.keys[:, :, start : self._length] = key_states
        self.values[:, :, start : self._length] = value_states
        return self.keys[:, :, : self._length], self.values[:, :, : self._length]

    def get_seq_length(self) -> int:
        """Return the number of tokens in the cache."""
        return self._length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace row i by row ``beam_idx[i]``; (B,)."""
        for states in (self.keys, self.values):
            filled = states[:, :, : self._length]
            filled.copy_(filled.index_select(0, beam_idx))


def has_full_attention(model: PreTrainedModel) -> bool:
    """Return whether all blocks attend to all preceding tokens.

    Blocks with a sliding window, or with a recurrent state, need caches of their own.
    """
    layers = DynamicCache(config=model.config).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


def preallocated_cache(model: PreTrainedModel, max_length: int) -> Cache | None:
    """Return an empty cache for ``max_length`` tokens per text, or None if the model needs its own.

    A model called with None creates the cache that it needs.
    """
    if not has_full_attention(model):
        return None
    n_layers = len(DynamicCache(config=model.config).layers)
    return Cache(layers=[PreallocatedLayer(max_length) for _ in range(n_layers)])


def cache_bytes_per_token(model: PreTrainedModel) -> int:
    """Return the cache size per token of one text, in bytes; an upper bound."""
    config = model.config
    n_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * n_heads * head_dim * model.dtype.itemsize)
