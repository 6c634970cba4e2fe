"""Where to look: `hyperfit-dashboard` shows the reports here, or builds the dashboard on W&B."""

import argparse
import sys
import webbrowser
from pathlib import Path

from hyperfitting.errors import UserError


def _pages(given: argparse.Namespace) -> None:
    from hyperfitting.reporting.serve import HOST, draw_anew, served

    for name, wrong in draw_anew(given.outputs):
        print(f"{name}: {wrong}" if wrong else f"drawn      {name}")
    with served(given.outputs / "reports", given.port) as server:
        url = f"http://{HOST}:{server.server_port}/"
        print(f"reports    {url}   (Ctrl+C ends)", flush=True)
        if given.open:
            webbrowser.open(url)
        server.serve_forever()


def _sync(given: argparse.Namespace) -> None:
    from hyperfitting.tracking import sync

    count = sync(given.outputs)
    print(f"sent       {count} runs" if count else "nothing is left to send")


def _wandb(given: argparse.Namespace) -> None:
    try:
        from hyperfitting.workspace import build
    except ImportError as error:
        raise UserError(
            f"needs the package {error.name}, which is not installed",
            hint="pip install 'hyperfitting[dashboard]'",
        ) from error

    for what, url in build(given.entity, given.project, given.outputs).items():
        print(f"{what:10} {url}")


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
    online = commands.add_parser(
        "wandb", help="make the workspace and the report on W&B, or make them again in place"
    )
    online.add_argument("--project", default="hyperfitting", help="W&B project (%(default)s)")
    online.add_argument("--entity", help="W&B user or team (default: your own)")
    online.set_defaults(run=_wandb)
    sync = commands.add_parser("sync", help="send to W&B what it does not have yet")
    sync.set_defaults(run=_sync)
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    given = _parser().parse_args(arguments)
    try:
        given.run(given)
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print()


if __name__ == "__main__":
    main()
