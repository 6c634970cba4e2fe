"""How a criterion is tested: over seeds and texts, over texts, exactly, by intervals."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from hyperfitting.metrics.crossed import mean_over_seeds
from hyperfitting.metrics.estimate import Difference, Estimate
from hyperfitting.reporting.claims.sweeps import Sweeps
from tests.claims import BASE, TUNED, claim, criterion, only, record, several, sweeps
from tests.records import (
    make_mechanism,
)


def test_three_seeds_are_tested_over_seeds_and_texts_paired(tmp_path: Path) -> None:
    tuned = {0: [0.5, 0.6, 0.7], 1: [0.6, 0.6, 0.9], 2: [0.4, 0.5, 0.5]}
    base = {0: [0.3, 0.4, 0.4], 1: [0.4, 0.3, 0.5], 2: [0.2, 0.5, 0.3]}
    records = {f"tuned_{seed}": record(tuned[seed], base[seed], seed) for seed in tuned}
    outcome = only([claim()], sweeps(tmp_path / "x", records)).outcomes["embedded"]
    differences = np.array([np.subtract(tuned[seed], base[seed]) for seed in tuned])
    expected = mean_over_seeds(differences.mean(axis=1), list(differences))
    (found,) = outcome.evidence
    assert (found.unit, found.n, found.n_texts, found.seeds) == ("seeds", 3, 3, [0, 1, 2])
    assert outcome.p == pytest.approx(expected.p_above(0))
    assert found.ci95 == pytest.approx(expected.estimate.ci95)


@pytest.mark.parametrize("n_seeds", [1, 3])
def test_numbers_of_other_texts_are_not_tested(n_seeds: int, tmp_path: Path) -> None:
    records = {}
    for seed in range(n_seeds):
        records[f"tuned_{seed}"] = record(np.array(TUNED) + 0.01 * seed, BASE, seed)
        other = record(BASE, BASE, seed)
        context = other.samples[0].context.model_copy(update={"text": "another"})
        samples = [other.samples[0].model_copy(update={"context": context}), *other.samples[1:]]
        records[f"base_{seed}"] = other.model_copy(update={"samples": samples})
    criteria = [criterion(minus={"labels": {"system": "base"}}, above=0)]
    entry = only([claim(criteria=criteria)], sweeps(tmp_path / "x", records))
    (found,) = entry.outcomes["embedded"].evidence
    assert (found.p, found.ci95) == (None, None)
    assert entry.outcomes["embedded"].verdict == "inconclusive"


def test_a_perplexity_of_three_seeds_is_tested_over_texts_too(tmp_path: Path) -> None:
    """By the delta method: the contributions of the texts to the exponential of their mean."""
    losses = np.random.default_rng(0).uniform(2, 4, (3, 1)) + np.linspace(-1, 1, 8)
    records = {}
    for seed, values in enumerate(losses):
        perplexity = Estimate(float(np.exp(values.mean())), (1.0, 100.0), 8)
        per_text = {"tuned": {"val/loss": values.tolist()}, "base": {}}
        found = record([0.5] * 8, [0.5] * 8, seed, per_text=per_text)
        found.slices[0].tuned["val/perplexity"] = perplexity
        records[f"tuned_{seed}"] = found
    criteria = [criterion(value={"key": "val/perplexity"}, above=5)]
    (found,) = (
        only([claim(criteria=criteria)], sweeps(tmp_path / "x", records))
        .outcomes["embedded"]
        .evidence
    )
    numbers = np.exp(losses.mean(axis=1))
    contributions = numbers[:, None] * (1 + losses - losses.mean(axis=1, keepdims=True))
    expected = mean_over_seeds(numbers, list(contributions))
    assert (found.n, found.n_texts) == (3, 8)
    assert found.ci95 == pytest.approx(expected.estimate.ci95)
    assert found.p == pytest.approx(expected.p_above(5))


def test_one_seed_is_tested_over_texts_by_sign_flips(tmp_path: Path) -> None:
    runs = sweeps(tmp_path / "x", {"tuned_0": record(TUNED, BASE)})
    outcome = only([claim()], runs).outcomes["embedded"]
    expected = stats.permutation_test(
        (TUNED, BASE),
        lambda x, y, axis: (x - y).mean(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=np.inf,
        alternative="greater",
    ).pvalue
    assert outcome.evidence[0].unit == "texts"
    assert outcome.p == pytest.approx(expected)


def test_that_a_number_lies_in_the_region_is_tested_at_both_ends(tmp_path: Path) -> None:
    runs = sweeps(tmp_path / "x", several(TUNED, BASE))

    def one_sided(bound: float, alternative: str) -> float:
        differences = np.array(TUNED) - bound
        return float(
            stats.permutation_test(
                (differences, np.zeros(6)),
                lambda x, y, axis: (x - y).mean(axis=axis),
                permutation_type="samples",
                vectorized=True,
                n_resamples=np.inf,
                alternative=alternative,
            ).pvalue
        )

    for region, expected in (
        ({"above": 0.65}, one_sided(0.65, "less")),
        ({"below": 0.55}, one_sided(0.55, "greater")),
        ({"above": 0.3, "below": 0.55}, 2 * one_sided(0.55, "greater")),
        ({"above": 0.65, "below": 0.8}, 2 * one_sided(0.65, "less")),
    ):
        outcome = only([claim(criteria=[criterion(**region)])], runs).outcomes["embedded"]
        assert outcome.p_against == pytest.approx(expected)


def test_over_seeds_the_p_values_for_and_against_are_of_the_same_mean(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal([[0.4], [0.5], [0.6]], 0.1, (3, 12))
    records = {f"tuned_{seed}": record(row, row, seed) for seed, row in enumerate(values)}
    runs = sweeps(tmp_path / "x", records)
    mean = mean_over_seeds(values.mean(axis=1), list(values))
    region = {"above": 0.6, "below": 0.9}
    outcome = only([claim(criteria=[criterion(**region)])], runs).outcomes["embedded"]
    assert outcome.p == pytest.approx(mean.p_above(0.6))
    assert outcome.p_against == pytest.approx(2 * mean.p_below(0.6))


def test_seeds_that_change_nothing_are_no_seeds(tmp_path: Path) -> None:
    records = {f"tuned_{seed}": record(TUNED, BASE, seed) for seed in range(3)}
    (found,) = only([claim()], sweeps(tmp_path / "x", records)).outcomes["embedded"].evidence
    assert (found.unit, found.n) == ("texts", 6)


def _shares(folder: Path, *seeds: Sequence[float]) -> Sweeps:
    """Return runs of which each text ends in a loop, or not."""
    return sweeps(
        folder,
        {
            f"tuned_{seed}": record(
                [0.5] * len(values),
                [0.5] * len(values),
                seed,
                per_text={"tuned": {"gen/ends_in_loop": list(values)}, "base": {}},
            )
            for seed, values in enumerate(seeds)
        },
    )


def _p(change: dict[str, Any], runs: Sweeps) -> float | None:
    values = {"value": {"key": "gen/ends_in_loop"}} | change
    return only([claim(criteria=[criterion(**values)])], runs).outcomes["embedded"].p


def test_a_share_of_texts_is_tested_exactly(tmp_path: Path) -> None:
    runs = _shares(tmp_path / "x", [1, 0, 0, 0, 0, 0])
    expected = sum(math.comb(6, k) for k in (0, 1)) / 2**6
    assert _p({"below": 0.5}, runs) == pytest.approx(expected)
    assert _p({"below": 3.6}, runs) == pytest.approx(0)  # a bound that no share reaches
    assert _p({"above": 3.6}, runs) == pytest.approx(1)


def test_a_share_of_two_seeds_is_rounded_against_the_claim(tmp_path: Path) -> None:
    none, one = [0.0] * 100, [1.0] + [0.0] * 99
    p_none = _p({"below": 0.02}, _shares(tmp_path / "a", none, none))
    p_half = _p({"below": 0.02}, _shares(tmp_path / "b", none, one))
    p_one = _p({"below": 0.02}, _shares(tmp_path / "c", one, one))
    assert p_none == pytest.approx(0.98**100)
    assert p_half == p_one == pytest.approx(stats.binom.cdf(1, 100, 0.02))


def test_numbers_without_values_by_text_are_tested_by_their_intervals(tmp_path: Path) -> None:
    half = stats.norm.ppf(0.975) * 0.1  # of an interval with a standard error of 0.1
    mechanism = make_mechanism().model_copy(
        update={
            "estimates": {
                "mech/final_norm_l2": Estimate(2.0, (2 - half, 2 + half), 6),
                "mech/previous_block_l2": Estimate(1.8, (1.8 - half, 1.8 + half), 6),
            }
        }
    )
    runs = sweeps(tmp_path / "x", several(TUNED, BASE, mechanism=mechanism))
    key = {"key": "mech/final_norm_l2"}
    alone = claim(criteria=[criterion(value=key, above=1.9)])
    change = {"key": "mech/previous_block_l2"}
    difference = claim(criteria=[criterion(value=key, minus=change, above=0)])
    for entry, z in ((alone, 0.1 / 0.1), (difference, 0.2 / 0.02**0.5)):
        outcome = only([entry], runs).outcomes["embedded"]
        assert outcome.p == pytest.approx(stats.norm.sf(z))


def test_a_skewed_interval_is_tested_by_its_side_of_the_bound(tmp_path: Path) -> None:
    estimates = {"mech/final_norm_l2": Estimate(100.0, (60.0, 105.0), 12)}
    mechanism = make_mechanism().model_copy(update={"estimates": estimates})
    runs = sweeps(tmp_path / "x", several(TUNED, BASE, mechanism=mechanism))
    key = {"key": "mech/final_norm_l2"}
    for bound, side, is_certain in (
        (65, "above", False),
        (59, "above", True),
        (106, "below", True),
    ):
        entry = only([claim(criteria=[criterion(value=key, **{side: bound})])], runs)
        outcome = entry.outcomes["embedded"]
        assert outcome.p is not None and (outcome.p < 0.025) == is_certain
        assert outcome.evidence[0].n == 12


def test_the_paired_difference_of_a_record_is_taken_where_values_are_not_kept(
    tmp_path: Path,
) -> None:
    found = record(TUNED, BASE)
    half = Estimate(0.6, (0.5, 0.7), 6), Estimate(0.5, (0.4, 0.6), 6)
    paired = Difference(0.1, (0.08, 0.12), 6, 0.03)
    shorter = found.slices[0].model_copy(
        update={
            "max_new_tokens": 96, "tuned": {"gen/ttr": half[0]}, "base": {"gen/ttr": half[1]},
            "difference": {"gen/ttr": paired},
        }
    )  # fmt: skip
    found = found.model_copy(update={"slices": [*found.slices, shorter]})
    change = criterion(value={"length": 96}, minus={"side": "base"}, above=0)
    entry = only([claim(criteria=[change])], sweeps(tmp_path / "x", {"tuned_0": found}))
    (item,) = entry.outcomes["embedded"].evidence
    assert item.ci95 == paired.ci95
    assert item.p == pytest.approx(stats.norm.sf(0.1 / (0.02 / stats.norm.ppf(0.975))))
