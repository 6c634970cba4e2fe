"""Results from other people's machines: `community/NAME/`, each with a `who.yaml` and sweeps.

A report that is drawn beside that folder (`--to docs/results`) shows the runs of the same
experiment, at any scale, as rows of their own, marked with who made them and on what.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field, ValidationError
from yaml import YAMLError

from hyperfitting.errors import UserError
from hyperfitting.reporting.sweep_records import SweepRecords, load_sweep
from hyperfitting.reporting.tables import Row, Table, build_table
from hyperfitting.runtime.files import first_problem
from hyperfitting.runtime.strict_model import StrictModel
from hyperfitting.sweep.spec import SPEC_FILE, SweepSpec

FOLDER, WHO_FILE = "community", "who.yaml"


class Contributor(StrictModel):
    """who.yaml: whose results these are."""

    name: str = Field(min_length=1, max_length=80, description="a person, group or account")
    hardware: str = Field(min_length=1, max_length=80, description="such as `8x H100 80GB`")
    contact: str | None = Field(default=None, max_length=200, description="a URL or an address")

    @property
    def mark(self) -> str:
        """What rows are marked with."""
        return f"by {self.name}, {self.hardware}"


@dataclass(frozen=True)
class Contribution:
    """A sweep from someone else's machine."""

    contributor: Contributor
    sweep: SweepRecords


def read_contributor(path: Path) -> Contributor:
    """Return what a who.yaml says.

    Raises:
        UserError: it cannot be read, or a field is missing or unknown.
    """
    try:
        values = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        return Contributor.model_validate(values)
    except (OSError, ValueError, YAMLError, OmegaConfBaseException) as error:
        problem = first_problem(error) if isinstance(error, ValidationError) else str(error)
        raise UserError(
            f"is not valid: {problem}",
            field=WHO_FILE,
            value=path,
            valid="name, hardware, and contact if you like",
        ) from error


def contributions(folder: Path, spec: SweepSpec) -> list[Contribution]:
    """Return the contributed sweeps of an experiment, by folder.

    Args:
        folder: of all contributions; it need not exist.
        spec: of a sweep of the experiment.

    Raises:
        UserError: one of them is damaged.
    """
    sweeps = [load_sweep(path.parent) for path in sorted(folder.glob(f"*/*/{SPEC_FILE}"))]
    return [
        Contribution(read_contributor(sweep.folder.parent / WHO_FILE), sweep)
        for sweep in sweeps
        if sweep.spec.experiment == spec.experiment
    ]


def with_contributions(table: Table, others: Sequence[Contribution]) -> Table:
    """Return a table with the rows of other people's sweeps after ours, marked."""
    spec = table.spec.model_copy(update={"published": []})  # they stand beside our rows
    rows = [
        _marked(row, other.contributor)
        for other in others
        for row in build_table(other.sweep, table.name, spec).rows
    ]
    return replace(table, rows=[*table.rows, *rows])


def _marked(row: Row, contributor: Contributor) -> Row:
    labels = dict(row.labels)
    first = next(iter(labels))
    labels[first] = f"{labels[first]} ({contributor.mark})"
    return replace(row, labels=labels)
