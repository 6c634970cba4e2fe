"""What W&B receives: a report that is logged again, long overlaps, and what cannot be built."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyperfitting.record.schema import Histograms
from hyperfitting.reporting.sweep_records import load_sweep
from hyperfitting.tracking import payload
from hyperfitting.tracking.run_info import RunInfo
from hyperfitting.tracking.wandb_run import track
from tests.records import ttr_record, write_sweep
from tests.test_tracking import ROWS, logged, make_run_record, no_login, run_info

__all__ = ["no_login", "run_info"]


def test_a_resumed_run_of_a_report_logs_it_again(run_info: RunInfo, tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "sweeps" / "x", {}, {"tuned_0": ttr_record([0.1, 0.2], 0.5)})
    with track(run_info) as tracker:
        for row in ROWS:  # W&B's step is above 0, as in a run that is resumed
            tracker.log_metrics(row)
        tracker.log_report(load_sweep(folder), folder)
        run = tracker.folder
    assert [row for row in logged(run or Path())[0] if "contexts/path" in row]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=3000))
def test_a_histogram_keeps_all_counts_within_the_bins_that_wandb_allows(counts: list[int]) -> None:
    histogram = payload._histogram(counts)
    assert len(histogram.histogram) == min(len(counts), len(histogram.histogram)) <= 512
    values = [value for value, count in enumerate(counts) for _ in range(count)]
    expected, _ = np.histogram(values, histogram.bins)
    assert histogram.histogram == expected.tolist()
    assert sum(histogram.histogram) == len(values)


def test_what_cannot_be_built_leaves_the_rest_of_the_run(
    run_info: RunInfo, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def page(*_: object) -> str:
        raise ValueError("no page")

    monkeypatch.setattr(payload, "texts_page", page)
    counts = [0] * 2000 + [1]
    record = make_run_record(overlap_histogram=Histograms(tuned=counts, base=[], reference=[]))
    with track(run_info) as tracker:
        tracker.finish(record)
        run = tracker.folder
    history, summary = logged(run or Path())
    assert {"texts/path", "overlap/tuned/values"} <= set(history[-1])
    assert not any("highlighted" in key for key in history[-1])
    assert summary["gen/ttr"] == 0.6
    assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == [
        "W&B does not receive texts_highlighted (no page)"
    ]
