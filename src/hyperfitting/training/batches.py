"""The order of the training data: which sequences each optimizer step trains on."""

import math
from collections.abc import Iterator

import numpy as np

from hyperfitting.training.config import TrainerConfig
from hyperfitting.training.step import Rows


def batches(n: int, epoch: int, trainer: TrainerConfig) -> Iterator[Rows]:
    """Yield the indices (B,) of each batch: all ``n`` sequences once, in the order of this epoch.

    Args:
        n: training sequences.
        epoch: from 0.
        trainer: for seed, batch size and swaps.
    """
    order = np.random.default_rng([trainer.seed, epoch]).permutation(n)
    if epoch == 0:
        first = np.arange(trainer.swaps)
        second = first + trainer.batch_size
        order[first], order[second] = order[second], order[first]
    for start in range(0, n, trainer.batch_size):
        yield order[start : start + trainer.batch_size]


def steps_per_epoch(trainer: TrainerConfig, n: int) -> int:
    """Return the optimizer steps of an epoch over ``n`` sequences."""
    return math.ceil(n / trainer.batch_size)


def tokens_between(
    trainer: TrainerConfig, shape: tuple[int, ...], step: int, end: int | None = None
) -> int:
    """Return the number of training tokens between two optimizer steps.

    Args:
        trainer: for epochs and batch size.
        shape: (N, T) of the training sequences.
        step: from 0 (the beginning).
        end: the later step; none: the last one.
    """
    n, length = shape
    per_epoch = steps_per_epoch(trainer, n)

    def sequences_until(step: int) -> int:
        epochs, steps = divmod(step, per_epoch)
        return epochs * n + steps * trainer.batch_size

    end = trainer.epochs * per_epoch if end is None else end
    return (sequences_until(end) - sequences_until(step)) * length
