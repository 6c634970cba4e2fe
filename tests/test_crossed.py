"""Means over seeds and texts, against the analysis of variance by least squares and simulations."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import optimize, stats

from hyperfitting.metrics.crossed import MeanOverSeeds, mean_of_intervals, mean_over_seeds
from hyperfitting.metrics.estimate import Estimate

ROUNDING = 1e-9


def crossed(values: np.ndarray) -> MeanOverSeeds:
    return mean_over_seeds(values.mean(axis=1), list(values))


def simulated(
    rng: np.random.Generator, shape: tuple[int, int], seeds: float, texts: float
) -> np.ndarray:
    """Return values (S, N) of mean 0 with these standard deviations, and residuals of 1."""
    n_seeds, n_texts = shape
    return (
        seeds * rng.standard_normal((n_seeds, 1))
        + texts * rng.standard_normal((1, n_texts))
        + rng.standard_normal(shape)
    )


def mean_squares(values: np.ndarray) -> tuple[float, float, float]:
    """Return the mean squares of seeds, texts and residuals by sequential least squares."""
    n_seeds, n_texts = values.shape
    y = values.ravel()
    ones = np.ones((y.size, 1))
    seeds = np.repeat(np.eye(n_seeds), n_texts, axis=0)
    texts = np.tile(np.eye(n_texts), (n_seeds, 1))

    def sum_of_squares(*columns: np.ndarray) -> float:
        design = np.hstack(columns)
        return float(((y - design @ np.linalg.lstsq(design, y)[0]) ** 2).sum())

    total, without, both = (
        sum_of_squares(ones), sum_of_squares(ones, seeds), sum_of_squares(ones, seeds, texts),
    )  # fmt: skip
    freedom = n_seeds - 1, n_texts - 1, (n_seeds - 1) * (n_texts - 1)
    return (total - without) / freedom[0], (without - both) / freedom[1], both / freedom[2]


@pytest.mark.parametrize("shape", [(3, 9), (3, 40), (5, 7)])
def test_the_variance_is_that_of_the_analysis_of_variance(shape: tuple[int, int]) -> None:
    values = simulated(np.random.default_rng(0), shape, 1.0, 12.0)
    parts = np.array(mean_squares(values)) / values.size
    assert parts[2] < min(parts[:2])
    mean = crossed(values)
    over_seeds, both = mean.variances
    assert (over_seeds.value, over_seeds.dof) == pytest.approx((parts[0], shape[0] - 1))
    assert both.value == pytest.approx(parts[0] + parts[1] - parts[2])
    freedom = np.array([shape[0] - 1, shape[1] - 1, (shape[0] - 1) * (shape[1] - 1)])
    assert both.dof == pytest.approx(both.value**2 / (parts**2 / freedom).sum())
    assert (mean.n_seeds, mean.n_texts) == shape
    half = stats.t.ppf(0.975, both.dof) * both.value**0.5
    assert mean.estimate.ci95 == pytest.approx((values.mean() - half, values.mean() + half))


@pytest.mark.parametrize(("seeds", "texts"), [(1.0, 3.0), (0.0, 3.0), (1.0, 0.0), (0.2, 1.0)])
def test_the_interval_has_the_mean_of_other_seeds_and_texts_in_it(
    seeds: float, texts: float
) -> None:
    """In 95% of simulations; over seeds alone in fewer, where texts differ."""
    rng = np.random.default_rng(1)
    studies = [simulated(rng, (4, 30), seeds, texts) for _ in range(1000)]
    intervals = [crossed(values).estimate.ci95 or (0, 0) for values in studies]
    over_seeds = [mean_over_seeds(v.mean(axis=1)).estimate.ci95 or (0, 0) for v in studies]

    def coverage(intervals: list[tuple[float, float]]) -> float:
        return float(np.mean([low < 0 < high for low, high in intervals]))

    assert coverage(intervals) > 0.94
    if seeds:
        assert coverage(intervals) < 0.985
    if texts > 1:
        assert coverage(over_seeds) < coverage(intervals) - 0.03


def test_satterthwaites_interval_alone_is_too_narrow_with_three_seeds_that_vary_much() -> None:
    """Why the wider of two intervals is taken: it covers some 92%, over seeds alone 95%."""
    rng = np.random.default_rng(0)
    studies = np.stack([simulated(rng, (3, 24), 1.0, 1.0) for _ in range(2000)])
    by_seed = studies.mean(axis=2).var(axis=1, ddof=1) / 3
    by_text = studies.mean(axis=1).var(axis=1, ddof=1) / 24
    centered = studies - studies.mean(axis=2, keepdims=True)
    residual = (centered - centered.mean(axis=1, keepdims=True)).var(axis=(1, 2)) / (2 * 23)
    variance = np.maximum(by_seed + by_text - residual, np.maximum(by_seed, by_text))
    dof = variance**2 / (by_seed**2 / 2 + by_text**2 / 23 + residual**2 / 46)
    alone = stats.t.ppf(0.975, np.maximum(dof, 2)) * variance**0.5
    wider = np.array([crossed(values).half_width for values in studies])
    coverage = [(abs(studies.mean(axis=(1, 2))) < half).mean() for half in (alone, wider)]
    assert 0.9 < coverage[0] < 0.935 < coverage[1] < 0.965


@pytest.mark.parametrize("n_seeds", [3, 5])
@pytest.mark.parametrize(("seeds", "texts"), [(1.0, 0.0), (1.0, 1.0), (1.0, 3.0), (0.3, 1.0)])
def test_a_p_value_of_a_thousandth_is_as_rare_as_that(
    n_seeds: int, seeds: float, texts: float
) -> None:
    """Also in the tail, where the variance with fewer degrees of freedom gives the larger p-value.

    The mean is independent of the mean squares, so the probability of a rejection is the mean over
    simulations of the normal probability beyond the distance that has this p-value.
    """
    alpha, shape = 0.001, (n_seeds, 24)
    rng = np.random.default_rng(5)
    error = (seeds**2 / n_seeds + texts**2 / shape[1] + 1 / (n_seeds * shape[1])) ** 0.5

    def excess(distance: float, mean: MeanOverSeeds) -> float:
        return float(np.log(mean.p_above(mean.mean - distance) / alpha))

    studies = [crossed(simulated(rng, shape, seeds, texts)) for _ in range(4000)]
    widest = [30 * mean.half_width for mean in studies]
    distances = [
        optimize.brentq(excess, 0, w, (mean,), rtol=1e-3)
        for w, mean in zip(widest, studies, strict=True)
    ]
    assert stats.norm.sf(np.array(distances) / error).mean() < 1.2 * alpha


@given(
    arrays(np.float64, st.tuples(st.integers(2, 5), st.integers(2, 8)), elements=st.floats(-5, 5))
)
def test_it_is_at_least_as_wide_as_over_seeds_and_over_texts(values: np.ndarray) -> None:
    numbers = values.mean(axis=1)
    if np.ptp(numbers) < ROUNDING:
        return
    mean = crossed(values)
    texts = values.mean(axis=0)
    assert mean.half_width >= mean_over_seeds(numbers).half_width - ROUNDING
    assert mean.half_width >= stats.norm.ppf(0.975) * stats.sem(texts) - ROUNDING
    low, high = mean.estimate.ci95 or (0, 0)
    assert mean.p_above(low) == pytest.approx(0.025)
    assert mean.p_below(high) == pytest.approx(0.025)
    assert mean.p_above(mean.mean) == pytest.approx(0.5)


def test_one_text_that_differs_in_one_seed_does_not_narrow_the_interval() -> None:
    texts = np.random.default_rng(2).uniform(0, 0.4, 72)
    values = np.stack([texts, texts, texts])
    values[0, 0] += 0.01
    low, high = crossed(values).estimate.ci95 or (0, 0)
    over_texts = stats.sem(texts) * stats.t.ppf(0.975, 71) * 2
    assert high - low == pytest.approx(over_texts, rel=0.02)
    alone = mean_over_seeds(values.mean(axis=1)).estimate.ci95 or (0, 0)
    assert alone[1] - alone[0] < 0.1 * over_texts


def test_texts_without_a_value_in_some_seed_are_left_out_of_the_interval() -> None:
    values = simulated(np.random.default_rng(3), (3, 12), 1.0, 1.0)
    with_gap = np.hstack([values, [[np.nan], [1.0], [2.0]]])
    expected = crossed(values)
    mean = mean_over_seeds(np.nanmean(with_gap, axis=1), list(with_gap))
    assert mean.n_texts == 12
    assert mean.mean == pytest.approx(np.nanmean(with_gap, axis=1).mean())
    assert mean.half_width >= stats.norm.ppf(0.975) * stats.sem(values.mean(axis=0))
    assert expected.n_texts == 12


def test_without_values_of_texts_the_interval_is_over_seeds() -> None:
    numbers = np.array([1.0, 2.0, 4.0])
    expected = stats.ttest_1samp(numbers, 0).confidence_interval(0.95)
    for texts in ((), (None, None, None), (np.ones(3), None, np.ones(3))):
        mean = mean_over_seeds(numbers, texts)
        assert mean.estimate.ci95 == pytest.approx(tuple(expected))
        assert mean.n_texts == 0
    one_sided = stats.ttest_1samp(numbers, 1, alternative="greater").pvalue
    assert mean_over_seeds(numbers).p_above(1) == pytest.approx(one_sided)


def test_intervals_of_seeds_are_added_to_the_variance_between_them() -> None:
    """Which is no less than the variance that values of the texts would give."""
    values = simulated(np.random.default_rng(4), (4, 50), 0.5, 2.0)
    numbers = values.mean(axis=1)
    errors = values.std(axis=1, ddof=1) / 50**0.5
    z = stats.norm.ppf(0.975)
    estimates = [
        Estimate(float(m), (float(m - z * e), float(m + z * e)), 50)
        for m, e in zip(numbers, errors, strict=True)
    ]
    mean = mean_of_intervals(numbers, estimates)
    by_seed, by_text = numbers.var(ddof=1) / 4, (errors**2).mean()
    _, both = mean.variances
    assert both.value == pytest.approx(by_seed + by_text)
    noise = by_seed**2 / 3 + by_text**2 / 49
    assert both.dof == pytest.approx((by_seed + by_text) ** 2 / noise)
    assert crossed(values).half_width <= mean.half_width
    assert mean.n_texts == 50
    open_one = [*estimates[:3], Estimate(0.0, None, 50)]
    assert mean_of_intervals(numbers, open_one) == mean_over_seeds(numbers)
