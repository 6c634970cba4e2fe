"""Agreement of annotators: Krippendorff's alpha and Fleiss' kappa, nominal, with intervals.

Both are sums over items, so that a bootstrap over items is one matrix product. Units of the input
are counts (I, K): how many annotators put item i into category k.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hyperfitting.metrics.estimate import Estimate
from hyperfitting.preference.bootstrap import TAILS, cluster_weights

Floats = NDArray[np.float64]
Coefficient = Callable[[Floats, Floats], Floats]
"""From counts (I, K) and weights of the items (B, I) to values (B,), NaN where undefined."""


def counts(items: Sequence[str], categories: Sequence[str]) -> Floats:
    """Return how often each item was put into each category: (I, K).

    Args:
        items: the item of each judgment.
        categories: the category of each judgment.
    """
    _, rows = np.unique(items, return_inverse=True)
    _, columns = np.unique(categories, return_inverse=True)
    table = np.zeros((int(rows.max(initial=-1)) + 1, int(columns.max(initial=-1)) + 1))
    np.add.at(table, (rows, columns), 1)
    return table


def krippendorff_alpha(table: Floats, weights: Floats) -> Floats:
    """Return alpha = 1 - D_observed / D_expected (Krippendorff, 2011).

    Items with one judgment do not count. NaN if all judgments are the same.

    Args:
        table: (I, K) counts.
        weights: (B, I) of the items.
    """
    table, weights = _with_pairs(table, weights)
    m = table.sum(axis=1)
    disagreement = (m**2 - (table**2).sum(axis=1)) / (m - 1)
    n = weights @ m
    totals = weights @ table  # (B, K)
    with np.errstate(invalid="ignore", divide="ignore"):
        expected = (n**2 - (totals**2).sum(axis=1)) / (n - 1)
        return np.asarray(np.where(expected > 0, 1 - weights @ disagreement / expected, np.nan))


def fleiss_kappa(table: Floats, weights: Floats) -> Floats:
    """Return kappa = (P - P_e) / (1 - P_e) (Fleiss, 1971); arguments as of `krippendorff_alpha`.

    It needs the same number of judgments of every item: items with another number than the most
    frequent one do not count.
    """
    table, weights = _with_pairs(table, weights)
    sizes = table.sum(axis=1)
    if len(sizes):
        numbers, frequencies = np.unique(sizes, return_counts=True)
        same = sizes == numbers[frequencies.argmax()]
        table, weights, sizes = table[same], weights[:, same], sizes[same]
    agreeing = ((table**2).sum(axis=1) - sizes) / (sizes * (sizes - 1))
    with np.errstate(invalid="ignore", divide="ignore"):
        observed = weights @ agreeing / weights.sum(axis=1)
        shares = weights @ table / (weights @ sizes)[:, None]
        expected = (shares**2).sum(axis=1)
        return np.asarray(np.where(expected < 1, (observed - expected) / (1 - expected), np.nan))


def _with_pairs(table: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """Return the items with two judgments or more."""
    paired = table.sum(axis=1) >= 2
    return table[paired], weights[:, paired]


def agreement(
    coefficient: Coefficient, table: ArrayLike, resamples: int, seed: int
) -> Estimate | None:
    """Return a coefficient with its 95% percentile interval over items; None: undefined.

    The bootstrap resamples items, not annotators: two copies of one annotator would agree.

    Args:
        coefficient: `krippendorff_alpha` or `fleiss_kappa`.
        table: (I, K) counts.
        resamples: of the items.
        seed: of the resampling.
    """
    table = np.asarray(table, dtype=np.float64)
    n = int((table.sum(axis=1) >= 2).sum()) if table.size else 0
    if n == 0:
        return None
    items = np.arange(len(table), dtype=np.intp)
    value = float(coefficient(table, np.ones((1, len(table))))[0])
    if not np.isfinite(value):
        return None
    weights = cluster_weights(items, resamples, np.random.default_rng(seed))
    replicates = coefficient(table, weights)
    replicates = replicates[np.isfinite(replicates)]
    if n == 1 or len(replicates) < resamples / 2:
        return Estimate(value, None, n)
    low, high = np.quantile(replicates, TAILS)
    return Estimate(value, (float(low), float(high)), n)
