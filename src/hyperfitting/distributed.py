"""Several processes that train one model: rank 0 leads, the others help where it asks them to.

Rank 0 is `hyperfit` itself: it alone composes, keeps the store, tracks and shows. When a training
begins it tells the others the config; they load their shards, go through the same loop, and write
nothing but their part of a checkpoint. So nothing but the training knows that there are several.

On one machine rank 0 starts its helpers (`hardware.ranks`). On several, torchrun starts all:

    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-endpoint HOST:29500 \\
        -m hyperfitting.run hardware=fsdp …

with the store on a file system that all of them see.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from hyperfitting import failures
from hyperfitting.config import HardwareConfig
from hyperfitting.errors import UserError

_PATIENCE = timedelta(days=30)
"""How long helpers wait for a word: rank 0 may generate for hours before it trains."""
_GRACE = 10.0
"""Seconds in which a collective should notice by itself that a process has died."""
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class Crew:
    """The processes that train together, as one of them sees them."""

    rank: int = 0
    size: int = 1
    words: dist.ProcessGroup | None = None
    """For words, which may be long in coming."""

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which writes and shows."""
        return self.rank == 0

    def tell(self, word: Any) -> None:
        """Tell the others something that JSON can say. Rank 0 does; they `hear`."""
        if self.size > 1:
            said = torch.frombuffer(bytearray(json.dumps(word).encode()), dtype=torch.uint8)
            dist.broadcast(torch.tensor([len(said)]), 0, self.words)
            dist.broadcast(said, 0, self.words)

    def hear(self) -> Any:
        """Return what rank 0 tells next."""
        length = torch.zeros(1, dtype=torch.long)
        dist.broadcast(length, 0, self.words)
        said = torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(said, 0, self.words)
        return json.loads(said.numpy().tobytes())

    def agreed(self, word: Any) -> Any:
        """Return what rank 0 says here, on all of them."""
        if not self.leads:
            return self.hear()
        self.tell(word)
        return word

    def wait(self) -> None:
        """Go on when all are here."""
        if self.size > 1:
            dist.barrier(self.words)

    def total(self, part: Tensor) -> Tensor:
        """Return the sum of what each has."""
        if self.size > 1:
            part = part.clone()
            dist.all_reduce(part)
        return part

    def share(self, rows: NDArray[Any]) -> tuple[NDArray[Any], int]:
        """Return this process's share of rows (N, …), and how many of it count.

        All shares have one length, so that all do as many passes: one that is short is filled up
        with rows that do not count.
        """
        if self.size == 1:
            return rows, len(rows)
        length = -(-len(rows) // self.size)
        mine = rows[self.rank * length : (self.rank + 1) * length]
        filling = np.broadcast_to(rows[:1], (length - len(mine), *rows.shape[1:]))
        return np.concatenate([mine, filling]), len(mine)

    def gathered(self, share: NDArray[Any], n: int) -> NDArray[Any]:
        """Return all ``n`` rows again, of what was made of each share."""
        if self.size == 1:
            return share
        mine = torch.from_numpy(np.ascontiguousarray(share))
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(parts, mine, self.words)
        found: NDArray[Any] = torch.cat(parts).numpy()[:n]
        return found


ALONE = Crew()
"""One process, as ever."""


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor that may lie in shards; all processes must ask for it."""
    from torch.distributed.tensor import DTensor  # takes a second to import

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that is on this process, in the same memory."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def in_one_place(model: nn.Module) -> bool:
    """Return whether a model is neither in shards nor spread over devices."""
    from torch.distributed.tensor import DTensor

    places = set((getattr(model, "hf_device_map", None) or {}).values())
    return len(places) < 2 and not isinstance(next(model.parameters()), DTensor)


def gather_anew(model: nn.Module) -> None:
    """Forget what a pass has brought together of a model's shards: they are about to change."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def by_torchrun() -> bool:
    """Return whether torchrun has started this process, and others with it."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def helps() -> bool:
    """Return whether this process was started to help another."""
    return by_torchrun() and int(os.environ["RANK"]) > 0


def ranks(cfg: HardwareConfig) -> int:
    """Return how many processes train together.

    Raises:
        UserError: there are GPUs, and fewer than that, or they are not to be used.
    """
    if by_torchrun():
        return int(os.environ["WORLD_SIZE"])
    gpus = torch.cuda.device_count()
    if gpus and cfg.device == "cpu" and cfg.ranks != 1:
        raise UserError(
            "several processes take the GPUs where there are any", field="hardware.ranks",
            value=cfg.ranks, valid="1 with hardware.device=cpu",
            hint="hide the GPUs: CUDA_VISIBLE_DEVICES= hyperfit …",
        )  # fmt: skip
    if cfg.ranks is not None and 0 < gpus < cfg.ranks:
        raise UserError(
            "more than this machine has GPUs", field="hardware.ranks", value=cfg.ranks,
            valid=f"at most {gpus}", hint="torchrun, for several machines",
        )  # fmt: skip
    return cfg.ranks or max(1, gpus)


def join(rank: int, size: int, local: int, address: str) -> Crew:
    """Become one of the processes that meet at an address, on GPU number ``local`` if there are."""
    if torch.cuda.is_available():
        torch.cuda.set_device(local)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
        init_method=address,
        rank=rank,
        world_size=size,
        timeout=None if torch.cuda.is_available() else _PATIENCE,
    )
    return Crew(rank, size, dist.new_group(backend="gloo", timeout=_PATIENCE))


def join_torchrun() -> Crew:
    """Become one of the processes that torchrun has started; the same again if called again."""
    global _by_torchrun  # noqa: PLW0603 - as the process group is
    if _by_torchrun is None:
        rank, size, local = (int(os.environ[k]) for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        _by_torchrun = join(rank, size, local, "env://")
    return _by_torchrun


_by_torchrun: Crew | None = None


def dismiss() -> None:
    """Tell the helpers that torchrun has started, if it has, that there is no more to do."""
    if by_torchrun() and not helps():
        join_torchrun().tell(None)
        dist.destroy_process_group()


@contextmanager
def crew(cfg: HardwareConfig) -> Iterator[Crew]:
    """Have as many processes as a config asks for, in this context; rank 0 calls this.

    Raises:
        UserError: a helper died, or there cannot be so many.
    """
    n = ranks(cfg)
    if n == 1:
        yield ALONE
    elif by_torchrun():
        yield join_torchrun()
    else:
        with _Helpers(n, cfg.threads or max(1, (os.cpu_count() or 1) // n)).at_work() as together:
            yield together


class _Helpers:
    """Processes that this one has started; if one dies, this one must not wait for it for ever."""

    def __init__(self, n: int, threads: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self._n, self._threads = n, threads
        self._processes: list[subprocess.Popen[bytes]] = []
        self._over = threading.Event()

    @contextmanager
    def at_work(self) -> Iterator[Crew]:
        """Have them help in this context."""
        before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        self._processes = [self._begun(rank) for rank in range(1, self._n)]
        threading.Thread(target=self._watch, daemon=True).start()
        try:
            together = join(0, self._n, 0, f"tcp://127.0.0.1:{self._port}")
            yield together
            together.tell(None)
        except RuntimeError as error:
            death = self._death()
            if death is None:
                raise
            raise death from error
        finally:
            self._over.set()
            if dist.is_initialized():
                dist.destroy_process_group()
            self._end()
            torch.set_num_threads(before)

    def _begun(self, rank: int) -> subprocess.Popen[bytes]:
        place: dict[str, str | int] = {
            "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self._n,
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": self._port,
            **dict.fromkeys(_THREADS, self._threads),
        }  # fmt: skip
        return subprocess.Popen(
            [sys.executable, "-m", "hyperfitting.training.helper"],
            env=os.environ | {name: str(value) for name, value in place.items()},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )

    def _death(self) -> UserError | None:
        """Return what to tell a user of a helper that has died, if one has."""
        for process in self._processes:
            with suppress(subprocess.TimeoutExpired):  # it may be about to
                process.wait(1.0)
        # one that was killed takes the others with it: they fail
        ended = [(p.returncode, rank) for rank, p in enumerate(self._processes, 1) if p.returncode]
        if not ended:
            return None
        code, rank = min(ended)
        how = f"failed (exit status {code})"
        if code < 0:
            how = f"was killed ({signal.Signals(-code).name})"
        return UserError(
            f"rank {rank} of {self._n} {how}: all have ended",
            hint="the same command goes on from the last checkpoint; why a rank failed stands "
            "above; if memory ran out: a lower hardware.micro_batch_size, "
            "hardware.activation_checkpointing=true, or more hardware.ranks",
        )

    def _watch(self) -> None:
        """End this process if a helper has died and the collective it was in does not notice."""
        while not self._over.wait(0.5):
            if any(process.poll() for process in self._processes):
                if self._over.wait(_GRACE):
                    return
                failures.tell(f"error: {self._death()}")
                os._exit(1)

    def _end(self) -> None:
        for process in self._processes:
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def end_with(parent: int) -> None:
    """Have this process end when the one that has started it does, whatever it waits for."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
