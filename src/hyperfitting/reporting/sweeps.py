"""A sweep as a report sees it: its description, its members, and their records where there are any.

Read from files alone, so that a report can be drawn at any time, of whatever is there.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student_t

from hyperfitting.errors import UserError
from hyperfitting.metrics.uncertainty import paired_difference
from hyperfitting.results import Record, read
from hyperfitting.sweep.state import SPEC, SPEC_VERSION, Folder

LEVEL = 0.95


@dataclass(frozen=True)
class Value:
    """A number with its interval, or why there is none."""

    mean: float = float("nan")
    ci95: tuple[float, float] | None = None
    n: int = 0
    """Texts, or members if several."""
    members: int = 0
    of: int = 0
    """Members that there should be."""
    missing: str = ""

    def times(self, factor: float) -> "Value":
        """Return it in another unit."""
        ends = (self.ci95[0] * factor, self.ci95[1] * factor) if self.ci95 else None
        return replace(self, mean=self.mean * factor, ci95=ends)


@dataclass(frozen=True)
class Entry:
    """One member: its labels, and its record if it has finished."""

    name: str
    labels: Mapping[str, str]
    folder: Path

    @cached_property
    def record(self) -> Record | None:
        """Its record; none: it has not finished.

        Raises:
            UserError: it is of another version of this software.
        """
        path = Folder(self.folder).record
        return read(path) if path.is_file() else None

    @property
    def missing(self) -> str:
        """Why there is no record."""
        status = Folder(self.folder).status()
        if status.kind == "failed":
            return f"failed: {status.reason.partition(chr(10))[0]}"
        return {"waiting": "not run yet", "running": "running"}.get(status.kind, status.kind)


@dataclass(frozen=True)
class SweepRecords:
    """A sweep's description and members."""

    folder: Path
    spec: dict[str, Any]
    entries: list[Entry]

    @classmethod
    def of(cls, folder: Path) -> "SweepRecords":
        """Return what is in a sweep's folder.

        Raises:
            UserError: it is no sweep, or of another version of this software.
        """
        try:
            spec = json.loads((folder / SPEC).read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(
                f"is no sweep: its {SPEC} cannot be read",
                field="folder",
                value=folder,
                hint="a folder under outputs/sweeps",
            ) from error
        if spec.get("version") != SPEC_VERSION:
            raise UserError(
                f"was written by another version of this software ({spec.get('version')})",
                field="folder",
                value=folder,
                valid=f"version {SPEC_VERSION}",
                hint="its command again writes it anew; what has finished stays",
            )
        entries = [Entry(m["name"], m["labels"], folder / m["name"]) for m in spec["members"]]
        return cls(folder, spec, entries)

    def finished(self) -> Iterator[tuple[Entry, Record]]:
        """Yield the members that have finished, with their records."""
        for entry in self.entries:
            if entry.record is not None:
                yield entry, entry.record

    @property
    def axes(self) -> list[str]:
        """The axes that members have labels of, in order."""
        return list(dict.fromkeys(axis for entry in self.entries for axis in entry.labels))

    def labels(self, axis: str) -> list[str]:
        """Return the labels of an axis that members have, in order."""
        return list(dict.fromkeys(e.labels[axis] for e in self.entries if axis in e.labels))

    def at(self, labels: Mapping[str, str]) -> list[Entry]:
        """Return the members with these labels."""
        return [e for e in self.entries if labels.items() <= e.labels.items()]

    def made_with(self) -> dict[str, str]:
        """Return how the numbers were made: command, intervals, versions, code, device."""
        records = [record for _, record in self.finished()]
        found = {
            "Command": " ".join(self.spec["command"]),
            "Scale": self.spec["scale"],
            "Members": f"{len(records)} of {len(self.entries)} have finished",
            "Intervals": "of 95%: bootstrapped over texts where one member makes a number, "
            "Student's over members where several do",
        }
        if records:
            newest = records[-1]
            git = newest["git"]
            commit = git["commit"] + (", with changes" if git["dirty"] else "") if git else ""
            versions = (f"{name} {number}" for name, number in newest["versions"].items())
            found["Versions"] = ", ".join(versions)
            found["Code"] = commit or "an installed package"
            found["Device"] = newest["device"]
        return found


def value(sweep: SweepRecords, labels: Mapping[str, str], column: Mapping[str, Any]) -> Value:
    """Return a number of some members: of one, with its interval over texts; of several, their mean
    with Student's interval over members.

    Args:
        sweep: with all members.
        labels: of one cell; members that have them differ in what is averaged, such as the seed.
        column: `key` of the metric, and optionally `at` (new tokens), `set`, `side`, `times`,
            `highest`, or `less` (how the labels of the member differ that is taken off, paired by
            text: its `metrics`).
    """
    entries = sweep.at(labels)
    if not entries:
        return Value(missing="not at this scale")
    if column["key"] == "preference":
        return Value(missing="no annotations yet")
    if "less" in column:
        pairs = [(one, sweep.at({**one.labels, **column["less"]})) for one in entries]
        found = [_of_two(one, other, column) for one, others in pairs for other in others]
        if not found:
            return Value(missing="what it is compared with is not at this scale")
    else:
        found = [_of_one(entry, column) for entry in entries]
    there = [one for one in found if not one.missing]
    if not there:
        return found[0]
    factor = float(column.get("times", 1))
    if len(found) == 1:
        return there[0].times(factor)
    means = np.array([one.mean for one in there])
    ends = None
    if len(means) > 1:
        half = float(student_t.ppf((1 + LEVEL) / 2, len(means) - 1))
        half *= float(means.std(ddof=1)) / len(means) ** 0.5
        ends = (float(means.mean()) - half, float(means.mean()) + half)
    mean = float(means.mean())
    return Value(mean, ends, len(means), len(means), len(found)).times(factor)


def _of_one(entry: Entry, column: Mapping[str, Any]) -> Value:
    record = entry.record
    if record is None:
        return Value(missing=entry.missing)
    cut = slice_of(record, column.get("at"), column.get("set"))
    if cut is None:
        where = " ".join(str(column[k]) for k in ("set", "at") if column.get(k))
        return Value(missing=f"not measured at {where}")
    side = column.get("side", "metrics")
    if column.get("highest"):
        values = [v for v in record["per_text"][side].get(column["key"], []) if v is not None]
        return (
            Value(max(values), None, len(values), 1, 1) if values else Value(missing="not measured")
        )
    estimate = cut[side].get(column["key"])
    if estimate is None:
        return Value(missing="not measured")
    ends = tuple(estimate["ci95"]) if estimate["ci95"] else None
    return Value(estimate["mean"], ends, estimate["n"], 1, 1)


def _of_two(entry: Entry, other: Entry, column: Mapping[str, Any]) -> Value:
    """Return a member's number less another's on the same texts, paired."""
    mine, its = entry.record, other.record
    if mine is None or its is None:
        return Value(missing=(entry if mine is None else other).missing)
    if _texts(mine) != _texts(its):
        return Value(missing=f"of other texts than {other.name}")
    key = column["key"]
    values = mine["per_text"][column.get("side", "metrics")].get(key)
    less = its["per_text"]["metrics"].get(key)
    if values is None or less is None:
        return Value(missing="not measured for each text")
    found = paired_difference(
        np.array(values, dtype=float),
        np.array(less, dtype=float),
        mine["config"]["evaluation"]["bootstrap"],
    )
    if found is None:
        return Value(missing="not measured")
    return Value(found.mean, found.ci95, found.n, 1, 1)


def _texts(record: Record) -> list[tuple[str, str]]:
    return [(sample["set"], sample["context"]) for sample in record["samples"]]


def slice_of(record: Record, at: int | None = None, texts: str | None = None) -> Any:
    """Return the scores of a set (none: all) at a length (none: the longest); none: there are none.

    A record of one set alone has no slices by set: its whole is that set's.
    """
    longest = record["slices"][0]["new_tokens"]
    sets = {sample["set"] for sample in record["samples"]}
    wanted = None if texts is None or sets == {texts} else texts
    for one in record["slices"]:
        if one["new_tokens"] == (at or longest) and one["set"] == wanted:
            return one
    return None
