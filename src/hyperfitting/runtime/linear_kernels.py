"""float32 linear layers on a CPU, by the matmul library that is fastest on its processor.

torch uses MKL, which leaves a tenth of the speed unused on processors other than Intel's; oneDNN,
which also ships with torch, does not (docs/speed.md).
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
def matmul_library() -> str | None:
    """Return the faster library on this processor, `mkl` or `onednn`; None: this is no x86."""
    if not torch.backends.mkl.is_available():  # not x86, or a torch built without MKL
        return None
    cpuinfo = Path("/proc/cpuinfo")
    intel = not cpuinfo.is_file() or "GenuineIntel" in cpuinfo.read_text("utf-8")
    operations = torch.ops.mkl if intel else torch.ops.mkldnn
    if not hasattr(operations, "_mkl_linear" if intel else "_linear_pointwise"):
        return None
    return "mkl" if intel else "onednn"


# a custom operator is opaque to torch.compile, which keeps it as one call
@torch.library.custom_op("hyperfitting::onednn_linear", mutates_args=())
def _onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    output: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return output


@_onednn_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad
    grad_rows = grad.flatten(0, -2)  # (R, out)
    return (
        _onednn_linear(grad, weight.t(), None) if needs_x else None,
        grad_rows.t() @ x.flatten(0, -2) if needs_weight else None,
        grad_rows.sum(0) if needs_bias else None,
    )


_onednn_linear.register_autograd(_backward, setup_context=_setup_context)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute `torch.nn.functional.linear`.

    Args:
        x: (…, in).
        weight: (out, in).
        bias: (out,), or none.

    Returns:
        (…, out).
    """
    if x.device.type == "cpu" and x.dtype == torch.float32 and matmul_library() == "onednn":
        output: Tensor = _onednn_linear(x, weight, bias)
        return output
    return nn.functional.linear(x, weight, bias)


def linear_forwards(
    model: PreTrainedModel, precision: str
) -> dict[nn.Module, Callable[[Tensor], Tensor]]:
    """Return faster forward functions of a model's linear layers, for `override_forward`.

    Args:
        model: on its device.
        precision: of the computation, such as `float32`.

    Returns:
        Empty where torch's own are as fast.
    """
    float32_on_cpu = (
        model.device.type == "cpu" and model.dtype == torch.float32 and precision == "float32"
    )
    if not float32_on_cpu or matmul_library() != "onednn":
        return {}
    return {
        module: _forward_of(module)
        for module in model.modules()
        if type(module) in (nn.Linear, Conv1D)
    }


def _forward_of(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    transposed = isinstance(layer, Conv1D)  # GPT-2 stores weights as (in, out)

    def forward(x: Tensor) -> Tensor:
        weight: Any = layer.weight
        bias: Any = layer.bias
        output: Tensor = _onednn_linear(x, weight.t() if transposed else weight, bias)
        return output

    return forward
