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
from dataclasses import dataclass, replace
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
    freedom: float
    """Degrees of freedom of Student's t."""
    n_seeds: int
    n_texts: int
    """Texts whose variation is in ``variance``; 0: only that of seeds is."""

    @cached_property
    def _t(self) -> Any:
        from scipy import stats  # takes a second to import

        return stats.t(self.freedom, self.mean, np.sqrt(self.variance))

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
        texts: (S,) x (N,) values of the same N texts whose means the numbers are; where one is
            missing, or values are, the texts are left out (of the interval). Empty, or None for a
            seed: the interval is over seeds alone.
    """
    n_seeds = len(numbers)
    by_seed = _Part(float(np.var(numbers, ddof=1)) / n_seeds, n_seeds - 1)
    values = _complete(texts, n_seeds)
    if values is None:
        return MeanOverSeeds(float(numbers.mean()), by_seed.variance, by_seed.freedom, n_seeds, 0)
    n_texts = values.shape[1]
    residuals = values - values.mean(axis=0) - values.mean(axis=1, keepdims=True) + values.mean()
    by_text = _Part(float(np.var(values.mean(axis=0), ddof=1)) / n_texts, n_texts - 1)
    n_free = (n_seeds - 1) * (n_texts - 1)
    residual = _Part(float((residuals**2).sum()) / n_free / values.size, n_free)
    variance = by_seed.variance + by_text.variance - residual.variance
    noise = by_seed.noise + by_text.noise + residual.noise
    # an estimated component below 0 is one of 0
    if variance < max(by_seed.variance, by_text.variance):
        largest = max(by_seed, by_text, key=lambda part: part.variance)
        variance, noise = largest.variance, largest.noise
    mean = float(numbers.mean())
    return _wider(
        MeanOverSeeds(mean, variance, variance**2 / noise, n_seeds, n_texts),
        MeanOverSeeds(mean, by_seed.variance, by_seed.freedom, n_seeds, n_texts),
    )


def mean_of_intervals(numbers: Floats, estimates: Sequence[Estimate]) -> MeanOverSeeds:
    """Return the mean over seeds of which the values of the texts are not kept.

    To the variance between seeds it adds the mean squared standard error over texts of one seed,
    which the intervals give: at least the variance that the texts add (it includes the residual).

    Args:
        numbers: (S,) one of each seed; not all equal.
        estimates: their intervals over the same texts; where one is missing, the interval is over
            seeds alone.
    """
    over_seeds = mean_over_seeds(numbers)
    errors = [standard_error(e.ci95) for e in estimates if e.ci95 is not None]
    n_texts = min((e.n for e in estimates), default=0)
    if len(errors) < len(numbers) or n_texts < 2:
        return over_seeds
    by_seed = _Part(over_seeds.variance, over_seeds.freedom)
    by_text = _Part(float(np.mean(np.square(errors))), n_texts - 1)
    variance = by_seed.variance + by_text.variance
    freedom = variance**2 / (by_seed.noise + by_text.noise)
    return _wider(
        MeanOverSeeds(over_seeds.mean, variance, freedom, over_seeds.n_seeds, n_texts),
        replace(over_seeds, n_texts=n_texts),
    )


def _wider(*means: MeanOverSeeds) -> MeanOverSeeds:
    return max(means, key=lambda mean: mean.half_width)


def standard_error(interval: tuple[float, float]) -> float:
    """Return the standard error of a mean whose 95% interval is normal."""
    from scipy import stats

    return (interval[1] - interval[0]) / 2 / float(stats.norm.ppf((1 + _LEVEL) / 2))


@dataclass(frozen=True)
class _Part:
    """A mean square divided by the number of values, and its degrees of freedom."""

    variance: float
    freedom: float

    @property
    def noise(self) -> float:
        """Its term in Satterthwaite's denominator."""
        return self.variance**2 / self.freedom


def _complete(texts: Sequence[Floats | None], n_seeds: int) -> Floats | None:
    """Return the values of the texts that have one with every seed, (S, N); none: too few."""
    kept = [values for values in texts if values is not None]
    if len(kept) < n_seeds or len({values.shape for values in kept}) > 1:
        return None
    values = np.stack(kept)
    values = values[:, ~np.isnan(values).any(axis=0)]
    return values if values.shape[1] > 1 else None
