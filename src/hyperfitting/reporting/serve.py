"""The reports of all experiments over HTTP, for this machine only."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from hyperfitting.errors import UserError
from hyperfitting.record.files import RECORD_FILE
from hyperfitting.reporting import claims, index, report
from hyperfitting.sweep.spec import SPEC_FILE

HOST = "127.0.0.1"


class _Handler(SimpleHTTPRequestHandler):
    """Serves a folder without logging each request."""

    def log_message(self, *_: object) -> None:
        """Log nothing."""

    def end_headers(self) -> None:
        """Disable the browser's cache: a report may have been drawn again."""
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()


def update_reports(outputs: Path) -> Iterator[tuple[str, str]]:
    """Draw the reports that are older than a record of their sweep.

    Yields:
        The name of a sweep whose report was drawn, and the error ("": none).
    """
    for spec in sorted((outputs / "sweeps").glob(f"*/{SPEC_FILE}")):
        folder = spec.parent
        page = outputs / "reports" / folder.name / index.PAGE
        newest = max(p.stat().st_mtime for p in (spec, *folder.glob(f"*/{RECORD_FILE}")))
        if page.is_file() and page.stat().st_mtime >= newest:
            continue
        try:
            report.write_report(folder)
            yield folder.name, ""
        except UserError as error:
            yield folder.name, str(error)


def update_claims(outputs: Path) -> Iterator[tuple[str, str]]:
    """Draw the page of the papers' claims if it is older than a record of a sweep; as above."""
    sweeps, page = outputs / "sweeps", outputs / "reports" / claims.PAGE
    records = [path.stat().st_mtime for path in sweeps.glob(f"*/*/{RECORD_FILE}")]
    if not records or (page.is_file() and page.stat().st_mtime >= max(records)):
        return
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        claims.write_page(claims.build([sweeps]), page.parent)
        yield "claims", ""
    except UserError as error:
        yield "claims", str(error)


@contextmanager
def serving(reports: Path, port: int) -> Iterator[ThreadingHTTPServer]:
    """Serve the reports in this context, with their index.

    Args:
        reports: the folder of all reports.
        port: where to listen; 0: any free one.

    Raises:
        UserError: the port is in use.
    """
    reports.mkdir(parents=True, exist_ok=True)
    index.write_index(reports)
    try:
        server = ThreadingHTTPServer((HOST, port), partial(_Handler, directory=str(reports)))
    except OSError as error:
        raise UserError(
            f"cannot be listened on: {error.strerror}",
            field="--port",
            value=port,
            hint="another one, or --port 0 for any free one",
        ) from error
    with server:
        yield server
