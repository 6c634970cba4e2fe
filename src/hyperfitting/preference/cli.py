"""`hyperfit-preference`: ask people, or a model, which text is better, and analyze what they say.

Each subcommand is in a module of its own, which adds its parser with `add_parser`.
"""

import argparse
import sys
from importlib import import_module
from importlib.util import find_spec

from hyperfitting.failures import exit_status

_MODULES = ("make", "plan", "serve", "exchange", "judge", "analyze")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hyperfit-preference", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name in _MODULES:
        module = f"hyperfitting.preference.{name}"
        if find_spec(module):
            import_module(module).add_parser(commands)
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parsed = _parser().parse_args(arguments)
    sys.exit(exit_status(lambda: parsed.run(parsed)))


if __name__ == "__main__":
    main()
