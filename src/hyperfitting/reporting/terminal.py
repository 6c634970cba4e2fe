"""What is shown on the terminal: progress bars during a run, and its record at the end.

Texts of models and datasets are shown literally: no markup, no terminal control codes.
"""

import io
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from hyperfitting.formatting import duration, printable, printable_line
from hyperfitting.metrics.registry import metric
from hyperfitting.progress import Advance
from hyperfitting.record.files import read_record
from hyperfitting.record.schema import Record, Sample, Slice
from hyperfitting.reporting.comparison import CAPTION, comparison_row, comparison_rows
from hyperfitting.reporting.repetition_highlight import spans
from hyperfitting.runtime.files import write_text

SAMPLES_SHOWN = 2
FIRST_LINE_S = 10.0
LINE_INTERVAL_S = 60.0
"""Seconds until a task's first line of progress, and between two, where there is no terminal."""
_SLICE_METRIC = "gen/ttr"
"""The metric that datasets and shorter lengths have a row of."""
_STYLES = ("", "yellow", "red", "bold red", "bold white on red")
_MARKED_SHADE = 2
"""Without color, spans from this shade on stand in quotation marks."""


class _Throughput(ProgressColumn):
    """Units per second, and the values to display."""

    def render(self, task: Task) -> Text:
        parts = [f"{task.speed:,.0f} {task.fields['unit']}/s"] if task.speed else []
        for name, value in task.fields["shown"].items():
            parts.append(f"{name} {value:g}" if value == int(value) else f"{name} {value:.4f}")
        return Text("  ".join(parts), style="cyan")


class _ProgressLines:
    """Progress of a task as lines of a log: at first after `FIRST_LINE_S` seconds."""

    def __init__(self, console: Console, task: str, total: int, unit: str) -> None:
        self._console = console
        self._task, self._total, self._unit = task, total, unit
        self._done = 0
        self._start = time.monotonic()
        self._next = self._start + FIRST_LINE_S

    def advance(self, n: int, **shown: float) -> None:
        """Count units, and print a line if it is time."""
        self._done += n
        now = time.monotonic()
        if now < self._next or not self._done:
            return
        self._next = now + LINE_INTERVAL_S
        total = f" of {self._total:,}" if self._total else ""
        parts = [f"{self._task}: {self._done:,}{total} {self._unit}"]
        if self._total:
            left = (now - self._start) / self._done * (self._total - self._done)
            parts.append(f"about {duration(left)} left")
        parts += [f"{name} {value:g}" for name, value in shown.items()]
        line = ", ".join(parts)
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


class Terminal:
    """Progress bars on a terminal; elsewhere a line a minute of tasks that take longer."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            _Throughput(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> "Terminal":
        self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bars.stop()

    @contextmanager
    def progress(self, task: str, total: int, unit: str) -> Iterator[Advance]:
        """Display one task; see `hyperfitting.progress.ProgressReporter`."""
        if not self.console.is_terminal:
            yield _ProgressLines(self.console, printable_line(task), total, unit).advance
            return
        bar = self._bars.add_task(task, total=total or None, unit=unit, shown={})

        def advance(n: int, **shown: float) -> None:
            self._bars.update(bar, advance=n)
            if shown:
                self._bars.update(bar, shown=shown)

        try:
            yield advance
        finally:
            self._bars.remove_task(bar)


def outcome(record: Record, color: bool) -> RenderableType:
    """Return a run's result: metrics of both models, and the first samples side by side."""
    parts: list[RenderableType] = [_metrics_table(record)]
    if answers := record.answers:
        parts.append(_answers_table(record, answers))
    validated = [row for row in record.history if "val/loss" in row]
    if validated:
        first, last = validated[0], validated[-1]
        parts.append(
            Text(
                f"training loss {first['train/loss']:.2f} -> {last['train/loss']:.3f} nats, "
                f"validation loss {first['val/loss']:.2f} -> {last['val/loss']:.2f}, "
                f"from epoch {first['epoch']:.0f} to {last['epoch']:.0f}\n"
            )
        )
    parts += [Text(f"note: {printable(note)}\n") for note in record.notes]
    samples = record.samples[:SAMPLES_SHOWN] if record.image is None else []
    heading = f"{record.tuned_label} model"
    parts += [_sample_panel(s, heading, number, color) for number, s in enumerate(samples, 1)]
    return Group(*parts)


def _metrics_table(record: Record) -> Table:
    method = record.config["tuning"]["method"]
    table = _comparison_table(
        record,
        f"{record.name('model')} on {record.name('dataset')}: {method} tuning, "
        f"{record.name('decode')} decoding, {len(record.samples)} held-out texts",
    )
    overall = record.overall
    for label, row in comparison_rows(overall):
        table.add_row(label, *row)
    for part in record.slices[1:]:
        if _SLICE_METRIC in part.tuned:
            dataset = f", {printable(part.dataset)}" if part.dataset else ""
            is_full = part.max_new_tokens == overall.max_new_tokens
            length = "" if is_full else f" at {part.max_new_tokens} tokens"
            row = comparison_row(part, metric(_SLICE_METRIC))
            table.add_row(Text(f"TTR{dataset}{length}"), *row)
    return table


def _answers_table(record: Record, answers: Slice) -> Table:
    n_questions = len(record.texts) - len(record.samples)
    title = f"answers to {n_questions} open questions, {answers.max_new_tokens} tokens at most"
    table = _comparison_table(record, title)
    for label, row in comparison_rows(answers):
        table.add_row(label, *row)
    return table


def _comparison_table(record: Record, title: str) -> Table:
    table = Table(title=printable(title), caption=CAPTION, box=SIMPLE)
    table.add_column("")
    table.add_column("base", justify="right")
    heading = record.tuned_label if record.is_tuned else "not tuned"
    table.add_column(printable(heading), justify="right", style="bold")
    table.add_column("difference", justify="right")
    table.add_column("p", justify="right")
    return table


def _sample_panel(sample: Sample, heading: str, number: int, color: bool) -> Panel:
    columns = Table(box=None, padding=(0, 2, 0, 0), expand=True, show_edge=False)
    columns.add_column("base model", ratio=1, overflow="fold")
    columns.add_column(printable(heading), ratio=1, overflow="fold")
    columns.add_row(
        *(highlighted(side.token_texts, side.tokens, color) for side in (sample.base, sample.tuned))
    )
    legend = "in color" if color else "«in marks»"
    return Panel(
        Group(Text(printable(sample.context.text), style="dim"), Text(), columns),
        title=Text(f"{printable(sample.dataset)}, text {number} (repetition: {legend})"),
        title_align="left",
    )


def highlighted(token_texts: Sequence[str], tokens: Sequence[int], color: bool) -> Text:
    """Return a continuation with its repeated spans highlighted; arguments as of `spans`."""
    text = Text()
    for span, shade in spans(token_texts, tokens):
        shown = printable(span)
        if shade >= _MARKED_SHADE and not color:
            lead = len(shown) - len(shown.lstrip())
            shown = f"{shown[:lead]}«{shown[lead:]}»"
        text.append(shown, style=_STYLES[shade])
    return text


def write_svg(record_file: Path, svg_file: Path) -> None:
    """Write a record as it looks on a terminal, as an SVG picture (for the README)."""
    console = Console(record=True, width=110, force_terminal=True, file=io.StringIO())
    console.print(outcome(read_record(record_file), color=True))
    svg = console.export_svg(title="hyperfit")
    # rich's picture would load its font from the network
    write_text(svg_file, re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL))


if __name__ == "__main__":
    write_svg(Path(sys.argv[1]), Path(sys.argv[2]))
