"""What a check finds, as one JSON file and as a table."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from hyperfitting.runtime.files import write_json


@dataclass(frozen=True)
class Finding:
    """One case of a check."""

    case: str
    """Such as `bfloat16, 8 x 256`."""
    measured: dict[str, Any] = field(default_factory=dict)
    """Numbers with their unit in the name, and words; JSON-serializable."""
    passed: bool | None = None
    """None: a measurement, or not possible on this device; nothing is asserted."""
    expected: str = ""
    """What was asserted."""
    check: str = ""
    """The name of the check; the runner sets it."""


def write_findings(path: Path, machine: dict[str, Any], findings: Iterable[Finding]) -> None:
    """Write all findings so far, whole or not at all."""
    write_json(path, {"machine": machine, "findings": [asdict(f) for f in findings]})


def findings_table(findings: Iterable[Finding]) -> Table:
    """Return the findings as a table, one row a case."""
    table = Table("check", "case", "", "measured")
    previous = ""
    for finding in findings:
        name = "" if finding.check == previous else finding.check
        previous = finding.check
        mark = {True: "ok", False: f"FAILED: expected {finding.expected}", None: ""}[finding.passed]
        style = "red" if finding.passed is False else ""
        measured = ", ".join(f"{key} {_short(value)}" for key, value in finding.measured.items())
        table.add_row(name, Text(finding.case), Text(mark, style), Text(measured))
    return table


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
