"""Errors that only the user can fix: a mistake (``UserError``), or a resource that is used up."""

import difflib
import errno
from collections.abc import Iterable, Iterator
from typing import Any, Literal

Resource = Literal["memory", "threads", "files", "disk"]
_EXHAUSTED: dict[Resource, tuple[frozenset[int], tuple[str, ...]]] = {
    "disk": (
        frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG}),
        ("No space left on device", "Disk quota exceeded"),
    ),
    "memory": (
        frozenset({errno.ENOMEM}),
        ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED"),
    ),
    "threads": (
        frozenset({errno.EAGAIN}),
        ("can't start new thread", "Resource temporarily unavailable"),
    ),
    "files": (frozenset({errno.EMFILE, errno.ENFILE}), ("Too many open files",)),
}
"""By resource: the errno of an `OSError`, and what other errors say (torch's, Rust libraries')."""


class UserError(Exception):
    """A mistake in the config, the data or the machine's setup.

    ``str(error)`` names the field and its value, what would be valid, and what to try. Characters
    that are not printable, such as those in the name of a file, are written as escapes.
    """

    def __init__(
        self, problem: str, *, field: str = "", value: Any = None, valid: str = "", hint: str = ""
    ) -> None:
        self.problem, self.field, self.value = escape(problem), escape(field), value
        self.valid, self.hint = escape(valid), escape(hint)
        shown = escape(str(value)).replace("\n", "\\n")
        lines = [f"{self.field}={shown}: {self.problem}" if field else self.problem]
        if valid:
            lines.append(f"  valid: {self.valid}")
        if hint:
            lines.append(f"  try:   {self.hint}")
        super().__init__("\n".join(lines))

    def for_run(self, name: str) -> "UserError":
        """Return the error with the name of the run it occurred in."""
        return self._with(problem=f"{self.problem} (run {name})")

    def renamed(self, old: str, new: str) -> "UserError":
        """Return the error with the config path ``old`` replaced by ``new``.

        For a dataclass that is used at several places of the config: ``dataset.`` becomes
        ``evaluation.datasets.NAME.``.
        """
        return self._with(
            field=self.field.replace(old, new),
            valid=self.valid.replace(old, new),
            hint=self.hint.replace(old, new),
        )

    def _with(self, **changes: str) -> "UserError":
        kept = {"field": self.field, "value": self.value, "valid": self.valid, "hint": self.hint}
        return UserError(**{"problem": self.problem, **kept, **changes})


def no_such(
    kind: str, field: str, name: str, options: Iterable[object], value: str | None = None
) -> UserError:
    """Return the error of a name that is not among the options.

    Args:
        kind: what it is the name of, such as `field`.
        field: where it stands.
        name: is compared with the options for near matches.
        options: those that exist.
        value: shown for the field; none: the name.
    """
    names = [str(option) for option in options]
    return UserError(
        f"no such {kind}",
        field=field,
        value=name if value is None else value,
        valid=", ".join(names),
        hint=near_matches(name, names),
    )


def near_matches(word: str, options: Iterable[str]) -> str:
    """Return "did you mean …?" with the options closest to ``word``, or "" if none is close."""
    close = difflib.get_close_matches(word, list(options), n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else ""


def escape(text: str) -> str:
    """Return a text with escapes for what is not printable, such as ``\\x1b``; newlines stay."""
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )


def exhausted_resource(error: BaseException) -> Resource | None:
    """Return which resource was used up if that caused an error, also behind other exceptions."""
    for cause in _chain(error):
        if isinstance(cause, UserError):
            continue  # a message for the user; its cause is checked next
        if isinstance(cause, MemoryError):
            return "memory"
        for resource, (numbers, phrases) in _EXHAUSTED.items():
            if isinstance(cause, OSError) and cause.errno in numbers:
                return resource
            if any(phrase in str(cause) for phrase in phrases):
                return resource
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, and those that it was raised from."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
