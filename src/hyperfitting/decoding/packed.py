"""Blocks made for a few rows at a time, as decoding on a CPU has them: weights packed, little else.

A step of 32 texts multiplies 32 rows by every weight of the model. The general product is made for
many rows; one whose weights are laid out once for this number of rows is much faster. Two libraries
that come with torch have it: MKL on Intel's processors, oneDNN on others, where MKL's gains nothing
(docs/speed.md).
In blocks of Llama's kind, products of one input become one, and what is left of the block is
written with as few operations as it needs: each costs more to call than to do. A decoding uses them
for hundreds of steps; they take as much memory as the model, while it lasts.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.pytorch_utils import Conv1D

from hyperfitting import memory
from hyperfitting.distributed import in_one_place
from hyperfitting.forwards import running
from hyperfitting.products import library

_ROWS = range(4, 97)
"""Outside, packing gains nothing."""
_STEPS = 24
"""Packing takes as long as it saves in as many steps."""
_LIKE_LLAMA = (LlamaDecoderLayer, MistralDecoderLayer, Qwen2DecoderLayer)


@contextmanager
def packed(model: PreTrainedModel, rows: int, steps: int) -> Iterator[None]:
    """Run a model with its weights packed for ``rows`` rows in this context, where it pays.

    Other numbers of rows, as of a context's tokens, pass as they always do.

    Args:
        model: in evaluation mode; its weights must not change meanwhile.
        rows: texts in a batch, each with one token a step.
        steps: how often they will pass.
    """
    forwards: dict[nn.Module, Callable[..., Any]] = {}
    if rows in _ROWS and steps >= _STEPS and _possible(model):
        within: set[nn.Module] = set()
        turn = _Turns()
        for module in model.modules():
            if type(module) in _LIKE_LLAMA and _is_plain(module):
                forwards[module] = _llama_block(module, rows, turn)
                within.update(module.modules())
            elif type(module) in (nn.Linear, Conv1D) and module not in within:
                forwards[module] = _linear(module, rows)
    with running(forwards):
        yield


def _possible(model: PreTrainedModel) -> bool:
    size = sum(p.numel() * p.itemsize for p in model.parameters())
    return (
        model.device.type == "cpu"
        and model.dtype == torch.float32
        and library() is not None
        and in_one_place(model)
        and size < memory.free(model.device) / 2
    )


class _Product:
    """The product of inputs (rows, in) with a weight (out, in) that is laid out for it."""

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int) -> None:
        self._bias, self._rows = bias, rows
        self._fuses = library() == "onednn"
        if self._fuses:
            self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        else:
            self._weight = torch.ops.mkl._mkl_reorder_linear_weight(weight, rows)
            self._shape = weight.new_zeros(1, 1).expand(weight.shape)  # all that is still read

    def __call__(self, given: Tensor) -> Tensor:
        """Return the outputs (rows, out)."""
        found: Tensor
        if self._fuses:
            found = self._with("none", given)
        else:
            found = torch.ops.mkl._mkl_linear(
                given, self._weight, self._shape, self._bias, self._rows
            )
        return found

    def swish(self, given: Tensor) -> Tensor:
        """Return the outputs times their own sigmoid."""
        return self._with("swish", given) if self._fuses else nn.functional.silu(self(given))

    def plus(self, given: Tensor, other: Tensor) -> Tensor:
        """Return the outputs plus ``other`` (rows, out)."""
        return self._by("add", given, other) if self._fuses else self(given).add_(other)

    def times(self, given: Tensor, other: Tensor) -> Tensor:
        """Return the outputs times ``other`` (rows, out)."""
        return self._by("mul", given, other) if self._fuses else self(given).mul_(other)

    def _with(self, function: str, given: Tensor) -> Tensor:
        found: Tensor = torch.ops.mkldnn._linear_pointwise(
            given, self._weight, self._bias, function, [], ""
        )
        return found

    def _by(self, operation: str, given: Tensor, other: Tensor) -> Tensor:
        found: Tensor = torch.ops.mkldnn._linear_pointwise.binary(
            given, other, self._weight, self._bias, operation
        )
        return found


def _is_plain(block: nn.Module) -> bool:
    """Return whether a block's linear layers are just that, and not adapters."""
    linear = [m for m in block.modules() if isinstance(m, nn.Linear)]
    return len(linear) == 7 and all(type(m) is nn.Linear for m in linear)


