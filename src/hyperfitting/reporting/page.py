"""The page of an experiment: one HTML file, complete in itself, that opens offline.

Tables and figures as in the report, interactive curves and metrics, and every continuation beside
the others of its context. Text of data and models is escaped by the template, or inserted as text
by the script; the page's Content Security Policy allows no other script and loads nothing.
"""

import base64
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from plotly.offline import get_plotlyjs

from hyperfitting import formatting, templates
from hyperfitting.config import RunConfig
from hyperfitting.fields import changes_results
from hyperfitting.metrics.registry import METRICS, metric
from hyperfitting.reporting import tables
from hyperfitting.reporting.comparison import CAPTION, HEADINGS, comparison_rows
from hyperfitting.reporting.figures import RenderedFigure
from hyperfitting.reporting.repetition_highlight import SHADES
from hyperfitting.reporting.sweep_records import RunEntry, SweepRecords
from hyperfitting.reporting.texts import (
    IMAGE_METRICS,
    MIN_OVERLAP,
    TEXT_METRICS,
    Context,
    ContextTexts,
    all_contexts,
    rows_by_context,
    text_metrics,
    texts_by_context,
)

_PACKAGE = "hyperfitting.reporting"
"""Where the templates are."""
_CURVES = ("train/loss", "val/loss", "gen/ttr", "gen/rep_2", "val/entropy")
_SCATTER_X, _SCATTER_Y = ("gen/rep_2", "gen/ttr"), ("val/perplexity", "val/loss")
"""The metrics chosen at first: the first of these that there is."""
_CONTEXT_CHARACTERS = 60
"""Characters of a context in the list of contexts."""
_SECTIONS = {
    "tables": "Tables",
    "figures": "Figures",
    "curves": "Curves",
    "metrics": "Metric against metric",
    "answers": "Answers to questions",
    "texts": "Texts",
    "differences": "How the runs differ",
    "provenance": "How each number was made",
}


def render_page(
    sweep: SweepRecords,
    title: str,
    about: str,
    built: Sequence[tables.Table],
    rendered: Sequence[RenderedFigure],
) -> str:
    """Return the page of a sweep as HTML.

    Args:
        sweep: with the records that exist.
        title: of the report.
        about: a paragraph below the title.
        built: its tables.
        rendered: its figures.
    """
    contexts = all_contexts(sweep)
    keys = _metric_keys(sweep)
    in_history = {key for _, record in sweep.finished() for row in record.history for key in row}
    curves = [key for key in _CURVES if key in in_history]
    has_images = any(record.image is not None for _, record in sweep.finished())
    script, plotly = templates.source(_PACKAGE, "page.js"), get_plotlyjs()
    labels = {
        key: metric(key).axis_label for key in (*keys, *_CURVES, *TEXT_METRICS, *IMAGE_METRICS)
    }
    page = {
        "title": title,
        "about": about,
        "command": " ".join(sweep.spec.command),
        "hashes": [templates.csp_hash(content) for content in (plotly, script)],
        "plotly": plotly,
        "script": script,
        "runs": sweep.runs,
        "tables": [_table_context(table) for table in built],
        "figures": [
            {"name": figure.name, "caption": figure.caption, "source": _data_uri(figure.svg)}
            for figure in rendered
            if figure.svg
        ],
        "curves": curves,
        "metrics": keys,
        "x": next((key for key in _SCATTER_X if key in keys), next(iter(keys), "")),
        "y": next((key for key in _SCATTER_Y if key in keys), next(iter(keys), "")),
        "labels": labels,
        "descriptions": {key: metric(key).description for key in keys},
        "estimate": formatting.estimate,
        "has_images": has_images,
        "answers": _answers_block(sweep),
        "comparison_caption": CAPTION,
        "texts": [_texts_context(texts) for texts in texts_by_context(sweep)],
        "datasets": list(dict.fromkeys(dataset for dataset, *_ in contexts)),
        "shades": SHADES,
        "min_overlap": MIN_OVERLAP,
        "differences": _config_differences(sweep),
        "provenance": list(sweep.provenance().items()),
        "notes": [(run.name, note) for run, record in sweep.finished() for note in record.notes],
        "data": {
            "runs": [_chart_data(run, contexts) for run in sweep.runs],
            "labels": labels,
            "contexts": [
                [dataset, "image" if has_images else " ".join(text.split())[:_CONTEXT_CHARACTERS]]
                for dataset, text, _ in contexts
            ],
        },
    }
    headings = _SECTIONS | ({"texts": "Images"} if has_images else {})
    sections = [(name, heading) for name, heading in headings.items() if page[name]]
    template = templates.environment(_PACKAGE).get_template("page.html")
    return template.render(page, sections=sections)


