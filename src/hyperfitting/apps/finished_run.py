"""A finished run, opened again from its record, with the models that it compared."""

from dataclasses import dataclass
from pathlib import Path

from hyperfitting.config import from_plain
from hyperfitting.errors import UserError
from hyperfitting.models.loading import ModelState
from hyperfitting.pipeline.build import recorded_pipeline
from hyperfitting.pipeline.pipeline import Pipeline
from hyperfitting.record.files import RECORD_FILE, newest_record, read_record
from hyperfitting.record.schema import Record
from hyperfitting.runtime.config import HardwareConfig
from hyperfitting.runtime.device import setup_torch


@dataclass(frozen=True)
class FinishedRun:
    """A record, and the pipeline that it came from."""

    record: Record
    pipeline: Pipeline

    @property
    def tuned(self) -> ModelState | None:
        """The tuned model's weights; none: the run evaluated the base model (`tuning=none`)."""
        model = self.pipeline.models.tuned
        return model.state if model is not None else None


def open_run(path: Path, store: Path | None = None, device: str = "auto") -> FinishedRun:
    """Open a finished run.

    Args:
        path: its folder, its `results.json`, or `latest`: the newest below `outputs/runs`.
        store: holds its artifacts; none: the store that the record names.
        device: of the models, as `hardware.device`.

    Raises:
        UserError: there is no such run, its models are no longer in the store, or this version
            of the software would train another model with its config.
    """
    record = read_record(_record_file(path))
    folder = store or Path(record.artifacts["sequences"]).parents[1]
    hardware = HardwareConfig(device=device)
    config = from_plain(record.config)
    pipeline = recorded_pipeline(config, folder, hardware, setup_torch(hardware))
    if pipeline.models.tuned is not None:
        _check_tuned(record, pipeline.models.tuned.state, folder)
    pipeline.base.ensure()
    return FinishedRun(record, pipeline)


def _check_tuned(record: Record, tuned: ModelState, store: Path) -> None:
    """Refuse a tuned model that is not the record's, or not in the store."""
    recorded = {Path(folder).name for folder in record.artifacts.values()}
    for artifact in tuned.artifacts:
        if artifact.id not in recorded:
            raise UserError(
                "this version of hyperfitting trains another model with the record's config "
                f"(the record has no {artifact.kind} {artifact.id})",
                hint="the version that the record names under `code` or `versions`",
            )
        if not artifact.exists:
            raise UserError(
                "the tuned model is not in this store",
                field="store",
                value=store,
                valid=f"the folder of a store with {artifact.kind}/{artifact.id}",
                hint="--store DIR, or run the same command again, which trains it again",
            )


def _record_file(path: Path) -> Path:
    """Return the record that a path names.

    Raises:
        UserError: it names none.
    """
    if str(path) == "latest":
        return newest_record()
    if (path / RECORD_FILE).is_file():
        return path / RECORD_FILE
    if path.is_file():
        return path
    runs = sorted(str(p.parent) for p in path.glob(f"*/{RECORD_FILE}"))
    raise UserError(
        "is not the folder of a finished run",
        field="RUN",
        value=path,
        valid=f"a folder with {RECORD_FILE}, or latest",
        hint=f"one of its runs, such as {runs[0]}" if runs else "",
    )
