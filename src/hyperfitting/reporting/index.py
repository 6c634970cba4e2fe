"""The index of all reports: one page that links to each experiment's."""

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from hyperfitting.reporting.assets import environment
from hyperfitting.reporting.sweeps import SweepRecords
from hyperfitting.store import write_json, write_text

PAGE = "index.html"
_NOTE = "report.json"


def note(report: Path, title: str, sweep: SweepRecords) -> None:
    """Note beside a report what it is of, and write the index of all reports again."""
    finished = sum(1 for _ in sweep.finished())
    said = {
        "title": title,
        "command": " ".join(sweep.spec["command"]),
        "finished": finished,
        "members": len(sweep.entries),
    }
    write_json(report / _NOTE, said)
    write(report.parent)


def write(reports: Path) -> Path:
    """Write the index of all reports in a folder, and return it."""
    path = reports / PAGE
    write_text(path, environment().get_template(PAGE).render(reports=list(_found(reports))))
    return path


def _found(reports: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(reports.glob(f"*/{_NOTE}")):
        with suppress(OSError, ValueError):
            yield {"folder": path.parent.name, **json.loads(path.read_text("utf-8"))}
