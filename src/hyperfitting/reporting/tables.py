"""Tables of a sweep's records, with the published numbers beside ours, in several formats."""

import csv
import io
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hyperfitting.errors import UserError, near_matches
from hyperfitting.reporting.sweeps import SweepRecords, Value, value

_TABLE_FIELDS = {"caption", "rows", "columns", "published", "source"}
_COLUMN_FIELDS = {"key", "at", "set", "side", "times", "format", "highest", "less"}
_WHOLE_ONLY = {"at", "set", "highest"}
"""Fields of a column that `less` does not read: it pairs all texts at their full length."""
_THEIRS = "theirs"


@dataclass(frozen=True)
class Row:
    """One row: its labels by axis, and by heading our value and theirs."""

    labels: dict[str, str]
    ours: dict[str, Value]
    theirs: dict[str, str]


@dataclass(frozen=True)
class Table:
    """A table before it is written in any format."""

    name: str
    caption: str
    source: str
    axes: list[str]
    columns: Mapping[str, Mapping[str, Any]]
    rows: list[Row]

    @property
    def published(self) -> list[str]:
        """The headings for which there are published numbers."""
        return [h for h in self.columns if any(h in row.theirs for row in self.rows)]


def table_of(sweep: SweepRecords, name: str, described: Mapping[str, Any]) -> Table:
    """Return a table of a sweep's records, with the published numbers beside them.

    Raises:
        UserError: it names an axis, field or column that is not there, or a published number has
            no row.
    """
    at = f"hydra.sweeper.report.tables.{name}"
    _check_names(at, described, _TABLE_FIELDS)
    axes = [str(axis) for axis in described["rows"]]
    known = {axis: _all_labels(sweep, axis) for axis in axes}
    for axis, labels in known.items():
        if not labels:
            raise _no_such(f"{at}.rows", axis, sweep.axes)
    columns = described["columns"]
    for heading, column in columns.items():
        _check_column(sweep, f"{at}.columns.{heading}", column)
    theirs = [_published(at, given, known, columns) for given in described.get("published") or ()]
    here = [sweep.labels(axis) for axis in axes]
    wanted = [dict(zip(axes, chosen, strict=True)) for chosen in itertools.product(*here)]
    wanted += [labels for labels, _ in theirs if labels not in wanted]
    rows = [
        Row(
            labels,
            {heading: value(sweep, labels, column) for heading, column in columns.items()},
            {h: n for where, numbers in theirs if where == labels for h, n in numbers.items()},
        )
        for labels in wanted
        if sweep.at(labels) or any(where == labels for where, _ in theirs)
    ]
    return Table(
        name, described.get("caption", ""), described.get("source", ""), axes, columns, rows
    )


def _check_column(sweep: SweepRecords, at: str, column: Mapping[str, Any]) -> None:
    _check_names(at, column, _COLUMN_FIELDS)
    if "less" not in column:
        return
    _check_names(at, column, _COLUMN_FIELDS - _WHOLE_ONLY)
    for axis, label in column["less"].items():
        if label not in _all_labels(sweep, axis):
            raise _no_such(f"{at}.less.{axis}", label, _all_labels(sweep, axis))


def _published(
    at: str,
    given: Mapping[str, Any],
    known: Mapping[str, Sequence[str]],
    columns: Mapping[str, Any],
) -> tuple[dict[str, str], dict[str, str]]:
    """Return the labels and numbers of one published row."""
    labels = {}
    for axis, options in known.items():
        label = str(given.get(axis))
        if label not in options:
            raise _no_such(f"{at}.published.{axis}", label, options)
        labels[axis] = label
    numbers = {}
    for heading, number in given.items():
        if heading in known:
            continue
        if heading not in columns:
            raise _no_such(f"{at}.published", heading, columns)
        numbers[heading] = str(number)
    return labels, numbers


