"""Which parameters of a decoder a tuning trains, whatever its architecture. No files here."""

import torch
from torch import nn
from transformers import PreTrainedModel

from hyperfitting.config import TuningConfig
from hyperfitting.errors import UserError


def blocks(model: PreTrainedModel) -> nn.ModuleList:
    """Return a decoder's transformer blocks, first to last.

    Raises:
        UserError: the architecture has no list of ``num_hidden_layers`` blocks.
    """
    depth = model.config.num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise UserError(
        f"no list of {depth} blocks found in {type(model).__name__}",
        field="tuning.method",
        value="late_stage",
        hint="tuning=full",
    )


def final_norm(model: PreTrainedModel) -> list[nn.Parameter]:
    """Return the parameters of the normalisation between the last block and the output layer.

    In every decoder of transformers it is a sibling of the list of blocks that has only vectors
    as parameters, and is not an embedding's. Architectures without one give an empty list.
    """
    stack = blocks(model)
    parent = next(m for m in model.modules() if any(c is stack for c in m.children()))
    return [
        parameter
        for name, child in parent.named_children()
        if child is not stack
        and "embed" not in name
        and all(p.dim() == 1 for p in child.parameters())
        for parameter in child.parameters()
    ]


def select_trainable(model: PreTrainedModel, tuning: TuningConfig) -> dict[str, nn.Parameter]:
    """Mark the parameters that a tuning trains, and return them by name.

    Raises:
        UserError: ``late_stage`` asks for more blocks than there are.
    """
    if tuning.method == "full":
        model.requires_grad_(True)
    else:
        stack = blocks(model)
        if tuning.last_blocks > len(stack):
            raise UserError(
                "the model has fewer blocks",
                field="tuning.last_blocks",
                value=tuning.last_blocks,
                valid=f"1 to {len(stack)}",
            )
        model.requires_grad_(False)
        for block in stack[len(stack) - tuning.last_blocks :]:
            block.requires_grad_(True)
        for parameter in final_norm(model):
            parameter.requires_grad_(True)
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def overlay(model: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> None:
    """Replace the named parameters of a model by trained ones."""
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        parameters[name].copy_(tensor)


def no_dropout(model: PreTrainedModel) -> None:
    """Set every dropout of a model to 0: the modules and the rates that attention reads."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "attn_dropout", "dropout", "dropout_p"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
