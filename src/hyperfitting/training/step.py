"""The train step: forward, loss, backward and optimizer step of one batch, and the state it uses.

A batch passes through the model in micro-batches, from the activation cache where there is one, and
is sharded over the ranks where there are several.
"""

import logging
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.filesize import decimal
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from hyperfitting.data.sequences import Mask
from hyperfitting.errors import UserError, exhausted_resource
from hyperfitting.models import trainable
from hyperfitting.models.base import BaseModel
from hyperfitting.models.causality import check_causal
from hyperfitting.models.layers import no_packed_sequences, override_forward
from hyperfitting.models.loading import load
from hyperfitting.progress import ProgressReporter, no_op
from hyperfitting.runtime import linear_kernels
from hyperfitting.runtime.device import resolve_device
from hyperfitting.runtime.distributed import SINGLE_PROCESS, DistContext, local_tensor, reshard
from hyperfitting.runtime.numerics import check_precision, training_numerics
from hyperfitting.runtime.transfer import to_device
from hyperfitting.training.activation_cache import (
    ActivationCache,
    CacheLocation,
    build_activation_cache,
)
from hyperfitting.training.compile import COMPILER_ERRORS, CompiledBlocks, should_compile
from hyperfitting.training.config import TrainerConfig, TrainingConfig
from hyperfitting.training.flops import micro_batch_size
from hyperfitting.training.loss import NextTokenLoss
from hyperfitting.training.optimizer import build_optimizer, match_placement

Rows = NDArray[np.int64]
"""Indices of training sequences."""
log = logging.getLogger(__name__)


