"""FLOPs, disk space and batch sizes of a training, before anything is loaded.

FLOPs are counted as usual (Kaplan et al., 2020): two per parameter and token in the forward pass,
twice that in the backward pass, and attention's two products. Embedding tables are looked up, not
multiplied.
"""

import math
from collections import defaultdict
from dataclasses import dataclass

from hyperfitting.data.config import DatasetConfig
from hyperfitting.models.config import TuningConfig
from hyperfitting.models.size import ModelSize, forward_flops
from hyperfitting.training.config import TrainingConfig

CHUNK_BYTES = defaultdict(lambda: 2**26, {"cpu": 2**27, "cuda": 2**29})
"""Bytes of the logits that training holds at once, by device type."""
_CPU_PASS_TOKENS = 512
"""Tokens of a forward pass on a CPU: matrices of this many rows are as fast as larger ones."""


@dataclass(frozen=True)
class SequenceCounts:
    """The number and length of training and validation sequences."""

    n_train: int
    n_val: int
    seq_len: int


def training_flops(
    cfg: TrainingConfig, data: DatasetConfig | SequenceCounts, size: ModelSize
) -> float:
    """Return the FLOPs of a whole training with its validations."""
    trainer, tuning = cfg.trainer, cfg.tuning
    forward = forward_flops(size, data.n_train, data.seq_len)
    trained = _trained_fraction(tuning, size)
    head = 2 * size.n_head_params * data.n_train * data.seq_len
    # forward; backward to the activations; backward to the weights, unless adapters are trained;
    # the forward of the blocks again with activation checkpointing
    passes = (2 if tuning.is_lora else 3) + cfg.hardware.activation_checkpointing
    head_passes = 3 if tuning.method == "full" else 2
    once, per_epoch = 0.0, passes * trained * (forward - head) + head_passes * head
    if tuning.is_late:
        frozen = (1 - trained) * (forward - head)
        if cfg.uses_activation_cache:
            once = frozen
        else:
            per_epoch += frozen
    validation = forward_flops(size, data.n_val, data.seq_len) + forward_flops(
        size, trainer.val_prompts, trainer.val_prompt_len + trainer.val_max_new_tokens
    )
    if trainer.target_accuracy is not None:
        validation += forward  # over the training sequences
    n_validations = math.ceil(trainer.epochs / trainer.eval_every_epochs)
    return once + trainer.epochs * per_epoch + n_validations * validation


def n_trained_parameters(tuning: TuningConfig, size: ModelSize) -> float:
    """Return how many parameters a tuning trains; adapters are a rough count."""
    if tuning.method == "none":
        return 0
    fraction = _trained_fraction(tuning, size)
    if tuning.is_lora:
        # about seven square matrices in a block, and two thin ones for each
        return fraction * size.n_blocks * 7 * 2 * tuning.lora_rank * 2 * size.hidden_size
    return fraction * size.n_block_params if tuning.is_late else size.n_params


def _trained_fraction(tuning: TuningConfig, size: ModelSize) -> float:
    return min(tuning.last_blocks, size.n_blocks) / size.n_blocks if tuning.is_late else 1.0


def dtype_bytes(dtype: str) -> int:
    """Return the bytes of a parameter."""
    return 4 if dtype == "float32" else 2


def micro_batch_size(cfg: TrainingConfig, seq_len: int, device_type: str) -> int:
    """Return how many sequences pass through the model at once, at most."""
    if cfg.hardware.micro_batch_size is not None:
        return cfg.hardware.micro_batch_size
    if device_type == "cpu":
        return max(1, _CPU_PASS_TOKENS // seq_len)
    return cfg.trainer.batch_size


def activation_bytes(cfg: TrainingConfig, shape: tuple[int, ...], hidden_size: int) -> int:
    """Return the bytes of the activation cache of sequences of a shape (N, T)."""
    return shape[0] * shape[1] * hidden_size * dtype_bytes(cfg.trainer.activation_cache)


def is_cached_on_gpu(n_bytes: float, free: float, trained: float) -> bool:
    """Return whether the activation cache is held by the GPU rather than read batch by batch.

    Args:
        n_bytes: of the cache.
        free: bytes of the GPU's memory that the loaded model leaves.
        trained: bytes of the trained parameters, as many as of gradients and of each moment.
    """
    return n_bytes <= (free - 3 * trained) / 4  # three quarters are left for the batch


def trained_bytes(tuning: TuningConfig, size: ModelSize, dtype: str) -> float:
    """Return the bytes of the trained parameters, of a base model with weights in ``dtype``."""
    return dtype_bytes(tuning.trained_dtype(dtype)) * n_trained_parameters(tuning, size)


def training_disk_bytes(
    cfg: TrainingConfig, data: DatasetConfig | SequenceCounts, size: ModelSize, dtype: str
) -> float:
    """Return the bytes that a training leaves: weights of two epochs, and the activation cache.

    Args:
        cfg: the training.
        data: its sequences.
        size: of the base model.
        dtype: of its weights.
    """
    weights = 2 * trained_bytes(cfg.tuning, size, dtype)
    if not cfg.uses_activation_cache:
        return weights
    return weights + activation_bytes(cfg, (data.n_train, data.seq_len), size.hidden_size)
