"""Draw a sweep's report again, of what is there: python -m hyperfitting.reporting SWEEP_DIR."""

import argparse
import sys
from pathlib import Path

from hyperfitting.errors import UserError
from hyperfitting.reporting import report


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m hyperfitting.reporting", description="Draw a sweep's tables and figures."
    )
    parser.add_argument(
        "folder", type=Path, metavar="SWEEP_DIR", help="such as outputs/sweeps/NAME"
    )
    parser.add_argument("--to", type=Path, help="where reports are kept (default: beside sweeps/)")
    given = parser.parse_args()
    try:
        print(f"report     {report.write(given.folder.absolute(), given.to)}")
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
