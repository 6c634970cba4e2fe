"""Reading the texts of a file: .txt, .jsonl, .csv, .parquet. Errors name the file and line."""

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from hyperfitting.data.config import TextsConfig
from hyperfitting.errors import UserError, near_matches


def _missing_field(cfg: TextsConfig, where: str, existing: Iterable[str]) -> UserError:
    fields = list(existing)
    return UserError(
        f"{where} has no such field",
        field="dataset.text_field",
        value=cfg.text_field,
        valid=", ".join(fields) or "(it has none)",
        hint=near_matches(cfg.text_field, fields)
        or (f"dataset.text_field={fields[0]}" if fields else ""),
    )


def _not_text(cfg: TextsConfig, where: str, value: Any) -> UserError:
    return UserError(
        f"{where} holds {type(value).__name__} there, not text",
        field="dataset.text_field",
        value=cfg.text_field,
    )


def read_column(rows: Any, cfg: TextsConfig) -> Iterator[str]:
    """Yield the texts of a table's text column; missing values are skipped.

    Args:
        rows: has `column_names`, and gives a column's values by name, as `datasets.Dataset` does.
        cfg: names the column.

    Raises:
        UserError: there is no such column, or it does not hold text.
    """
    if cfg.text_field not in rows.column_names:
        raise _missing_field(cfg, f"dataset {cfg.path}", rows.column_names)
    for value in rows[cfg.text_field]:
        if value is None:
            continue
        if not isinstance(value, str):
            raise _not_text(cfg, f"dataset {cfg.path}", value)
        yield value


def _read_text(path: Path) -> str:
    """Return a file as UTF-8 text.

    Raises:
        UserError: it is empty, binary, or in another encoding.
    """
    data = path.read_bytes()
    if not data.strip():
        raise UserError("the file is empty", field="dataset.path", value=path)
    if b"\0" in data[:65536]:
        raise UserError(
            "the file is binary, not text", field="dataset.path", value=path, valid="UTF-8 text"
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"the file is not UTF-8: byte {error.start} (line {line}) is 0x{data[error.start]:02x}",
            field="dataset.path",
            value=path,
            hint=f"iconv -f ISO-8859-1 -t UTF-8 {path.name} > utf8-{path.name}",
        ) from error


def _read_txt(path: Path, cfg: TextsConfig) -> Iterator[str]:
    yield from _read_text(path).splitlines(keepends=True)


def _read_jsonl(path: Path, cfg: TextsConfig) -> Iterator[str]:
    for number, line in enumerate(_read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        where = f"line {number} of {path.name}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(
                f"{where} is not JSON: {error}",
                field="dataset.path",
                value=path,
                valid='one object per line, such as {"text": "…"}',
            ) from error
        if not isinstance(row, dict) or cfg.text_field not in row:
            raise _missing_field(cfg, where, row if isinstance(row, dict) else ())
        if not isinstance(row[cfg.text_field], str):
            raise _not_text(cfg, where, row[cfg.text_field])
        yield row[cfg.text_field]


def _read_csv(path: Path, cfg: TextsConfig) -> Iterator[str]:
    csv.field_size_limit(1 << 30)
    rows = csv.DictReader(_read_text(path).splitlines(keepends=True))
    if cfg.text_field not in (rows.fieldnames or ()):
        raise _missing_field(cfg, path.name, rows.fieldnames or ())
    for row in rows:
        yield row[cfg.text_field] or ""


def _read_parquet(path: Path, cfg: TextsConfig) -> Iterator[str]:
    import pyarrow.parquet
    from pyarrow.lib import ArrowException

    try:
        table = pyarrow.parquet.read_table(path)
    except (ArrowException, OSError) as error:
        raise UserError(
            f"the file is not readable as Parquet: {str(error).splitlines()[0]}",
            field="dataset.path",
            value=path,
        ) from error
    yield from read_column(_ArrowRows(table), cfg)


class _ArrowRows:
    """An Arrow table with the interface that `read_column` needs."""

    def __init__(self, table: Any) -> None:
        self.table = table
        self.column_names: list[str] = table.column_names

    def __getitem__(self, name: str) -> Any:
        return self.table.column(name).to_pylist()


READERS: dict[str, Callable[[Path, TextsConfig], Iterator[str]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
"""By suffix: yields the rows of a file (of .txt the lines)."""
SUFFIXES = tuple(READERS)
