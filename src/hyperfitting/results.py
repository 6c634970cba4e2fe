"""`results.json`, the interface that tables, dashboards and others read, and how it is read.

Its fields are documented in the README ("results.json"). Raise SCHEMA_VERSION when one changes.
"""

import json
from pathlib import Path
from typing import Any

from hyperfitting.errors import UserError

SCHEMA_VERSION = 2
FILE_NAME, PAGE = "results.json", "continuations.html"
"""The record of a run, and the page of its texts beside it."""
Record = dict[str, Any]


def read(path: Path) -> Record:
    """Return a record.

    Raises:
        UserError: the file is no record, or one that this version does not know.
    """
    try:
        record: Record = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot be read: {error}",
            field="record",
            value=path,
            hint="the command that wrote it writes it anew, without training again",
        ) from error
    version = record.get("schema_version")
    if version != SCHEMA_VERSION:
        raise UserError(
            f"a record of another version of this software (schema_version {version})",
            field="record",
            value=path,
            valid=f"schema_version {SCHEMA_VERSION}",
            hint="the command that wrote it writes it anew, without training again",
        )
    return record
