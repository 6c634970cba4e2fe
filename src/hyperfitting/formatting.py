"""How numbers, times, texts and errors are written for people."""

import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hyperfitting.metrics.estimate import Estimate

if TYPE_CHECKING:
    from rich.console import Console

_CONTROL = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def estimate(value: Estimate | None, format: str, signed: bool = False) -> str:
    """Return a mean with its interval, such as ``0.629 [0.586, 0.668]``; "" if there is none.

    Args:
        value: the estimate.
        format: of each number, such as ``{:.3f}``.
        signed: write the sign of positive numbers too, as for differences.
    """
    if value is None:
        return ""
    if signed:
        format = format.replace(":+", ":").replace(":", ":+")
    format = re.sub(r":(\+?)", r":\1z", format)  # z: no negative zero
    mean = format.format(value.mean)
    if value.ci95 is None:
        return mean
    return f"{mean} [{', '.join(format.format(end) for end in value.ci95)}]"


def p_value(p: float | None) -> str:
    """Return a p-value, such as ``0.012`` or ``<0.001``; "" if there is none."""
    return "" if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


def duration(seconds: float) -> str:
    """Return a time, such as ``12 s``, ``4 min 10 s`` or ``3 h 05 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def printable(text: str) -> str:
    """Return a text without control characters, which could drive a terminal.

    Newlines and tabs stay; every other control character becomes U+FFFD.
    """
    return text.translate(_CONTROL)


def printable_line(text: str) -> str:
    """Return a text on one line: everything that is not printable becomes a space."""
    return "".join(c if c.isprintable() else " " for c in text)


def listed(names: Sequence[str], limit: int = 4) -> str:
    """Return the first names of a list, for a message."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" * (len(names) > limit))


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type's name if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def make_console() -> "Console":
    """Return the console that commands print on; names and paths are no markup on it."""
    from rich.console import Console  # `--help` needs none

    return Console(width=None if sys.stdout.isatty() else 110, markup=False)
