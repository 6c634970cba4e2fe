"""Accuracies: exact intervals of one, and the exact McNemar test of two on the same questions."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike

from hyperfitting.metrics.estimate import Estimate


@dataclass(frozen=True)
class McNemar:
    """Questions that only one of two models answers correctly."""

    only_tuned: int = field(metadata={"description": "questions only the tuned model answers"})
    only_base: int = field(metadata={"description": "questions only the base model answers"})
    p: float = field(
        metadata={"description": "two-sided p-value of the exact McNemar test (binomial)"}
    )


def accuracy(correct: ArrayLike) -> Estimate:
    """Return an accuracy with its exact 95% interval (Clopper and Pearson, 1934).

    Args:
        correct: (N,) 0 or 1.
    """
    from scipy import stats  # takes a second to import

    values = np.asarray(correct, dtype=np.float64)
    successes, n = round(float(values.sum())), len(values)
    interval = stats.binomtest(successes, n).proportion_ci(0.95, method="exact")
    return Estimate(successes / n, (float(interval.low), float(interval.high)), n)


def mcnemar(tuned: ArrayLike, base: ArrayLike) -> McNemar:
    """Return McNemar's exact test of two models on the same questions.

    Args:
        tuned: (N,) 0 or 1, whether the tuned model is right.
        base: (N,) of the base model.
    """
    from scipy import stats

    x, y = np.asarray(tuned) > 0, np.asarray(base) > 0
    only_tuned, only_base = int((x & ~y).sum()), int((~x & y).sum())
    n = only_tuned + only_base
    p = float(stats.binomtest(only_tuned, n).pvalue) if n else 1.0
    return McNemar(only_tuned, only_base, p)
