"""What a member will take: floating-point operations, bytes; before anything is loaded.

Counted as usual (Kaplan et al., 2020): two operations a parameter and token forward, twice that
backward, and attention's two products. Embedding tables are looked up, not multiplied.
"""

import math
from dataclasses import dataclass

from hyperfitting.config import RunConfig

CHUNK_BYTES = {"cpu": 2**27, "cuda": 2**29}
"""Size of the logits that training holds at once, by kind of device."""
_PASS_TOKENS = 512
"""Tokens in one pass on a CPU: matrices of this many rows are as fast as larger ones."""


@dataclass(frozen=True)
class Size:
    """How large a model is."""

    parameters: int
    """All of them, tied ones once."""
    in_blocks: int
    """Parameters of the blocks."""
    head: int
    """Those of the output layer."""
    blocks: int
    width: int
    """Of the hidden states."""


def forward(size: Size, texts: int, length: int) -> float:
    """Return the operations of one pass over ``texts`` of ``length`` tokens."""
    attention = 4 * size.blocks * size.width * length / 2
    return texts * length * (2 * (size.in_blocks + size.head) + attention)


def training(cfg: RunConfig, size: Size) -> float:
    """Return the operations of a whole training, with its looks at validation."""
    data, trainer, tuning = cfg.dataset, cfg.trainer, cfg.tuning
    epoch = forward(size, data.n_train, data.seq_len)
    trained = min(tuning.last_blocks, size.blocks) / size.blocks if tuning.is_late else 1.0
    head = 2 * size.head * data.n_train * data.seq_len
    # backward: once for the activations, and once more for weights that are trained themselves
    passes = 2 if tuning.is_lora else 3
    once, each = 0.0, passes * epoch
    if tuning.is_late:
        each = passes * trained * (epoch - head) + 2 * head
        frozen = (1 - trained) * (epoch - head)
        kept = trainer.trunk_cache != "off" and not trainer.dropout
        once, each = (frozen, each) if kept else (0.0, each + frozen)
    look = forward(size, data.n_val, data.seq_len) + forward(
        size, trainer.epoch_contexts, trainer.epoch_context_len + trainer.epoch_new_tokens
    )
    return once + trainer.epochs * each + math.ceil(trainer.epochs / trainer.look_every) * look


def trained_parameters(cfg: RunConfig, size: Size) -> float:
    """Return how many parameters a tuning trains, adapters by a rough count."""
    tuning = cfg.tuning
    if tuning.method == "none":
        return 0
    share = min(tuning.last_blocks, size.blocks) / size.blocks if tuning.is_late else 1.0
    if tuning.is_lora:
        # some seven square-like matrices a block, and two thin ones for each
        return share * size.blocks * 7 * 2 * tuning.lora_rank * 2 * size.width
    return share * size.in_blocks if tuning.is_late else size.parameters


def itemsize(cfg: RunConfig) -> int:
    """Return the bytes of a parameter."""
    return 4 if cfg.model.dtype == "float32" else 2


def rows_in_a_pass(cfg: RunConfig, device: str) -> int:
    """Return how many sequences a training passes through the model at once, at most.

    Args:
        cfg: the member.
        device: kind of device.
    """
    if cfg.hardware.micro_batch_size is not None:
        return cfg.hardware.micro_batch_size
    if device == "cpu":
        return max(1, _PASS_TOKENS // cfg.dataset.seq_len)
    return cfg.trainer.batch_size


def disk(cfg: RunConfig, size: Size) -> float:
    """Return the bytes that a training leaves: two states, and the activations of its trunk."""
    states = 2 * itemsize(cfg) * trained_parameters(cfg, size)
    if not cfg.tuning.is_late or cfg.trainer.trunk_cache == "off" or cfg.trainer.dropout:
        return states
    kind = 4 if cfg.trainer.trunk_cache == "float32" else 2
    return states + cfg.dataset.n_train * cfg.dataset.seq_len * size.width * kind
