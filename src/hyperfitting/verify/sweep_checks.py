"""What can be checked of a sweep as a whole."""

from collections.abc import Iterator
from pathlib import Path

from hyperfitting.errors import UserError
from hyperfitting.formatting import listed
from hyperfitting.record.files import RECORD_FILE, read_record
from hyperfitting.sweep.spec import SPEC_FILE, read_sweep_spec
from hyperfitting.verify.check import Check
from hyperfitting.verify.description import check_description


def check_sweep(folder: Path) -> Iterator[Check]:
    """Yield the checks of a sweep as a whole."""
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
