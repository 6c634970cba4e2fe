"""The index of all reports: one page that links to the report of each experiment."""

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from hyperfitting import templates
from hyperfitting.reporting.sweep_records import SweepRecords
from hyperfitting.runtime.files import write_json, write_text

PAGE, CLAIMS_PAGE = "index.html", "claims.html"
_SUMMARY = "report.json"


def add_report(report: Path, title: str, sweep: SweepRecords) -> None:
    """Write what the index shows of a report beside it, and the index of all reports again."""
    summary = {
        "title": title,
        "command": " ".join(sweep.spec.command),
        "finished": sum(1 for _ in sweep.finished()),
        "runs": len(sweep.runs),
    }
    write_json(report / _SUMMARY, summary)
    write_index(report.parent)


def write_index(reports: Path) -> Path:
    """Write the index of all reports in a folder, and return its path."""
    path = reports / PAGE
    template = templates.environment("hyperfitting.reporting").get_template(PAGE)
    write_text(
        path,
        template.render(
            reports=list(_summaries(reports)), has_claims=(reports / CLAIMS_PAGE).is_file()
        ),
    )
    return path


def _summaries(reports: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(reports.glob(f"*/{_SUMMARY}")):
        with suppress(OSError, ValueError):
            summary = json.loads(path.read_text("utf-8"))
            if "runs" in summary:  # else of another version of this software
                yield {"folder": path.parent.name, **summary}
