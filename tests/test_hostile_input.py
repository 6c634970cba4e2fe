"""Files from someone else: edited records, hostile names, and what they must not reach."""

import csv
import io
import json
import re
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hyperfitting.errors import UserError
from hyperfitting.record.files import PREDICTIONS_FILE, RECORD_FILE, read_predictions, read_record
from hyperfitting.reporting import figures
from hyperfitting.reporting.report import write_report
from hyperfitting.reporting.spec import parse_report
from hyperfitting.reporting.sweep_records import load_sweep
from hyperfitting.reporting.tables import markdown_text
from hyperfitting.runtime.files import write_json, write_text
from hyperfitting.sweep.spec import SPEC_FILE, read_sweep_spec, write_sweep_spec
from hyperfitting.sweep.state import STATUS_FILE, RunFolder
from tests.records import make_next_tokens, make_predictions, ttr_record, write_sweep

HOSTILE = "<b>x</b> |$a_b$ \\input{x} [l](javascript:x) *y* _z_ `c` &lt; #1 %"


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    return write_sweep(tmp_path / "sweeps" / "x", {}, {"tuned_0": ttr_record([0.1, 0.2, 0.4], 0.5)})


def edited(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], Any]:
    def apply(record: dict[str, Any]) -> dict[str, Any]:
        change(record)
        return record

    return apply


EDITS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a list": (lambda record: [record], "another version"),
    "null": (lambda record: None, "another version"),
    "no slices": (lambda record: record | {"slices": []}, "slices: there is none"),
    "no samples": (lambda record: record | {"samples": []}, "samples: there is none"),
    "text for a number": (
        edited(lambda record: record["slices"][0].update(max_new_tokens="many")),
        "slices.0.max_new_tokens",
    ),
    "null for an estimate": (
        edited(lambda record: record["slices"][0]["tuned"].update({"gen/ttr": None})),
        "slices.0.tuned.gen/ttr",
    ),
    "too few values": (
        edited(lambda record: record["per_text"]["tuned"]["gen/ttr"].pop()),
        "per_text.tuned.gen/ttr: 2 values of 3 samples",
    ),
    "fewer tokens than texts of them": (
        edited(lambda record: record["samples"][1]["tuned"]["tokens"].pop()),
        "samples: 5 token_texts of 4 tokens",
    ),
    "no name": (lambda record: record | {"config": {"model": "m"}}, "config.model.name"),
    "a row without epoch": (
        edited(lambda record: record["history"][0].pop("epoch")),
        "history: a row lacks epoch",
    ),
    "a position without tokens": (
        edited(lambda record: record["next_tokens"]["news"]["positions"][0].update(tuned=[])),
        "next_tokens.news: a position without tokens",
    ),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_record_is_refused_and_the_field_is_named(tmp_path: Path, edit: str) -> None:
    record = ttr_record([0.1, 0.2, 0.4], 0.5, next_tokens={"news": make_next_tokens()})
    change, message = EDITS[edit]
    write_json(tmp_path / RECORD_FILE, change(record.model_dump(mode="json")))
    with pytest.raises(UserError, match=re.escape(message)) as raised:
        read_record(tmp_path / RECORD_FILE)
    assert raised.value.field == "record"
    assert raised.value.hint


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a": NaN}', '{"a": 1e999}', '{"a"', "\ud800", ""]
)
@pytest.mark.parametrize("name", [RECORD_FILE, SPEC_FILE])
def test_what_is_no_json_is_refused(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError, match=f"{name} cannot be read"):
        read_record(tmp_path / name) if name == RECORD_FILE else read_sweep_spec(tmp_path)


def test_a_report_of_an_edited_record_is_refused_without_a_traceback(sweep: Path) -> None:
    path = sweep / "tuned_0" / RECORD_FILE
    write_json(path, json.loads(path.read_text()) | {"samples": None})
    with pytest.raises(UserError, match="samples: Input should be a valid list"):
        write_report(sweep)


