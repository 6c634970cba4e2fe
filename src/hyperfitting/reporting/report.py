"""The report of an experiment: its tables and figures, drawn from whatever records are there.

    outputs/reports/<experiment>/
      README.md           all of it, with commands, versions and machine
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

from hyperfitting.reporting import figures, tables
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
    parts = [f"# {spec.get('title', sweep.spec['name'])}", *filter(None, [spec.get("about")])]
    for name, described in (spec.get("tables") or {}).items():
        table = tables.table_of(sweep, name, described)
        write_text(out / f"{name}.md", tables.markdown(table))
        write_text(out / f"{name}.tex", tables.latex(table))
        write_text(out / f"{name}.csv", tables.comma_separated(table))
        parts.append(tables.markdown(table))
    for name, described in (spec.get("figures") or {}).items():
        why = _draw(sweep, out, name, described)
        caption = described.get("caption", name)
        parts.append(f"![{caption}]({name}.svg)\n\n{caption}" if not why else f"({name}: {why})")
    parts.append(_made_with(sweep))
    write_text(out / "README.md", "\n\n".join(part.strip() for part in parts) + "\n")
    return out


def _draw(sweep: SweepRecords, out: Path, name: str, described: Mapping[str, Any]) -> str:
    """Draw a figure as SVG and PNG; return why not, if there is nothing to draw."""
    try:
        drawn = figures.draw(sweep, name, described)
    except figures.Nothing as why:
        return str(why)
    for suffix in ("svg", "png"):
        with replacing(out / f"{name}.{suffix}") as beside:
            figures.save(drawn, beside, suffix)
    return ""


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
    """Return how this was made: the command, versions, machine, date and what is averaged."""
    records = [record for _, record in sweep.finished()]
    lines = [
        "## Made with",
        "",
        f"    {' '.join(sweep.spec['command'])}",
        "",
        f"Scale: {sweep.spec['scale']}. {len(records)} of {len(sweep.entries)} members have "
        "finished. Numbers are means with 95% intervals: bootstrapped over texts where one member "
        "makes a cell, Student's over members where several do.",
    ]
    for entry in sweep.entries:
        if entry.record is None:
            lines.append(f"\n- {entry.name}: {entry.missing}")
    if records:
        newest = records[-1]
        versions = ", ".join(f"{name} {number}" for name, number in newest["versions"].items())
        git = newest["git"]
        commit = "an installed package"
        if git:
            commit = git["commit"] + (", with changes" if git["dirty"] else "")
        device = newest["device"]
        lines.append(f"\nVersions: {versions}. Code: {commit}. Device: {device}.")
    return "\n".join(lines)
