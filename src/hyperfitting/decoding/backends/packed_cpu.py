"""float32 decoding on a CPU with packed weights, and few operations per block.

A step of 32 texts multiplies 32 rows with every weight matrix. A general matmul is made for many
rows; one with weights laid out once for this number of rows is much faster. Two libraries that ship
with torch have it: MKL, fastest on Intel's processors, and oneDNN, fastest on others
(docs/speed.md).
In blocks of Llama's kind, linear layers with the same input are fused into one, and the rest of the
block is written with as few operations as possible: calling each costs more than its arithmetic.
The packed weights take as much memory as the model, until the context manager exits.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.pytorch_utils import Conv1D

from hyperfitting.decoding.backends.plain import PlainBackend
from hyperfitting.decoding.config import DecodeConfig
from hyperfitting.models.layers import override_forward
from hyperfitting.runtime import memory
from hyperfitting.runtime.distributed import is_on_one_device
from hyperfitting.runtime.linear_kernels import matmul_library

_ROWS = range(4, 97)
"""Numbers of rows for which packing is faster."""
_MIN_STEPS = 24
"""Packing takes as long as it saves in this number of steps."""
LLAMA_BLOCKS = (LlamaDecoderLayer, MistralDecoderLayer, Qwen2DecoderLayer)
"""Types of block that are replaced as a whole."""


class PackedCpuBackend(PlainBackend):
    """Any strategy, in float32 on a CPU that MKL or oneDNN has packed matmuls for."""

    def supports(
        self, model: PreTrainedModel, decode: DecodeConfig, n_rows: int, n_steps: int
    ) -> bool:
        """Return whether packing is possible, faster, and fits into half of the free memory."""
        return (
            n_rows in _ROWS
            and n_steps >= _MIN_STEPS
            and model.device.type == "cpu"
            and model.dtype == torch.float32
            and matmul_library() is not None
            and is_on_one_device(model)
            and _weight_bytes(model) < memory.free_bytes(model.device) / 2
        )

    def prepare(self, model: PreTrainedModel, n_rows: int) -> AbstractContextManager[None]:
        """Pack the weights for ``n_rows`` rows."""
        return packed_weights(model, n_rows)


def _weight_bytes(model: PreTrainedModel) -> int:
    return sum(p.numel() * p.itemsize for p in model.parameters())


@contextmanager
def packed_weights(model: PreTrainedModel, n_rows: int) -> Iterator[None]:
    """Run a model with packed weights in this context, for inputs of ``n_rows`` tokens.

    Inputs of other sizes, such as contexts, take the model's own forward pass.

    Args:
        model: in evaluation mode; its weights must not change in the context.
        n_rows: texts in a batch, each with one token a step.
    """
    forwards: dict[nn.Module, Callable[..., Any]] = {}
    inside_block: set[nn.Module] = set()
    rotary = _RotaryCache()
    for module in model.modules():
        if type(module) in LLAMA_BLOCKS and _has_plain_linear_layers(module):
            forwards[module] = _llama_block_forward(module, n_rows, rotary)
            inside_block.update(module.modules())
        elif type(module) in (nn.Linear, Conv1D) and module not in inside_block:
            forwards[module] = _linear_forward(module, n_rows)
    with override_forward(forwards):
        yield


class _PackedLinear:
    """A linear layer (out, in) packed for inputs (n_rows, in), with fused epilogues in oneDNN."""

    def __init__(self, weight: Tensor, bias: Tensor | None, n_rows: int) -> None:
        self._bias, self._n_rows = bias, n_rows
        self._is_onednn = matmul_library() == "onednn"
        if self._is_onednn:
            self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, n_rows)
        else:
            self._weight = torch.ops.mkl._mkl_reorder_linear_weight(weight, n_rows)
            self._shape = weight.new_zeros(1, 1).expand(weight.shape)  # only its shape is read

    def __call__(self, x: Tensor) -> Tensor:
        """Return the outputs (n_rows, out)."""
        if self._is_onednn:
            return self._unary("none", x)
        output: Tensor = torch.ops.mkl._mkl_linear(
            x, self._weight, self._shape, self._bias, self._n_rows
        )
        return output

    def silu(self, x: Tensor) -> Tensor:
        """Return silu(outputs)."""
        return self._unary("swish", x) if self._is_onednn else nn.functional.silu(self(x))

    def add(self, x: Tensor, other: Tensor) -> Tensor:
        """Return outputs + ``other`` (n_rows, out)."""
        return self._binary("add", x, other) if self._is_onednn else self(x).add_(other)

    def mul(self, x: Tensor, other: Tensor) -> Tensor:
        """Return outputs * ``other`` (n_rows, out)."""
        return self._binary("mul", x, other) if self._is_onednn else self(x).mul_(other)

    def _unary(self, epilogue: str, x: Tensor) -> Tensor:
        output: Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self._weight, self._bias, epilogue, [], ""
        )
        return output

    def _binary(self, epilogue: str, x: Tensor, other: Tensor) -> Tensor:
        output: Tensor = torch.ops.mkldnn._linear_pointwise.binary(
            x, other, self._weight, self._bias, epilogue
        )
        return output


def _has_plain_linear_layers(block: nn.Module) -> bool:
    """Return whether a block has the seven linear layers of Llama's, without adapters."""
    linear = [m for m in block.modules() if isinstance(m, nn.Linear)]
    return len(linear) == 7 and all(type(m) is nn.Linear for m in linear)


