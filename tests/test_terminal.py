"""What a person sees, also when a text is hostile or the output is a file."""

import io
from typing import Any

from rich.console import Console

from hyperfitting.terminal import Terminal, outcome

HOSTILE = "\x1b[2J\x1b]0;owned\x07[bold red]not markup[/] <script>alert(1)</script> \x9b1m"


def record(text: str) -> dict[str, Any]:
    estimate = {"mean": 0.5, "ci95": [0.4, 0.6], "n": 1}
    continuation = {
        "text": text * 2,
        "pieces": [text, " b", " c", text, " b", " c"],
        "tokens": [1, 2, 3] * 2,
    }
    return {
        "config": {
            "tuning": {"method": "full"}, "model": {"name": "m"}, "dataset": {"name": "d"},
            "decode": {"name": "greedy"},
        },
        "metrics": {"gen/ttr": estimate},
        "baseline": {"gen/ttr": estimate | {"ci95": None}},
        "difference": {"gen/ttr": estimate | {"p": 0.0004}},
        "slices": [{"set": None, "new_tokens": 6}],
        "notes": [f"mind {text}"],
        "history": [{"epoch": 1, "train/loss": 3.0, "val/loss": 3.0}],
        "samples": [
            {
                "set": text, "context": text, "continuation": continuation,
                "original_continuation": continuation,
            }
        ],
    }  # fmt: skip


def shown(text: str, colour: bool) -> str:
    file = io.StringIO()
    Console(file=file, width=120, force_terminal=colour).print(outcome(record(text), colour))
    return file.getvalue()


def test_a_hostile_text_is_shown_not_obeyed() -> None:
    for colour in (False, True):
        text = shown(HOSTILE, colour)
        for code in ("\x1b[2J", "\x1b]0", "\x07", "\x9b"):
            assert code not in text
    assert "[bold red]not markup[/]" in shown(HOSTILE, False)


def test_repeated_stretches_are_marked_with_and_without_colour() -> None:
    assert "word b c«word b c»" in shown("word", False)
    assert "\x1b[31mword b c\x1b[0m" in shown("word", True)


def test_the_table_shows_means_with_intervals() -> None:
    text = shown("x", False)
    assert "0.500 [0.400, 0.600]" in text
    assert "+0.500 [+0.400, +0.600]" in text
    assert "<0.001" in text
    assert "1 held-out texts" in text
    assert "note: mind x" in text


def test_sets_and_lengths_have_rows_of_their_own() -> None:
    found = record("x")
    part = {key: found[key] for key in ("metrics", "baseline", "difference")}
    found["slices"] += [
        part | {"set": "news", "new_tokens": 6},
        part | {"set": None, "new_tokens": 3},
    ]
    file = io.StringIO()
    Console(file=file, width=120).print(outcome(found, False))
    assert "TTR, news " in file.getvalue()
    assert "TTR at 3 tokens" in file.getvalue()


def test_progress_is_quiet_when_nobody_looks() -> None:
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
        terminal.progress("training", 10, "tokens") as advance,
    ):
        advance(2, loss=1.25)
        advance(3, loss=1.25)
        terminal._bars.refresh()
    for part in ("training", "5/10", "tokens/s", "loss 1.2500", "left"):
        assert part in file.getvalue()
