"""sweep.json: what a sweep consists of, as typed, versioned classes; its only reader and writer.

It is written when a sweep starts, and read by reports and by the runs (for their labels). Raise
`SPEC_VERSION` when a field changes.
"""

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from hyperfitting.errors import UserError
from hyperfitting.runtime.files import write_json

SPEC_FILE = "sweep.json"
SPEC_VERSION = 2
_FILES_OF_REPORT = ("tables", "figures")
"""Sections of a report whose keys become file names."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RunEntrySpec(_Model):
    """A run of the sweep."""

    name: str = Field(description="its name, and its folder's")
    labels: dict[str, str] = Field(description="by axis, the label of its option")

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        return _plain_name(name)


class SweepSpec(_Model):
    """A sweep: how it was started, its runs, and its report."""

    version: int = Field(
        default=SPEC_VERSION, description=f"version of this format: {SPEC_VERSION}"
    )
    name: str = Field(description="name of the sweep")
    scale: str = Field(description="`embedded` or `paper`")
    command: list[str] = Field(description="the command line that started it")
    scales: dict[str, Any] = Field(description="`hydra.sweeper.scales`")
    axes: dict[str, Any] = Field(description="`hydra.sweeper.axes`")
    report: dict[str, Any] = Field(description="`hydra.sweeper.report`")
    runs: list[RunEntrySpec] = Field(description="all runs, in order")

    @field_validator("report")
    @classmethod
    def _check_report(cls, report: dict[str, Any]) -> dict[str, Any]:
        for section in _FILES_OF_REPORT:
            for name in report.get(section) or {}:
                _plain_name(str(name))
        return report


def read_sweep_spec(folder: Path) -> SweepSpec:
    """Return the description of the sweep in a folder.

    Raises:
        UserError: the folder holds no sweep, an invalid one, or one of another version.
    """
    try:
        values = json.loads((folder / SPEC_FILE).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"is no sweep: its {SPEC_FILE} cannot be read",
            field="folder",
            value=folder,
            hint="a folder under outputs/sweeps",
        ) from error
    version = values.get("version") if isinstance(values, dict) else None
    hint = "the command that started it writes it again; finished runs are kept"
    if version != SPEC_VERSION:
        raise UserError(
            f"was written by another version of this software ({version})",
            field="folder",
            value=folder,
            valid=f"version {SPEC_VERSION}",
            hint=hint,
        )
    try:
        return SweepSpec.model_validate(values)
    except ValidationError as error:
        raise UserError(
            f"is not a valid {SPEC_FILE}: {_first_problem(error)}",
            field="folder",
            value=folder,
            hint=hint,
        ) from error


def write_sweep_spec(folder: Path, **values: Any) -> SweepSpec:
    """Write the description of a sweep into its folder, atomically, and return it.

    Args:
        folder: of the sweep; created if it does not exist.
        values: the fields of `SweepSpec`, other than `version`.

    Raises:
        UserError: a value is invalid, such as a table's name that is not a plain file name.
    """
    try:
        spec = SweepSpec.model_validate(values)
    except ValidationError as error:
        raise UserError(f"the sweep cannot be described: {_first_problem(error)}") from error
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / SPEC_FILE, spec.model_dump(mode="json"))
    return spec


def _plain_name(name: str) -> str:
    """Return a name, checked to be that of a file within a folder."""
    if name in ("", ".", "..") or any(sign in name for sign in "/\\\0"):
        raise ValueError(f"{name!r} is not a plain file name")
    return name


def _first_problem(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
