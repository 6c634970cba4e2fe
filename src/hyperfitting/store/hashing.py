"""Hashes: ids of values, and checksums of files."""

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any


def digest(value: Any) -> str:
    """Return the id of a JSON-serializable value: 16 hex digits of its canonical form's SHA-256."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(paths: Mapping[str, Path]) -> str:
    """Return an id of named files' contents. Each file is hashed once per process."""
    return digest(
        {name: _stamped_sha256(path, path.stat().st_mtime_ns) for name, path in paths.items()}
    )


@cache
def _stamped_sha256(path: Path, _mtime_ns: int) -> str:
    return file_sha256(path)
