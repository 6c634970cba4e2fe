"""The ledger of claims: the claims file, and the verdicts."""

import itertools
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from statsmodels.stats.multitest import multipletests
from transformers import LlamaConfig, LlamaForCausalLM

from hyperfitting.errors import UserError
from hyperfitting.models.config import TuningConfig
from hyperfitting.models.trainable import select_trainable
from hyperfitting.reporting.claims.ledger import build_ledger
from hyperfitting.reporting.claims.render import markdown
from hyperfitting.reporting.claims.schema import SCALES, read_claims
from hyperfitting.reporting.claims.sweeps import Sweeps
from tests.claims import BASE, TUNED, claim, criterion, only, record, several, sweeps

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
        ({"criteria": []}, "p1-x: either criteria, implied_by or"),
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
    runs = sweeps(tmp_path / "x", several(values, BASE))
    assert only([claim(criteria=criteria)], runs).outcomes["embedded"].verdict == verdict


@pytest.mark.parametrize("above", [0.4, 0.8])
def test_fewer_than_three_trainings_decide_nothing(above: float, tmp_path: Path) -> None:
    """The same numbers of three do."""
    verdicts = []
    for n_seeds in (1, 2, 3):
        records = dict(list(several(TUNED, BASE).items())[:n_seeds])
        ledger = build_ledger(
            [claim(criteria=[criterion(above=above)])], sweeps(tmp_path / f"{n_seeds}", records)
        )
        verdicts.append(ledger.entries[0].outcomes["embedded"].verdict)
        assert (": a verdict needs 3" in markdown(ledger)) == (n_seeds < 3)
    decided = "reproduced" if above < min(TUNED) else "not reproduced"
    assert verdicts == ["inconclusive", "inconclusive", decided]


def test_what_holds_by_construction_is_no_evidence(tmp_path: Path) -> None:
    runs = sweeps(tmp_path / "x", several(TUNED, BASE))
    holds = claim(implied_by="so defined", criteria=[criterion(above=0.4)])
    fails = claim(id="p1-fails", implied_by="so defined", criteria=[criterion(above=0.9)])
    ledger = build_ledger([holds, fails], runs)
    implied, failed = (entry.outcomes["embedded"] for entry in ledger.entries)
    assert (implied.verdict, implied.p, implied.implied_by) == ("implied", None, "so defined")
    assert failed.verdict == "not reproduced"
    assert (ledger.tests, ledger.tests_against) == (0, 2)  # they can only speak against
    assert "**implied**<br>so defined" in markdown(ledger)


def test_what_follows_from_a_computation_needs_no_records(tmp_path: Path) -> None:
    computed = claim(criteria=[], implied_by="5 of 22 blocks")
    outcomes = only([computed], Sweeps({})).outcomes
    assert {outcome.verdict for outcome in outcomes.values()} == {"implied"}
    runs = sweeps(tmp_path / "x", several(TUNED, BASE))
    page = markdown(build_ledger([computed, claim(id="p1-y")], runs))
    assert "|  | **implied**<br>5 of 22 blocks |" in page


@pytest.mark.parametrize(("n_blocks", "fewer"), [(22, "77.3%"), (28, "82.1%")])
def test_late_stage_lora_trains_as_much_less_as_the_claim_has_it(n_blocks: int, fewer: str) -> None:
    """Of the blocks of TinyLlama and of Qwen2.5 1.5B; adapters are counted in narrow models."""
    (parameters,) = (entry for entry in read_claims() if entry.id == "p2-parameters")
    shape = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 9}
    counts = []
    for method in ("late_stage_lora", "lora"):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=n_blocks, **shape))
        tuning = TuningConfig(method=method, last_blocks=5, lora_rank=2)
        counts.append(sum(p.numel() for p in select_trainable(model, tuning).values()))
    assert f"{1 - counts[0] / counts[1]:.1%}" == fewer
    assert f"5 of {n_blocks}" in parameters.implied_by and fewer in parameters.implied_by


