"""The report section of an experiment (`hydra.sweeper.report`), as typed, checked classes.

    title, about
    tables:  {NAME: {caption, rows: [AXIS, …], columns: {HEADING: COLUMN}, published, source}}
    figures: {NAME: {kind: KIND, caption, …}}

A COLUMN is one number of each row's runs: a metric's mean with its interval, by default over all
evaluation texts at their full length. An error names the field, such as
`hydra.sweeper.report.tables.NAME.columns.HEADING.key`. (One file: the classes are the documentation
of the section.)
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from hyperfitting.errors import UserError, no_such
from hyperfitting.metrics.registry import metric
from hyperfitting.record.schema import Side

SECTION = "hydra.sweeper.report"
_FORMAT = re.compile(r"\{:\+?\.\d[fe%]\}")
_EXCLUDED_BY_MINUS = ("length", "dataset", "statistic")
_EXCLUDED_BY_TASK = ("length", "dataset", "statistic", "minus")
_EXCLUDED_BY_SPEARMAN = ("statistic", "minus")


def _check_format(form: str) -> str:
    if not _FORMAT.fullmatch(form):
        raise ValueError("is no format of a number, such as {:.3f}, {:+.2f}, {:.1e} or {:.0%}")
    return form


NumberFormat = Annotated[str, AfterValidator(_check_format)]
"""`{:.3f}` and the like: an optional +, the digits after the point, and `f`, `e` or `%`."""


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)


_Parsed = TypeVar("_Parsed", bound=_Spec)


class ColumnSpec(_Spec):
    """Which number stands in a column of a table, or on an axis of a figure."""

    key: str
    """Metric, such as `gen/ttr`; those of the training (`train/`) are of its last epoch."""
    length: int | None = None
    """Length of the continuations, in tokens; none: the longest."""
    dataset: str | None = None
    """Evaluation dataset, or `chat`: the answers to open questions; none: all texts."""
    side: Side = "tuned"
    """The tuned model, the base model, or the reference texts."""
    scale: float = 1
    """The number is multiplied by this, such as 100 for percent."""
    format: NumberFormat | None = None
    """Such as `{:.1f}`; none: the metric's own format."""
    statistic: Literal["mean", "max"] = "mean"
    """Over the texts; `max` reads the full length of all datasets."""
    minus: dict[str, str] | None = None
    """Labels, by axis, in which the run differs that is subtracted, paired by text."""

    @field_validator("minus")
    @classmethod
    def _check_minus(
        cls, minus: dict[str, str] | None, info: ValidationInfo
    ) -> dict[str, str] | None:
        for name in _EXCLUDED_BY_MINUS if minus is not None else ():
            if info.data.get(name) != cls.model_fields[name].default:
                raise ValueError(f"pairs all texts at their full length: {name} cannot be set")
        return minus

    task: str | None = None
    """Downstream task or group, as `evaluation.downstream` names it, of a metric `down/…`; none:
    the questions of all tasks."""

    @field_validator("task")
    @classmethod
    def _check_task(cls, task: str | None, info: ValidationInfo) -> str | None:
        if task is not None and not str(info.data.get("key")).startswith("down/"):
            raise ValueError("only metrics down/… are of tasks")
        for name in _EXCLUDED_BY_TASK if task is not None else ():
            if info.data.get(name) != cls.model_fields[name].default:
                raise ValueError(f"is over the questions of a task: {name} cannot be set")
        return task

    spearman: str | None = None
    """A config field, such as `decode.control.strength`: the number is the rank correlation
    (Spearman's rho) of the metric with it, over the runs of the row that set it."""

    @field_validator("spearman")
    @classmethod
    def _check_spearman(cls, spearman: str | None, info: ValidationInfo) -> str | None:
        for name in _EXCLUDED_BY_SPEARMAN if spearman is not None else ():
            if info.data.get(name) != cls.model_fields[name].default:
                raise ValueError(f"correlates the runs' means: {name} cannot be set")
        return spearman

    @property
    def number_format(self) -> str:
        """The format of its numbers."""
        return self.format or metric(self.key).format


