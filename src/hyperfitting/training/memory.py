"""Peak memory of a training, estimated before it begins: counted, not tried.

Weights, gradients and optimizer state follow from the number of parameters and from one step of the
optimizer on a small one; activations from `training.saved_tensors`.
"""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from hyperfitting.models.base import BaseModel
from hyperfitting.models.config import TuningConfig
from hyperfitting.models.size import ModelSize, model_size
from hyperfitting.runtime.files import write_json
from hyperfitting.store.artifact import Step, Store
from hyperfitting.training.config import TrainingConfig
from hyperfitting.training.flops import (
    CHUNK_BYTES,
    activation_bytes,
    dtype_bytes,
    is_cached_on_gpu,
    micro_batch_size,
)
from hyperfitting.training.saved_tensors import count_saved_tensors

VERSION = 1
FRAMEWORK_BYTES = {"cpu": 0.5e9, "cuda": 0.8e9, "mps": 0.8e9}
"""Bytes of Python, torch and its libraries in a process; on a GPU, of CUDA and its libraries."""
_LOGIT_CHUNKS = 3
"""Chunks of logits that live at once: logits, log-probabilities, and those of the chunk before."""
_STATE_FILE = "optimizer_state.json"


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one process at the peak of a training."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    """Tensors saved for the backward pass, and the logits that live at once."""
    all_gather: float
    """All-gather buffers of several ranks."""
    activation_cache: float
    """The output of the frozen layers for every sequence, where a GPU holds it."""
    framework: float

    @property
    def peak(self) -> float:
        """The sum of all items."""
        return float(sum(vars(self).values()))

    @property
    def largest(self) -> str:
        """The name of the largest item that a config can reduce."""
        items = {name: size for name, size in vars(self).items() if name != "framework"}
        return max(items, key=items.__getitem__)


def estimate_memory(
    cfg: TrainingConfig,
    shape: tuple[int, int],
    base: BaseModel,
    store: Store,
    device_type: str,
    device_bytes: float,
    n_processes: int = 1,
) -> MemoryEstimate:
    """Return the peak memory of each process of a training, uncompiled.

    Args:
        cfg: the training.
        shape: (N, T) of the training sequences.
        base: the model; its weights are not needed.
        store: keeps what was counted.
        device_type: `cpu` or `cuda`.
        device_bytes: of the device's memory: a GPU with room holds the activation cache.
        n_processes: that train together (`hardware.num_processes`, where null has been resolved).
    """
    seq_len = shape[1]
    size, n = model_size(base, store), n_processes
    trained_dtype = cfg.tuning.trained_dtype(base.dtype)
    element, trained_element = dtype_bytes(base.dtype), dtype_bytes(trained_dtype)
    sequences_per_rank = math.ceil(cfg.trainer.batch_size / n)
    rows = min(sequences_per_rank, micro_batch_size(cfg, seq_len, device_type))
    saved = count_saved_tensors(cfg, (rows, seq_len), base, store, device_type)
    n_blocks = min(cfg.tuning.last_blocks, size.n_blocks) if cfg.tuning.is_late else size.n_blocks
    n_trained = saved.trained_outside + n_blocks * saved.trained_per_block
    shards = 1 if cfg.tuning.is_lora else n  # adapters are replicated
    logits = 4 * rows * seq_len * size.n_head_params / size.hidden_size
    activations: float = saved.outside + n_blocks * saved.per_block
    activations += _LOGIT_CHUNKS * min(CHUNK_BYTES[device_type], logits)
    if cfg.tuning.method == "full":
        activations += size.n_head_params * _head_gradient_bytes(cfg, base.dtype, n)
    if cfg.hardware.activation_checkpointing:  # one block is recomputed at a time
        hardware = replace(cfg.hardware, activation_checkpointing=False)
        whole = replace(cfg, hardware=hardware)
        saved_whole = count_saved_tensors(whole, (rows, seq_len), base, store, device_type)
        activations += saved_whole.per_block
    gradients: float = n_trained * trained_element / shards
    # with a single micro-batch, gradients appear as activations are freed
    at_loss = activations if rows >= sequences_per_rank else activations + gradients
    buffers = (0.0, 0.0, 0.0)
    if n > 1:
        gathered = 2 if cfg.gathers_bfloat16(base.dtype) else element
        buffers = _all_gather_bytes(size, gathered, element, cfg.tuning, device_type)
    # as a pass begins, at its loss, at its end
    live, all_gather = max(zip((0.0, at_loss, gradients), buffers, strict=True), key=sum)
    state_bytes = optimizer_state_bytes(cfg.optimizer, trained_dtype, store)
    weights: float = size.n_params * element / n
    free = device_bytes - FRAMEWORK_BYTES[device_type] - weights
    cached = 0.0
    if device_type == "cuda" and cfg.uses_activation_cache and n_blocks < size.n_blocks:
        n_bytes = activation_bytes(cfg, shape, size.hidden_size)
        cached = n_bytes if is_cached_on_gpu(n_bytes, free, gradients) else 0.0
    return MemoryEstimate(
        weights=weights,
        gradients=min(gradients, live),
        optimizer=n_trained * state_bytes / shards,
        activations=max(live - gradients, 0.0),
        all_gather=all_gather,
        activation_cache=cached,
        framework=FRAMEWORK_BYTES[device_type],
    )


def _head_gradient_bytes(cfg: TrainingConfig, dtype: str, n_processes: int) -> int:
    """Return the bytes per weight of the output layer's gradient, as the chunked loss sums it."""
    is_autocast = cfg.trainer.precision in ("bfloat16", "float16")
    is_half = dtype != "float32" or (n_processes > 1 and cfg.gathers_bfloat16(dtype))
    return 4 + 2 if is_autocast and is_half else dtype_bytes(dtype)  # summed in float32, then cast


