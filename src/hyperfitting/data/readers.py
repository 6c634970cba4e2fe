"""Reading the texts of a file: .txt, .jsonl, .json, .csv, .parquet; compressed ones too.

A line ends with \\n or \\r\\n and with nothing else: texts of the web hold U+2028, U+0085 and other
characters that `str.splitlines` takes for line ends. Errors name the file and line.
"""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from hyperfitting.data.chat import conversation, row_conversation
from hyperfitting.data.config import TextsConfig
from hyperfitting.errors import UserError, exhausted_resource, near_matches

READERS_VERSION = 2
"""Raised when the same file gives other documents; part of the id of documents from files."""
_BINARY_WITHIN = 65536
"""A NUL within so many bytes makes a file binary."""


def read_rows(path: Path, cfg: TextsConfig) -> Iterator[str]:
    """Yield the rows of a file: of .txt the lines, of other formats the texts; nulls are skipped.

    Args:
        path: of a format that `file_format` knows.
        cfg: names the column.

    Raises:
        UserError: it cannot be read, or a row has no text; the message names the line.
    """
    with reading(path):
        yield from _READERS[str(file_format(path))](path, cfg)


def file_format(path: Path) -> str | None:
    """Return a file's format by its name, such as ``.jsonl`` for DATA.JSONL.gz; None: not known."""
    suffix = path.suffix.lower()
    if suffix in _DECOMPRESS:
        suffix = Path(path.stem).suffix.lower()
        return suffix if suffix in _READERS and suffix != ".parquet" else None
    return suffix if suffix in _READERS else None


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Name a file or folder in the errors of reading it.

    Raises:
        UserError: in place of the error.
    """
    try:
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        if exhausted_resource(error):
            raise
        what = str(error)
        if isinstance(error, OSError) and error.strerror:
            what = error.strerror
            if error.filename not in (None, str(path)):
                what += f": {error.filename}"
        raise UserError(f"cannot be read: {what}", field="dataset.path", value=path) from error


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


def _check_field(cfg: TextsConfig, where: str, names: list[str]) -> None:
    """Refuse a table that has no such column, or two."""
    if cfg.text_field not in names:
        raise _missing_field(cfg, where, names)
    if names.count(cfg.text_field) > 1:
        raise UserError(
            f"{where} has {names.count(cfg.text_field)} columns of this name",
            field="dataset.text_field",
            value=cfg.text_field,
            valid=", ".join(names),
            hint="rename all but one",
        )


def read_column(rows: Any, cfg: TextsConfig) -> Iterator[str]:
    """Yield the texts of a table's text column; missing values are skipped.

    Args:
        rows: has `column_names`, and gives a column's values by name, as `datasets.Dataset` does.
        cfg: names the column.

    Raises:
        UserError: there is no such column, or it does not hold text.
    """
    _check_field(cfg, f"dataset {cfg.path}", rows.column_names)
    for value in rows[cfg.text_field]:
        if value is None:
            continue
        if not (cfg.chat or isinstance(value, str)):
            raise _not_text(cfg, f"dataset {cfg.path}", value)
        yield conversation(value, f"dataset {cfg.path}", cfg.text_field) if cfg.chat else value


def _open_zstd(path: Path) -> IO[bytes]:
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))


_DECOMPRESS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstd,
}


def _open(path: Path) -> IO[bytes]:
    decompress = _DECOMPRESS.get(path.suffix.lower())
    file: IO[bytes] = decompress(path) if decompress else path.open("rb")
    return file


def _lines(path: Path) -> Iterator[str]:
    """Yield the lines of a UTF-8 file with their ends, without a byte order mark.

    Raises:
        UserError: it is empty, binary, or in another encoding.
    """
    is_empty, offset = True, 0
    with _open(path) as file:
        for number, raw in enumerate(file, 1):
            line = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
            if offset < _BINARY_WITHIN and b"\0" in raw:
                raise UserError(
                    "the file is binary, not text",
                    field="dataset.path",
                    value=path,
                    valid="UTF-8 text",
                )
            try:
                yield line.decode()
            except UnicodeDecodeError as error:
                at, byte = offset + len(raw) - len(line) + error.start, line[error.start]
                raise UserError(
                    f"the file is not UTF-8: byte {at} (line {number}) is 0x{byte:02x}",
                    field="dataset.path",
                    value=path,
                    hint=f"iconv -f ISO-8859-1 -t UTF-8 {path.name} > utf8-{path.name}",
                ) from error
            is_empty = is_empty and not line.strip()
            offset += len(raw)
    if is_empty:
        raise UserError("the file is empty", field="dataset.path", value=path)


def _read_txt(path: Path, cfg: TextsConfig) -> Iterator[str]:
    yield from _lines(path)


def _read_jsonl(path: Path, cfg: TextsConfig) -> Iterator[str]:
    yield from _json_rows(_lines(path), path, cfg)


def _json_rows(lines: Iterable[str], path: Path, cfg: TextsConfig) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"line {number} of {path.name}"
            yield from _json_text(_parse_json(line, where, path), where, cfg)


def _parse_json(text: str, where: str, path: Path) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{where} is not JSON: {error}",
            field="dataset.path",
            value=path,
            valid='one object per line, such as {"text": "…"}; in .json also an array of them',
        ) from error


def _json_text(row: Any, where: str, cfg: TextsConfig) -> Iterator[str]:
    """Yield a row's text, unless it is null. A row that is a string is its own text."""
    if cfg.chat:
        yield row_conversation(row, where, cfg.text_field)
        return
    if not isinstance(row, str):
        if not isinstance(row, dict) or cfg.text_field not in row:
            raise _missing_field(cfg, where, row if isinstance(row, dict) else ())
        row = row[cfg.text_field]
    if row is not None:
        if not isinstance(row, str):
            raise _not_text(cfg, where, row)
        yield row


