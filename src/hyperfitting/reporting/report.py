"""The report of an experiment: its tables and figures, drawn from the records that exist.

    outputs/reports/<experiment>/
      index.html          all of it in one page, with every text; opens offline
      README.md           all but the texts, with commands, versions and machine
      <table>.md .tex .csv
      <figure>.svg .pdf .png
      curves.csv          values of curves, plain bars and matrices of the figures

and in `outputs/reports/figures.html` the figures of all experiments at their printed size.

Its content is described in the experiment's file, under `hydra.sweeper.report`; see
`hyperfitting.reporting.spec`. `hyperfit-report sweep SWEEP_DIR` draws it again.
"""

from pathlib import Path
from urllib.parse import quote

from hyperfitting.reporting import community, figures, index, latex, page, tables
from hyperfitting.reporting.contact_sheet import write_contact_sheet
from hyperfitting.reporting.figures import values
from hyperfitting.reporting.spec import (
    ColumnSpec,
    ImageGridSpec,
    ReportSpec,
    TableSpec,
    parse_report,
)
from hyperfitting.reporting.sweep_records import SweepRecords, load_sweep
from hyperfitting.reporting.tables import markdown_text
from hyperfitting.runtime.files import write_text

_DEFAULT_COLUMNS = {
    "TTR": "gen/ttr",
    "repeated 2-grams": "gen/rep_2",
    "Self-BLEU": "gen/self_bleu",
    "Dataset BLEU": "gen/dataset_bleu",
    "perplexity": "val/perplexity",
    "entropy, nats": "val/entropy",
}
"""Heading and metric of the columns of a sweep that describes no report."""
_DEFAULT_IMAGE_COLUMNS = {
    "repeated rows": "gen/row_repeat",
    "repeated 2-grams": "gen/rep_2",
    "total variation": "gen/total_variation",
    "nearest training image": "gen/nearest_train",
    "bits per pixel": "val/bits_per_pixel",
    "entropy, nats": "val/entropy",
}
"""The same of a sweep of image models, which has a grid of images, too."""


def write_report(folder: Path, reports: Path | None = None) -> Path:
    """Draw the report of a sweep, and return its folder.

    Args:
        folder: the sweep's.
        reports: folder of all reports; none: `reports/` beside `sweeps/`, or in the sweep's folder
            if it lies elsewhere.

    Raises:
        UserError: the description of the report is invalid, or a record is of another version of
            this software.
    """
    sweep = load_sweep(folder)
    spec = parse_report(sweep.spec.report) if sweep.spec.report else _default_report(sweep)
    if reports is None:
        beside = folder.parent.name == "sweeps"
        reports = folder.parent.parent / "reports" if beside else folder / "reports"
    out = reports / folder.name
    built = [tables.build_table(sweep, name, table) for name, table in spec.tables.items()]
    others = community.contributions(reports / community.FOLDER, sweep.spec)
    built = [community.with_contributions(table, others) for table in built]
    out.mkdir(parents=True, exist_ok=True)
    for table in built:
        write_text(out / f"{table.name}.md", tables.to_markdown(table))
        write_text(out / f"{table.name}.tex", latex.to_latex(table))
        write_text(out / f"{table.name}.csv", tables.to_csv(table))
    rendered = [figures.render(sweep, name, figure, out) for name, figure in spec.figures.items()]
    drawn = [(figure.name, value) for figure in rendered for value in figure.values]
    if drawn:
        write_text(out / values.FILE, values.to_csv(drawn))
    title = spec.title or sweep.spec.name
    parts = [
        f"# {markdown_text(title)}",
        markdown_text(spec.about),
        *map(tables.to_markdown, built),
    ]
    parts += map(_figure_markdown, rendered)
    parts.append(_provenance_markdown(sweep))
    write_text(out / "README.md", "\n\n".join(filter(None, map(str.strip, parts))) + "\n")
    write_text(out / index.PAGE, page.render_page(sweep, title, spec.about, built, rendered))
    index.add_report(out, title, sweep)
    write_contact_sheet(reports)
    return out


def _default_report(sweep: SweepRecords) -> ReportSpec:
    """Return the report of a sweep that describes none: a table of all runs."""
    is_image = any(record.image is not None for _, record in sweep.finished())
    headings = _DEFAULT_IMAGE_COLUMNS if is_image else _DEFAULT_COLUMNS
    columns = {heading: ColumnSpec(key=key) for heading, key in headings.items()}
    axes = sweep.axes
    return ReportSpec(
        tables={"runs": TableSpec(rows=axes, columns=columns)} if axes else {},
        figures={"images": ImageGridSpec.model_validate({"kind": "image_grid"})}
        if is_image
        else {},
    )


def _figure_markdown(figure: figures.RenderedFigure) -> str:
    if not figure.svg:
        return markdown_text(f"({figure.name}: {figure.missing})")
    caption = markdown_text(figure.caption)
    return f"![{caption}]({quote(figure.name)}.svg)\n\n{caption}"


def _provenance_markdown(sweep: SweepRecords) -> str:
    parts = ["## Made with"]
    parts += [f"**{name}**: {markdown_text(value)}" for name, value in sweep.provenance().items()]
    missing = [
        f"- {markdown_text(f'{run.name}: {run.missing}')}"
        for run in sweep.runs
        if run.record is None
    ]
    return "\n\n".join([*parts, *(["\n".join(missing)] if missing else [])])
