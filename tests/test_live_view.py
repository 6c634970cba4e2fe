"""The live view of a sweep: counts and the remaining time."""

import time
from pathlib import Path

from rich.console import Console

from hyperfitting.sweep.live_view import _LiveView
from hyperfitting.sweep.state import RunFolder, Status


def test_the_remaining_time_is_divided_between_the_workers(tmp_path: Path) -> None:
    console = Console(width=120)
    (tmp_path / "a").mkdir()

    def headline(workers: int) -> str:
        view = _LiveView(console, tmp_path, ["a", "b", "c"], 0, workers)
        RunFolder(tmp_path / "a").write_status(Status("running", started=time.time() - 300.4))
        view.planned_seconds = dict.fromkeys(("a", "b", "c"), 600.0)
        with console.capture() as shown:
            console.print(view.render())
        return shown.get().splitlines()[0]

    # of one ten minutes are left, less the five it has run, and of two all ten
    assert "about 25 min 00 s left" in headline(1)
    assert "about 12 min 30 s left" in headline(2)
    assert "about 10 min 00 s left" in headline(9)  # not before the longest has ended
