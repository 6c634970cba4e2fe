"""Where documents come from: the Hub, the user's files, texts that packages ship.

Every source ends as one artifact: `documents.jsonl`, one document per line as a JSON string.
Nothing here knows tokens.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hyperfitting.data import packaged
from hyperfitting.data.config import TextsConfig
from hyperfitting.data.readers import READERS, SUFFIXES, read_column
from hyperfitting.errors import UserError, near_matches
from hyperfitting.models import hub
from hyperfitting.progress import ProgressReporter, no_op
from hyperfitting.store import Artifact, Step, Store, fingerprint

VERSION = 1
_FILE = "documents.jsonl"


def documents_step(
    cfg: TextsConfig, store: Store, progress: ProgressReporter = no_op, at: str = "dataset"
) -> Step:
    """Return the step that reads a dataset's documents. Only its id is determined here.

    Args:
        cfg: which documents.
        store: where they are kept.
        progress: reports the documents read.
        at: position of ``cfg`` in the whole config, for error messages.

    Raises:
        UserError: the source does not exist or cannot be reached; so does the step's build if it
            cannot be read.
    """
    with errors_at(at):
        source = _SOURCES[cfg.source](cfg)

    def build(work: Path) -> None:
        documents: list[str] = []
        with errors_at(at), progress(f"reading {cfg.name}", 0, "documents") as advance:
            for document in source.read():
                documents.append(document)
                advance(1)
            if not documents:
                raise UserError(
                    f"no text in it: every {cfg.text_field} is empty",
                    field="dataset.path",
                    value=cfg.path,
                )
        with (work / _FILE).open("w", encoding="utf-8") as file:
            for document in documents:
                file.write(json.dumps(document, ensure_ascii=False) + "\n")

    artifact = store.artifact(
        "documents", version=VERSION, config=source.config, inputs={"source": source.id}
    )
    return Step(artifact, build)


def load_documents(artifact: Artifact) -> list[str]:
    """Return the documents of a `documents` artifact."""
    with artifact.file(_FILE).open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@contextmanager
def errors_at(at: str) -> Iterator[None]:
    """Make errors that name fields of `dataset` name those of the config at ``at`` instead."""
    try:
        yield
    except UserError as error:
        if at == "dataset":
            raise
        raise error.renamed("dataset.", f"{at}.") from error


@dataclass(frozen=True)
class _Source:
    """Where the documents of a config are read from."""

    id: str
    """Determines the content."""
    config: dict[str, Any]
    """The settings that the documents depend on besides."""
    read: Callable[[], Iterable[str]]
    """Yields the documents."""


def _package(cfg: TextsConfig) -> _Source:
    sample = str(cfg.path)
    files = {path.name: path for path in packaged.files(sample)}
    return _Source(fingerprint(files), {"sample": sample}, lambda: packaged.read(sample))


def _hub(cfg: TextsConfig) -> _Source:
    repo = str(cfg.path)
    commit = hub.resolve_commit("dataset", repo, cfg.revision)

    def read() -> Iterator[str]:
        from datasets import load_dataset

        with hub.explain_errors("dataset", repo, cfg.revision), _explain_datasets_errors(cfg):
            rows = load_dataset(repo, cfg.subset, split=cfg.split, revision=commit)
        return _group_rows(read_column(rows, cfg), cfg)

    return _Source(
        f"{repo}@{commit}", {"subset": cfg.subset, "split": cfg.split, **_row_config(cfg)}, read
    )


def _files(cfg: TextsConfig) -> _Source:
    path = Path(str(cfg.path)).expanduser().absolute()
    if not path.exists():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(
            "no such file or folder",
            field="dataset.path",
            value=path,
            hint=near_matches(path.name, siblings),
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
            rows = READERS[file.suffix](file, cfg)
            yield from _group_rows(rows, cfg, rows_are_lines=file.suffix == ".txt")

    return _Source(fingerprint(names), _row_config(cfg), read)


def _datasets_folder(path: Path, cfg: TextsConfig) -> _Source:
    """A folder written by the `datasets` library's save_to_disk."""
    files = {str(p.relative_to(path)): p for p in sorted(path.rglob("*")) if p.is_file()}

    def read() -> Iterator[str]:
        from datasets import DatasetDict, load_from_disk

        with _explain_datasets_errors(cfg):
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
        return _group_rows(read_column(rows, cfg), cfg)

    return _Source(fingerprint(files), {"split": cfg.split, **_row_config(cfg)}, read)


_SOURCES: dict[str, Callable[[TextsConfig], _Source]] = {
    "hub": _hub,
    "files": _files,
    "package": _package,
}


def _row_config(cfg: TextsConfig) -> dict[str, Any]:
    return {"text_field": cfg.text_field, "document_start": cfg.document_start}


@contextmanager
def _explain_datasets_errors(cfg: TextsConfig) -> Iterator[None]:
    """Turn what `datasets` raises for a wrong name, subset or split into a message."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        raise UserError(
            f"`datasets` cannot load it: {str(error).splitlines()[0]}",
            field="dataset.path",
            value=cfg.path,
            hint="check dataset.subset, dataset.split and dataset.revision",
        ) from error


def _group_rows(
    rows: Iterable[str], cfg: TextsConfig, rows_are_lines: bool = False
) -> Iterator[str]:
    """Group rows into documents, stripped of surrounding white space; empty ones are dropped.

    Args:
        rows: texts of a column, or lines of a .txt file.
        cfg: a row that matches its `document_start` begins a new document. Without a
            `document_start` each row is a document.
        rows_are_lines: without a `document_start`, all rows together are one document.
    """
    if cfg.document_start is None and not rows_are_lines:
        yield from filter(None, (row.strip() for row in rows))
        return
    starts = _compile(cfg.document_start) if cfg.document_start is not None else None
    document: list[str] = []
    for row in rows:
        if starts and starts.match(row.rstrip("\n")) and document:
            yield from filter(None, ["".join(document).strip()])
            document = []
        document.append(row)
    yield from filter(None, ["".join(document).strip()])


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(
            f"is not a regular expression: {error}", field="dataset.document_start", value=pattern
        ) from error
