"""A run on Weights & Biases. No failure of it can stop a run or lose a result.

Each failure (no login, no server, no quota, no disk) is logged once, as a warning, and the run
continues: online tracking falls back to offline, and offline to none. Callers never see an
exception.
"""

import logging
import os
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from hyperfitting.formatting import first_line
from hyperfitting.progress import MetricsRow
from hyperfitting.record.files import RECORD_FILE, TEXTS_PAGE
from hyperfitting.record.schema import Record
from hyperfitting.reporting.sweep_records import SweepRecords
from hyperfitting.tracking import payload
from hyperfitting.tracking.payload import create_artifact
from hyperfitting.tracking.run_info import RunInfo

__all__ = ["RunInfo", "Tracker", "check_reachable", "track"]

log = logging.getLogger(__name__)
_CONNECT_TIMEOUT = 5.0
"""Seconds within which a server must answer at all."""
_MAX_TAG_LENGTH = 64
"""Characters; W&B refuses longer tags."""
Mode = Literal["online", "offline"]
Action = Callable[[Any], Any]
"""What is done with a `wandb.Run`."""


class Tracker:
    """One W&B run, or nothing if tracking is disabled or has failed.

    If an online run fails midway, everything logged so far is logged again to an offline run of the
    same id, which `hyperfit-dashboard sync` uploads later.
    """

    def __init__(self, run_info: RunInfo) -> None:
        self._run_info = run_info
        self._n_rows = 0
        self._actions: list[Action] = []
        self._run: Any = None
        mode = run_info.config.tracking.mode
        if mode == "online":
            self._run = self._start("online", "tracking offline instead")
        if mode != "disabled" and self._run is None:
            self._run = self._start("offline", "not tracking")

    def _start(self, mode: Mode, fallback: str) -> Any:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        try:
            return _init(self._run_info, mode)
        except Exception as error:
            log.warning("W&B %s failed (%s); %s", mode, first_line(error), fallback)
            _teardown()
            return None

    @property
    def folder(self) -> Path | None:
        """Folder of the run's files, if it is tracked."""
        return Path(self._run.dir).parent if self._run is not None else None

    def log_metrics(self, row: MetricsRow) -> None:
        """Log a row of the training history: of an optimizer step, or of an epoch (with `epoch`).

        A resumed run logs the same rows in the same order. A row's number is W&B's step, so rows
        that the server already has are not logged twice.
        """
        number, self._n_rows = self._n_rows, self._n_rows + 1
        log_every = self._run_info.log_every
        if "epoch" not in row:
            if row["step"] % log_every == 0 or row["step"] == 1:
                self._do(lambda run: run.log(dict(row), step=number))
            return
        if "val/loss" in row or row["epoch"] % log_every == 0:
            logged = {k if k in ("epoch", "step") else f"epoch/{k}": v for k, v in row.items()}
            self._do(lambda run: run.log(logged, step=number))

    def finish(self, record: Record) -> None:
        """Log the record: metrics with intervals as summary, texts, charts, and its files."""
        files = [self._run_info.folder / name for name in (RECORD_FILE, TEXTS_PAGE)]
        self._do(_check_server)
        self._do(lambda run: run.summary.update(payload.summary(record)))
        self._do(lambda run: run.log(_built(payload.media(record)), step=self._n_rows))
        self._do(lambda run: run.log_artifact(create_artifact(run, "record", files)))
        if self._run_info.config.tracking.checkpoint and "tuned" in record.artifacts:
            weights = Path(record.artifacts["tuned"]) / "last.safetensors"
            self._do(lambda run: run.log_artifact(create_artifact(run, "model", [weights])))

    def log_report(self, sweep: SweepRecords, folder: Path) -> None:
        """Log a sweep's report: contexts with the texts of all runs, figures, and its folder."""
        self._do(_check_server)
        self._do(lambda run: run.log(_built(payload.report_media(sweep, folder))))
        self._do(lambda run: run.log_artifact(create_artifact(run, "report", [folder])))

    def close(self, exit_code: int) -> None:
        """End the run; waits for the server no longer than `tracking.timeout`."""
        self._do(lambda run: run.finish(exit_code=exit_code))
        self._run = None

    def _do(self, action: Action) -> None:
        """Run an action; if it fails online, repeat all actions offline."""
        if self._run is None:
            return
        self._actions.append(action)
        try:
            action(self._run)
        except Exception as error:
            was_online, self._run = not self._run.offline, None
            _teardown()
            if not was_online:
                log.warning("W&B failed (%s); this run is no longer tracked", first_line(error))
                return
            log.warning(
                "W&B failed (%s); tracking offline instead, for `hyperfit-dashboard sync`",
                first_line(error),
            )
            actions, self._actions = self._actions, []
            self._run = self._start("offline", "not tracking")
            for repeated in actions:
                self._do(repeated)


