"""The key-value cache of a decoding, laid out at once for all the tokens that will come."""

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer


# (mypy skips transformers, so that its classes are Any to it)
class _Laid(DynamicLayer):  # type: ignore[misc]
    """One block's keys and values (B, heads, space, D), of which ``length`` are there."""

    def __init__(self, space: int) -> None:
        super().__init__()
        self._space, self._length = space, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take the room for all tokens, with the shape of the first."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (
            states.new_empty(*states.shape[:2], self._space, states.shape[-1])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Add keys and values (B, heads, T, D); return all there are, without a copy."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self._length = self._length, self._length + key_states.shape[2]
        self.keys[:, :, start : self._length] = key_states
        self.values[:, :, start : self._length] = value_states
        return self.keys[:, :, : self._length], self.values[:, :, : self._length]

    def get_seq_length(self) -> int:
        """Return how many tokens are there."""
        return self._length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Become the rows of these numbers."""
        for states in (self.keys, self.values):
            there = states[:, :, : self._length]
            there.copy_(there.index_select(0, beam_idx))


def cache_for(model: PreTrainedModel, space: int) -> Cache | None:
    """Return a cache with room for ``space`` tokens; none: the model is to make its own.

    Blocks that look back over a window only, or keep a state instead, have caches of their own.
    """
    layers = DynamicCache(config=model.config).layers
    if not layers or any(type(layer) is not DynamicLayer for layer in layers):
        return None
    return Cache(layers=[_Laid(space) for _ in layers])


def bytes_per_token(model: PreTrainedModel) -> int:
    """Return what one token of one text takes in the cache, at most."""
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * width * model.dtype.itemsize)
