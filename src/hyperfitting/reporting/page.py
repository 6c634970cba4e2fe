"""The page of an experiment: one HTML file, complete in itself, that opens offline.

Tables and figures as in the report, curves and metrics to zoom into, and every continuation beside
the others of its context. Text that came from data or a model is escaped by the template, or put in
by the script as text; the page's policy lets no other script run, and nothing be loaded.
"""

import base64
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from plotly.offline import get_plotlyjs

from hyperfitting.reporting import glossary, numbers, tables
from hyperfitting.reporting.assets import environment, source
from hyperfitting.reporting.colouring import SHADES, shades
from hyperfitting.reporting.figures import Drawn
from hyperfitting.reporting.sweeps import Entry, SweepRecords
from hyperfitting.results import Record

SHORTEST_SHARED = 5
"""Tokens; shorter runs that a text shares with the training data are not underlined."""
_SERIES = ("train/loss", "val/loss", "gen/ttr", "gen/rep_2", "val/entropy")
_OF_A_TEXT = {"rep": "gen/rep_2", "overlap": "gen/dataset_overlap", "ttr": "gen/ttr"}
"""What contexts are filtered and ordered by."""
_START = 60
"""Characters of a context in the list of them."""
_NO_MATTER = ("tracking", "plan")


def html(sweep: SweepRecords, made: Sequence[tables.Table], figures: Sequence[Drawn]) -> str:
    """Return the page of a sweep.

    Args:
        sweep: with whatever records are there.
        made: its tables.
        figures: its figures.
    """
    contexts = _contexts(sweep)
    keys = _keys(sweep)
    logged = {key for _, record in sweep.finished() for row in record["history"] for key in row}
    series = [key for key in _SERIES if key in logged]
    script = source("page.js")
    plotly = get_plotlyjs()
    spec = sweep.spec["report"] or {}
    names = {key: glossary.name(key) for key in (*keys, *_SERIES)}
    differences = _differences(sweep)
    page = {
        "title": spec.get("title", sweep.spec["name"]),
        "about": spec.get("about", ""),
        "command": " ".join(sweep.spec["command"]),
        "hashes": [_hash(one) for one in (plotly, script)],
        "plotly": plotly,
        "script": script,
        "members": sweep.entries,
        "tables": [_table(table) for table in made],
        "figures": [
            {"caption": one.caption, "source": _data_uri(one.svg)} for one in figures if one.svg
        ],
        "series": series,
        "metrics": keys,
        "x": _first_of(keys, ("gen/rep_2", "gen/ttr")),
        "y": _first_of(keys, ("val/perplexity", "val/loss")),
        "names": names,
        "meanings": {key: term.meaning for key, term in glossary.TERMS.items()},
        "estimate": numbers.estimate,
        "texts": list(blocks(sweep)),
        "sets": list(dict.fromkeys(texts for texts, _ in contexts)),
        "shades": SHADES,
        "underlined": SHORTEST_SHARED,
        "differences": differences,
        "made": list(sweep.made_with().items()),
        "notes": [(e.name, note) for e, record in sweep.finished() for note in record["notes"]],
        "data": {
            "members": [_member(entry, keys, contexts) for entry in sweep.entries],
            "names": names,
            "contexts": [[texts, " ".join(text.split())[:_START]] for texts, text in contexts],
        },
    }
    sections = {
        "tables": "Tables", "figures": "Figures", "series": "Curves",
        "metrics": "Metric against metric", "texts": "Texts",
        "differences": "How the members differ", "made": "How each number was made",
    }  # fmt: skip
    there = [
        ("curves" if name == "series" else name, heading)
        for name, heading in sections.items()
        if page[name]
    ]
    return environment().get_template("page.html").render(page, sections=there)


def _hash(script: str) -> str:
    """Return the source that lets exactly this script run (Content Security Policy, level 2)."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _data_uri(svg: bytes) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode()


def _first_of(keys: Sequence[str], wanted: Sequence[str]) -> str:
    return next((key for key in wanted if key in keys), keys[0] if keys else "")


def _table(table: tables.Table) -> dict[str, Any]:
    return {
        "caption": table.caption or table.name,
        "axes": len(table.axes),
        "headings": tables.headings(table),
        "rows": [tables.cells(table, row) for row in table.rows],
        "source": table.source if table.published else "",
    }


def _keys(sweep: SweepRecords) -> list[str]:
    """Return the metrics that any member has, in the glossary's order."""
    there = {key for _, record in sweep.finished() for key in record["metrics"]}
    known = [key for key in glossary.TERMS if key in there]
    return known + sorted(there.difference(known))


def _contexts(sweep: SweepRecords) -> list[tuple[str, str]]:
    """Return all contexts of all members, set and text, each once."""
    found = {
        (sample["set"], sample["context"]): None
        for _, record in sweep.finished()
        for sample in record["samples"]
    }
    return list(found)