@pytest.mark.parametrize(
    "status", ["[]", "{", '{"kind": [1]}', '{"reason": null}', '{"kind": "x"}']
)
def test_an_edited_status_counts_as_none(sweep: Path, status: str) -> None:
    (sweep / "base_0").mkdir()
    (sweep / "base_0" / STATUS_FILE).write_text(status)
    assert RunFolder(sweep / "base_0").status().kind == "waiting"
    assert write_report(sweep).is_dir()


def npz(path: Path, content: bytes) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("tuned.top1.npy", content)


PICKLE = b"\x93NUMPY\x01\x00F\x00{'descr': '|O', 'fortran_order': False, 'shape': (1,), }      \n"


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b"PK\3\4 half"),
        lambda path: path.write_bytes(b""),
        lambda path: npz(path, b"not an array"),
        lambda path: npz(path, PICKLE),
    ],
    ids=["half", "empty", "no array", "pickle"],
)
def test_damaged_predictions_are_refused(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    damage(tmp_path / PREDICTIONS_FILE)
    with pytest.raises(UserError, match="predictions="):
        read_predictions(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"report": {"tables": ["main"]}}, "tables is not a mapping"),
        ({"report": {"tables": {"../../x": {}}}}, "not a plain file name"),
        ({"report": {"figures": {"/etc/x": {"kind": "bars"}}}}, "not a plain file name"),
        ({"runs": [{"name": "../x", "labels": {}}]}, "not a plain file name"),
        ({"runs": [{"name": "x\u001b[31m", "labels": {}}]}, "not a plain file name"),
        ({"runs": [{"name": "x", "labels": {"a": "\u0000"}}]}, "control characters"),
        ({"axes": {"seed": 3}}, "axes.seed"),
        ({"scales": {"embedded": 3}}, "scales.embedded"),
        ({"scales": {"embedded": {"axes": {"seed": "0"}}}}, "scales.embedded.axes.seed"),
        ({"command": "hyperfit"}, "command"),
    ],
)
def test_an_edited_sweep_is_refused_and_nothing_is_written(
    sweep: Path, change: dict[str, Any], message: str
) -> None:
    spec = json.loads((sweep / SPEC_FILE).read_text())
    (sweep / SPEC_FILE).write_text(json.dumps(spec | change))
    before = sorted(sweep.parents[1].rglob("*"))
    with pytest.raises(UserError, match=re.escape(message)) as raised:
        write_report(sweep)
    assert "\x1b" not in str(raised.value)
    assert sorted(sweep.parents[1].rglob("*")) == before


@pytest.mark.parametrize(
    "form", ["{.__class__}", "{:.999999999f}", "{0.__init__.__globals__}", "{:>{0}}", "{:.3f}{}"]
)
def test_a_format_reaches_nothing_but_a_number(sweep: Path, form: str) -> None:
    table = {"rows": ["seed"], "columns": {"TTR": {"key": "gen/ttr", "format": form}}}
    spec = json.loads((sweep / SPEC_FILE).read_text())
    (sweep / SPEC_FILE).write_text(json.dumps(spec | {"report": {"tables": {"main": table}}}))
    with pytest.raises(UserError, match=r"TTR\.format=.*no format of a number"):
        write_report(sweep)


def test_a_report_does_not_write_through_links(sweep: Path) -> None:
    victim = sweep.parents[1] / "victim"
    victim.write_text("mine")
    out = sweep.parents[1] / "reports" / "x"
    out.mkdir(parents=True)
    for name in ("README.md", "index.html", "runs.md"):
        (out / name).symlink_to(victim)
    write_report(sweep)
    assert victim.read_text() == "mine"
    assert not (out / "README.md").is_symlink()


