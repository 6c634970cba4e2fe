"""How forward passes are executed while decoding; a backend changes the speed, not the tokens."""

from transformers import PreTrainedModel

from hyperfitting.decoding.backends.base import Backend
from hyperfitting.decoding.backends.cuda_graph import CudaGraphBackend
from hyperfitting.decoding.backends.packed_cpu import PackedCpuBackend
from hyperfitting.decoding.backends.plain import PlainBackend
from hyperfitting.decoding.config import DecodeConfig

_BACKENDS: tuple[Backend, ...] = (PackedCpuBackend(), CudaGraphBackend(), PlainBackend())
"""The first that supports the model is used."""


def select_backend(
    model: PreTrainedModel, decode: DecodeConfig, n_rows: int, n_steps: int
) -> Backend:
    """Return the fastest backend for a model; arguments as of `Backend.supports`."""
    return next(b for b in _BACKENDS if b.supports(model, decode, n_rows, n_steps))
