"""`hyperfit-dashboard`: serve the reports, upload offline runs, build the dashboard on W&B."""

import argparse
import itertools
import sys
import webbrowser
from contextlib import suppress
from pathlib import Path

from hyperfitting.errors import UserError, escape
from hyperfitting.failures import exit_status


def _pages(arguments: argparse.Namespace) -> None:
    from hyperfitting.reporting.serve import HOST, serving, update_claims, update_reports

    updates = (update_reports(arguments.outputs), update_claims(arguments.outputs))
    for name, error in itertools.chain(*updates):
        print(f"{escape(name)}: {error}" if error else f"drawn      {escape(name)}")
    with serving(arguments.outputs / "reports", arguments.port) as server:
        url = f"http://{HOST}:{server.server_port}/"
        print(f"reports    {url}   (Ctrl+C ends)", flush=True)
        if arguments.open:
            webbrowser.open(url)
        with suppress(KeyboardInterrupt):
            server.serve_forever()
    print()


def _sync(arguments: argparse.Namespace) -> None:
    from hyperfitting.tracking.sync import running, sync

    n_running = len(running(arguments.outputs))
    count = sync(arguments.outputs)
    print(f"uploaded   {count} runs" if count else "nothing to upload")
    if n_running:
        print(f"left out   {n_running} that are running: the same command uploads them afterwards")


def _wandb(arguments: argparse.Namespace) -> None:
    try:
        from hyperfitting.tracking.workspace import build
    except ImportError as error:
        raise UserError(
            f"needs the package {error.name}, which is not installed",
            hint="pip install 'hyperfitting[dashboard]'",
        ) from error

    for view, url in build(arguments.entity, arguments.project, arguments.outputs).items():
        print(f"{view:10} {url}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hyperfit-dashboard", description=__doc__)
    parser.add_argument(
        "--outputs", type=Path, default=Path("outputs"), help="where hyperfit writes (%(default)s)"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    pages = commands.add_parser("pages", help="serve the reports to this machine's browser")
    pages.add_argument("--port", type=int, default=8000, help="0: any free one (%(default)s)")
    pages.add_argument("--no-open", dest="open", action="store_false", help="open no browser")
    pages.set_defaults(run=_pages)
    wandb = commands.add_parser(
        "wandb", help="build the workspace and the report on W&B, or replace their content"
    )
    wandb.add_argument("--project", default="hyperfitting", help="W&B project (%(default)s)")
    wandb.add_argument("--entity", help="W&B user or team (default: your own)")
    wandb.set_defaults(run=_wandb)
    sync = commands.add_parser(
        "sync", help="upload the offline runs that have ended and W&B does not have"
    )
    sync.set_defaults(run=_sync)
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parsed = _parser().parse_args(arguments)
    sys.exit(exit_status(lambda: parsed.run(parsed)))


if __name__ == "__main__":
    main()