def _data_uri(svg: bytes) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode()


def _table_context(table: tables.Table) -> dict[str, Any]:
    return {
        "name": table.name,
        "caption": table.title,
        "measured": tables.measured_block(table),
        "notes": tables.notes(table),
        "published": tables.published_block(table),
        "published_title": tables.published_title(table),
    }


def _answers_block(sweep: SweepRecords) -> tables.Block | None:
    """Return the metrics of both models' answers to open questions; none: no run has any."""
    rows = [
        ([run.name, label], [tables.Entry(text) for text in row])
        for run, record in sweep.finished()
        if (answers := record.answers)
        for label, row in comparison_rows(answers)
    ]
    return tables.Block(["run", "metric"], list(HEADINGS), rows) if rows else None


def _texts_context(texts: ContextTexts) -> dict[str, Any]:
    # not asdict, which would copy every span
    return vars(texts) | {"continuations": [vars(c) for c in texts.continuations]}


def _metric_keys(sweep: SweepRecords) -> list[str]:
    """Return the metrics that any run has, in display order."""
    keys = {key for _, record in sweep.finished() for key in record.overall.tuned}
    known = [key for key in METRICS if key in keys]
    return known + sorted(keys.difference(known))


def _chart_data(run: RunEntry, contexts: Sequence[Context]) -> dict[str, Any]:
    """Return what the charts and the filters of texts need of a run."""
    record = run.record
    if record is None:
        return {"name": run.name, "curves": {}, "metrics": {}, "texts": {}}
    rows = rows_by_context(record)
    curves = {}
    for key in _CURVES:
        history = [row for row in record.history if key in row]
        if history:
            curves[key] = [[row["epoch"] for row in history], [row[key] for row in history]]
    return {
        "name": run.name,
        "curves": curves,
        "metrics": {
            key: [estimate.mean, *(estimate.ci95 or (estimate.mean, estimate.mean))]
            for key, estimate in record.overall.tuned.items()
        },
        "texts": {
            key: [values[rows[c]] if c in rows else None for c in contexts]
            for key in text_metrics(record)
            if set(values := record.text_values("tuned", key)) != {None}
        },
    }


def _config_differences(sweep: SweepRecords) -> list[tuple[str, list[str]]]:
    """Return the config fields in which runs differ, with the value of each run."""
    configs = [dict(_flat_config(record.config)) for _, record in sweep.finished()]
    names = dict.fromkeys(name for config in configs for name in config)
    rows = [(name, [config.get(name, "") for config in configs]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def _flat_config(config: Mapping[str, Any], at: str = "") -> Iterator[tuple[str, str]]:
    """Yield the dotted names and values of the fields that can change a result."""
    for name, value in config.items():
        if not at and not _is_result_field(name):
            continue
        if isinstance(value, Mapping):
            yield from _flat_config(value, f"{at}{name}.")
        else:
            yield f"{at}{name}", str(value)


def _is_result_field(name: str) -> bool:
    known = RunConfig.__dataclass_fields__
    return name not in known or changes_results(RunConfig, name)
