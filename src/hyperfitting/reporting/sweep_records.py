"""A sweep as a report reads it: its description, its runs, and the records that exist.

Read from files alone, so a report can be drawn at any time, of the runs that have finished.
"""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from hyperfitting.errors import UserError
from hyperfitting.preference.items import FOLDER as PREFERENCE_FOLDER
from hyperfitting.preference.results import Analysis, read_analysis
from hyperfitting.record.files import Predictions, read_predictions, read_record
from hyperfitting.record.schema import Record
from hyperfitting.sweep.spec import SweepSpec, read_sweep_spec
from hyperfitting.sweep.state import RunFolder

_PENDING = {"waiting": "not run yet", "running": "running"}


@dataclass(frozen=True)
class RunEntry:
    """A run of a sweep, and its record if it has finished."""

    name: str
    labels: Mapping[str, str]
    """By axis of the sweep."""
    folder: Path

    @cached_property
    def record(self) -> Record | None:
        """Its record; none: it has not finished.

        Raises:
            UserError: it is damaged, or was written by another version of this software.
        """
        path = RunFolder(self.folder).record_path
        return read_record(path) if path.is_file() else None

    @cached_property
    def predictions(self) -> Predictions | None:
        """Both models' predictions on the reference texts, if they lie beside the record."""
        return read_predictions(self.folder)

    @property
    def missing(self) -> str:
        """Why there is no record."""
        status = RunFolder(self.folder).status()
        if status.kind == "failed":
            return f"failed: {status.reason.partition(chr(10))[0]}"
        return _PENDING.get(status.kind, status.kind)


@dataclass(frozen=True)
class SweepRecords:
    """A sweep's description and runs."""

    folder: Path
    spec: SweepSpec
    runs: list[RunEntry]

    @cached_property
    def preference(self) -> Analysis | None:
        """The analysis of the judgments of its texts, if there is one.

        Raises:
            UserError: it is damaged, or was written by another version of this software.
        """
        return read_analysis(self.folder / PREFERENCE_FOLDER)

    @property
    def is_complete(self) -> bool:
        """Whether every run has a record."""
        return all(RunFolder(run.folder).record_path.is_file() for run in self.runs)

    @property
    def finished_at(self) -> str:
        """When its last run finished, as its record has it (UTC); "": no record has it."""
        times = [""]
        for run in self.runs:
            with suppress(UserError):  # a damaged record has none
                record = run.record
                times.append((record and record.timings.finished_at) or "")
        return max(times)

    def finished(self) -> Iterator[tuple[RunEntry, Record]]:
        """Yield the runs that have finished, with their records."""
        for run in self.runs:
            if run.record is not None:
                yield run, run.record

    @property
    def axes(self) -> list[str]:
        """The axes that runs are labeled by, in order."""
        return list(dict.fromkeys(axis for run in self.runs for axis in run.labels))

    def labels(self, axis: str) -> list[str]:
        """Return the labels of an axis that runs have, in order."""
        return list(dict.fromkeys(run.labels[axis] for run in self.runs if axis in run.labels))

    def labels_at_any_scale(self, axis: str) -> list[str]:
        """Return the labels of an axis at every scale, those of this sweep first."""
        declared = [self.spec.axes]
        declared += [scale.axes for scale in self.spec.scales.values() if scale and scale.axes]
        labels = self.labels(axis)
        for axes in declared:
            labels += [str(label) for label in axes.get(axis, ())]
        return list(dict.fromkeys(labels))

    def labeled(self, labels: Mapping[str, str]) -> list[RunEntry]:
        """Return the runs with these labels."""
        return [run for run in self.runs if labels.items() <= run.labels.items()]

    def provenance(self) -> dict[str, str]:
        """Return how the numbers were made: command, intervals, versions, code, device."""
        records = [record for _, record in self.finished()]
        provenance = {
            "Command": " ".join(self.spec.command),
            "Scale": self.spec.scale,
            "Runs": f"{len(records)} of {len(self.runs)} have finished",
            "Intervals": "95%: bootstrap over texts where a number is of one run; over runs and "
            "texts (crossed random effects) where it is of several that differ",
        }
        if records:
            record = records[-1]
            versions = (f"{package} {version}" for package, version in record.versions.items())
            provenance["Versions"] = ", ".join(versions)
            provenance["Code"] = self._code()
            provenance["Device"] = record.device
        if self.preference is not None:
            provenance["Preference"] = self.preference.summary
        return provenance

    def made_with_changes(self) -> list[str]:
        """Return the names of the finished runs that were made with uncommitted changes."""
        return [
            run.name for run, r in self.finished() if r.code.git is not None and r.code.git.dirty
        ]

    def _code(self) -> str:
        """Return the code of the finished runs; if there are several, with the runs of each."""
        runs: dict[str, list[str]] = {}
        codes = {record.code.digest: str(record.code) for _, record in self.finished()}
        for run, record in self.finished():
            runs.setdefault(codes[record.code.digest], []).append(run.name)
        if len(runs) == 1:
            return next(iter(runs))
        parts = (f"{code}: {', '.join(names)}" for code, names in runs.items())
        return "runs of different code: " + "; ".join(parts)


def load_sweep(folder: Path) -> SweepRecords:
    """Return the sweep in a folder.

    Raises:
        UserError: the folder is no sweep's, or was written by another version of this software.
    """
    spec = read_sweep_spec(folder)
    runs = [RunEntry(run.name, run.labels, folder / run.name) for run in spec.runs]
    return SweepRecords(folder, spec, runs)
