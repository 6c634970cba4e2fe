"""Next-token loss over a large vocabulary, without ever holding all logits.

The logits of a batch are its largest tensor by far: 400 MB for 8 sequences of 256 tokens and
49,152 words, in four copies. Here a few positions at a time get their logits, loss and gradient at
once, and what is kept is the gradient of the hidden states.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hyperfitting.costs import CHUNK_BYTES
from hyperfitting.forwards import running
from hyperfitting.products import linear


class _SumOfLosses(torch.autograd.Function):
    """Summed cross-entropy of a linear output layer; gradients are found on the way forward."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
    ) -> Tensor:
        device = states.device.type
        low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        matrix = weight.to(low) if low else weight  # (V, H)
        # one gradient for each of states, weight and bias, where it is needed
        to_states = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        to_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        to_bias = torch.zeros_like(bias) if bias is not None and ctx.needs_input_grad[2] else None
        total = torch.zeros((), device=states.device)
        rows = max(16, CHUNK_BYTES.get(device, 2**26) // (4 * len(weight)))
        with torch.autocast(device, enabled=False):
            for start in range(0, len(states), rows):
                part = states[start : start + rows].to(matrix.dtype)  # (R, H)
                target = targets[start : start + rows].unsqueeze(1)  # (R, 1)
                logits = linear(part, matrix, bias)  # (R, V)
                log_p = torch.log_softmax(logits.float(), dim=-1)
                total -= log_p.gather(1, target).sum()
                slope = log_p.exp_().scatter_add_(1, target, log_p.new_full(target.shape, -1.0))
                slope = slope.to(matrix.dtype)
                if to_states is not None:
                    to_states[start : start + rows] = linear(slope, matrix.t())
                if to_weight is not None and low is None:
                    to_weight.addmm_(slope.t(), part)
                elif to_weight is not None:
                    to_weight += slope.t() @ part
                if to_bias is not None:
                    to_bias += slope.sum(0)
        ctx.save_for_backward(to_states, to_weight, to_bias)
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Any:
        return *(None if g is None else g.mul_(outer[0]) for g in ctx.saved_tensors), None


def summed_loss(states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Return the summed next-token loss of a linear output layer, in nats.

    Args:
        states: (R, H) last hidden states.
        weight: (V, H) of the output layer.
        bias: (V,), or none.
        targets: (R,) the tokens that came next.
    """
    # (torch gives no types for what it makes of `forward`)
    loss: Tensor = _SumOfLosses.apply(states, weight, bias, targets)  # type: ignore[no-untyped-call]
    return loss


class NextTokenLoss:
    """The summed next-token loss of a model, with its logits in chunks where that is the same.

    The output layer then returns the loss in the place of logits. Some architectures scale or cap
    their logits behind that layer. Whether this one does is tried out on two tokens; if so, the
    loss is taken of the whole logits.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        layer = model.get_output_embeddings()
        self._layer = layer if isinstance(layer, nn.Linear) and self._is_last(layer) else None

    def __call__(self, tokens: Tensor, counted: int | None = None) -> Tensor:
        """Return the loss of sequences, summed over all tokens but the first of each.

        Args:
            tokens: (B, T) sequences.
            counted: only so many of them, the first, have a loss; none: all.
        """
        targets = tokens[:counted, 1:].flatten()
        layer = self._layer
        if layer is None:
            logits = self._model(input_ids=tokens, use_cache=False).logits[:counted, :-1]
            return nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), targets, reduction="sum"
            )

        def loss(states: Tensor) -> Tensor:  # (B, T, H)
            rows = states[:counted, :-1].flatten(0, 1)
            return summed_loss(rows, layer.weight, layer.bias, targets)

        return self._with(layer, loss, tokens)

    def _with(self, layer: nn.Linear, output: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
        """Return what the model returns for logits, with an output layer that does something else.

        (Called as it always is, so that what is hooked to model and layer happens.)
        """
        with running({layer: output}):
            made: Tensor = self._model(input_ids=tokens, use_cache=False).logits
        return made

    @torch.no_grad()
    def _is_last(self, layer: nn.Linear) -> bool:
        """Return whether the model returns what this layer does, be it logits or a loss."""
        tokens = torch.tensor([[0, 1]], device=self._model.device)
        made: list[Tensor] = []

        def kept(states: Tensor) -> Tensor:
            made.append(nn.Linear.forward(layer, states))
            return made[-1]

        was_training = self._model.training
        self._model.eval()
        try:
            whole = self._with(layer, kept, tokens)
            is_last = len(made) == 1 and torch.equal(made[0], whole)
            return is_last and self._with(layer, Tensor.sum, tokens).dim() == 0
        except (IndexError, RuntimeError):  # it takes the logits apart
            return False
        finally:
            self._model.train(was_training)
