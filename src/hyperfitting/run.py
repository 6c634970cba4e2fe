"""The entry point `hyperfit`: prepare, train, generate, score, record.

`run` is the whole of a run, in order. What surrounds it: Hydra composes the config, `run_single`
shows one run on the terminal, `run_in_sweep` runs one of a sweep and reports its status in files.
Heavy imports wait until a run begins, so that `--help` answers at once.
"""

import logging
import platform
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from hyperfitting import failures
from hyperfitting.config import RunConfig, conf_dir, from_hydra, register
from hyperfitting.runtime import preemption, processes
from hyperfitting.sweep.runs import choose_scale

if TYPE_CHECKING:
    from hyperfitting.progress import MetricsRow, ProgressReporter
    from hyperfitting.record.schema import Record

log = logging.getLogger(__name__)


class Tracker(Protocol):
    """Receives a run's metrics and its record."""

    def log_metrics(self, row: "MetricsRow") -> None:
        """Log a row of the training history; rows of before a resume come again, in order."""

    def finish(self, record: "Record") -> None:
        """Log the final scores, texts and files."""


def run(cfg: RunConfig, out_dir: Path, tracker: Tracker, progress: "ProgressReporter") -> "Record":
    """Take one run from its config to its record.

    Args:
        cfg: the run's config.
        out_dir: receives `results.json`, `predictions.npz`, `continuations.html`, `SHA256SUMS`, and
            `code.diff` if there are uncommitted changes.
        tracker: logs the training history and the record.
        progress: displays what is being built.

    Returns:
        The record, as in `results.json`.

    Raises:
        UserError: a mistake that only the user can fix; everything built so far is kept.
        Preempted: a signal asked the process to end; a checkpoint was written.
    """
    from hyperfitting.evaluation.record_builder import build_record, predictions
    from hyperfitting.pipeline.build import build_pipeline
    from hyperfitting.pipeline.result import run_result
    from hyperfitting.record.files import TEXTS_PAGE, write_code_diff, write_record
    from hyperfitting.reporting.repetition_highlight import texts_page
    from hyperfitting.runtime.code_version import code_diff
    from hyperfitting.runtime.device import setup_torch
    from hyperfitting.runtime.files import write_text

    start = time.perf_counter()
    write_code_diff(out_dir, code_diff())  # of the code that was just loaded
    device = setup_torch(cfg.hardware)
    pipeline = build_pipeline(cfg, device, progress)

    pipeline.prepare()
    for row in pipeline.train():
        tracker.log_metrics(row)
    preemption.raise_if_requested()
    pipeline.generate()
    comparison = pipeline.score()

    result = run_result(pipeline, comparison, device, time.perf_counter() - start)
    record = build_record(result, cfg.evaluation)
    write_text(out_dir / TEXTS_PAGE, texts_page(record))
    write_record(out_dir, record, predictions(comparison))
    tracker.finish(record)
    return record


def task(cfg: DictConfig) -> None:
    """Run, plan, or run as part of a sweep what Hydra has composed."""
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        run_in_sweep(cfg)
        return
    with failures.log_failures():
        config = from_hydra(cfg)
        choose_scale({}, config.scale)  # only experiments have scales
        if config.plan:
            show_plan(config)
        else:
            run_single(config)


def show_plan(config: RunConfig) -> None:
    """Print what one run would build, with time and memory."""
    from hyperfitting.formatting import make_console
    from hyperfitting.sweep.plan import make_plan, show

    show(make_plan({"this run": config}), make_console())


