"""preference.json: the analysis of a study, as typed, versioned classes; tables and pages read it.

It lies in the study's folder, beside the task and the judgments that it is made of. Shares are
between 0 and 1, of judgments of normal items: no checks, no repeats.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from hyperfitting.metrics.estimate import Estimate
from hyperfitting.preference.items import ANALYSIS_FILE, Aspect, Choice, Form, Origin
from hyperfitting.runtime.files import read_versioned, write_json
from hyperfitting.runtime.strict_model import StrictModel

ANALYSIS_VERSION = 1
PEOPLE, SCRIPTS = "people", "scripts"


class System(StrictModel):
    """Who wrote a text: a side of a run."""

    run: str = Field(description="name of the run")
    side: str = Field(description="`tuned`, `base` or `reference`")


class Comparison(StrictModel):
    """One system against another, over one evaluation dataset (or all) at one length."""

    first: System = Field(description="the system that the shares are of")
    second: System = Field(description="what it is compared with")
    dataset: str | None = Field(description="evaluation dataset; null: all")
    length: int = Field(description="new tokens of the texts, before they were cut at a word")
    items: int = Field(description="items that were judged")
    annotators: int = Field(description="annotators who judged them")
    wins: int = Field(description="judgments that prefer the first")
    ties: int = Field(description="judgments 'equally good'")
    both_bad: int = Field(description="judgments 'both are bad'")
    losses: int = Field(description="judgments that prefer the second")
    preferred_or_equal: Estimate = Field(
        description="share preferred or equally good, as P1 reports it; 'both are bad' counts as "
        "equal"
    )
    preferred: Estimate = Field(description="share of wins")
    tied: Estimate = Field(description="share of ties, 'both are bad' included")
    aspects: dict[Aspect, Estimate] = Field(
        description="by aspect, share of the answers that prefer the first or find both equal"
    )
    alpha: Estimate | None = Field(description="Krippendorff's alpha of these judgments")

    @property
    def judgments(self) -> int:
        """All judgments."""
        return self.wins + self.ties + self.both_bad + self.losses


class Agreement(StrictModel):
    """Agreement over all items with two judgments or more; null: undefined."""

    alpha: Estimate | None = Field(description="Krippendorff's alpha, nominal")
    kappa: Estimate | None = Field(
        description="Fleiss' kappa, over the items with the most frequent number of judgments"
    )


class Strength(StrictModel):
    """A system's strength by Bradley-Terry with ties."""

    system: System = Field(description="the system; all references are one")
    log_strength: Estimate = Field(description="natural logarithm; the mean over systems is 0")


class AnnotatorSummary(StrictModel):
    """One annotator."""

    name: str = Field(description="their name in the task")
    judgments: int = Field(description="of all kinds of items")
    median_seconds: float | None = Field(description="time per item; null: not known")
    left_share: float | None = Field(description="share of left among preferences (ties apart)")
    preferences: int = Field(description="judgments that prefer a side")
    failed_checks: int = Field(description="attention checks and gold items answered wrongly")
    checks: int = Field(description="attention checks and gold items answered")
    consistent_repeats: int = Field(description="repeats answered as the first time")
    repeats: int = Field(description="repeats answered")
    agreement: float | None = Field(
        description="share of the other annotators' judgments of the same items that are the same"
    )
    excluded: list[str] = Field(description="why the task's rule excludes them; empty: it does not")


class Correlation(StrictModel):
    """How well a metric predicts preference."""

    metric: str = Field(description="key of the metric")
    spearman: Estimate = Field(
        description="rank correlation, over items, of the first text's metric minus the second's "
        "with the mean judgment; interval: bootstrap over contexts"
    )


