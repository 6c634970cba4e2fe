"""conf/claims.yaml: what both papers claim, and which numbers of ours decide it.

A claim has criteria. Each is a number of some runs, or a difference of two, and the region in which
it lies if the claim holds: `above`, `below`, or both. Claims without a measurement here have the
reason instead.
"""

from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field, ValidationError, field_validator, model_validator
from yaml import YAMLError

from hyperfitting.config import conf_dir
from hyperfitting.errors import UserError, near_matches
from hyperfitting.metrics.registry import METRICS, metric
from hyperfitting.record.schema import Side
from hyperfitting.runtime.files import first_problem
from hyperfitting.runtime.strict_model import StrictModel

CLAIMS_FILE = "claims.yaml"
Scale = Literal["embedded", "paper"]
SCALES: tuple[Scale, ...] = ("embedded", "paper")
DERIVED = {
    "top1_agreement": "same top-1 token in two runs",
    "ttr_first_96": "type-token ratio of the first 96 tokens",
    "ttr_fall_96": "type-token ratio of the first 96 tokens less that of the last 96",
    "unseen_probability": "highest probability of an unseen token",
    "early_cosine": "lowest cosine similarity after the first 10/22 of the blocks",
    "fit_to_peak": "epochs from a training loss below 0.1 to the highest type-token ratio",
}
"""Labels of quantities that are no metrics, by key; `quantities.py` has their definitions."""


class Change(StrictModel):
    """In what the number that is subtracted differs from the other."""

    labels: dict[str, str] = Field(default={}, description="labels of its runs, by axis")
    key: str | None = Field(default=None, description="metric")
    side: Side | None = Field(default=None, description="`tuned`, `base` or `reference`")
    epoch: Literal["first", "last"] | int | None = Field(default=None, description="of the history")


class Quantity(StrictModel):
    """A number of the runs of an experiment."""

    experiment: str = Field(description="file of `experiments/`, such as `table1`")
    labels: dict[str, str | list[str]] = Field(
        default={}, description="labels of the runs, by axis; several only for `top1_agreement`"
    )
    key: str = Field(description="metric, or a key of `DERIVED`")
    length: int | None = Field(default=None, description="new tokens; null: all")
    side: Side = Field(default="tuned", description="`tuned`, `base` or `reference`")
    statistic: Literal["mean", "max"] = Field(default="mean", description="over texts")
    epoch: Literal["first", "last", "highest"] | int | None = Field(
        default=None,
        description="the number is the metric after this epoch of the training, on the validation "
        "sequences, such as `first` or 2; `highest`: the epoch at which it is highest",
    )
    spearman: str | None = Field(
        default=None,
        description="config field with which the metric is correlated over the runs that set it",
    )

    @field_validator("key")
    @classmethod
    def _check_key(cls, key: str) -> str:
        return _known(key, "metric", [*METRICS, *DERIVED])

    @field_validator("experiment")
    @classmethod
    def _check_experiment(cls, experiment: str) -> str:
        names = [path.stem for path in (conf_dir() / "experiment").glob("*.yaml")]
        return _known(experiment, "experiment", sorted(names))

    @property
    def label(self) -> str:
        """What it is called, without its runs."""
        label = DERIVED.get(self.key) or metric(self.key).label
        if self.statistic == "max":
            label = f"highest {label}"
        if self.epoch == "highest":
            label = f"epoch of the highest {label}"
        if self.spearman is not None:
            label = f"Spearman correlation of {label}"
        return label

    @property
    def format(self) -> str:
        """How its number is written."""
        if self.key == "fit_to_peak":
            return "{:+.1f}"
        return "{:.0f}" if self.epoch == "highest" else metric(self.key).format

    @property
    def where(self) -> str:
        """Which runs, side and epoch it is of, where there are several."""
        parts = [name for name in self.labels.values() if isinstance(name, str)]
        if self.side != "tuned":
            parts = [self.side]
        if self.epoch in ("first", "last"):
            parts.append(f"{self.epoch} epoch")
        elif self.epoch not in (None, "highest"):
            parts.append(f"epoch {self.epoch}")
        return ", ".join(parts)

    def changed(self, change: Change) -> "Quantity":
        """Return the quantity that is subtracted."""
        changes = {name: value for name, value in change if value is not None}
        labels = {**self.labels, **change.labels}
        return Quantity.model_validate(self.model_dump() | changes | {"labels": labels})


