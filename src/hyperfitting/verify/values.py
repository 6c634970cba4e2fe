"""Comparing two results value by value: bit-equal, rounding, or different, and where first."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Kind = Literal["bit-equal", "bytes differ, values equal", "rounding", "different"]


@dataclass
class Differences:
    """How two nested values differ.

    Numbers with a fraction may differ by ``rtol`` of the larger one, or by ``atol``, and count as
    rounding then; everything else must be equal.
    """

    rtol: float
    atol: float
    n_values: int = 0
    """Values compared; a file that is equal as a whole counts as one."""
    n_differing: int = 0
    max_abs: float = 0.0
    max_rel: float = 0.0
    first: str = ""
    """Place of the first value that is not bit-equal, with both values."""
    first_different: str = ""
    """Place of the first that differs by more than rounding, with both values."""

    differing_file: str = ""
    """First file whose bytes differ; its values may be equal, such as 0.0 and -0.0."""

    @property
    def kind(self) -> Kind:
        """The worst of all values."""
        if self.first:
            return "different" if self.first_different else "rounding"
        return "bytes differ, values equal" if self.differing_file else "bit-equal"

    @property
    def place(self) -> str:
        """The first value that is not bit-equal, else the first file that is not."""
        return self.first or (f"{self.differing_file}: {self.kind}" if self.differing_file else "")

    def __str__(self) -> str:
        if self.kind == "bit-equal":
            return f"{self.n_values:,} values, bit-equal"
        if not self.first:
            return f"{self.n_values:,} values; first in {self.differing_file}"
        size = f"max. difference {self.max_abs:.3g}, relative {self.max_rel:.3g}" * (
            self.max_abs > 0
        )
        where = f"first at {self.first_different or self.first}"
        parts = [f"{self.n_differing:,} of {self.n_values:,} values differ", size, where]
        return "; ".join(filter(None, parts))

    def compare(self, old: Any, new: Any, at: str = "") -> "Differences":
        """Compare two values: numbers, texts, arrays, or nested lists and dicts of them."""
        if isinstance(old, np.ndarray) and isinstance(new, np.ndarray):
            self._compare_arrays(old, new, at)
        elif isinstance(old, Mapping) and isinstance(new, Mapping):
            for key in (*old, *(k for k in new if k not in old)):
                place = f"{at}.{key}" if at else str(key)
                if key in old and key in new:
                    self.compare(old[key], new[key], place)
                else:
                    self._add_different(place, "is there" if key in old else "is missing")
        elif _is_list(old) and _is_list(new):
            for i, (old_item, new_item) in enumerate(zip(old, new, strict=False)):
                self.compare(old_item, new_item, f"{at}[{i}]")
            if len(old) != len(new):
                self._add_different(at, f"{len(old)} values instead of {len(new)}")
        else:
            self._compare_scalars(old, new, at)
        return self

    def _compare_scalars(self, old: Any, new: Any, at: str) -> None:
        self.n_values += 1
        if type(old) is type(new) and (old == new or _both_nan(old, new)):
            return
        if _is_number(old) and _is_number(new):
            if float(old) == float(new):
                return
            if isinstance(old, float) or isinstance(new, float):
                self._add_floats(at, float(old), float(new), 1)
                return
        self.n_values -= 1
        self._add_different(at, f"{_short(old)} instead of {_short(new)}")

    def _compare_arrays(self, old: Any, new: Any, at: str) -> None:
        if old.shape != new.shape or old.dtype != new.dtype:
            shapes = f"{old.dtype} {old.shape} instead of {new.dtype} {new.shape}"
            self._add_different(at, shapes)
            return
        self.n_values += old.size
        same = old == new
        if old.dtype.kind == "f":
            same |= np.isnan(old) & np.isnan(new)
        if same.all():
            return
        places = np.argwhere(~same)
        first = tuple(int(i) for i in places[0])
        place = f"{at}{list(first)}"
        if old.dtype.kind != "f":
            self.n_values -= 1
            self._add_different(place, f"{old[first]} instead of {new[first]}")
            self.n_differing += len(places) - 1
            return
        old, new = old.astype(np.float64), new.astype(np.float64)
        self._add_floats(place, float(old[first]), float(new[first]), len(places))
        with np.errstate(invalid="ignore"):
            gap = np.abs(old - new)[~same]
            larger = np.maximum(np.abs(old), np.abs(new))[~same]
        gap = np.where(np.isnan(gap), np.inf, gap)
        self.max_abs = max(self.max_abs, float(gap.max()))
        self.max_rel = max(self.max_rel, float((gap / np.maximum(larger, 1e-300)).max()))
        beyond = np.flatnonzero(gap > self.atol + self.rtol * larger)
        if len(beyond) and not self.first_different:
            worst = tuple(int(i) for i in places[beyond[0]])
            self.first_different = (
                f"{at}{list(worst)}: {old[worst]:.9g} instead of {new[worst]:.9g}"
            )

    def _add_floats(self, at: str, old: float, new: float, count: int) -> None:
        self.n_differing += count
        gap, larger = abs(old - new), max(abs(old), abs(new))
        gap = gap if math.isfinite(gap) else math.inf
        self.max_abs = max(self.max_abs, gap)
        self.max_rel = max(self.max_rel, gap / max(larger, 1e-300))
        text = f"{at}: {old!r} instead of {new!r}"
        self.first = self.first or text
        if not gap <= self.atol + self.rtol * larger:
            self.first_different = self.first_different or text

    def _add_different(self, at: str, what: str) -> None:
        self.n_values += 1
        self.n_differing += 1
        text = f"{at}: {what}" if at else what
        self.first = self.first or text
        self.first_different = self.first_different or text


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _both_nan(old: Any, new: Any) -> bool:
    return isinstance(old, float) and math.isnan(old) and math.isnan(new)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}…"