class Group(StrictModel):
    """The judgments of people, of scripts, or of one judge; they are never mixed.

    Of a judge only the items count that it was asked about in both orders.
    """

    who: str = Field(description="`people`, `scripts` or `judge:MODEL`")
    judgments: int = Field(description="of all kinds of items")
    comparisons: list[Comparison] = Field(description="by pair of systems, length and dataset")
    comparisons_without_excluded: list[Comparison] = Field(
        description="the same without the annotators whom the task's rule excludes"
    )
    with_ties: Agreement = Field(description="agreement, a tie being an answer like the others")
    without_ties: Agreement = Field(description="agreement of the judgments that prefer a text")
    strengths: list[Strength] = Field(description="strongest first; empty: there is no estimate")
    tie_parameter: float | None = Field(description="v of Davidson's model; 0: no ties")
    left: Estimate | None = Field(description="share of left among preferences: 0.5 is unbiased")
    flip_rate: Estimate | None = Field(
        description="of a judge: share of items answered differently with the sides swapped"
    )
    refused: str = Field(description="why tables show no number of it; empty: they do")
    annotators: list[AnnotatorSummary] = Field(description="by name")
    correlations: list[Correlation] = Field(description="strongest first")

    def comparison(
        self, run: str, length: int, dataset: str | None, side: str = "tuned"
    ) -> Comparison | None:
        """Return a run against the reference, if that was asked."""
        for comparison in self.comparisons:
            is_of_run = comparison.first == System(run=run, side=side)
            if (
                is_of_run
                and comparison.second.side == "reference"
                and (comparison.length, comparison.dataset) == (length, dataset)
            ):
                return comparison
        return None


class ItemVotes(StrictModel):
    """How one item was judged."""

    first: Origin = Field(description="where the first text comes from")
    second: Origin = Field(description="where the second text comes from")
    length: int = Field(description="new tokens of the texts")
    votes: dict[str, dict[Choice, int]] = Field(description="by `who`, judgments by choice")


class Analysis(StrictModel):
    """The analysis of a study."""

    analysis_version: int = Field(description=f"version of this format: {ANALYSIS_VERSION}")
    task: str = Field(description="hash of the task")
    sweep: str = Field(description="name of the sweep")
    form: Form = Field(description="form of the question")
    texts: dict[str, str] = Field(description="`Task.texts`: which texts were judged")
    resamples: int = Field(description="of each bootstrap")
    seed: int = Field(description="of the resampling")
    left_out: list[str] = Field(description="judgments that do not belong to the task, and why")
    groups: list[Group] = Field(description="people, scripts, then each judge")
    items: list[ItemVotes] = Field(description="every judged normal item")

    def group(self, who: str) -> Group | None:
        """Return the judgments of people, scripts or one judge, if there are any."""
        return next((group for group in self.groups if group.who == who), None)

    @property
    def annotated(self) -> Group | None:
        """The judgments that tables show: of people, or else of scripts, which they say."""
        return self.group(PEOPLE) or self.group(SCRIPTS)

    @property
    def judges(self) -> list[Group]:
        """The judgments of each model."""
        return [group for group in self.groups if group.who not in (PEOPLE, SCRIPTS)]

    @property
    def summary(self) -> str:
        """Who judged how much."""
        parts = []
        for group in self.groups:
            excluded = [annotator.name for annotator in group.annotators if annotator.excluded]
            by = f"{len(group.annotators)} {group.who}"
            if group.who not in (PEOPLE, SCRIPTS):
                by = f"{group.who}, a model" + f" (refused: {group.refused})" * bool(group.refused)
            rule = f" (the task's rule would exclude {', '.join(excluded)})" if excluded else ""
            parts.append(f"{group.judgments} judgments by {by}{rule}")
        return f"task {self.task}: {'; '.join(parts)}"


def write_analysis(folder: Path, analysis: Analysis) -> None:
    """Write an analysis atomically into its study's folder."""
    values: Mapping[str, Any] = analysis.model_dump(mode="json")
    write_json(folder / ANALYSIS_FILE, values)


def read_analysis(folder: Path) -> Analysis | None:
    """Return the analysis in a study's folder; None: there is none.

    Raises:
        UserError: it is damaged, or of another version.
    """
    path = folder / ANALYSIS_FILE
    if not path.is_file():
        return None
    return read_versioned(
        path,
        Analysis,
        "analysis_version",
        ANALYSIS_VERSION,
        field="preference",
        value=path,
        hint="hyperfit-preference analyze writes it again",
    )