class Criterion(StrictModel):
    """A number, or a difference of two, and where it lies if the claim holds."""

    value: Quantity = Field(description="the number")
    minus: Change | None = Field(default=None, description="what is subtracted; null: nothing")
    above: float | None = Field(default=None, description="lower end of the region; null: open")
    below: float | None = Field(default=None, description="upper end of the region; null: open")
    scale: Scale | None = Field(default=None, description="the only scale it applies to; null: all")
    observed: bool = Field(
        default=False,
        description="the claim is that something occurs: one observation shows it, without a test",
    )
    universal: bool = Field(
        default=False,
        description="the claim is that something never occurs: one observation refutes it, without "
        "a test",
    )

    @model_validator(mode="after")
    def _check_region(self) -> "Criterion":
        if self.above is None and self.below is None:
            raise ValueError("above, below, or both must be given")
        if self.above is not None and self.below is not None and self.above >= self.below:
            raise ValueError("above must be less than below")
        if self.observed and self.universal:
            raise ValueError("observed and universal exclude each other")
        if self.minus is not None and self.value.spearman is not None:
            raise ValueError("nothing can be subtracted from a rank correlation")
        return self

    @property
    def needs_no_test(self) -> bool:
        """Whether single observations decide."""
        return self.observed or self.universal

    @property
    def is_tuned_minus_base(self) -> bool:
        """Whether the number is the tuned minus the base model's, of the same run."""
        return (
            self.minus is not None
            and self.minus.model_fields_set == {"side"}
            and (self.value.side, self.minus.side) == ("tuned", "base")
            and self.value.epoch is None
            and self.value.statistic == "mean"
        )

    @property
    def label(self) -> str:
        """What the number is called."""
        label = self.value.label
        if self.minus is None:
            return f"{label} ({self.value.where})" if self.value.where else label
        subtracted = self.value.changed(self.minus)
        if subtracted.key != self.value.key:
            return f"{label} − {subtracted.label}"
        return f"{label} ({self.value.where or 'tuned'} − {subtracted.where})"

    def holds(self, number: float) -> bool:
        """Return whether a number lies in the region."""
        return (self.above is None or number > self.above) and (
            self.below is None or number < self.below
        )

    def overlaps(self, low: float, high: float) -> bool:
        """Return whether a part of an interval lies in the region."""
        return (self.above is None or high > self.above) and (
            self.below is None or low < self.below
        )


class Claim(StrictModel):
    """A claim of a paper."""

    id: str = Field(pattern=r"^p[12](-[a-z0-9]+)+$", description="P1 or P2, and a name")
    source: str = Field(min_length=1, description="table, figure or section")
    claim: str = Field(min_length=1, description="in our words")
    theirs: str = Field(default="", description="the published numbers, with their model")
    model: str | None = Field(
        default=None, description="label of the model at scale=paper; null: any that was run"
    )
    judged_at: list[Scale] = Field(
        default=list(SCALES),
        description="scales at which it is decided; elsewhere our number is only shown",
    )
    criteria: list[Criterion] = Field(default=[], description="all must hold")
    implied_by: str = Field(
        default="",
        description="why its criteria are no evidence of their own where they hold: true by "
        "construction, or the number of another claim; without criteria: the computation from "
        "which it follows, without records",
    )
    not_tested: str = Field(default="", description="why nothing here measures it")
    command: str = Field(default="", description="what would test it")
    reading: str = Field(
        default="", description="what is to be said of it while a number lies outside the region"
    )

    @model_validator(mode="after")
    def _check_tested(self) -> "Claim":
        if bool(self.criteria or self.implied_by) == bool(self.not_tested):
            raise ValueError("either criteria, implied_by or not_tested must be given")
        return self

    @property
    def paper(self) -> str:
        """The paper: P1 or P2."""
        return self.id[:2].upper()

    def criteria_at(self, scale: Scale) -> list[Criterion]:
        """Return the criteria that apply at a scale."""
        return [c for c in self.criteria if c.scale in (None, scale)]


class _Claims(StrictModel):
    claims: list[dict[str, Any]]


def read_claims(path: Path | None = None) -> list[Claim]:
    """Return all claims; by default those that come with this software.

    Raises:
        UserError: the file cannot be read, or a claim is invalid: the message has its id and field.
    """
    path = path or conf_dir() / CLAIMS_FILE
    try:
        content = _Claims.model_validate(OmegaConf.to_container(OmegaConf.load(path)))
        claims = [_parsed(values, path) for values in content.claims]
    except (OSError, ValueError, YAMLError, OmegaConfBaseException) as error:
        problem = first_problem(error) if isinstance(error, ValidationError) else str(error)
        raise UserError(f"is not valid: {problem}", field="claims", value=path) from error
    ids = [claim.id for claim in claims]
    repeated = sorted({name for name in ids if ids.count(name) > 1})
    if repeated:
        raise UserError(f"has an id twice: {', '.join(repeated)}", field="claims", value=path)
    return claims


def _parsed(values: dict[str, Any], path: Path) -> Claim:
    try:
        return Claim.model_validate(values)
    except ValidationError as error:
        problem = f"{values.get('id', 'a claim without id')}: {first_problem(error)}"
        raise UserError(f"is not valid: {problem}", field="claims", value=path) from error


def _known(name: str, kind: str, names: list[str]) -> str:
    if name not in names:
        raise ValueError(f"no {kind} {name!r}; {near_matches(name, names) or ', '.join(names)}")
    return name
