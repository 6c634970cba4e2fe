"""Weights & Biases: the only file that imports wandb, and nothing here may cost a result.

Whatever goes wrong (no login, no server, no quota, no disk) is said once, and the run goes on:
online falls back to offline, and offline to nothing. Calling code never sees an exception.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from hyperfitting.config import TrackingConfig
from hyperfitting.store import digest
from hyperfitting.training.checkpoint import Row

log = logging.getLogger(__name__)
_LONGEST_TAG = 64
"""Characters; W&B refuses longer ones."""
Mode = Literal["online", "offline"]


class Tracker:
    """One W&B run, or nothing if tracking is disabled or has failed."""

    def __init__(self, run: Any) -> None:
        self._run = run

    @property
    def folder(self) -> Path | None:
        """Where the run's files lie."""
        return Path(self._run.dir).parent if self._run is not None else None

    def row(self, row: Row) -> None:
        """Log a row of the training history: an update's, or an epoch's (which has `epoch`)."""
        shown = dict(row)
        if "epoch" in shown:
            shown["train/epoch_loss"] = shown.pop("train/loss")
        self._do(lambda run: run.log(shown))

    def finish(self, record: dict[str, Any]) -> None:
        """Log the outcome: summary metrics with intervals, and the continuations as a table."""
        self._do(lambda run: run.summary.update(_summary(record)))
        self._do(lambda run: run.log({"gen/continuations": _table(record)}))

    def close(self, exit_code: int) -> None:
        """End the run; waits for the server no longer than `tracking.timeout`."""
        self._do(lambda run: run.finish(exit_code=exit_code))
        self._run = None

    def _do(self, action: Callable[[Any], Any]) -> None:
        if self._run is None:
            return
        try:
            action(self._run)
        except Exception as error:
            log.warning("W&B failed (%s); this run is no longer tracked", _first_line(error))
            self._run = None


@contextmanager
def tracked(
    cfg: TrackingConfig, name: str, folder: Path, config: dict[str, Any], sweep: str | None = None
) -> Iterator[Tracker]:
    """Track what happens in this context as one W&B run, ended before the context is left.

    Args:
        cfg: whether, and where to.
        name: of the run.
        folder: where its files go.
        config: shown beside it.
        sweep: what it is a member of: its group, and part of an id that is the same when the member
            is begun again, so that W&B goes on with the same run.
    """
    tracker = Tracker(_start(cfg, name, folder, config, sweep))
    code = 1
    try:
        yield tracker
        code = 0
    finally:
        tracker.close(code)


def _start(
    cfg: TrackingConfig, name: str, folder: Path, config: dict[str, Any], sweep: str | None
) -> Any:
    if cfg.mode == "disabled":
        return None
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    modes: list[Mode] = ["online", "offline"] if cfg.mode == "online" else ["offline"]
    for mode in modes:
        try:
            return _init(cfg, mode, name, folder, config, sweep)
        except Exception as error:
            after = "tracking offline instead" if mode != modes[-1] else "not tracked"
            log.warning("W&B %s failed (%s); %s", mode, _first_line(error), after)
    return None


def _init(
    cfg: TrackingConfig,
    mode: Mode,
    name: str,
    folder: Path,
    config: dict[str, Any],
    sweep: str | None,
) -> Any:
    import wandb

    if mode == "online" and not wandb.login(prompt=False, verify=False):
        raise RuntimeError("no login: run `wandb login` or set WANDB_API_KEY")
    run = wandb.init(
        project=cfg.project,
        entity=cfg.entity,
        group=cfg.group or sweep,
        tags=[*cfg.tags, *([sweep[:_LONGEST_TAG]] if sweep else [])],
        job_type="member" if sweep else "run",
        id=_id(folder, config) if sweep else None,
        resume="allow" if sweep and mode == "online" else None,
        name=name,
        dir=folder,
        config=config,
        reinit="create_new",
        settings=wandb.Settings(
            mode=mode,
            init_timeout=cfg.timeout,
            finish_timeout=cfg.timeout,
            console="off",
            silent=True,
            save_code=False,
            disable_git=True,
            disable_job_creation=True,
        ),
    )
    run.define_metric("step", hidden=True)
    run.define_metric("epoch", hidden=True)
    run.define_metric("train/loss", step_metric="step")
    for key in ("train/epoch_loss", "val/*", "gen/*"):
        run.define_metric(key, step_metric="epoch")
    return run


def _id(folder: Path, config: dict[str, Any]) -> str:
    """Return the id of a member's run: the same when it is begun again, with the same config."""
    kept = {k: v for k, v in config.items() if k not in ("tracking", "hardware")}
    return digest([str(folder.absolute()), kept])


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
    return flat


def _table(record: dict[str, Any]) -> Any:
    import wandb

    table = wandb.Table(
        columns=["context", "continuation", "original", "reference", "ttr", "original_ttr"]
    )
    ttr = record["per_text"]["metrics"]["gen/ttr"], record["per_text"]["baseline"]["gen/ttr"]
    for sample, after, before in zip(record["samples"], *ttr, strict=True):
        table.add_data(
            sample["context"],
            sample["continuation"]["text"],
            sample["original_continuation"]["text"],
            sample["reference"],
            after,
            before,
        )
    return table


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