def _read_json(path: Path, cfg: TextsConfig) -> Iterator[str]:
    """Read an array of rows, or, as many a .json is, one row per line."""
    lines = list(_lines(path))
    text = "".join(lines)
    if not text.lstrip().startswith("["):
        yield from _json_rows(lines, path, cfg)
        return
    for number, row in enumerate(_parse_json(text, path.name, path), 1):
        yield from _json_text(row, f"item {number} of {path.name}", cfg)


def _read_csv(path: Path, cfg: TextsConfig) -> Iterator[str]:
    csv.field_size_limit(1 << 30)
    rows = csv.reader(_lines(path), strict=True)  # (else an open quote takes in all that follows)
    start, names = 1, None
    try:
        for row in rows:
            if names is None:
                names = row
                _check_field(cfg, path.name, names)
            elif len(row) > len(names):
                raise UserError(
                    f"line {start} of {path.name} has {len(row)} values for {len(names)} columns",
                    field="dataset.path",
                    value=path,
                    hint="values that contain a comma in double quotes",
                )
            elif len(row) > names.index(cfg.text_field):
                yield row[names.index(cfg.text_field)]
            start = rows.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"the row that begins in line {start} of {path.name} has a double quote that is not "
            f"closed or not doubled: {error} (line {rows.line_num})",
            field="dataset.path",
            value=path,
            valid='texts with commas, quotes or line breaks in quotes: "a ""quoted"" text"',
        ) from error


def _read_parquet(path: Path, cfg: TextsConfig) -> Iterator[str]:
    import pyarrow.parquet
    from pyarrow.lib import ArrowException

    try:
        _check_field(cfg, f"dataset {cfg.path}", pyarrow.parquet.read_schema(path).names)
        table = pyarrow.parquet.read_table(path)
    except (ArrowException, OSError) as error:
        raise UserError(
            f"the file is not readable as Parquet: {str(error).splitlines()[0]}",
            field="dataset.path",
            value=path,
        ) from error
    try:
        yield from read_column(_ArrowRows(table), cfg)
    except UnicodeDecodeError as error:
        raise _not_text(cfg, path.name, error.object) from error


class _ArrowRows:
    """An Arrow table with the interface that `read_column` needs."""

    def __init__(self, table: Any) -> None:
        self.table = table
        self.column_names: list[str] = table.column_names

    def __getitem__(self, name: str) -> Any:
        return self.table.column(name).to_pylist()


_READERS: dict[str, Callable[[Path, TextsConfig], Iterator[str]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
READABLE = f"{', '.join(_READERS)}; but for .parquet also compressed ({', '.join(_DECOMPRESS)})"
"""The formats of files, for messages."""