def reduction_hint(estimate: MemoryEstimate, cfg: TrainingConfig, n_processes: int = 1) -> str:
    """Return overrides that about halve the largest item of an estimate, where any do.

    Args:
        estimate: of this training.
        cfg: the training.
        n_processes: that train together.
    """
    share = math.ceil(cfg.trainer.batch_size / n_processes)
    micro_batch = min(share, cfg.hardware.micro_batch_size or share)
    if estimate.largest == "activations":
        if not cfg.hardware.activation_checkpointing:
            return "hardware.activation_checkpointing=true"
        if micro_batch > 1:
            return f"hardware.micro_batch_size={micro_batch // 2}"
    elif "bit" not in str(cfg.optimizer.get("_target_")):
        # bfloat16 halves weights, gradients and buffers too
        if not cfg.optimizer.get("bf16_stochastic_round"):
            return "model.dtype=bfloat16 trainer.precision=float32 optimizer=adam_bf16"
        if estimate.largest == "optimizer":
            return "optimizer=adam_8bit"
    if estimate.largest == "all_gather":  # they hold whole blocks, for any number of ranks
        return "a smaller model" if cfg.tuning.is_lora else "tuning=lora"
    return f"hardware.num_processes={2 * n_processes}"


def optimizer_state_bytes(optimizer: dict[str, Any], dtype: str, store: Store) -> float:
    """Return the bytes of an optimizer's state per parameter; measured once, kept in the store.

    Args:
        optimizer: its config.
        dtype: of the parameters.
        store: keeps the measurement.
    """

    def build(work: Path) -> None:
        import torch

        from hyperfitting.training.optimizer import build_optimizer

        weight = torch.nn.Parameter(torch.zeros(64, 512, dtype=getattr(torch, dtype)))
        weight.grad = torch.ones_like(weight)
        built = build_optimizer(optimizer, [weight])
        with torch.compiler.set_stance("force_eager"):  # torchao's compile; the state is the same
            built.step()
        tensors = [t for state in built.state[weight].values() for t in _inner_tensors(state)]
        state_bytes = sum(t.numel() * t.itemsize for t in tensors if t.numel() > 1)
        write_json(work / _STATE_FILE, state_bytes / weight.numel())

    artifact = store.artifact(
        "optimizer_state",
        version=VERSION,
        config={"optimizer": {k: v for k, v in optimizer.items() if k != "lr"}, "dtype": dtype},
        inputs={},
    )
    Step(artifact, build).ensure()
    return float(json.loads(artifact.file(_STATE_FILE).read_text("utf-8")))


def _inner_tensors(state: Any) -> list[Any]:
    """Return the plain tensors that a tensor subclass consists of."""
    import torch

    if not isinstance(state, torch.Tensor):
        return []
    if type(state) is torch.Tensor:
        return [state]
    names, _ = cast(Any, state).__tensor_flatten__()
    return [getattr(state, name) for name in names]


def _all_gather_bytes(
    size: ModelSize, gathered: int, reduced: int, tuning: TuningConfig, device_type: str
) -> tuple[float, float, float]:
    """Return the bytes of all-gather buffers as a pass begins, at its loss, and at its end.

    These are the copies of one block and of the output layer (or the embedding, which is as large)
    that FSDP2 and transformers hold at once, counted from allocator events (docs/scale.md).

    Args:
        size: of the model.
        gathered: bytes of a weight as all-gathered, and of its gradient.
        reduced: bytes of a gradient as reduced.
        tuning: what is trained.
        device_type: `cpu` or `cuda`.
    """
    block, layer = size.n_block_params / size.n_blocks, size.n_head_params
    # gloo gathers into a buffer of its own; tied weights are in two FSDP groups
    staging, tied = (
        device_type == "cpu",
        size.n_params - size.n_block_params < 1.5 * size.n_head_params,
    )
    # weights and those being prefetched; of a trained block also gradients, and those in flight
    trained = not tuning.is_lora
    blocks = block * (gathered * (2 + trained + staging) + reduced * trained)
    full = tuning.method == "full"
    return (
        layer * gathered * (2 + tied + staging),
        blocks + 2 * layer * gathered,
        full * layer * (gathered * (2 + tied + staging) + reduced),
    )
