"""Statistics of preference against published examples, other libraries and brute force."""

from itertools import combinations

import evalica
import numpy as np
import pandas as pd
import pytest
import scipy.optimize
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from statsmodels.stats.inter_rater import fleiss_kappa as statsmodels_kappa

from hyperfitting.preference.agreement import agreement, counts, fleiss_kappa, krippendorff_alpha
from hyperfitting.preference.annotators import summarize_annotators
from hyperfitting.preference.bootstrap import cluster_weights, two_way_intervals
from hyperfitting.preference.comparisons import Resampling, share_estimates
from hyperfitting.preference.correlation import spearman, weighted_spearman
from hyperfitting.preference.items import Choice
from hyperfitting.preference.plan import (
    Effect,
    Variation,
    annotators_needed,
    items_needed,
    observed_variation,
)
from hyperfitting.preference.ranking import Comparisons
from tests.preference import always_left, careful, judge_all, study

# Krippendorff (2011), "Computing Krippendorff's Alpha-Reliability", C: 4 observers, 12 units
KRIPPENDORFF = """
1 2 3 3 2 1 4 1 2 . . .
1 2 3 3 2 2 4 1 2 5 . 3
. 3 3 3 2 3 4 2 2 5 1 .
1 2 3 3 2 4 4 1 2 5 1 .
"""
# Fleiss (1971), as Fleiss' kappa is usually shown: 10 subjects, 14 raters, 5 categories
FLEISS = np.array(
    [
        [0, 0, 0, 0, 14],
        [0, 2, 6, 4, 2],
        [0, 0, 3, 5, 6],
        [0, 3, 9, 2, 0],
        [2, 2, 8, 1, 1],
        [7, 7, 0, 0, 0],
        [3, 2, 6, 3, 0],
        [2, 5, 3, 2, 2],
        [6, 5, 2, 1, 0],
        [0, 2, 2, 3, 7],
    ],
    dtype=float,
)


def once(table: np.ndarray) -> np.ndarray:
    return np.ones((1, len(table)))


def test_alpha_and_kappa_of_published_examples() -> None:
    answers = [
        (f"unit{unit:02}", value)
        for row in KRIPPENDORFF.strip().splitlines()
        for unit, value in enumerate(row.split())
        if value != "."
    ]
    table = counts(*zip(*answers, strict=True))
    assert krippendorff_alpha(table, once(table))[0] == pytest.approx(0.743, abs=5e-4)
    assert fleiss_kappa(FLEISS, once(FLEISS))[0] == pytest.approx(0.210, abs=5e-4)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 5), st.integers(2, 12))
