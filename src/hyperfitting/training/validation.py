"""Validation during training: loss and entropy on held-out sequences, and greedy continuations."""

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from hyperfitting.data.sequences import Mask, Sequences
from hyperfitting.decoding.config import DecodeConfig
from hyperfitting.decoding.generate import continue_texts
from hyperfitting.evaluation.forward import compute_token_stats
from hyperfitting.metrics.diversity import rep_n, ttr
from hyperfitting.progress import MetricsRow, ProgressReporter
from hyperfitting.runtime.config import HardwareConfig
from hyperfitting.runtime.distributed import SINGLE_PROCESS, DistContext
from hyperfitting.training.config import TrainerConfig

_SHARDED_BATCH_SIZE = 32
"""Texts that each of several ranks continues at once."""


def validate(
    model: PreTrainedModel,
    data: Sequences,
    trainer: TrainerConfig,
    hardware: HardwareConfig,
    progress: ProgressReporter,
    dist: DistContext = SINGLE_PROCESS,
) -> MetricsRow:
    """Return validation loss and entropy (nats), TTR and rep-2 of greedy continuations.

    These are the curves of Figure 2 of Carlsson et al. Where the training ends at a token accuracy,
    also that. The model is left in evaluation mode.

    Raises:
        FloatingPointError: the model's logits hold NaN or infinity.
    """
    model.eval()
    all_prompts = data.val[: trainer.val_prompts, : trainer.val_prompt_len]
    sequences, prompts = dist.shard(data.val)[0], dist.shard(all_prompts)[0]
    with progress("validating", sequences.size, "tokens") as advance:
        stats = compute_token_stats(model, sequences, hardware.evaluation_batch_size, advance)
    batch_size = hardware.generation_batch_size
    if dist.world_size > 1 and batch_size is None:
        # free memory differs between ranks, but every rank must make as many forward passes
        batch_size = min(len(prompts), _SHARDED_BATCH_SIZE)
    n_new = len(prompts) * trainer.val_max_new_tokens
    with progress("generating validation texts", n_new, "tokens") as advance:
        generated = continue_texts(
            model,
            prompts,
            trainer.val_max_new_tokens,
            DecodeConfig(name="greedy", seed=0),
            batch_size,
            advance,
        )
    continuations = dist.all_gather(np.array(generated.tokens), len(all_prompts)).tolist()
    loss, entropy = (
        _mean(dist.all_gather(stats[name], len(data.val)), data.val_mask)
        for name in ("loss", "entropy")
    )
    metrics = {
        "val/loss": loss,
        "val/entropy": entropy,
        "gen/ttr": float(np.mean([ttr(tokens) for tokens in continuations])),
        "gen/rep_2": float(np.mean([rep_n(tokens, 2) for tokens in continuations])),
    }
    if trainer.target_accuracy is not None:
        metrics["train/accuracy"] = _token_accuracy(model, data, hardware, progress, dist)
    return metrics


def _token_accuracy(
    model: PreTrainedModel,
    data: Sequences,
    hardware: HardwareConfig,
    progress: ProgressReporter,
    dist: DistContext,
) -> float:
    """Return the share of training tokens that count, but the first ones, predicted exactly."""
    sequences = dist.shard(data.train)[0]
    with progress("predicting the training sequences", sequences.size, "tokens") as advance:
        stats = compute_token_stats(model, sequences, hardware.evaluation_batch_size, advance)
    is_first = stats["top1"] == sequences[:, 1:]
    return _mean(dist.all_gather(is_first.astype(float), len(data.train)), data.train_mask)


def _mean(values: NDArray[np.floating], mask: Mask | None) -> float:
    """Return the mean of values (N, T - 1) over the tokens that count, of a mask (N, T)."""
    return float(values.mean() if mask is None else values[mask[:, 1:]].mean())
