"""`hyperfit-preference`: ask people or a model which text is better, and analyze the answers."""

import argparse
import sys

from hyperfitting.failures import exit_status
from hyperfitting.preference import analyze, exchange, judge, make, plan, serve
from hyperfitting.runtime.logs import log_warnings


def _parser() -> argparse.ArgumentParser:
    """Return the parser; each subcommand's module adds its own with `add_parser`."""
    parser = argparse.ArgumentParser(prog="hyperfit-preference", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in (plan, make, serve, exchange, judge, analyze):
        module.add_parser(commands)
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parsed = _parser().parse_args(arguments)
    log_warnings()
    sys.exit(exit_status(lambda: parsed.run(parsed), resumes=True))


if __name__ == "__main__":
    main()
