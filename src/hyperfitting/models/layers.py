"""Access to the layers of any decoder of transformers, and replacing what they compute."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from hyperfitting.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def blocks(model: PreTrainedModel) -> nn.ModuleList:
    """Return a decoder's transformer blocks, first to last.

    Raises:
        UserError: the architecture has no list of ``num_hidden_layers`` blocks.
    """
    module_list = find_blocks(model)
    if module_list is None:
        raise UserError(
            f"no list of {model.config.num_hidden_layers} blocks found in {type(model).__name__}",
            field="tuning.method",
            value="late_stage",
            hint="tuning=full",
        )
    return module_list


def find_blocks(model: PreTrainedModel) -> nn.ModuleList | None:
    """Return a decoder's transformer blocks, first to last, or None if it has no list of them."""
    n_blocks = model.config.num_hidden_layers
    lists = (m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == n_blocks)
    return next(lists, None)


def final_norm(model: PreTrainedModel) -> list[nn.Parameter]:
    """Return the parameters of the normalization between the last block and the output layer.

    In every decoder of transformers it is a sibling of the list of blocks that has only vectors
    as parameters, and is not an embedding's. Architectures without one give an empty list.
    """
    block_list = blocks(model)
    parent = next(m for m in model.modules() if any(c is block_list for c in m.children()))
    return [
        parameter
        for name, child in parent.named_children()
        if child is not block_list
        and "embed" not in name
        and all(p.dim() == 1 for p in child.parameters())
        for parameter in child.parameters()
    ]


def cache_argument(model: PreTrainedModel) -> str:
    """Return what a decoder calls its cache, as an argument and in its output."""
    is_state_space = "cache_params" in inspect.signature(model.forward).parameters
    return "cache_params" if is_state_space else "past_key_values"


Tokens = TypeVar("Tokens", Tensor, NDArray[np.int32])


def input_tokens(model: PreTrainedModel, tokens: Tokens) -> Tokens:
    """Return the input ids for the next-token loss of sequences (B, T).

    All of them, as most callers want the hidden states of all; (B, T - 1) without the last where
    the model has one position fewer, as with SOS and the pixels of an image.
    """
    n_positions = getattr(model.config, "max_position_embeddings", None)
    return tokens[:, :-1] if tokens.shape[1] - 1 == n_positions else tokens


@contextmanager
def override_forward(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Replace the forward of each module by the given function, inside this context.

    Contexts can be nested, also for the same module.
    """
    outer = {module: vars(module).get("forward") for module in forwards}
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module, forward_before in outer.items():
            del module.forward
            if forward_before is not None:
                module.forward = forward_before


@contextmanager
def no_packed_sequences() -> Iterator[None]:
    """Declare that each row holds one sequence, inside this context.

    Without a mask or a cache, transformers looks for several in a row in every forward pass, and
    reads the answer from the device.
    """
    from transformers import masking_utils  # not at every import: that takes seconds

    name = "find_packed_sequence_indices"
    search = getattr(masking_utils, name, None)
    if search is None:
        yield
        return
    setattr(masking_utils, name, lambda position_ids: None)
    try:
        yield
    finally:
        setattr(masking_utils, name, search)


class PassthroughBlock(nn.Module):
    """Takes the place of a block without computing anything.

    Args:
        block: the block; its attributes stay readable, its parameters are not registered.
        output: returned by forward, (B, T, H); None: forward returns its input.
    """

    def __init__(self, block: nn.Module, output: Tensor | None) -> None:
        super().__init__()
        self.__dict__["_block"] = block  # bypasses registration as a submodule
        self._output = output

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_block"], name)

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        """Return the output, (B, T, H)."""
        return hidden_states if self._output is None else self._output


@contextmanager
def replace_blocks(
    block_list: nn.ModuleList, indices: range, output: Tensor | None
) -> Iterator[None]:
    """Skip the computation of some blocks, inside this context.

    Args:
        block_list: the model's blocks, as `blocks` returns them.
        indices: which of them to replace by a `PassthroughBlock`.
        output: what each of them returns, (B, T, H); None: its input.
    """
    replaced = [block_list[i] for i in indices]
    for i, block in zip(indices, replaced, strict=True):
        block_list[i] = PassthroughBlock(block, output)
    try:
        yield
    finally:
        for i, block in zip(indices, replaced, strict=True):
            block_list[i] = block