def test_a_hostile_name_stays_text_in_every_table(tmp_path: Path) -> None:
    table = {
        "caption": HOSTILE,
        "rows": ["model", "system"],
        "columns": {HOSTILE: {"key": "gen/ttr"}, "=1+1": {"key": "gen/ttr"}},
        "published": [{"model": "ours", "system": "base", HOSTILE: HOSTILE}],
        "source": HOSTILE,
    }
    report = {"title": HOSTILE, "about": f"{HOSTILE}\n\n{HOSTILE}", "tables": {"a b(c)": table}}
    record = ttr_record([0.1, 0.2, 0.4], 0.5)
    out = write_report(write_sweep(tmp_path / "x", report, {"base_0": record}))
    readme, tex = (out / "README.md").read_text(), (out / "a b(c).tex").read_text()
    for text in (readme, (out / "a b(c).md").read_text()):
        shown = text.replace(markdown_text(HOSTILE), "")
        for markup in ("<b>", "](j", "*y*", "_z_", "`c`", "&lt;"):
            assert markup not in shown
    assert r"\textbackslash{}input\{x\}" in tex
    assert r"\input" not in tex
    assert r"\textbar{}\$a\_b\$" in tex
    rows = list(csv.reader(io.StringIO((out / "a b(c).csv").read_text())))
    assert {row[2] for row in rows[1:]} == {HOSTILE, "'=1+1"}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("0.629 [0.586, 0.668]", "0.629 [0.586, 0.668]"),
        ("<0.001", "<0.001"),
        ("late_stage, n=3 & -0.5", "late_stage, n=3 & -0.5"),
        ("<img src=x>", r"\<img src=x>"),
        ("[a](b) ![c][d]", r"[a\](b) ![c\][d]"),
        ("a\nb", "a b"),
    ],
)
def test_markdown_escapes_markup_only(text: str, shown: str) -> None:
    assert markdown_text(text) == shown


FIGURES: dict[str, dict[str, Any]] = {
    "curves": {"kind": "curves", "series": ["train/loss"], "lines": HOSTILE},
    "line_plot": {
        "kind": "line_plot", "x": HOSTILE, "lines": HOSTILE, "log_x": True,
        "x_label": HOSTILE, "y": {HOSTILE: {"key": "gen/ttr"}},
    },
    "bars": {"kind": "bars", "rows": HOSTILE, "y": {HOSTILE: {"key": "gen/ttr"}}},
    "histogram": {"kind": "histogram", "lines": HOSTILE},
    "per_position": {"kind": "per_position", "series": ["gen/entropy"], "lines": HOSTILE},
    "agreement": {"kind": "agreement", "axis": HOSTILE},
    "ranks": {"kind": "ranks", "lines": HOSTILE},
    "next_tokens": {"kind": "next_tokens", "dataset": "news", "count": 2},
    "text": {"kind": "text", "rows": HOSTILE, "width": 20},
}  # fmt: skip


@pytest.mark.parametrize("kind", FIGURES)
def test_a_hostile_name_stays_text_in_every_figure(kind: str, tmp_path: Path) -> None:
    """As mathematics, `$\\frac$` would be an error when the figure is drawn."""
    names = [r"a $\frac$ b", "_hidden $x$"]
    folder = tmp_path / "x"
    write_sweep_spec(
        folder, name="x", scale="embedded", command=[], axes={}, scales={}, report={},
        runs=[{"name": f"run{i}", "labels": {HOSTILE: name}} for i, name in enumerate(names)],
    )  # fmt: skip
    for i in range(2):
        record = ttr_record([0.1, 0.2, 0.4], 0.5, next_tokens={"news": make_next_tokens()})
        (folder / f"run{i}").mkdir()
        write_text(folder / f"run{i}" / RECORD_FILE, record.model_dump_json())
        with (folder / f"run{i}" / PREDICTIONS_FILE).open("wb") as file:
            arrays: Any = {k.replace("/", "."): v for k, v in make_predictions(i).items()}
            np.savez(file, **arrays)
    spec = parse_report({"figures": {"f": FIGURES[kind]}}).figures["f"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert figures.render(load_sweep(folder), "f", spec, tmp_path).svg
        figure = figures.draw(load_sweep(folder), spec)
    shown = [text.get_text() for text in figure.findobj(match=_is_text)]
    if kind not in ("next_tokens", "text"):
        assert {name.strip() for name in shown} >= set(names)


def _is_text(artist: Any) -> bool:
    return hasattr(artist, "get_text")
