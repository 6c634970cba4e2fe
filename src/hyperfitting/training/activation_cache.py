"""The activation cache: outputs of the frozen layers, computed once and used in every epoch.

With a `late_…` tuning the first blocks are frozen, so the hidden states that enter the first
trained block are the same in every epoch, for every seed and learning rate. They are stored as an
artifact and fed to that block; the blocks before it are not run.
"""

import logging
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.filesize import decimal
from torch import Tensor, nn
from transformers import PreTrainedModel

from hyperfitting.errors import UserError
from hyperfitting.models import layers, trainable
from hyperfitting.models.base import BaseModel
from hyperfitting.models.layers import override_forward, replace_blocks
from hyperfitting.progress import ProgressReporter
from hyperfitting.runtime import memory
from hyperfitting.runtime.distributed import SINGLE_PROCESS, DistContext, local_tensor
from hyperfitting.runtime.files import refresh_directory
from hyperfitting.runtime.numerics import matmul_precision
from hyperfitting.runtime.transfer import memmap_to_device, rows_to_device, to_device
from hyperfitting.store.artifact import Artifact, DamagedArtifactError, Store
from hyperfitting.training.config import TrainingConfig
from hyperfitting.training.flops import activation_bytes, is_cached_on_gpu

VERSION = 1
_FILE = "train.npy"
# dtype of the file and of its content: numpy has no bfloat16, so its bits are stored
_DTYPES = {"float32": (np.float32, torch.float32), "bfloat16": (np.int16, torch.bfloat16)}
_PROBE_TOKENS = 8

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CacheLocation:
    """The store of activation caches, and the ids of the sequences and the model."""

    store: Store
    inputs: dict[str, str]

    def artifact(
        self, cfg: TrainingConfig, n_blocks: int, dtype: str, dist: DistContext = SINGLE_PROCESS
    ) -> Artifact:
        """Return the handle of the output of the first ``n_blocks`` blocks, of weights of a dtype.

        Float32 weights that several processes all-gather in bfloat16 give bfloat16 states.
        """
        is_bfloat16 = dist.world_size > 1 and cfg.gathers_bfloat16(dtype)
        return self.store.artifact(
            "activation_cache",
            version=VERSION,
            config={
                "n_blocks": n_blocks,
                "dtype": cfg.trainer.activation_cache,
                "precision": cfg.trainer.precision,
                **({"hidden_states": "bfloat16"} if is_bfloat16 else {}),
            },
            inputs=self.inputs,
        )


@dataclass(frozen=True)
class ActivationCache:
    """The output of a model's frozen blocks for every training sequence."""

    block_list: nn.ModuleList
    n_frozen: int
    """How many of the blocks are frozen."""
    activations: NDArray[Any] | Tensor
    """(N, T, H) as stored: memory-mapped, or on the GPU if it has room."""
    dtype: torch.dtype

    def read(self, rows: NDArray[np.int64], like: Tensor) -> Tensor:
        """Return the activations (B, T, H) of some sequences, on the device and dtype of a tensor.

        Args:
            rows: (B,) indices of training sequences.
            like: tensor whose device and dtype the result takes, such as a parameter.
        """
        if isinstance(self.activations, Tensor):
            stored = self.activations[to_device(rows, like.device)]
        else:
            stored = rows_to_device(self.activations, rows, like.device)
        return stored.view(self.dtype).to(like.dtype)

    def replay(self, rows: NDArray[np.int64], like: Tensor) -> AbstractContextManager[None]:
        """Make the frozen blocks return the activations of some sequences, inside this context."""
        return replace_blocks(self.block_list, range(self.n_frozen), self.read(rows, like))


def build_activation_cache(
    cfg: TrainingConfig,
    model: PreTrainedModel,
    dtype: str,
    tokens: NDArray[np.int32],
    location: CacheLocation,
    progress: ProgressReporter,
    dist: DistContext = SINGLE_PROCESS,
) -> ActivationCache | None:
    """Return the activation cache, computed if it does not exist; None if none is to be used.

    Every rank calls this: all of them compute their shards, and rank 0 writes.

    Args:
        cfg: the training.
        model: on its device.
        dtype: of its weights, whatever they are all-gathered as.
        tokens: (N, T) training sequences.
        location: where the cache is stored.
        progress: displays the tokens done.
        dist: the processes that train.
    """
    if not cfg.uses_activation_cache:
        return None
    block_list = layers.blocks(model)
    n_frozen = len(block_list) - cfg.tuning.last_blocks
    if n_frozen == 0:
        return None
    tokens = layers.input_tokens(model, tokens)
    if not _can_replay(model, n_frozen, tokens[:1]):
        log.warning(
            "no activation cache: %s does not give the same outputs from stored activations of its "
            "frozen blocks; all blocks are run in every epoch",
            type(model).__name__,
        )
        return None
    artifact = location.artifact(cfg, n_frozen, dtype, dist)
    _ensure(artifact, cfg, model, n_frozen, tokens, progress, dist)
    activations = np.load(artifact.folder / _FILE, mmap_mode="r", allow_pickle=False)
    if _has_room(model, activations.nbytes):
        activations = memmap_to_device(activations, model.device)
    return ActivationCache(
        block_list, n_frozen, activations, _DTYPES[cfg.trainer.activation_cache][1]
    )


def _has_room(model: PreTrainedModel, n_bytes: int) -> bool:
    """Return whether so much fits on the model's GPU, before its gradients and moments exist."""
    if model.device.type != "cuda":
        return False
    trained = sum(local_tensor(p).nbytes for p in model.parameters() if p.requires_grad)
    return is_cached_on_gpu(n_bytes, memory.free_bytes(model.device), trained)


