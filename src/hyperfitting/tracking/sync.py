"""Upload of offline runs to the W&B server."""

import subprocess
import sys
from pathlib import Path

from hyperfitting.errors import UserError
from hyperfitting.formatting import first_line
from hyperfitting.sweep.state import RunFolder
from hyperfitting.tracking.wandb_run import check_reachable

_BATCH = 50
"""Runs per `wandb sync`."""


def unsynced(outputs: Path) -> list[Path]:
    """Return the folders of the offline runs that have ended and have not been uploaded."""
    return [folder for folder in _not_uploaded(outputs) if not _is_running(folder)]


def running(outputs: Path) -> list[Path]:
    """Return the folders of the offline runs that are still written to: they end incomplete."""
    return [folder for folder in _not_uploaded(outputs) if _is_running(folder)]


def _not_uploaded(outputs: Path) -> list[Path]:
    return sorted(p for p in outputs.glob("**/wandb/offline-run-*") if not any(p.glob("*.synced")))


def _is_running(folder: Path) -> bool:
    return RunFolder(folder.parents[1]).is_locked()


def sync(outputs: Path) -> int:
    """Upload the offline runs that have ended and have not been uploaded; return how many.

    Raises:
        UserError: the server is unreachable, or refused some of them.
    """
    import wandb

    folders = unsynced(outputs)
    if not folders:
        return 0
    server = wandb.setup().settings.base_url
    try:
        check_reachable(server)
    except OSError as error:
        raise UserError(
            f"cannot be reached: {first_line(error)}", field="WANDB_BASE_URL", value=server
        ) from error
    for start in range(0, len(folders), _BATCH):
        batch = map(str, folders[start : start + _BATCH])
        subprocess.run(  # noqa: S603  (wandb's own command, in this Python)
            [sys.executable, "-m", "wandb", "sync", *batch], check=False
        )
    remaining = set(_not_uploaded(outputs)).intersection(folders)
    if remaining:
        raise UserError(
            f"W&B refused {len(remaining)} of {len(folders)} runs; its messages are above",
            hint="`wandb login`, then the same command again: it uploads only what is missing",
        )
    return len(folders)
