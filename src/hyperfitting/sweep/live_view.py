"""The progress of a sweep on the terminal, and a summary at its end.

It reads only the status files in the runs' folders, so it works with every launcher.
"""

import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from hyperfitting.config import RunConfig
from hyperfitting.failures import print_error
from hyperfitting.formatting import duration
from hyperfitting.metrics.registry import metric
from hyperfitting.record.files import read_record
from hyperfitting.sweep.runs import SweepRun
from hyperfitting.sweep.state import RunFolder, Status
from hyperfitting.sweep.workers import parallel_seconds

log = logging.getLogger(__name__)

_REFRESH_SECONDS = 1.0
_SUMMARY_METRICS = ("gen/ttr", "gen/rep_2", "val/perplexity")


class _LiveView:
    """The runs that this command executes.

    Args:
        console: where events are printed.
        folder: of the sweep.
        names: of the runs to execute.
        n_finished: runs of the sweep that had finished before.
        n_failed: runs that had failed before and are not repeated.
        workers: runs at the same time.
    """

    def __init__(
        self,
        console: Console,
        folder: Path,
        names: Sequence[str],
        n_finished: int,
        n_failed: int,
        workers: int,
    ) -> None:
        self._console, self._folder, self._names = console, folder, names
        self._n_finished, self._n_failed, self._workers = n_finished, n_failed, workers
        self._started = time.time()
        self._printed: dict[str, str] = {}
        """The kind of status that was last printed, by run."""
        self.planned_seconds: Mapping[str, float] = {}
        """By run; empty: unknown."""

    def _statuses(self) -> dict[str, Status]:
        """Return what each run has reported since the view started."""
        statuses = {name: RunFolder(self._folder / name).read_status() for name in self._names}
        return {
            name: status if status.updated >= self._started else Status()
            for name, status in statuses.items()
        }

    def print_events(self) -> None:
        """Print each run that has started, finished or failed since the last call."""
        for name, status in self._statuses().items():
            if status.kind == self._printed.get(name, "waiting"):
                continue
            self._printed[name] = status.kind
            if status.kind == "failed":
                self._print_failure(f"run {name} failed: {status.reason}")
            elif status.kind == "running":
                self._print_event(f"{name} started")
            elif status.kind == "finished":
                seconds = time.time() - status.started
                self._print_event(f"{name} finished in {duration(seconds)}")

    def _print_event(self, message: str) -> None:
        if not self._console.is_terminal:  # on a terminal the live table shows it
            self._console.print(message, markup=False, highlight=False)

    def _print_failure(self, message: str) -> None:
        if self._console.is_terminal:  # above the live table
            self._console.print(message, style="red", markup=False, highlight=False)
        else:
            print_error(message)

    def render(self) -> RenderableType:
        """Return counts, times, and a progress bar for each running run."""
        statuses = self._statuses()
        running = Table(box=None, padding=(0, 2, 0, 0))
        for name, status in statuses.items():
            if status.kind == "running":
                running.add_row(*_progress_row(name, status))
        return Group(Text(self._headline(statuses), style="bold"), running)

    def _headline(self, statuses: Mapping[str, Status]) -> str:
        kinds = [status.kind for status in statuses.values()]
        n_finished = kinds.count("finished") + self._n_finished
        n_runs = len(self._names) + self._n_finished + self._n_failed
        parts = [f"{n_finished} of {n_runs} finished"]
        if n_failed := kinds.count("failed") + self._n_failed:
            parts.append(f"{n_failed} failed")
        parts.append(f"{duration(time.time() - self._started)} elapsed")
        remaining = self._remaining_seconds(statuses)
        if remaining is not None:
            parts.append(f"about {duration(remaining)} left")
        return ", ".join(parts)

    def _remaining_seconds(self, statuses: Mapping[str, Status]) -> float | None:
        if not self.planned_seconds:
            return None
        remaining = []
        for name, status in statuses.items():
            planned = self.planned_seconds.get(name, 0.0)
            if status.kind == "waiting":
                remaining.append(planned)
            elif status.kind == "running":
                remaining.append(max(planned - (time.time() - status.started), 1.0))
        return parallel_seconds(remaining, self._workers)


def _progress_row(name: str, status: Status) -> tuple[RenderableType, ...]:
    shown = "  ".join(f"{key} {value:.4g}" for key, value in status.shown.items())
    bar: RenderableType = Text()
    if status.total:
        bar = ProgressBar(status.total, min(status.done, status.total), width=24)
    return Text(name), Text(status.task, style="dim"), bar, Text(shown, "cyan")


@contextmanager
def live_view(
    console: Console,
    folder: Path,
    configs: Mapping[str, RunConfig],
    todo: Sequence[SweepRun],
    n_finished: int,
    workers: int,
) -> Iterator[None]:
    """Show a sweep in this context: a live table on a terminal, one line per event elsewhere.

    Args:
        console: where it is shown.
        folder: of the sweep.
        configs: of all runs, by name.
        todo: the runs that this command executes.
        n_finished: runs that had finished before; the others that it does not execute had failed.
        workers: runs at the same time.
    """
    if not todo:
        yield
        return
    n_failed = len(configs) - len(todo) - n_finished
    names = [run.name for run in todo]
    view = _LiveView(console, folder, names, n_finished, n_failed, workers)
    is_over = threading.Event()
    live = (
        Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
    )

    def watch() -> None:
        while not is_over.wait(_REFRESH_SECONDS):
            view.print_events()
            if live is not None:
                live.update(view.render(), refresh=True)

    def plan() -> None:
        from hyperfitting.sweep.plan import make_plan  # imports torch

        try:
            planned = make_plan({run.name: configs[run.name] for run in todo})
        except Exception as error:  # the runs themselves will report it; only the ETA is lost
            log.info("no estimate of the time: %s", error)
            return
        view.planned_seconds = {run.name: run.seconds for run in planned.runs}

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    if live is not None:
        live.start()
        threading.Thread(target=plan, daemon=True).start()
    try:
        yield
    finally:
        is_over.set()
        watcher.join()
        if live is not None:
            live.stop()
        view.print_events()


def summary_table(folder: Path, runs: Sequence[SweepRun]) -> Table:
    """Return a table of all runs: how each ended, and a few of its metrics."""
    columns = [metric(key) for key in _SUMMARY_METRICS]
    table = Table(box=SIMPLE, title=folder.name, caption="means over texts")
    table.add_column("run", overflow="fold")
    table.add_column("")
    for column in columns:
        table.add_column(column.label, justify="right")
    for run in runs:
        run_folder = RunFolder(folder / run.name)
        status = run_folder.status()
        cells = [""] * len(columns)
        if status.kind == "finished":
            tuned = read_record(run_folder.record_path).overall.tuned
            cells = [c.format.format(tuned[c.key].mean) if c.key in tuned else "" for c in columns]
        style = "green" if status.kind == "finished" else "red"
        table.add_row(Text(run.name), Text(status.kind, style), *cells)
    return table
