"""The state of an unfinished training, so that a killed one goes on to the same numbers.

One file, written after an epoch beside the last one and renamed over it: never more than two on
disk, never half a one. After each epoch, unless writing took more than a twentieth of the time
since. It is read without running code (`weights_only`).
"""

import logging
import pickle
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hyperfitting.store import replacing

log = logging.getLogger(__name__)
_PATIENCE = 20.0
"""Seconds of training for each second of writing."""
Row = dict[str, float]


@dataclass
class Progress:
    """How far training has come."""

    epoch: int = 0
    """Epochs done."""
    history: list[Row] = field(default_factory=list)
    """Rows so far: one an update (`step`, `train/loss`), one an epoch (with `epoch`, `val/…`)."""
    best_val: float = float("inf")
    """Lowest validation loss so far, in nats."""


class Checkpoint:
    """The file that holds an unfinished training."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "checkpoint.pt"
        self._cost = 0.0
        self._last = time.monotonic()

    def is_due(self) -> bool:
        """Return whether so much was done since the last one that writing is little beside it."""
        return time.monotonic() - self._last >= _PATIENCE * self._cost

    def save(self, progress: Progress, state: dict[str, Any]) -> None:
        """Replace the checkpoint by the present state."""
        start = time.monotonic()
        with replacing(self.path) as beside, beside.open("wb") as file:
            torch.save({"progress": vars(progress), **state}, file)
        self._last = time.monotonic()
        self._cost = self._last - start

    def load(self) -> dict[str, Any] | None:
        """Return the state that `save` was given, and its `progress`; none if none can be read."""
        if not self.path.is_file():
            return None
        try:
            saved: dict[str, Any] = torch.load(self.path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            log.warning("%s cannot be read (%s): training starts anew", self.path, error)
            self.remove()
            return None
        return {**saved, "progress": Progress(**saved["progress"])}

    def remove(self) -> None:
        """Delete it: training is done, or it cannot be read."""
        self.path.unlink(missing_ok=True)
