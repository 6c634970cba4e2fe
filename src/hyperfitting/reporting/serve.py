"""The reports of all experiments over HTTP, for this machine only."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from hyperfitting.errors import UserError
from hyperfitting.reporting import index, report
from hyperfitting.results import FILE_NAME
from hyperfitting.sweep.state import SPEC

HOST = "127.0.0.1"


class _Quiet(SimpleHTTPRequestHandler):
    """Serves a folder, and says nothing of each request."""

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def end_headers(self) -> None:
        """Have the browser ask each time: a report may have been drawn again."""
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()


def draw_anew(outputs: Path) -> Iterator[tuple[str, str]]:
    """Draw the reports of sweeps that have gone on since theirs was drawn.

    Yields:
        The name of a sweep whose report was drawn, and what was wrong with it ("": nothing).
    """
    for spec in sorted((outputs / "sweeps").glob(f"*/{SPEC}")):
        folder = spec.parent
        drawn = outputs / "reports" / folder.name / index.PAGE
        newest = max(p.stat().st_mtime for p in (spec, *folder.glob(f"*/{FILE_NAME}")))
        if drawn.is_file() and drawn.stat().st_mtime >= newest:
            continue
        try:
            report.write(folder)
            yield folder.name, ""
        except UserError as error:
            yield folder.name, str(error)


@contextmanager
def served(reports: Path, port: int) -> Iterator[ThreadingHTTPServer]:
    """Serve the reports in this context, with their index.

    Args:
        reports: the folder of all reports.
        port: where; 0: any that is free.

    Raises:
        UserError: the port is taken.
    """
    reports.mkdir(parents=True, exist_ok=True)
    index.write(reports)
    try:
        server = ThreadingHTTPServer((HOST, port), partial(_Quiet, directory=str(reports)))
    except OSError as error:
        raise UserError(
            f"cannot be listened on: {error.strerror}",
            field="--port",
            value=port,
            hint="another one, or --port 0 for any that is free",
        ) from error
    with server:
        yield server
