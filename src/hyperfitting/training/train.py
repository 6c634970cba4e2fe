"""Hyperfitting: train on a few sequences until the training loss is near zero.

Next-token loss on whole sequences, exact epochs in a seeded order, and validation after epochs
(Figure 2 of Carlsson et al.). Nothing here knows about texts, tables, W&B or the terminal.
"""

import itertools
import logging
import math
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from hyperfitting.data.sequences import Mask, Sequences
from hyperfitting.errors import UserError
from hyperfitting.models.base import BaseModel
from hyperfitting.progress import MetricsRow, ProgressReporter, no_op
from hyperfitting.runtime import preemption
from hyperfitting.runtime.distributed import SINGLE_PROCESS, DistContext, full_tensor
from hyperfitting.runtime.files import replacing
from hyperfitting.runtime.transfer import HostScalar, to_device
from hyperfitting.training import history
from hyperfitting.training.activation_cache import CacheLocation, check_disk_space
from hyperfitting.training.batches import batches, steps_per_epoch, tokens_between
from hyperfitting.training.checkpoint import Checkpoint, TrainProgress
from hyperfitting.training.config import TrainerConfig, TrainingConfig
from hyperfitting.training.history import TrainingHistory
from hyperfitting.training.step import (
    Rows,
    TrainState,
    build_train_state,
    clear_gradients,
    train_step,
)
from hyperfitting.training.validation import validate

LAST_FILE = "last.safetensors"
"""Trained parameters after the last epoch; written last."""
BEST_VAL_FILE = "best_val.safetensors"
"""Trained parameters after the epoch of lowest validation loss."""

log = logging.getLogger(__name__)


def train(
    cfg: TrainingConfig,
    data: Sequences,
    base: BaseModel,
    work: Path,
    cache_location: CacheLocation,
    dist: DistContext = SINGLE_PROCESS,
    progress: ProgressReporter = no_op,
) -> Iterator[MetricsRow]:
    """Train, resuming from the checkpoint in a folder if there is one.

    Every rank runs this alike; rank 0 writes.

    Args:
        cfg: the training.
        data: its training and validation sequences.
        base: the model to train; its folder must exist.
        work: folder of checkpoint and results: `last.safetensors`, `best_val.safetensors`,
            `history.jsonl`, `validation.json`.
        cache_location: where the activation cache is stored, if the config uses one.
        dist: the processes that train.
        progress: displays the tokens done.

    Yields:
        The metrics of every optimizer step and epoch, those before a resume first.

    Raises:
        Preempted: a signal was received; a checkpoint is written.
        UserError: training diverges, or the config is not possible here.
    """
    if dist.broadcast_object((work / LAST_FILE).exists()):  # complete, but not committed
        yield from history.read(work)
        return
    _check(cfg, base, dist)
    check_disk_space(cfg, base, data.train.shape, cache_location, dist)
    state = build_train_state(cfg, base, data.train, cache_location, dist, progress)
    checkpoint = Checkpoint(work, dist)
    done, metrics = _resume(state, checkpoint, work)
    yield from history.merge(metrics.rows, metrics.validations)

    trainer = cfg.trainer
    sequences = to_device(data.train, state.model.device)  # (N, T)
    step = done.step
    remaining_tokens = tokens_between(trainer, data.train.shape, step)
    with progress("training", remaining_tokens, "tokens") as advance, preemption.defer_signals():
        for epoch in range(done.epoch, trainer.epochs):
            steps = _train_epoch(state, sequences, data.train_mask, trainer, (epoch, step))
            for step, n_tokens, loss in steps:
                if not math.isfinite(loss):
                    raise _diverged(epoch, step, f"the training loss became {loss}", checkpoint)
                metrics.append({"step": step, "train/loss": loss})
                yield metrics.rows[-1]
                advance(n_tokens, epoch=epoch + 1, loss=loss)
            clear_gradients(state)
            signum = dist.broadcast_object(preemption.requested_signal())
            if signum is not None:
                _save(checkpoint, TrainProgress(epoch, step, len(metrics.rows)), state, metrics)
                raise preemption.Preempted(signum)

            losses = metrics.step_losses(steps_per_epoch(trainer, len(data.train)))
            row = {"epoch": epoch + 1, "step": step, "train/loss": float(np.mean(losses))}
            if history.is_validated(row, trainer):
                try:
                    validation = validate(state.model, data, trainer, cfg.hardware, progress, dist)
                except FloatingPointError as error:
                    raise _diverged(epoch, step, f"in validation, {error}", checkpoint) from error
                _record_validation(validation, epoch + 1, state, metrics, work)
            metrics.append(row)
            epoch_row = row | metrics.validations.get(epoch + 1, {})
            log_epoch(epoch_row, trainer)
            yield epoch_row
            if history.is_last(epoch_row, trainer):
                break
            if checkpoint.is_due():
                _save(checkpoint, TrainProgress(epoch + 1, step, len(metrics.rows)), state, metrics)

    metrics.sync()
    _save_parameters(work / LAST_FILE, state)
    checkpoint.delete()


