"""Every metric against an independent oracle."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from hyperfitting.metrics.distribution import sharpness
from hyperfitting.metrics.diversity import rep_n, repeated, ttr
from hyperfitting.metrics.uncertainty import bootstrap_mean

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


@given(texts, st.integers(1, 5))
def test_repeated_marks_the_ngrams_seen_before(tokens: list[int], n: int) -> None:
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    expected = [False] * len(tokens)
    for i, gram in enumerate(grams):
        if gram in grams[:i]:
            expected[i : i + n] = [True] * n
    assert repeated(tokens, n).tolist() == expected


def test_an_ngram_of_no_tokens_is_an_error() -> None:
    with pytest.raises(ValueError, match="n is 0"):
        rep_n([1, 2], 0)


@given(st.integers(0, 10_000), st.integers(1, 50), st.floats(0.1, 30))
def test_sharpness_agrees_with_float64_numpy(seed: int, vocabulary: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, scale, (3, 4, vocabulary))
    targets = rng.integers(0, vocabulary, (3, 4))
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    with warnings.catch_warnings(), np.errstate(divide="ignore", invalid="ignore"):
        entropy = -np.nansum(p * np.log(p), -1)
        loss = -np.log(np.take_along_axis(p, targets[..., None], -1))[..., 0]
    falling = -np.sort(-p, -1)
    found = sharpness(torch.tensor(logits, dtype=torch.float32), torch.tensor(targets))
    # float32 logits carry a relative error of 6e-8, which the exponent scales
    close = {"rtol": 1e-4, "atol": 1e-5 * scale}
    np.testing.assert_allclose(found.entropy, entropy, **close)
    np.testing.assert_allclose(found.loss, loss, **close)
    for k, mass in ((1, found.top1_mass), (3, found.top3_mass), (5, found.top5_mass)):
        np.testing.assert_allclose(mass, falling[..., :k].sum(-1), **close)


def test_a_forbidden_token_adds_no_entropy() -> None:
    found = sharpness(torch.tensor([[0.0, 0.0, -torch.inf]]), torch.tensor([0]))
    assert found.entropy.item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_without_a_distribution_are_an_error(bad: float) -> None:
    with pytest.raises(FloatingPointError, match="no distribution"):
        sharpness(torch.tensor([[0.0, bad]]), torch.tensor([0]))


def test_the_interval_agrees_with_scipy() -> None:
    values = np.random.default_rng(0).gamma(2.0, size=40)
    ours = bootstrap_mean(values, 20_000)
    theirs = stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=20_000, rng=np.random.default_rng(1)
    ).confidence_interval
    assert ours is not None
    assert ours.ci95 is not None
    assert ours.mean == pytest.approx(values.mean())
    # two independent resamplings: the ends differ by Monte Carlo error, 1% of the spread
    np.testing.assert_allclose(ours.ci95, (theirs.low, theirs.high), atol=0.05 * values.std())


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(300):
        found = bootstrap_mean(rng.normal(size=40), 400)
        assert found is not None
        assert found.ci95 is not None
        hits += found.ci95[0] <= 0 <= found.ci95[1]
    # a percentile bootstrap of 40 values covers about 94%; 3 standard errors of 300 trials are 4%
    assert 0.90 <= hits / 300 <= 0.98


def test_one_text_has_no_interval_and_no_text_no_estimate() -> None:
    one = bootstrap_mean([2.0], 100)
    assert one is not None
    assert (one.mean, one.ci95, one.n) == (2.0, None, 1)
    assert bootstrap_mean([], 100) is None
    assert bootstrap_mean([math.nan], 100) is None
    some = bootstrap_mean([1.0, math.nan, 1.0], 100)
    assert some is not None
    assert (some.mean, some.ci95, some.n) == (1.0, (1.0, 1.0), 2)


def test_a_transformed_mean_is_the_transform_of_the_mean() -> None:
    found = bootstrap_mean([1.0, 2.0, 3.0], 1000, transform=np.exp)
    plain = bootstrap_mean([1.0, 2.0, 3.0], 1000)
    assert found is not None
    assert plain is not None
    assert found.mean == pytest.approx(math.exp(2))
    assert found.ci95 == pytest.approx(tuple(np.exp(plain.ci95)))
