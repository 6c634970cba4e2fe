"""Means over several trainings (seeds) that were evaluated on the same texts.

Seeds and texts are crossed random effects: the mean of the next study varies with both. With the
mean squares of the two-way analysis of variance without replication (S seeds, N texts; Searle,
Casella and McCulloch, Variance Components, 1992) the variance of the mean is

    V = (MS_seeds + MS_texts - MS_residual) / (S N),

with Satterthwaite's degrees of freedom. An interval over seeds alone has MS_seeds / (S N): it
leaves out which texts were drawn. With three seeds that vary much, though, Satterthwaite's interval
covers 92% instead of 95% (simulated): the wider of both is taken. Which is wider depends on the
level, since fewer degrees of freedom have the heavier tail: a p-value is the larger of both.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hyperfitting.metrics.estimate import Estimate
from hyperfitting.metrics.uncertainty import Floats

_LEVEL = 0.95


@dataclass(frozen=True)
class VarianceOfMean:
    """An estimated variance of the mean, of which Student's t has ``dof`` degrees of freedom."""

    value: float
    dof: float

    def half_width(self, level: float) -> float:
        """Return half of the interval at a level, such as 0.95."""
        from scipy import special  # takes a while to import

        return float(special.stdtrit(self.dof, (1 + level) / 2) * np.sqrt(self.value))

    def p_above(self, distance: float) -> float:
        """Return the one-sided p-value of a mean that is ``distance`` above a bound."""
        from scipy import special

        return float(special.stdtr(self.dof, -distance / np.sqrt(self.value)))


@dataclass(frozen=True)
class MeanOverSeeds:
    """A mean over seeds, with what its interval and its p-values are computed from."""

    mean: float
    variances: tuple[VarianceOfMean, ...]
    """Over seeds alone, and over seeds and texts if these are known."""
    n_seeds: int
    n_texts: int
    """Texts whose variation was considered; 0: only that of the seeds."""

    @property
    def half_width(self) -> float:
        """Half of the 95% interval: the widest of those of the variances."""
        return max(variance.half_width(_LEVEL) for variance in self.variances)

    @property
    def estimate(self) -> Estimate:
        """The mean with its 95% interval; ``n`` is the number of seeds."""
        half = self.half_width
        return Estimate(self.mean, (self.mean - half, self.mean + half), self.n_seeds)

    def p_above(self, bound: float) -> float:
        """Return the one-sided p-value of the hypothesis that it is at most ``bound``.

        It is the largest of those of the variances.
        """
        return max(variance.p_above(self.mean - bound) for variance in self.variances)

    def p_below(self, bound: float) -> float:
        """Return the one-sided p-value of the hypothesis that it is at least ``bound``."""
        return max(variance.p_above(bound - self.mean) for variance in self.variances)


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
        return _mean(numbers, 0, seeds)
    residuals = values - values.mean(axis=0) - values.mean(axis=1, keepdims=True) + values.mean()
    dof = (values.shape[0] - 1) * (values.shape[1] - 1)
    residual = VarianceOfMean(float((residuals**2).sum()) / dof / values.size, dof)
    by_text = _of_means(values.mean(axis=0))
    # where an estimated variance component is negative it is taken as 0
    larger = max(seeds, by_text, key=lambda part: part.value)
    both = _satterthwaite(seeds, by_text, residual)
    return _mean(numbers, values.shape[1], seeds, both if both.value >= larger.value else larger)


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
        return _mean(numbers, 0, seeds)
    by_text = VarianceOfMean(float(np.mean(np.square(errors))), n_texts - 1)
    return _mean(numbers, n_texts, seeds, _satterthwaite(seeds, by_text))


def _of_means(means: Floats) -> VarianceOfMean:
    """Return the variance of the mean of independent values."""
    return VarianceOfMean(float(np.var(means, ddof=1)) / len(means), len(means) - 1)


def _satterthwaite(
    first: VarianceOfMean, second: VarianceOfMean, subtracted: VarianceOfMean | None = None
) -> VarianceOfMean:
    """Return the sum of two variances, less another, with Satterthwaite's degrees of freedom."""
    value = first.value + second.value - (subtracted.value if subtracted else 0.0)
    parts = [part for part in (first, second, subtracted) if part is not None]
    return VarianceOfMean(value, value**2 / sum(part.value**2 / part.dof for part in parts))


def _mean(numbers: Floats, n_texts: int, *variances: VarianceOfMean) -> MeanOverSeeds:
    return MeanOverSeeds(float(numbers.mean()), variances, len(numbers), n_texts)


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
