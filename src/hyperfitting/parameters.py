"""Which parameters of a decoder a tuning trains, whatever its architecture. No files here."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from hyperfitting.config import TuningConfig
from hyperfitting.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def blocks(model: PreTrainedModel) -> nn.ModuleList:
    """Return a decoder's transformer blocks, first to last.

    Raises:
        UserError: the architecture has no list of ``num_hidden_layers`` blocks.
    """
    found = find_blocks(model)
    if found is not None:
        return found
    raise UserError(
        f"no list of {model.config.num_hidden_layers} blocks found in {type(model).__name__}",
        field="tuning.method",
        value="late_stage",
        hint="tuning=full",
    )


def find_blocks(model: PreTrainedModel) -> nn.ModuleList | None:
    """Return a decoder's transformer blocks, first to last, if it has a list of them."""
    depth = model.config.num_hidden_layers
    lists = (m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth)
    return next(lists, None)


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


def select_trainable(
    model: PreTrainedModel, tuning: TuningConfig, seed: int = 0
) -> dict[str, nn.Parameter]:
    """Mark the parameters that a tuning trains, and return them by name.

    Args:
        model: changed in place; a ``lora`` tuning adds adapters to it.
        tuning: what to train.
        seed: of the adapters' first values.

    Raises:
        UserError: more blocks are asked for than there are.
    """
    if tuning.method == "full":
        model.requires_grad_(True)
        return dict(model.named_parameters())
    stack = blocks(model)
    if tuning.last_blocks > len(stack) and tuning.is_late:
        raise UserError(
            "the model has fewer blocks",
            field="tuning.last_blocks",
            value=tuning.last_blocks,
            valid=f"1 to {len(stack)}",
        )
    chosen = list(stack)[-tuning.last_blocks :] if tuning.is_late else list(stack)
    model.requires_grad_(False)
    if tuning.is_lora:
        _add_adapters(model, chosen, tuning, seed)
    else:
        for block in chosen:
            block.requires_grad_(True)
        for parameter in final_norm(model):
            parameter.requires_grad_(True)
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _add_adapters(
    model: PreTrainedModel, chosen: list[nn.Module], tuning: TuningConfig, seed: int
) -> None:
    """Put an adapter on every linear layer of these blocks; only they are trained."""
    from peft import LoraConfig, inject_adapter_in_model
    from transformers.pytorch_utils import Conv1D

    inside = {module for block in chosen for module in block.modules()}
    linear = {
        name: module
        for name, module in model.named_modules()
        if module in inside and isinstance(module, nn.Linear | Conv1D)
    }
    config = LoraConfig(
        r=tuning.lora_rank,
        lora_alpha=tuning.lora_alpha,
        lora_dropout=tuning.lora_dropout,
        target_modules=list(linear),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in linear.values()),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)


def merge_adapters(model: PreTrainedModel) -> None:
    """Add the adapters of a model to its own parameters, and take them away."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())


def autocast(model: PreTrainedModel, precision: str) -> torch.autocast:
    """Return the context in which a model computes in a precision: autocast, or nothing."""
    return torch.autocast(
        model.device.type,
        dtype=torch.float16 if precision == "float16" else torch.bfloat16,
        enabled=precision != "float32",
    )


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
