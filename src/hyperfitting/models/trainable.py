"""Which parameters of a decoder a tuning trains, for any architecture; LoRA, dropout, autocast."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from hyperfitting.errors import UserError
from hyperfitting.models.config import TuningConfig
from hyperfitting.models.layers import blocks, final_norm

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def select_trainable(
    model: PreTrainedModel, tuning: TuningConfig, seed: int = 0
) -> dict[str, nn.Parameter]:
    """Mark the parameters that a tuning trains, and return them by name.

    Args:
        model: changed in place; a ``lora`` tuning adds adapters to it.
        tuning: what to train.
        seed: of the adapters' initialization.

    Raises:
        UserError: `last_blocks` exceeds the number of blocks.
    """
    if tuning.method == "full":
        model.requires_grad_(True)
        return dict(model.named_parameters())
    all_blocks = list(blocks(model))
    if tuning.last_blocks > len(all_blocks) and tuning.is_late:
        raise UserError(
            "the model has fewer blocks",
            field="tuning.last_blocks",
            value=tuning.last_blocks,
            valid=f"1 to {len(all_blocks)}",
        )
    trained_blocks = all_blocks[-tuning.last_blocks :] if tuning.is_late else all_blocks
    model.requires_grad_(False)
    if tuning.is_lora:
        _add_adapters(model, trained_blocks, tuning, seed)
    else:
        for block in trained_blocks:
            block.requires_grad_(True)
        for parameter in final_norm(model):
            parameter.requires_grad_(True)
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _add_adapters(
    model: PreTrainedModel, adapted_blocks: list[nn.Module], tuning: TuningConfig, seed: int
) -> None:
    """Add a trainable LoRA adapter in float32 to every linear layer of these blocks.

    In float32 whatever the model's dtype, as by `peft.get_peft_model`: in bfloat16, updates far
    below the spacing of an adapter's values would be lost. The layer's input is cast to float32 for
    the adapter, and the sum of their outputs to the layer's dtype.

    Of a state-space mixer, only to its first: its kernels read the others' weights directly, past
    an adapter.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from transformers.pytorch_utils import Conv1D

    block_modules = {module for block in adapted_blocks for module in block.modules()}
    for mixer in [m for m in block_modules if hasattr(m, "A_log") and hasattr(m, "in_proj")]:
        block_modules.difference_update(c for c in mixer.children() if c is not mixer.in_proj)
    linear_layers = {
        name: module
        for name, module in model.named_modules()
        if module in block_modules and isinstance(module, nn.Linear | Conv1D)
    }
    config = LoraConfig(
        r=tuning.lora_rank,
        lora_alpha=tuning.lora_alpha,
        lora_dropout=tuning.lora_dropout,
        target_modules=list(linear_layers),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in linear_layers.values()),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)
    for parameter in model.parameters():
        if parameter.requires_grad:  # an adapter's; peft gives it the dtype of its layer
            parameter.data = parameter.data.float()


def merge_adapters(model: PreTrainedModel) -> None:
    """Merge the LoRA adapters into the weights that they adapt, and remove them.

    Their product is computed in float32, and its sum with a weight is rounded once, to the weight's
    dtype: changes below half the spacing (in bfloat16 2^-9 to 2^-8 of the weight) are lost.
    """
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())


def autocast(model: PreTrainedModel, precision: str) -> torch.autocast:
    """Return the autocast context of a precision; for `float32` and `tf32` it does nothing."""
    return torch.autocast(
        model.device.type,
        dtype=torch.float16 if precision == "float16" else torch.bfloat16,
        enabled=precision in ("bfloat16", "float16"),
    )


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Recompute each block in the backward pass, and save only its input."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable()
    else:  # its name until transformers 5.17
        model.gradient_checkpointing_enable()


@torch.no_grad()
def overlay(model: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> None:
    """Copy trained tensors over the parameters of the same names."""
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        parameters[name].copy_(tensor)


def disable_dropout(model: PreTrainedModel) -> None:
    """Set every dropout rate to 0: of dropout modules, and those that attention layers hold."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "attn_dropout", "dropout", "dropout_p"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
