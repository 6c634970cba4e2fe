"""Logging of the commands that Hydra does not configure; its own is conf/hydra/job_logging."""

import logging

_NOISY_LOGGERS = ("torchao", "torch.utils._pytree")
"""They warn of missing kernels and deprecations when transformers is imported."""


def log_warnings() -> None:
    """Log warnings to the standard error."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    for name in _NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
