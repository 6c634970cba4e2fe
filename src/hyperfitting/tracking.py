"""Weights & Biases: how a run is begun, told and ended; nothing here may cost a result.

Whatever goes wrong (no login, no server, no quota, no disk) is said once, and the run goes on:
online falls back to offline, and offline to nothing. Calling code never sees an exception.
"""

import logging
import math
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from hyperfitting import wandb_content
from hyperfitting.config import RunConfig
from hyperfitting.errors import UserError
from hyperfitting.progress import Row
from hyperfitting.reporting.sweeps import SweepRecords
from hyperfitting.results import FILE_NAME, PAGE
from hyperfitting.store import digest
from hyperfitting.wandb_content import artefact

log = logging.getLogger(__name__)
MOST_POINTS = 1000
"""Points of a curve that one run sends."""
_PATIENCE = 5.0
"""Seconds for a server to answer at all."""
_AT_ONCE = 50
"""Runs that one `wandb sync` sends."""
_LONGEST_TAG = 64
"""Characters; W&B refuses longer ones."""
Mode = Literal["online", "offline"]


@dataclass(frozen=True)
class Identity:
    """Which member a W&B run is of."""

    name: str
    folder: Path
    """Where its files go."""
    config: RunConfig
    choices: Mapping[str, str] = field(default_factory=dict)
    """By Hydra's groups, the option chosen."""
    sweep: str | None = None
    """What it is a member of: its group on W&B."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """By the sweep's axes, what sets it apart from the other members."""
    job_type: str = "run"
    """`run`, or of a sweep `member` or `report`."""

    @property
    def id(self) -> str | None:
        """The same when a member is begun again with the same config, so that its run goes on."""
        if self.sweep is None:
            return None
        kept = {k: v for k, v in asdict(self.config).items() if k not in ("tracking", "hardware")}
        return digest([str(self.folder.absolute()), kept])

    @property
    def shown(self) -> dict[str, Any]:
        """What W&B shows as the run's config, to group, filter and colour by."""
        return {
            **asdict(self.config),
            "choice": {k: v for k, v in self.choices.items() if not k.startswith("hydra/")},
            "label": dict(self.labels),
        }

    @property
    def stride(self) -> int:
        """Of so many updates one is sent."""
        data, trainer = self.config.dataset, self.config.trainer
        updates = trainer.epochs * math.ceil(data.n_train / trainer.batch_size)
        return math.ceil(updates / MOST_POINTS)


class Tracker:
    """One W&B run, or nothing if tracking is disabled or has failed.

    A server that fails in the middle is given up: the whole run is told again to an offline one of
    the same id, which `sync` sends later.
    """

    def __init__(self, who: Identity) -> None:
        self._who = who
        self._rows = 0
        self._told: list[Callable[[Any], Any]] = []
        mode = who.config.tracking.mode
        self._run: Any = None
        if mode == "online":
            self._run = self._begun("online", "tracking offline instead")
        if mode != "disabled" and self._run is None:
            self._run = self._begun("offline", "not tracked")

    def _begun(self, mode: Mode, otherwise: str) -> Any:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        try:
            return _init(self._who, mode)
        except Exception as error:
            log.warning("W&B %s failed (%s); %s", mode, _first_line(error), otherwise)
            _forget()
            return None

    @property
    def folder(self) -> Path | None:
        """Where the run's files lie."""
        return Path(self._run.dir).parent if self._run is not None else None

    def row(self, row: Row) -> None:
        """Log a row of the training history: an update's, or an epoch's (which has `epoch`).

        Rows come in the same order whenever a member is begun again; their number is W&B's step,
        so that a run which goes on takes none twice.
        """
        number, self._rows = self._rows, self._rows + 1
        if "epoch" not in row:
            if row["step"] % self._who.stride == 0 or row["step"] == 1:
                self._do(lambda run: run.log(dict(row), step=number))
            return
        if "val/loss" in row or row["epoch"] % self._who.stride == 0:
            shown = {k if k in ("epoch", "step") else f"epoch/{k}": v for k, v in row.items()}
            self._do(lambda run: run.log(shown, step=number))

    def finish(self, record: dict[str, Any]) -> None:
        """Log the outcome: summary metrics with intervals, texts, charts, the record's files."""
        files = [self._who.folder / name for name in (FILE_NAME, PAGE)]
        self._do(_must_be_there)
        self._do(lambda run: run.summary.update(wandb_content.summary(record)))
        self._do(lambda run: run.log(wandb_content.media(record), step=self._rows))
        self._do(lambda run: run.log_artifact(artefact(run, "record", files)))
        if self._who.config.tracking.checkpoint and "tuned" in record["artefacts"]:
            tuned = Path(record["artefacts"]["tuned"]) / "last.safetensors"
            self._do(lambda run: run.log_artifact(artefact(run, "model", [tuned])))

    def report(self, sweep: SweepRecords, folder: Path) -> None:
        """Log a sweep's report: contexts with the texts of all members, figures, all its files."""
        self._do(_must_be_there)
        self._do(lambda run: run.log(wandb_content.side_by_side(sweep, folder), step=0))
        self._do(lambda run: run.log_artifact(artefact(run, "report", [folder])))

    def close(self, exit_code: int) -> None:
        """End the run; waits for the server no longer than `tracking.timeout`."""
        self._do(lambda run: run.finish(exit_code=exit_code))
        self._run = None

    def _do(self, action: Callable[[Any], Any]) -> None:
        if self._run is None:
            return
        self._told.append(action)
        try:
            action(self._run)
        except Exception as error:
            online, self._run = not self._run.offline, None
            _forget()
            if not online:
                log.warning("W&B failed (%s); this run is no longer tracked", _first_line(error))
                return
            log.warning(
                "W&B failed (%s); tracking offline instead, for `hyperfit-dashboard sync`",
                _first_line(error),
            )
            again, self._told = self._told, []
            self._run = self._begun("offline", "not tracked")
            for one in again:
                self._do(one)