class TableSpec(_Spec):
    """A table: a row for each combination of labels, a column for each number."""

    rows: list[str]
    """Axes of the sweep."""
    columns: dict[str, ColumnSpec]
    """By heading."""
    caption: str = ""
    published: list[dict[str, str]] = []
    """Published numbers: a row's labels by axis, and numbers by heading."""
    source: str = ""
    """Of the published numbers."""


class _Figure(_Spec):
    caption: str = ""


class CurvesSpec(_Figure):
    """The training history over epochs, a panel for each metric."""

    kind: Literal["curves"]
    series: list[str]
    """Metrics of the history."""
    lines: str | None = None
    """Axis: a line for each label, the mean over its runs with their range; none: for each run."""


class LinePlotSpec(_Figure):
    """Numbers over an axis of the sweep, a panel for each."""

    kind: Literal["line_plot"]
    x: str
    """Axis."""
    y: dict[str, ColumnSpec]
    """By label of the panel's vertical axis."""
    lines: str | None = None
    """Axis: a line for each label."""
    log_x: bool = False
    x_label: str | None = None


class BarsSpec(_Figure):
    """Numbers as horizontal bars, a panel for each."""

    kind: Literal["bars"]
    y: dict[str, ColumnSpec]
    """By label of the panel."""
    rows: str
    """Axis: a bar for each label."""


class ScatterSpec(_Figure):
    """Numbers against another number, a point for each label and a panel for each number."""

    kind: Literal["scatter"]
    x: ColumnSpec
    y: dict[str, ColumnSpec]
    """By label of the panel's vertical axis."""
    points: str
    """Axis."""
    x_label: str


class HistogramSpec(_Figure):
    """Lengths of the longest overlap with the training data."""

    kind: Literal["histogram"]
    lines: str | None = None
    """Axis: a line for each label; none: for each run."""


class PerPositionSpec(_Figure):
    """Means over texts at each step of the continuations."""

    kind: Literal["per_position"]
    series: list[str]
    """Metrics: `gen/entropy`, `gen/top1_mass`, `gen/ttr_last_96`, or of `mechanism.per_step`."""
    lines: str | None = None
    """Axis: a line for each label; none: for each run."""
    sides: list[Side] = Field(["tuned"], min_length=1)
    """Whose continuations, a line for each; metrics that compare both models have `tuned` alone."""
    window: int = Field(16, ge=1)
    """Steps of the moving average."""


class PerLayerSpec(_Figure):
    """Base and tuned model compared layer by layer (`mechanism.measures`), a panel for each kind of
    number."""

    kind: Literal["per_layer"]
    panels: dict[str, list[str]]
    """Keys of `mechanism.per_layer`, such as `reference/cosine`, by label of the panel's vertical
    axis."""
    lines: str | None = None
    """Axis: lines for each label; none: for each run."""


class RankShiftSpec(_Figure):
    """Which tokens the tuned model of the first run chooses instead of the base model's."""

    kind: Literal["rank_shift"]
    count: int = Field(12, ge=1)
    """Tokens that gain, and tokens that lose."""


class AgreementSpec(_Figure):
    """How often the tuned models of two runs have the same top-1 token, for every two."""

    kind: Literal["agreement"]
    axis: str


class RanksSpec(_Figure):
    """The rank of the reference token under the base and the tuned model."""

    kind: Literal["ranks"]
    lines: str | None = None
    """Axis: a line for each label; none: for each run."""


class NextTokensSpec(_Figure):
    """The most likely next tokens at some positions of one text, of both models."""

    kind: Literal["next_tokens"]
    dataset: str
    """Evaluation dataset, of which the first text is shown."""
    count: int = Field(3, ge=1)
    """Positions."""


class TextSpec(_Figure):
    """One continuation of each label, darker where it repeats itself."""

    kind: Literal["text"]
    rows: str
    """Axis."""
    dataset: str | None = None
    """Evaluation dataset; none: all."""
    number: int = Field(0, ge=0)
    """Index of the evaluation text within the dataset."""
    width: int = Field(92, ge=20)
    """Characters of a line."""