@contextmanager
def track(run_info: RunInfo) -> Iterator[Tracker]:
    """Track this context as one W&B run, which ends with it."""
    tracker = Tracker(run_info)
    exit_code = 1
    try:
        yield tracker
        exit_code = 0
    finally:
        tracker.close(exit_code)


def check_reachable(server: str) -> None:
    """Raise an OSError if a server does not answer: W&B itself waits much longer."""
    if not server.startswith(("http://", "https://")):
        raise OSError(f"{server} is not the address of a server")
    try:
        with suppress(urllib.error.HTTPError):  # any answer will do
            urllib.request.urlopen(server, timeout=_CONNECT_TIMEOUT).close()  # noqa: S310 (checked above)
    except OSError as error:
        raise OSError(f"{server} does not answer: {error}") from error


def _built(media: payload.Media) -> dict[str, Any]:
    """Return the objects of a payload, without those that cannot be built."""
    objects = {}
    for key, build in media.items():
        try:
            objects[key] = build()
        except Exception as error:
            log.warning("W&B does not receive %s (%s)", key, first_line(error))
    return objects


def _check_server(run: Any) -> None:
    if not run.offline:
        check_reachable(run.settings.base_url)


def _teardown() -> None:
    """Stop W&B's service, which keeps a run that failed."""
    import wandb

    with suppress(Exception):
        wandb.teardown(exit_code=1)


def _init(run_info: RunInfo, mode: Mode) -> Any:
    import wandb

    cfg = run_info.config.tracking
    if mode == "online":
        if not wandb.login(prompt=False, verify=False):
            raise RuntimeError("no login: run `wandb login` or set WANDB_API_KEY")
        check_reachable(wandb.setup().settings.base_url)
    if mode == "offline" and run_info.id:
        _remove_earlier_attempts(run_info.folder, run_info.id)
    run = wandb.init(
        project=cfg.project,
        entity=cfg.entity,
        group=cfg.group or run_info.sweep,
        tags=[*cfg.tags, *([run_info.sweep[:_MAX_TAG_LENGTH]] if run_info.sweep else [])],
        job_type=run_info.job_type,
        id=run_info.id,
        resume="allow" if run_info.id and mode == "online" else None,
        name=run_info.name,
        dir=run_info.folder,
        config=run_info.wandb_config,
        reinit="create_new",
        settings=wandb.Settings(
            mode=mode,
            init_timeout=cfg.timeout,
            finish_timeout=cfg.timeout,
            finish_timeout_raises=True,
            console="off",
            silent=True,
            save_code=False,
            disable_git=True,
            disable_job_creation=True,
        ),
    )
    run.define_metric("step", hidden=True)
    run.define_metric("epoch", hidden=True)
    run.define_metric("train/loss", step_metric="step", summary="last")
    for key, summary in (("epoch/*", "last"), ("epoch/val/loss", "min"), ("epoch/gen/ttr", "max")):
        run.define_metric(key, step_metric="epoch", summary=summary)
    return run


def _remove_earlier_attempts(folder: Path, run_id: str) -> None:
    """Remove the offline files of killed attempts at a run: the next one logs all rows again."""
    for attempt in folder.glob(f"wandb/offline-run-*-{run_id}"):
        if not any(attempt.glob("*.synced")):
            shutil.rmtree(attempt, ignore_errors=True)
