"""Atomic file writes, and what network file systems need. Nothing is ever half-written."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


def fsync_path(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def refresh_directory(folder: Path) -> None:
    """Invalidate the NFS client's cache of a directory that other machines write to.

    An NFS client answers for up to a minute from cached entries, negative ones included; changing
    the directory itself makes it revalidate them.
    """
    with suppress(OSError):  # it does not exist, or is not writable
        descriptor, name = tempfile.mkstemp(prefix=".refresh.", suffix=".partial", dir=folder)
        os.close(descriptor)
        Path(name).unlink()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path that replaces ``path`` atomically on success.

    The file is written beside its destination, fsynced and renamed; on an error nothing is left.
    Several processes may write the same file at once: the last rename wins.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield temporary
        fsync_path(temporary)
        temporary.rename(path)
        fsync_path(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write readable JSON atomically.

    Raises:
        ValueError: a number is NaN or infinite, which JSON cannot represent.
    """
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")
