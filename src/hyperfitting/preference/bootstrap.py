"""95% intervals when judgments share items and annotators: a two-way cluster bootstrap.

The pigeonhole bootstrap (Owen 2007, Annals of Applied Statistics 1) resamples items and annotators
independently: a judgment's weight is the product of both. It counts the noise of single judgments
three times, which makes intervals too wide where that noise dominates, as with three votes an item.
Its distribution is therefore rescaled to the two-way cluster-robust variance of Cameron, Gelbach
and Miller (2011, Journal of Business & Economic Statistics 29),

    V = V_items + V_annotators - V_judgments,

each by a one-way bootstrap, with Student's t for few clusters (Satterthwaite's degrees of freedom).
"""

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Codes = NDArray[np.intp]
Statistic = Callable[[Floats], Floats]
"""From weights of the judgments (B, N) to statistics (B, S)."""
Interval = tuple[float, float] | None
TAILS = (0.025, 0.975)
_CHUNK = 1 << 22  # weights at once, to bound the memory
_MAX_UNDEFINED = 0.05
"""Share of resamples without a value above which there is no interval."""


def cluster_weights(codes: Codes, resamples: int, rng: np.random.Generator) -> Floats:
    """Return how often each observation (N,) is drawn when whole clusters are: (B, N)."""
    n = int(codes.max()) + 1
    drawn = rng.integers(n, size=(resamples, n)) + n * np.arange(resamples)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=resamples * n).reshape(resamples, n)
    return counts[:, codes].astype(np.float64)


def two_way_intervals(
    statistic: Statistic, items: Codes, annotators: Codes, resamples: int, seed: int
) -> list[Interval]:
    """Return the intervals of statistics of judgments.

    With a single annotator the clusters are the items alone.

    Args:
        statistic: of weighted judgments; NaN where it is undefined.
        items: (N,) cluster of each judgment, 0 to the number of items - 1.
        annotators: (N,) likewise.
        resamples: of each bootstrap.
        seed: of the resampling.

    Returns:
        One for each statistic; None with a single item, or where resamples are often undefined.
    """
    rng = np.random.default_rng(seed)
    if len(items) == 0:
        return []
    estimates = statistic(np.ones((1, len(items))))[0]  # (S,)
    if items.max() == 0:
        return [None] * len(estimates)
    clusters = [items] if annotators.max() == 0 else [items, annotators]
    both = np.concatenate(list(_replicates(statistic, clusters, resamples, rng)))  # (B, S)
    if len(clusters) == 1:
        scale = np.ones(len(estimates))
    else:
        judgments = np.arange(len(items), dtype=np.intp)
        variances = [
            _variance(statistic, codes, resamples, rng) for codes in (items, annotators, judgments)
        ]
        sizes = [int(codes.max()) + 1 for codes in clusters]
        scale = _scale(variances, sizes, both)
    return [_interval(*column) for column in zip(estimates, both.T, scale, strict=True)]


def _replicates(
    statistic: Statistic, clusters: list[Codes], resamples: int, rng: np.random.Generator
) -> Iterator[Floats]:
    step = max(1, _CHUNK // len(clusters[0]))
    for start in range(0, resamples, step):
        n = min(step, resamples - start)
        weights = cluster_weights(clusters[0], n, rng)
        for codes in clusters[1:]:
            weights *= cluster_weights(codes, n, rng)
        with np.errstate(invalid="ignore", divide="ignore"):
            yield statistic(weights)


def _variance(
    statistic: Statistic, codes: Codes, resamples: int, rng: np.random.Generator
) -> Floats:
    """Return the variance by a one-way bootstrap, unbiased for few clusters: (S,)."""
    replicates = np.concatenate(list(_replicates(statistic, [codes], resamples, rng)))
    n = int(codes.max()) + 1
    return np.asarray(_finite_variance(replicates) * n / (n - 1))


def _finite_variance(replicates: Floats) -> Floats:
    values = np.ma.masked_invalid(replicates)
    return np.asarray(values.var(axis=0, ddof=1).filled(0))


def _scale(variances: list[Floats], sizes: list[int], pigeonhole: Floats) -> Floats:
    """Return by how much the pigeonhole distribution is stretched about the estimates: (S,)."""
    from scipy import stats

    by_item, by_annotator, by_judgment = variances
    variance = np.maximum(by_item + by_annotator - by_judgment, by_judgment)
    noise = by_item**2 / (sizes[0] - 1) + by_annotator**2 / (sizes[1] - 1)
    of_pigeonhole = _finite_variance(pigeonhole)
    with np.errstate(invalid="ignore", divide="ignore"):
        freedom = np.maximum(np.nan_to_num(variance**2 / noise, nan=1.0), 1.0)
        ratio = np.nan_to_num(np.sqrt(variance / of_pigeonhole), nan=1.0, posinf=1.0)
    return np.asarray(ratio * stats.t.ppf(TAILS[1], freedom) / stats.norm.ppf(TAILS[1]))


def _interval(estimate: float, replicates: Floats, scale: float) -> Interval:
    values = replicates[np.isfinite(replicates)]
    if not np.isfinite(estimate) or len(values) < (1 - _MAX_UNDEFINED) * len(replicates):
        return None
    low, high = estimate + scale * (np.quantile(values, TAILS) - estimate)
    return float(low), float(high)
