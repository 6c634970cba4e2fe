"""Reading and writing files and folders: atomically, validated, on network file systems.

Nothing is ever half-written, and what cannot be read or written is an error that names it.
"""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from hyperfitting.errors import UserError, exhausted_resource

if TYPE_CHECKING:
    from pydantic import ValidationError

T = TypeVar("T")


class OtherVersionError(UserError):
    """A file was written by another version of this software."""


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
def replacing(path: Path, fsync: bool = True) -> Iterator[Path]:
    """Yield a temporary path that replaces ``path`` atomically on success.

    The file is written beside its destination, fsynced and renamed; on an error nothing is left.
    Several processes may write the same file at once: the last rename wins.

    Args:
        path: to replace.
        fsync: False: do not wait for the disk. A crash of the machine, not of the process, may
            leave an empty file.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield temporary
        if fsync:
            fsync_path(temporary)
        temporary.rename(path)
        if fsync:
            fsync_path(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str, fsync: bool = True) -> None:
    """Write a UTF-8 text file atomically; ``fsync`` as of `replacing`.

    A lone surrogate, as in the name of a file that is not UTF-8, becomes its escape ``\\udce9``; in
    JSON that reads as the same again.
    """
    with replacing(path, fsync) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, value: Any, fsync: bool = True) -> None:
    """Write readable JSON atomically; ``fsync`` as of `replacing`.

    Raises:
        ValueError: a number is NaN or infinite, which JSON cannot represent.
    """
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n", fsync)


def read_versioned(
    path: Path,
    kind: type[T],
    key: str,
    version: int,
    *,
    field: str,
    value: Any,
    hint: str,
    upgrade: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> T:
    """Return the content of a JSON file, validated.

    Args:
        path: of the file.
        kind: its fields, as a pydantic model or a dataclass.
        key: field that holds the version of its format.
        version: the version that can be read.
        field: for the message: what the user names the file by.
        value: for the message: the field's value.
        hint: for the message: how to get a readable one.
        upgrade: returns the content of an earlier version as this one has it, and of any other
            version as it is.

    Raises:
        OtherVersionError: it is of another version.
        UserError: it cannot be read, or a field is invalid; the message names it.
    """
    from pydantic import ValidationError  # not at every start: that takes 0.1 s

    try:
        values = json.loads(
            path.read_text("utf-8"), parse_constant=_finite_float, parse_float=_finite_float
        )
    except (OSError, ValueError, RecursionError) as error:
        if exhausted_resource(error):
            raise
        raise UserError(
            f"{path.name} cannot be read: {error}", field=field, value=value, hint=hint
        ) from error
    if upgrade is not None and isinstance(values, dict):
        values = upgrade(values)
    written = values.get(key) if isinstance(values, dict) else None
    if written != version:
        raise OtherVersionError(
            f"{path.name} is of another version of this software ({key} {written})",
            field=field,
            value=value,
            valid=f"{key} {version}",
            hint=hint,
        )
    try:
        validated: T = _adapter(cast(Any, kind)).validate_python(values)
    except (ValidationError, RecursionError) as error:
        problem = first_problem(error) if isinstance(error, ValidationError) else "nested too deep"
        raise UserError(
            f"{path.name} is not valid: {problem}", field=field, value=value, hint=hint
        ) from error
    return validated


@cache
def _adapter(kind: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def first_problem(error: "ValidationError") -> str:
    """Return the first field that is invalid, and why."""
    first = error.errors(include_url=False, include_context=False)[0]
    where = ".".join(map(str, first["loc"]))
    message = first["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message


def _finite_float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not a finite number")
    return number


def make_folder(folder: Path, field: str, hint: str) -> None:
    """Create a folder and those that it is in, unless they exist.

    Raises:
        UserError: it cannot be created or is no folder; the message names the config ``field``.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if exhausted_resource(error):
            raise
        raise folder_error(folder, error, field, hint) from error


def folder_error(folder: Path, error: OSError, field: str, hint: str) -> UserError:
    """Return the error of a folder that cannot be created or written to."""
    problem = f"cannot be written to: {error.strerror or error}"
    with suppress(OSError):  # such as a name that is too long
        obstacle = next(p for p in (folder, *folder.parents) if os.path.lexists(p))
        if obstacle.is_symlink() and not obstacle.exists():
            problem = f"{obstacle} is a link to nothing"
        elif not obstacle.is_dir():
            problem = f"{obstacle} is not a folder"
    return UserError(problem, field=field, value=folder, valid="a writable folder", hint=hint)


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with its content, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
