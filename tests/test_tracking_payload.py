"""What W&B receives: a report that is logged again."""

from pathlib import Path

from hyperfitting.reporting.sweep_records import load_sweep
from hyperfitting.tracking.run_info import RunInfo
from hyperfitting.tracking.wandb_run import track
from tests.records import ttr_record, write_sweep
from tests.test_tracking import ROWS, logged, no_login, run_info

__all__ = ["no_login", "run_info"]


def test_a_resumed_run_of_a_report_logs_it_again(run_info: RunInfo, tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "sweeps" / "x", {}, {"tuned_0": ttr_record([0.1, 0.2], 0.5)})
    with track(run_info) as tracker:
        for row in ROWS:  # W&B's step is above 0, as in a run that is resumed
            tracker.log_metrics(row)
        tracker.log_report(load_sweep(folder), folder)
        run = tracker.folder
    assert [row for row in logged(run or Path())[0] if "contexts/path" in row]
