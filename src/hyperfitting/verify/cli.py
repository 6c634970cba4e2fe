"""`hyperfit-verify`: checks results without trusting them, and with `--again` reruns one."""

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from hyperfitting.errors import UserError
from hyperfitting.failures import exit_status
from hyperfitting.runtime.logs import log_warnings

if TYPE_CHECKING:
    from rich.console import Console

    from hyperfitting.verify.check import Check

_COLORS = {"passed": "green", "failed": "bold red", "not checked": "yellow"}


def verify(arguments: argparse.Namespace) -> int:
    """Check results, print a table for each run (or JSON), and return the exit status.

    Raises:
        UserError: there is no result, or it cannot be rerun.
    """
    from hyperfitting.formatting import make_console
    from hyperfitting.verify.check import exit_code
    from hyperfitting.verify.result_checks import check_result

    console = make_console()
    groups = check_result(arguments.result, arguments.store)
    if arguments.again:
        groups = itertools.chain(groups, [_rerun(arguments, console)])
    results: dict[str, list[Check]] = {}
    for name, group in groups:
        results[name] = list(group)
        if not arguments.json:
            _print(console, name, results[name])
    checks = list(itertools.chain.from_iterable(results.values()))
    status = exit_code(checks)
    if arguments.json:
        rows = {name: [asdict(check) for check in group] for name, group in results.items()}
        print(json.dumps({"status": status, "results": rows}, indent=1, ensure_ascii=False))
    else:
        counts = {o: sum(check.outcome == o for check in checks) for o in _COLORS}
        console.print(", ".join(f"{n} {outcome}" for outcome, n in counts.items() if n))
    return status


def _rerun(arguments: argparse.Namespace, console: "Console") -> tuple[str, Iterator["Check"]]:
    """Return the checks of a rerun, with their title.

    Raises:
        UserError: there is no result, or it has several runs.
    """
    from hyperfitting.verify.again import check_again
    from hyperfitting.verify.result_checks import run_folders

    folder, *others = run_folders(arguments.result)
    if others:
        raise UserError(
            f"--again reruns one run, and this has {len(others) + 1}",
            field="RESULT",
            value=arguments.result,
            hint=f"one of them, such as {folder}",
        )
    progress = None if arguments.json else console
    checks = check_again(folder, arguments.python, arguments.work, arguments.store, progress)
    return f"{folder}, rerun", checks


def _print(console: "Console", name: str, checks: list["Check"]) -> None:
    from rich.table import Table
    from rich.text import Text

    from hyperfitting.formatting import printable_line

    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in checks:
        table.add_row(
            Text(check.name),
            Text(check.outcome, style=_COLORS[check.outcome]),
            Text(printable_line(check.detail)),
        )
    console.print(Text(name, style="bold"), soft_wrap=True)
    console.print(table)
    console.print()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hyperfit-verify",
        description="Check results without trusting them: files, config, ids, scores, artifacts.",
        epilog="Exit status: 0: every check passed; 1: one failed; 2: none failed, but some could "
        "not be made. Example: hyperfit-verify outputs/sweeps/table1_embedded",
    )
    parser.add_argument(
        "result",
        metavar="RESULT",
        type=Path,
        help="a results.json, a run's folder, a sweep's folder, a folder of them, or latest",
    )
    parser.add_argument("--store", type=Path, help="the run's artifacts (default: as recorded)")
    parser.add_argument("--json", action="store_true", help="print the checks as JSON")
    parser.add_argument("--again", action="store_true", help="rerun it and compare every artifact")
    parser.add_argument(
        "--python",
        type=Path,
        help="with --again: Python of another environment with hyperfitting (default: this one)",
    )
    parser.add_argument(
        "--work",
        type=Path,
        help="with --again: folder to work in, to resume in and to keep (default: temporary)",
    )
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = _parser()
    parsed = parser.parse_args(arguments)
    if not parsed.again and (parsed.python or parsed.work):
        parser.error("--python and --work change nothing without --again")
    log_warnings()
    status = 0

    def task() -> None:
        nonlocal status
        status = verify(parsed)

    sys.exit(exit_status(task, resumes=parsed.work is not None) or status)


if __name__ == "__main__":
    main()
