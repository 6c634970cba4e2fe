"""Tables of a sweep's records, with published numbers beside them, in several formats.

Markdown and LaTeX are written here rather than by pandas: `to_markdown` does not escape `|`, and
`Styler.to_latex` escapes neither the caption nor the source, so both would need the same code.
"""

import csv
import io
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from hyperfitting.formatting import printable_line
from hyperfitting.reporting.cells import Cell, table_cell
from hyperfitting.reporting.spec import SECTION, ColumnSpec, TableSpec, no_such
from hyperfitting.reporting.sweep_records import SweepRecords

PUBLISHED = "published"


@dataclass(frozen=True)
class Row:
    """One row: its labels by axis, and by heading our number and the published one."""

    labels: dict[str, str]
    cells: dict[str, Cell]
    published: dict[str, str]


@dataclass(frozen=True)
class Table:
    """A table before it is written in any format."""

    name: str
    spec: TableSpec
    rows: list[Row]

    @property
    def title(self) -> str:
        """Its caption, or else its name."""
        return self.spec.caption or self.name

    @property
    def published(self) -> list[str]:
        """The headings for which there are published numbers."""
        return [h for h in self.spec.columns if any(h in row.published for row in self.rows)]


def build_table(sweep: SweepRecords, name: str, spec: TableSpec) -> Table:
    """Return a table of a sweep's records, with the published numbers beside them.

    Raises:
        UserError: it names an axis, label or column that does not exist.
    """
    at = f"{SECTION}.tables.{name}"
    known = {axis: sweep.labels_at_any_scale(axis) for axis in spec.rows}
    for axis, labels in known.items():
        if not labels:
            raise no_such(f"{at}.rows", axis, sweep.axes)
    for heading, column in spec.columns.items():
        _check_minus(sweep, column, f"{at}.columns.{heading}")
    published = [_published_row(at, row, known, spec.columns) for row in spec.published]
    combinations = itertools.product(*(sweep.labels(axis) for axis in spec.rows))
    row_labels = [dict(zip(spec.rows, labels, strict=True)) for labels in combinations]
    row_labels += [labels for labels, _ in published if labels not in row_labels]
    published_labels = [labels for labels, _ in published]
    rows = [
        Row(
            labels,
            {h: table_cell(sweep, labels, column) for h, column in spec.columns.items()},
            {h: n for row, numbers in published if row == labels for h, n in numbers.items()},
        )
        for labels in row_labels
        if sweep.labeled(labels) or labels in published_labels
    ]
    return Table(name, spec, rows)


def _check_minus(sweep: SweepRecords, column: ColumnSpec, at: str) -> None:
    for axis, label in (column.minus or {}).items():
        labels = sweep.labels_at_any_scale(axis)
        if label not in labels:
            raise no_such(f"{at}.minus.{axis}", label, labels)


def _published_row(
    at: str,
    row: Mapping[str, str],
    known: Mapping[str, Sequence[str]],
    columns: Mapping[str, ColumnSpec],
) -> tuple[dict[str, str], dict[str, str]]:
    """Return the labels and numbers of one published row."""
    for axis, labels in known.items():
        if row.get(axis) not in labels:
            raise no_such(f"{at}.published.{axis}", str(row.get(axis)), labels)
    numbers = {heading: number for heading, number in row.items() if heading not in known}
    for heading in numbers:
        if heading not in columns:
            raise no_such(f"{at}.published", heading, columns)
    return {axis: row[axis] for axis in known}, numbers


def _number_columns(table: Table) -> Iterator[tuple[str, bool]]:
    """Yield the columns of numbers: heading, and whether it is the published one."""
    for heading in table.spec.columns:
        yield heading, False
        if heading in table.published:
            yield heading, True


def headings(table: Table) -> list[str]:
    """Return the headings of all columns: axes, then numbers, each before its published one."""
    return [
        *table.spec.rows,
        *(f"{h} ({PUBLISHED})" if published else h for h, published in _number_columns(table)),
    ]


