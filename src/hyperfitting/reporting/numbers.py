"""How estimates are written, everywhere the same."""

from typing import Any


def estimate(found: dict[str, Any] | None, form: str) -> str:
    """Return a mean with its interval, as ``0.629 [0.586, 0.668]``; "" if there is none."""
    if found is None:
        return ""
    mean = form.format(found["mean"])
    if not found["ci95"]:
        return mean
    return f"{mean} [{', '.join(form.format(end) for end in found['ci95'])}]"


def p_value(p: float | None) -> str:
    """Return a p-value, as ``0.012`` or ``<0.001``; "" if there is none."""
    return "" if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


def duration(seconds: float) -> str:
    """Return a time as ``12 s``, ``4 min 10 s`` or ``3 h 05 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
