"""Checkpoints of an unfinished training: a killed one resumes to the same numbers.

Each rank writes one file with its shards, beside those of the last checkpoint, which are deleted
when all new ones exist. Written after an epoch, unless writing took more than a twentieth of the
time since the last one; and on preemption. Read without running code (`weights_only`), by any
number of ranks: each takes the rows of its shards.
"""

import logging
import pickle
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map

from hyperfitting.errors import UserError, exhausted_resource
from hyperfitting.runtime.distributed import SINGLE_PROCESS, DistContext, local_tensor
from hyperfitting.runtime.files import refresh_directory, replacing

log = logging.getLogger(__name__)
_SECONDS_PER_WRITING_SECOND = 20.0
_NAME = re.compile(r"checkpoint-(\d+)\.(\d+)-of-(\d+)\.pt")
"""Optimizer steps done, rank, and number of ranks."""


@dataclass(frozen=True)
class TrainProgress:
    """How far a training is."""

    epoch: int = 0
    """Complete epochs."""
    step: int = 0
    """Optimizer steps."""
    n_rows: int = 0
    """Rows of `history.jsonl` up to here; later ones are discarded when training resumes."""


class Checkpoint:
    """The checkpoint files in a folder."""

    def __init__(self, folder: Path, dist: DistContext = SINGLE_PROCESS) -> None:
        self._folder, self._dist = folder, dist
        self._write_seconds = 0.0
        self._last_written = time.monotonic()

    def is_due(self) -> bool:
        """Return whether writing now costs little compared to the time since the last one."""
        elapsed = time.monotonic() - self._last_written
        due = elapsed >= _SECONDS_PER_WRITING_SECOND * self._write_seconds
        return bool(self._dist.broadcast_object(due))

    def save(self, progress: TrainProgress, state: dict[str, Any]) -> None:
        """Write a checkpoint, then delete the previous one.

        Args:
            progress: how far training is.
            state: as `TrainState.state_dict` returns it.
        """
        start = time.monotonic()
        rank, world_size = self._dist.rank, self._dist.world_size
        path = self._folder / f"checkpoint-{progress.step}.{rank}-of-{world_size}.pt"
        rows = {name: _row_range(parameter) for name, parameter in state["parameters"].items()}
        local_state = tree_map(_local, state)
        with replacing(path) as temporary, temporary.open("wb") as file:
            torch.save({"progress": asdict(progress), "rows": rows, **local_state}, file)
        self._dist.barrier()
        if self._dist.is_main:
            self._delete(except_step=progress.step)
        self._last_written = time.monotonic()
        self._write_seconds = self._last_written - start

    def files(self) -> list[Path]:
        """Return the files of the newest complete checkpoint by rank; empty if there is none."""
        by_checkpoint: dict[tuple[int, int], dict[int, Path]] = {}
        refresh_directory(self._folder)
        for path in self._folder.iterdir() if self._folder.is_dir() else ():
            if name := _NAME.fullmatch(path.name):
                step, rank, world_size = map(int, name.groups())
                by_checkpoint.setdefault((step, world_size), {})[rank] = path
        for (_, world_size), paths in sorted(by_checkpoint.items(), reverse=True):
            if len(paths) == world_size:
                return [paths[rank] for rank in range(world_size)]
        return []

    def load(self, parameters: Mapping[str, Tensor]) -> tuple[TrainProgress, dict[str, Any]] | None:
        """Return the progress and state given to `save`; None if there is no readable checkpoint.

        Args:
            parameters: the trained parameters, in their order; each rank gets its rows of them and
                of the optimizer's state.

        Raises:
            UserError: the optimizer's state cannot be resharded to another number of ranks.
        """
        names = self._dist.broadcast_object([path.name for path in self.files()])
        if not names:
            return None
        as_many = len(names) == self._dist.world_size
        saved, failed = [], 0
        for name in [names[self._dist.rank]] if as_many else names:
            try:
                # memory-mapped: resharding reads all files on every rank, and keeps its own rows
                saved.append(
                    torch.load(
                        self._folder / name, weights_only=True, map_location="cpu", mmap=True
                    )
                )
            except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
                if exhausted_resource(error):
                    raise  # the checkpoint is kept
                log.warning(
                    "%s cannot be read (%s): training starts over", self._folder / name, error
                )
                failed = 1
                break
        if int(self._dist.all_reduce_sum(torch.tensor(failed))):
            self.delete()
            return None
        progress = TrainProgress(**saved[0]["progress"])
        if self._dist.is_main:  # what a kill left: the next one needs the space
            self._delete(except_step=progress.step)
        return progress, _reshard(saved, parameters)

    def delete(self) -> None:
        """Delete the checkpoint: training is complete, or it cannot be read."""
        self._dist.barrier()
        if self._dist.is_main:
            self._delete()

    def _delete(self, except_step: int | None = None) -> None:
        refresh_directory(self._folder)
        for path in self._folder.iterdir():
            name = _NAME.fullmatch(path.name)
            if name and int(name[1]) != except_step:
                path.unlink(missing_ok=True)


