"""Where documents come from: the Hub, the user's files, texts that packages ship.

Whatever the source, the outcome is one artefact: ``documents.jsonl``, one document a line as a JSON
string. It knows nothing of tokens.
"""

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hyperfitting import hub
from hyperfitting.config import TextsConfig
from hyperfitting.data import packaged
from hyperfitting.errors import UserError, near_matches
from hyperfitting.progress import Progress, silent
from hyperfitting.store import Artefact, Store, fingerprint

VERSION = 1
SUFFIXES = (".txt", ".jsonl", ".csv", ".parquet")


def texts(cfg: TextsConfig, store: Store, show: Progress = silent) -> Artefact:
    """Return the artefact of a dataset's documents. Only its id is worked out here.

    Raises:
        UserError: the source does not exist or cannot be reached.
    """
    origin = _SOURCES[cfg.source](cfg)

    def make(work: Path) -> None:
        documents: list[str] = []
        with show(f"reading {cfg.name}", 0, "documents") as advance:
            for document in origin.read():
                documents.append(document)
                advance(1)
        if not documents:
            raise UserError(
                f"no text in it: every {cfg.text_field} is empty",
                field="dataset.path",
                value=cfg.path,
            )
        with (work / "documents.jsonl").open("w", encoding="utf-8") as file:
            for document in documents:
                file.write(json.dumps(document, ensure_ascii=False) + "\n")

    return store.artefact(
        "texts", version=VERSION, config=origin.config, inputs={"source": origin.id}, make=make
    )


def load(artefact: Artefact) -> list[str]:
    """Return the documents of a texts artefact."""
    with artefact.file("documents.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@dataclass(frozen=True)
class _Origin:
    """A source: an id of its content, the settings that its documents depend on, and the reader."""

    id: str
    config: dict[str, Any]
    read: Callable[[], Iterable[str]]


def _package(cfg: TextsConfig) -> _Origin:
    sample = str(cfg.path)
    files = {path.name: path for path in packaged.files(sample)}
    return _Origin(fingerprint(files), {"sample": sample}, lambda: packaged.read(sample))


def _hub(cfg: TextsConfig) -> _Origin:
    repo = str(cfg.path)
    sha = hub.commit("dataset", repo, cfg.revision)

    def read() -> Iterator[str]:
        from datasets import load_dataset

        with hub.explained("dataset", repo, cfg.revision), _dataset_errors(cfg):
            rows = load_dataset(repo, cfg.subset, split=cfg.split, revision=sha)
        return _documents(_column(rows, cfg), cfg)

    return _Origin(
        f"{repo}@{sha}", {"subset": cfg.subset, "split": cfg.split, **_row_config(cfg)}, read
    )


def _files(cfg: TextsConfig) -> _Origin:
    path = Path(str(cfg.path)).expanduser().absolute()
    if not path.exists():
        there = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(
            "no such file or folder",
            field="dataset.path",
            value=path,
            hint=near_matches(path.name, there),
        )
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        return _datasets_folder(path, cfg)
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES)
    if not files or path.suffix not in ("", *SUFFIXES):
        raise UserError(
            "no file here that can be read",
            field="dataset.path",
            value=path,
            valid=f"{', '.join(SUFFIXES)}, a folder of them, or a folder saved by `datasets`",
        )
    names = {str(file.relative_to(path.parent)): file for file in files}

    def read() -> Iterator[str]:
        for file in files:
            yield from _documents(
                _READERS[file.suffix](file, cfg), cfg, joined=file.suffix == ".txt"
            )

    return _Origin(fingerprint(names), _row_config(cfg), read)


def _datasets_folder(path: Path, cfg: TextsConfig) -> _Origin:
    files = {str(p.relative_to(path)): p for p in sorted(path.rglob("*")) if p.is_file()}

    def read() -> Iterator[str]:
        from datasets import DatasetDict, load_from_disk

        with _dataset_errors(cfg):
            rows = load_from_disk(str(path))
            if isinstance(rows, DatasetDict):
                if cfg.split not in rows:
                    raise UserError(
                        "it has no such split",
                        field="dataset.split",
                        value=cfg.split,
                        valid=", ".join(rows),
                    )
                rows = rows[cfg.split]
        return _documents(_column(rows, cfg), cfg)

    return _Origin(fingerprint(files), {"split": cfg.split, **_row_config(cfg)}, read)


