"""A criterion tested on the records: the number, its interval, and p-values for and against it.

With three seeds or more that differ, seeds and texts are crossed random effects: `metrics.crossed`.
Else the unit is the text: bootstrap and sign flips, exact binomial for shares of texts, and of a
rank correlation the share of resamples. Differences are paired by seed and text.

There are two hypotheses to reject: that the number lies outside the claimed region (`p`: one-sided,
and of a region with two ends the larger of both, an intersection-union test), and that it lies
inside (`p_against`: one-sided, and of a region with two ends twice the smaller of both).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import Field
from scipy.stats import binomtest, norm

from hyperfitting.metrics.crossed import mean_of_intervals, mean_over_seeds
from hyperfitting.metrics.estimate import Estimate
from hyperfitting.metrics.uncertainty import (
    Floats,
    bootstrap_mean,
    paired_difference,
    rank_correlation,
)
from hyperfitting.reporting.claims.quantities import (
    Measurement,
    NotMeasuredError,
    measure,
    recorded_difference,
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
        description="whether the estimate lies in the region; without a test: that of any seed if "
        "the claim is that something occurs, of every seed if it is that something never does"
    )
    p: float | None = Field(
        description="of the hypothesis that it lies outside; null: not tested, a single number"
    )
    p_against: float | None = Field(
        description="of the hypothesis that it lies in the region; null: not tested"
    )
    observed_in: int | None = Field(
        default=None,
        description="seeds whose number lies in the region; null: the claim is tested",
    )
    unit: str = Field(description="what the interval is over: `seeds`, `texts`, or empty")
    n: int = Field(description="of these")
    n_texts: int = Field(
        default=0,
        description="texts of each seed whose variation an interval over seeds includes; 0: only "
        "that of the seeds",
    )
    seeds: list[int] = Field(description="of the runs")
    runs: list[str] = Field(description="their folders, as `SWEEP/RUN`")
    kept: bool = Field(
        default=False, description="of the earlier ledger: its runs were not among the sweeps given"
    )

    @property
    def has_enough_seeds(self) -> bool:
        """Whether it is of as many trainings as a verdict needs: of an observation, one."""
        return self.criterion.needs_no_test or len(self.seeds) >= MIN_SEEDS

    @property
    def is_untested(self) -> bool:
        """Whether it has no p-value although the claim needs a test."""
        return self.p is None and not self.criterion.needs_no_test

    @property
    def reaches_region(self) -> bool:
        """Whether a part of the interval lies in the region."""
        return self.ci95 is not None and self.criterion.overlaps(*self.ci95)

    @property
    def is_refuted(self) -> bool:
        """Whether observations refute it, without a test.

        That something occurs, where it was not observed; that something never does, where it was.
        """
        return self.criterion.needs_no_test and not self.holds


def _untested(_bound: float) -> None:
    return None


@dataclass(frozen=True)
class _Tested:
    estimate: Estimate
    unit: str = ""
    p_above: Callable[[float], float | None] = _untested
    """One-sided p-value of the hypothesis that the number is at most this; none: not tested."""
    p_below: Callable[[float], float | None] = _untested
    """The same, at least this."""
    n_texts: int = 0
    """Of a test over seeds: texts whose variation is in the interval."""

    def p(self, criterion: Criterion) -> float | None:
        """Return the p-value of the hypothesis that the number lies outside the region."""
        above, below = criterion.above, criterion.below
        ends = [(above, self.p_above), (below, self.p_below)]
        p_values = [p_value(end) for end, p_value in ends if end is not None]
        tested = [p for p in p_values if p is not None]
        return max(tested) if tested and len(tested) == len(p_values) else None

    def p_against(self, criterion: Criterion) -> float | None:
        """Return the p-value of the hypothesis that the number lies in the region.

        Of a region with two ends it is twice the smaller of both (Bonferroni).
        """
        above, below = criterion.above, criterion.below
        p_values = [
            None if above is None else self.p_below(above),
            None if below is None else self.p_above(below),
        ]
        tested = [p for p in p_values if p is not None]
        return min(1.0, len(tested) * min(tested)) if tested else None


def evaluate_criterion(
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
    measured = values
    if criterion.minus is not None and others is not None:
        quantity = criterion.value.changed(criterion.minus)
        subtracted = [measure(others[seed], quantity) for seed in seeds]
        recorded = [
            recorded_difference(runs[seed], criterion.value)
            if criterion.is_tuned_minus_base
            else None
            for seed in seeds
        ]
        measured = [a.minus(b, r) for a, b, r in zip(values, subtracted, recorded, strict=True)]
    tested = _test(measured)
    observed_in = None
    if criterion.needs_no_test:
        observed_in = sum(criterion.holds(measurement.number) for measurement in measured)
    entries = [run for seed in seeds for run in [*runs[seed], *(others or {}).get(seed, ())]]
    return Evidence(
        criterion=criterion,
        label=criterion.label,
        model=model,
        value=_mean(values),
        minus=_mean(subtracted) if subtracted else None,
        estimate=tested.estimate.mean,
        ci95=tested.estimate.ci95,
        holds=_holds(criterion, tested.estimate.mean, observed_in, len(seeds)),
        p=None if criterion.needs_no_test else tested.p(criterion),
        p_against=None if criterion.needs_no_test else tested.p_against(criterion),
        observed_in=observed_in,
        unit=tested.unit,
        n=tested.estimate.n,
        n_texts=tested.n_texts,
        seeds=seeds,
        runs=list(dict.fromkeys(f"{run.folder.parent.name}/{run.name}" for run in entries)),
    )


def _mean(measurements: Sequence[Measurement]) -> float:
    return float(np.mean([measurement.number for measurement in measurements]))


def _holds(criterion: Criterion, estimate: float, observed_in: int | None, n_seeds: int) -> bool:
    if observed_in is None:
        return criterion.holds(estimate)
    return observed_in > 0 if criterion.observed else observed_in == n_seeds


def _test(measured: Sequence[Measurement]) -> _Tested:
    """Return the estimate and its p-values, of the number of each seed."""
    numbers = np.array([measurement.number for measurement in measured])
    if len({measurement.settings for measurement in measured}) > 1:
        raise NotMeasuredError("the seeds were not run with the same settings")
    untested = _Tested(Estimate(float(numbers.mean()), None, len(numbers)))
    if not all(measurement.is_paired for measurement in measured):
        return untested
    if len(numbers) >= MIN_SEEDS and np.ptp(numbers) > 0:  # else the seed changes nothing
        return _over_seeds(numbers, measured)
    texts = _texts(measured)
    if texts is None:
        interval = measured[0].interval if np.ptp(numbers) == 0 else None
        if interval is None or interval.ci95 is None:
            return untested
        return _from_interval(interval.mean, interval.ci95, interval.n)
    if measured[0].settings:
        return _test_rank_correlation(measured[0].settings, texts)
    is_binary = all(measurement.is_binary for measurement in measured)
    return (_share_of_texts if is_binary else _over_texts)(texts)


def _texts(measured: Sequence[Measurement]) -> Floats | None:
    """Return the values of each text, means over seeds; none: they are not kept."""
    texts = [m.texts for m in measured if m.texts is not None]
    if len(texts) < len(measured) or len({m.contexts for m in measured}) > 1:
        return None
    return np.asarray(np.mean(texts, axis=0))


def _over_seeds(numbers: Floats, measured: Sequence[Measurement]) -> _Tested:
    """Test over seeds, and over texts where all seeds have the same ones."""
    mean = mean_over_seeds(numbers)
    if len({measurement.contexts for measurement in measured}) == 1:
        values = [measurement.text_values for measurement in measured]
        intervals = [_interval(measurement) for measurement in measured]
        if all(of_seed is not None for of_seed in values):
            mean = mean_over_seeds(numbers, values)
        elif all(intervals):
            mean = mean_of_intervals(numbers, [e for e in intervals if e is not None])
    is_correlation = bool(measured[0].settings)
    estimate = mean.estimate.clipped(-1, 1) if is_correlation else mean.estimate
    return _Tested(estimate, "seeds", mean.p_above, mean.p_below, mean.n_texts)


def _interval(measurement: Measurement) -> Estimate | None:
    """Return the number of a seed with its interval over texts; none: it has none."""
    if not measurement.settings or measurement.texts is None:
        return measurement.interval
    correlation = rank_correlation(measurement.settings, measurement.texts, RESAMPLES)
    return None if correlation is None else correlation.estimate


def _over_texts(x: Floats) -> _Tested:
    estimate = bootstrap_mean(x, RESAMPLES)
    if estimate is None:
        raise NotMeasuredError("no text has a value")

    def p(bound: float, sign: int) -> float | None:
        difference = paired_difference(x, np.full_like(x, bound), RESAMPLES)
        if difference is None or difference.p is None:
            return None
        half = difference.p / 2
        return half if sign * difference.mean > 0 else 1 - half

    return _Tested(estimate, "texts", lambda bound: p(bound, 1), lambda bound: p(bound, -1))


def _test_rank_correlation(settings: Sequence[float], values: Floats) -> _Tested:
    """Test a rank correlation; ``values`` are (K, N), of K settings."""
    correlation = rank_correlation(settings, values, RESAMPLES)
    if correlation is None:
        raise NotMeasuredError("too few different values")
    return _Tested(correlation.estimate, "texts", correlation.p_above, correlation.p_below)


def _share_of_texts(x: Floats) -> _Tested:
    """Test a share of texts by the exact binomial test.

    Sign flips need differences that are symmetric, which 0 and 1 with a share near 0 are not. Means
    over two seeds may be fractions: they are rounded to the larger p-value.
    """
    x = x[~np.isnan(x)]
    total, n = float(x.sum()), len(x)
    fewest, most = math.floor(total + 1e-9), math.ceil(total - 1e-9)

    def p(count: int, bound: float, alternative: str) -> float:
        return float(binomtest(count, n, min(max(bound, 0.0), 1.0), alternative).pvalue)

    low, _ = binomtest(fewest, n).proportion_ci(0.95, "exact")
    _, high = binomtest(most, n).proportion_ci(0.95, "exact")
    return _Tested(
        Estimate(total / n, (float(low), float(high)), n),
        "texts",
        lambda bound: p(fewest, bound, "greater"),
        lambda bound: p(most, bound, "less"),
    )


def _from_interval(number: float, ci95: tuple[float, float], n: int) -> _Tested:
    """Test a number of which only the interval over ``n`` texts is kept.

    With the normal distribution that has the half of the interval on the side of the bound.
    """

    def p(bound: float, sign: int) -> float | None:
        half = number - ci95[0] if bound < number else ci95[1] - number
        return None if half <= 0 else float(norm.sf(sign * (number - bound) / (half / _Z95)))

    estimate = Estimate(number, ci95, n)
    return _Tested(estimate, "texts", lambda bound: p(bound, 1), lambda bound: p(bound, -1))
