"""claims.json: every claim with its verdict at each scale, computed from the records.

- reproduced: all numbers lie where the claim has them, with an adjusted p-value below 0.05 (a claim
  that something occurs needs no test);
- not reproduced: none does, and that they do is rejected with an adjusted p-value below 0.05;
- partly: the same, while some of several do;
- inconclusive: all else, and every test of fewer than `MIN_SEEDS` trainings;
- implied: all do, but by construction or by the number of another claim: not counted as evidence;
- not tested: no number here, or one of another model than the claim is about.

Both p-values of a claim are adjusted by Holm's method, each over all claims that have one at any
scale: the probability of any wrong "reproduced" is at most 0.05, and that of any wrong "not
reproduced" or "partly". Of K criteria (and models) the p-value for the claim is the largest, since
all must hold, and that against it K times the smallest (Bonferroni), since one is enough. Implied
claims have no p-value for them, and one against them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

from pydantic import Field

from hyperfitting.metrics.multiple_tests import holm
from hyperfitting.reporting.claims.evidence import MIN_SEEDS, Evidence, evaluate_criterion
from hyperfitting.reporting.claims.experiments import has_seed_axis
from hyperfitting.reporting.claims.quantities import NotMeasuredError
from hyperfitting.reporting.claims.schema import SCALES, Claim, Criterion, Scale
from hyperfitting.reporting.claims.sweeps import CountedSweep, Sweeps
from hyperfitting.runtime.files import read_versioned
from hyperfitting.runtime.strict_model import StrictModel

LEDGER_VERSION = 7
LEVEL = 0.05
Verdict = Literal["reproduced", "partly", "not reproduced", "inconclusive", "implied", "not tested"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)


class Outcome(StrictModel):
    """A claim's verdict at a scale, and what it follows from."""

    verdict: Verdict = Field(default="not tested", description="see docs/claims.md")
    reason: str = Field(default="", description="why it is not tested; empty: it is")
    command: str = Field(default="", description="what would test it; empty: it is")
    implied_by: str = Field(default="", description="what it follows from; empty: its own test")
    p: float | None = Field(
        default=None, description="that it does not hold, largest of its criteria; null: none"
    )
    adjusted_p: float | None = Field(
        default=None, description="by Holm's method over all claims with `p`; null: none"
    )
    p_against: float | None = Field(
        default=None, description="that it holds, by Bonferroni over its criteria; null: none"
    )
    adjusted_p_against: float | None = Field(
        default=None, description="by Holm's method over all claims with `p_against`; null: none"
    )
    evidence: list[Evidence] = Field(
        default=[], description="by criterion, and by model if there are several"
    )

    @property
    def is_outside(self) -> bool:
        """Whether a number that decides lies outside the claimed region, certainly or not."""
        return self.verdict != "not tested" and any(not item.holds for item in self.evidence)


class Entry(StrictModel):
    """A claim and its outcomes."""

    id: str = Field(description="its id in conf/claims.yaml")
    paper: str = Field(description="`P1` or `P2`")
    source: str = Field(description="table, figure or section")
    claim: str = Field(description="in our words")
    theirs: str = Field(description="the published numbers")
    outcomes: dict[Scale, Outcome] = Field(description="by scale")
    reading: str = Field(
        description="what is said of it while a number of ours lies outside the claimed region"
    )

    @property
    def is_outside(self) -> bool:
        """Whether a number lies outside the claimed region at some scale."""
        return any(outcome.is_outside for outcome in self.outcomes.values())


class Ledger(StrictModel):
    """All claims."""

    version: int = Field(default=LEDGER_VERSION, description="of this format")
    counted: list[CountedSweep] = Field(
        default=[], description="of the experiments with several sweeps: the newest complete one"
    )
    tests: int = Field(description="claims with `p`, at any scale: a family of Holm")
    tests_against: int = Field(description="claims with `p_against`: the other family")
    entries: list[Entry] = Field(description="in the order of conf/claims.yaml")

    @property
    def kept(self) -> int:
        """Claims with evidence of an earlier ledger."""
        return sum(
            any(item.kept for outcome in entry.outcomes.values() for item in outcome.evidence)
            for entry in self.entries
        )

    def counts(self, scale: Scale) -> dict[Verdict, int]:
        """Return how many claims have each verdict at a scale."""
        verdicts = [entry.outcomes[scale].verdict for entry in self.entries]
        return {verdict: verdicts.count(verdict) for verdict in VERDICTS}


def read_ledger(path: Path) -> Ledger:
    """Return the ledger in a claims.json.

    Raises:
        UserError: there is none, it is invalid, or of another version.
    """
    return read_versioned(
        path,
        Ledger,
        "version",
        LEDGER_VERSION,
        field="--to",
        value=path.parent,
        hint="without --update all claims are computed from the sweeps given",
    )