def run_single(config: RunConfig) -> None:
    """Run one config, with its progress and outcome on the terminal."""
    from hyperfitting.formatting import make_console
    from hyperfitting.record.files import RECORD_FILE, TEXTS_PAGE
    from hyperfitting.reporting.terminal import Terminal, outcome
    from hyperfitting.sweep.state import RunFolder
    from hyperfitting.tracking.wandb_run import RunInfo, track

    console = make_console()
    hydra_config = HydraConfig.get()
    out_dir = Path(hydra_config.runtime.output_dir)
    groups = f"{config.model.name} {config.dataset.name} {config.tuning.method}"
    name = hydra_config.job.override_dirname or f"{groups} seed={config.seed}"
    log.info("config: %s", asdict(config))
    console.print(f"{'folder':<10} {out_dir}", highlight=False, soft_wrap=True)
    with (
        RunFolder(out_dir).require_lock("hydra.run.dir"),
        Terminal(console) as terminal,
        track(RunInfo(name, out_dir, config, hydra_config.runtime.choices)) as tracker,
    ):
        record = run(config, out_dir, tracker, terminal.progress)
        wandb_dir = tracker.folder
    console.print(outcome(record, color=console.is_terminal and not console.no_color))
    paths = {"record": out_dir / RECORD_FILE, "texts": out_dir / TEXTS_PAGE}
    if record.is_tuned:
        paths["model"] = Path(record.artifacts["tuned"])
    for label, path in paths.items():
        console.print(f"{label:<10} {path}", highlight=False, soft_wrap=True)
    if wandb_dir is not None:
        sync = "" if config.tracking.mode == "online" else "   (hyperfit-dashboard sync)"
        console.print(f"W&B        {wandb_dir}{sync}", highlight=False, soft_wrap=True)


def run_in_sweep(cfg: DictConfig) -> None:
    """Run one run of a sweep, unless it has finished or another process is running it.

    Nothing is printed: its progress, and how it ended, are in its folder.
    """
    from hyperfitting.sweep.code_pin import check_pin
    from hyperfitting.sweep.state import RunFolder, StatusReporter

    folder = RunFolder(Path(HydraConfig.get().runtime.output_dir))
    with folder.lock() as locked:
        config = from_hydra(cfg)
        if not locked or folder.is_finished(config):
            return
        reporter = StatusReporter(folder)
        with failures.record_failures(reporter.failed):
            check_pin(folder.path.parent)
            if folder.record_path.exists():
                folder.set_aside()
            _run_tracked(config, folder.path, reporter.progress)
            reporter.finished()


def _run_tracked(config: RunConfig, out_dir: Path, progress: "ProgressReporter") -> None:
    from hyperfitting.sweep.state import labels_of
    from hyperfitting.tracking.wandb_run import RunInfo, track

    log.info("config: %s", asdict(config))
    choices = HydraConfig.get().runtime.choices
    run_info = RunInfo(
        out_dir.name,
        out_dir,
        config,
        choices,
        sweep=out_dir.parent.name,
        labels=labels_of(out_dir),
        job_type="sweep-run",
    )
    with track(run_info) as tracker:
        run(config, out_dir, tracker, progress)


def show_version() -> None:
    """Print the versions of this code and of the packages that numbers depend on."""
    from hyperfitting.runtime.code_version import code_version
    from hyperfitting.store.manifest import package_versions

    print(f"hyperfitting {code_version()}")
    packages = {"python": platform.python_version(), **package_versions()}
    print(", ".join(f"{name} {v}" for name, v in packages.items() if name != "hyperfitting"))


def main() -> None:
    """Run the command line: one run, or with `-m` a sweep.

    Under torchrun rank 0 does this; the other ranks join it for the training only.
    """
    processes.limit_spinning()
    if processes.is_worker_rank():
        from hyperfitting.training.worker import run_worker_rank

        return run_worker_rank()
    if sys.argv[1:] == ["--version"]:  # Hydra would print its own
        sys.exit(failures.exit_status(show_version))
    preemption.install_handlers()
    register()
    hydra_task = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(
        task
    )
    status = 1
    try:
        status = failures.exit_status(hydra_task, resumes=True)
    finally:
        if processes.is_distributed():
            from hyperfitting.runtime import distributed

            distributed.finish(status)
    sys.exit(status)


if __name__ == "__main__":
    main()
