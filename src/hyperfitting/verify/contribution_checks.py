"""What can be checked of a contribution: who made it, that it is whole, and of committed code."""

from collections.abc import Iterator
from pathlib import Path

from hyperfitting.errors import UserError
from hyperfitting.formatting import listed
from hyperfitting.record.files import RECORD_FILE, read_record
from hyperfitting.reporting.community import FOLDER, WHO_FILE, read_contributor
from hyperfitting.sweep.spec import SPEC_FILE, read_sweep_spec
from hyperfitting.verify.check import Check


def contribution_folders(path: Path) -> list[Path]:
    """Return the folders at or below a path that are in `community/` or have a `who.yaml`."""
    return sorted(
        folder
        for folder in (path, *path.rglob("*"))
        if folder.is_dir()
        and (folder.resolve().parent.name == FOLDER or (folder / WHO_FILE).is_file())
    )


def check_contribution(folder: Path) -> Iterator[Check]:
    """Yield the checks of one contributor's folder, besides those of its runs and sweeps."""
    try:
        yield Check(WHO_FILE, "passed", read_contributor(folder / WHO_FILE).mark)
    except UserError as error:
        yield Check(WHO_FILE, "failed", error.problem)
    yield _check_whole(folder)
    yield _check_committed(folder)


def _check_whole(folder: Path) -> Check:
    """Compare the records in a folder with the runs of the sweeps in it."""
    name = "whole sweeps"
    sweeps = sorted(path.parent for path in folder.glob(f"*/{SPEC_FILE}"))
    if not sweeps:
        return Check(name, "failed", f"there is no EXPERIMENT_SCALE/{SPEC_FILE}")
    try:
        runs = {sweep / run.name for sweep in sweeps for run in read_sweep_spec(sweep).runs}
    except UserError as error:
        return Check(name, "failed", error.problem)
    recorded = {record.parent for record in folder.rglob(RECORD_FILE)}
    differing = {"without a record": runs - recorded, "runs of no sweep": recorded - runs}
    problems = [
        f"{problem}: {listed(sorted(str(run.relative_to(folder)) for run in differing_runs))}"
        for problem, differing_runs in differing.items()
        if differing_runs
    ]
    if problems:
        return Check(name, "failed", "; ".join(problems))
    return Check(name, "passed", f"{len(sweeps)} with all {len(runs)} records")


def _check_committed(folder: Path) -> Check:
    """Check that every record can be read, and is of a commit without changes."""
    name, changed, unknown = "committed code", [], []
    for path in sorted(folder.rglob(RECORD_FILE)):
        run = str(path.parent.relative_to(folder))
        try:
            git = read_record(path).code.git
        except UserError as error:
            return Check(name, "failed", f"{run} cannot be read: {error.problem}")
        if git is None:
            unknown.append(run)
        elif git.dirty:
            changed.append(run)
    if changed:
        return Check(name, "failed", f"made with uncommitted changes: {listed(changed)}")
    if unknown:
        return Check(name, "not checked", f"made by an installed package: {listed(unknown)}")
    return Check(name, "passed", "no record was made with uncommitted changes")
