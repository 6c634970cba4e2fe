"""The end of a sweep: its report is drawn, and logged to W&B as a run of its own."""

from pathlib import Path

from rich.console import Console

from hyperfitting.config import RunConfig
from hyperfitting.reporting.report import write_report
from hyperfitting.reporting.sweep_records import load_sweep
from hyperfitting.tracking.run_info import RunInfo
from hyperfitting.tracking.wandb_run import track


def report_sweep(folder: Path, config: RunConfig, console: Console, *, log_to_wandb: bool) -> Path:
    """Draw a sweep's report, print where it is, and return its folder.

    Args:
        folder: of the sweep.
        config: of any of its runs, for the tracking.
        console: where its path is printed.
        log_to_wandb: log it too, unless `tracking.mode` is `disabled`; for sweeps with a new run.

    Raises:
        UserError: the description of the report is invalid, or a record is of another version of
            this software.
    """
    report = write_report(folder)
    console.print(f"report     {report}", highlight=False, soft_wrap=True)
    if log_to_wandb and config.tracking.mode != "disabled":
        run_info = RunInfo(
            f"{folder.name} report", folder, config, sweep=folder.name, job_type="report"
        )
        with track(run_info) as tracker:
            tracker.log_report(load_sweep(folder), report)
    return report