def test_agreement_is_that_of_evalica_and_statsmodels(seed: int, raters: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    answers = rng.integers(0, 3, (raters, n))
    table = np.stack([(answers == category).sum(axis=0) for category in range(3)], axis=1)
    table = table[:, table.sum(axis=0) > 0].astype(float)
    if table.shape[1] == 1:
        assert np.isnan(krippendorff_alpha(table, once(table))[0])
        return
    kappa = fleiss_kappa(table, once(table))[0]
    assert kappa == pytest.approx(statsmodels_kappa(table, method="fleiss"))
    frame = pd.DataFrame(answers.astype(float))
    frame.iloc[0, 0] = np.nan
    table[0] = [(answers[1:, 0] == category).sum() for category in np.unique(answers)]
    alpha = krippendorff_alpha(table, once(table))[0]
    if np.isfinite(alpha):
        assert alpha == pytest.approx(evalica.alpha(frame, solver="naive").alpha)


def test_weighted_items_count_as_repeated_ones() -> None:
    weights = np.array([[0, 2, 1, 1, 0, 3, 1, 1, 0, 1.0]])
    repeated = np.repeat(FLEISS, weights[0].astype(int), axis=0)
    for coefficient in (krippendorff_alpha, fleiss_kappa):
        assert coefficient(FLEISS, weights) == pytest.approx(coefficient(repeated, once(repeated)))


def test_agreement_of_few_or_equal_judgments_is_undefined() -> None:
    assert agreement(krippendorff_alpha, np.eye(3), 100, 0) is None
    assert agreement(fleiss_kappa, np.full((4, 1), 3.0), 100, 0) is None


def davidson_likelihood(parameters: np.ndarray, pairs: np.ndarray, outcomes: np.ndarray) -> float:
    """Return the negative log-likelihood; parameters: log strengths but the first, then log v."""
    logs = np.concatenate([[0.0], parameters[:-1]])
    first, second = logs[pairs[:, 0]], logs[pairs[:, 1]]
    tie = np.log(2) + parameters[-1] + (first + second) / 2
    scores = np.stack([first, second, tie], axis=1)
    chosen = scores[np.arange(len(scores)), outcomes]
    return float(-(chosen - np.logaddexp.reduce(scores, axis=1)).sum())


def test_strengths_maximize_the_likelihood_of_bradley_terry_with_ties() -> None:
    rng = np.random.default_rng(0)
    pairs = np.array([rng.permutation(4)[:2] for _ in range(200)])
    outcomes = rng.choice(3, 200, p=[0.5, 0.3, 0.2])
    names: tuple[Choice, ...] = ("first", "second", "equal")
    fitted = Comparisons(
        [("abcd"[a], "abcd"[b]) for a, b in pairs], [names[outcome] for outcome in outcomes]
    )
    logs, v = fitted.fit(fitted.totals())
    best = scipy.optimize.minimize(davidson_likelihood, np.zeros(4), (pairs, outcomes), tol=1e-10).x
    expected = np.concatenate([[0.0], best[:-1]])
    assert logs == pytest.approx(expected - expected.mean(), abs=1e-3)
    assert v == pytest.approx(np.exp(best[-1]), abs=1e-3)


def test_strengths_are_undefined_where_a_system_never_won() -> None:
    fitted = Comparisons([("a", "b"), ("b", "c"), ("c", "a")], ["first", "first", "second"])
    assert np.isnan(fitted.fit(fitted.totals())[0]).all()
    tied = Comparisons([("a", "b"), ("b", "c"), ("c", "a")], ["first", "first", "equal"])
    assert np.isfinite(tied.fit(tied.totals())[0]).all()


def share(values: np.ndarray):
    return lambda weights: weights @ values[:, None] / weights.sum(axis=1, keepdims=True)


def test_weights_draw_whole_clusters() -> None:
    codes = np.array([0, 0, 1, 2, 2, 2])
    weights = cluster_weights(codes, 50, np.random.default_rng(0))
    _, first = np.unique(codes, return_index=True)
    assert (weights == weights[:, first][:, codes]).all()
    assert (weights[:, first].sum(axis=1) == 3).all()


def test_an_interval_by_items_is_that_of_a_brute_force_bootstrap() -> None:
    rng = np.random.default_rng(0)
    items = np.sort(rng.integers(0, 15, 60))
    _, items = np.unique(items, return_inverse=True)
    values = (rng.random(60) < 0.4).astype(float)
    groups = [values[items == item] for item in range(items.max() + 1)]
    means = [
        np.concatenate([groups[i] for i in rng.integers(0, len(groups), len(groups))]).mean()
        for _ in range(4000)
    ]
    (interval,) = two_way_intervals(share(values), items, np.zeros(60, dtype=int), 4000, 1)
    assert interval == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.015)


def cluster_variance(values: np.ndarray, codes: np.ndarray) -> float:
    """Return the cluster-robust variance of a mean, with the factor for few clusters."""
    n = codes.max() + 1
    sums = [(values - values.mean())[codes == code].sum() for code in range(n)]
    return float(np.square(sums).sum() / len(values) ** 2 * n / (n - 1))


def test_a_two_way_interval_has_the_width_of_the_two_way_robust_variance() -> None:
    rng = np.random.default_rng(1)
    items, annotators = np.repeat(np.arange(100), 3), np.tile(np.arange(20), 15)
    values = (rng.random(300) + 0.3 * rng.random(100)[items] < 0.6).astype(float)
    by_item, by_annotator, by_judgment = (
        cluster_variance(values, codes) for codes in (items, annotators, np.arange(300))
    )
    variance = max(by_item + by_annotator - by_judgment, by_judgment)
    freedom = variance**2 / (by_item**2 / 99 + by_annotator**2 / 19)
    (interval,) = two_way_intervals(share(values), items, annotators, 4000, 0)
    assert interval is not None
    half = scipy.stats.t.ppf(0.975, freedom) * variance**0.5
    assert interval[1] - interval[0] == pytest.approx(2 * half, rel=0.08)


def test_a_share_without_variation_still_has_an_interval() -> None:
    items, annotators = np.repeat(np.arange(10), 2), np.tile(np.arange(2), 10)
    (estimate,) = share_estimates(np.ones((20, 1)), items, annotators, Resampling(200))
    low = scipy.stats.beta.ppf(0.025, 10, 1)  # Clopper and Pearson: 10 of 10
    assert estimate.ci95 == pytest.approx((low, 1.0))


def coverage(items: int, annotators: int, r_item: float, r_annotator: float, studies: int) -> float:
    """Return how often the interval of a share contains the true one, in simulated studies."""
    rng = np.random.default_rng(0)
    truth, votes, hits = 0.4, 3, 0
    limit = scipy.stats.norm.ppf(truth)
    item = np.repeat(np.arange(items), votes)
    for _ in range(studies):
        annotator = np.concatenate([rng.permutation(annotators)[:votes] for _ in range(items)])
        _, annotator = np.unique(annotator, return_inverse=True)
        latent = (
            r_item**0.5 * rng.normal(size=items)[item]
            + r_annotator**0.5 * rng.normal(size=annotators)[annotator]
            + (1 - r_item - r_annotator) ** 0.5 * rng.normal(size=len(item))
        )
        values = (latent < limit).astype(float)[:, None]
        (estimate,) = share_estimates(values, item, annotator, Resampling(1000))
        assert estimate.ci95 is not None
        hits += estimate.ci95[0] <= truth <= estimate.ci95[1]
    return hits / studies


