"""The outcome of one check of a result."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Outcome = Literal["passed", "failed", "not checked"]


@dataclass(frozen=True)
class Check:
    """What was checked, and how it ended."""

    name: str
    outcome: Outcome
    detail: str
    """What was compared; where it failed; or why it could not be checked."""


def exit_code(checks: Sequence[Check]) -> int:
    """Return 0 if every check passed, 1 if one failed, 2 if none did but some could not be made."""
    outcomes = {check.outcome for check in checks}
    return 1 if "failed" in outcomes else 2 if "not checked" in outcomes or not checks else 0
