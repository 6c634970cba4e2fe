"""Weights & Biases: the only file that imports wandb, and nothing here may cost a result.

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
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from hyperfitting.config import RunConfig
from hyperfitting.errors import UserError
from hyperfitting.reporting import colouring, next_tokens, page
from hyperfitting.reporting.sweeps import SweepRecords
from hyperfitting.results import FILE_NAME, PAGE
from hyperfitting.store import digest
from hyperfitting.training.checkpoint import Row

log = logging.getLogger(__name__)
MOST_POINTS, MOST_TEXTS, MOST_COLOURED, PLACES = 1000, 300, 24, 3
"""Bounds of what one run sends: points of a curve, rows of the table of texts, coloured texts, and
places of a text whose next tokens are shown."""
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
        self._do(_must_be_there)
        self._do(lambda run: run.summary.update(_summary(record)))
        self._do(lambda run: run.log(_media(record), step=self._rows))
        self._do(lambda run: run.log_artifact(_artefact(run, self._who.folder)))
        if self._who.config.tracking.checkpoint and "tuned" in record["artefacts"]:
            tuned = Path(record["artefacts"]["tuned"])
            self._do(lambda run: run.log_artifact(_checkpoint(run, tuned)))

    def report(self, sweep: SweepRecords, folder: Path) -> None:
        """Log a sweep's report: contexts with the texts of all members, figures, all its files."""
        self._do(_must_be_there)
        self._do(lambda run: run.log(_side_by_side(sweep, folder), step=0))
        self._do(lambda run: run.log_artifact(_report_artefact(run, folder)))

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


def _summary(record: dict[str, Any]) -> dict[str, float]:
    """Return the record's metrics flat: `gen/ttr`, `gen/ttr_low`, …, `baseline/gen/ttr`, …

    The sets and shorter lengths of the evaluation give their means alone: `news/gen/ttr`,
    `at_96/gen/ttr`, `news/at_96/gen/ttr`.
    """
    flat: dict[str, float] = {}
    for part in ("metrics", "baseline", "difference"):
        prefix = "" if part == "metrics" else f"{part}/"
        for key, value in record[part].items():
            flat[prefix + key] = value["mean"]
            if value["ci95"]:
                flat[f"{prefix}{key}_low"], flat[f"{prefix}{key}_high"] = value["ci95"]
            if value.get("p") is not None:
                flat[f"{prefix}{key}_p"] = value["p"]
    longest = record["slices"][0]["new_tokens"]
    for one in record["slices"][1:]:
        where = f"{one['set']}/" if one["set"] else ""
        length = f"at_{one['new_tokens']}/" if one["new_tokens"] != longest else ""
        for key, value in one["metrics"].items():
            flat[where + length + key] = value["mean"]
    for name, seconds in record["timings"]["making_seconds"].items():
        flat[f"seconds/{name}"] = seconds
    config = record["config"]
    training = record["timings"]["making_seconds"].get("tuned")
    if training and record["history"]:
        tokens = config["dataset"]["n_train"] * config["dataset"]["seq_len"]
        flat["speed/training_tokens_per_second"] = (
            record["history"][-1]["epoch"] * tokens / training
        )
    return flat


def _media(record: dict[str, Any]) -> dict[str, Any]:
    """Return what is to be looked at: texts, their colouring, and the histograms of overlap."""
    import wandb

    few = {**record, "samples": record["samples"][:MOST_COLOURED]}
    media = {"texts": _table(record), "texts_coloured": wandb.Html(colouring.page(few))}
    for side, name in (("metrics", "hyperfitted"), ("baseline", "original")):
        counts = record["overlap_histogram"][side]
        if counts:
            edges = [i - 0.5 for i in range(len(counts) + 1)]
            histogram = wandb.Histogram(np_histogram=(counts, edges))
            media[f"overlap/{name}"] = histogram
    for texts in next_tokens.sets(record):
        for number, place in enumerate(next_tokens.places(record, texts, PLACES), 1):
            media[f"next_tokens/{texts}_{number}"] = _next_tokens(place)
    return media


def _next_tokens(place: next_tokens.Place) -> Any:
    """Return a chart of what comes next at a place, hyperfitted and original."""
    import wandb

    before = {token.text: token.mass for token in place.original}
    table = wandb.Table(columns=["token", "hyperfitted", "original", "trained on"])
    for token in place.hyperfitted:
        table.add_data(repr(token.text), token.mass, before.get(token.text), token.trained_on)
    title = f"…{place.context[-60:]}"
    return wandb.plot.bar(table, "token", "hyperfitted", title=title)


def _table(record: dict[str, Any]) -> Any:
    import wandb

    of_text = {"ttr": "gen/ttr", "rep_2": "gen/rep_2", "overlap": "gen/dataset_overlap"}
    sides = {"": "metrics", "original_": "baseline"}
    numbers = {
        prefix + name: record["per_text"][side].get(key)
        for prefix, side in sides.items()
        for name, key in of_text.items()
    }
    texts = ["set", "context", "original", "continuation", "reference"]
    table = wandb.Table(columns=[*texts, *numbers])
    for row, sample in enumerate(record["samples"][:MOST_TEXTS]):
        table.add_data(
            sample["set"],
            sample["context"],
            sample["original_continuation"]["text"],
            sample["continuation"]["text"],
            sample["reference"],
            *(values[row] if values else None for values in numbers.values()),
        )
    return table


def _artefact(run: Any, folder: Path) -> Any:
    """Return the record and its page, as a W&B artifact."""
    import wandb

    made = wandb.Artifact(f"record-{run.id}", type="record")
    for path in (folder / FILE_NAME, folder / PAGE):
        if path.is_file():
            made.add_file(str(path), policy="immutable")  # no copy of it in the user's home
    return made


def _side_by_side(sweep: SweepRecords, folder: Path) -> dict[str, Any]:
    """Return a table of contexts, a column for each writer, and the report's figures."""
    import wandb

    blocks = list(islice(page.blocks(sweep), MOST_TEXTS))
    writers = list(dict.fromkeys(w["name"] for block in blocks for w in block["writers"]))
    table = wandb.Table(columns=["context", *writers, "as it really goes on"])
    for block in blocks:
        texts = {w["name"]: "".join(text for text, *_ in w["text"]) for w in block["writers"]}
        table.add_data(block["context"], *(texts.get(name) for name in writers), block["reference"])
    figures = {f"figures/{p.stem}": wandb.Image(str(p)) for p in sorted(folder.glob("*.png"))}
    return {"contexts": table, **figures}


def _report_artefact(run: Any, folder: Path) -> Any:
    """Return a report's folder, as a W&B artifact."""
    import wandb

    made = wandb.Artifact(f"report-{run.id}", type="report")
    made.add_dir(str(folder))
    return made


def _checkpoint(run: Any, tuned: Path) -> Any:
    """Return the tuned parameters, as a W&B artifact."""
    import wandb

    made = wandb.Artifact(f"tuned-{run.id}", type="model")
    made.add_file(str(tuned / "last.safetensors"), policy="immutable")
    return made


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
