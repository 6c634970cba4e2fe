"""The quantities of claims: metrics, derived numbers, rank correlations, agreements."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from hyperfitting.record.mechanism import LayerCurve
from hyperfitting.record.schema import Record
from hyperfitting.reporting.claims.quantities import NotMeasuredError, measure
from hyperfitting.reporting.claims.schema import Quantity
from hyperfitting.reporting.claims.sweeps import Sweeps
from hyperfitting.reporting.sweep_records import RunEntry, load_sweep
from tests.claims import BASE, TUNED, claim, criterion, only, record
from tests.records import (
    make_config,
    make_continuation,
    make_mechanism,
    make_next_tokens,
    make_predictions,
    make_sample,
    write_sweep,
)


def _quantity(**values: Any) -> Quantity:
    return Quantity.model_validate({"experiment": "table1", "key": "gen/ttr"} | values)


def _runs(folder: Path, *records: Record) -> list[RunEntry]:
    named = {f"tuned_{seed}": one for seed, one in enumerate(records)}
    runs = load_sweep(write_sweep(folder, {}, named)).runs
    return [run for run in runs if run.record is not None]


def test_quantities_that_are_no_metrics_are_as_by_hand(tmp_path: Path) -> None:
    tuned = make_continuation(" ".join([*map(str, range(96)), *["a b c d"] * 24]))
    samples = [make_sample(tuned, make_continuation("a a b b"))] * 3
    values = record(
        [0.1, 0.2, 0.3], [0.1] * 3, samples=samples, next_tokens={"news": make_next_tokens()}
    )
    run = _runs(tmp_path / "x", values)
    tokens = tuned.tokens
    fall = (len(set(tokens[:96])) - len(set(tokens[-96:]))) / 96
    assert measure(run, _quantity(key="ttr_fall_96")).number == pytest.approx(fall)
    assert measure(run, _quantity(key="ttr_first_96", side="base")).number == 0.5
    assert measure(run, _quantity(key="unseen_probability")).number == 0.9
    assert measure(run, _quantity(key="train/loss", epoch="first")).number == 1.0
    assert measure(run, _quantity(key="train/loss", epoch="last")).number == 0.5
    assert measure(run, _quantity(key="train/loss", epoch="highest")).number == 1
    with pytest.raises(NotMeasuredError, match="hidden states"):
        measure(run, _quantity(key="early_cosine"))
    with pytest.raises(NotMeasuredError, match="no continuations of 7"):
        measure(run, _quantity(length=7))


def test_the_lowest_cosine_of_the_early_blocks_has_the_interval_of_its_block(
    tmp_path: Path,
) -> None:
    """Of the first 10 of 22 blocks, or as large a share: 14 of 30."""
    layers = ["embedding", *(f"block {i}" for i in range(1, 31)), "final norm"]
    means = [0.5, *(1 - 0.01 * i for i in range(1, 31)), 0.4]
    curve = LayerCurve(layers=layers, mean=means, ci95=[(m - 0.02, m + 0.01) for m in means])
    mechanism = make_mechanism().model_copy(update={"per_layer": {"reference/cosine": curve}})
    run = _runs(tmp_path / "x", record([0.1, 0.2, 0.3], [0.1] * 3, mechanism=mechanism))
    measured = measure(run, _quantity(key="early_cosine"))
    assert measured.number == pytest.approx(0.86)
    assert measured.interval is not None
    assert measured.interval.ci95 == pytest.approx((0.84, 0.87))


def test_the_highest_ttr_is_counted_from_the_epoch_that_fits_the_training_data(
    tmp_path: Path,
) -> None:
    losses, ttrs = [3.0, 0.5, 0.09, 0.05, 0.02], [0.4, 0.6, 0.65, 0.7, 0.6]
    history = [
        {"epoch": epoch, "step": 4 * epoch, "train/loss": loss, "gen/ttr": ttr}
        for epoch, (loss, ttr) in enumerate(zip(losses, ttrs, strict=True), start=1)
    ]
    fitted, unfitted = (record(TUNED, BASE, history=rows) for rows in (history, history[:2]))
    run = _runs(tmp_path / "x", fitted)
    assert measure(run, _quantity(key="fit_to_peak")).number == 4 - 3
    assert measure(run, _quantity(epoch=2)).number == 0.6
    with pytest.raises(NotMeasuredError, match="not measured at epoch 7"):
        measure(run, _quantity(epoch=7))
    with pytest.raises(NotMeasuredError, match="never below"):
        measure(_runs(tmp_path / "y", unfitted), _quantity(key="fit_to_peak"))


def _strengths(
    folder: Path, values: np.ndarray, seeds: int = 1, first_seed: int = 0, **changes: Any
) -> Sweeps:
    """Return runs of controls of rising strength: ``values`` (K, N) are the TTR of their texts."""
    runs = []
    for seed, (k, ttrs) in itertools.product(
        range(first_seed, first_seed + seeds), enumerate(values.tolist())
    ):
        control = {"name": "x", "control": {"strength": 0.1 * k}}
        fields = {"config": make_config(seed=seed, decode=control)} | changes
        sweep = write_sweep(folder / f"{seed}-{k}", {}, {"tuned_0": record(ttrs, ttrs, **fields)})
        runs.append(load_sweep(sweep).labeled({"system": "tuned", "seed": "0"})[0])
    return Sweeps({("table1", "embedded"): runs})


@pytest.mark.parametrize(("slope", "verdict"), [(0.3, "reproduced"), (0.03, "inconclusive")])
def test_a_rank_correlation_is_tested_over_texts(
    slope: float, verdict: str, tmp_path: Path
) -> None:
    """Against a resampling of its own, one text set at a time."""
    rng = np.random.default_rng(1)
    values = rng.normal(size=(4, 20)) - slope * np.arange(4)[:, None]
    falls = claim(criteria=[criterion(value={"spearman": "decode.control.strength"}, below=0)])
    outcome = only([falls], _strengths(tmp_path, values, 3)).outcomes["embedded"]
    (found,) = outcome.evidence
    drawn = rng.integers(0, 20, (2_000, 20))
    expected = [stats.spearmanr(range(4), values[:, i].mean(axis=1)).statistic for i in drawn]
    assert found.estimate == pytest.approx(stats.spearmanr(range(4), values.mean(axis=1)).statistic)
    # a correlation of four ranks moves in steps of 0.2: two resamplings may differ by one
    assert found.ci95 == pytest.approx(np.quantile(expected, [0.025, 0.975]), abs=0.21)
    assert outcome.p == pytest.approx(np.mean(np.array(expected) >= 0), abs=0.02)
    assert (outcome.verdict, found.unit, found.n) == (verdict, "texts", 20)


def test_seeds_with_one_rank_correlation_are_tested_over_texts(tmp_path: Path) -> None:
    values = np.random.default_rng(1).normal(size=(4, 20)) - 9 * np.arange(4)[:, None]
    falls = claim(criteria=[criterion(value={"spearman": "decode.control.strength"}, below=0)])
    (found,) = only([falls], _strengths(tmp_path, values, 3)).outcomes["embedded"].evidence
    assert (found.estimate, found.unit, found.n, found.seeds) == (-1.0, "texts", 20, [0, 1, 2])


def test_a_strength_with_two_runs_has_no_rank_correlation(tmp_path: Path) -> None:
    config = make_config(seed=0, decode={"name": "x", "control": {"strength": 0.1}})
    runs = _strengths(tmp_path, np.eye(4), config=config)
    falls = claim(criteria=[criterion(value={"spearman": "decode.control.strength"}, below=0)])
    assert "several runs" in only([falls], runs).outcomes["embedded"].reason


def test_agreement_is_the_mean_over_all_pairs_of_runs(tmp_path: Path) -> None:
    runs = _runs(tmp_path / "x", *[record([0.1, 0.2, 0.3], [0.1] * 3)] * 3)
    a, b, c = (make_predictions(seed)["tuned/top1"] for seed in range(3))
    expected = np.mean([a == b, a == c, b == c])
    assert measure(runs, _quantity(key="top1_agreement")).number == pytest.approx(expected)


def _unfinished(folder: Path, name: str) -> RunEntry:
    return RunEntry(name, {"model": "ours", "system": "tuned", "seed": "0"}, folder / name)


def test_a_correlation_waits_for_all_its_runs(tmp_path: Path) -> None:
    """The sign over three of five strengths may be another one."""
    values = np.array([[0.1], [0.2], [0.3], [0.05], [0.02]]) + np.linspace(0, 0.01, 8)
    falls = claim(
        criteria=[criterion(value={"spearman": "decode.control.strength"}, below=0)]
    )  # fmt: skip
    runs = _strengths(tmp_path / "x", values)
    (of_all,) = runs.runs_of.values()
    complete = only([falls], runs).outcomes["embedded"]
    assert complete.evidence[0].estimate == pytest.approx(-0.6)
    waiting = Sweeps(
        {("table1", "embedded"): [*of_all[:3], _unfinished(tmp_path / "y", "strength_3")]}
    )
    outcome = only([falls], waiting).outcomes["embedded"]
    assert (outcome.verdict, outcome.reason) == ("not tested", "table1: not run yet")


def test_seeds_of_other_settings_are_not_pooled(tmp_path: Path) -> None:
    runs: list[RunEntry] = []
    for seed, k in enumerate((5, 5, 3)):
        values = np.random.default_rng(seed).random((k, 8))
        (found,) = _strengths(tmp_path / str(seed), values, first_seed=seed).runs_of.values()
        runs += found
    correlated = criterion(value={"spearman": "decode.control.strength"}, below=0)
    sweep = Sweeps({("table1", "embedded"): runs})
    outcome = only([claim(criteria=[correlated])], sweep).outcomes["embedded"]
    assert (outcome.verdict, outcome.evidence) == ("not tested", [])
    assert "not run with the same settings" in outcome.reason


def test_an_agreement_is_of_the_same_texts(tmp_path: Path) -> None:
    other = record(BASE, BASE)
    samples = [sample.model_copy(update={"dataset": "other"}) for sample in other.samples]
    other = other.model_copy(update={"samples": samples})
    runs = _runs(tmp_path / "x", record(TUNED, BASE), other)
    with pytest.raises(NotMeasuredError, match="different texts"):
        measure(runs, _quantity(key="top1_agreement"))


def test_a_correlation_of_three_seeds_has_a_possible_interval(tmp_path: Path) -> None:
    values = np.array([[0.1], [0.2], [0.3], [0.05], [0.02]]) + np.linspace(0, 0.01, 8)
    runs: list[RunEntry] = []
    for seed, order in enumerate(([0, 1, 2, 3, 4], [4, 3, 0, 1, 2], [0, 1, 2, 4, 3])):
        folder = tmp_path / str(seed)
        (found,) = _strengths(folder, values[order], first_seed=seed).runs_of.values()
        runs += found
    correlated = criterion(value={"spearman": "decode.control.strength"}, below=0)
    sweep = Sweeps({("table1", "embedded"): runs})
    (item,) = only([claim(criteria=[correlated])], sweep).outcomes["embedded"].evidence
    numbers = [
        stats.spearmanr(range(5), values[order, 0]).statistic
        for order in ([0, 1, 2, 3, 4], [4, 3, 0, 1, 2], [0, 1, 2, 4, 3])
    ]
    assert item.estimate == pytest.approx(np.mean(numbers))
    assert (item.unit, item.n, item.n_texts) == ("seeds", 3, 8)
    assert item.ci95 is not None and -1 <= item.ci95[0] < item.ci95[1] <= 1
