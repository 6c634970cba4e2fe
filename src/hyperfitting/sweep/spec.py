"""sweep.json: what a sweep consists of, as typed, versioned classes; its only reader and writer.

It is written when a sweep starts, and read by reports and by the runs (for their labels). Raise
`SPEC_VERSION` when a field changes.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator

from hyperfitting.errors import UserError
from hyperfitting.runtime.code_version import CodeVersion
from hyperfitting.runtime.files import first_problem, make_folder, read_versioned, write_json
from hyperfitting.runtime.strict_model import StrictModel

SPEC_FILE = "sweep.json"
SPEC_VERSION = 2
_FILES_OF_REPORT = ("tables", "figures")
"""Sections of a report whose keys become file names."""
_NEUTRAL_ARGUMENTS = (
    "-", "experiment=", "scale=", "seed=", "plan=", "store=", "remote_stores=", "hardware",
    "tracking", "hydra.sweep.", "hydra.launcher", "hydra/launcher", "hydra.job.", "hydra.verbose=",
    "hydra.sweeper.code_change=", "hydra.sweeper.max_attempts=",
)  # fmt: skip
"""Beginnings of arguments that change how an experiment is run, and not what it measures."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


Options = dict[Any, Any] | list[Any]
"""Of an axis: overrides by label, or values."""


class RunEntrySpec(StrictModel):
    """A run of the sweep."""

    name: str = Field(description="its name, and its folder's")
    labels: dict[str, str] = Field(description="by axis, the label of its option")
    settings: str | None = Field(
        default=None, description="digest of its settings that can change a result"
    )

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        return _plain_name(name)

    @field_validator("labels")
    @classmethod
    def _check_labels(cls, labels: dict[str, str]) -> dict[str, str]:
        for text in (*labels, *labels.values()):
            if _CONTROL.search(text):
                raise ValueError(f"{text!r} contains control characters")
        return labels


class ScaleSpec(StrictModel):
    """What a sweep has in addition at a scale."""

    base_overrides: list[str] = Field(default=[], description="overrides of every run")
    axes: dict[str, Options] | None = Field(default=None, description="axes of the runs")


class SweepSpec(StrictModel):
    """A sweep: how it was started, its runs, and its report."""

    version: int = Field(
        default=SPEC_VERSION, description=f"version of this format: {SPEC_VERSION}"
    )
    name: str = Field(description="that of its experiment and scale, whatever its folder is called")
    scale: str = Field(description="`embedded` or `paper`")
    command: list[str] = Field(description="the command line that started it")
    scales: dict[str, ScaleSpec | None] = Field(description="`hydra.sweeper.scales`")
    axes: dict[str, Options] = Field(description="`hydra.sweeper.axes`")
    report: dict[str, Any] = Field(description="`hydra.sweeper.report`")
    runs: list[RunEntrySpec] = Field(description="all runs, in order")
    code: CodeVersion | None = Field(
        default=None, description="the code that it is pinned to; null: unknown"
    )

    @property
    def experiment(self) -> str:
        """The experiment's name: the sweep's, without its scale."""
        return self.name.removesuffix(f"_{self.scale}")

    @property
    def changing_overrides(self) -> list[str]:
        """Overrides of its command that change what the experiment measures."""
        return [
            argument
            for argument in self.command[1:]
            if not argument.lstrip("+").startswith(_NEUTRAL_ARGUMENTS)
        ]

    @field_validator("report")
    @classmethod
    def _check_report(cls, report: dict[str, Any]) -> dict[str, Any]:
        for section in _FILES_OF_REPORT:
            names = report.get(section) or {}
            if not isinstance(names, Mapping):
                raise ValueError(f"{section} is not a mapping")
            for name in names:
                _plain_name(str(name))
        return report


def read_sweep_spec(folder: Path) -> SweepSpec:
    """Return the description of the sweep in a folder.

    Raises:
        UserError: the folder holds no sweep, an invalid one, or one of another version.
    """
    path = folder / SPEC_FILE
    if not path.is_file():
        raise UserError(
            f"is no sweep: it has no {SPEC_FILE}",
            field="folder",
            value=folder,
            hint="a folder under outputs/sweeps",
        )
    return read_versioned(
        path,
        SweepSpec,
        "version",
        SPEC_VERSION,
        field="folder",
        value=folder,
        hint="the command that started it writes it again; finished runs are kept",
    )


def write_sweep_spec(folder: Path, **values: Any) -> SweepSpec:
    """Write the description of a sweep into its folder, atomically, and return it.

    Args:
        folder: of the sweep; created if it does not exist.
        values: the fields of `SweepSpec`, other than `version`.

    Raises:
        UserError: a value is invalid, such as a table's name that is not a plain file name, or
            the folder cannot be created.
    """
    try:
        spec = SweepSpec.model_validate(values)
    except ValidationError as error:
        raise UserError(f"the sweep cannot be described: {first_problem(error)}") from error
    make_folder(folder, "hydra.sweep.dir", "another hydra.sweep.dir=DIR")
    write_json(folder / SPEC_FILE, spec.model_dump(mode="json"))
    return spec


def _plain_name(name: str) -> str:
    """Return a name, checked to be that of a file within a folder."""
    if name in ("", ".", "..") or any(c in name for c in "/\\") or _CONTROL.search(name):
        raise ValueError(f"{name!r} is not a plain file name")
    return name
