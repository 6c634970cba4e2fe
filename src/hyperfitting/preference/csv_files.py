"""CSV for crowd platforms and spreadsheets: UTF-8, every cell quoted, no cell a formula.

Spreadsheets execute a cell that begins with `=` and a few other characters (OWASP, "CSV
injection"). Such a cell gets an apostrophe in front, which an import takes off again; so does one
that begins with an apostrophe, so that no text changes.
"""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from hyperfitting.errors import UserError
from hyperfitting.preference.exchange_rows import (
    FIELDS,
    PREFERENCE,
    Answered,
    Row,
    asked,
    parse_answers,
    rows,
)
from hyperfitting.preference.items import Task
from hyperfitting.preference.judgments import Answer
from hyperfitting.runtime.files import write_text

SOURCE = "csv"
_FORMULA = tuple("=+-@\t\r\n＝＋－＠'")
_ACCOUNT, _SECONDS = ("account", "WorkerId"), ("seconds", "WorkTimeInSeconds")
"""Our columns, and those of Amazon Mechanical Turk."""
_PREFIXES = ("Input.", "Answer.")
"""Of Mechanical Turk's columns."""


def export(task: Task, folder: Path) -> None:
    """Write one CSV file for each annotator into a folder, with columns to fill in."""
    questions = asked(task.question)
    names = [each.name for each in questions]
    for annotator in task.annotators:
        file = io.StringIO(newline="")
        writer = csv.DictWriter(
            file, (*FIELDS, *names, _SECONDS[0]), restval="", quoting=csv.QUOTE_ALL
        )
        writer.writeheader()
        for row in rows(task, annotator):
            writer.writerow({name: guard(text) for name, text in row.items()})
        write_text(folder / f"{annotator}.csv", file.getvalue())
    lines = [task.question.guidelines, ""]
    for each in questions:
        choices = [f"  {choice}: {words}" for choice, words in each.choices.items()]
        lines += [f"column {each.name}: {each.wording}", *choices]
    write_text(folder / "instructions.txt", "\n".join(lines) + "\n")


def read(task: Task, paths: Sequence[Path]) -> Iterator[Answered]:
    """Yield the answers in CSV files, in order.

    Raises:
        UserError: a file cannot be read, or lacks a column.
    """
    names = [each.name for each in asked(task.question)]
    for path in paths:
        for line, cells in _read_cells(path):
            where = f"{path.name} line {line}"
            row = {name: cells[name] for name in FIELDS if name in cells}
            given = {name: cells[name] for name in names if name in cells}
            parsed = parse_answers(task.question, given)
            account = _first(cells, _ACCOUNT)
            if isinstance(parsed, str):
                yield Answered(where, row, None, parsed, account)
                continue
            try:
                seconds = _first(cells, _SECONDS)
                answer = Answer(*parsed, seconds=None if seconds is None else float(seconds))
            except ValueError:
                yield Answered(where, row, None, f"seconds {seconds!r} is no number", account)
            else:
                yield Answered(where, row, answer, account=account)


def guard(text: str) -> str:
    """Return a cell that no spreadsheet takes for a formula; `unguard` is its inverse."""
    return f"'{text}" if text.lstrip(" ").startswith(_FORMULA) else text


def unguard(cell: str) -> str:
    """Return the text of a cell that `guard` made."""
    return cell[1:] if cell.startswith("'") and guard(cell[1:]) == cell else cell


def _read_cells(path: Path) -> Iterator[tuple[int, Row]]:
    """Yield the line number and the cells by column of each row of a file."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        columns = [_column(cell) for cell in next(reader, [])]
        missing = sorted({*FIELDS, PREFERENCE}.difference(columns))
        if missing or len(set(columns)) < len(columns):
            raise UserError(
                f"lacks the column {missing[0]}" if missing else "has a column twice",
                field="file",
                value=path,
                valid=", ".join((*FIELDS, PREFERENCE)),
                hint="the file that export wrote, with the last columns filled in",
            )
        for cells in reader:
            if len(cells) != len(columns):
                problem = f"line {reader.line_num} has {len(cells)} cells of {len(columns)} columns"
                raise UserError(problem, field="file", value=path)
            yield reader.line_num, dict(zip(columns, map(unguard, cells), strict=True))
    except UnicodeDecodeError as error:
        raise UserError(
            f"is not UTF-8: {error.reason} at byte {error.start}",
            field="file",
            value=path,
            hint="save it as 'CSV UTF-8'",
        ) from error
    except (OSError, csv.Error) as error:
        raise UserError(f"cannot be read: {error}", field="file", value=path) from error


def _column(name: str) -> str:
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _first(cells: Mapping[str, str], names: Sequence[str]) -> str | None:
    """Return the first cell of some columns that is not empty."""
    return next((cells[name] for name in names if cells.get(name)), None)
