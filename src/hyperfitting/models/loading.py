"""Loading weights: the base model, whole or sharded, and a tuned model as an overlay on it.

No remote code is run, and no pickle is read except through torch's weights-only loader.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel

from hyperfitting.errors import UserError, is_out_of_memory
from hyperfitting.models import layers, trainable
from hyperfitting.models.base import BaseModel, load_config
from hyperfitting.models.config import TuningConfig
from hyperfitting.runtime.distributed import SINGLE_PROCESS, DistContext
from hyperfitting.store import Artifact


@dataclass(frozen=True)
class ModelState:
    """Weights to evaluate: the base model's, or those of a tuned model."""

    base: BaseModel
    tuning: TuningConfig | None = None
    """How it was tuned."""
    weights: Artifact | None = None
    """Holds the trained parameters; none: the base model."""
    file: str = ""
    """Name of the safetensors file in ``weights``, such as `last.safetensors`."""

    def __post_init__(self) -> None:
        if (self.tuning is None) != (self.weights is None) or bool(self.file) != self.is_tuned:
            raise ValueError("a tuned model needs tuning, weights and file; the base model none")

    @property
    def id(self) -> str:
        """Determines the loaded weights."""
        return f"{self.weights.id}/{Path(self.file).stem}" if self.weights else self.base.id

    @property
    def is_tuned(self) -> bool:
        """Whether it is a tuned model."""
        return self.weights is not None

    def load(self, device: torch.device, device_map: str | None = None) -> PreTrainedModel:
        """Return the model in evaluation mode, LoRA adapters merged.

        Args:
            device: where to put it.
            device_map: `auto` to distribute its blocks over all GPUs instead.

        Raises:
            DamagedArtifactError: the weights are damaged or not built.
            UserError: the base model cannot be read.
        """
        model = load(self.base, device_map=device_map)
        if self.weights is not None and self.tuning is not None:
            if self.tuning.is_lora:
                trainable.select_trainable(model, self.tuning)
            trainable.overlay(model, load_file(self.weights.file(self.file)))
            if self.tuning.is_lora:
                trainable.merge_adapters(model)
        return (model if device_map else model.to(device)).eval()


def load(
    base: BaseModel, dist: DistContext = SINGLE_PROCESS, device_map: str | None = None
) -> PreTrainedModel:
    """Return the base model on the CPU, in its config's dtype.

    Args:
        base: the model; its folder must exist (`BaseModel.ensure`).
        dist: with several processes, each gets its FSDP shards on its device, and never holds more.
        device_map: `auto` to distribute the blocks over all GPUs.

    Raises:
        UserError: the weights cannot be read, or it is not a decoder-only model.
    """
    folder = base.folder()
    config = load_config(folder)
    _check_decoder_only(config, folder)
    placement: dict[str, Any] = {}
    if dist.world_size > 1:
        placement = {"distributed_config": _fsdp_config(config, dist)}
    elif device_map:
        _check_accelerate(device_map)
        placement = {"device_map": device_map}
    try:
        model: PreTrainedModel = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, base.dtype), local_files_only=True, **placement
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        raise UserError(
            f"its weights cannot be read: {str(error).splitlines()[0]}",
            field="model.path",
            value=folder,
            hint="save it again with save_pretrained(DIR)",
        ) from error
    if any(parameter.is_meta for parameter in model.parameters()):
        raise torch.OutOfMemoryError("the model does not fit on all devices together")
    return model


def _check_decoder_only(config: Any, folder: Path) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if config.is_encoder_decoder or config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(
            f"is a {config.model_type} model, which does not predict the next token",
            field="model.path",
            value=folder,
            valid="a decoder-only (causal) language model",
        )


def _check_accelerate(device_map: str) -> None:
    if importlib.util.find_spec("accelerate") is None:
        raise UserError(
            "needs the package accelerate, which is not installed",
            field="hardware.device_map",
            value=device_map,
            hint="pip install 'hyperfitting[embedded]'",
        )


def _fsdp_config(config: Any, dist: DistContext) -> Any:
    """Return the FSDP plan: each block's weights are all-gathered when it runs, then freed."""
    from transformers.distributed import DistributedConfig

    with torch.device("meta"):
        empty = transformers.AutoModelForCausalLM.from_config(config)
    blocks = layers.find_blocks(empty)
    names = [name for name, module in empty.named_modules() if module is blocks]
    return DistributedConfig(
        fsdp_size=dist.world_size, fsdp_plan={f"{name}.*": "free_full_weight" for name in names}
    )
