"""Linear layers with their weights packed for a few rows, as decoding on a CPU has them.

A step of 32 texts multiplies 32 rows by every weight of the model. The general product is made for
many rows; with the weights laid out once for this number of rows it is half as fast again. A
decoding uses them for hundreds of steps; they take as much memory as the model, while it lasts.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hyperfitting import memory

_ROWS = range(4, 97)
"""Outside, packing gains nothing."""
_STEPS = 24
"""Packing takes as long as it saves in as many steps."""


@contextmanager
def packed(model: PreTrainedModel, rows: int, steps: int) -> Iterator[None]:
    """Run the linear layers of a model packed for ``rows`` rows in this context, where it pays.

    Other numbers of rows, as of a context's tokens, pass as they always do.

    Args:
        model: in evaluation mode; its weights must not change meanwhile.
        rows: rows of the inputs, all dimensions but the last.
        steps: how often they will pass.
    """
    layers = _layers(model) if rows in _ROWS and steps >= _STEPS and _possible(model) else []
    for layer in layers:
        layer.forward = _forward(layer, rows)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _possible(model: PreTrainedModel) -> bool:
    size = sum(p.numel() * p.itemsize for p in model.parameters())
    return (
        model.device.type == "cpu"
        and model.dtype == torch.float32
        and hasattr(torch.ops.mkl, "_mkl_linear")
        and torch.backends.mkl.is_available()
        and size < memory.free(model.device) / 2
    )


def _layers(model: PreTrainedModel) -> list[nn.Module]:
    return [module for module in model.modules() if type(module) in (nn.Linear, Conv1D)]


def _forward(layer: nn.Module, rows: int) -> Callable[[Tensor], Tensor]:
    """Return what the layer does, done with packed weights where the rows are as many."""
    own, bias, plain = layer.get_parameter("weight").detach(), layer.bias, type(layer).forward
    weight = own.t().contiguous() if isinstance(layer, Conv1D) else own  # (out, in)
    laid_out = torch.ops.mkl._mkl_reorder_linear_weight(weight, rows)

    def forward(given: Tensor) -> Tensor:
        few = given.numel() == rows * given.shape[-1]
        found: Tensor = (
            torch.ops.mkl._mkl_linear(given, laid_out, weight, bias, rows)
            if few
            else plain(layer, given)
        )
        return found

    return forward
