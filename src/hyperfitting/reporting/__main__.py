"""Draw a sweep's report from the records that exist: python -m hyperfitting.reporting SWEEP_DIR."""

import argparse
import sys
from pathlib import Path

from hyperfitting.failures import exit_status
from hyperfitting.reporting.report import write_report


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m hyperfitting.reporting", description="Draw a sweep's tables and figures."
    )
    parser.add_argument(
        "folder", type=Path, metavar="SWEEP_DIR", help="such as outputs/sweeps/NAME"
    )
    parser.add_argument("--to", type=Path, help="folder of all reports (default: beside sweeps/)")
    arguments = parser.parse_args()
    folder: Path = arguments.folder.resolve()
    sys.exit(exit_status(lambda: print(f"report     {write_report(folder, arguments.to)}")))


if __name__ == "__main__":
    main()
