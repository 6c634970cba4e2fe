"""The report of an experiment: its tables and figures, drawn from whatever records are there.

    outputs/reports/<experiment>/
      README.md           all of it, with commands, versions and machine
      <table>.md .tex .csv
      <figure>.svg .png

What to draw stands in the experiment's file, under `hydra.sweeper.report`:

    title, about          words
    tables:  {<name>: {caption, rows: [axis, …], columns: {<heading>: {key, at, set, side, times,
             format, highest, less}}, published: [{<axis>: <label>, …, <heading>: number}], source}}
    figures: {<name>: {kind, caption, …}}; see `hyperfitting.reporting.figures`

python -m hyperfitting.reporting SWEEP_DIR draws it again.
"""

import csv
import io
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hyperfitting.errors import UserError, near_matches
from hyperfitting.reporting import figures
from hyperfitting.reporting.sweeps import SweepRecords, Value, value
from hyperfitting.store import replacing, write_text

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


def write(folder: Path, reports: Path | None = None) -> Path:
    """Draw the report of a sweep, and return its folder.

    Args:
        folder: the sweep's.
        reports: where reports are kept; none: `reports/` beside `sweeps/`, or in the folder if
            it is kept elsewhere.

    Raises:
        UserError: the experiment's description of its report makes no sense, or a record is of
            another version of this software.
    """
    sweep = SweepRecords.of(folder)
    spec = sweep.spec["report"] or _usual(sweep)
    if reports is None:
        beside = folder.parent.name == "sweeps"
        reports = folder.parent.parent / "reports" if beside else folder / "reports"
    out = reports / folder.name
    out.mkdir(parents=True, exist_ok=True)
    parts = [f"# {spec.get('title', sweep.spec['name'])}", *filter(None, [spec.get("about")])]
    for name, described in (spec.get("tables") or {}).items():
        table = table_of(sweep, name, described)
        write_text(out / f"{name}.md", markdown(table))
        write_text(out / f"{name}.tex", latex(table))
        write_text(out / f"{name}.csv", comma_separated(table))
        parts.append(markdown(table))
    for name, described in (spec.get("figures") or {}).items():
        why = _draw(sweep, out, name, described)
        caption = described.get("caption", name)
        parts.append(f"![{caption}]({name}.svg)\n\n{caption}" if not why else f"({name}: {why})")
    parts.append(_made_with(sweep))
    write_text(out / "README.md", "\n\n".join(part.strip() for part in parts) + "\n")
    return out


def _draw(sweep: SweepRecords, out: Path, name: str, described: Mapping[str, Any]) -> str:
    """Draw a figure as SVG and PNG; return why not, if there is nothing to draw."""
    try:
        drawn = figures.draw(sweep, name, described)
    except figures.Nothing as why:
        return str(why)
    for suffix in ("svg", "png"):
        with replacing(out / f"{name}.{suffix}") as beside:
            figures.save(drawn, beside, suffix)
    return ""


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
            raise _no_such(f"{at}.rows", axis, _all_axes(sweep))
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


def _all_axes(sweep: SweepRecords) -> list[str]:
    return list(dict.fromkeys(axis for entry in sweep.entries for axis in entry.labels))


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


def _heads(table: Table) -> Iterator[tuple[str, str]]:
    """Yield the columns of numbers: heading, and "" for ours or `theirs`."""
    for heading in table.columns:
        yield heading, ""
        if heading in table.published:
            yield heading, _THEIRS


def _cells(table: Table, row: Row) -> list[str]:
    found = []
    for heading, whose in _heads(table):
        form = _format(table.columns[heading])
        if whose == _THEIRS:
            found.append(row.theirs.get(heading, ""))
        else:
            found.append(_written(row.ours[heading], form))
    return found


def markdown(table: Table) -> str:
    """Return a table as Markdown."""
    heads = [f"{heading} ({whose})" if whose else heading for heading, whose in _heads(table)]
    lines = [[*table.axes, *heads], ["---"] * (len(table.axes) + len(heads))]
    lines += [[*row.labels.values(), *_cells(table, row)] for row in table.rows]
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
    heads = [f"{heading} ({whose})" if whose else heading for heading, whose in _heads(table)]
    lines = [
        r"\begin{table}",
        rf"\caption{{{(table.caption or table.name).translate(_TEX)}}}",
        rf"\begin{{tabular}}{{{'l' * len(table.axes)}{'r' * len(heads)}}}",
        r"\toprule",
        " & ".join(text.translate(_TEX) for text in [*table.axes, *heads]) + r" \\",
        r"\midrule",
    ]
    for row in table.rows:
        cells = [text.translate(_TEX) for text in (*row.labels.values(), *_cells(table, row))]
        lines.append(" & ".join(cells) + r" \\")
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


def _usual(sweep: SweepRecords) -> dict[str, Any]:
    """Return what is drawn of a sweep that says nothing of its report."""
    columns = {
        "TTR": {"key": "gen/ttr"},
        "repeated 2-grams": {"key": "gen/rep_2"},
        "Self-BLEU": {"key": "gen/self_bleu"},
        "Dataset BLEU": {"key": "gen/dataset_bleu"},
        "perplexity": {"key": "val/perplexity", "format": "{:.1f}"},
        "entropy, nats": {"key": "val/entropy", "format": "{:.2f}"},
    }
    axes = _all_axes(sweep)
    return {"tables": {"members": {"rows": axes, "columns": columns}}} if axes else {}


def _made_with(sweep: SweepRecords) -> str:
    """Return how this was made: the command, versions, machine, date and what is averaged."""
    records = [record for _, record in sweep.finished()]
    lines = [
        "## Made with",
        "",
        f"    {' '.join(sweep.spec['command'])}",
        "",
        f"Scale: {sweep.spec['scale']}. {len(records)} of {len(sweep.entries)} members have "
        "finished. Numbers are means with 95% intervals: bootstrapped over texts where one member "
        "makes a cell, Student's over members where several do.",
    ]
    for entry in sweep.entries:
        if entry.record is None:
            lines.append(f"\n- {entry.name}: {entry.missing}")
    if records:
        newest = records[-1]
        versions = ", ".join(f"{name} {number}" for name, number in newest["versions"].items())
        git = newest["git"]
        commit = "an installed package"
        if git:
            commit = git["commit"] + (", with changes" if git["dirty"] else "")
        device = newest["device"]
        lines.append(f"\nVersions: {versions}. Code: {commit}. Device: {device}.")
    return "\n".join(lines)
