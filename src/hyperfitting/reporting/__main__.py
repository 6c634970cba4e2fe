"""Draw a sweep's report from the records that exist: python -m hyperfitting.reporting SWEEP_DIR."""

import argparse
import sys
from pathlib import Path

from hyperfitting.errors import UserError
from hyperfitting.failures import exit_status
from hyperfitting.reporting.report import write_report
from hyperfitting.reporting.sweep_records import load_sweep


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m hyperfitting.reporting", description="Draw a sweep's tables and figures."
    )
    parser.add_argument(
        "folder", type=Path, metavar="SWEEP_DIR", help="such as outputs/sweeps/NAME"
    )
    parser.add_argument(
        "--to",
        type=Path,
        help="folder of all reports, such as docs/results: records made with uncommitted changes "
        "are refused (default: beside sweeps/)",
    )
    parser.add_argument("--with-changes", action="store_true", help="accept such records")
    arguments = parser.parse_args()
    if arguments.with_changes and not arguments.to:
        parser.error("--with-changes changes nothing without --to")
    folder: Path = arguments.folder.resolve()

    def task() -> None:
        if arguments.to and not arguments.with_changes:
            refuse_changes(folder)
        print(f"report     {write_report(folder, arguments.to)}")

    sys.exit(exit_status(task))


def refuse_changes(folder: Path) -> None:
    """Refuse to publish a sweep with runs that nobody can repeat from a commit.

    Raises:
        UserError: there are such runs; or the folder is no sweep's.
    """
    changed = load_sweep(folder).made_with_changes()
    if changed:
        raise UserError(
            f"made with uncommitted changes: {', '.join(changed)}",
            field="SWEEP_DIR",
            value=folder,
            valid="runs of a commit",
            hint="commit, and run the sweep again (trainings are reused); or --with-changes",
        )


if __name__ == "__main__":
    main()
