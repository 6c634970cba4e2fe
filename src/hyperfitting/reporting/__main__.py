"""`python -m hyperfitting.reporting SWEEP_DIR` is `hyperfit-report sweep SWEEP_DIR`."""

import sys

from hyperfitting.reporting.cli import main

if __name__ == "__main__":
    main(["sweep", *sys.argv[1:]])
