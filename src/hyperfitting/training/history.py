"""The metrics of a training on disk: `history.jsonl` and `validation.json`.

Rows are appended as they come, so that another process can follow them. Validation metrics are a
file of their own, since how often a model is validated changes nothing about the tuned model.
"""

import json
import operator
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from hyperfitting.progress import MetricsRow
from hyperfitting.runtime.distributed import SINGLE_PROCESS, DistContext
from hyperfitting.runtime.files import fsync_path, write_json, write_text
from hyperfitting.training.config import TrainerConfig

HISTORY_FILE = "history.jsonl"
"""One row per optimizer step (`step`, `train/loss`) and, after those of an epoch, one for it (with
`epoch` too)."""
VALIDATION_FILE = "validation.json"
"""Validation metrics by epoch."""
Validations = dict[int, MetricsRow]
_TARGETS = {
    "target_loss": ("train/loss", operator.le),
    "target_accuracy": ("train/accuracy", operator.ge),
    "target_entropy": ("val/entropy", operator.le),
    "target_ttr": ("gen/ttr", operator.ge),
}
"""Of the trainer's targets, the metric, and when it has reached the target."""


class TrainingHistory:
    """Metrics of a training in progress, held by every rank and written by rank 0.

    Args:
        folder: of the files.
        dist: the processes that train.
        n_rows: rows to keep of `history.jsonl`; those after them are dropped.
        n_epochs: epochs that are complete; validations of later ones are dropped.

    Raises:
        ValueError: there are fewer rows than ``n_rows``.
    """

    def __init__(
        self, folder: Path, dist: DistContext = SINGLE_PROCESS, n_rows: int = 0, n_epochs: int = 0
    ) -> None:
        self._path, self._validation_path = folder / HISTORY_FILE, folder / VALIDATION_FILE
        self._dist = dist
        rows = read_rows(self._path) if dist.is_main else []
        validations = read_validations(self._validation_path) if dist.is_main else {}
        self.rows: list[MetricsRow] = dist.broadcast_object(rows[:n_rows])
        if len(self.rows) < n_rows:
            raise ValueError(f"{self._path} has {len(self.rows)} rows instead of {n_rows}")
        kept = {epoch: row for epoch, row in validations.items() if epoch <= n_epochs}
        self.validations: Validations = dist.broadcast_object(kept)
        if dist.is_main:
            self._write_validations()
            # replaces the file: `training.launch` reads it only once it is a new one
            write_text(self._path, "".join(map(_jsonl, self.rows)))

    @property
    def best_val(self) -> float:
        """The lowest validation loss so far, in nats; infinite before the first."""
        return min((row["val/loss"] for row in self.validations.values()), default=float("inf"))

    def step_losses(self, n: int) -> list[float]:
        """Return the training losses of the last ``n`` rows."""
        return [row["train/loss"] for row in self.rows[len(self.rows) - n :]]

    def append(self, row: MetricsRow) -> None:
        """Append the row of an optimizer step, or of an epoch after its validation."""
        self.rows.append(row)
        if self._dist.is_main:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(_jsonl(row))

    def add_validation(self, epoch: int, metrics: MetricsRow) -> None:
        """Record the validation metrics of an epoch."""
        self.validations[epoch] = metrics
        if self._dist.is_main:
            self._write_validations()

    def sync(self) -> None:
        """Flush all rows to disk."""
        if self._dist.is_main:
            fsync_path(self._path)

    def _write_validations(self) -> None:
        write_json(self._validation_path, {str(e): row for e, row in self.validations.items()})


def is_validated(row: MetricsRow, trainer: TrainerConfig) -> bool:
    """Return whether the model is validated after the epoch of a row."""
    return is_last(row, trainer) or row["epoch"] % trainer.eval_every_epochs == 0


def is_last(row: MetricsRow, trainer: TrainerConfig) -> bool:
    """Return whether training ends with the epoch of a row.

    Args:
        row: of an epoch; with its validation metrics if it was validated.
        trainer: for the number of epochs and the targets.
    """
    reached = (
        at_target(row[key], target)
        for name, (key, at_target) in _TARGETS.items()
        if key in row and (target := getattr(trainer, name)) is not None
    )
    return row["epoch"] == trainer.epochs or any(reached)


def read_rows(path: Path) -> list[MetricsRow]:
    """Return the rows of `history.jsonl`, without validation metrics; none if it does not exist.

    A last line that was only half written is dropped.
    """
    text = path.read_text("utf-8") if path.exists() else ""
    return parse_rows(text[: text.rfind("\n") + 1])


def parse_rows(text: str) -> list[MetricsRow]:
    """Return the rows of complete lines of `history.jsonl`."""
    return [json.loads(line) for line in text.splitlines()]


def read_validations(path: Path) -> Validations:
    """Return the validation metrics of `validation.json` by epoch; none if it does not exist."""
    if not path.exists():
        return {}
    saved: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return {int(epoch): row for epoch, row in saved.items()}


def merge(rows: Iterable[MetricsRow], validations: Validations) -> Iterator[MetricsRow]:
    """Yield the rows of a history, with the validation metrics in those of their epochs."""
    for row in rows:
        yield row | validations.get(int(row["epoch"]), {}) if "epoch" in row else row


def read(folder: Path) -> Iterator[MetricsRow]:
    """Yield the rows of a complete training, with validation metrics."""
    validations = read_validations(folder / VALIDATION_FILE)
    yield from merge(read_rows(folder / HISTORY_FILE), validations)


def _jsonl(row: MetricsRow) -> str:
    return json.dumps(row, allow_nan=False) + "\n"