def _by_context(record: Record) -> dict[tuple[str, str], int]:
    """Return which sample of a record is of which context."""
    return {(s["set"], s["context"]): row for row, s in enumerate(record["samples"])}


def _member(
    entry: Entry, keys: Sequence[str], contexts: Sequence[tuple[str, str]]
) -> dict[str, Any]:
    """Return what the charts and filters need of a member."""
    record = entry.record
    if record is None:
        return {"name": entry.name, "curves": {}, "metrics": {}, "texts": {}}
    rows = _by_context(record)
    curves = {}
    for key in _SERIES:
        looks = [row for row in record["history"] if key in row]
        if looks:
            curves[key] = [[row["epoch"] for row in looks], [row[key] for row in looks]]
    values = record["per_text"]["metrics"]
    return {
        "name": entry.name,
        "curves": curves,
        "metrics": {
            key: [one["mean"], *(one["ci95"] or (one["mean"], one["mean"]))]
            for key, one in record["metrics"].items()
        },
        "texts": {
            short: [values[key][rows[one]] if one in rows else None for one in contexts]
            for short, key in _OF_A_TEXT.items()
            if key in values
        },
    }


def blocks(sweep: SweepRecords) -> Iterator[dict[str, Any]]:
    """Yield what is to be read of each context: the text, and what each writer made of it."""
    records = [
        (number, entry.name, entry.record, _by_context(entry.record))
        for number, entry in enumerate(sweep.entries)
        if entry.record is not None
    ]
    originals = _originals(sweep)
    for one in _contexts(sweep):
        writers: list[dict[str, Any]] = []
        seen: set[tuple[int, ...]] = set()
        reference = ""
        for number, name, record, rows in records:
            if one not in rows:
                continue
            row = rows[one]
            sample = record["samples"][row]
            reference = reference or sample["reference"]
            before = sample["original_continuation"]
            if tuple(before["tokens"]) not in seen:
                seen.add(tuple(before["tokens"]))
                writers.append(_writer(record, "baseline", row, before, originals[name]))
            if record["config"]["tuning"]["method"] != "none":
                after = _writer(record, "metrics", row, sample["continuation"], name)
                writers.append(after | {"member": number, "original": False})
        yield {"context": one[1], "reference": reference, "writers": writers}


def _originals(sweep: SweepRecords) -> dict[str, str]:
    """Return by member what the original model with its decoding is called."""
    called: dict[str, str] = {}
    found = {}
    for entry, record in sweep.finished():
        decode = record["config"]["decode"]
        plain = f"original, {decode['name']}"
        other = plain in called.values() and repr(decode) not in called
        called.setdefault(repr(decode), f"original, decoding of {entry.name}" if other else plain)
        found[entry.name] = called[repr(decode)]
    return found


def _writer(
    record: Record, side: str, row: int, continuation: Mapping[str, Any], name: str
) -> dict[str, Any]:
    shown = (("TTR", "ttr", "{:.2f}"), ("repeated 2-grams", "rep", "{:.2f}"),
             ("overlap", "overlap", "{:.0f}"))  # fmt: skip
    values = {short: record["per_text"][side].get(_OF_A_TEXT[short]) for _, short, _ in shown}
    return {
        "name": name,
        "original": True,
        "numbers": [
            (heading, form.format(values[short][row]))
            for heading, short, form in shown
            if values[short] and values[short][row] is not None
        ],
        "text": list(stretches(continuation)),
    }


def stretches(continuation: Mapping[str, Any]) -> Iterator[tuple[str, int, int]]:
    """Yield a continuation in stretches of one look each: text, shade, and whether it is quoted.

    Quoted is the longest run of tokens that stands in a training sequence, from `SHORTEST_SHARED`
    on.
    """
    overlap = continuation["overlap"]
    start, length = overlap["start"], overlap["length"]
    quoted = range(start, start + length if length >= SHORTEST_SHARED else start)
    pieces = zip(continuation["pieces"], shades(continuation["tokens"]), strict=True)
    looks = ((text, (shade, int(i in quoted))) for i, (text, shade) in enumerate(pieces))
    for look, group in groupby(looks, key=lambda one: one[1]):
        yield "".join(text for text, _ in group), *look


def _differences(sweep: SweepRecords) -> list[tuple[str, list[str]]]:
    """Return the fields of the config in which members differ, with the value of each."""
    flat = [dict(_flat(record["config"])) for _, record in sweep.finished()]
    fields = dict.fromkeys(name for one in flat for name in one)
    rows = [(name, [one.get(name, "") for one in flat]) for name in fields]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def _flat(config: Mapping[str, Any], at: str = "") -> Iterator[tuple[str, str]]:
    for name, value in config.items():
        if not at and name in _NO_MATTER:
            continue
        if isinstance(value, Mapping):
            yield from _flat(value, f"{at}{name}.")
        else:
            yield f"{at}{name}", str(value)
