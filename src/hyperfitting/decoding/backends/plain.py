"""The model's own forward pass over a preallocated cache: for any model, on any device."""

from contextlib import AbstractContextManager, nullcontext

from transformers import PreTrainedModel

from hyperfitting.decoding.backends.base import CachedModel
from hyperfitting.decoding.cache import preallocated_cache
from hyperfitting.decoding.config import DecodeConfig


class PlainBackend:
    """See `Backend`."""

    def supports(
        self, model: PreTrainedModel, decode: DecodeConfig, n_rows: int, n_steps: int
    ) -> bool:
        """Return True."""
        return True

    def prepare(self, model: PreTrainedModel, n_rows: int) -> AbstractContextManager[None]:
        """Leave the model as it is."""
        return nullcontext()

    def start(self, model: PreTrainedModel, max_length: int) -> CachedModel:
        """Return the model with a preallocated cache."""
        return CachedModel(model, preallocated_cache(model, max_length))