def _must_be_there(run: Any) -> None:
    """Raise an OSError if the server of an online run is gone."""
    if not run.offline:
        _must_answer(run.settings.base_url)


def _must_answer(server: str) -> None:
    """Raise an OSError if there is no server: W&B itself would wait for one much longer."""
    if not server.startswith(("http://", "https://")):
        raise OSError(f"{server} is no address of a server")
    try:
        with suppress(urllib.error.HTTPError):  # an answer, whatever it says
            urllib.request.urlopen(server, timeout=_PATIENCE).close()  # noqa: S310 (checked above)
    except OSError as error:
        raise OSError(f"{server} does not answer: {error}") from error


def _forget() -> None:
    """End W&B's service, which holds on to a run that failed."""
    import wandb

    with suppress(Exception):
        wandb.teardown(exit_code=1)


@contextmanager
def tracked(who: Identity) -> Iterator[Tracker]:
    """Track what happens in this context as one W&B run, ended before the context is left."""
    tracker = Tracker(who)
    code = 1
    try:
        yield tracker
        code = 0
    finally:
        tracker.close(code)


def _init(who: Identity, mode: Mode) -> Any:
    import wandb

    cfg = who.config.tracking
    if mode == "online":
        if not wandb.login(prompt=False, verify=False):
            raise RuntimeError("no login: run `wandb login` or set WANDB_API_KEY")
        _must_answer(wandb.setup().settings.base_url)
    if mode == "offline" and who.id:
        _drop_attempts(who.folder, who.id)
    run = wandb.init(
        project=cfg.project,
        entity=cfg.entity,
        group=cfg.group or who.sweep,
        tags=[*cfg.tags, *([who.sweep[:_LONGEST_TAG]] if who.sweep else [])],
        job_type=who.job_type,
        id=who.id,
        resume="allow" if who.id and mode == "online" else None,
        name=who.name,
        dir=who.folder,
        config=who.shown,
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


def _drop_attempts(folder: Path, run_id: str) -> None:
    """Remove what a killed attempt at an offline run left: this one tells all of it again."""
    for old in folder.glob(f"wandb/offline-run-*-{run_id}"):
        if not any(old.glob("*.synced")):
            shutil.rmtree(old, ignore_errors=True)


def unsent(outputs: Path) -> list[Path]:
    """Return the folders of offline runs that the server does not have."""
    return sorted(p for p in outputs.glob("**/wandb/offline-run-*") if not any(p.glob("*.synced")))


def sync(outputs: Path) -> int:
    """Send what the server does not have; return how many runs there were.

    Raises:
        UserError: the server did not take all of them, or there is none.
    """
    import wandb

    folders = unsent(outputs)
    if not folders:
        return 0
    server = wandb.setup().settings.base_url
    try:
        _must_answer(server)
    except OSError as error:
        raise UserError(
            f"cannot be reached: {_first_line(error)}", field="WANDB_BASE_URL", value=server
        ) from error
    for start in range(0, len(folders), _AT_ONCE):
        some = map(str, folders[start : start + _AT_ONCE])
        subprocess.run(  # noqa: S603  (wandb's own command, in this Python)
            [sys.executable, "-m", "wandb", "sync", *some], check=False
        )
    left = unsent(outputs)
    if left:
        raise UserError(
            f"W&B did not take {len(left)} of {len(folders)} runs; what it said stands above",
            hint="`wandb login`, then the same command again: it sends only what is missing",
        )
    return len(folders)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
