"""A mean over texts with its interval: one class from metric to table. Imports nothing heavy."""

from dataclasses import dataclass, field


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


@dataclass(frozen=True)
class Difference(Estimate):
    """A mean difference of two models on the same texts."""

    p: float | None = field(
        metadata={
            "description": "two-sided p-value of a paired permutation test; null for a single text"
        }
    )
