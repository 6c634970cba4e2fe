"""The terminal's output, also when a text is hostile or the output is a file."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from hyperfitting.metrics.estimate import Difference, Estimate
from hyperfitting.record.files import write_record
from hyperfitting.record.schema import Record
from hyperfitting.reporting.terminal import Terminal, outcome, write_svg
from tests.records import (
    make_config,
    make_continuation,
    make_predictions,
    make_record,
    make_sample,
    make_slice,
)

HOSTILE = "\x1b[2J\x1b]0;owned\x07[bold red]not markup[/] <script>alert(1)</script> \x9b1m"
SCORES: dict[str, Any] = {
    "tuned": {"gen/ttr": Estimate(0.5, (0.4, 0.6), 1)},
    "base": {"gen/ttr": Estimate(0.5, None, 1)},
    "difference": {"gen/ttr": Difference(0.5, (0.4, 0.6), 1, 0.0004)},
}


def hostile_record(text: str, more_slices: tuple[dict[str, Any], ...] = ()) -> Record:
    """Return a record in which a text stands wherever data or a model can put one."""
    repeated = make_continuation("").model_copy(
        update={
            "text": text * 2,
            "token_texts": [text, " b", " c", text, " b", " c"],
            "tokens": [1, 2, 3] * 2,
        }
    )
    slices = [make_slice(**SCORES, **fields) for fields in ({"max_new_tokens": 6}, *more_slices)]
    return make_record(
        slices,
        [make_sample(repeated, repeated, dataset=text, context=text)],
        history=[{"epoch": 1, "step": 1, "train/loss": 3.0, "val/loss": 3.0}],
        notes=[f"mind {text}"],
        config=make_config(),
    )


def printed(record: Record, color: bool) -> str:
    file = io.StringIO()
    Console(file=file, width=120, force_terminal=color).print(outcome(record, color))
    return file.getvalue()


def test_a_hostile_text_is_shown_literally() -> None:
    record = hostile_record(HOSTILE, ({"max_new_tokens": 6, "dataset": HOSTILE},))
    for color in (False, True):
        text = printed(record, color)
        for code in ("\x1b[2J", "\x1b]0", "\x07", "\x9b"):
            assert code not in text
    assert "[bold red]not markup[/]" in printed(record, False)


def test_repeated_spans_are_marked_with_and_without_color() -> None:
    record = hostile_record("word")
    assert "word b c«word b c»" in printed(record, False)
    assert "\x1b[31mword b c\x1b[0m" in printed(record, True)


def test_the_table_shows_means_with_intervals() -> None:
    text = printed(hostile_record("x"), False)
    assert "0.500 [0.400, 0.600]" in text
    assert "+0.500 [+0.400, +0.600]" in text
    assert "<0.001" in text
    assert "1 held-out texts" in text
    assert "note: mind x" in text
    assert "m on d: full tuning, greedy decoding" in text


def test_datasets_and_lengths_have_rows_of_their_own() -> None:
    slices = ({"max_new_tokens": 6, "dataset": "news"}, {"max_new_tokens": 3})
    text = printed(hostile_record("x", slices), False)
    assert "TTR, news " in text
    assert "TTR at 3 tokens" in text


def test_a_picture_of_a_record_loads_nothing(tmp_path: Path) -> None:
    write_record(tmp_path, hostile_record("word"), make_predictions())
    write_svg(tmp_path / "results.json", tmp_path / "out.svg")
    svg = (tmp_path / "out.svg").read_text()
    assert svg.startswith("<svg")
    assert "@font-face" not in svg
    assert "type-token" in svg


def test_without_a_terminal_a_long_task_is_a_line_a_minute(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file, now = io.StringIO(), [0.0]
    monkeypatch.setattr("hyperfitting.reporting.terminal.time.monotonic", lambda: now[0])
    console = Console(file=file, force_terminal=False, width=20)
    with (
        Terminal(console) as terminal,
        terminal.progress("training \x1b[2J[/x]", 100, "steps") as advance,
        terminal.progress("reading", 0, "files") as advance_unknown,
    ):
        for second in range(1, 101):
            now[0] = float(second)
            advance(1, loss=1.25)
        advance_unknown(3)
    assert file.getvalue().splitlines() == [
        "training  [2J[/x]: 10 of 100 steps, about 1 min 30 s left, loss 1.25",
        "training  [2J[/x]: 70 of 100 steps, about 30 s left, loss 1.25",
        "reading: 3 files",
    ]


def test_short_tasks_are_silent_without_a_terminal() -> None:
    file = io.StringIO()
    with (
        Terminal(Console(file=file, force_terminal=False)) as terminal,
        terminal.progress("training", 10, "tokens") as advance,
    ):
        advance(5, loss=1.0)
    assert file.getvalue().strip() == ""


def test_progress_shows_loss_speed_and_time_left() -> None:
    file = io.StringIO()
    with (
        Terminal(Console(file=file, force_terminal=True, width=160)) as terminal,
        terminal.progress("training [/x]", 10, "tokens") as advance,
    ):
        advance(2, loss=1.25)
        advance(3, loss=1.25)
        terminal._bars.refresh()
    for part in ("training [/x]", "5/10", "tokens/s", "loss 1.2500", "left"):
        assert part in file.getvalue()
