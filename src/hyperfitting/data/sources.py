"""Where documents come from: the Hub, the user's files, texts that packages ship.

Every source ends as one artifact: `documents.jsonl`, one document per line as a JSON string, and
`groups.npy`, which documents are near-duplicates of each other. Nothing here knows tokens.
"""

import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hyperfitting.data import packaged
from hyperfitting.data.config import TextsConfig
from hyperfitting.data.duplicates import near_duplicate_groups
from hyperfitting.data.hub_dataset import explain_datasets_errors, load_rows
from hyperfitting.data.readers import (
    READABLE,
    READERS_VERSION,
    file_format,
    read_column,
    read_rows,
    reading,
)
from hyperfitting.errors import UserError, near_matches
from hyperfitting.models import hub
from hyperfitting.progress import ProgressReporter, no_op
from hyperfitting.store.artifact import Artifact, Step, Store
from hyperfitting.store.hashing import fingerprint

if TYPE_CHECKING:
    from datasets import Dataset

VERSION = 3
_FILE, _GROUPS_FILE = "documents.jsonl", "groups.npy"
_SURROGATE = re.compile("[\ud800-\udfff]")
"""Half of a UTF-16 pair, which JSON can hold alone and UTF-8 cannot."""

log = logging.getLogger(__name__)


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
        source = _SOURCES[cfg.source](cfg, progress)

    def build(work: Path) -> None:
        documents: list[str] = []
        with errors_at(at):
            texts = source.read()  # may download, which reports its own progress
        with errors_at(at), progress(f"reading {cfg.name}", 0, "documents") as advance:
            n_surrogates = 0
            for document in texts:
                text, n = _SURROGATE.subn("\ufffd", document)
                n_surrogates += n
                documents.append(text)
                advance(1)
            if not documents:
                raise UserError(
                    f"no text in it: every {cfg.text_field} is empty",
                    field="dataset.path",
                    value=cfg.path,
                )
        if n_surrogates:
            log.warning(
                "%s: %d lone surrogates, which are no characters, are replaced by U+FFFD",
                cfg.name,
                n_surrogates,
            )
        with (work / _FILE).open("w", encoding="utf-8") as file:
            for document in documents:
                file.write(json.dumps(document, ensure_ascii=False) + "\n")
        np.save(work / _GROUPS_FILE, near_duplicate_groups(documents, progress), allow_pickle=False)

    artifact = store.artifact(
        "documents", version=VERSION, config=source.config, inputs={"source": source.id}
    )
    return Step(artifact, build)


@dataclass(frozen=True)
class Documents:
    """The documents of a dataset."""

    texts: list[str]
    """N texts, none empty."""
    groups: list[int]
    """(N) the group of near-duplicates that each is in."""


def load_documents(artifact: Artifact) -> Documents:
    """Return the documents of a `documents` artifact."""
    with artifact.file(_FILE).open(encoding="utf-8") as file:
        texts = [json.loads(line) for line in file]
    return Documents(texts, np.load(artifact.file(_GROUPS_FILE)).tolist())


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


def _package(cfg: TextsConfig, progress: ProgressReporter) -> _Source:
    sample = str(cfg.path)
    files = {path.name: path for path in packaged.files(sample)}
    return _Source(fingerprint(files), {"sample": sample}, lambda: packaged.read(sample))


def _hub(cfg: TextsConfig, progress: ProgressReporter) -> _Source:
    repo = str(cfg.path)
    commit = hub.resolve_commit("dataset", repo, cfg.revision)

    def read() -> Iterator[str]:
        return _group_rows(read_column(load_rows(cfg, commit, progress), cfg), cfg)

    return _Source(
        f"{repo}@{commit}", {"subset": cfg.subset, "split": cfg.split, **_row_config(cfg)}, read
    )


