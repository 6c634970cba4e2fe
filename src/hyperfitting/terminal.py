"""What a person sees: progress while it runs, and the outcome of a record. Quiet when piped.

All texts of models and datasets are shown as they are: no markup, no terminal control codes.
"""

import io
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
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

from hyperfitting.progress import Advance
from hyperfitting.reporting.colouring import stretches
from hyperfitting.reporting.numbers import estimate, p_value
from hyperfitting.store import write_text

# keys, what a reader calls them, and how they are written
_ROWS = (
    ("gen/ttr", "type-token ratio", "{:.3f}"),
    ("gen/rep_2", "repeated 2-grams", "{:.3f}"),
    ("gen/rep_3", "repeated 3-grams", "{:.3f}"),
    ("gen/ends_in_loop", "texts that end in a loop", "{:.2f}"),
    ("gen/self_bleu", "Self-BLEU", "{:.3f}"),
    ("gen/dataset_overlap", "longest quote, tokens", "{:.1f}"),
    ("gen/entropy", "entropy writing, nats", "{:.2f}"),
    ("gen/original_perplexity", "perplexity to original", "{:.1f}"),
    ("gen/original_rank_over_1", "not the original's first", "{:.3f}"),
    ("gen/mauve", "MAUVE", "{:.3f}"),
    ("val/perplexity", "perplexity of real texts", "{:.1f}"),
    ("val/entropy", "entropy on them, nats", "{:.2f}"),
    ("val/top1_mass", "mass of the top 1", "{:.3f}"),
    ("val/top3_mass", "of the top 3", "{:.3f}"),
    ("val/top5_mass", "of the top 5", "{:.3f}"),
    ("val/top1_agreement", "top 1 as the original's", "{:.3f}"),
)
_STYLES = ("", "yellow", "red", "bold red", "bold white on red")
_MARKED = 2  # the shade from which a stretch is marked where there is no colour
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
        looks = [row for row in record["history"] if "val/loss" in row]
        first, last = looks[0], looks[-1]
        parts.append(
            Text(
                f"training loss {first['train/loss']:.2f} -> {last['train/loss']:.3f} nats, "
                f"validation loss {first['val/loss']:.2f} -> {last['val/loss']:.2f}, "
                f"from epoch {first['epoch']:.0f} to {last['epoch']:.0f}\n"
            )
        )
    parts += [Text(f"note: {plain(note)}\n") for note in record["notes"]]
    parts += [
        _sample(sample, number, colour) for number, sample in enumerate(record["samples"][:2], 1)
    ]
    return Group(*parts)


def _comparison(record: dict[str, Any]) -> Table:
    tuning = record["config"]["tuning"]["method"]
    model, dataset, decode = (
        record["config"][key]["name"] for key in ("model", "dataset", "decode")
    )
    table = Table(
        title=f"{model} on {dataset}: {tuning} tuning, {decode} decoding, "
        f"{len(record['samples'])} held-out texts",
        caption="mean [95% interval over texts]; p of the paired permutation test",
        box=SIMPLE,
    )
    table.add_column("")
    table.add_column("original", justify="right")
    table.add_column(
        "not tuned" if tuning == "none" else "hyperfitted", justify="right", style="bold"
    )
    table.add_column("difference", justify="right")
    table.add_column("p", justify="right")
    for key, label, form in _ROWS:
        if key in record["metrics"]:
            table.add_row(label, *_cells(record, key, form))
    longest = record["slices"][0]["new_tokens"]
    for one in record["slices"][1:]:
        which = f", {one['set']}" if one["set"] else ""
        length = f" at {one['new_tokens']} tokens" if one["new_tokens"] != longest else ""
        if "gen/ttr" in one["metrics"]:
            table.add_row(f"TTR{which}{length}", *_cells(one, "gen/ttr", "{:.3f}"))
    return table


def _cells(scores: dict[str, Any], key: str, form: str) -> list[str]:
    difference = scores["difference"].get(key)
    return [
        estimate(scores["baseline"].get(key), form),
        estimate(scores["metrics"][key], form),
        estimate(difference, form.replace(":", ":+")),
        p_value(difference["p"] if difference else None),
    ]


def _sample(sample: dict[str, Any], number: int, colour: bool) -> Panel:
    columns = Table(box=None, padding=(0, 2, 0, 0), expand=True, show_edge=False)
    columns.add_column("original continues", ratio=1, overflow="fold")
    columns.add_column("hyperfitted continues", ratio=1, overflow="fold")
    columns.add_row(
        _marked(sample["original_continuation"], colour), _marked(sample["continuation"], colour)
    )
    how = "darker" if colour else "«in marks»"
    return Panel(
        Group(Text(plain(sample["context"]), style="dim"), Text(), columns),
        title=f"{plain(sample['set'])}, text {number} (what the text had before: {how})",
        title_align="left",
    )


def _marked(continuation: dict[str, Any], colour: bool) -> Text:
    """Return a continuation with its repeated stretches marked."""
    text = Text()
    for stretch, shade in stretches(continuation["pieces"], continuation["tokens"]):
        shown = plain(stretch)
        if shade >= _MARKED and not colour:
            lead = len(shown) - len(shown.lstrip())
            shown = f"{shown[:lead]}«{shown[lead:]}»"
        text.append(shown, style=_STYLES[shade])
    return text


def picture(results: str, svg: str) -> None:
    """Draw a record as it looks on a terminal, to an SVG file (for the README)."""
    console = Console(record=True, width=110, force_terminal=True, file=io.StringIO())
    console.print(outcome(json.loads(Path(results).read_text("utf-8")), colour=True))
    drawn = console.export_svg(title="hyperfit")
    # rich would have the picture load its font from the network
    drawn = re.sub(r"@font-face \{.*?\}\s*", "", drawn, flags=re.DOTALL)
    write_text(Path(svg), drawn)


if __name__ == "__main__":
    picture(*sys.argv[1:])