def row_texts(table: Table, row: Row) -> list[str]:
    """Return the texts of a row, in the order of the headings."""
    numbers = (
        row.published.get(heading, "")
        if published
        else row.cells[heading].text(table.spec.columns[heading].number_format)
        for heading, published in _number_columns(table)
    )
    return [*row.labels.values(), *numbers]


def to_markdown(table: Table) -> str:
    """Return a table as Markdown."""
    names = headings(table)
    rows = [names, ["---"] * len(names), *(row_texts(table, row) for row in table.rows)]
    body = "\n".join("| " + " | ".join(map(markdown_text, row)) + " |" for row in rows)
    source = f"\n\n*{PUBLISHED}*: {markdown_text(table.spec.source)}" if table.published else ""
    return f"## {markdown_text(table.title)}\n\n{body}{source}\n"


_MARKDOWN_MARKUP = re.compile(
    r"[\\`*|$]|~(?=~)|<(?=[A-Za-z/!?])|&(?=#?\w+;)|\](?=[(\[:])|(?<!\w)_|_(?!\w)|^#"
)
"""What Markdown, HTML and GitHub's formulas begin with; "[0.1, 0.2]" and "a_b" stay readable."""


def markdown_text(text: str) -> str:
    """Return a text on one line that Markdown shows as it is."""
    return _MARKDOWN_MARKUP.sub(r"\\\g<0>", printable_line(text))


_LATEX_ESCAPES = str.maketrans(
    {c: "\\" + c for c in "&%$#_{}"} | {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
     "\\": r"\textbackslash{}", "<": r"\textless{}", ">": r"\textgreater{}"}
)  # fmt: skip


def _latex_text(text: str) -> str:
    return printable_line(text).translate(_LATEX_ESCAPES)


def _latex_row(texts: Sequence[str]) -> str:
    row = " & ".join(map(_latex_text, texts)) + r" \\"
    # the end of the row before takes a * or [ for its argument
    return "{}" * row.startswith(("*", "[")) + row


def to_latex(table: Table) -> str:
    """Return a table as LaTeX, for the package booktabs."""
    n_axes, n_columns = len(table.spec.rows), len(headings(table))
    rows = [_latex_row(headings(table)), *(_latex_row(row_texts(table, r)) for r in table.rows)]
    lines = [
        r"\begin{table}",
        rf"\caption{{{_latex_text(table.title)}}}",
        rf"\begin{{tabular}}{{{'l' * n_axes}{'r' * (n_columns - n_axes)}}}",
        r"\toprule",
        rows[0],
        r"\midrule",
        *rows[1:],
        r"\bottomrule",
        r"\end{tabular}",
    ]
    if table.published:
        lines.append(rf"\par {PUBLISHED}: {_latex_text(table.spec.source)}")
    return "\n".join([*lines, r"\end{table}", ""])


def to_csv(table: Table) -> str:
    """Return a table as CSV, one line for each number."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    columns = ["column", "mean", "low", "high", "n", PUBLISHED, "missing", "note"]
    writer.writerow([*map(_csv_text, table.spec.rows), *columns])
    for row in table.rows:
        for heading, cell in row.cells.items():
            numbers: list[float | str] = [""] * 4
            if cell.estimate is not None:
                low, high = cell.estimate.ci95 or ("", "")
                numbers = [cell.estimate.mean, low, high, cell.estimate.n]
            texts = [*row.labels.values(), heading]
            last = [row.published.get(heading, ""), cell.missing, cell.note]
            writer.writerow([*map(_csv_text, texts), *numbers, *map(_csv_text, last)])
    return out.getvalue()


def _csv_text(text: str) -> str:
    """Return a text that a spreadsheet does not take for a formula."""
    is_formula = text.startswith(("=", "+", "-", "@", "\t", "\r")) and not _is_number(text)
    return f"'{text}" if is_formula else text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