@pytest.mark.parametrize("above", [0.4, 0.8])
def test_many_claims_raise_the_p_value_that_each_needs(above: float, tmp_path: Path) -> None:
    """That a number lies outside needs as much as that it lies where it is claimed."""
    runs = sweeps(tmp_path / "x", several(TUNED, BASE))
    claims = [claim(id=f"p1-{i}", criteria=[criterion(above=above)]) for i in range(4)]
    alone = only(claims[:1], runs).outcomes["embedded"]
    among = only(claims, runs).outcomes["embedded"]
    assert among.verdict == "inconclusive"
    if above < min(TUNED):
        assert (alone.verdict, alone.p, alone.adjusted_p) == ("reproduced", 1 / 64, 1 / 64)
        assert among.adjusted_p == 4 / 64
    else:
        assert (alone.verdict, alone.p_against) == ("not reproduced", 1 / 64)
        assert (alone.adjusted_p_against, among.adjusted_p_against) == (1 / 64, 4 / 64)


def test_both_p_values_are_adjusted_over_their_own_family(tmp_path: Path) -> None:
    runs = sweeps(tmp_path / "x", several(TUNED, BASE))
    regions: list[dict[str, float]] = [
        {"above": 0.4},
        {"above": 0.5},
        {"below": 0.55},
        {"above": 0.7},
        {"above": 0.2, "below": 0.3},
    ]
    claims = [
        claim(id=f"p1-{i}", criteria=[criterion(**region)]) for i, region in enumerate(regions)
    ]
    ledger = build_ledger([*claims, claim(id="p1-same", implied_by="so defined")], runs)
    outcomes = [entry.outcomes["embedded"] for entry in ledger.entries]
    for p, adjusted, tests in (
        ("p", "adjusted_p", ledger.tests),
        ("p_against", "adjusted_p_against", ledger.tests_against),
    ):
        tested = [o for o in outcomes if getattr(o, p) is not None]
        _, expected, _, _ = multipletests([getattr(o, p) for o in tested], method="holm")
        assert [getattr(o, adjusted) for o in tested] == pytest.approx(list(expected))
        assert len(tested) == tests
    assert (ledger.tests, ledger.tests_against) == (5, 6)


def test_one_number_of_several_that_lies_outside_is_tested_as_the_extreme_of_them(
    tmp_path: Path,
) -> None:
    runs = sweeps(tmp_path / "x", several(TUNED, BASE))
    three = [criterion(above=0.4), criterion(above=0.5), criterion(above=0.8)]
    outcome = only([claim(criteria=three)], runs).outcomes["embedded"]
    assert (outcome.verdict, outcome.p_against) == ("partly", 3 / 64)
    four = only([claim(criteria=[*three, criterion(above=0.3)])], runs).outcomes["embedded"]
    assert (four.verdict, four.p_against) == ("inconclusive", 4 / 64)


def test_what_has_not_run_is_not_tested_and_has_the_command(tmp_path: Path) -> None:
    outcomes = only([claim()], sweeps(tmp_path / "x", {})).outcomes
    assert outcomes["embedded"].verdict == outcomes["paper"].verdict == "not tested"
    assert outcomes["embedded"].reason == "table1: not run yet"
    assert outcomes["paper"].command == "hyperfit experiment=table1 scale=paper seed=0,1,2"


def test_what_is_tested_is_to_be_run_with_three_seeds() -> None:
    observed = criterion(value={"statistic": "max"}, above=0.5, observed=True)
    of_seeds = criterion(value={"experiment": "seeds", "epoch": "highest"}, above=5)
    for c, command in (
        (observed, "hyperfit experiment=table1"),
        (of_seeds, "hyperfit experiment=seeds"),
        (criterion(above=0.5), "hyperfit experiment=table1 seed=0,1,2"),
    ):
        outcomes = only([claim(criteria=[c])], Sweeps({})).outcomes
        assert outcomes["embedded"].command == command


def test_a_claim_about_another_model_is_shown_but_not_decided(tmp_path: Path) -> None:
    runs = sweeps(tmp_path / "x", several(TUNED, BASE))
    ledger = build_ledger([claim(judged_at=["paper"])], runs)
    outcome = ledger.entries[0].outcomes["embedded"]
    assert outcome.verdict == "not tested"
    assert outcome.evidence[0].estimate == pytest.approx(np.mean(TUNED) - np.mean(BASE))
    assert (outcome.p, ledger.tests) == (None, 0)


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
