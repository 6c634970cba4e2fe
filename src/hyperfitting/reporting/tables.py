"""Tables of a sweep's records, and the published numbers below them; as Markdown and CSV.

A table has a row for each combination of labels that has runs. Published numbers stand in a block
of their own, with only the columns in which there are any; a column without a single number is
named below the table, with the reason. `reporting.latex` writes the same blocks.

Markdown is written here rather than by pandas, whose `to_markdown` does not escape `|`.
"""

import csv
import io
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.cells import cell_len

from hyperfitting.errors import no_such
from hyperfitting.formatting import printable_line
from hyperfitting.reporting.best import best_cells
from hyperfitting.reporting.cells import Cell, table_cell
from hyperfitting.reporting.spec import SECTION, ColumnSpec, TableSpec
from hyperfitting.reporting.sweep_records import SweepRecords

PUBLISHED = "Published"
BEST_NOTE = "Bold: best in its column, and values that do not differ significantly from it."


@dataclass(frozen=True)
class Row:
    """A row of runs: its labels by axis, and its numbers by heading."""

    labels: dict[str, str]
    cells: dict[str, Cell]
    best: frozenset[str]
    """Headings of the numbers that are the best of their column, or tied with it."""


@dataclass(frozen=True)
class PublishedRow:
    """Published numbers: labels by axis, and numbers by heading as they were published."""

    labels: dict[str, str]
    numbers: dict[str, str]


@dataclass(frozen=True)
class Table:
    """A table before it is written in any format."""

    name: str
    spec: TableSpec
    rows: list[Row]
    published: list[PublishedRow]

    @property
    def title(self) -> str:
        """Its caption, or else its name."""
        return self.spec.caption or self.name


@dataclass(frozen=True)
class Entry:
    """What stands in one place of a block: a number, and what follows it, such as its interval."""

    number: str = ""
    rest: str = ""
    is_best: bool = False

    @property
    def text(self) -> str:
        """Both, without emphasis."""
        return f"{self.number} {self.rest}".strip()


@dataclass(frozen=True)
class Block:
    """A rectangle of text: headings of axes and of numbers; rows of labels and of entries."""

    axes: list[str]
    headings: list[str]
    rows: list[tuple[list[str], list[Entry]]]


def build_table(sweep: SweepRecords, name: str, spec: TableSpec) -> Table:
    """Return a table of a sweep's records, with the published numbers.

    Raises:
        UserError: it names an axis, label or column that does not exist.
    """
    at = f"{SECTION}.tables.{name}"
    known = {axis: sweep.labels_at_any_scale(axis) for axis in spec.rows}
    for axis, labels in known.items():
        if not labels:
            raise no_such("axis", f"{at}.rows", axis, sweep.axes)
    for heading, column in spec.columns.items():
        _check_minus(sweep, column, f"{at}.columns.{heading}")
    published = [_published_row(at, row, known, spec.columns) for row in spec.published]
    combinations = itertools.product(*(sweep.labels(axis) for axis in spec.rows))
    rows = [dict(zip(spec.rows, labels, strict=True)) for labels in combinations]
    rows = [labels for labels in rows if sweep.labeled(labels)]
    columns = {h: [table_cell(sweep, row, c) for row in rows] for h, c in spec.columns.items()}
    best = {h: best_cells(sweep, rows, columns[h], c) for h, c in spec.columns.items()}
    return Table(
        name,
        spec,
        [
            Row(
                labels,
                {heading: cells[i] for heading, cells in columns.items()},
                frozenset(heading for heading in columns if i in best[heading]),
            )
            for i, labels in enumerate(rows)
        ],
        published,
    )


def _check_minus(sweep: SweepRecords, column: ColumnSpec, at: str) -> None:
    for axis, label in (column.minus or {}).items():
        labels = sweep.labels_at_any_scale(axis)
        if label not in labels:
            raise no_such("label", f"{at}.minus.{axis}", label, labels)


def _published_row(
    at: str,
    row: Mapping[str, str],
    known: Mapping[str, Sequence[str]],
    columns: Mapping[str, ColumnSpec],
) -> PublishedRow:
    """Return one published row, checked."""
    for axis, labels in known.items():
        if row.get(axis) not in labels:
            raise no_such("label", f"{at}.published.{axis}", str(row.get(axis)), labels)
    numbers = {heading: number for heading, number in row.items() if heading not in known}
    for heading in numbers:
        if heading not in columns:
            raise no_such("column", f"{at}.published", heading, columns)
    return PublishedRow({axis: row[axis] for axis in known}, numbers)


def omitted(table: Table) -> dict[str, str]:
    """Return the columns in which no row has a number, all for one reason: heading -> reason."""
    reasons = {
        heading: {cell.missing for cell in cells}
        for heading in table.spec.columns
        if (cells := [row.cells[heading] for row in table.rows])
        and all(cell.estimate is None and not cell.note for cell in cells)
    }
    same = {heading: reason.pop() for heading, reason in reasons.items() if len(reason) == 1}
    return same if len(same) < len(table.spec.columns) else {}


