"""A sweep while it runs, and after: what has finished, what runs and how far, what failed and why.

Reads only what the members say in their folders, so it shows those of other launchers too.
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

from hyperfitting import failures
from hyperfitting.config import RunConfig
from hyperfitting.reporting.numbers import duration
from hyperfitting.results import FILE_NAME, read
from hyperfitting.sweep.members import Member
from hyperfitting.sweep.state import Folder, Status

log = logging.getLogger(__name__)
_EVERY = 1.0
"""Seconds between two looks."""
_COLUMNS = (
    ("gen/ttr", "TTR", "{:.3f}"),
    ("gen/rep_2", "rep. 2-grams", "{:.3f}"),
    ("val/perplexity", "perplexity", "{:.1f}"),
)


class _View:
    """What is known of the members that are to run."""

    def __init__(
        self, console: Console, folder: Path, members: Sequence[Member], todo: Sequence[Member]
    ) -> None:
        self._console, self._folder = console, folder
        self._count = len(members)
        self._todo = [m.name for m in todo]
        self._began = time.time()
        self.expected: Mapping[str, float] = {}
        """Seconds that each was planned to take."""
        self._told: dict[str, str] = {}

    def look(self) -> dict[str, Status]:
        """Return what the members to run have said since this began."""
        found = {}
        for name in self._todo:
            said = Folder(self._folder / name).said()
            found[name] = said if said.said >= self._began else Status()
        return found

    def tell(self) -> None:
        """Print a line for each member that has begun, finished or failed since the last look."""
        for name, status in self.look().items():
            if status.kind == self._told.get(name, "waiting"):
                continue
            self._told[name] = status.kind
            took = duration(time.time() - status.began)
            line = {"running": f"{name} begins", "finished": f"{name} has finished, in {took}"}
            if status.kind == "failed":
                self._failed(f"member {name} failed: {status.reason}")
            elif status.kind in line and not self._console.is_terminal:
                self._console.print(line[status.kind], markup=False, highlight=False)

    def _failed(self, message: str) -> None:
        if self._console.is_terminal:  # above what is live
            self._console.print(message, style="red", markup=False, highlight=False)
        else:
            failures.tell(message)

    def draw(self) -> RenderableType:
        """Return the whole as it is now."""
        states = self.look()
        kinds = [status.kind for status in states.values()]
        done = kinds.count("finished") + self._count - len(self._todo)
        counts = [f"{done} of {self._count} finished"]
        if failed := kinds.count("failed"):
            counts.append(f"{failed} failed")
        left = self._left(states)
        counts.append(f"{duration(time.time() - self._began)} gone")
        if left is not None:
            counts.append(f"about {duration(left)} left")
        running = Table(box=None, padding=(0, 2, 0, 0))
        for name, status in states.items():
            if status.kind != "running":
                continue
            shown = "  ".join(f"{key} {value:.4g}" for key, value in status.shown.items())
            bar: RenderableType = Text()
            if status.total:
                bar = ProgressBar(status.total, min(status.done, status.total), width=24)
            running.add_row(Text(name), Text(status.task, style="dim"), bar, Text(shown, "cyan"))
        return Group(Text(", ".join(counts), style="bold"), running)

    def _left(self, states: Mapping[str, Status]) -> float | None:
        """Return the seconds until all have ended, if it is known what each takes."""
        if not self.expected:
            return None
        left = {
            name: self.expected.get(name, 0.0)
            for name, s in states.items()
            if s.kind in ("waiting", "running")
        }
        for name, planned in left.items():
            if states[name].kind == "running":
                left[name] = max(planned - (time.time() - states[name].began), 1.0)
        return sum(left.values())


@contextmanager
def shown(
    console: Console,
    folder: Path,
    members: Sequence[Member],
    configs: Mapping[str, RunConfig],
    todo: Sequence[Member],
) -> Iterator[None]:
    """Show a sweep's members in this context: live on a terminal, a line an event elsewhere."""
    if not todo:
        yield
        return
    view = _View(console, folder, members, todo)
    over = threading.Event()

    def watch(live: Live | None) -> None:
        while not over.wait(_EVERY):
            view.tell()
            if live is not None:
                live.update(view.draw(), refresh=True)

    def expect() -> None:
        from hyperfitting.sweep.plan import Plan

        try:
            plan = Plan.of({m.name: configs[m.name] for m in todo})
        except Exception as error:  # the members will say it better; only the ETA is lost
            log.info("no estimate of the time: %s", error)
            return
        view.expected = {item.name: item.seconds for item in plan.items}

    live = (
        Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
    )
    threads = [threading.Thread(target=watch, args=(live,), daemon=True)]
    if live is not None:
        live.start()
        threads.append(threading.Thread(target=expect, daemon=True))
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        threads[0].join()
        if live is not None:
            live.stop()
        view.tell()


def summary(folder: Path, members: Sequence[Member]) -> Table:
    """Return a table of all members: how each ended, and a few of its numbers."""
    drawn = Table(box=SIMPLE, title=folder.name, caption="means over texts")
    drawn.add_column("member", overflow="fold")
    drawn.add_column("")
    for _, heading, _ in _COLUMNS:
        drawn.add_column(heading, justify="right")
    for member in members:
        place = Folder(folder / member.name)
        status = place.status()
        if status.kind == "finished":
            metrics = read(place.path / FILE_NAME)["metrics"]
            cells = [
                form.format(metrics[key]["mean"]) if key in metrics else ""
                for key, _, form in _COLUMNS
            ]
            drawn.add_row(Text(member.name), Text("finished", "green"), *cells)
        else:
            drawn.add_row(Text(member.name), Text(status.kind, "red"), "", "", "")
    return drawn
