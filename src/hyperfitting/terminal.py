"""What a person sees: progress while it runs, and the outcome of a record. Quiet when piped.

All texts of models and datasets are shown as they are: no markup, no terminal control codes.
"""

import io
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

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

from hyperfitting.metrics.diversity import repeated
from hyperfitting.progress import Advance
from hyperfitting.store import replacing

# keys, what a reader calls them, and how they are written
_ROWS = (
    ("gen/ttr", "type-token ratio of continuations", "{:.3f}"),
    ("gen/rep_2", "repeated 2-grams", "{:.3f}"),
    ("gen/rep_3", "repeated 3-grams", "{:.3f}"),
    ("val/perplexity", "perplexity of held-out texts", "{:.1f}"),
    ("val/entropy", "entropy of predictions (nats)", "{:.2f}"),
    ("val/top1_mass", "probability mass of the top 1", "{:.3f}"),
    ("val/top3_mass", "of the top 3", "{:.3f}"),
    ("val/top5_mass", "of the top 5", "{:.3f}"),
)
_REPEATED_N = 3
_CONTROL = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


class _Speed(ProgressColumn):
    """Units a second, and the numbers worth a look."""

    def render(self, task: Task) -> Text:
        parts = [f"{task.speed:,.0f} {task.fields['unit']}/s"] if task.speed else []
        for name, value in task.fields["shown"].items():
            parts.append(f"{name} {value:g}" if value == int(value) else f"{name} {value:.4f}")
        return Text("  ".join(parts), style="cyan")


class Terminal:
    """Draws progress bars on a terminal; does nothing elsewhere."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            _Speed(),
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
        """Show one task; see `hyperfitting.progress.Progress`."""
        bar = self._bars.add_task(task, total=total or None, unit=unit, shown={})

        def advance(n: int, **shown: float) -> None:
            self._bars.update(bar, advance=n)
            if shown:
                self._bars.update(bar, shown=shown)

        try:
            yield advance
        finally:
            self._bars.remove_task(bar)


def plain(text: str) -> str:
    """Return a text that cannot steer a terminal."""
    return text.translate(_CONTROL)


def outcome(record: dict[str, Any], colour: bool) -> RenderableType:
    """Return what a run found: before and after, and the first two held-out texts side by side."""
    parts: list[RenderableType] = [_comparison(record)]
    if record["history"]:
        first, last = record["history"][0], record["history"][-1]
        parts.append(
            Text(
                f"training loss {first['train/loss']:.2f} -> {last['train/loss']:.3f} nats, "
                f"validation loss {first['val/loss']:.2f} -> {last['val/loss']:.2f}, "
                f"from epoch 1 to {last['epoch']:.0f}\n"
            )
        )
    parts += [
        _sample(sample, number, colour) for number, sample in enumerate(record["samples"][:2], 1)
    ]
    return Group(*parts)


def _comparison(record: dict[str, Any]) -> Table:
    tuning = record["config"]["tuning"]["method"]
    model, dataset, decode = (
        record["config"][key]["name"] for key in ("model", "dataset", "decode")
    )
    n = record["metrics"]["gen/ttr"]["n"] if "gen/ttr" in record["metrics"] else 0
    table = Table(
        title=f"{model} on {dataset}: {tuning} tuning, {decode} decoding, {n} held-out texts",
        caption="mean [95% interval over texts]",
        box=SIMPLE,
    )
    table.add_column("")
    table.add_column("original", justify="right")
    table.add_column(
        "not tuned" if tuning == "none" else "hyperfitted", justify="right", style="bold"
    )
    for key, label, form in _ROWS:
        table.add_row(
            label,
            _value(record["baseline"].get(key), form),
            _value(record["metrics"].get(key), form),
        )
    return table


def _value(estimate: dict[str, Any] | None, form: str) -> str:
    if estimate is None:
        return "-"
    mean = form.format(estimate["mean"])
    if not estimate["ci95"]:
        return mean
    return f"{mean} [{', '.join(form.format(end) for end in estimate['ci95'])}]"


def _sample(sample: dict[str, Any], number: int, colour: bool) -> Panel:
    columns = Table(box=None, padding=(0, 2, 0, 0), expand=True, show_edge=False)
    columns.add_column("original continues", ratio=1, overflow="fold")
    columns.add_column("hyperfitted continues", ratio=1, overflow="fold")
    columns.add_row(
        _marked(sample["original_continuation"], colour), _marked(sample["continuation"], colour)
    )
    how = "red" if colour else "«in marks»"
    return Panel(
        Group(Text(plain(sample["context"]), style="dim"), Text(), columns),
        title=f"held-out text {number} (repeated {_REPEATED_N}-grams {how})",
        title_align="left",
    )


def _marked(continuation: dict[str, Any], colour: bool) -> Text:
    """Return a continuation with its repeated stretches marked."""
    text = Text()
    marks = repeated(continuation["tokens"], _REPEATED_N)
    for again, group in groupby(
        zip(continuation["pieces"], marks, strict=True), key=lambda x: x[1]
    ):
        stretch = plain("".join(piece for piece, _ in group))
        if again and not colour:
            lead = len(stretch) - len(stretch.lstrip())
            stretch = f"{stretch[:lead]}«{stretch[lead:]}»"
        text.append(stretch, style="red" if again else "")
    return text


def picture(results: str, svg: str) -> None:
    """Draw a record as it looks on a terminal, to an SVG file (for the README)."""
    console = Console(record=True, width=110, force_terminal=True, file=io.StringIO())
    console.print(outcome(json.loads(Path(results).read_text("utf-8")), colour=True))
    drawn = console.export_svg(title="hyperfit")
    # rich would have the picture load its font from the network
    drawn = re.sub(r"@font-face \{.*?\}\s*", "", drawn, flags=re.DOTALL)
    with replacing(Path(svg)) as beside:
        beside.write_text(drawn, encoding="utf-8")


if __name__ == "__main__":
    picture(*sys.argv[1:])
