"""Loading weights: the base model, whole or sharded, and a tuned model as an overlay on it.

No remote code is run, and no pickle is read except through torch's weights-only loader. Weights
that do not fit the config, or are not finite, are refused.
"""

import importlib.util
import re
from dataclasses import dataclass, fields
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import is_accelerate_available

from hyperfitting.errors import UserError, exhausted_resource
from hyperfitting.formatting import first_line, listed
from hyperfitting.models import attention, layers, trainable
from hyperfitting.models.base import IMAGE_MODEL_TYPE, BaseModel
from hyperfitting.models.causality import check_causal
from hyperfitting.models.config import TuningConfig
from hyperfitting.models.folder import load_config
from hyperfitting.models.logit_transform import LogitTransform
from hyperfitting.runtime.distributed import SINGLE_PROCESS, DistContext, local_tensor
from hyperfitting.store.artifact import Artifact

_CPU = torch.device("cpu")
_CAUSAL_MASK = re.compile(r"\.attn\.(masked_)?bias$")
"""Masks that older versions of transformers saved with the weights, as on ImageGPT's Hub pages."""


@dataclass(frozen=True)
class ModelState:
    """Weights to evaluate: the base model's, or those of a tuned model; and a change of logits."""

    base: BaseModel
    tuning: TuningConfig | None = None
    """How it was tuned."""
    weights: Artifact | None = None
    """Holds the trained parameters; none: the base model."""
    file: str = ""
    """Name of the safetensors file in ``weights``, such as `last.safetensors`."""
    logit_transform: Artifact | None = None
    """Holds a `LogitTransform` of the model's output; none: its logits are as they are."""

    def __post_init__(self) -> None:
        has_weights = self.weights is not None
        if (self.tuning is not None) != has_weights or bool(self.file) != has_weights:
            raise ValueError("a tuned model needs tuning, weights and file; the base model none")

    @property
    def id(self) -> str:
        """Determines the loaded weights, and their change of logits."""
        weights = f"{self.weights.id}/{Path(self.file).stem}" if self.weights else self.base.id
        return f"{weights}+{self.logit_transform.id}" if self.logit_transform else weights

    @property
    def artifacts(self) -> list[Artifact]:
        """What it reads besides the base model."""
        return [a for a in (self.weights, self.logit_transform) if a is not None]

    @property
    def is_base(self) -> bool:
        """Whether it is the base model as it is."""
        return self.weights is None and self.logit_transform is None

    def load(self, device: torch.device, device_map: str | None = None) -> PreTrainedModel:
        """Return the model in evaluation mode, LoRA adapters merged.

        Args:
            device: where to put it.
            device_map: `auto` to distribute its blocks over all GPUs instead.

        Raises:
            DamagedArtifactError: the weights are damaged or not built.
            UserError: the base model cannot be read, or is no causal decoder.
        """
        model = load(self.base, device=device, device_map=device_map)
        if self.weights is not None and self.tuning is not None:
            if self.tuning.is_lora:
                trainable.select_trainable(model, self.tuning)
            # the file is mapped into memory: tensors go to the model's device one at a time
            trainable.overlay(model, load_file(self.weights.file(self.file)))
            if self.tuning.is_lora:
                trainable.merge_adapters(model)
        model.eval()
        check_causal(model, self.base.name)
        if self.logit_transform is not None:
            LogitTransform.read(self.logit_transform).attach(model)
        return model

    def parameters(self, base: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the parameters by name, on the CPU, LoRA adapters merged.

        Without adapters no second model is in memory: those that were trained are mapped from the
        file.

        Args:
            base: those of the base model.

        Raises:
            DamagedArtifactError: the weights are damaged or not built.
        """
        if self.weights is None or self.tuning is None:
            return base
        if self.tuning.is_lora:
            return {name: p.detach() for name, p in self.load(_CPU).named_parameters()}
        return base | load_file(self.weights.file(self.file))


def load(
    base: BaseModel,
    dist: DistContext = SINGLE_PROCESS,
    device: torch.device = _CPU,
    device_map: str | None = None,
    mixed_precision: bool = False,
) -> PreTrainedModel:
    """Return the base model in its config's dtype.

    Args:
        base: the model; its folder must exist (`BaseModel.ensure`).
        dist: with several processes, each gets its FSDP shards on its device, and never holds more.
        device: where to put it, in a single process.
        device_map: `auto` to distribute the blocks over all GPUs instead.
        mixed_precision: with several processes, all-gather the weights and compute in bfloat16, and
            reduce the gradients in float32; the shards keep the config's dtype.

    Raises:
        UserError: the weights cannot be read, do not fit the config, or are not finite; or it is
            not a decoder-only model.
    """
    folder = base.folder()
    config = load_config(folder)
    _check_decoder_only(config, folder)
    attention.register()
    placement: dict[str, Any] = {}
    if dist.world_size > 1:
        placement = _fsdp_placement(config, dist, mixed_precision)
    elif device_map:
        _check_accelerate(device_map)
        placement = {"device_map": device_map}
    elif device.type == "cuda" and is_accelerate_available():
        placement = {"device_map": {"": device}}  # read onto the GPU, not through the CPU's memory
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, base.dtype),
            local_files_only=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # `_check_keys` refuses them
            output_loading_info=True,
            **placement,
        )
    except UnpicklingError as error:
        raise _unreadable(
            folder,
            "they are pickled with more than tensors, and unpickling that can run code",
            "on a machine where you trust them, load and save them again as safetensors, with "
            "model.save_pretrained(DIR)",
        ) from error
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        if exhausted_resource(error):
            raise
        raise _unreadable(
            folder, first_line(error), "save it again with save_pretrained(DIR)"
        ) from error
    _check_keys(folder, info)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise torch.OutOfMemoryError("the model does not fit on all devices together")
    if dist.world_size == 1 and not device_map:
        model.to(device)
    _check_finite(folder, model, dist)
    if model.config.model_type == IMAGE_MODEL_TYPE:
        # its own mask is by the length of the keys, which in a static cache is not the number of
        # tokens; a decoder gets transformers' causal mask as well
        model.config.is_decoder = True
    return cast(PreTrainedModel, model)


def _check_keys(folder: Path, info: dict[str, Any]) -> None:
    """Refuse weights that do not fit the config: transformers would fill in random ones.

    Args:
        folder: of the model.
        info: what transformers reports; it leaves out tied weights and those that its architecture
            declares optional.
    """
    mismatched = [
        f"{name} ({list(saved)} instead of {list(expected)})"
        for name, saved, expected in info["mismatched_keys"]
    ]
    unexpected = [name for name in info["unexpected_keys"] if not _CAUSAL_MASK.search(name)]
    for problem, names in (
        ("lack", info["missing_keys"]),
        ("hold, beyond what its config.json describes,", unexpected),
        ("have another shape than its config.json says for", mismatched),
    ):
        if names:
            raise UserError(
                f"its weights {problem} {listed(sorted(names))}",
                field="model.path",
                value=folder,
                valid="weights and config.json of the same model, whole",
                hint="copy both again from where they come from, or save the model again with "
                "save_pretrained(DIR)",
            )


def _check_finite(folder: Path, model: PreTrainedModel, dist: DistContext) -> None:
    """Refuse weights with NaN or infinity; one pass over the parameters, without a copy."""
    names, is_bad = [], []
    for name, parameter in model.named_parameters():
        tensor = local_tensor(parameter.detach())
        if tensor.is_floating_point() and tensor.itemsize > 1 and tensor.numel():
            extremes = torch.stack(torch.aminmax(tensor))  # NaN, if there is any
            is_bad.append(not bool(torch.isfinite(extremes).all()))
        else:
            is_bad.append(False)
        names.append(name)
    flags = dist.all_reduce_sum(torch.tensor(is_bad, dtype=torch.int32, device=model.device))
    bad = [name for name, flag in zip(names, flags.tolist(), strict=True) if flag]
    if bad:
        raise UserError(
            f"its weights hold NaN or infinity: {listed(sorted(bad))}",
            field="model.path",
            value=folder,
            valid="finite weights",
            hint="the files, or the training that wrote them, are broken: take an earlier "
            "checkpoint, or copy them again",
        )


def _unreadable(folder: Path, problem: str, hint: str) -> UserError:
    return UserError(
        f"its weights cannot be read: {problem}", field="model.path", value=folder, hint=hint
    )


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


def _fsdp_placement(config: Any, dist: DistContext, mixed_precision: bool) -> dict[str, Any]:
    """Return what loads a model's FSDP shards: a block's weights are all-gathered as it runs."""
    from transformers.distributed import DistributedConfig

    with torch.device("meta"):
        empty = transformers.AutoModelForCausalLM.from_config(config)
    blocks = layers.find_blocks(empty)
    names = [name for name, module in empty.named_modules() if module is blocks]
    plan = {f"{name}.*": "free_full_weight" for name in names}
    options = {
        "fsdp_size": dist.world_size,
        "fsdp_mixed_precision": mixed_precision,  # bfloat16, reduced in float32
    }
    if "fsdp_plan" in {field.name for field in fields(DistributedConfig)}:
        return {"distributed_config": DistributedConfig(**options, fsdp_plan=plan)}
    # transformers 5.17: from the config, with names in the base model
    prefix = f"{empty.base_model_prefix}."
    config.base_model_fsdp_plan = {k.removeprefix(prefix): style for k, style in plan.items()}
    return {"distributed_config": DistributedConfig(**options), "config": config}
