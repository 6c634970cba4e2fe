"""Finding the runs of a result, and what can be checked of a sweep as a whole."""

from collections.abc import Iterator
from pathlib import Path

from hyperfitting.errors import UserError
from hyperfitting.formatting import listed
from hyperfitting.record.files import RECORD_FILE, newest_record, read_record
from hyperfitting.reporting.community import WHO_FILE, read_contributor
from hyperfitting.sweep.spec import SPEC_FILE, read_sweep_spec
from hyperfitting.verify.check import Check
from hyperfitting.verify.description import check_description


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


def check_sweep(folder: Path) -> Iterator[Check]:
    """Yield the checks of a sweep as a whole; none if the folder is not a sweep's."""
    if not (folder / SPEC_FILE).is_file():
        return
    try:
        spec = read_sweep_spec(folder)
    except UserError as error:
        yield Check("sweep", "failed", error.problem)
        return
    missing = [run.name for run in spec.runs if not (folder / run.name / RECORD_FILE).is_file()]
    if missing:
        yield Check("runs", "not checked", f"without a record: {listed(missing)}")
    else:
        yield Check("runs", "passed", f"all {len(spec.runs)} have a record")
    yield from check_description(folder, spec)
    if spec.code is None:
        yield Check("code of the sweep", "not checked", f"{SPEC_FILE} does not name it")
        return
    other = []
    for run in spec.runs:
        try:
            digest = read_record(folder / run.name / RECORD_FILE).code.digest
        except UserError:
            continue  # missing, or a failed check of its own
        if digest != spec.code.digest:
            other.append(run.name)
    if other:
        yield Check("code of the sweep", "failed", f"made by other code: {listed(other)}")
    else:
        yield Check("code of the sweep", "passed", f"all runs are of {spec.code}")


def check_contributors(folder: Path) -> Iterator[Check]:
    """Yield whether each `who.yaml` in or below a folder is valid."""
    for path in sorted(folder.rglob(WHO_FILE)):
        try:
            yield Check(f"{path.parent.name}/{WHO_FILE}", "passed", read_contributor(path).mark)
        except UserError as error:
            yield Check(f"{path.parent.name}/{WHO_FILE}", "failed", error.problem)