def _train_epoch(
    state: TrainState,
    sequences: Tensor,
    mask: Mask | None,
    trainer: TrainerConfig,
    done: tuple[int, int],
) -> Iterator[tuple[int, int, float]]:
    """Train to the end of an epoch, or until a signal is received.

    Args:
        state: changed in place.
        sequences: (N, T) the training sequences, on the device.
        mask: (N, T) the tokens that count in the loss, on the host; none: all do.
        trainer: for the data order.
        done: epoch, from 0, and the optimizer steps so far, which may be in its middle after a
            resume.

    Yields:
        The number of each optimizer step, its tokens and its training loss.
    """
    n, (epoch, step) = len(sequences), done
    steps_into_epoch = step - epoch * steps_per_epoch(trainer, n)
    state.model.train()
    if steps_into_epoch == 0:
        torch.manual_seed(_dropout_seed(trainer.seed, epoch, state.dist.rank))
    remaining = itertools.islice(batches(n, epoch, trainer), steps_into_epoch, None)
    steps = _train_steps(state, sequences, mask, remaining)
    for number, (n_tokens, loss) in enumerate(steps, start=step + 1):
        yield number, n_tokens, loss


def _train_steps(
    state: TrainState, sequences: Tensor, mask: Mask | None, epoch_batches: Iterable[Rows]
) -> Iterator[tuple[int, float]]:
    """Take a train step per batch, until a signal is received; yield its tokens and its loss.

    A loss is read when the next step is enqueued, so that the device need not wait for the host.

    Args:
        state: changed in place.
        sequences: (N, T) the training sequences, on the device.
        mask: (N, T) the tokens that count in the loss, on the host; none: all do.
        epoch_batches: (B,) indices of each batch.
    """
    losses: deque[tuple[int, HostScalar]] = deque()
    for rows in epoch_batches:
        indices = to_device(rows, sequences.device)
        tokens = sequences[indices].long()  # (B, T)
        loss_mask = None if mask is None else mask[rows]
        losses.append((tokens.numel(), HostScalar(train_step(state, tokens, rows, loss_mask))))
        if len(losses) == 2:
            n_tokens, loss = losses.popleft()
            yield n_tokens, loss.read()
        if state.dist.broadcast_object(preemption.requested_signal()) is not None:
            break
    for n_tokens, loss in losses:
        yield n_tokens, loss.read()


def log_epoch(row: MetricsRow, trainer: TrainerConfig) -> None:
    """Log the metrics of an epoch."""
    log.info("epoch %d of %d: %s", row["epoch"], trainer.epochs, row)


def _check(cfg: TrainingConfig, base: BaseModel, dist: DistContext) -> None:
    trainer = cfg.trainer
    if dist.world_size > 1 and trainer.precision == "float16":
        raise UserError(
            "is for one process",
            field="trainer.precision",
            value=trainer.precision,
            valid="bfloat16, tf32 or float32, with hardware.num_processes",
        )
    base.check_length(
        "trainer.val_prompt_len + trainer.val_max_new_tokens",
        trainer.val_prompt_len + trainer.val_max_new_tokens,
    )


def _resume(
    state: TrainState, checkpoint: Checkpoint, work: Path
) -> tuple[TrainProgress, TrainingHistory]:
    """Restore the state from a checkpoint if there is one, and the history up to it."""
    saved = checkpoint.load(state.trained)
    if saved is not None:
        done, state_dict = saved
        try:
            metrics = TrainingHistory(work, state.dist, done.n_rows, done.epoch)
        except ValueError as error:
            log.warning("the checkpoint cannot be used (%s): training starts over", error)
            checkpoint.delete()
        else:
            state.load_state_dict(state_dict)
            return done, metrics
    return TrainProgress(), TrainingHistory(work, state.dist)


def _record_validation(
    validation: MetricsRow, epoch: int, state: TrainState, metrics: TrainingHistory, work: Path
) -> None:
    """Record the validation after an epoch, and save the parameters if it is the best so far."""
    if validation["val/loss"] < metrics.best_val:
        _save_parameters(work / BEST_VAL_FILE, state)
    metrics.add_validation(epoch, validation)


def _save(
    checkpoint: Checkpoint, done: TrainProgress, state: TrainState, metrics: TrainingHistory
) -> None:
    metrics.sync()  # the checkpoint relies on these rows
    checkpoint.save(done, state.state_dict())


def _diverged(epoch: int, step: int, problem: str, checkpoint: Checkpoint) -> UserError:
    files = checkpoint.files()
    kept = f"an earlier state is kept in {files[0]}" if files else "no epoch was complete"
    return UserError(
        f"training diverged in epoch {epoch + 1}, step {step}: {problem}; {kept}",
        hint="a lower optimizer.lr, trainer.clip_norm=1.0, or trainer.precision=float32",
    )


def _dropout_seed(seed: int, epoch: int, rank: int) -> int:
    of_rank = [rank] if rank else []
    return int(np.random.SeedSequence([seed, epoch, *of_rank]).generate_state(1)[0])


def _save_parameters(path: Path, state: TrainState) -> None:
    """Write the trained parameters, all-gathered, from rank 0; every rank calls this."""
    tensors = {}
    for name, parameter in state.parameters().items():
        gathered = full_tensor(parameter)
        if state.dist.is_main:
            tensors[name] = gathered.cpu().contiguous()
    if state.dist.is_main:
        with replacing(path) as temporary:
            save_file(tensors, temporary)
