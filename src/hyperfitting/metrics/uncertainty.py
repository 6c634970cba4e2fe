"""Means over texts with their 95% intervals, and differences of two models on the same texts."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Transform = Callable[[Floats], Floats]
_CHUNK = 1 << 22  # numbers resampled at once, so that memory stays small
_EXACT = 12  # with so few texts all 2^n sign flips are tried


@dataclass(frozen=True)
class Estimate:
    """A mean over texts. ``ci95`` is none where one text, or no spread to see, leaves it open."""

    mean: float
    ci95: tuple[float, float] | None
    n: int


@dataclass(frozen=True)
class Difference(Estimate):
    """A mean difference over texts. ``p`` is two-sided; none where one text leaves it open."""

    p: float | None


def bootstrap_mean(
    values: ArrayLike,
    resamples: int,
    seed: int = 0,
    transform: Transform | None = None,
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
    x: Floats = np.asarray(values, dtype=np.float64)
    x = x[~np.isnan(x)]
    if len(x) == 0:
        return None
    apply = transform or _same
    mean = float(apply(np.array(x.mean())))
    if len(x) == 1:
        return Estimate(mean, None, 1)
    means = np.concatenate(
        [x[chosen].mean(axis=1) for chosen in _resamples(len(x), resamples, seed)]
    )
    return Estimate(mean, _interval(apply(means)), len(x))


def paired_difference(
    values: ArrayLike,
    baseline: ArrayLike,
    resamples: int,
    seed: int = 0,
    transform: Transform | None = None,
) -> Difference | None:
    """Return the mean of ``values`` less that of ``baseline`` on the same texts.

    The interval is a percentile bootstrap over texts; p is the share of sign flips of the texts'
    differences whose mean is at least as far from 0 (a paired permutation test: all flips for a
    few texts, else ``resamples`` random ones and the observed one).

    Args:
        values: (N,) one value a text.
        baseline: (N,) the same of another model; texts with a NaN in either are left out.
        resamples: bootstrap resamples, and random sign flips.
        seed: of both.
        transform: applied to both means, such as ``np.exp``. p is that of the values themselves.

    Returns:
        None if no text has both values. With one such text interval and p are None. Where all
        differences are 0, the interval is (0, 0) and p is 1.

    Raises:
        ValueError: there are not as many values as baselines.
    """
    x, y = np.asarray(values, dtype=np.float64), np.asarray(baseline, dtype=np.float64)
    if x.shape != y.shape:
        raise ValueError(f"{len(x)} values and {len(y)} baselines are not of the same texts")
    both = ~(np.isnan(x) | np.isnan(y))
    x, y = x[both], y[both]
    if len(x) == 0:
        return None
    apply = transform or _same
    mean = float(apply(np.array(x.mean())) - apply(np.array(y.mean())))
    if len(x) == 1:
        return Difference(mean, None, 1, None)
    means = np.concatenate(
        [
            apply(x[chosen].mean(axis=1)) - apply(y[chosen].mean(axis=1))
            for chosen in _resamples(len(x), resamples, seed)
        ]
    )
    return Difference(mean, _interval(means), len(x), _flip_p(x - y, resamples, seed))


def _flip_p(differences: Floats, resamples: int, seed: int) -> float:
    n = len(differences)
    size = np.abs(differences).sum()
    limit = np.abs(differences.sum()) - 1e-12 * size  # rounding must not hide a tie
    if n <= _EXACT:
        flips = 1 - 2 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)  # (2^n, n)
        return float((np.abs(flips @ differences) >= limit).mean())
    rng = np.random.default_rng(seed)
    further = 0
    for start in range(0, resamples, step := max(1, _CHUNK // n)):
        flips = 1 - 2 * rng.integers(0, 2, (min(step, resamples - start), n))
        further += int((np.abs(flips @ differences) >= limit).sum())
    return (further + 1) / (resamples + 1)


def _resamples(n: int, resamples: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Yield which of n texts are drawn, in blocks (k, n) that make ``resamples`` rows in all."""
    rng = np.random.default_rng(seed)
    for start in range(0, resamples, step := max(1, _CHUNK // n)):
        yield rng.integers(0, n, (min(step, resamples - start), n))


def _interval(means: Floats) -> tuple[float, float]:
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def _same(means: Floats) -> Floats:
    return means
