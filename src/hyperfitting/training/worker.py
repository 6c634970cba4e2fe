"""What a rank of a distributed training runs: the same `train` as a single process.

On one machine `training.launch` starts all ranks (`run_rank`). Under torchrun every rank is a
`hyperfitting.run`: rank 0 runs the pipeline, and the others `run_worker_rank`.
"""

import logging
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from hyperfitting.data.sequences import load_sequences
from hyperfitting.errors import UserError
from hyperfitting.models.base import BaseModel
from hyperfitting.models.config import TuningConfig
from hyperfitting.progress import MetricsRow, ProgressReporter, no_op
from hyperfitting.runtime import distributed, memory, preemption, processes
from hyperfitting.runtime.config import HardwareConfig
from hyperfitting.runtime.device import setup_torch
from hyperfitting.runtime.distributed import DistContext
from hyperfitting.store.artifact import Artifact, Store
from hyperfitting.training.activation_cache import CacheLocation
from hyperfitting.training.config import TrainerConfig, TrainingConfig
from hyperfitting.training.train import train

_SECONDS_TO_REPORT = 10.0
"""In which torchrun terminates this process if rank 0 has failed too."""


@dataclass(frozen=True)
class TrainingTask:
    """A call of `train`, as plain values that can be sent to other processes."""

    cfg: TrainingConfig
    sequences: Artifact
    base: BaseModel
    work: Path
    cache_location: CacheLocation

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON-serializable values. The base model's folder must exist."""
        store = self.cache_location.store
        return {
            "cfg": asdict(self.cfg),
            "sequences": {"kind": self.sequences.kind, "recipe": self.sequences.recipe},
            "base": {
                "id": self.base.id,
                "name": self.base.name,
                "dtype": self.base.dtype,
                "folder": str(self.base.folder()),
            },
            "work": str(self.work),
            "store": str(store.folder),
            "remote_stores": list(map(str, store.remote_stores)),
            "cache_inputs": self.cache_location.inputs,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "TrainingTask":
        """Return the task that `to_json` described."""
        cfg, base = values["cfg"], values["base"]
        folder = Path(base["folder"])
        store = Store(values["store"], values["remote_stores"])
        return cls(
            TrainingConfig(
                TuningConfig(**cfg["tuning"]),
                cfg["optimizer"],
                TrainerConfig(**cfg["trainer"]),
                HardwareConfig(**cfg["hardware"]),
            ),
            Artifact(store.folder, values["sequences"]["kind"], values["sequences"]["recipe"]),
            BaseModel(base["id"], base["name"], base["dtype"], lambda: folder, str(folder)),
            Path(values["work"]),
            CacheLocation(store, values["cache_inputs"]),
        )

    def run(self, dist: DistContext, progress: ProgressReporter = no_op) -> Iterator[MetricsRow]:
        """Train; yields and raises what `train` does.

        No model is left in memory, unless one of several ranks fails, which exits then: to free GPU
        memory would wait for NCCL's collectives, in which the others may never join.
        """
        data = load_sequences(self.sequences)
        has_failed = True
        try:
            yield from train(
                self.cfg, data, self.base, self.work, self.cache_location, dist, progress
            )
            has_failed = False
        finally:  # the evaluation that follows needs the memory, on this GPU and others
            if dist.world_size == 1 or not has_failed:
                memory.collect_unreferenced()


def run_worker_rank() -> None:
    """Run a rank above 0 that torchrun started: take part in each training until there is none.

    Exits with status 1 on an error. It is printed unless rank 0 has it too, reports it and exits:
    torchrun then terminates this process.
    """
    preemption.ignore_signals()  # rank 0 decides
    logging.disable(logging.WARNING)
    dist = distributed.init_process_group()
    try:
        while (values := dist.broadcast_object()) is not None:
            task = TrainingTask.from_json(values)
            setup_torch(task.cfg.hardware)
            for _ in task.run(dist):
                pass
    except preemption.Preempted:
        _wait_for_rank_0()
    except UserError as error:
        _wait_for_rank_0()
        print(f"rank {dist.rank}: error: {error}", file=sys.stderr)
    except Exception as error:
        print(f"rank {dist.rank}: {type(error).__name__}: {error}", file=sys.stderr)
    else:
        return distributed.destroy_process_group()
    distributed.exit_now(1)


def _wait_for_rank_0() -> None:
    """Give rank 0 time to report an error that all ranks have."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(_SECONDS_TO_REPORT)


def run_rank(values: dict[str, Any]) -> None:
    """Run one rank of a training that `training.launch` started, and exit the process.

    An exception is recorded in torch's error file for the launching process to read.

    Args:
        values: what `TrainingTask.to_json` returned.
    """
    errors = get_error_handler()
    errors.initialize()
    try:
        if processes.is_worker_rank():
            preemption.ignore_signals()  # rank 0 decides
            logging.disable(logging.WARNING)
        else:
            preemption.install_handlers()
        task = TrainingTask.from_json(values)
        setup_torch(task.cfg.hardware)
        for _ in task.run(distributed.init_process_group()):
            pass
    except preemption.Preempted as preempted:
        distributed.exit_now(128 + preempted.signum)
    except Exception as error:
        errors.record_exception(error)
        distributed.exit_now(1)
    distributed.destroy_process_group()