class ImageGridSpec(_Figure):
    """Images: contexts, their completions and the real images, a row for each context."""

    kind: Literal["image_grid"]
    columns: str | None = None
    """Axis: a column for each label, of its first run; none: for each run, and before it for its
    base model."""
    count: int = Field(8, ge=1)
    """Rows."""
    first: int = Field(0, ge=0)
    """Index of the first evaluation image."""


FigureSpec = (
    CurvesSpec
    | LinePlotSpec
    | BarsSpec
    | ScatterSpec
    | HistogramSpec
    | PerPositionSpec
    | PerLayerSpec
    | RankShiftSpec
    | AgreementSpec
    | RanksSpec
    | NextTokensSpec
    | TextSpec
    | ImageGridSpec
)
_FIGURES: dict[str, type[_Figure]] = {
    get_args(spec.model_fields["kind"].annotation)[0]: spec for spec in get_args(FigureSpec)
}
"""By kind."""


class ReportSpec(_Spec):
    """What the report of an experiment shows."""

    title: str | None = None
    """None: the sweep's name."""
    about: str = ""
    """A paragraph below the title."""
    tables: dict[str, TableSpec] = {}
    """By name of their files, which is not `curves`: that file has the figures' values."""

    @field_validator("tables")
    @classmethod
    def _check_tables(cls, tables: dict[str, TableSpec]) -> dict[str, TableSpec]:
        if "curves" in tables:
            raise ValueError("curves.csv has the values of figures: name the table otherwise")
        return tables

    figures: dict[str, FigureSpec] = {}
    """By name of their files."""


def parse_report(values: Mapping[str, Any]) -> ReportSpec:
    """Return the report section of an experiment, checked.

    Raises:
        UserError: a field is unknown or has an invalid value; the message names it.
    """
    tables = _parse_each(values.get("tables"), f"{SECTION}.tables", _parse_table)
    figures = _parse_each(values.get("figures"), f"{SECTION}.figures", _parse_figure)
    report = dict(values) | {"tables": tables, "figures": figures}
    return _validate(ReportSpec, report, SECTION)


def _parse_table(values: Mapping[str, Any], at: str) -> TableSpec:
    columns = {
        str(heading): _validate(ColumnSpec, column, f"{at}.columns.{heading}")
        for heading, column in _mapping(values.get("columns"), f"{at}.columns").items()
    }
    table = {name: value for name, value in values.items() if value is not None}
    return _validate(TableSpec, table | {"columns": columns}, at)


def _parse_figure(values: Mapping[str, Any], at: str) -> _Figure:
    kind = str(values.get("kind"))
    if kind not in _FIGURES:
        raise no_such("kind of figure", f"{at}.kind", kind, _FIGURES)
    figure = dict(values)
    if "y" in figure:
        figure["y"] = {
            str(label): _validate(ColumnSpec, column, f"{at}.y.{label}")
            for label, column in _mapping(figure["y"], f"{at}.y").items()
        }
    return _validate(_FIGURES[kind], figure, at)


def _parse_each(values: Any, at: str, parse: Any) -> dict[str, Any]:
    return {
        str(name): parse(_mapping(item, f"{at}.{name}"), f"{at}.{name}")
        for name, item in _mapping(values or {}, at).items()
    }


def _mapping(values: Any, at: str) -> Mapping[str, Any]:
    if not isinstance(values, Mapping):
        raise UserError("is not a mapping", field=at, value=values, valid="{NAME: …}")
    return values


def _validate(model: type[_Parsed], values: Any, at: str) -> _Parsed:
    try:
        return model.model_validate({str(name): v for name, v in _mapping(values, at).items()})
    except ValidationError as error:
        raise _as_user_error(error, model, at) from error


def _as_user_error(error: ValidationError, model: type[_Spec], at: str) -> UserError:
    # an unknown field may be a misspelling of the one that is missing
    first = min(error.errors(), key=lambda details: details["type"] != "extra_forbidden")
    path = [at, *map(str, first["loc"])]
    if first["type"] == "extra_forbidden":
        return no_such("field", at, path[-1], model.model_fields)
    value = None if first["type"] == "missing" else first["input"]
    return UserError(first["msg"].removeprefix("Value error, "), field=".".join(path), value=value)
