"""All checks of a result: each run, each sweep as a whole, and each contribution."""

from collections.abc import Iterator
from pathlib import Path

from hyperfitting.errors import UserError
from hyperfitting.record.files import RECORD_FILE, newest_record
from hyperfitting.sweep.spec import SPEC_FILE
from hyperfitting.verify.check import Check
from hyperfitting.verify.contribution_checks import check_contribution, contribution_folders
from hyperfitting.verify.run_checks import check_run
from hyperfitting.verify.sweep_checks import check_sweep


def run_folders(path: Path) -> list[Path]:
    """Return the folders of the runs that a path names, in order.

    Args:
        path: a results.json, the folder of a run or of a sweep, a folder with such folders, or
            `latest`: the newest run below `outputs/runs`.

    Raises:
        UserError: there is none.
    """
    if str(path) == "latest":
        return [newest_record().parent]
    if path.name == RECORD_FILE and path.is_file():
        return [path.parent]
    folders = sorted(record.parent for record in path.rglob(RECORD_FILE))
    if not folders:
        raise UserError(
            "has no result",
            field="RESULT",
            value=path,
            valid=f"a {RECORD_FILE}, a run's or a sweep's folder, or a folder of them",
        )
    return folders


def check_result(path: Path, store: Path | None = None) -> Iterator[tuple[str, Iterator[Check]]]:
    """Yield the checks of each run, sweep and contribution that a path names, by a title.

    Args:
        path: as of `run_folders`.
        store: holds the artifacts; none: the store that each record names.

    Raises:
        UserError: there is no run.
    """
    for folder in run_folders(path):
        yield str(folder), check_run(folder, store)
    for spec in sorted(path.rglob(SPEC_FILE)):
        yield f"all of {spec.parent}", check_sweep(spec.parent)
    for folder in contribution_folders(path):
        yield f"contribution {folder}", check_contribution(folder)
