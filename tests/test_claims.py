"""The ledger of claims: the claims file, and the tests behind its verdicts."""

import itertools
import json
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy import stats

from hyperfitting.errors import UserError
from hyperfitting.metrics.crossed import mean_over_seeds
from hyperfitting.metrics.estimate import Difference, Estimate
from hyperfitting.record.mechanism import LayerCurve
from hyperfitting.record.schema import Record
from hyperfitting.reporting.claims.ledger import Sweeps, build_ledger
from hyperfitting.reporting.claims.quantities import NotMeasuredError, measure
from hyperfitting.reporting.claims.render import markdown
from hyperfitting.reporting.claims.schema import SCALES, Quantity, read_claims
from hyperfitting.reporting.sweep_records import RunEntry, load_sweep
from tests.claims import BASE, TUNED, claim, criterion, only, record, sweeps
from tests.records import (
    make_config,
    make_continuation,
    make_mechanism,
    make_next_tokens,
    make_predictions,
    make_sample,
    write_sweep,
)

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"


def test_the_claims_of_both_papers_are_valid_and_complete() -> None:
    claims = read_claims()
    assert len(claims) >= 60
    assert {entry.paper for entry in claims} == {"P1", "P2"}


@cache
def _axes(experiment: str, scale: str) -> dict[str, list[str]]:
    text = (EXPERIMENTS / f"{experiment}.yaml").read_text("utf-8")
    sweeper = yaml.load(text, yaml.CSafeLoader)["hydra"]["sweeper"]
    axes = sweeper["axes"] | (sweeper["scales"][scale].get("axes") or {})
    return {axis: [str(label) for label in labels] for axis, labels in axes.items()}