@pytest.mark.slow
@pytest.mark.parametrize(
    ("items", "annotators", "r_item", "r_annotator"),
    [(100, 12, 0.2, 0.05), pytest.param(150, 30, 0.2, 0.05, marks=pytest.mark.exhaustive)],
)
def test_intervals_cover_the_truth_95_times_of_100(
    items: int, annotators: int, r_item: float, r_annotator: float
) -> None:
    assert coverage(items, annotators, r_item, r_annotator, 400) == pytest.approx(0.95, abs=0.02)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(3, 20))
def test_a_weighted_rank_correlation_is_that_of_repeated_values(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, 5, n).astype(float), rng.integers(0, 5, n).astype(float)
    weights = rng.integers(0, 4, (1, n)).astype(float)
    repeats = weights[0].astype(int)
    a, b = np.repeat(x, repeats), np.repeat(y, repeats)
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return
    expected = scipy.stats.spearmanr(a, b).statistic
    assert weighted_spearman(x, y, weights)[0] == pytest.approx(expected)


def test_a_correlation_of_few_or_constant_values_is_none() -> None:
    x = np.arange(12.0)
    assert spearman(x[:9], x[:9], list(range(9)), 50, 0) is None
    assert spearman(x, np.ones(12), list(range(12)), 50, 0) is None
    result = spearman(x, x**3, list(range(12)), 50, 0)
    assert result is not None
    assert result.mean == pytest.approx(1)


def test_a_biased_annotator_is_found_and_a_careful_one_is_not() -> None:
    task = study(("ann", "bob", "cem"), repeats=2)
    judgments = judge_all(task, {"ann": careful, "bob": careful, "cem": always_left}, seconds=20)
    ann, bob, cem = summarize_annotators(task, judgments)
    assert (ann.failed_checks, ann.checks, ann.excluded) == (0, 2, [])
    assert (ann.consistent_repeats, ann.repeats) == (2, 2)
    assert cem.left_share == 1
    assert cem.consistent_repeats == 0  # a repeat has its sides swapped
    normal = [j for j in judgments if (i := task.item(j.item)) and i.kind == "normal"]
    pairs = [
        (a, b)
        for a, b in combinations(normal, 2)
        if a.item == b.item and "cem" in a.annotator + b.annotator
    ]
    assert cem.agreement == pytest.approx(np.mean([a.choice == b.choice for a, b in pairs]))
    assert bob.median_seconds == 20


def test_a_plan_reaches_its_power_in_simulated_studies() -> None:
    effect, variation, votes, annotators = Effect(0.3, 0.5, 0.8), Variation(0.3, 0.02), 3, 10
    items = items_needed(effect, variation, votes, annotators)
    assert items is not None
    rng = np.random.default_rng(0)
    item = np.repeat(np.arange(items), votes)
    judges = (np.arange(items * votes) * 7) % annotators
    differences = []
    for _ in range(1500):
        shares = []
        for p in (effect.low, effect.high):
            spread = (p * (1 - p)) ** 0.5
            chance = p + spread * (
                variation.item**0.5 * rng.choice([-1, 1], items)[item]
                + variation.annotator**0.5 * rng.choice([-1, 1], annotators)[judges]
            )
            shares.append((rng.random(len(item)) < chance).mean())
        differences.append(shares[1] - shares[0])
    z = np.array(differences) / np.std(differences)
    assert (z > 1.96).mean() == pytest.approx(0.8, abs=0.05)


def test_no_number_of_items_replaces_annotators() -> None:
    effect, variation = Effect(0.34, 0.38, 0.8), Variation(0.2, 0.02)
    needed = annotators_needed(effect, variation)
    assert items_needed(effect, variation, 3, needed - 1) is None
    assert items_needed(effect, variation, 3, needed) is not None


def test_correlations_are_recovered_from_judgments() -> None:
    rng = np.random.default_rng(0)
    items, annotators, votes = 3000, 60, 3
    item = np.repeat(np.arange(items), votes)
    system = item % 2
    annotator = np.concatenate([rng.permutation(annotators)[:votes] for _ in range(items)])
    chance = 0.4 + 0.49 * (
        0.2**0.5 * rng.choice([-1, 1], items)[item]
        + 0.05**0.5 * rng.choice([-1, 1], (annotators, 2))[annotator, system]
        + 0.1**0.5 * rng.choice([-1, 1], annotators)[annotator]
    )
    liked = rng.random(len(item)) < chance
    seen = observed_variation(
        liked.tolist(), item.tolist(), annotator.tolist(), system.tolist(), 30
    )
    assert seen.item == pytest.approx(0.2, abs=0.04)
    assert seen.annotator == pytest.approx(0.05, abs=0.025)
