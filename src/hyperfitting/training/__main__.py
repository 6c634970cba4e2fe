"""One rank of a distributed training: `python -m hyperfitting.training JOB.json`.

Started by `training.launch`, once per rank.
"""

import json
import logging
import sys
from pathlib import Path

from hyperfitting.runtime.processes import exit_with_parent

_NOISY_LOGGERS = ("torchao", "torch.utils._pytree")
"""They warn of missing kernels and deprecations when transformers is imported."""


def main() -> None:
    """Run the rank that the environment variables describe."""
    job = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    exit_with_parent(job["parent_pid"])
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    for name in _NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    from hyperfitting.training.worker import run_rank  # imports transformers: takes seconds

    run_rank(job["task"])


if __name__ == "__main__":
    main()
