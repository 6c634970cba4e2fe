"""Every metric against an independent oracle."""

import itertools
import math
import warnings
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from hyperfitting.errors import UserError
from hyperfitting.metrics import diversity, mauve
from hyperfitting.metrics.distribution import (
    STEP_STATS,
    step_stats,
    token_stats,
    top1_agreement,
)
from hyperfitting.metrics.diversity import (
    distinct_n,
    ends_in_loop,
    final_loop,
    longest_loop,
    rep_n,
    repetition,
    rolling_ttr,
    ttr,
)
from hyperfitting.metrics.estimate import Difference, Estimate
from hyperfitting.metrics.uncertainty import bootstrap_mean, paired_difference, rank_correlation

texts = st.lists(st.integers(0, 6), max_size=40)


@given(texts)
def test_ttr_is_distinct_tokens_over_tokens(tokens: list[int]) -> None:
    expected = len(set(tokens)) / len(tokens) if tokens else math.nan
    assert ttr(tokens) == pytest.approx(expected, nan_ok=True)


@given(texts, st.integers(1, 5))
def test_rep_n_counts_ngrams_seen_before(tokens: list[int], n: int) -> None:
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    again = sum(gram in grams[:i] for i, gram in enumerate(grams))
    expected = again / len(grams) if grams else math.nan
    assert rep_n(tokens, n) == pytest.approx(expected, nan_ok=True)

    assert distinct_n(tokens, n) == pytest.approx(1 - expected, nan_ok=True)


@given(texts, st.integers(1, 12))
def test_rolling_ttr_is_the_ttr_of_the_last_tokens(tokens: list[int], window: int) -> None:
    rolling = rolling_ttr(tokens, window)
    assert len(rolling) == len(tokens)
    for end in range(1, len(tokens) + 1):
        expected = ttr(tokens[end - window : end]) if end >= window else math.nan
        assert rolling[end - 1] == pytest.approx(expected, nan_ok=True)


