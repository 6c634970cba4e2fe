"""Hidden states at every layer of a decoder: read by hooks, before and after the final norm.

transformers' `hidden_states[-1]` is the state after the final norm, not the output of the last
block: here both are given.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hyperfitting.models import layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EMBEDDING, FINAL_NORM = "embedding", "final norm"


def layer_names(n_blocks: int) -> list[str]:
    """Return the names of the layers of `layer_states`: `embedding`, `block 1`, …, `final norm`."""
    return [EMBEDDING, *(f"block {i}" for i in range(1, n_blocks + 1)), FINAL_NORM]


@torch.inference_mode()
def layer_states(model: PreTrainedModel, input_ids: Tensor) -> list[Tensor]:
    """Return the states that enter the first block, leave each block, and leave the final norm.

    The output layer is not computed.

    Args:
        model: a decoder in evaluation mode.
        input_ids: (B, T).

    Returns:
        n_blocks + 2 tensors (B, T, H), in the order of `layer_names`.
    """
    with recorded_states(layers.blocks(model)) as states:
        output = model.base_model(input_ids=input_ids, use_cache=False)
    return [*states, output.last_hidden_state]


@contextmanager
def recorded_states(blocks: nn.ModuleList) -> Iterator[list[Tensor]]:
    """Record what enters the first block and leaves each block, inside this context.

    Args:
        blocks: a decoder's, as `layers.blocks` returns them.

    Yields:
        A list that a forward pass extends by n_blocks + 1 tensors (B, T, H).
    """
    states: list[Tensor] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states.append(args[0] if args else kwargs["hidden_states"])

    def after(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        states.append(hidden_states_of(output))

    handles = [blocks[0].register_forward_pre_hook(before, with_kwargs=True)]
    handles += [block.register_forward_hook(after) for block in blocks]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


def hidden_states_of(output: Any) -> Tensor:
    """Return the hidden states (B, T, H) in a block's output; some blocks return a tuple."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden
