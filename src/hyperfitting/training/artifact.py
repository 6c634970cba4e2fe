"""Training as artifacts: the tuned model, and what validation measured on the way.

A tuned model's id holds what changes its weights. How often it is validated does not, so validation
is an artifact of its own:

    sequences, base model -> tuned       last.safetensors, history.jsonl
    tuned                 -> validation  validation.json, best_val.safetensors
"""

import logging
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hyperfitting.fields import id_config
from hyperfitting.models.base import BaseModel
from hyperfitting.models.size import ModelSize, model_size
from hyperfitting.progress import MetricsRow, ProgressReporter, no_op
from hyperfitting.runtime import distributed, processes
from hyperfitting.runtime.device import resolve_device
from hyperfitting.runtime.distributed import SINGLE_PROCESS
from hyperfitting.runtime.files import write_json
from hyperfitting.runtime.numerics import check_precision
from hyperfitting.store.artifact import Artifact, DamagedArtifactError, Step, Store
from hyperfitting.store.hashing import file_sha256
from hyperfitting.training import history
from hyperfitting.training.activation_cache import CacheLocation
from hyperfitting.training.config import TrainingConfig
from hyperfitting.training.flops import SequenceCounts, training_flops
from hyperfitting.training.history import HISTORY_FILE, VALIDATION_FILE
from hyperfitting.training.launch import launch
from hyperfitting.training.train import BEST_VAL_FILE, LAST_FILE
from hyperfitting.training.worker import TrainingTask

TUNED_VERSION = 4
VALIDATION_VERSION = 1

log = logging.getLogger(__name__)


def training_job(
    cfg: TrainingConfig, sequences: Artifact, base: BaseModel, store: Store
) -> "TrainingJob":
    """Return the training of a model on sequences; nothing is built yet."""
    trainer = cfg.trainer.id_config()
    if not cfg.uses_activation_cache:
        del trainer["activation_cache"]
    tuned = store.artifact(
        "tuned",
        version=TUNED_VERSION,
        config={
            "tuning": cfg.tuning.id_config(),
            "optimizer": cfg.optimizer,
            "trainer": trainer,
            **cfg.tuning.dtype_config(base.dtype),
        },
        inputs={"sequences": sequences.id, "model": base.id},
    )
    return TrainingJob(cfg, sequences, base, store, tuned)


class TrainingStep(Step):
    """A step whose build takes the locks of its artifacts itself."""

    def ensure(self) -> Artifact:
        """Train unless that is done, and return the artifact."""
        self.build(self.artifact.folder)
        return self.artifact


