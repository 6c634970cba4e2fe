"""A mean over texts with its interval: one class from metric to table. Imports nothing heavy."""

from dataclasses import dataclass, field, replace
from typing import Self


@dataclass(frozen=True)
class Estimate:
    """A mean over texts."""

    mean: float = field(metadata={"description": "the mean"})
    ci95: tuple[float, float] | None = field(
        metadata={
            "description": "95% interval; null for a single text or a metric of the whole set"
        }
    )
    n: int = field(metadata={"description": "texts that have a value"})

    def scaled(self, factor: float) -> Self:
        """Return it times a positive number."""
        ci95 = self.ci95 and (self.ci95[0] * factor, self.ci95[1] * factor)
        return replace(self, mean=self.mean * factor, ci95=ci95)

    def clipped(self, low: float, high: float) -> Self:
        """Return it with an interval of possible values only."""
        ci95 = self.ci95 and (max(self.ci95[0], low), min(self.ci95[1], high))
        return replace(self, ci95=ci95)


@dataclass(frozen=True)
class Difference(Estimate):
    """A mean difference of two models on the same texts."""

    p: float | None = field(
        metadata={
            "description": "two-sided p-value of a paired permutation test; null for a single text"
        }
    )
