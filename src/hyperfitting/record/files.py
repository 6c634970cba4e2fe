"""Reading and writing the files of a record: `results.json`, and the predictions beside it."""

import json
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hyperfitting.errors import UserError, exhausted_resource
from hyperfitting.record.schema import SCHEMA_VERSION, Record
from hyperfitting.runtime.files import read_versioned, replacing, write_text

RECORD_FILE, PREDICTIONS_FILE, TEXTS_PAGE = (
    "results.json",
    "predictions.npz",
    "continuations.html",
)

Predictions = Mapping[str, NDArray[Any]]
"""`tuned/NAME` and `base/NAME` for each token statistic (`metrics.distribution.TokenStats`) on the
reference texts: (N, text_len - 1) arrays in the order of the samples."""


_REPORTED_PREDICTIONS = ("tuned/top1", "tuned/rank", "base/rank")
"""Those that figures are drawn of."""


def write_record(folder: Path, record: Record, predictions: Predictions) -> None:
    """Write a record and its predictions into a folder; results.json appears last, atomically.

    Raises:
        ValueError: a number is NaN or infinite, which JSON cannot represent.
    """
    with replacing(folder / PREDICTIONS_FILE) as temporary, temporary.open("wb") as file:
        arrays: Any = {name.replace("/", "."): values for name, values in predictions.items()}
        np.savez_compressed(file, **arrays)
    text = json.dumps(record.model_dump(mode="json"), indent=1, ensure_ascii=False, allow_nan=False)
    write_text(folder / RECORD_FILE, text + "\n")


def read_record(path: Path) -> Record:
    """Return the record in a results.json.

    Raises:
        UserError: the file is no record, is invalid, or is of another version.
    """
    return read_versioned(
        path,
        Record,
        "schema_version",
        SCHEMA_VERSION,
        field="record",
        value=path,
        hint="the command that wrote it writes it again, without training again",
        upgrade=upgraded,
    )


def upgraded(values: dict[str, Any]) -> dict[str, Any]:
    """Return a record of version 5 as version 6 has it; one of another version as it is.

    Version 6 added `mechanism`, which no run of version 5 measured.
    """
    if values.get("schema_version") != 5:
        return values
    return values | {"schema_version": 6, "mechanism": None}


def read_predictions(folder: Path) -> dict[str, NDArray[Any]] | None:
    """Return the predictions beside a record, by `tuned/NAME` and `base/NAME`; None: none there.

    Raises:
        UserError: the file is damaged, or lacks an array that reports need.
    """
    path = folder / PREDICTIONS_FILE
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            predictions = {name.replace(".", "/", 1): arrays[name] for name in arrays.files}
        invalid = [
            name
            for name in _REPORTED_PREDICTIONS
            if not isinstance(predictions.get(name), np.ndarray)
            or predictions[name].ndim != 2
            or predictions[name].dtype.kind not in "iuf"  # ranks are float32
        ]
        problem = f"has no matrix of numbers {', '.join(invalid)}" if invalid else ""
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        if exhausted_resource(error):
            raise
        problem = f"cannot be read: {error}"
    if problem:
        raise UserError(
            problem,
            field="predictions",
            value=path,
            hint="the command that wrote it writes it again, without training again",
        )
    return predictions