def _files(cfg: TextsConfig, progress: ProgressReporter) -> _Source:
    path = Path(str(cfg.path)).expanduser().absolute()
    with reading(path):
        if not path.exists():
            raise _no_such_file(path)
        if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
            return _datasets_folder(path, cfg)
        files = _data_files(path) if path.is_dir() else [path]
        if not files or not all(map(file_format, files)):
            raise UserError(
                "no file here that can be read",
                field="dataset.path",
                value=path,
                valid=f"{READABLE}; a folder of them, or a folder saved by `datasets`",
            )
        unreadable = [str(file.relative_to(path.parent)) for file in files if not file.is_file()]
        if unreadable:
            raise UserError(
                f"not files, or links to nothing: {', '.join(unreadable[:5])}"
                + (", …" if len(unreadable) > 5 else ""),
                field="dataset.path",
                value=path,
                hint="remove them, or fetch what the links stand for",
            )
        names = {str(file.relative_to(path.parent)): file for file in files}
        source_id = fingerprint(names)
    is_txt = {file: file_format(file) == ".txt" for file in files}

    def read() -> Iterator[str]:
        for file in files:
            yield from _group_rows(read_rows(file, cfg), cfg, rows_are_lines=is_txt[file])

    row_config = _row_config(cfg, rows_are_lines=all(is_txt.values()))
    return _Source(source_id, {"reader": READERS_VERSION, **row_config}, read)


def _no_such_file(path: Path) -> UserError:
    problem = "a link to nothing" if path.is_symlink() else "no such file or folder"
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    hint = near_matches(path.name, siblings)
    return UserError(problem, field="dataset.path", value=path, hint=hint)


def _data_files(folder: Path) -> list[Path]:
    """Return what is named like a file that can be read, in a folder and those in it.

    Hidden files and folders are skipped, such as macOS's `._x.txt`; links to folders too. A .json
    beside files of other formats is taken for a description of them.

    Raises:
        OSError: a folder cannot be listed.
    """

    def fail(error: OSError) -> None:
        raise error

    files: list[Path] = []
    for at, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(at, name) for name in names if not name.startswith(".")]
    readable = sorted(filter(file_format, files))
    return [file for file in readable if file_format(file) != ".json"] or readable


def _datasets_folder(path: Path, cfg: TextsConfig) -> _Source:
    """A folder written by the `datasets` library's save_to_disk."""
    files = {str(p.relative_to(path)): p for p in sorted(path.rglob("*")) if p.is_file()}

    def read() -> Iterator[str]:
        from datasets import DatasetDict, load_from_disk

        with explain_datasets_errors(cfg):
            saved = load_from_disk(str(path))
            splits = (
                saved if isinstance(saved, DatasetDict) else {str(saved.split or "train"): saved}
            )
            rows = _select_split(splits, cfg.split)
        return _group_rows(read_column(rows, cfg), cfg)

    return _Source(fingerprint(files), {"split": cfg.split, **_row_config(cfg)}, read)


def _select_split(splits: "Mapping[str, Dataset]", split: str) -> "Dataset":
    """Return the rows of a split or slice, such as `train[:1000]` or `train+test`.

    Raises:
        UserError: there is no such split, or the slice is not valid.
    """
    from datasets import ReadInstruction, concatenate_datasets

    try:
        parts = ReadInstruction.from_spec(split).to_absolute(
            {name: len(rows) for name, rows in splits.items()}
        )
    except (ValueError, AssertionError) as error:
        raise UserError(
            "it has no such split",
            field="dataset.split",
            value=split,
            valid=f"{', '.join(splits)}, or a slice such as {next(iter(splits))}[:1000]",
        ) from error
    return concatenate_datasets(
        [splits[part.splitname].select(range(part.from_, part.to)) for part in parts]
    )


_SOURCES: dict[str, Callable[[TextsConfig, ProgressReporter], _Source]] = {
    "hub": _hub,
    "files": _files,
    "package": _package,
}


def _row_config(cfg: TextsConfig, rows_are_lines: bool = False) -> dict[str, Any]:
    config = {"text_field": cfg.text_field, "document_start": cfg.document_start}
    if cfg.document_start is not None and not rows_are_lines:
        config["row_end"] = "\n"
    return config | ({"chat": True} if cfg.chat else {})


def _group_rows(
    rows: Iterable[str], cfg: TextsConfig, rows_are_lines: bool = False
) -> Iterator[str]:
    """Group rows into documents, stripped of surrounding white space; empty ones are dropped.

    Rows that are joined are lines: one that does not end with a newline gets one.

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
        if starts and starts.match(row.rstrip("\r\n")) and document:
            yield from filter(None, ["".join(document).strip()])
            document = []
        document.append(row if row.endswith("\n") else f"{row}\n")
    yield from filter(None, ["".join(document).strip()])


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(
            f"is not a regular expression: {error}", field="dataset.document_start", value=pattern
        ) from error