def loops(tokens: list[int]) -> list[tuple[int, int]]:
    """All spans (start, end) of two or more copies of a unit, and perhaps a part of another."""
    n = len(tokens)
    return [
        (start, end)
        for start in range(n)
        for end in range(start + 2, n + 1)
        if any(
            all(tokens[i] == tokens[i - period] for i in range(start + period, end))
            for period in range(1, (end - start) // 2 + 1)
        )
    ]


@given(st.lists(st.integers(0, 2), max_size=24))
def test_loops_are_the_spans_made_of_copies(tokens: list[int]) -> None:
    spans = loops(tokens)
    longest = max((end - start for start, end in spans), default=0)
    final = max((end - start for start, end in spans if end == len(tokens)), default=0)
    undefined = math.nan if not tokens else None
    assert longest_loop(tokens) == pytest.approx(undefined or longest, nan_ok=True)
    assert final_loop(tokens) == pytest.approx(undefined or final, nan_ok=True)
    assert ends_in_loop(tokens) == pytest.approx(undefined or float(final >= 10), nan_ok=True)


def test_examples_of_loops() -> None:
    assert longest_loop([1, 2, 3, 1, 2, 3, 1]) == 7
    assert longest_loop([1, 2, 3]) == 0
    assert ends_in_loop([*range(20), 7, 7]) == 0  # "that that"
    assert ends_in_loop([*range(20), *range(50, 55), *range(50, 55)]) == 1
    assert ends_in_loop([*range(5), *range(5), 9]) == 0


@given(texts)
def test_repetition_is_the_longest_span_that_occurs_earlier(tokens: list[int]) -> None:
    expected = [0] * len(tokens)
    for start in range(len(tokens)):
        for end in range(start + 1, len(tokens) + 1):
            span = tokens[start:end]
            earlier = (tokens[i : i + len(span)] for i in range(start))
            if any(other == span for other in earlier):
                for i in range(start, end):
                    expected[i] = max(expected[i], len(span))
    assert repetition(tokens).tolist() == expected
    with mock.patch.object(diversity, "_MAX_COMPARISONS", 1):  # one lag at a time
        assert repetition(tokens).tolist() == expected


def test_an_ngram_of_no_tokens_is_an_error() -> None:
    with pytest.raises(ValueError, match="n is 0"):
        rep_n([1, 2], 0)


@given(st.integers(0, 10_000), st.integers(1, 50), st.floats(0.1, 30))
def test_token_stats_agree_with_float64_numpy(seed: int, vocabulary: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, scale, (3, 4, vocabulary))
    targets = rng.integers(0, vocabulary, (3, 4))
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    with warnings.catch_warnings(), np.errstate(divide="ignore", invalid="ignore"):
        entropy = -np.nansum(p * np.log(p), -1)
        loss = -np.log(np.take_along_axis(p, targets[..., None], -1))[..., 0]
    descending = -np.sort(-p, -1)
    computed = token_stats(torch.tensor(logits, dtype=torch.float32), torch.tensor(targets))
    # float32 logits carry a relative error of 6e-8, which the exponent scales
    close = {"rtol": 1e-4, "atol": 1e-5 * scale}
    np.testing.assert_allclose(computed.entropy, entropy, **close)
    np.testing.assert_allclose(computed.loss, loss, **close)
    chosen = np.take_along_axis(logits.astype(np.float32), targets[..., None], -1)
    assert computed.rank.tolist() == (1 + (logits.astype(np.float32) > chosen).sum(-1)).tolist()
    assert computed.top1.tolist() == logits.astype(np.float32).argmax(-1).tolist()
    for k, mass in ((1, computed.top1_mass), (3, computed.top3_mass), (5, computed.top5_mass)):
        np.testing.assert_allclose(mass, descending[..., :k].sum(-1), **close)


def test_step_stats_equal_token_stats() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(20, 50, generator=generator)
    logits[0, :10] = -torch.inf  # masked tokens
    chosen = torch.arange(10, 30)
    expected = token_stats(logits, chosen)
    for name, values in zip(STEP_STATS, step_stats(logits, chosen), strict=True):
        torch.testing.assert_close(values, getattr(expected, name).float(), rtol=0, atol=0)


def test_a_masked_token_adds_no_entropy() -> None:
    masked = token_stats(torch.tensor([[0.0, 0.0, -torch.inf]]), torch.tensor([0]))
    assert masked.entropy.item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_without_a_distribution_have_no_loss(bad: float) -> None:
    stats = token_stats(torch.tensor([[0.0, bad], [0.0, 0.0]]), torch.tensor([0, 0]))
    assert stats.loss.isnan().tolist() == [True, False]


def resampled_interval(values: np.ndarray, seed: int) -> list[float]:
    """The 95% percentile bootstrap interval of the mean, one resample at a time."""
    rng = np.random.default_rng(seed)
    means = [rng.choice(values, len(values)).mean() for _ in range(20_000)]
    return [float(np.percentile(means, q)) for q in (2.5, 97.5)]


def test_the_interval_is_that_of_resampled_means() -> None:
    values = np.random.default_rng(0).gamma(2.0, size=40)
    estimate = bootstrap_mean(values, 20_000)
    assert estimate is not None
    assert estimate.ci95 is not None
    assert estimate.mean == pytest.approx(values.mean())
    # two independent resamplings: the ends differ by Monte Carlo error, 1% of the spread
    expected = resampled_interval(values, seed=1)
    np.testing.assert_allclose(estimate.ci95, expected, atol=0.05 * values.std())


def test_the_interval_covers_the_true_mean_about_95_percent_of_the_time() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(300):
        estimate = bootstrap_mean(rng.normal(size=40), 400)
        assert estimate is not None
        assert estimate.ci95 is not None
        hits += estimate.ci95[0] <= 0 <= estimate.ci95[1]
    # a percentile bootstrap of 40 values covers about 94%; 3 standard errors of 300 trials are 4%
    assert 0.90 <= hits / 300 <= 0.98


def test_one_text_has_no_interval_and_no_text_no_estimate() -> None:
    assert bootstrap_mean([2.0], 100) == Estimate(2.0, None, 1)
    assert bootstrap_mean([], 100) is None
    assert bootstrap_mean([math.nan], 100) is None
    assert bootstrap_mean([1.0, math.nan, 1.0], 100) == Estimate(1.0, (1.0, 1.0), 2)


def test_a_transformed_mean_is_the_transform_of_the_mean() -> None:
    transformed = bootstrap_mean([1.0, 2.0, 3.0], 1000, transform=np.exp)
    plain = bootstrap_mean([1.0, 2.0, 3.0], 1000)
    assert transformed is not None
    assert plain is not None
    assert transformed.mean == pytest.approx(math.exp(2))
    assert transformed.ci95 == pytest.approx(tuple(np.exp(plain.ci95)))


def test_agreement_is_the_share_of_equal_predictions() -> None:
    assert top1_agreement([[1, 2], [3, 4]], [[1, 9], [3, 4]]).tolist() == [0.5, 1]
    with pytest.raises(ValueError, match="not of the same texts"):
        top1_agreement([[1, 2]], [[1, 2, 3]])


@pytest.mark.parametrize("n", [5, 11, 40])
def test_the_paired_test_agrees_with_scipy(n: int) -> None:
    rng = np.random.default_rng(n)
    tuned, base = rng.normal(0.4, 1, n), rng.normal(0, 1, n)
    ours = paired_difference(tuned, base, 20_000)
    theirs = stats.permutation_test(
        (tuned, base),
        lambda x, y, axis: (x - y).mean(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=20_000 if n > 12 else np.inf,
        rng=np.random.default_rng(1),
    )
    assert ours is not None
    assert ours.p is not None
    assert ours.mean == pytest.approx(theirs.statistic)
    # few texts: both try all flips; many: two Monte Carlo estimates, within 4 standard errors
    error = 0 if n <= 12 else 4 * math.sqrt(2 * theirs.pvalue * (1 - theirs.pvalue) / 20_000)
    assert ours.p == pytest.approx(theirs.pvalue, abs=1e-12 + error)
    if n == 5:  # the resampled means are few, and the ends jump between them
        return
    interval = resampled_interval(tuned - base, seed=2)
    np.testing.assert_allclose(ours.ci95, interval, atol=0.05 * (tuned - base).std())


def test_differences_of_constants_of_one_text_and_of_no_text() -> None:
    assert paired_difference([1.0] * 20, [1.0] * 20, 200) == Difference(0, (0, 0), 20, 1)
    assert paired_difference([2.0, math.nan], [1.5, 1.0], 200) == Difference(0.5, None, 1, None)
    assert paired_difference([math.nan], [1.0], 200) is None
    with pytest.raises(ValueError, match="not of the same texts"):
        paired_difference([1.0], [1.0, 2.0], 200)


def test_under_no_difference_p_is_uniform() -> None:
    rng = np.random.default_rng(0)
    differences = [paired_difference(*rng.normal(size=(2, 30)), 200, seed=i) for i in range(300)]
    p = [difference.p for difference in differences if difference is not None]
    assert stats.kstest(p, "uniform").pvalue > 1e-3


def test_mauve_needs_its_package_and_100_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    few = np.zeros((99, 4), dtype=np.float32)
    assert math.isnan(mauve.mauve(few, few))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="mauve-text") as raised:
        mauve.check_installed()
    assert "pip install 'hyperfitting[mauve]'" in str(raised.value)


def test_a_rank_correlation_has_the_resamples_of_all_its_texts() -> None:
    """Of 4 texts all 256 resamples, with scipy's correlation of their means at each setting."""
    settings = [0.01, 0.05, 0.1, 0.2, 0.5]
    values = np.random.default_rng(3).normal(size=(5, 4)) - 0.35 * np.arange(5)[:, None]
    exact = np.array(
        [
            stats.spearmanr(settings, values[:, list(texts)].mean(axis=1)).statistic
            for texts in itertools.product(range(4), repeat=4)
        ]
    )
    correlation = rank_correlation(settings, values, 20_000)
    assert correlation is not None
    expected = stats.spearmanr(settings, values.mean(axis=1)).statistic
    assert correlation.estimate.mean == pytest.approx(expected)
    assert correlation.estimate.ci95 == pytest.approx(np.quantile(exact, [0.025, 0.975]))
    for bound in (-0.75, -0.25):
        below, above = (exact >= bound).mean(), (exact <= bound).mean()
        assert 0.02 < below < 0.98  # else it shows nothing
        assert correlation.p_below(bound) == pytest.approx(below, abs=0.015)
        assert correlation.p_above(bound) == pytest.approx(above, abs=0.015)


def test_a_rank_correlation_needs_texts_and_different_means() -> None:
    rising = np.arange(3.0)[:, None]
    assert rank_correlation([1, 2, 3], rising, 50) is None  # one text
    assert rank_correlation([1, 2, 3], np.ones((3, 4)), 50) is None
    assert rank_correlation([1, 1, 1], rising + np.arange(4), 50) is None
    one_without_a_value = rising + np.array([0.0, 0.1, 0.2])
    one_without_a_value[1, 2] = np.nan
    correlation = rank_correlation([1, 2, 3], one_without_a_value, 50)
    assert correlation is not None
    assert correlation.estimate == Estimate(1.0, (1.0, 1.0), 2)


def test_ties_by_id_rank_as_a_stable_sort() -> None:
    """As greedy decoding chooses: the first of equally likely tokens."""
    logits = torch.randint(0, 4, (30, 12), generator=torch.Generator().manual_seed(0)).bfloat16()
    targets = torch.arange(30) % 12
    stats = token_stats(logits, targets, ties_by_id=True)
    order = np.argsort(-logits.float().numpy(), axis=-1, kind="stable")
    expected = [row.tolist().index(target) + 1 for row, target in zip(order, targets, strict=True)]
    assert stats.rank.tolist() == expected
    assert stats.top1.tolist() == order[:, 0].tolist() == logits.float().argmax(-1).tolist()
    assert token_stats(logits, targets).rank.sum() < sum(expected)
