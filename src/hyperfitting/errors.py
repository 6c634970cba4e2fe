"""The one kind of error that is the user's to mend: shown as a message, without a traceback."""

import difflib
from collections.abc import Iterable
from typing import Any


class UserError(Exception):
    """Something in the config, the data or the machine that only the user can change.

    ``str(error)`` names the field and its value, says what would be valid, and what to try.
    """

    def __init__(
        self, problem: str, *, field: str = "", value: Any = None, valid: str = "", hint: str = ""
    ) -> None:
        self.problem, self.field, self.value, self.valid, self.hint = (
            problem,
            field,
            value,
            valid,
            hint,
        )
        lines = [f"{field}={value}: {problem}" if field else problem]
        if valid:
            lines.append(f"  valid: {valid}")
        if hint:
            lines.append(f"  try:   {hint}")
        super().__init__("\n".join(lines))

    def of(self, whom: str) -> "UserError":
        """Return the same error, said of one of several."""
        return UserError(
            f"{self.problem} ({whom})",
            field=self.field,
            value=self.value,
            valid=self.valid,
            hint=self.hint,
        )

    def moved(self, old: str, new: str) -> "UserError":
        """Return the same error about fields that stand elsewhere in the config."""
        return UserError(
            self.problem,
            field=self.field.replace(old, new),
            value=self.value,
            valid=self.valid.replace(old, new),
            hint=self.hint.replace(old, new),
        )


def near_matches(word: str, options: Iterable[str]) -> str:
    """Return "did you mean …?" with the options closest to ``word``, or "" if none is close."""
    close = difflib.get_close_matches(word, list(options), n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else ""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory ran out, on the CPU or an accelerator."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and any(words in str(error) for words in ("can't allocate memory", "out of memory"))
    )