def measured_block(table: Table) -> Block:
    """Return the block of our numbers."""
    left_out = omitted(table)
    columns = {h: c.number_format for h, c in table.spec.columns.items() if h not in left_out}
    rows = [
        (
            list(row.labels.values()),
            [Entry(*row.cells[h].texts(form), h in row.best) for h, form in columns.items()],
        )
        for row in table.rows
    ]
    return Block(list(table.spec.rows), list(columns), rows)


def published_block(table: Table) -> Block | None:
    """Return the block of the published numbers; none: there are none."""
    if not table.published:
        return None
    used = [h for h in table.spec.columns if any(h in row.numbers for row in table.published)]
    rows = [
        (list(row.labels.values()), [Entry(row.numbers.get(heading, "")) for heading in used])
        for row in table.published
    ]
    return Block(list(table.spec.rows), used, rows)


def notes(table: Table) -> list[str]:
    """Return what stands below our numbers: what bold means, and the columns left out."""
    best = [BEST_NOTE] if any(row.best for row in table.rows) else []
    left_out = omitted(table)
    return best + [
        f"Without a number: {'; '.join(h for h in left_out if left_out[h] == reason)} ({reason})."
        for reason in dict.fromkeys(left_out.values())
    ]


def published_title(table: Table) -> str:
    """Return the line above the published numbers."""
    return f"{PUBLISHED}: {table.spec.source}" if table.spec.source else PUBLISHED


def to_markdown(table: Table) -> str:
    """Return a table as Markdown, with columns that are aligned in its source too."""
    parts = [f"## {markdown_text(table.title)}", _markdown_block(measured_block(table))]
    parts += map(markdown_text, notes(table))
    published = published_block(table)
    if published is not None:
        parts += [f"*{PUBLISHED}*{markdown_text(published_title(table)[len(PUBLISHED) :])}"]
        parts.append(_markdown_block(published))
    return "\n\n".join(parts) + "\n"


def _markdown_block(block: Block) -> str:
    n_axes = len(block.axes)
    rows = [[markdown_text(heading) for heading in block.axes + block.headings]]
    rows += [
        [*map(markdown_text, labels), *map(_markdown_entry, row)] for labels, row in block.rows
    ]
    widths = [max(3, *map(cell_len, column)) for column in zip(*rows, strict=True)]
    lines = [
        [_padded(text, width, is_number=i >= n_axes) for i, (text, width) in enumerate(pairs)]
        for pairs in (zip(row, widths, strict=True) for row in rows)
    ]
    rule = ["-" * w if i < n_axes else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]])


def _markdown_entry(entry: Entry) -> str:
    number = markdown_text(entry.number)
    return f"{f'**{number}**' if entry.is_best else number} {markdown_text(entry.rest)}".strip()


def _padded(text: str, width: int, is_number: bool) -> str:
    space = " " * (width - cell_len(text))
    return space + text if is_number else text + space


_MARKDOWN_MARKUP = re.compile(
    r"[\\`*|$]|~(?=~)|<(?=[A-Za-z/!?])|&(?=#?\w+;)|\](?=[(\[:])|(?<!\w)_|_(?!\w)|^#"
)
"""What Markdown, HTML and GitHub's formulas begin with; "[0.1, 0.2]" and "a_b" stay readable."""


def markdown_text(text: str) -> str:
    """Return a text on one line that Markdown shows as it is."""
    return _MARKDOWN_MARKUP.sub(r"\\\g<0>", printable_line(text))


def markdown_cell(text: str) -> str:
    """Return Markdown for a cell of a table."""
    return text.replace("|", r"\|")


def to_csv(table: Table) -> str:
    """Return a table as CSV, one line for each number, ours or published."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    columns = ["column", "mean", "low", "high", "n", "published", "missing", "note"]
    writer.writerow([*map(csv_text, table.spec.rows), *columns])
    published = {tuple(row.labels.values()): row.numbers for row in table.published}
    for row in table.rows:
        labels = tuple(row.labels.values())
        numbers = published.pop(labels, {})
        for heading, cell in row.cells.items():
            estimate: list[float | str] = [""] * 4
            if cell.estimate is not None:
                low, high = cell.estimate.ci95 or ("", "")
                estimate = [cell.estimate.mean, low, high, cell.estimate.n]
            last = [numbers.get(heading, ""), cell.missing, cell.note]
            writer.writerow([*map(csv_text, [*labels, heading]), *estimate, *map(csv_text, last)])
    for labels, numbers in published.items():
        for heading, number in numbers.items():
            texts = map(csv_text, [*labels, heading])
            writer.writerow([*texts, *[""] * 4, csv_text(number), "not at this scale", ""])
    return out.getvalue()


def csv_text(text: str) -> str:
    """Return a text that a spreadsheet does not take for a formula."""
    is_formula = text.startswith(("=", "+", "-", "@", "\t", "\r")) and not _is_number(text)
    return f"'{text}" if is_formula else text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