@dataclass
class TrainState:
    """Everything that a train step reads and changes."""

    model: PreTrainedModel
    trained: dict[str, nn.Parameter]
    """The trained parameters by name."""
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    trainer: TrainerConfig
    deterministic: bool
    """As `HardwareConfig.deterministic`."""
    micro_batch_size: int
    """Halved by a train step that runs out of GPU memory."""
    compiled_blocks: CompiledBlocks
    loss: NextTokenLoss
    linear_forwards: Mapping[nn.Module, Callable[[Tensor], Tensor]]
    activation_cache: ActivationCache | None
    dist: DistContext

    @property
    def optimizer_params(self) -> list[nn.Parameter]:
        """The parameters that the optimizer steps, in the order of ``trained``."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def parameters(self) -> dict[str, Tensor]:
        """Return the present values of the trained parameters."""
        return {name: p.detach() for name, p in self.trained.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a resumed training needs."""
        return {
            "parameters": self.parameters(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": _rng_state(self.model.device),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        reshard(self.model)
        with torch.no_grad():
            for name, parameter in self.trained.items():
                local_tensor(parameter).copy_(state["parameters"][name])
        params = self.optimizer_params
        moments = {
            index: {key: match_placement(params[index], value) for key, value in values.items()}
            for index, values in state["optimizer"]["state"].items()
        }
        self.optimizer.load_state_dict({**state["optimizer"], "state": moments})
        self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["rng"]["cpu"])
        if "cuda" in state["rng"]:
            torch.cuda.set_rng_state(state["rng"]["cuda"])
        if "mps" in state["rng"]:
            torch.mps.set_rng_state(state["rng"]["mps"])


def build_train_state(
    cfg: TrainingConfig,
    base: BaseModel,
    tokens: NDArray[np.int32],
    cache_location: CacheLocation,
    dist: DistContext = SINGLE_PROCESS,
    progress: ProgressReporter = no_op,
) -> TrainState:
    """Return the state before the first step: the base model, with a new optimizer.

    Args:
        cfg: the training.
        base: its model.
        tokens: (N, T) training sequences.
        cache_location: where the activation cache is stored, if the config uses one.
        dist: the processes that train; each gets its shards of the model.
        progress: displays the computation of the activation cache.

    Raises:
        UserError: the model, the tuning or the optimizer is not available as configured.
    """
    device = resolve_device(cfg.hardware)
    check_precision(device, cfg.trainer.precision)
    model = load(base, dist, device, mixed_precision=cfg.gathers_bfloat16(base.dtype))
    trained = trainable.select_trainable(model, cfg.tuning, cfg.trainer.seed)
    if not cfg.trainer.dropout:
        trainable.disable_dropout(model)
    check_causal(model, base.name)
    if cfg.hardware.activation_checkpointing:
        trainable.checkpoint_activations(model)
    return TrainState(
        model=model,
        trained=trained,
        optimizer=build_optimizer(cfg.optimizer, list(trained.values())),
        scaler=torch.amp.GradScaler(device.type, enabled=cfg.trainer.precision == "float16"),
        trainer=cfg.trainer,
        deterministic=cfg.hardware.deterministic,
        micro_batch_size=micro_batch_size(cfg, tokens.shape[1], device.type),
        compiled_blocks=CompiledBlocks(model, should_compile(cfg, device, model, tokens.size)),
        loss=NextTokenLoss(model),
        linear_forwards=linear_kernels.linear_forwards(model, cfg.trainer.precision),
        activation_cache=build_activation_cache(
            cfg, model, base.dtype, tokens, cache_location, progress, dist
        ),
        dist=dist,
    )


def train_step(state: TrainState, tokens: Tensor, rows: Rows, mask: Mask | None = None) -> Tensor:
    """Take one optimizer step, and return the batch's mean next-token loss in nats.

    If GPU memory runs out in the forward or backward pass, or the compiler fails, these are
    repeated with half the micro-batch size, or eagerly. The optimizer step is never repeated: what
    it has changed already cannot be undone.

    Nothing waits for a GPU, except that float16's `GradScaler` reads whether a gradient overflowed:
    the loss is a tensor () on the device.

    Args:
        state: changed in place.
        tokens: (B, T) sequences.
        rows: (B,) their indices among the training sequences.
        mask: (B, T) the tokens that count in the loss, on the host; none: all do.

    Raises:
        UserError: memory runs out in the optimizer step, or the model needs an operation that is
            not deterministic.
    """
    device = state.model.device
    tokens = tokens.to(device)
    with training_numerics(device, state.deterministic, state.trainer.precision):
        loss = _forward_backward(state, tokens, rows, mask)
        try:
            _step_optimizer(state)
        except RuntimeError as error:
            if exhausted_resource(error) != "memory":
                raise
            raise _no_memory_for_optimizer(state) from error
    return state.dist.all_reduce_sum(loss)


def _forward_backward(state: TrainState, tokens: Tensor, rows: Rows, mask: Mask | None) -> Tensor:
    """Return `_accumulate_gradients` of a batch, repeated while that can help."""
    while True:
        try:
            with (
                no_packed_sequences(),
                override_forward(state.linear_forwards),
                state.compiled_blocks.active(),
            ):
                return _accumulate_gradients(state, tokens, rows, mask)
        except (RuntimeError, *COMPILER_ERRORS) as error:
            # (with several ranks, the others are further on)
            if exhausted_resource(error) == "memory":
                if state.micro_batch_size == 1 or state.dist.world_size > 1:
                    raise
                state.micro_batch_size = math.ceil(min(state.micro_batch_size, len(tokens)) / 2)
                log.warning(
                    "out of GPU memory: continuing with hardware.micro_batch_size=%d",
                    state.micro_batch_size,
                )
            elif isinstance(error, COMPILER_ERRORS) and state.compiled_blocks.enabled:
                state.compiled_blocks.disable()
                log.warning("torch.compile failed (%s): falling back to eager mode", error)
            else:
                raise


def _no_memory_for_optimizer(state: TrainState) -> UserError:
    """Return the error of an optimizer step that finds no memory for the optimizer's state."""
    weights = sum(local_tensor(p).nbytes for p in state.model.parameters())
    trained = sum(local_tensor(p).nbytes for p in state.trained.values())
    return UserError(
        f"out of memory in its step: weights take {decimal(weights)}, gradients "
        f"{decimal(trained)}, and the state of Adam twice the gradients",
        field="optimizer",
        value=type(state.optimizer).__name__,
        hint="optimizer=adam_8bit model.dtype=bfloat16, tuning=late_stage or late_stage_lora, "
        "or several GPUs with hardware=fsdp; plan=true estimates what fits",
    )


def _accumulate_gradients(
    state: TrainState, tokens: Tensor, rows: Rows, mask: Mask | None
) -> Tensor:
    """Set the gradients of a batch (B, T), and return this rank's part of its mean loss."""
    dist = state.dist
    clear_gradients(state)
    n_predicted = tokens[:, 1:].numel() if mask is None else int(mask[:, 1:].sum())
    total = torch.zeros((), device=tokens.device)
    shard, n_valid = dist.shard(np.arange(len(tokens)))
    for start in range(0, len(shard), state.micro_batch_size):
        micro_batch = shard[start : start + state.micro_batch_size]  # (b,)
        micro_rows = to_device(micro_batch, tokens.device)
        inputs = tokens[micro_rows]  # (b, T)
        loss_mask = None if mask is None else mask[micro_batch]
        with _cached_activations(state, rows[micro_batch]):
            with trainable.autocast(state.model, state.trainer.precision):
                loss = state.loss(inputs, max(0, n_valid - start), loss_mask) / n_predicted
            # FSDP averages gradients over ranks; the sum is needed
            state.scaler.scale(loss * dist.world_size).backward()
        total += loss.detach()
    if dist.world_size > 1:
        _average_replicated_gradients(state)
    return total


def clear_gradients(state: TrainState) -> None:
    """Free the gradients: validation and checkpoints need the memory that they take."""
    for parameter, stepped in zip(state.trained.values(), state.optimizer_params, strict=True):
        parameter.grad = stepped.grad = None


def _step_optimizer(state: TrainState) -> None:
    """Clip the gradients if configured, and step the optimizer."""
    if state.trainer.clip_norm is not None:
        state.scaler.unscale_(state.optimizer)
        nn.utils.clip_grad_norm_(list(state.trained.values()), state.trainer.clip_norm)
    for parameter, stepped in zip(state.trained.values(), state.optimizer_params, strict=True):
        if stepped is not parameter and parameter.grad is not None:  # a plain tensor of its shard
            stepped.data = local_tensor(parameter.detach())
            stepped.grad = local_tensor(parameter.grad)
    state.scaler.step(state.optimizer)
    state.scaler.update()


def _average_replicated_gradients(state: TrainState) -> None:
    """Average gradients of parameters that every rank has whole (adapters), as FSDP does others."""
    gradients = [
        parameter.grad
        for parameter in state.trained.values()
        if parameter.grad is not None and not isinstance(parameter, DTensor)
    ]
    if not gradients:
        return
    # one all-reduce: adapters are hundreds of small tensors
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    averaged = state.dist.all_reduce_sum(flat) / state.dist.world_size
    for gradient, values in zip(
        gradients, averaged.split([g.numel() for g in gradients]), strict=True
    ):
        gradient.copy_(values.view_as(gradient))


def _cached_activations(state: TrainState, rows: Rows) -> AbstractContextManager[None]:
    if state.activation_cache is None:
        return nullcontext()
    return state.activation_cache.replay(rows, next(state.model.parameters()))


def _rng_state(device: torch.device) -> dict[str, Tensor]:
    """Return the states of the generators that dropout draws from."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state()
    if device.type == "mps":
        states["mps"] = torch.mps.get_rng_state()
    return states
