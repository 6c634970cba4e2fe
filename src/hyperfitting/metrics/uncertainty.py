"""Means over texts with their 95% intervals."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

_CHUNK = 1 << 22  # numbers resampled at once, so that memory stays small


@dataclass(frozen=True)
class Estimate:
    """A mean over texts. ``ci95`` is none where one text, or no spread to see, leaves it open."""

    mean: float
    ci95: tuple[float, float] | None
    n: int


def bootstrap_mean(
    values: ArrayLike,
    resamples: int,
    seed: int = 0,
    transform: Callable[[NDArray[np.float64]], NDArray[np.float64]] | None = None,
) -> Estimate | None:
    """Return the mean over texts with its 95% percentile bootstrap interval.

    Texts whose value is NaN (such as the TTR of an empty continuation) are left out of the mean
    and of ``n``.

    Args:
        values: (N,) one value a text.
        resamples: bootstrap resamples.
        seed: of the resampling; the same seed resamples the same texts for every metric, so the
            intervals of two models on the same texts compare.
        transform: applied to the mean and to each resampled mean, such as ``np.exp`` to go from
            loss to perplexity.

    Returns:
        None if there is no value at all. With one value the interval is None: a spread cannot be
        estimated.
    """
    x: NDArray[np.float64] = np.asarray(values, dtype=np.float64)
    x = x[~np.isnan(x)]
    n = len(x)
    if n == 0:
        return None
    apply = transform or (lambda means: means)
    mean = float(apply(np.array(x.mean())))
    if n == 1:
        return Estimate(mean, None, 1)
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    step = max(1, _CHUNK // n)
    for start in range(0, resamples, step):
        stop = min(start + step, resamples)
        means[start:stop] = x[rng.integers(0, n, (stop - start, n))].mean(axis=1)
    low, high = np.quantile(apply(means), [0.025, 0.975])
    return Estimate(mean, (float(low), float(high)), n)