_SOURCES: dict[str, Callable[[TextsConfig], _Origin]] = {
    "hub": _hub,
    "files": _files,
    "package": _package,
}


def _row_config(cfg: TextsConfig) -> dict[str, Any]:
    return {"text_field": cfg.text_field, "document_start": cfg.document_start}


class _dataset_errors:
    """Turn what `datasets` raises for a wrong name, subset or split into a message."""

    def __init__(self, cfg: TextsConfig) -> None:
        self.cfg = cfg

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, (ValueError, FileNotFoundError)):
            raise UserError(
                f"`datasets` cannot load it: {str(error).splitlines()[0]}",
                field="dataset.path",
                value=self.cfg.path,
                hint="look at dataset.subset, dataset.split and dataset.revision",
            ) from error


def _no_field(cfg: TextsConfig, where: str, there: Iterable[str]) -> UserError:
    there = list(there)
    return UserError(
        f"{where} has no such field",
        field="dataset.text_field",
        value=cfg.text_field,
        valid=", ".join(there) or "(it has none)",
        hint=near_matches(cfg.text_field, there)
        or (f"dataset.text_field={there[0]}" if there else ""),
    )


def _not_text(cfg: TextsConfig, where: str, value: Any) -> UserError:
    return UserError(
        f"{where} holds {type(value).__name__} there, not text",
        field="dataset.text_field",
        value=cfg.text_field,
    )


def _column(rows: Any, cfg: TextsConfig) -> Iterator[str]:
    if cfg.text_field not in rows.column_names:
        raise _no_field(cfg, f"dataset {cfg.path}", rows.column_names)
    for value in rows[cfg.text_field]:
        if value is None:
            continue
        if not isinstance(value, str):
            raise _not_text(cfg, f"dataset {cfg.path}", value)
        yield value


def _text_of(path: Path) -> str:
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


def _txt(path: Path, cfg: TextsConfig) -> Iterator[str]:
    yield from _text_of(path).splitlines(keepends=True)


def _jsonl(path: Path, cfg: TextsConfig) -> Iterator[str]:
    for number, line in enumerate(_text_of(path).splitlines(), 1):
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
                valid='one object a line, such as {"text": "…"}',
            ) from error
        if not isinstance(row, dict) or cfg.text_field not in row:
            raise _no_field(cfg, where, row if isinstance(row, dict) else ())
        if not isinstance(row[cfg.text_field], str):
            raise _not_text(cfg, where, row[cfg.text_field])
        yield row[cfg.text_field]


def _csv(path: Path, cfg: TextsConfig) -> Iterator[str]:
    csv.field_size_limit(1 << 30)
    rows = csv.DictReader(_text_of(path).splitlines(keepends=True))
    if cfg.text_field not in (rows.fieldnames or ()):
        raise _no_field(cfg, path.name, rows.fieldnames or ())
    for row in rows:
        yield row[cfg.text_field] or ""


def _parquet(path: Path, cfg: TextsConfig) -> Iterator[str]:
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
    yield from _column(_Rows(table), cfg)


class _Rows:
    """An Arrow table behind the two names that `_column` uses."""

    def __init__(self, table: Any) -> None:
        self.table = table
        self.column_names: list[str] = table.column_names

    def __getitem__(self, name: str) -> Any:
        return self.table.column(name).to_pylist()


_READERS: dict[str, Callable[[Path, TextsConfig], Iterator[str]]] = {
    ".txt": _txt,
    ".jsonl": _jsonl,
    ".csv": _csv,
    ".parquet": _parquet,
}


def _documents(rows: Iterable[str], cfg: TextsConfig, joined: bool = False) -> Iterator[str]:
    """Group rows into documents, without white space around them; empty ones are dropped.

    A row that matches ``document_start`` begins a new one; without that each row is one, or, if
    ``joined``, all rows together are.
    """
    if cfg.document_start is None and not joined:
        yield from filter(None, (row.strip() for row in rows))
        return
    starts = _pattern(cfg.document_start) if cfg.document_start is not None else None
    document: list[str] = []
    for row in rows:
        if starts and starts.match(row.rstrip("\n")) and document:
            yield from filter(None, ["".join(document).strip()])
            document = []
        document.append(row)
    yield from filter(None, ["".join(document).strip()])


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise UserError(
            f"is not a regular expression: {error}", field="dataset.document_start", value=text
        ) from error