@dataclass(frozen=True)
class TrainingJob:
    """A training and its two artifacts."""

    cfg: TrainingConfig
    sequences: Artifact
    base: BaseModel
    store: Store
    tuned: Artifact
    """`last.safetensors`: the trained parameters after the last epoch; `history.jsonl`."""

    @property
    def validation(self) -> Artifact:
        """`validation.json`: metrics by epoch; `best_val.safetensors`: the trained parameters
        after the epoch of lowest validation loss among them."""
        return self._validation_every(self.cfg.trainer.eval_every_epochs)

    def weights(self, checkpoint: str) -> Artifact:
        """Return the artifact that holds a checkpoint: `last` or `best_val`."""
        return {"last": self.tuned, "best_val": self.validation}[checkpoint]

    def steps(self, progress: ProgressReporter) -> dict[str, Step]:
        """Return the steps of both artifacts, by kind; either trains once for both."""

        def build(_: Path) -> None:
            for _row in self.run(progress):
                pass

        def training_flops() -> float:
            return self.flops(model_size(self.base, self.store))

        def validation_flops() -> float:
            return training_flops() if self.tuned.exists else 0.0  # measured by the same training

        return {
            "tuned": TrainingStep(self.tuned, build, training_flops),
            "validation": TrainingStep(self.validation, build, validation_flops),
        }

    @property
    def is_done(self) -> bool:
        """Whether both artifacts exist, here or in a remote store."""
        return all(a.exists or a.remote is not None for a in (self.tuned, self.validation))

    def check_device(self) -> None:
        """Refuse a training that this machine's device cannot compute.

        Raises:
            UserError: the device lacks the precision, or does not exist.
        """
        check_precision(resolve_device(self.cfg.hardware), self.cfg.trainer.precision)

    def run(self, progress: ProgressReporter = no_op) -> Iterator[MetricsRow]:
        """Build the artifacts that do not exist, and yield the metrics of the whole training.

        The rows are the same whether they are computed or read: one per optimizer step, one per
        epoch with its validation.

        Raises:
            DamagedArtifactError: one of the artifacts is damaged.
            Preempted: a signal was received; a checkpoint is written.
            UserError: training diverges, or the config is not possible here.
        """
        with self.tuned.building(lambda: self.flops(model_size(self.base, self.store))) as work:
            # (after a kill between the commits of validation and tuned, all that is left to do is
            # the second commit)
            trains = work is not None and not (_is_complete(work) and self.validation.exists)
            if work is not None and trains:
                yield from self._train(work, progress)
                self._commit_validation(work)
            if work is not None:
                _keep_only(work, LAST_FILE, HISTORY_FILE)
        if not self.validation.exists:
            self._build_validation(progress)
        if not trains:
            yield from self.history()

    def history(self) -> list[MetricsRow]:
        """Return the metrics of the whole training, as `run` yields them.

        Raises:
            DamagedArtifactError: an artifact is damaged or not built.
        """
        rows = history.read_rows(self.tuned.file(HISTORY_FILE))
        validations = history.read_validations(self.validation.file(VALIDATION_FILE))
        return list(history.merge(rows, validations))

    def flops(self, size: ModelSize) -> float:
        """Return the FLOPs of the training, validation included."""
        config: dict[str, Any] = self.sequences.recipe["config"]
        counts = SequenceCounts(config["n_train"], config["n_val"], config["seq_len"])
        return training_flops(self.cfg, counts, size)

    def _train(self, work: Path, progress: ProgressReporter) -> Iterator[MetricsRow]:
        """Train in a folder, in as many processes as configured."""
        self.base.ensure()
        inputs = {"sequences": self.sequences.id, "model": self.base.id}
        task = TrainingTask(
            self.cfg, self.sequences, self.base, work, CacheLocation(self.store, inputs)
        )
        n = distributed.num_processes(self.cfg.hardware)
        if n == 1 or _is_complete(work):
            yield from task.run(SINGLE_PROCESS, progress)
        elif processes.is_distributed():
            dist = distributed.init_process_group()
            with distributed.workers_training():
                dist.broadcast_object(task.to_json())  # to `run_worker_rank`
                yield from task.run(dist, progress)
        else:
            yield from launch(task, n, progress)

    def _commit_validation(self, work: Path) -> None:
        """Build the validation artifact from the files of a complete training."""
        with self.validation.building() as partial:
            if partial is not None:
                _keep_only(partial)
                for name in (VALIDATION_FILE, BEST_VAL_FILE):
                    _link(work / name, partial / name)

    def _build_validation(self, progress: ProgressReporter) -> None:
        """Build the validation artifact of a tuned model that exists."""
        with self.validation.building() as work:
            if work is not None and not self._select_validations(work):
                log.info(
                    "no validation of tuned %s has this schedule: the training is replayed to "
                    "measure it; the tuned model itself is kept",
                    self.tuned.id,
                )
                for _ in self._train(work, progress):
                    pass
                if file_sha256(work / LAST_FILE) != file_sha256(self.tuned.file(LAST_FILE)):
                    log.warning(
                        "the replayed training ended with other weights than tuned %s (built on "
                        "another machine or by another number of processes?): validation metrics "
                        "are those of the replay",
                        self.tuned.id,
                    )
                _keep_only(work, VALIDATION_FILE, BEST_VAL_FILE)

    def _select_validations(self, work: Path) -> bool:
        """Fill the folder from a validation on a finer schedule; return whether there is one."""
        epoch_rows = [
            row for row in history.read_rows(self.tuned.file(HISTORY_FILE)) if "epoch" in row
        ]
        epochs = {
            int(row["epoch"]) for row in epoch_rows if history.is_validated(row, self.cfg.trainer)
        }
        for every in range(1, min(self.cfg.trainer.eval_every_epochs, len(epoch_rows) + 1)):
            finer = self._validation_every(every)
            # a damaged one is set aside when it is read, and counts as missing
            with suppress(DamagedArtifactError):
                validations = history.read_validations(finer.file(VALIDATION_FILE))
                best = min(validations, key=lambda epoch: validations[epoch]["val/loss"])
                if epochs <= set(validations) and best in epochs:
                    _keep_only(work)
                    _link(finer.file(BEST_VAL_FILE), work / BEST_VAL_FILE)
                    selected = {str(e): row for e, row in validations.items() if e in epochs}
                    write_json(work / VALIDATION_FILE, selected)
                    return True
        return False

    def _validation_every(self, n_epochs: int) -> Artifact:
        trainer = replace(self.cfg.trainer, eval_every_epochs=n_epochs)
        return self.store.artifact(
            "validation",
            version=VALIDATION_VERSION,
            config=id_config(trainer, "validation"),
            inputs={"tuned": self.tuned.id, "sequences": self.sequences.id},
        )


def _is_complete(work: Path) -> bool:
    return (work / LAST_FILE).exists()


def _keep_only(folder: Path, *names: str) -> None:
    """Delete the other files of a folder."""
    for path in folder.iterdir():
        if path.name not in names:
            path.unlink()


def _link(source: Path, target: Path) -> None:
    """Hard-link a file, or copy it where the file system has no hard links."""
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)
