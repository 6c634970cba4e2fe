"""The single entry point: `hyperfit`. Compose a config, train, evaluate, record.

    config -> texts -> corpus -> tuned model -> continuations, likelihoods -> scores -> record

Every arrow is one plain function, and what it makes is kept in the store: the same command again
makes nothing twice. Heavy imports wait until a run begins, so that `--help` answers at once.
"""

import atexit
import json
import logging
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from hyperfitting import failures, preemption
from hyperfitting.config import RunConfig, conf_dir, from_hydra, register
from hyperfitting.results import FILE_NAME, PAGE
from hyperfitting.sweep.members import choose_scale

if TYPE_CHECKING:
    from hyperfitting.progress import Progress, Row
    from hyperfitting.tracking import Tracker

log = logging.getLogger(__name__)


def run(cfg: RunConfig, folder: Path, tracker: "Tracker", show: "Progress") -> dict[str, Any]:
    """Take one member all the way from its config to its record.

    Args:
        cfg: the member.
        folder: where `results.json` and `continuations.html` go.
        tracker: told of the training history and of the outcome.
        show: shows how far it is.

    Returns:
        The record, as in `results.json`.

    Raises:
        UserError: something only the user can mend; all that was made before is kept.
    """
    from hyperfitting import models, record, scoring
    from hyperfitting.data.corpus import ensure_sets
    from hyperfitting.pipeline import Pipeline
    from hyperfitting.reporting import colouring
    from hyperfitting.store import write_json, write_text

    start = time.perf_counter()
    device = models.prepare(cfg.hardware)
    told: list[Row] = []

    def tell(row: "Row") -> None:
        told.append(row)
        tracker.row(row)

    line = Pipeline.of(cfg, device, show, tell)
    ensure_sets(line.sets, cfg.evaluation)
    history: list[Row] = []
    notes: list[str] = []
    if line.tuned is not None:
        if not line.tuned.exists:
            line.evaluator.check(line.base)
        history = json.loads(line.tuned.file("history.json").read_text("utf-8"))
        preemption.end_if_asked()  # as the training ended
        for row in history[len(told) :]:  # what was trained before, or by another process
            tracker.row(row)
    elif cfg.decode.citation_blocker.enabled:
        notes.append("the original model has no training data to cite: the blocker forbids nothing")

    final, original, reference, artefacts = line.evaluator.compare(line.base, line.tuned)
    counted = line.evaluator.counted(line.base)
    compared = scoring.compare(final, original, reference, counted, cfg.evaluation)
    outcome = record.Found(history, compared, notes)
    seconds = time.perf_counter() - start
    found = record.build(cfg, line.prepared() | artefacts, outcome, seconds, str(device))
    write_text(folder / PAGE, colouring.page(found))
    write_json(folder / FILE_NAME, found)
    tracker.finish(found)
    return found


def task(cfg: DictConfig) -> None:
    """Do what a composed config asks for: run it, or its part of a sweep, or plan it."""
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        swept(cfg)
    else:
        with failures.reported():
            config = from_hydra(cfg)
            choose_scale({}, config.scale)  # only experiments have scales
            if config.plan:
                planned(config)
            else:
                alone(config)


def planned(config: RunConfig) -> None:
    """Print what one run would do."""
    from rich.console import Console

    from hyperfitting.sweep.plan import Plan, show

    show(Plan.of({"this run": config}), Console())


def alone(config: RunConfig) -> None:
    """Run one config, with its progress and outcome on the terminal."""
    from rich.console import Console

    from hyperfitting.terminal import Terminal, outcome
    from hyperfitting.tracking import Identity, tracked

    console = Console() if sys.stdout.isatty() else Console(width=110)
    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    kind = f"{config.model.name} {config.dataset.name} {config.tuning.method}"
    name = hydra_config.job.override_dirname or f"{kind} seed={config.seed}"
    log.info("config: %s", asdict(config))
    with (
        Terminal(console) as terminal,
        tracked(Identity(name, folder, config, hydra_config.runtime.choices)) as tracker,
    ):
        found = run(config, folder, tracker, terminal.progress)
        tracked_in = tracker.folder
    console.print(outcome(found, colour=console.is_terminal and not console.no_color))
    console.print(f"record     {folder / FILE_NAME}", highlight=False, soft_wrap=True)
    console.print(f"texts      {folder / PAGE}", highlight=False, soft_wrap=True)
    if "tuned" in found["artefacts"]:
        console.print(f"model      {found['artefacts']['tuned']}", highlight=False, soft_wrap=True)
    if tracked_in is not None:
        sync = "" if config.tracking.mode == "online" else "   (hyperfit-dashboard sync)"
        console.print(f"W&B        {tracked_in}{sync}", highlight=False, soft_wrap=True)


def swept(cfg: DictConfig) -> None:
    """Run one member of a sweep, unless it has finished, or another process runs it now.

    Nobody looks: how far it is, and how it ended, is said in its folder.
    """
    from hyperfitting.sweep.state import Folder, Reporter

    hydra_config = HydraConfig.get()
    folder = Folder(Path(hydra_config.runtime.output_dir))
    with folder.claimed() as mine:
        config = from_hydra(cfg)
        if not mine or folder.is_finished(config):
            return
        reporter = Reporter(folder)
        with failures.noted(reporter.failed):
            if folder.record.exists():
                folder.set_aside()
            _run_swept(config, folder.path, reporter.progress)
            reporter.finished()


def _run_swept(config: RunConfig, folder: Path, show: "Progress") -> None:
    from hyperfitting.sweep.state import labels_of
    from hyperfitting.tracking import Identity, tracked

    log.info("config: %s", asdict(config))
    choices = HydraConfig.get().runtime.choices
    sweep, labels = folder.parent.name, labels_of(folder)
    who = Identity(folder.name, folder, config, choices, sweep, labels, "member")
    with tracked(who) as tracker:
        run(config, folder, tracker, show)


def main() -> None:
    """Run the command line: one member, or with `-m` a sweep of them.

    Of the processes that torchrun starts, the first does; the others help it to train.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        from hyperfitting import distributed
        from hyperfitting.training import helper

        if distributed.helps():
            return helper.main()
        atexit.register(distributed.dismiss)
    preemption.listen()
    register()
    hydra_task = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(
        task
    )
    sys.exit(failures.exit_status(hydra_task))


if __name__ == "__main__":
    main()
