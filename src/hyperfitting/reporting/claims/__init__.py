"""The claims of both papers, and what the records here say of each: docs/claims.md."""

from collections.abc import Iterable
from pathlib import Path

from hyperfitting.reporting.claims.ledger import Ledger, build_ledger, load_sweeps
from hyperfitting.reporting.claims.render import PAGE, summary, write_ledger, write_page
from hyperfitting.reporting.claims.schema import read_claims

__all__ = ["PAGE", "build", "summary", "write_ledger", "write_page"]


def build(folders: Iterable[Path]) -> Ledger:
    """Return all claims with their verdicts, from the sweeps in some folders.

    Raises:
        UserError: a sweep or record is damaged, or conf/claims.yaml is not valid.
    """
    return build_ledger(read_claims(), load_sweeps(folders))