def build_ledger(claims: Sequence[Claim], sweeps: Sweeps, earlier: Ledger | None = None) -> Ledger:
    """Return all claims with their verdicts.

    Args:
        claims: those of conf/claims.yaml.
        sweeps: the runs that decide them.
        earlier: a ledger whose evidence is kept for criteria that these runs do not measure;
            verdicts and adjusted p-values are computed again.

    Raises:
        UserError: a record is damaged.
    """
    kept = {
        (entry.id, scale): outcome.evidence
        for entry in (earlier.entries if earlier else ())
        for scale, outcome in entry.outcomes.items()
    }
    outcomes = {
        (claim.id, scale): _outcome(claim, sweeps, scale, kept.get((claim.id, scale), ()))
        for claim in claims
        for scale in SCALES
    }
    adjusted = _adjusted({key: outcome.p for key, outcome in outcomes.items()})
    against = _adjusted({key: outcome.p_against for key, outcome in outcomes.items()})
    entries = [
        Entry(
            id=claim.id,
            paper=claim.paper,
            source=claim.source,
            claim=claim.claim,
            theirs=claim.theirs,
            outcomes={
                scale: _decided(
                    outcomes[claim.id, scale],
                    adjusted.get((claim.id, scale)),
                    against.get((claim.id, scale)),
                )
                for scale in SCALES
            },
            reading=claim.reading,
        )
        for claim in claims
    ]
    counted = [
        sweep
        for sweep in (earlier.counted if earlier else ())
        if (sweep.experiment, sweep.scale) not in sweeps.runs_of
    ]
    return Ledger(
        counted=[*counted, *sweeps.counted],
        tests=len(adjusted),
        tests_against=len(against),
        entries=entries,
    )


def _adjusted(p_values: Mapping[tuple[str, Scale], float | None]) -> dict[tuple[str, Scale], float]:
    """Return the p-values of the claims that have one, adjusted by Holm's method."""
    tested = {key: p for key, p in p_values.items() if p is not None}
    return dict(zip(tested, holm(list(tested.values())), strict=True))


def _outcome(claim: Claim, sweeps: Sweeps, scale: Scale, earlier: Sequence[Evidence]) -> Outcome:
    """Return a claim's evidence; its verdict waits for the adjusted p-values of all claims."""
    if claim.not_tested:
        return Outcome(reason=claim.not_tested, command=claim.command)
    if not claim.criteria:
        return Outcome(implied_by=claim.implied_by)
    criteria = claim.criteria_at(scale)
    if not criteria:
        return Outcome(reason="not at this scale")
    try:
        evidence = [
            item
            for criterion in criteria
            for item in _evidence(criterion, sweeps, scale, claim.model, earlier)
        ]
    except NotMeasuredError as error:
        return Outcome(reason=str(error), command=claim.command or _command(criteria, scale))
    if scale not in claim.judged_at:
        return Outcome(
            reason="other models and protocol than the claim's: shown for comparison",
            command=_command(criteria, "paper"),
            evidence=evidence,
        )
    p_values = [item.p for item in evidence if item.p is not None]
    against = [item.p_against for item in evidence if item.p_against is not None]
    return Outcome(
        implied_by=claim.implied_by if all(item.holds for item in evidence) else "",
        p=None if claim.implied_by else max(p_values, default=None),
        p_against=min(1.0, len(against) * min(against)) if against else None,
        evidence=evidence,
    )


def _evidence(
    criterion: Criterion,
    sweeps: Sweeps,
    scale: Scale,
    model: str | None,
    earlier: Sequence[Evidence],
) -> list[Evidence]:
    """Return what the runs say of a criterion, by model, with the earlier evidence of other models.

    Earlier evidence is also kept while the sweep that would replace it is not complete.

    Raises:
        NotMeasuredError: there is neither.
    """
    kept = {
        item.model: item.model_copy(update={"kept": True})
        for item in earlier
        if item.criterion == criterion
    }
    try:
        measured = {item.model: item for item in _measured(criterion, sweeps, scale, model)}
    except NotMeasuredError:
        if not kept:
            raise
        return list(kept.values())
    if (criterion.value.experiment, scale) in sweeps.incomplete:
        return list((measured | kept).values())
    return list((kept | measured).values())


def _measured(
    criterion: Criterion, sweeps: Sweeps, scale: Scale, model: str | None
) -> list[Evidence]:
    runs = sweeps.by_model(criterion.value, scale, model)
    others = None
    if criterion.minus is not None:
        others = sweeps.by_model(criterion.value.changed(criterion.minus), scale, model)
    return [
        evaluate_criterion(
            criterion, by_seed, None if others is None else others.get(name, {}), name
        )
        for name, by_seed in runs.items()
    ]


def _command(criteria: Sequence[Criterion], scale: Scale) -> str:
    """Return the commands that measure some criteria, with the seeds that a verdict needs."""
    suffix = " scale=paper" if scale == "paper" else ""
    tested = {criterion.value.experiment for criterion in criteria if not criterion.needs_no_test}
    commands = []
    for experiment in dict.fromkeys(criterion.value.experiment for criterion in criteria):
        command = f"hyperfit experiment={experiment}{suffix}"
        if experiment in tested and not has_seed_axis(experiment, scale):
            command += f" seed={','.join(map(str, range(MIN_SEEDS)))}"
        commands.append(command)
    return "; ".join(commands)


def _decided(outcome: Outcome, adjusted_p: float | None, against: float | None) -> Outcome:
    """Return an outcome with its verdict and the adjusted p-values that it depends on."""
    if outcome.reason:
        return outcome
    return outcome.model_copy(
        update={
            "verdict": _verdict(outcome, adjusted_p, against),
            "adjusted_p": adjusted_p,
            "adjusted_p_against": against,
        }
    )


def _verdict(outcome: Outcome, adjusted_p: float | None, against: float | None) -> Verdict:
    """Return the verdict of a claim that has evidence, or is implied."""
    if outcome.implied_by:
        return "implied"
    evidence = outcome.evidence
    if not all(item.has_enough_seeds for item in evidence):
        return "inconclusive"
    holding = [item.holds for item in evidence]
    is_tested = not any(item.is_untested for item in evidence)
    if all(holding) and is_tested and (adjusted_p is None or adjusted_p < LEVEL):
        return "reproduced"
    if any(item.is_refuted for item in evidence) or (against is not None and against < LEVEL):
        return "partly" if any(holding) else "not reproduced"
    return "inconclusive"
