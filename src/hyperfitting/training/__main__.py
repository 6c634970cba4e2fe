"""One rank of a distributed training: `python -m hyperfitting.training JOB.json`.

Started by `training.launch`, once per rank.
"""

import json
import sys
from pathlib import Path

from hyperfitting.runtime.logs import log_warnings
from hyperfitting.runtime.processes import exit_with_parent


def main() -> None:
    """Run the rank that the environment variables describe."""
    job = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    exit_with_parent(job["parent_pid"])
    log_warnings()
    from hyperfitting.training.worker import run_rank  # imports transformers: takes seconds

    run_rank(job["task"])


if __name__ == "__main__":
    main()
