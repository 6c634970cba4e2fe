"""What autograd saves for the backward pass, counted without weights or computation.

Counted on one and on two blocks of the model with fake tensors, which have a shape and no content;
the other blocks are alike.
"""

import copy
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hyperfitting.models.base import BaseModel
from hyperfitting.runtime.files import write_json
from hyperfitting.store.artifact import Step, Store
from hyperfitting.training.config import TrainingConfig

VERSION = 2
_SAVED_FILE = "saved_tensors.json"
_UNMASKED = "hyperfitting_unmasked"


@dataclass(frozen=True)
class SavedTensors:
    """What autograd saves of one forward pass, in bytes, and the number of trained parameters."""

    per_block: int
    """Bytes of a trained block."""
    outside: int
    """Bytes of everything else."""
    trained_per_block: int
    """Parameters."""
    trained_outside: int
    """Parameters."""


def count_saved_tensors(
    cfg: TrainingConfig, shape: tuple[int, int], base: BaseModel, store: Store, device_type: str
) -> SavedTensors:
    """Return what autograd saves of one forward pass; counted once, and kept in the store.

    Args:
        cfg: the training.
        shape: (B, T) of the tokens.
        base: the model.
        store: keeps the counts.
        device_type: `cpu` or `cuda`; attention has other kernels on each.
    """

    def build(work: Path) -> None:
        one, two = (_count(cfg, shape, base, device_type, n_blocks) for n_blocks in (1, 2))
        per_block, trained_per_block = two[0] - one[0], two[1] - one[1]
        counted = SavedTensors(
            per_block, one[0] - per_block, trained_per_block, one[1] - trained_per_block
        )
        write_json(work / _SAVED_FILE, asdict(counted))

    tuning = cfg.tuning.id_config()
    tuning.pop("last_blocks", None)
    artifact = store.artifact(
        "saved_tensors",
        version=VERSION,
        config={
            "tuning": tuning,
            "shape": list(shape),
            "device_type": device_type,
            "precision": cfg.trainer.precision,
            "dropout": cfg.trainer.dropout,
            "activation_checkpointing": cfg.hardware.activation_checkpointing,
            **cfg.tuning.dtype_config(base.dtype),
        },
        inputs={"model": base.id},
    )
    Step(artifact, build).ensure()
    return SavedTensors(**json.loads(artifact.file(_SAVED_FILE).read_text("utf-8")))


def _count(
    cfg: TrainingConfig,
    shape: tuple[int, int],
    base: BaseModel,
    device_type: str,
    n_blocks: int,
) -> tuple[int, int]:
    """Return bytes saved and parameters trained of the model cut to ``n_blocks`` tuned blocks."""
    import torch
    import transformers
    from torch._subclasses import FakeTensorMode
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    from hyperfitting.models import attention, trainable
    from hyperfitting.models.layers import input_tokens, override_forward

    config = copy.deepcopy(base.transformers_config())
    config.num_hidden_layers = n_blocks
    if vars(config).get("layer_types"):  # some configs derive it
        config.layer_types = config.layer_types[:n_blocks]
    saved: dict[int, Any] = {}
    with torch.device("meta"):
        # with fake tensors transformers cannot detect that the mask can be skipped
        sdpa = attention.cuda_sdpa if device_type == "cuda" else sdpa_attention_forward
        transformers.AttentionInterface.register(_UNMASKED, sdpa)
        transformers.AttentionMaskInterface.register(_UNMASKED, lambda *_, **__: None)
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, base.dtype), attn_implementation=_UNMASKED
        )
        tuning = replace(cfg.tuning, last_blocks=n_blocks) if cfg.tuning.is_late else cfg.tuning
        trained = trainable.select_trainable(model, tuning)
    with FakeTensorMode():
        _to_fake_cpu(model)
        if not cfg.trainer.dropout:
            trainable.disable_dropout(model)
        if cfg.hardware.activation_checkpointing:
            trainable.checkpoint_activations(model)
        weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}

        def record(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                saved[storage._cdata] = storage
            return tensor

        head = model.get_output_embeddings()
        model.train()
        with (
            torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor),
            trainable.autocast(model, cfg.trainer.precision),
            override_forward({head: lambda states: states} if head is not None else {}),
        ):
            tokens = input_tokens(model, torch.zeros(*shape, dtype=torch.long))
            model(input_ids=tokens, use_cache=False)
    saved_bytes = sum(storage.nbytes() for storage in saved.values())
    return saved_bytes, sum(p.numel() for p in trained.values())


def _to_fake_cpu(model: Any) -> None:
    """Replace a model's meta tensors by fake tensors on the CPU (inside `FakeTensorMode`)."""
    import torch

    replaced: dict[torch.Tensor, torch.Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor not in replaced:  # tied ones occur twice
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                    if isinstance(tensor, torch.nn.Parameter):
                        empty = torch.nn.Parameter(empty, requires_grad=tensor.requires_grad)
                    replaced[tensor] = empty
                if tensor is not None:
                    tensors[name] = replaced[tensor]
