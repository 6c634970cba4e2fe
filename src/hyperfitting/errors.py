"""``UserError``: the errors that only the user can fix, shown as a message without a traceback."""

import difflib
from collections.abc import Iterable
from typing import Any


class UserError(Exception):
    """A mistake in the config, the data or the machine's setup.

    ``str(error)`` names the field and its value, what would be valid, and what to try.
    """

    def __init__(
        self, problem: str, *, field: str = "", value: Any = None, valid: str = "", hint: str = ""
    ) -> None:
        self.problem, self.field, self.value = problem, field, value
        self.valid, self.hint = valid, hint
        lines = [f"{field}={value}: {problem}" if field else problem]
        if valid:
            lines.append(f"  valid: {valid}")
        if hint:
            lines.append(f"  try:   {hint}")
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