def test_every_label_of_a_criterion_is_one_of_its_experiment() -> None:
    for entry, scale in itertools.product(read_claims(), SCALES):
        for c in entry.criteria_at(scale):
            quantities = [c.value, *([c.value.changed(c.minus)] if c.minus else [])]
            for quantity in quantities if scale in entry.judged_at or c.scale else ():
                axes = _axes(quantity.experiment, scale)
                for axis, labels in quantity.labels.items():
                    wanted = [labels] if isinstance(labels, str) else labels
                    assert set(wanted) <= set(axes.get(axis, ())), (entry.id, axis)
                if entry.model and scale == "paper" and "model" in axes:
                    assert entry.model in axes["model"], entry.id


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": "x"}, "x: id"),
        ({"criteria": []}, "p1-x: either criteria or not_tested"),
        ({"criteria": [criterion(value={"key": "gen/tttr"}, above=0)]}, "gen/ttr"),
        ({"criteria": [criterion(value={"experiment": "tabel1"}, above=0)]}, "table1"),
        ({"criteria": [criterion()]}, "above, below, or both"),
        ({"criteria": [criterion(above=1, below=0)]}, "above must be less"),
        (
            {"criteria": [criterion(value={"spearman": "seed"}, minus={"side": "base"}, above=0)]},
            "subtracted from a rank correlation",
        ),
        ({"verdict": "reproduced"}, "p1-x: verdict"),
    ],
)
def test_an_invalid_claim_is_an_error_with_its_id_and_field(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    values = claim().model_dump(mode="json", exclude_unset=True) | change
    path = tmp_path / "claims.yaml"
    path.write_text(json.dumps({"claims": [values]}))
    with pytest.raises(UserError, match=message):
        read_claims(path)


def test_an_id_stands_for_one_claim(tmp_path: Path) -> None:
    values = claim().model_dump(mode="json", exclude_unset=True)
    (tmp_path / "claims.yaml").write_text(json.dumps({"claims": [values, values]}))
    with pytest.raises(UserError, match="twice: p1-x"):
        read_claims(tmp_path / "claims.yaml")


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
    runs = sweeps(tmp_path / "x", {"tuned_0": record(TUNED, BASE, mechanism=mechanism)})
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
    runs = sweeps(tmp_path / "x", {"tuned_0": record(TUNED, BASE, mechanism=mechanism)})
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


@pytest.mark.parametrize(("highest", "verdict"), [(0.34, "reproduced"), (0.36, "not reproduced")])
def test_one_observation_refutes_that_something_never_occurs(
    highest: float, verdict: str, tmp_path: Path
) -> None:
    maxima = (0.30, 0.305, highest)
    records = {
        f"tuned_{seed}": record([0.1] * 5 + [value], [0.1] * 6, seed)
        for seed, value in enumerate(maxima)
    }
    never = criterion(value={"statistic": "max"}, below=0.353, universal=True)
    entry = only([claim(criteria=[never])], sweeps(tmp_path / "x", records))
    assert entry.outcomes["embedded"].verdict == verdict


@pytest.mark.parametrize(
    ("criteria", "verdict"),
    [
        ([criterion(above=0.5)], "reproduced"),
        ([criterion(above=0.5), criterion(below=0.7)], "reproduced"),
        ([criterion(above=0.5, below=0.7)], "reproduced"),
        ([criterion(above=0.599)], "inconclusive"),  # inside, but not significantly
        ([criterion(above=0.605)], "inconclusive"),  # outside, but the interval is not
        ([criterion(above=0.5), criterion(above=0.605)], "inconclusive"),
        ([criterion(above=0.599), criterion(above=0.7)], "partly"),
        ([criterion(above=0.605), criterion(above=0.7)], "not reproduced"),
        ([criterion(above=0.5), criterion(above=0.7)], "partly"),
        ([criterion(above=0.7)], "not reproduced"),
        ([criterion(value={"statistic": "max"}, above=0.5)], "inconclusive"),  # no interval
        ([criterion(value={"statistic": "max"}, above=0.7)], "inconclusive"),
        ([criterion(value={"statistic": "max"}, above=0.5, observed=True)], "reproduced"),
        ([criterion(value={"statistic": "max"}, above=0.7, observed=True)], "not reproduced"),
    ],
)
def test_a_verdict_follows_from_region_and_p_value(
    criteria: list[Any], verdict: str, tmp_path: Path
) -> None:
    values = [0.58, 0.59, 0.6, 0.6, 0.61, 0.62]  # the smallest possible p-value is 1 / 2^6
    runs = sweeps(tmp_path / "x", {"tuned_0": record(values, BASE)})
    assert only([claim(criteria=criteria)], runs).outcomes["embedded"].verdict == verdict


def test_what_holds_by_construction_is_no_evidence(tmp_path: Path) -> None:
    runs = sweeps(tmp_path / "x", {"tuned_0": record(TUNED, BASE)})
    holds = claim(implied_by="so defined", criteria=[criterion(above=0.4)])
    fails = claim(id="p1-fails", implied_by="so defined", criteria=[criterion(above=0.9)])
    ledger = build_ledger([holds, fails], runs)
    implied, failed = (entry.outcomes["embedded"] for entry in ledger.entries)
    assert (implied.verdict, implied.p, implied.implied_by) == ("implied", None, "so defined")
    assert (failed.verdict, ledger.tests) == ("not reproduced", 1)
    assert "**implied**<br>so defined" in markdown(ledger)


def test_many_claims_raise_the_p_value_that_each_needs(tmp_path: Path) -> None:
    runs = sweeps(tmp_path / "x", {"tuned_0": record(TUNED, BASE)})
    claims = [claim(id=f"p1-{i}", criteria=[criterion(above=0.4)]) for i in range(4)]
    alone = only(claims[:1], runs).outcomes["embedded"]
    assert (alone.verdict, alone.p, alone.adjusted_p) == ("reproduced", 1 / 64, 1 / 64)
    among = only(claims, runs).outcomes["embedded"]
    assert (among.verdict, among.adjusted_p) == ("inconclusive", 4 / 64)


def test_what_has_not_run_is_not_tested_and_has_the_command(tmp_path: Path) -> None:
    outcomes = only([claim()], sweeps(tmp_path / "x", {})).outcomes
    assert outcomes["embedded"].verdict == outcomes["paper"].verdict == "not tested"
    assert outcomes["embedded"].reason == "table1: not run yet"
    assert outcomes["paper"].command == "hyperfit experiment=table1 scale=paper"


def test_a_claim_about_another_model_is_shown_but_not_decided(tmp_path: Path) -> None:
    runs = sweeps(tmp_path / "x", {"tuned_0": record(TUNED, BASE)})
    ledger = build_ledger([claim(judged_at=["paper"])], runs)
    outcome = ledger.entries[0].outcomes["embedded"]
    assert outcome.verdict == "not tested"
    assert outcome.evidence[0].estimate == pytest.approx(np.mean(TUNED) - np.mean(BASE))
    assert (outcome.p, ledger.tests) == (None, 0)


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


def test_the_lowest_cosine_of_the_first_ten_blocks_has_the_interval_of_its_block(
    tmp_path: Path,
) -> None:
    layers = ["embedding", *(f"block {i}" for i in range(1, 13)), "final norm"]
    means = [0.5, *(1 - 0.01 * i for i in range(1, 13)), 0.4]
    curve = LayerCurve(layers=layers, mean=means, ci95=[(m - 0.02, m + 0.01) for m in means])
    mechanism = make_mechanism().model_copy(update={"per_layer": {"reference/cosine": curve}})
    run = _runs(tmp_path / "x", record([0.1, 0.2, 0.3], [0.1] * 3, mechanism=mechanism))
    measured = measure(run, _quantity(key="early_cosine"))
    assert measured.number == pytest.approx(0.9)
    assert measured.interval is not None
    assert measured.interval.ci95 == pytest.approx((0.88, 0.91))


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
    outcome = only([falls], _strengths(tmp_path, values)).outcomes["embedded"]
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


def test_what_occurs_is_observed_with_one_seed_of_several(tmp_path: Path) -> None:
    values = [[0.1, 0.2], [0.95, 0.1], [0.3, 0.4]]
    records = {f"tuned_{seed}": record(ttrs, ttrs, seed) for seed, ttrs in enumerate(values)}
    value = {"statistic": "max"}
    occurs = claim(criteria=[criterion(value=value, above=0.9, observed=True)])
    ledger = build_ledger([occurs], sweeps(tmp_path / "x", records))
    outcome = ledger.entries[0].outcomes["embedded"]
    assert (outcome.verdict, outcome.evidence[0].observed_in) == ("reproduced", 1)
    assert "observed with 1 of 3 seeds" in markdown(ledger)
    never = claim(criteria=[criterion(value=value, above=0.96, observed=True)])
    ledger = build_ledger([never], sweeps(tmp_path / "y", records))
    assert ledger.entries[0].outcomes["embedded"].verdict == "not reproduced"


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
