"""Next-token loss over a large vocabulary, without ever holding all logits.

The logits of a batch are its largest tensor by far: 400 MB for 8 sequences of 256 tokens and
49,152 words, in four copies. Here logits, loss and gradient are computed for a chunk of positions
at a time, and only the gradient of the hidden states is kept.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hyperfitting.data.sequences import Mask
from hyperfitting.models.layers import input_tokens, override_forward
from hyperfitting.runtime.linear_kernels import linear
from hyperfitting.runtime.transfer import to_device
from hyperfitting.training.flops import CHUNK_BYTES


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of a linear output layer; gradients are computed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
    ) -> Tensor:
        device = states.device.type
        low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        matrix = weight.to(low) if low else weight  # (V, H)
        offset = None if bias is None else bias.to(matrix.dtype)  # (V,)
        needs_states, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_states = torch.empty_like(states) if needs_states else None
        # chunks are summed in float32, though weights may be all-gathered in bfloat16
        grad_weight = (
            torch.zeros_like(weight, dtype=torch.float32 if low else None) if needs_weight else None
        )
        grad_bias = torch.zeros_like(bias) if bias is not None and needs_bias else None
        total = torch.zeros((), device=states.device)
        chunk_rows = max(16, CHUNK_BYTES[device] // (4 * len(weight)))
        with torch.autocast(device, enabled=False):
            for start in range(0, len(states), chunk_rows):
                chunk = states[start : start + chunk_rows].to(matrix.dtype)  # (R, H)
                target = targets[start : start + chunk_rows].unsqueeze(1)  # (R, 1)
                logits = linear(chunk, matrix, offset)  # (R, V)
                log_p = torch.log_softmax(logits.float(), dim=-1)
                total -= log_p.gather(1, target).sum()
                # d loss / d logits = softmax - one-hot target
                grad = log_p.exp_().scatter_add_(1, target, log_p.new_full(target.shape, -1.0))
                grad = grad.to(matrix.dtype)
                if grad_states is not None:
                    grad_states[start : start + chunk_rows] = linear(grad, matrix.t())
                if grad_weight is not None and low is None:
                    grad_weight.addmm_(grad.t(), chunk)
                elif grad_weight is not None:
                    grad_weight += grad.t() @ chunk
                if grad_bias is not None:
                    grad_bias += grad.sum(0)
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        ctx.save_for_backward(grad_states, grad_weight, grad_bias)
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Any:
        return *(None if g is None else g.mul_(outer[0]) for g in ctx.saved_tensors), None


def chunked_cross_entropy(
    states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
) -> Tensor:
    """Return the summed next-token loss of a linear output layer, in nats.

    Args:
        states: (R, H) last hidden states.
        weight: (V, H) of the output layer.
        bias: (V,), or none.
        targets: (R,) ids of the next tokens.
    """
    # torch has no types for `apply`
    loss: Tensor = _ChunkedCrossEntropy.apply(states, weight, bias, targets)  # type: ignore[no-untyped-call]
    return loss


class NextTokenLoss:
    """The summed next-token loss of a model, with chunked logits where that is the same.

    During the forward pass the output layer returns the loss instead of logits. Architectures that
    scale or cap logits after that layer are detected by a forward pass of two tokens; their loss
    is computed from whole logits.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        layer = model.get_output_embeddings()
        is_chunkable = isinstance(layer, nn.Linear) and self._is_last_operation(layer)
        self._layer: nn.Linear | None = layer if is_chunkable else None

    def __call__(
        self, tokens: Tensor, n_valid: int | None = None, mask: Mask | None = None
    ) -> Tensor:
        """Return the loss, summed over all tokens but the first of each sequence.

        Args:
            tokens: (B, T) sequences.
            n_valid: the first so many sequences count, the others are padding; none: all count.
            mask: (B, T) the tokens that count, on the host; none: all do.
        """
        target_index: slice | Tensor = slice(None)  # on the host: summing a device mask would sync
        if mask is not None:
            target_index = to_device(np.flatnonzero(mask[:n_valid, 1:]), tokens.device)
        targets = tokens[:n_valid, 1:].flatten()[target_index]
        layer, n_targets = self._layer, tokens.shape[1] - 1
        inputs = input_tokens(self._model, tokens)
        if layer is None:
            logits = self._model(input_ids=inputs, use_cache=False).logits[:n_valid, :n_targets]
            return nn.functional.cross_entropy(
                logits.flatten(0, 1)[target_index].float(), targets, reduction="sum"
            )

        def loss(states: Tensor) -> Tensor:  # (B, T, H)
            rows = states[:n_valid, :n_targets].flatten(0, 1)[target_index]
            return chunked_cross_entropy(rows, layer.weight, layer.bias, targets)

        return self._forward_with_output_layer(layer, loss, inputs)

    def _forward_with_output_layer(
        self, layer: nn.Linear, output: Callable[[Tensor], Tensor], tokens: Tensor
    ) -> Tensor:
        """Return the model's `logits` with another forward of its output layer.

        The model is called as usual, so that hooks on it and on the layer run.
        """
        with override_forward({layer: output}):
            logits: Tensor = self._model(input_ids=tokens, use_cache=False).logits
        return logits

    @torch.no_grad()
    def _is_last_operation(self, layer: nn.Linear) -> bool:
        """Return whether the model returns this layer's output unchanged, logits or a loss."""
        tokens = torch.tensor([[0, 1]], device=self._model.device)
        outputs: list[Tensor] = []

        def recorded(states: Tensor) -> Tensor:
            outputs.append(nn.Linear.forward(layer, states))
            return outputs[-1]

        was_training = self._model.training
        self._model.eval()
        try:
            logits = self._forward_with_output_layer(layer, recorded, tokens)
            unchanged = len(outputs) == 1 and torch.equal(outputs[0], logits)
            return unchanged and (
                self._forward_with_output_layer(layer, Tensor.sum, tokens).dim() == 0
            )
        except (IndexError, RuntimeError):  # it indexes the logits
            return False
        finally:
            self._model.train(was_training)
