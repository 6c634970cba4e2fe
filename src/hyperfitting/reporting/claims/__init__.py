"""The claims of both papers, and what the records here say of each: docs/claims.md."""

from collections.abc import Iterable
from pathlib import Path

from hyperfitting.reporting.claims.ledger import Ledger, build_ledger, read_ledger
from hyperfitting.reporting.claims.render import JSON, PAGE, summary, write_ledger, write_page
from hyperfitting.reporting.claims.schema import read_claims
from hyperfitting.reporting.claims.sweeps import load_sweeps, sweep_folders

__all__ = ["PAGE", "build", "summary", "sweep_folders", "write_ledger", "write_page"]


def build(folders: Iterable[Path], update: Path | None = None) -> Ledger:
    """Return all claims with their verdicts, from the sweeps in some folders.

    Args:
        folders: sweeps, or folders of sweeps.
        update: a folder with a claims.json, whose evidence is kept where these sweeps have none.

    Raises:
        UserError: a sweep or record is damaged, conf/claims.yaml is not valid, or there is no
            ledger to update.
    """
    earlier = None if update is None else read_ledger(update / JSON)
    return build_ledger(read_claims(), load_sweeps(folders), earlier)