def _product(layers: Sequence[nn.Module], rows: int, scale: Tensor | None = None) -> _Product:
    """Return the product that gives the outputs of some layers side by side.

    Args:
        layers: of one input.
        rows: of the inputs.
        scale: (in,) what the input is to be multiplied by first.
    """
    weights, biases = [], []
    for layer in layers:
        weight = layer.get_parameter("weight").detach()
        weights.append(weight.t() if isinstance(layer, Conv1D) else weight)  # (out, in)
        there = layer.bias is not None
        biases.append(layer.get_parameter("bias") if there else weight.new_zeros(len(weights[-1])))
    whole = torch.cat(weights) if scale is None else torch.cat(weights) * scale.detach()
    bias = torch.cat(biases).detach() if any(layer.bias is not None for layer in layers) else None
    return _Product(whole, bias, rows)


def _linear(layer: nn.Module, rows: int) -> Callable[[Tensor], Tensor]:
    product, plain = _product([layer], rows), type(layer).forward

    def forward(given: Tensor) -> Tensor:
        few = given.numel() == rows * given.shape[-1]
        found: Tensor = product(given) if few else plain(layer, given)
        return found

    return forward


def _llama_block(block: Any, rows: int, turn: "_Turns") -> Callable[..., Tensor]:
    """Return what a block of Llama's kind does, for one new token of each text.

    The same function as transformers' own, which takes all other calls.
    """
    attention, mlp, plain = block.self_attn, block.mlp, type(block).forward
    before, between = block.input_layernorm, block.post_attention_layernorm
    project = _product([attention.q_proj, attention.k_proj, attention.v_proj], rows, before.weight)
    out, shrink = _product([attention.o_proj], rows), _product([mlp.down_proj], rows)
    gate = _product([mlp.gate_proj], rows, between.weight)
    up = _product([mlp.up_proj], rows, between.weight)
    gated = (
        gate.swish
        if isinstance(mlp.act_fn, nn.SiLU | SiLUActivation)
        else lambda x: mlp.act_fn(gate(x))
    )
    epsilon = before.variance_epsilon
    size = attention.head_dim
    groups = attention.num_key_value_groups
    kept = attention.k_proj.out_features // size  # heads of keys and values
    heads = kept * groups

    def forward(
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **more: Any,
    ) -> Tensor:
        if hidden_states.shape[:2] != (rows, 1) or attention_mask is not None:
            found: Tensor = plain(
                block,
                hidden_states,
                attention_mask=attention_mask,
                position_embeddings=position_embeddings,
                past_key_values=past_key_values,
                **more,
            )
            return found
        states = hidden_states.view(rows, -1)  # (B, H)
        every = project(_unit(states, epsilon)).view(rows, -1, size)
        turned = turn(every[:, : heads + kept], *position_embeddings)  # queries and keys
        keys, values = past_key_values.update(
            turned[:, heads:].unsqueeze(2),
            every[:, heads + kept :].unsqueeze(2),
            attention.layer_idx,
        )
        # plain products: for so few queries they are faster than fused attention
        queries = turned[:, :heads].view(rows, kept, groups, size)  # a group sees the same keys
        weights = (queries @ keys.mT).mul_(attention.scaling).softmax(-1)  # (B, kept, groups, L)
        seen = weights @ values
        states = out.plus(seen.reshape(rows, -1), states)
        unit = _unit(states, epsilon)
        states = shrink.plus(up.times(unit, gated(unit)), states)
        return states.view(rows, 1, -1)

    return forward


def _unit(states: Tensor, epsilon: float) -> Tensor:
    """Return states (B, H) over their root mean square; the norm's weights are in what follows."""
    return states * (states * states).mean(-1, keepdim=True).add_(epsilon).rsqrt_()


class _Turns:
    """The angles of a step's position, for all blocks: they are given the same tensors."""

    def __init__(self) -> None:
        self._of: Tensor | None = None
        self._cos = self._sin = torch.empty(0)

    def __call__(self, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return states (B, heads, D) turned by angles (1, 1, D)."""
        if self._of is not cos:
            self._of = cos
            self._cos = cos.view(2, -1)
            self._sin = sin.view(2, -1) * sin.new_tensor([[-1.0], [1.0]])
        halves = states.unflatten(-1, (2, -1))  # (B, heads, 2, D / 2)
        turned: Tensor = (halves * self._cos).addcmul_(halves.flip(2), self._sin)
        return turned.flatten(2)
