"""How numbers, times, texts and errors are written for people."""

import pytest
from rich.table import Table

from hyperfitting.formatting import (
    duration,
    estimate,
    first_line,
    make_console,
    p_value,
    printable,
    printable_line,
)
from hyperfitting.metrics.estimate import Difference, Estimate


def test_an_estimate_is_its_mean_and_its_interval_if_it_has_one() -> None:
    assert estimate(Estimate(0.6289, (0.5861, 0.6678), 20), "{:.3f}") == "0.629 [0.586, 0.668]"
    assert estimate(Estimate(12.0, None, 1), "{:.1f}") == "12.0"
    assert estimate(None, "{:.3f}") == ""
    difference = Difference(0.25, (-0.5, 1.0), 20, 0.3)
    for form in ("{:.2f}", "{:+.2f}"):
        assert estimate(difference, form, signed=True) == "+0.25 [-0.50, +1.00]"


def test_a_number_that_rounds_to_zero_has_no_minus() -> None:
    value = Estimate(0.0, (-0.0004, 0.0004), 20)
    assert estimate(value, "{:.3f}") == "0.000 [0.000, 0.000]"
    assert estimate(value, "{:+.3f}") == "+0.000 [+0.000, +0.000]"


@pytest.mark.parametrize(
    ("p", "text"),
    [(None, ""), (0.0001, "<0.001"), (0.001, "0.001"), (0.0124, "0.012"), (1, "1.000")],
)
def test_a_p_value_has_three_decimals(p: float | None, text: str) -> None:
    assert p_value(p) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.4, "59 s"), (60, "1 min 00 s"), (250, "4 min 10 s"), (11100, "3 h 05 min")],
)
def test_a_duration_has_its_two_largest_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_control_characters_are_not_printed() -> None:
    assert printable("a\x1b[31mb\x00\x9b\n\tc") == "a\ufffd[31mb\ufffd\ufffd\n\tc"
    assert printable_line("a\nb\u202ec") == "a b c"


def test_the_first_line_of_an_error_is_never_empty() -> None:
    assert first_line(ValueError("\nfirst\nsecond")) == "first"
    assert first_line(ValueError()) == "ValueError"


def test_names_are_no_markup_on_the_console(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("a wide column", title="[/x] [red]y")
    make_console().print(table)
    make_console().print("model      /tmp/[/x]/[red]y")
    out = capsys.readouterr().out
    assert "[/x] [red]y" in out
    assert "/tmp/[/x]/[red]y" in out  # noqa: S108
