"""A criterion tested on the records: the number, its interval, and the p-value of the claim.

The unit is the seed where there are three or more (Student's t over seeds, paired by seed), else
the text (bootstrap and sign flips, paired by text; exact binomial for shares of texts; of a rank
correlation the share of resamples). The p-value is of the hypothesis that the number lies outside
the claimed region: one-sided, and of a region with two ends the larger of both.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import Field
from scipy.stats import binomtest, norm
from scipy.stats import t as student_t

from hyperfitting.metrics.estimate import Estimate
from hyperfitting.metrics.uncertainty import (
    Floats,
    bootstrap_mean,
    paired_difference,
    rank_correlation,
)
from hyperfitting.reporting.cells import over_runs
from hyperfitting.reporting.claims.quantities import (
    Measurement,
    NotMeasuredError,
    measure,
)
from hyperfitting.reporting.claims.schema import Criterion
from hyperfitting.reporting.sweep_records import RunEntry
from hyperfitting.runtime.strict_model import StrictModel

RESAMPLES = 10_000
MIN_SEEDS = 3
_Z95 = float(norm.ppf(0.975))

RunsBySeed = Mapping[int, Sequence[RunEntry]]


class Evidence(StrictModel):
    """What the records say of a criterion."""

    criterion: Criterion = Field(description="the number, and where it lies if the claim holds")
    label: str = Field(description="what the number is called")
    model: str | None = Field(description="label of the model; null: the sweep has one model only")
    value: float = Field(description="mean over seeds")
    minus: float | None = Field(description="the number that is compared with it")
    estimate: float = Field(description="the number that is judged: `value`, less `minus`")
    ci95: tuple[float, float] | None = Field(description="its 95% interval; null: none")
    holds: bool = Field(
        description="whether the estimate lies in the region; any seed's if one observation decides"
    )
    p: float | None = Field(
        description="of the hypothesis that it lies outside; null: not tested, a single number"
    )
    observed_in: int | None = Field(
        default=None,
        description="seeds whose number lies in the region; null: one observation does not decide",
    )
    unit: str = Field(description="what the interval is over: `seeds`, `texts`, or empty")
    n: int = Field(description="of these")
    seeds: list[int] = Field(description="of the runs")
    runs: list[str] = Field(description="their folders, as `SWEEP/RUN`")
    kept: bool = Field(
        default=False, description="of the earlier ledger: its runs were not among the sweeps given"
    )

    @property
    def is_untested(self) -> bool:
        """Whether it has no p-value although one observation does not decide."""
        return self.p is None and not self.criterion.observed

    @property
    def reaches_region(self) -> bool:
        """Whether a part of the interval lies in the region."""
        return self.ci95 is not None and self.criterion.overlaps(*self.ci95)

    @property
    def contradicts(self) -> bool:
        """Whether the number lies outside the region with its whole interval.

        That something occurs is contradicted where it was not observed.
        """
        if self.holds or self.criterion.observed:
            return not self.holds
        return self.ci95 is not None and not self.reaches_region


@dataclass(frozen=True)
class _Tested:
    estimate: Estimate
    unit: str
    p_above: float | None
    """p-value of the hypothesis that the number is at most `above`; none: no such end or test."""
    p_below: float | None


def judge(
    criterion: Criterion, runs: RunsBySeed, others: RunsBySeed | None, model: str | None = None
) -> Evidence:
    """Return what finished runs say of a criterion.

    Args:
        criterion: the number and the claimed region.
        runs: of the number, by seed.
        others: of what is subtracted; none: nothing is.
        model: label of the model.

    Raises:
        NotMeasuredError: the runs do not have the number, or no seed is in both.
    """
    seeds = sorted(runs if others is None else set(runs) & set(others))
    if not seeds:
        raise NotMeasuredError("what it is compared with has not been run")
    values = [measure(runs[seed], criterion.value) for seed in seeds]
    subtracted: list[Measurement] = []
    if criterion.minus is not None and others is not None:
        quantity = criterion.value.changed(criterion.minus)
        subtracted = [measure(others[seed], quantity) for seed in seeds]
    numbers = _numbers(values, subtracted)
    tested = _test(numbers, values, subtracted, criterion)
    observed_in = None
    if criterion.observed:
        observed_in = sum(criterion.holds(float(number)) for number in numbers)
    p_values = [p for p in (tested.p_above, tested.p_below) if p is not None]
    entries = [run for seed in seeds for run in [*runs[seed], *(others or {}).get(seed, ())]]
    return Evidence(
        criterion=criterion,
        label=criterion.label,
        model=model,
        value=_mean(values),
        minus=_mean(subtracted) if subtracted else None,
        estimate=tested.estimate.mean,
        ci95=tested.estimate.ci95,
        holds=bool(observed_in) if criterion.observed else criterion.holds(tested.estimate.mean),
        p=max(p_values) if p_values and not criterion.observed else None,
        observed_in=observed_in,
        unit=tested.unit,
        n=tested.estimate.n,
        seeds=seeds,
        runs=list(dict.fromkeys(f"{run.folder.parent.name}/{run.name}" for run in entries)),
    )


def _mean(measurements: Sequence[Measurement]) -> float:
    return float(np.mean([measurement.number for measurement in measurements]))


def _numbers(values: Sequence[Measurement], subtracted: Sequence[Measurement]) -> Floats:
    """Return the number of each seed, or its difference, (S,)."""
    numbers = np.array([value.number for value in values])
    return numbers - np.array([other.number for other in subtracted]) if subtracted else numbers


def _test(
    numbers: Floats,
    values: Sequence[Measurement],
    subtracted: Sequence[Measurement],
    criterion: Criterion,
) -> _Tested:
    """Return the estimate and its p-values; ``numbers`` (S,) are those of `_numbers`."""
    if len(numbers) >= MIN_SEEDS and np.ptp(numbers) > 0:  # else the seed changes nothing
        return _over_seeds(numbers, criterion)
    x, y = _texts(values), _texts(subtracted)
    same_texts = len({m.contexts for m in (*values, *subtracted)}) == 1
    if same_texts and x is not None and (y is not None or not subtracted):
        settings = values[0].settings
        return (
            _test_rank_correlation(settings, x, criterion)
            if settings
            else _over_texts(x, y, criterion)
        )
    intervals = [m.ci95 for m in (*values, *subtracted) if m.ci95 is not None]
    if len(values) == 1 and len(intervals) == len(values) + len(subtracted):
        return _from_intervals(float(numbers[0]), intervals, len(values[0].contexts), criterion)
    return _Tested(Estimate(float(numbers.mean()), None, len(numbers)), "", None, None)


def _texts(measurements: Sequence[Measurement]) -> Floats | None:
    """Return the values of each text, means over seeds; none: they are not kept."""
    texts = [m.texts for m in measurements if m.texts is not None]
    if not texts or len(texts) < len(measurements) or len({t.shape for t in texts}) > 1:
        return None
    if len({m.settings for m in measurements}) > 1:
        return None
    return np.asarray(np.mean(texts, axis=0))


def _over_seeds(numbers: Floats, criterion: Criterion) -> _Tested:
    estimate = over_runs([Estimate(float(number), None, 1) for number in numbers])
    standard_error = float(numbers.std(ddof=1)) / len(numbers) ** 0.5

    def p(bound: float | None, sign: int) -> float | None:
        if bound is None:
            return None
        t = sign * (estimate.mean - bound) / standard_error
        return float(student_t.sf(t, len(numbers) - 1))

    return _Tested(estimate, "seeds", p(criterion.above, 1), p(criterion.below, -1))


def _over_texts(x: Floats, y: Floats | None, criterion: Criterion) -> _Tested:
    if y is None and np.isin(x[~np.isnan(x)], (0, 1)).all():
        return _share_of_texts(x[~np.isnan(x)], criterion)
    estimate = bootstrap_mean(x if y is None else x - y, RESAMPLES)
    if estimate is None:
        raise NotMeasuredError("no text has both values")
    subtracted = np.zeros_like(x) if y is None else y

    def p(bound: float | None, sign: int) -> float | None:
        difference = None if bound is None else paired_difference(x, subtracted + bound, RESAMPLES)
        if difference is None or difference.p is None:
            return None
        half = difference.p / 2
        return half if sign * difference.mean > 0 else 1 - half

    return _Tested(estimate, "texts", p(criterion.above, 1), p(criterion.below, -1))


def _test_rank_correlation(
    settings: Sequence[float], values: Floats, criterion: Criterion
) -> _Tested:
    """Test a rank correlation; ``values`` are (K, N), of K settings."""
    correlation = rank_correlation(settings, values, RESAMPLES)
    if correlation is None:
        raise NotMeasuredError("too few different values")
    above, below = criterion.above, criterion.below
    return _Tested(
        correlation.estimate,
        "texts",
        None if above is None else correlation.p_above(above),
        None if below is None else correlation.p_below(below),
    )


def _share_of_texts(x: Floats, criterion: Criterion) -> _Tested:
    """Test a share of texts: sign flips need differences that are symmetric, which 0 and 1 with a
    share near 0 are not."""
    count, n = int(x.sum()), len(x)
    low, high = binomtest(count, n).proportion_ci(0.95, "exact")
    above, below = criterion.above, criterion.below
    return _Tested(
        Estimate(count / n, (float(low), float(high)), n),
        "texts",
        None if above is None else float(binomtest(count, n, above, "greater").pvalue),
        None if below is None else float(binomtest(count, n, below, "less").pvalue),
    )


def _from_intervals(
    number: float, intervals: Sequence[tuple[float, float]], n: int, criterion: Criterion
) -> _Tested:
    """Test a mean, or a difference of two, of which only the intervals over texts are kept.

    Normal distributions of their widths, independent: a difference on the same texts is mostly more
    certain than that.
    """
    widths = [(high - low) / (2 * _Z95) for low, high in intervals]
    standard_error = float(np.linalg.norm(widths))

    def p(bound: float | None, sign: int) -> float | None:
        if bound is None or standard_error == 0:
            return None
        return float(norm.sf(sign * (number - bound) / standard_error))

    half = _Z95 * standard_error
    ci95 = intervals[0] if len(intervals) == 1 else (number - half, number + half)
    return _Tested(
        Estimate(number, ci95, n), "texts", p(criterion.above, 1), p(criterion.below, -1)
    )
