"""Matrix products in float32 on a CPU, by the library that is fastest on its processor.

torch takes MKL's, which on processors other than Intel's leaves a tenth of the speed unused;
oneDNN, which also comes with torch, does not (docs/speed.md).
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


@cache
def library() -> str | None:
    """Return whose products suit this processor: `mkl` or `onednn`; none: it is no x86."""
    if not torch.backends.mkl.is_available():  # not an x86 processor, or a torch of another kind
        return None
    cpuinfo = Path("/proc/cpuinfo")
    intel = not cpuinfo.is_file() or "GenuineIntel" in cpuinfo.read_text("utf-8")
    operations = torch.ops.mkl if intel else torch.ops.mkldnn
    if not hasattr(operations, "_mkl_linear" if intel else "_linear_pointwise"):
        return None
    return "mkl" if intel else "onednn"


# an operation of its own: torch's compiler takes it as it is
@torch.library.custom_op("hyperfitting::onednn_linear", mutates_args=())
def _onednn(given: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    made: Tensor = torch.ops.mkldnn._linear_pointwise(given, weight, bias, "none", [], "")
    return made


@_onednn.register_fake
def _(given: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return given.new_empty(*given.shape[:-1], len(weight))


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    given, weight, _ = inputs
    ctx.save_for_backward(given if ctx.needs_input_grad[1] else None, weight)


def _gradients(ctx: Any, slope: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    given, weight = ctx.saved_tensors
    for_given, for_weight, for_bias = ctx.needs_input_grad
    rows = slope.flatten(0, -2)  # (R, out)
    return (
        _onednn(slope, weight.t(), None) if for_given else None,
        rows.t() @ given.flatten(0, -2) if for_weight else None,
        rows.sum(0) if for_bias else None,
    )


_onednn.register_autograd(_gradients, setup_context=_keep)


def linear(given: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return what `torch.nn.functional.linear` does.

    Args:
        given: (…, in).
        weight: (out, in).
        bias: (out,), or none.
    """
    if given.device.type == "cpu" and given.dtype == torch.float32 and library() == "onednn":
        made: Tensor = _onednn(given, weight, bias)
        return made
    return nn.functional.linear(given, weight, bias)


def of(model: PreTrainedModel, precision: str) -> dict[nn.Module, Callable[[Tensor], Tensor]]:
    """Return how the linear layers of a model are computed here; empty: as torch does."""
    plain = model.device.type != "cpu" or model.dtype != torch.float32 or precision != "float32"
    if plain or library() != "onednn":
        return {}
    return {
        module: _forward(module)
        for module in model.modules()
        if type(module) in (nn.Linear, Conv1D)
    }


def _forward(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    turned = isinstance(layer, Conv1D)

    def forward(given: Tensor) -> Tensor:
        weight: Any = layer.weight
        bias: Any = layer.bias
        made: Tensor = _onednn(given, weight.t() if turned else weight, bias)
        return made

    return forward