def _all_labels(sweep: SweepRecords, axis: str) -> list[str]:
    """Return the labels of an axis at any scale, those of this one first."""
    given = [
        sweep.spec["axes"],
        *((s or {}).get("axes") or {} for s in sweep.spec["scales"].values()),
    ]
    labels = sweep.labels(axis)
    for axes in given:
        labels += [str(label) for label in axes.get(axis, ())]
    return list(dict.fromkeys(labels))


def _check_names(at: str, given: Mapping[str, Any], known: set[str]) -> None:
    for name in given:
        if name not in known:
            raise _no_such(at, name, sorted(known))


def _no_such(field: str, name: str, options: Any) -> UserError:
    return UserError(
        "there is no such name",
        field=field,
        value=name,
        valid=", ".join(map(str, options)),
        hint=near_matches(name, map(str, options)),
    )


def _format(column: Mapping[str, Any]) -> str:
    return str(column.get("format", "{:.3f}"))


def _written(found: Value, form: str) -> str:
    if found.missing:
        return f"({found.missing})"
    text = form.format(found.mean)
    if found.ci95:
        text += f" [{', '.join(form.format(end) for end in found.ci95)}]"
    return text if found.members == found.of else f"{text} ({found.members} of {found.of} members)"


def _numbers(table: Table) -> Iterator[tuple[str, str]]:
    """Yield the columns of numbers: heading, and "" for ours or `theirs`."""
    for heading in table.columns:
        yield heading, ""
        if heading in table.published:
            yield heading, _THEIRS


def headings(table: Table) -> list[str]:
    """Return the names of all columns: axes, then numbers, ours before theirs."""
    numbers = [f"{name} ({whose})" if whose else name for name, whose in _numbers(table)]
    return [*table.axes, *numbers]


def cells(table: Table, row: Row) -> list[str]:
    """Return what stands in a row, in the order of the headings."""
    found = list(row.labels.values())
    for heading, whose in _numbers(table):
        if whose == _THEIRS:
            found.append(row.theirs.get(heading, ""))
        else:
            found.append(_written(row.ours[heading], _format(table.columns[heading])))
    return found


def markdown(table: Table) -> str:
    """Return a table as Markdown."""
    names = headings(table)
    lines = [names, ["---"] * len(names)]
    lines += [cells(table, row) for row in table.rows]
    body = "\n".join(
        "| " + " | ".join(c.replace("|", "\\|") for c in line) + " |" for line in lines
    )
    source = f"\n\n*theirs*: {table.source}" if table.published else ""
    return f"## {table.caption or table.name}\n\n{body}{source}\n"


_TEX = str.maketrans(
    {c: "\\" + c for c in "&%$#_{}"} | {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
     "\\": r"\textbackslash{}", "<": r"\textless{}", ">": r"\textgreater{}"}
)  # fmt: skip


def latex(table: Table) -> str:
    """Return a table as LaTeX, for the package booktabs."""
    names = headings(table)
    lines = [
        r"\begin{table}",
        rf"\caption{{{(table.caption or table.name).translate(_TEX)}}}",
        rf"\begin{{tabular}}{{{'l' * len(table.axes)}{'r' * (len(names) - len(table.axes))}}}",
        r"\toprule",
        " & ".join(text.translate(_TEX) for text in names) + r" \\",
        r"\midrule",
    ]
    for row in table.rows:
        lines.append(" & ".join(text.translate(_TEX) for text in cells(table, row)) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}"]
    if table.published:
        lines.append(rf"\par theirs: {table.source.translate(_TEX)}")
    return "\n".join([*lines, r"\end{table}", ""])


def comma_separated(table: Table) -> str:
    """Return a table with one line a number, as CSV."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*table.axes, "column", "mean", "low", "high", "n", "published", "missing"])
    for row in table.rows:
        for heading in table.columns:
            one = row.ours[heading]
            ends = one.ci95 or ("", "")
            numbers = ["", "", "", ""] if one.missing else [one.mean, *ends, one.n]
            theirs = row.theirs.get(heading, "")
            writer.writerow([*row.labels.values(), heading, *numbers, theirs, one.missing])
    return out.getvalue()
