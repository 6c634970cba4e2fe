"""The experiments that decide claims: their axes, and what their reports show."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from omegaconf import OmegaConf

from hyperfitting.config import conf_dir
from hyperfitting.reporting.claims.schema import Quantity, Scale
from hyperfitting.reporting.spec import (
    AgreementSpec,
    BarsSpec,
    ColumnSpec,
    CurvesSpec,
    FigureSpec,
    ImageGridSpec,
    LinePlotSpec,
    NextTokensSpec,
    PerLayerSpec,
    PerPositionSpec,
    ReportSpec,
    parse_report,
)


@dataclass(frozen=True)
class Part:
    """A table or figure of a report."""

    kind: Literal["table", "figure", "images"]
    name: str

    @property
    def label(self) -> str:
        """What a link to it is called."""
        return f"{self.kind} {self.name}"

    @property
    def file(self) -> str:
        """Its file in the folder of the report."""
        return f"{self.name}.md" if self.kind == "table" else f"{self.name}.svg"

    @property
    def anchor(self) -> str:
        """Its id in the page of the report."""
        return f"{'table' if self.kind == 'table' else 'figure'}-{self.name}"


def parts_showing(quantity: Quantity) -> list[Part]:
    """Return the tables and figures of the experiment's report that show a quantity, or its texts.

    Raises:
        UserError: the experiment's report section is invalid.
    """
    report = _report(quantity.experiment)
    columns = itertools.chain.from_iterable(t.columns.values() for t in report.tables.values())
    longest = max((column.length for column in columns if column.length), default=None)
    if quantity.length == longest:  # which columns without a length are of
        quantity = quantity.model_copy(update={"length": None})
    tables = [
        Part("table", name)
        for name, table in report.tables.items()
        if any(_is_of(column, quantity, longest) for column in table.columns.values())
    ]
    figures = [
        Part("images" if isinstance(figure, ImageGridSpec) else "figure", name)
        for name, figure in report.figures.items()
        if _shows(figure, quantity, longest)
    ]
    return tables + figures


def has_seed_axis(experiment: str, scale: Scale) -> bool:
    """Return whether an experiment runs several seeds by itself at a scale."""
    sweeper = _sweeper(experiment)
    of_scale = (sweeper.get("scales") or {}).get(scale) or {}
    return any("seed" in (part.get("axes") or {}) for part in (sweeper, of_scale))


@cache
def _report(experiment: str) -> ReportSpec:
    return parse_report(_sweeper(experiment)["report"])


@cache
def _sweeper(experiment: str) -> Mapping[str, Any]:
    values: Any = OmegaConf.to_container(
        OmegaConf.load(conf_dir() / "experiment" / f"{experiment}.yaml")
    )
    return dict(values["hydra"]["sweeper"])


def _is_of(column: ColumnSpec, quantity: Quantity, longest: int | None) -> bool:
    """Return whether a column has the numbers of a quantity, over all texts.

    Args:
        column: of a table or figure.
        quantity: whose length is None where it is the longest.
        longest: length of the continuations in the report.
    """
    fields = ("key", "statistic", "spearman")
    same = all(getattr(column, name) == getattr(quantity, name) for name in fields)
    same &= (None if column.length == longest else column.length) == quantity.length
    same_texts = (column.side == "reference") == (quantity.side == "reference")
    is_whole = column.dataset is None and column.minus is None
    return same and same_texts and is_whole and quantity.epoch is None


def _shows(figure: FigureSpec, quantity: Quantity, longest: int | None) -> bool:
    if isinstance(figure, BarsSpec | LinePlotSpec):
        return any(_is_of(column, quantity, longest) for column in figure.y.values())
    if isinstance(figure, CurvesSpec) and quantity.epoch is not None:
        return quantity.key in figure.series
    return isinstance(figure, ImageGridSpec) or _derived_from(figure) == quantity.key


def _derived_from(figure: FigureSpec) -> str | None:
    """Return the key of the derived quantity that a figure has the values of; none: of no such."""
    match figure:
        case CurvesSpec():
            return "fit_to_peak"
        case AgreementSpec():
            return "top1_agreement"
        case NextTokensSpec():
            return "unseen_probability"
        case PerPositionSpec(series=series) if "gen/ttr_last_96" in series:
            return "ttr_fall_96"
        case PerLayerSpec(panels=panels) if "reference/cosine" in itertools.chain(*panels.values()):
            return "early_cosine"
        case _:
            return None