def _local(value: Any) -> Any:
    return local_tensor(value) if isinstance(value, Tensor) else value


def _row_range(parameter: Tensor) -> tuple[int, int, int]:
    """Return the first row of this rank's shard, its number of rows, and that of the parameter."""
    total = len(parameter) if parameter.dim() else 1
    if not isinstance(parameter, DTensor):
        return 0, total, total
    rows_per_rank = -(-total // parameter.device_mesh.size())  # as FSDP splits it
    first = min(parameter.device_mesh.get_local_rank() * rows_per_rank, total)
    return first, len(parameter.to_local()), total


def _reshard(saved: Sequence[dict[str, Any]], parameters: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return this rank's state, from the checkpoint files of all ranks or from its own."""
    first = saved[0]

    def local_rows(name: str, shards: Sequence[Tensor]) -> Tensor:
        parts = [(*file["rows"][name], shard) for file, shard in zip(saved, shards, strict=True)]
        return _select_rows(parts, *_row_range(parameters[name])[:2])

    optimizer_state: dict[int, dict[str, Any]] = {}
    for index, name in enumerate(parameters):
        states = [file["optimizer"]["state"].get(index, {}) for file in saved]
        shape = first["parameters"][name].shape
        optimizer_state[index] = {
            key: local_rows(name, [state[key] for state in states])
            if isinstance(value, Tensor) and value.shape == shape
            else value
            for key, value in states[0].items()
        }
    return {
        **{key: value for key, value in first.items() if key not in ("rows", "progress")},
        "parameters": {
            name: local_rows(name, [file["parameters"][name] for file in saved])
            for name in parameters
        },
        "optimizer": {
            **first["optimizer"],
            "state": {index: state for index, state in optimizer_state.items() if state},
        },
    }


def _select_rows(shards: Sequence[tuple[int, int, int, Tensor]], start: int, length: int) -> Tensor:
    """Return ``length`` rows from ``start`` on, out of consecutive shards.

    Args:
        shards: first row, number of rows, rows of the whole tensor, and the shard.
        start: first row to return.
        length: rows to return.

    Raises:
        UserError: the shards are of a tensor subclass that cannot be cut.
    """
    first, n_rows, total, tensor = shards[0]
    if (first, n_rows) == (start, length):
        return tensor
    if type(tensor) is not Tensor:
        raise UserError(
            f"the optimizer's state ({type(tensor).__name__}) cannot be resharded",
            field="hardware.num_processes",
            valid="as many as before",
            hint="or delete the checkpoint, to start over",
        )
    if n_rows == total:  # replicated: every rank has all rows
        return tensor[start : start + length].clone()
    return torch.cat(
        [
            shard[max(start - first, 0) : max(start + length - first, 0)]
            for first, _, _, shard in shards
        ]
    )
