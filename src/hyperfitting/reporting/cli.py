"""`hyperfit-report`: draw a sweep's tables and figures, or the ledger of claims."""

import argparse
import sys
from pathlib import Path

from hyperfitting.errors import UserError
from hyperfitting.failures import exit_status
from hyperfitting.reporting import claims
from hyperfitting.reporting.report import write_report
from hyperfitting.reporting.sweep_records import load_sweep

_REPORTS = Path("outputs/reports")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = _parser()
    parsed = parser.parse_args(arguments)
    if getattr(parsed, "with_changes", False) and not parsed.to:
        parser.error("--with-changes changes nothing without --to")
    sys.exit(exit_status(lambda: parsed.run(parsed)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hyperfit-report", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    sweep = commands.add_parser("sweep", help="draw a sweep's tables and figures")
    sweep.add_argument("folder", type=Path, metavar="SWEEP_DIR", help="such as outputs/sweeps/NAME")
    sweep.add_argument(
        "--to",
        type=Path,
        help="folder of all reports, such as docs/results: records made with uncommitted changes "
        "are refused (default: beside sweeps/)",
    )
    sweep.add_argument("--with-changes", action="store_true", help="accept such records")
    sweep.set_defaults(run=_sweep)
    ledger = commands.add_parser("claims", help="compare the papers' claims with all records")
    ledger.add_argument(
        "folders",
        type=Path,
        nargs="*",
        default=[Path("outputs/sweeps")],
        metavar="SWEEPS_DIR",
        help="sweeps, or folders of sweeps (default: outputs/sweeps)",
    )
    ledger.add_argument(
        "--to",
        type=Path,
        help="folder of claims.md and claims.json, such as docs: records made with uncommitted "
        f"changes are refused (default: {_REPORTS})",
    )
    ledger.add_argument(
        "--update",
        action="store_true",
        help="keep what claims.json in that folder has of runs that are not among these sweeps",
    )
    ledger.add_argument(
        "--with-changes",
        action="store_true",
        help="accept records made with uncommitted changes with --to",
    )
    ledger.set_defaults(run=_claims)
    return parser


def _sweep(arguments: argparse.Namespace) -> None:
    folder: Path = arguments.folder.resolve()
    if arguments.to and not arguments.with_changes:
        refuse_changes(folder)
    print(f"report     {write_report(folder, arguments.to)}")


def _claims(arguments: argparse.Namespace) -> None:
    for folder in arguments.folders:
        if not folder.is_dir():
            raise UserError(
                "is no folder",
                field="SWEEPS_DIR",
                value=folder,
                valid="a sweep, or a folder of sweeps",
                hint="hyperfit experiment=seeds",
            )
    if arguments.to and not arguments.with_changes:
        for folder in claims.sweep_folders(arguments.folders):
            refuse_changes(folder)
    to = arguments.to or _REPORTS
    ledger = claims.build(arguments.folders, to if arguments.update else None)
    for path in claims.write_ledger(ledger, to):
        print(f"claims     {path}")
    print(claims.summary(ledger))


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
