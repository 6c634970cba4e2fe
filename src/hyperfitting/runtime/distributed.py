"""Several processes that train one model, SPMD: the same `train` on every rank.

Rank 0 alone writes artifacts and logs. The environment variables are torchrun's (RANK, WORLD_SIZE,
LOCAL_RANK, MASTER_ADDR, MASTER_PORT), whoever sets them: `training.launch` on one machine
(`hardware.num_processes`), or torchrun on several:

    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-endpoint HOST:29500 \\
        -m hyperfitting.run hardware=fsdp …

with the store on a file system that all machines mount.
"""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from hyperfitting.errors import UserError
from hyperfitting.runtime.config import HardwareConfig
from hyperfitting.runtime.processes import is_distributed, is_worker_rank

_TIMEOUT = timedelta(days=30)
"""Of gloo collectives: under torchrun, ranks above 0 wait for rank 0 to evaluate for hours."""
_NCCL_TIMEOUT = timedelta(hours=2)
"""The first collective waits until every rank has loaded its shards, in tens of minutes."""


@dataclass(frozen=True)
class DistContext:
    """This process among those that train together, with the collectives that training uses."""

    rank: int = 0
    world_size: int = 1
    group: dist.ProcessGroup | None = None
    """Of objects and CPU tensors (gloo); the default group reduces tensors on their device."""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and logs."""
        return self.rank == 0

    def broadcast_object(self, value: Any = None) -> Any:
        """Return rank 0's value on every rank. What the other ranks pass is ignored."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, 0, self.group, torch.device("cpu"))
        return values[0]

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world_size > 1:
            dist.barrier(self.group)

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over all ranks."""
        if self.world_size == 1:
            return tensor
        tensor = tensor.clone()
        dist.all_reduce(tensor)
        return tensor

    def shard(self, rows: NDArray[Any]) -> tuple[NDArray[Any], int]:
        """Return this rank's shard of rows (N, …), and how many rows of it are valid.

        All shards have one length, so that every rank makes as many forward passes: a short one is
        padded with copies of the first row.
        """
        if self.world_size == 1:
            return rows, len(rows)
        length = -(-len(rows) // self.world_size)
        shard = rows[self.rank * length : (self.rank + 1) * length]
        padding = np.broadcast_to(rows[:1], (length - len(shard), *rows.shape[1:]))
        return np.concatenate([shard, padding]), len(shard)

    def all_gather(self, shard: NDArray[Any], n: int) -> NDArray[Any]:
        """Return the first ``n`` rows (n, …) of all ranks' shards, in the order of `shard`."""
        if self.world_size == 1:
            return shard
        local = torch.from_numpy(np.ascontiguousarray(shard))
        shards = [torch.empty_like(local) for _ in range(self.world_size)]
        dist.all_gather(shards, local, self.group)
        rows: NDArray[Any] = torch.cat(shards).numpy()[:n]
        return rows


SINGLE_PROCESS = DistContext()
"""Training in one process: every collective is the identity."""


def full_tensor(tensor: Tensor) -> Tensor:
    """Return a tensor that may be a DTensor as a whole; every rank must call this."""
    from torch.distributed.tensor import DTensor  # takes a second to import

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_tensor(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a tensor that may be a DTensor, sharing its memory."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_sharded(model: nn.Module) -> bool:
    """Return whether a model is sharded over several ranks by FSDP.

    Its parameters do not tell: after a forward pass some stay all-gathered, as plain tensors.
    """
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)


def is_on_one_device(model: nn.Module) -> bool:
    """Return whether a model is neither sharded nor distributed over devices by a device map."""
    devices = set((getattr(model, "hf_device_map", None) or {}).values())
    return len(devices) < 2 and not is_sharded(model)


def reshard(model: nn.Module) -> None:
    """Free a model's all-gathered parameters, before its shards are written to."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def num_processes(hardware: HardwareConfig) -> int:
    """Return how many processes train together.

    Raises:
        UserError: there are GPUs, and fewer than processes, or the device is the CPU.
    """
    if is_distributed():
        return int(os.environ["WORLD_SIZE"])
    gpus = torch.cuda.device_count()
    if gpus and hardware.device == "cpu" and hardware.num_processes != 1:
        raise UserError(
            "several processes use the GPUs if there are any",
            field="hardware.num_processes",
            value=hardware.num_processes,
            valid="1 with hardware.device=cpu",
            hint="hide the GPUs: CUDA_VISIBLE_DEVICES= hyperfit …",
        )
    if hardware.num_processes is not None and 0 < gpus < hardware.num_processes:
        raise UserError(
            "more than this machine has GPUs",
            field="hardware.num_processes",
            value=hardware.num_processes,
            valid=f"at most {gpus}",
            hint="torchrun, for several machines",
        )
    return hardware.num_processes or max(1, gpus)


def init_process_group() -> DistContext:
    """Join the process group that the environment describes; the same context if called again."""
    global _context  # noqa: PLW0603 - torch's default process group is global too
    if _context is None:
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        gpus = torch.cuda.is_available()
        if gpus:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=_NCCL_TIMEOUT if gpus else _TIMEOUT
        )
        _context = DistContext(rank, world_size, dist.new_group(backend="gloo", timeout=_TIMEOUT))
    return _context


_context: DistContext | None = None
_workers_train = False


@contextmanager
def workers_training() -> Iterator[None]:
    """On rank 0 under torchrun: the other ranks take part in a training inside this context.

    After an exception they may be at any of its collectives, which `finish` takes into account.
    """
    global _workers_train  # noqa: PLW0603 - `finish` is called when everything else has ended
    _workers_train = True
    yield
    _workers_train = False


def finish(status: int) -> None:
    """Release the ranks above 0 that torchrun started; rank 0 calls this before it exits.

    They wait for the next training job (`training.worker.run_worker_rank`); None means that there
    is none. If a training has failed, they no longer wait for a job: this process exits at once
    with the status, and torchrun ends them.
    """
    if not is_distributed() or is_worker_rank():
        return
    if _workers_train:
        exit_now(status)
    try:
        init_process_group().broadcast_object(None)
    except RuntimeError:  # a rank has failed and is gone
        exit_now(status)
    destroy_process_group()


def destroy_process_group() -> None:
    """Leave the process group; every rank calls this when it has no collectives left."""
    global _context  # noqa: PLW0603
    if _context is not None:
        dist.destroy_process_group()
        _context = None


def exit_now(status: int) -> NoReturn:
    """Exit this process at once, although its process group is live.

    Python's own exit, and destroying the group, may wait for NCCL's collectives, and so forever
    where another rank does not join them. The system closes the connections to the others.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)