def _ensure(
    artifact: Artifact,
    cfg: TrainingConfig,
    model: PreTrainedModel,
    n_frozen: int,
    tokens: NDArray[np.int32],
    progress: ProgressReporter,
    dist: DistContext,
) -> None:
    """Build the artifact unless it exists undamaged; every rank calls this."""
    if dist.is_main:
        with suppress(DamagedArtifactError):  # a damaged one is set aside, and built again here
            artifact.file(_FILE)
    with artifact.building() if dist.is_main else nullcontext() as work:
        if dist.broadcast_object(work is not None):
            shards = _compute(cfg, model, n_frozen, tokens, dist)
            if work is not None:
                _write(work / _FILE, cfg, tokens, model.config.hidden_size, shards, progress)
            else:
                for _ in shards:
                    pass
    dist.barrier()
    if not dist.is_main:
        refresh_directory(artifact.folder.parent)


def check_disk_space(
    cfg: TrainingConfig,
    base: BaseModel,
    shape: tuple[int, ...],
    location: CacheLocation,
    dist: DistContext = SINGLE_PROCESS,
) -> None:
    """Refuse, before any work, an activation cache that the disk has no space for.

    Args:
        cfg: the training.
        base: its model.
        shape: (N, T) of the training sequences.
        location: where the cache is stored.
        dist: the processes that train.

    Raises:
        UserError: there is too little space, and the cache does not exist yet.
    """
    if not cfg.uses_activation_cache:
        return
    n_blocks, hidden_size = base.shape()
    store = location.store.folder
    disk = next(folder for folder in (store, *store.parents) if folder.is_dir())
    needed, free = activation_bytes(cfg, shape, hidden_size), shutil.disk_usage(disk).free
    exists = location.artifact(cfg, n_blocks - cfg.tuning.last_blocks, base.dtype, dist).exists
    if needed > 0.95 * free and not exists:
        raise UserError(
            f"the activations of the frozen blocks ({shape[0]:,} x {shape[1]} tokens x "
            f"{hidden_size}) take {decimal(needed)}; the disk of {disk} has {decimal(free)}",
            field="trainer.activation_cache",
            value=cfg.trainer.activation_cache,
            hint="trainer.activation_cache=bfloat16 (half of it) or off, a lower dataset.n_train, "
            "or store=DIR on a larger disk",
        )


@torch.no_grad()
def _activations(model: PreTrainedModel, n_frozen: int, tokens: Tensor) -> Tensor:
    """Return the input (B, T, H) of block ``n_frozen``, without running the blocks from it on."""
    block_list = layers.blocks(model)
    inputs: list[Tensor] = []

    def record(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        inputs.append(hidden_states)
        return hidden_states

    with (
        replace_blocks(block_list, range(n_frozen + 1, len(block_list)), None),
        override_forward({block_list[n_frozen]: record}),
    ):
        _output_layer_inputs(model, tokens)
    return inputs[0]


def _output_layer_inputs(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Return the hidden states (B, T, H) that enter the output layer, as the model returns them."""
    layer = model.get_output_embeddings()
    with override_forward({layer: lambda states: states} if layer is not None else {}):
        states: Tensor = model(input_ids=tokens, use_cache=False).logits
    return states


@torch.no_grad()
def _can_replay(model: PreTrainedModel, n_frozen: int, tokens: NDArray[np.int32]) -> bool:
    """Return whether the output is the same when the frozen blocks are replaced (first tokens)."""
    start = torch.as_tensor(tokens[:, :_PROBE_TOKENS], dtype=torch.long, device=model.device)
    was_training = model.training
    model.eval()
    try:
        expected = _output_layer_inputs(model, start)
        activations = _activations(model, n_frozen, start)
        with replace_blocks(layers.blocks(model), range(n_frozen), activations):
            replayed = _output_layer_inputs(model, start)
        return bool(torch.equal(replayed, expected))
    except (TypeError, IndexError, AttributeError, RuntimeError):  # blocks with another signature
        return False
    finally:
        model.train(was_training)


def _compute(
    cfg: TrainingConfig,
    model: PreTrainedModel,
    n_frozen: int,
    tokens: NDArray[np.int32],
    dist: DistContext,
) -> Iterator[NDArray[Any]]:
    """Yield the activations of one batch of sequences after another: (B, T, H) as stored."""
    dtype = _DTYPES[cfg.trainer.activation_cache][1]
    was_training = model.training
    model.eval()
    step = cfg.hardware.evaluation_batch_size * dist.world_size
    for start in range(0, len(tokens), step):
        rows = tokens[start : start + step]
        batch = torch.as_tensor(dist.shard(rows)[0], dtype=torch.long)
        precision = cfg.trainer.precision
        with trainable.autocast(model, precision), matmul_precision(model.device, precision):
            states = _activations(model, n_frozen, batch.to(model.device))
        stored = states.to(dtype).cpu()
        stored = stored if dtype == torch.float32 else stored.view(torch.int16)
        yield dist.all_gather(stored.numpy(), len(rows))
    model.train(was_training)


def _write(
    path: Path,
    cfg: TrainingConfig,
    tokens: NDArray[np.int32],
    hidden_size: int,
    batches: Iterator[NDArray[Any]],
    progress: ProgressReporter,
) -> None:
    size = decimal(activation_bytes(cfg, tokens.shape, hidden_size))
    dtype = _DTYPES[cfg.trainer.activation_cache][0]
    shape = (*tokens.shape, hidden_size)
    out = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    done = 0
    title = f"building the activation cache ({size} in the store)"
    with progress(title, tokens.size, "tokens") as advance:
        for batch in batches:
            out[done : done + len(batch)] = batch
            done += len(batch)
            advance(batch.shape[0] * batch.shape[1])
    out.flush()
