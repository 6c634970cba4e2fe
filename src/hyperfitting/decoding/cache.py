"""The cache of a batch: keys and values, allocated once for all tokens, or a model's own states."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from hyperfitting.models.layers import cache_argument


# (mypy skips transformers, so its classes are Any)
class PreallocatedLayer(DynamicLayer):  # type: ignore[misc] # mypy skips transformers
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
        """Fill the cache with its rows ``beam_idx`` (B,), in this order."""
        rows = beam_idx.to(self.keys.device)
        if len(rows) != len(self.keys):
            self.keys, self.values = self.keys[rows], self.values[rows]
            return
        for states in (self.keys, self.values):
            filled = states[:, :, : self._length]
            filled.copy_(filled.index_select(0, rows))


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


@torch.no_grad()
def cache_bytes(model: PreTrainedModel, length: int) -> int:
    """Return the cache size of one text of ``length`` tokens, in bytes; an upper bound.

    Measured on a text of one token: keys and values grow with the length, states do not. Of
    state-space models it includes what reading the context takes.
    """
    token = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
    name = cache_argument(model)
    layers = model(input_ids=token, use_cache=True)[name].layers
    total, scan = 0, 0
    for layer in layers:
        for states in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            total += _n_bytes(states) * length
        for states in getattr(layer, "conv_states", {}).values():
            total += _n_bytes(states)
        for states in getattr(layer, "recurrent_states", {}).values():
            total += _n_bytes(states)
            # Mamba's scan holds three such float32 tensors of every position of a block at once
            # (Mamba2's, (B, n_heads, D, N), goes by chunks)
            if states is not None and states.dim() == 3:
                scan = max(scan, 3 * 4 * states.numel() * length)
    return total + scan


def _n_bytes(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel() * tensor.itemsize
