"""The state of an unfinished training, so that a killed one goes on to the same numbers.

A file of each process that trains, written beside those of the last and renamed: never half a one,
and the old ones go when all of the new are there. After each epoch, unless writing took more than a
twentieth of the time since; and when the process is told to end. It is read without running code
(`weights_only`), by as many processes as there are then: each takes the rows that it needs.
"""

import logging
import pickle
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map

from hyperfitting.distributed import ALONE, Crew
from hyperfitting.errors import UserError
from hyperfitting.progress import Row
from hyperfitting.store import look_anew, replacing

log = logging.getLogger(__name__)
_PATIENCE = 20.0
"""Seconds of training for each second of writing."""
_NAME = re.compile(r"checkpoint-(\d+)\.(\d+)-of-(\d+)\.pt")
"""Updates done, rank, and number of processes."""


@dataclass
class Progress:
    """How far training has come."""

    epoch: int = 0
    """Epochs done."""
    step: int = 0
    """Updates done."""
    history: list[Row] = field(default_factory=list)
    """Rows so far: one an update (`step`, `train/loss`), one an epoch (with `epoch`, `val/…`)."""
    best_val: float = float("inf")
    """Lowest validation loss so far, in nats."""


class Checkpoint:
    """The files that hold an unfinished training."""

    def __init__(self, folder: Path, crew: Crew = ALONE) -> None:
        self._folder, self._crew = folder, crew
        self._cost = 0.0
        self._last = time.monotonic()

    def is_due(self) -> bool:
        """Return whether so much was done since the last one that writing is little beside it."""
        due = time.monotonic() - self._last >= _PATIENCE * self._cost
        return bool(self._crew.agreed(due))

    def save(self, progress: Progress, state: dict[str, Any]) -> None:
        """Replace the checkpoint by the present state, `parameters` by name and more."""
        start = time.monotonic()
        rank, size = self._crew.rank, self._crew.size
        path = self._folder / f"checkpoint-{progress.step}.{rank}-of-{size}.pt"
        rows = {name: _rows(parameter) for name, parameter in state["parameters"].items()}
        with replacing(path) as beside, beside.open("wb") as file:
            torch.save({"progress": vars(progress), "rows": rows, **tree_map(_here, state)}, file)
        self._crew.wait()
        if self._crew.leads:
            self._remove(but=progress.step)
        self._last = time.monotonic()
        self._cost = self._last - start

    def files(self) -> list[Path]:
        """Return the newest that are all there, by rank; else none."""
        found: dict[tuple[int, int], dict[int, Path]] = {}
        look_anew(self._folder)
        for path in self._folder.iterdir() if self._folder.is_dir() else ():
            if name := _NAME.fullmatch(path.name):
                step, rank, size = map(int, name.groups())
                found.setdefault((step, size), {})[rank] = path
        for (_, size), paths in sorted(found.items(), reverse=True):
            if len(paths) == size:
                return [paths[rank] for rank in range(size)]
        return []

    def load(self, parameters: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """Return the state that `save` was given, and its `progress`; none if none can be read.

        Args:
            parameters: what is trained now, in its order; each process gets its rows of them, and
                of the optimizer's state of them.

        Raises:
            UserError: the optimizer's state cannot be shared out anew.
        """
        names = self._crew.agreed([path.name for path in self.files()])
        if not names:
            return None
        needed = [names[self._crew.rank]] if len(names) == self._crew.size else names
        saved, problem = [], 0
        try:
            for name in needed:
                saved.append(torch.load(self._folder / name, weights_only=True, map_location="cpu"))
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            log.warning("%s cannot be read (%s): training starts anew", self._folder / name, error)
            problem = 1
        if int(self._crew.total(torch.tensor(problem))):
            self.remove()
            return None
        return {**_shared_out(saved, parameters), "progress": Progress(**saved[0]["progress"])}

    def remove(self) -> None:
        """Delete it: training is done, or it cannot be read."""
        self._crew.wait()
        if self._crew.leads:
            self._remove()

    def _remove(self, but: int | None = None) -> None:
        look_anew(self._folder)
        for path in self._folder.iterdir():
            name = _NAME.fullmatch(path.name)
            if name and int(name[1]) != but:
                path.unlink(missing_ok=True)


def _here(value: Any) -> Any:
    """Return the part of a tensor that is on this process."""
    return value.to_local() if isinstance(value, DTensor) else value


def _rows(parameter: Tensor) -> tuple[int, int, int]:
    """Return the first row that is here, how many are, and how many there are in all."""
    total = len(parameter) if parameter.dim() else 1
    if not isinstance(parameter, DTensor):
        return 0, total, total
    each = -(-total // parameter.device_mesh.size())  # as FSDP shares them out
    first = min(parameter.device_mesh.get_local_rank() * each, total)
    return first, len(parameter.to_local()), total


def _shared_out(
    saved: Sequence[dict[str, Any]], parameters: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Return the state of this process, from what some processes saved, or from its own."""
    first = saved[0]

    def here(name: str, of: Sequence[Tensor]) -> Tensor:
        """Return the rows that are here now, from what each process had."""
        pieces = [(*one["rows"][name], tensor) for one, tensor in zip(saved, of, strict=True)]
        return _cut(pieces, *_rows(parameters[name])[:2])

    state: dict[int, dict[str, Any]] = {}
    for number, name in enumerate(parameters):
        states = [one["optimizer"]["state"].get(number, {}) for one in saved]
        shape = first["parameters"][name].shape
        state[number] = {
            key: here(name, [one[key] for one in states])
            if isinstance(value, Tensor) and value.shape == shape
            else value
            for key, value in states[0].items()
        }
    return {
        **{key: value for key, value in first.items() if key not in ("rows", "progress")},
        "parameters": {
            name: here(name, [one["parameters"][name] for one in saved]) for name in parameters
        },
        "optimizer": {**first["optimizer"], "state": {n: s for n, s in state.items() if s}},
    }


def _cut(pieces: Sequence[tuple[int, int, int, Tensor]], start: int, length: int) -> Tensor:
    """Return rows from pieces (first row, rows, all rows, tensor) that lie one after another.

    Raises:
        UserError: they are of a kind that cannot be cut.
    """
    at, n, total, tensor = pieces[0]
    if (at, n) == (start, length):
        return tensor
    if type(tensor) is not Tensor:
        raise UserError(
            f"the optimizer's state ({type(tensor).__name__}) cannot be shared out anew",
            field="hardware.ranks",
            valid="as many as before",
            hint="or delete the checkpoint, to begin anew",
        )
    if n == total:  # each has all of it
        return tensor[start : start + length].clone()
    return torch.cat(
        [part[max(start - at, 0) : max(start + length - at, 0)] for at, _, _, part in pieces]
    )
