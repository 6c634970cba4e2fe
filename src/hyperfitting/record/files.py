"""Reading and writing the files of a record: `results.json`, and the predictions beside it."""

import json
import re
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hyperfitting.errors import UserError, exhausted_resource
from hyperfitting.record.schema import SCHEMA_VERSION, Record
from hyperfitting.runtime.code_version import DIFF_FILE, MAX_DIFF_BYTES
from hyperfitting.runtime.files import read_versioned, replacing, write_text
from hyperfitting.store.hashing import file_sha256

RECORD_FILE, PREDICTIONS_FILE, TEXTS_PAGE = (
    "results.json",
    "predictions.npz",
    "continuations.html",
)
CHECKSUMS_FILE = "SHA256SUMS"
"""SHA-256 of the other files of a record, in the format of `sha256sum`."""

Predictions = Mapping[str, NDArray[Any]]
"""`tuned/NAME` and `base/NAME` for each token statistic (`metrics.distribution.TokenStats`) on the
reference texts: (N, text_len - 1) arrays in the order of the samples."""


_RUNS = "outputs/runs"
_CHECKSUM_LINE = re.compile(r"([0-9a-f]{64})  ([^/\\]+)")
_RENAMED_IN_10 = {
    "mech/lens_settled_base": "mech/prediction_depth_base",
    "mech/lens_settled_tuned": "mech/prediction_depth_tuned",
    "mech/lens_parted": "mech/divergence_depth",
    "lens/base_settled": "lens/base_final_choice",
    "lens/tuned_settled": "lens/tuned_final_choice",
    "lens/parted": "lens/diverged",
}
"""Keys of `mechanism`, which version 10 of the format renamed."""
_REPORTED_PREDICTIONS = ("tuned/top1", "tuned/rank", "base/rank")
"""Those that figures are drawn of."""


def write_record(folder: Path, record: Record, predictions: Predictions) -> None:
    """Write a record and its predictions into a folder, with the checksums of all its files.

    results.json appears last, atomically. Its texts page and `code.diff` are in the folder before.

    Raises:
        ValueError: a number is NaN or infinite, which JSON cannot represent.
    """
    with replacing(folder / PREDICTIONS_FILE) as temporary, temporary.open("wb") as file:
        arrays: Any = {name.replace("/", "."): values for name, values in predictions.items()}
        np.savez_compressed(file, **arrays)
    text = json.dumps(record.model_dump(mode="json"), indent=1, ensure_ascii=False, allow_nan=False)
    with replacing(folder / RECORD_FILE) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")
        others = (folder / name for name in (PREDICTIONS_FILE, TEXTS_PAGE, DIFF_FILE))
        checksums = {path.name: file_sha256(path) for path in others if path.is_file()}
        checksums[RECORD_FILE] = file_sha256(temporary)
        lines = (f"{checksum}  {name}\n" for name, checksum in sorted(checksums.items()))
        write_text(folder / CHECKSUMS_FILE, "".join(lines))


def write_code_diff(folder: Path, diff: str) -> None:
    """Write `code.diff`; delete an old one if the tree is clean or the diff is too large."""
    content = diff.encode("utf-8", "surrogateescape")
    path = folder / DIFF_FILE
    if not content or len(content) > MAX_DIFF_BYTES:
        path.unlink(missing_ok=True)
        return
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def read_checksums(folder: Path) -> dict[str, str] | None:
    """Return the checksums of a record's files by name; None: there are none.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / CHECKSUMS_FILE
    try:
        lines = path.read_text("utf-8").splitlines()
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot be read: {error}", field="checksums", value=path) from error
    entries = [_CHECKSUM_LINE.fullmatch(line) for line in lines]
    if not entries or None in entries:
        raise UserError(
            "has a line that is no checksum of a file beside it", field="checksums", value=path
        )
    return {entry[2]: entry[1] for entry in entries if entry is not None}


def newest_record() -> Path:
    """Return the record of the newest run below `outputs/runs` of this folder.

    Raises:
        UserError: there is none.
    """
    records = sorted(Path(_RUNS).glob(f"*/*/{RECORD_FILE}"), key=lambda p: p.stat().st_mtime)
    if not records:
        raise UserError(f"there is no finished run below {_RUNS}", hint="`hyperfit` makes one")
    return records[-1]


def read_record(path: Path | str) -> Record:
    """Return the record in a results.json.

    Raises:
        UserError: the file is no record, is invalid, or is of another version.
    """
    path = Path(path)
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
    """Return a record of an earlier format as this version has it; any other as it is.

    Version 6 added `mechanism`, version 7 `image`, `recognition` and `downstream`, version 8 `chat`
    and the tasks of `downstream` by name, which no run before measured; version 9 the tokens of
    answers, and when the record was made; version 10 renamed the measures of the logit lens.
    Version 5 and the first records of version 6 have `git` instead of `code`, and no `machine`.
    """
    if values.get("schema_version") not in (5, 6, 7, 8, 9):
        return values
    values = {"mechanism": None, **values, "schema_version": 10}
    if isinstance(mechanism := values["mechanism"], dict):
        values["mechanism"] = {name: _renamed(part) for name, part in mechanism.items()}
    if "git" not in values:
        return values
    git = values["git"] and {**values["git"], "diff_sha256": None}
    digest = f"unknown-{git['commit'][:12]}" if git else "unknown"
    code = {"package": "unknown", "digest": digest, "git": git}
    machine = {"cpu": "unknown", "cores": 0, "threads": 0, "system": "unknown"}
    kept = {name: value for name, value in values.items() if name != "git"}
    return kept | {"code": code, "machine": machine}


def _renamed(part: Any) -> Any:
    if not isinstance(part, dict):
        return part
    return {_RENAMED_IN_10.get(key, key): value for key, value in part.items()}


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
