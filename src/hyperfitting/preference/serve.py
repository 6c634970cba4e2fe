"""`hyperfit-preference serve`: the annotation page of a study, its links, and its judgments.

Judgments are in the study's database as soon as they are given; when the server ends, and with
`--export`, they are added to `judgments.jsonl`, and can then no longer be undone.
"""

import argparse
import ipaddress
import signal
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from hyperfitting.errors import UserError, escape, no_such
from hyperfitting.failures import print_error
from hyperfitting.formatting import duration, make_console
from hyperfitting.preference.database import DATABASE_FILE, Database
from hyperfitting.preference.items import JUDGMENTS_FILE, Task, read_task
from hyperfitting.preference.judgments import Rejected, append, read_judgments, validate

if TYPE_CHECKING:
    from rich.table import Table

_GRACE_SECONDS = 5
"""How long open requests may take when the server ends."""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommand `serve`."""
    parser = subparsers.add_parser("serve", help="serve the annotation page; collect its judgments")
    add = parser.add_argument
    add("folder", type=Path, help="of the study: where its task.json is")
    add("--annotators", nargs="+", metavar="NAME", help="who get links (default: all)")
    add(
        "--new-links", nargs="+", metavar="NAME", default=[],
        help="who get another link; their old one opens nothing any more",
    )  # fmt: skip
    add("--host", default="127.0.0.1", help="address to listen on (%(default)s: this machine only)")
    add("--port", type=int, default=8000, help="0: any free one (%(default)s)")
    add("--public-url", metavar="URL", help="where a reverse proxy serves it, with its path")
    add(
        "--trusted-proxies", nargs="+", metavar="IP", default=[],
        help="addresses or networks whose X-Forwarded headers are trusted (default: none)",
    )  # fmt: skip
    add("--database", type=Path, metavar="FILE", help=f"default: {DATABASE_FILE} in the folder")
    add("--export", action="store_true", help=f"only add the answers to {JUDGMENTS_FILE}")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    task = read_task(arguments.folder)
    path = arguments.database or arguments.folder / DATABASE_FILE
    with closing(Database(path, task)) as database:
        if not arguments.export:
            _serve(arguments, task, database)
        judgments = arguments.folder / JUDGMENTS_FILE
        added, rejected = export_judgments(task, database, judgments)
        print(f"judgments  {added} new in {escape(str(judgments))}")
        for judgment in rejected:
            print(f"left out   {escape(judgment.reason)}")


def export_judgments(task: Task, database: Database, path: Path) -> tuple[int, list[Rejected]]:
    """Add the page's judgments to a study's file; they can no longer be undone.

    Args:
        task: the study.
        database: of its page.
        path: of its `judgments.jsonl`; judgments that are there stay, and are not added again.

    Returns:
        How many were added, and those left out, such as those that were imported before.
    """
    existing = read_judgments(path)
    known = {judgment.model_dump_json() for judgment in existing}
    new = [j for j in database.finalize() if j.model_dump_json() not in known]
    accepted, rejected = validate(task, new, existing)
    if accepted:
        append(path, accepted)
    return len(accepted), rejected


def _serve(arguments: argparse.Namespace, task: Task, database: Database) -> None:
    """Serve the page until a signal ends it."""
    try:
        import uvicorn

        from hyperfitting.preference.app import create_app
    except ImportError as error:
        raise UserError(
            f"needs the package {error.name}, which is not installed",
            hint="pip install 'hyperfitting[preference]'",
        ) from error

    annotators = _known(task, "--annotators", arguments.annotators or list(task.annotators))
    renewed = _known(task, "--new-links", arguments.new_links)
    with _listening(arguments.host, arguments.port) as listener:
        address = f"{arguments.host}:{listener.getsockname()[1]}"
        url = _public_url(arguments, listener.getsockname()[1])
        config = uvicorn.Config(
            create_app(task, database, is_https=url.startswith("https:")),
            root_path=urlsplit(url).path,
            proxy_headers=bool(arguments.trusted_proxies),
            forwarded_allow_ips=arguments.trusted_proxies,
            log_config=None,
            log_level="error",
            access_log=False,
            server_header=False,
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=_GRACE_SECONDS,
        )
        tokens = database.issue_tokens(annotators, renewed)
        print(f"study      {escape(task.sweep)}, task {task.content_hash}")
        print(f"listens    {address}")
        _print_links(url, [*dict.fromkeys([*annotators, *renewed])], tokens)
        with _progress_shown(task, database), _ended_by_signals():
            uvicorn.Server(config).run(sockets=[listener])
    print()


def _known(task: Task, option: str, names: Sequence[str]) -> Sequence[str]:
    for name in names:
        if name not in task.annotators:
            raise no_such("annotator", option, name, task.annotators)
    return names


@contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    """Listen in this context.

    Raises:
        UserError: the port is in use, or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=128)
    except (OSError, OverflowError) as error:
        problem = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"cannot be listened on: {problem}",
            field="--host, --port",
            value=f"{host}, {port}",
            hint="another --port, or --port 0 for any free one",
        ) from error
    with listener:
        yield listener


def _public_url(arguments: argparse.Namespace, port: int) -> str:
    """Return the address of the page as annotators see it, without a slash at its end.

    Raises:
        UserError: the one that was given is none.
    """
    host, url = arguments.host, arguments.public_url
    if url is None:
        if not _is_loopback(host):
            print_error(
                "warning: other machines can reach this page, and plain HTTP can be read on the "
                "way\n  try:   a reverse proxy with HTTPS before it, and --public-url https://…"
            )
        if host in ("0.0.0.0", "::", ""):  # noqa: S104 - what the user asked for
            host = socket.gethostname()
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    parts = urlsplit(url)
    is_valid = parts.scheme in ("http", "https") and parts.netloc and url.isascii()
    if not is_valid or parts.query or parts.fragment:
        raise UserError(
            "is no address of a page", field="--public-url", value=url, valid="https://HOST/PATH"
        )
    return str(url).rstrip("/")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _print_links(url: str, annotators: Sequence[str], tokens: Mapping[str, str]) -> None:
    """Print each annotator's link, which nobody can print again."""
    for name in annotators:
        link = f"{url}/join/{tokens[name]}" if name in tokens else "has a link (see --new-links)"
        print(f"{escape(name):10} {link}")
    if tokens:
        print("           (links are printed only once)")
    print("           Ctrl+C ends", flush=True)


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """End this context quietly at Ctrl+C or SIGTERM, after the requests that are being served."""
    replaced = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with suppress(KeyboardInterrupt):
            yield
    finally:
        signal.signal(signal.SIGTERM, replaced)


@contextmanager
def _progress_shown(task: Task, database: Database) -> Iterator[None]:
    """Show in this context how far the annotators are, on a terminal."""
    from rich.live import Live

    console = make_console()
    live = Live(
        console=console,
        get_renderable=lambda: progress_table(task, database),
        refresh_per_second=1,
        transient=True,
    )
    with live if console.is_terminal else nullcontext():
        yield


def progress_table(task: Task, database: Database) -> "Table":
    """Return how far each annotator is, and when the last answer came."""
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    progress = database.progress()
    for name, annotator in task.annotators.items():
        judged, last = progress.get(name, (0, None))
        total = len(annotator.items)
        ago = f"{duration((datetime.now(UTC) - last).total_seconds())} ago" if last else ""
        bar = ProgressBar(max(total, 1), judged, width=24)
        table.add_row(Text(escape(name)), bar, f"{judged} of {total}", ago)
    return table
