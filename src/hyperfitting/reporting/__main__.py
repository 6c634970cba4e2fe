"""Draw a sweep's report from the records that exist: python -m hyperfitting.reporting SWEEP_DIR."""

import argparse
import sys
from pathlib import Path

from hyperfitting.errors import UserError
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
    try:
        print(f"report     {write_report(arguments.folder.absolute(), arguments.to)}")
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
