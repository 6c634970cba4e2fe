"""Means over several trainings (seeds) that were evaluated on the same texts.

Seeds and texts are crossed random effects: the mean of the next study varies with both. With the
mean squares of the two-way analysis of variance without replication (S seeds, N texts; Searle,
Casella and McCulloch, Variance Components, 1992) the variance of the mean is

    V = (MS_seeds + MS_texts - MS_residual) / (S N),

with Satterthwaite's degrees of freedom. An interval over seeds alone has MS_seeds / (S N): it
leaves out which texts were drawn. With three seeds that vary much, though, Satterthwaite's interval
covers 92% instead of 95% (simulated): the wider of both is taken.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from hyperfitting.metrics.estimate import Estimate
from hyperfitting.metrics.uncertainty import Floats

_LEVEL = 0.95


@dataclass(frozen=True)
class MeanOverSeeds:
    """A mean over seeds, with what its interval and its p-values are computed from."""

    mean: float
    variance: float
    """Squared standard error of the mean."""
    dof: float
    """Degrees of freedom of Student's t."""
    n_seeds: int
    n_texts: int
    """Texts whose variation was considered; 0: only that of the seeds."""

    @cached_property
    def _t(self) -> Any:
        from scipy import stats  # takes a second to import

        return stats.t(self.dof, self.mean, np.sqrt(self.variance))

    @property
    def half_width(self) -> float:
        """Half of the 95% interval."""
        return float(self._t.interval(_LEVEL)[1]) - self.mean

    @property
    def estimate(self) -> Estimate:
        """The mean with its 95% interval; ``n`` is the number of seeds."""
        half = self.half_width
        return Estimate(self.mean, (self.mean - half, self.mean + half), self.n_seeds)

    def p_above(self, bound: float) -> float:
        """Return the one-sided p-value of the hypothesis that it is at most ``bound``."""
        return float(self._t.cdf(bound))

    def p_below(self, bound: float) -> float:
        """Return the one-sided p-value of the hypothesis that it is at least ``bound``."""
        return float(self._t.sf(bound))


def mean_over_seeds(numbers: Floats, texts: Sequence[Floats | None] = ()) -> MeanOverSeeds:
    """Return the mean of the numbers of two or more seeds, which must not all be equal.

    Args:
        numbers: (S,) one of each seed.
        texts: (S,) x (N,) values of the same N texts whose means the numbers are; texts without a
            value in some seed are left out of the interval. Empty, or None for a seed: the interval
            is over seeds alone.
    """
    seeds = _of_means(numbers)
    values = _complete(texts, len(numbers))
    if values is None:
        return _wider(numbers, 0, [seeds])
    residuals = values - values.mean(axis=0) - values.mean(axis=1, keepdims=True) + values.mean()
    dof = (values.shape[0] - 1) * (values.shape[1] - 1)
    residual = _Variance(float((residuals**2).sum()) / dof / values.size, dof)
    by_text = _of_means(values.mean(axis=0))
    # where an estimated variance component is negative it is taken as 0
    larger = max(seeds, by_text, key=lambda part: part.value)
    both = _satterthwaite(seeds, by_text, residual)
    return _wider(numbers, values.shape[1], [seeds, both if both.value >= larger.value else larger])


def mean_of_intervals(numbers: Floats, estimates: Sequence[Estimate]) -> MeanOverSeeds:
    """Return the mean over seeds of which the values of the texts are not kept.

    The variance over seeds is increased by the mean squared standard error over texts of one seed,
    from the intervals: no less than what the texts add, since it includes the residual.

    Args:
        numbers: (S,) one of each seed; not all equal.
        estimates: their intervals over the same texts; where one is missing, the interval is over
            seeds alone.
    """
    seeds = _of_means(numbers)
    errors = [_standard_error(e.ci95) for e in estimates if e.ci95 is not None]
    n_texts = min(e.n for e in estimates)
    if len(errors) < len(numbers) or n_texts < 2:
        return _wider(numbers, 0, [seeds])
    by_text = _Variance(float(np.mean(np.square(errors))), n_texts - 1)
    return _wider(numbers, n_texts, [seeds, _satterthwaite(seeds, by_text)])


@dataclass(frozen=True)
class _Variance:
    """An estimated variance of the mean."""

    value: float
    dof: float


def _of_means(means: Floats) -> _Variance:
    """Return the variance of the mean of independent values."""
    return _Variance(float(np.var(means, ddof=1)) / len(means), len(means) - 1)


def _satterthwaite(
    first: _Variance, second: _Variance, subtracted: _Variance | None = None
) -> _Variance:
    """Return the sum of two variances, less another, with Satterthwaite's degrees of freedom."""
    value = first.value + second.value - (subtracted.value if subtracted else 0.0)
    parts = [part for part in (first, second, subtracted) if part is not None]
    return _Variance(value, value**2 / sum(part.value**2 / part.dof for part in parts))


def _wider(numbers: Floats, n_texts: int, variances: Sequence[_Variance]) -> MeanOverSeeds:
    """Return the mean of the numbers with the variance that gives the widest interval."""
    means = [
        MeanOverSeeds(float(numbers.mean()), v.value, v.dof, len(numbers), n_texts)
        for v in variances
    ]
    return max(means, key=lambda mean: mean.half_width)


def _standard_error(interval: tuple[float, float]) -> float:
    """Return the standard error of a mean whose 95% interval is normal."""
    from scipy import stats

    return (interval[1] - interval[0]) / 2 / float(stats.norm.ppf((1 + _LEVEL) / 2))


def _complete(texts: Sequence[Floats | None], n_seeds: int) -> Floats | None:
    """Return the values of the texts that have one with every seed, (S, N); none: too few."""
    kept = [values for values in texts if values is not None]
    if len(kept) < n_seeds or len({values.shape for values in kept}) > 1:
        return None
    values = np.stack(kept)
    values = values[:, ~np.isnan(values).any(axis=0)]
    return values if values.shape[1] > 1 else None