def _pack(
    layers: Sequence[nn.Module], n_rows: int, input_scale: Tensor | None = None
) -> _PackedLinear:
    """Fuse linear layers with the same input into one with concatenated outputs, packed.

    Args:
        layers: linear layers of one input.
        n_rows: of the input.
        input_scale: (in,) factors of the input, multiplied into the weights.
    """
    weights, biases = [], []
    for layer in layers:
        weight = layer.get_parameter("weight").detach()
        weights.append(weight.t() if isinstance(layer, Conv1D) else weight)  # (out, in)
        has_bias = layer.bias is not None
        biases.append(
            layer.get_parameter("bias") if has_bias else weight.new_zeros(len(weights[-1]))
        )
    fused = torch.cat(weights)
    if input_scale is not None:
        fused = fused * input_scale.detach()
    bias = torch.cat(biases).detach() if any(layer.bias is not None for layer in layers) else None
    return _PackedLinear(fused, bias, n_rows)


def _linear_forward(layer: nn.Module, n_rows: int) -> Callable[[Tensor], Tensor]:
    packed, plain_forward = _pack([layer], n_rows), type(layer).forward

    def forward(x: Tensor) -> Tensor:
        is_step = x.numel() == n_rows * x.shape[-1]
        output: Tensor = packed(x) if is_step else plain_forward(layer, x)
        return output

    return forward


def _llama_block_forward(block: Any, n_rows: int, rotary: "_RotaryCache") -> Callable[..., Tensor]:
    """Return the forward function of a Llama block for one new token per text.

    Same function as transformers' own, which handles all other inputs. The weights of the RMS norms
    are multiplied into those of the linear layers that follow.
    """
    attention, mlp, plain_forward = block.self_attn, block.mlp, type(block).forward
    input_norm, mlp_norm = block.input_layernorm, block.post_attention_layernorm
    qkv = _pack([attention.q_proj, attention.k_proj, attention.v_proj], n_rows, input_norm.weight)
    out, down = _pack([attention.o_proj], n_rows), _pack([mlp.down_proj], n_rows)
    gate = _pack([mlp.gate_proj], n_rows, mlp_norm.weight)
    up = _pack([mlp.up_proj], n_rows, mlp_norm.weight)
    activated_gate = (
        gate.silu
        if isinstance(mlp.act_fn, nn.SiLU | SiLUActivation)
        else lambda x: mlp.act_fn(gate(x))
    )
    epsilon = input_norm.variance_epsilon
    head_dim = attention.head_dim
    n_groups = attention.num_key_value_groups  # query heads per key-value head
    n_kv_heads = attention.k_proj.out_features // head_dim
    n_heads = n_kv_heads * n_groups

    def forward(
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        if hidden_states.shape[:2] != (n_rows, 1) or attention_mask is not None:
            output: Tensor = plain_forward(
                block,
                hidden_states,
                attention_mask=attention_mask,
                position_embeddings=position_embeddings,
                past_key_values=past_key_values,
                **kwargs,
            )
            return output
        x = hidden_states.view(n_rows, -1)  # (B, H)
        heads = qkv(_rms_normalize(x, epsilon)).view(n_rows, -1, head_dim)
        rotated = rotary(heads[:, : n_heads + n_kv_heads], *position_embeddings)  # queries, keys
        keys, values = past_key_values.update(
            rotated[:, n_heads:].unsqueeze(2),
            heads[:, n_heads + n_kv_heads :].unsqueeze(2),
            attention.layer_idx,
        )  # (B, n_kv_heads, L, D)
        # plain matmuls: for so few queries they are faster than fused attention
        queries = rotated[:, :n_heads].view(n_rows, n_kv_heads, n_groups, head_dim)
        weights = (queries @ keys.mT).mul_(attention.scaling).softmax(-1)  # (B, kv, groups, L)
        attended = weights @ values  # (B, n_kv_heads, n_groups, D)
        x = out.add(attended.reshape(n_rows, -1), x)
        normalized = _rms_normalize(x, epsilon)
        x = down.add(up.mul(normalized, activated_gate(normalized)), x)
        return x.view(n_rows, 1, -1)

    return forward


def _rms_normalize(x: Tensor, epsilon: float) -> Tensor:
    """Divide x (B, H) by its root mean square; the norm's weights are in the next linear layer."""
    return x * (x * x).mean(-1, keepdim=True).add_(epsilon).rsqrt_()


class _RotaryCache:
    """Rotary embedding; cos and sin of a step are prepared once for all blocks."""

    def __init__(self) -> None:
        self._cos_input: Tensor | None = None
        self._cos = self._sin = torch.empty(0)

    def __call__(self, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate states (B, n_heads, D) by cos and sin (1, 1, D), the same tensors for all."""
        if self._cos_input is not cos:
            self._cos_input = cos
            self._cos = cos.view(2, -1)
            self._sin = sin.view(2, -1) * sin.new_tensor([[-1.0], [1.0]])
        halves = states.unflatten(-1, (2, -1))  # (B, n_heads, 2, D / 2)
        rotated: Tensor = (halves * self._cos).addcmul_(halves.flip(2), self._sin)
        return rotated.flatten(2)
