"""The report of an experiment: its tables and figures, drawn from whatever records are there.

    outputs/reports/<experiment>/
      index.html          all of it in one page, with every text; opens offline
      README.md           all but the texts, with commands, versions and machine
      <table>.md .tex .csv
      <figure>.svg .png

What to draw stands in the experiment's file, under `hydra.sweeper.report`:

    title, about          words
    tables:  {<name>: {caption, rows: [axis, …], columns: {<heading>: {key, at, set, side, times,
             format, highest, less}}, published: [{<axis>: <label>, …, <heading>: number}], source}}
    figures: {<name>: {kind, caption, …}}; see `hyperfitting.reporting.figures`

python -m hyperfitting.reporting SWEEP_DIR draws it again.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hyperfitting.reporting import figures, index, page, tables
from hyperfitting.reporting.sweeps import SweepRecords
from hyperfitting.store import replacing, write_text


def write(folder: Path, reports: Path | None = None) -> Path:
    """Draw the report of a sweep, and return its folder.

    Args:
        folder: the sweep's.
        reports: where reports are kept; none: `reports/` beside `sweeps/`, or in the folder if
            it is kept elsewhere.

    Raises:
        UserError: the experiment's description of its report makes no sense, or a record is of
            another version of this software.
    """
    sweep = SweepRecords.of(folder)
    spec = sweep.spec["report"] or _usual(sweep)
    if reports is None:
        beside = folder.parent.name == "sweeps"
        reports = folder.parent.parent / "reports" if beside else folder / "reports"
    out = reports / folder.name
    out.mkdir(parents=True, exist_ok=True)
    made = [
        tables.table_of(sweep, name, described)
        for name, described in (spec.get("tables") or {}).items()
    ]
    for table in made:
        write_text(out / f"{table.name}.md", tables.markdown(table))
        write_text(out / f"{table.name}.tex", tables.latex(table))
        write_text(out / f"{table.name}.csv", tables.comma_separated(table))
    drawn = [
        _draw(sweep, out, name, described)
        for name, described in (spec.get("figures") or {}).items()
    ]
    title = spec.get("title", sweep.spec["name"])
    parts = [f"# {title}", spec.get("about", ""), *map(tables.markdown, made)]
    parts += [
        f"![{one.caption}]({one.name}.svg)\n\n{one.caption}"
        if one.svg
        else f"({one.name}: {one.missing})"
        for one in drawn
    ]
    parts.append(_made_with(sweep))
    write_text(out / "README.md", "\n\n".join(filter(None, map(str.strip, parts))) + "\n")
    write_text(out / index.PAGE, page.html(sweep, made, drawn))
    index.note(out, title, sweep)
    return out


def _draw(sweep: SweepRecords, out: Path, name: str, described: Mapping[str, Any]) -> figures.Drawn:
    """Draw a figure as SVG and PNG, if there is something to draw."""
    caption = described.get("caption", name)
    try:
        drawn = figures.draw(sweep, name, described)
    except figures.Nothing as why:
        return figures.Drawn(name, caption, missing=str(why))
    for suffix in ("png", "svg"):
        with replacing(out / f"{name}.{suffix}") as beside:
            figures.save(drawn, beside, suffix)
    return figures.Drawn(name, caption, (out / f"{name}.svg").read_bytes())


def _usual(sweep: SweepRecords) -> dict[str, Any]:
    """Return what is drawn of a sweep that says nothing of its report."""
    columns = {
        "TTR": {"key": "gen/ttr"},
        "repeated 2-grams": {"key": "gen/rep_2"},
        "Self-BLEU": {"key": "gen/self_bleu"},
        "Dataset BLEU": {"key": "gen/dataset_bleu"},
        "perplexity": {"key": "val/perplexity", "format": "{:.1f}"},
        "entropy, nats": {"key": "val/entropy", "format": "{:.2f}"},
    }
    axes = sweep.axes
    return {"tables": {"members": {"rows": axes, "columns": columns}}} if axes else {}


def _made_with(sweep: SweepRecords) -> str:
    """Return how this was made, as Markdown."""
    lines = ["## Made with"]
    lines += [f"**{what}**: {words}" for what, words in sweep.made_with().items()]
    missing = [f"- {entry.name}: {entry.missing}" for entry in sweep.entries if not entry.record]
    return "\n\n".join([*lines, *(["\n".join(missing)] if missing else [])])
