"""Figures of records: one of each kind, and the config of a figure."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from hyperfitting.errors import UserError
from hyperfitting.record.files import write_record
from hyperfitting.record.mechanism import LayerCurve
from hyperfitting.record.schema import NextTokens, PerSide
from hyperfitting.reporting import figures
from hyperfitting.reporting.figures.layers import key_labels
from hyperfitting.reporting.figures.style import NoDataError, make_panels
from hyperfitting.reporting.figures.values import DrawnValue, drawn_values
from hyperfitting.reporting.next_tokens import changed_positions
from hyperfitting.reporting.report import write_report
from hyperfitting.reporting.spec import parse_report
from hyperfitting.reporting.sweep_records import load_sweep
from tests.records import (
    make_mechanism,
    make_next_tokens,
    make_predictions,
    ttr_record,
    write_sweep,
)
from tests.report_tables import write_half_done


@pytest.fixture
def half_done(tmp_path: Path) -> Path:
    return write_half_done(tmp_path / "sweeps" / "x")


@pytest.mark.parametrize(
    ("figure", "message"),
    [
        ({"kind": "curve", "series": []}, "figures.f.kind=curve(.|\n)*did you mean curves"),
        ({"kind": "curves", "serie": []}, "figures.f=serie(.|\n)*did you mean series"),
        ({"kind": "bars", "rows": "system", "y": {"a": {"kye": "k"}}}, "figures.f.y.a=kye"),
    ],
)
def test_an_invalid_figure_is_an_error_that_names_the_field(
    figure: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        parse_report({"figures": {"f": figure}})


FIGURES: dict[str, dict[str, Any]] = {
    "curves": {"kind": "curves", "series": ["train/loss", "gen/ttr"], "lines": "system"},
    "train_loss": {"kind": "curves", "series": ["train/loss"], "lines": "system"},
    "line_plot": {
        "kind": "line_plot", "x": "seed", "lines": "system", "log_x": False,
        "y": {"TTR": {"key": "gen/ttr"}},
    },
    "bars": {"kind": "bars", "rows": "system", "y": {"TTR": {"key": "gen/ttr"}}},
    "histogram": {"kind": "histogram", "lines": "system"},
    "per_position": {"kind": "per_position", "series": ["gen/entropy"], "lines": "system"},
    "per_layer": {
        "kind": "per_layer", "lines": "system",
        "panels": {"distance": ["reference/l2"], "weights": ["weights/spectral", "reference/l2"]},
    },
    "rank_shift": {"kind": "rank_shift", "count": 5},
    "agreement": {"kind": "agreement", "axis": "seed"},
    "ranks": {"kind": "ranks", "lines": "system"},
    "next_tokens": {"kind": "next_tokens", "dataset": "news", "count": 2},
    "text": {"kind": "text", "rows": "system", "width": 20},
}  # fmt: skip


@pytest.mark.parametrize(
    ("keys", "labels"),
    [
        (["reference/cka"], [[]]),
        (
            ["reference/cosine", "reference/cosine_without_outliers"],
            [["all dimensions"], ["without outlier dimensions"]],
        ),
        (
            ["reference/base_participation_ratio", "reference/tuned_participation_ratio"],
            [["base"], ["tuned"]],
        ),
        (["reference/l2", "tuned/l2"], [["reference texts"], ["tuned texts"]]),
    ],
)  # fmt: skip
def test_curves_by_layer_are_named_by_what_tells_them_apart(
    keys: list[str], labels: list[list[str]]
) -> None:
    assert [key_labels(key, keys) for key in keys] == labels


@pytest.mark.parametrize("kind", FIGURES)
def test_a_figure_of_each_kind_is_drawn_and_the_same_again(kind: str, tmp_path: Path) -> None:
    fields = {"next_tokens": {"news": make_next_tokens()}, "mechanism": make_mechanism()}
    records = {
        f"{system}_{seed}": ttr_record([0.1, 0.2, 0.4], 0.5, **fields)
        for system, seed in (("base", 0), ("tuned", 0), ("tuned", 1))
    }
    folder = write_sweep(tmp_path / "x", {}, records)
    spec = parse_report({"figures": {"f": FIGURES[kind]}}).figures["f"]
    first = figures.render(load_sweep(folder), "f", spec, tmp_path)
    pdf, png = ((tmp_path / f"f.{suffix}").read_bytes() for suffix in ("pdf", "png"))
    second = figures.render(load_sweep(folder), "f", spec, tmp_path)
    assert first.svg.startswith(b"<?xml")
    assert first.svg == second.svg
    assert (tmp_path / "f.pdf").read_bytes() == pdf
    assert b"/Type3" not in pdf and b"/FontFile2" in pdf  # embedded as TrueType
    assert (tmp_path / "f.png").read_bytes() == png
    assert len(png) > 1000


def drawn(folder: Path, out: Path, kind: str) -> list[DrawnValue]:
    spec = parse_report({"figures": {"f": FIGURES[kind]}}).figures["f"]
    return list(figures.render(load_sweep(folder), "f", spec, out).values)


def test_the_values_of_training_curves_are_those_of_the_histories(tmp_path: Path) -> None:
    rows = {
        f"tuned_{seed}": [
            {"epoch": e, "step": 8 * e, "train/loss": loss} for e, loss in enumerate(losses, 1)
        ]
        for seed, losses in enumerate(([3.0, 1.0], [2.0, 0.0]))
    }
    records = {
        name: ttr_record([0.1, 0.2, 0.4], 0.5).model_copy(update={"history": history})
        for name, history in rows.items()
    }
    folder = write_sweep(tmp_path / "x", {}, records)
    values = drawn(folder, tmp_path, "train_loss")
    assert [(v.line, v.x, v.value, v.low, v.high) for v in values] == [
        ("tuned", "1", 2.5, 2.0, 3.0),
        ("tuned", "2", 0.5, 0.0, 1.0),
    ]
    assert {v.panel for v in values} == {"training loss, nats"}


def test_the_values_of_a_curve_by_layer_are_those_of_the_record(tmp_path: Path) -> None:
    record = ttr_record([0.1, 0.2, 0.4], 0.5, mechanism=make_mechanism())
    folder = write_sweep(tmp_path / "x", {}, {"tuned_0": record})
    curve = make_mechanism().per_layer["reference/l2"]
    values = [v for v in drawn(folder, tmp_path, "per_layer") if v.panel == "distance"]
    assert [v.x for v in values] == [layer.removeprefix("block ") for layer in curve.layers]
    assert [v.value for v in values] == curve.mean
    assert [(v.low, v.high) for v in values] == [pytest.approx(ci) for ci in curve.ci95 or []]


def test_the_values_of_bars_are_the_probabilities_of_the_tokens(tmp_path: Path) -> None:
    tokens = make_next_tokens()
    record = ttr_record([0.1, 0.2, 0.4], 0.5, next_tokens={"news": tokens})
    folder = write_sweep(tmp_path / "x", {}, {"tuned_0": record})
    values = drawn(folder, tmp_path, "next_tokens")
    positions = changed_positions(tokens, 2)
    expected = [t.probability for p in positions for side in (p.base, p.tuned) for t in side]
    assert [v.value for v in values] == pytest.approx(expected)
    assert repr(positions[0].base[0].text) in values[0].x


def test_a_long_line_is_thinned_and_keeps_its_ends() -> None:
    figure, (panel,) = make_panels(1)
    panel.plot(np.arange(992), np.arange(992) / 3, label="greedy")
    panel.plot([0], [5], linestyle="", marker="o")
    values = drawn_values(figure)
    assert len(values) == 256
    assert [values[0].x, values[-1].x] == ["0", "991"]
    assert all(v.value == pytest.approx(float(v.x) / 3) for v in values)


@pytest.mark.parametrize(("kind", "written"), [("rank_shift", True), ("line_plot", False)])
def test_a_report_has_the_values_that_no_table_has(
    kind: str, written: bool, tmp_path: Path
) -> None:
    records = {"tuned_0": ttr_record([0.1, 0.2, 0.4], 0.5, mechanism=make_mechanism())}
    folder = write_sweep(tmp_path / "x", {"figures": {"f": FIGURES[kind]}}, records)
    path = write_report(folder) / "curves.csv"
    assert path.exists() == written
    if written:
        rows = list(csv.DictReader(path.read_text("utf-8").splitlines()))
        ranks = next(iter(records.values())).mechanism.ranks
        percent = [100 * count / sum(ranks.counts) for count in ranks.counts]
        of_ranks = [float(row["value"]) for row in rows if row["panel"] == "changed choices, %"]
        assert of_ranks == pytest.approx(percent, rel=1e-5)
        assert {row["figure"] for row in rows} == {"f"}


def test_no_table_takes_the_name_of_the_curves_file() -> None:
    table = {"rows": ["system"], "columns": {"TTR": {"key": "gen/ttr"}}}
    with pytest.raises(UserError, match="name the table otherwise"):
        parse_report({"tables": {"curves": table}})


def test_agreement_is_the_share_of_equal_top1_tokens(tmp_path: Path) -> None:
    record = ttr_record([0.1, 0.2, 0.4], 0.5)
    folder = write_sweep(tmp_path / "x", {}, {"tuned_0": record, "tuned_1": record})
    predictions = dict(make_predictions())
    write_record(folder / "tuned_0", record, predictions)
    other = predictions["tuned/top1"].copy()
    other[0] += 1  # of three texts one differs
    write_record(folder / "tuned_1", record, predictions | {"tuned/top1": other})
    spec = parse_report({"figures": {"f": FIGURES["agreement"]}}).figures["f"]
    figure = figures.draw(load_sweep(folder), spec)
    assert [text.get_text() for text in figure.axes[0].texts] == ["100.0", "66.7", "66.7", "100.0"]
    values = [(v.line, v.x, round(v.value, 1)) for v in drawn_values(figure)]
    assert values == [("0", "0", 100.0), ("0", "1", 66.7), ("1", "0", 66.7), ("1", "1", 100.0)]


def test_a_text_is_counted_within_its_dataset(tmp_path: Path) -> None:
    record = ttr_record([0.1, 0.2, 0.4], 0.5)
    samples = [
        sample.model_copy(
            update={"dataset": dataset, "context": sample.context.model_copy(update={"text": text})}
        )
        for sample, dataset, text in zip(
            record.samples, "abb", ("one", "two", "three"), strict=True
        )
    ]
    record = record.model_copy(update={"samples": samples})
    folder = write_sweep(tmp_path / "x", {}, {"tuned_0": record})

    def context(**fields: Any) -> str:
        spec = parse_report({"figures": {"f": FIGURES["text"] | fields}}).figures["f"]
        return figures.draw(load_sweep(folder), spec).axes[0].texts[0].get_text()

    assert context(number=2) == "three"
    assert context(dataset="b", number=0) == "two"
    with pytest.raises(NoDataError, match="no run has a text number 1 of a"):
        context(dataset="a", number=1)


def test_a_figure_without_data_has_a_reason(tmp_path: Path) -> None:
    report = {"figures": {name: spec for name, spec in FIGURES.items() if name != "text"}}
    empty = write_sweep(tmp_path / "empty", report, {})
    assert "(bars: no run has finished)" in (write_report(empty) / "README.md").read_text()
    record = ttr_record([0.1, 0.2, 0.4], 0.5)
    folder = write_sweep(tmp_path / "x", report, {"tuned_0": record})
    readme = (write_report(folder) / "README.md").read_text()
    assert "(agreement: fewer than two runs have predictions.npz" in readme
    assert "(next_tokens: no run has evaluation.top_tokens of the dataset news)" in readme
    assert "(per_layer: no run has mechanism.measures of this)" in readme
    assert "(rank_shift: no run has mechanism.measures=[ranks])" in readme


def test_layers_are_drawn_in_order_with_the_final_norm_apart(tmp_path: Path) -> None:
    record = ttr_record([0.1, 0.2, 0.4], 0.5, mechanism=make_mechanism())
    folder = write_sweep(tmp_path / "x", {}, {"tuned_0": record})
    spec = parse_report({"figures": {"f": FIGURES["per_layer"]}}).figures["f"]
    panel = figures.draw(load_sweep(folder), spec).axes[0]
    curve, outside = panel.lines
    assert curve.get_ydata().tolist() == [0, 1, 2, 3]
    assert outside.get_ydata().tolist() == [0, 3]
    labels = [label.get_text() for label in panel.get_xticklabels()]
    assert labels == ["embedding", "1", "2", "final norm"]


def test_bands_of_several_seeds_are_intervals_over_seeds(tmp_path: Path) -> None:
    """Of numbers that are not of texts; those of texts are wider."""
    values = [0.1, 0.4, 0.2]
    records = {}
    for seed, value in enumerate(values):
        mechanism = make_mechanism()
        for key, ci95 in (("weights/spectral", None), ("reference/l2", [(value, value + 1)])):
            curve = LayerCurve(layers=["block 1"], mean=[value], ci95=ci95)
            mechanism.per_layer[key] = curve
        records[f"tuned_{seed}"] = ttr_record([0.1, 0.2, 0.4], 0.5, mechanism=mechanism)
    folder = write_sweep(tmp_path / "x", {}, records)
    spec = parse_report({"figures": {"f": FIGURES["per_layer"]}}).figures["f"]
    of_weights, of_texts = figures.draw(load_sweep(folder), spec).axes[1].collections
    half = stats.t.ppf(0.975, 2) * np.std(values, ddof=1) / 3**0.5
    band = of_weights.get_paths()[0].get_extents()
    assert (band.y0, band.y1) == pytest.approx((np.mean(values) - half, np.mean(values) + half))
    assert of_texts.get_paths()[0].get_extents().height > 2 * half


def test_steps_of_both_models_are_drawn_apart(tmp_path: Path) -> None:
    """As a moving average."""
    tuned, base = [float(i % 3) for i in range(20)], [5.0] * 20
    per_step = PerSide(tuned={"gen/entropy": tuned}, base={"gen/entropy": base}, reference={})
    record = ttr_record([0.1, 0.2, 0.4], 0.5, per_step=per_step)
    folder = write_sweep(tmp_path / "x", {}, {"tuned_0": record})
    figure = FIGURES["per_position"] | {"sides": ["tuned", "base"], "window": 3}
    spec = parse_report({"figures": {"f": figure}}).figures["f"]
    panel = figures.draw(load_sweep(folder), spec).axes[0]
    drawn = {line.get_label(): line.get_xydata().tolist() for line in panel.lines}
    steps = [float(step) for step in range(2, 20)]
    assert drawn == {
        "tuned": [[step, pytest.approx(1)] for step in steps],
        "base": [[step, pytest.approx(5)] for step in steps],
    }


def test_a_figure_of_an_unknown_axis_is_an_error(half_done: Path) -> None:
    spec = parse_report({"figures": {"f": FIGURES["bars"] | {"rows": "systems"}}}).figures["f"]
    with pytest.raises(UserError, match=r"no such axis(.|\n)*did you mean system"):
        figures.draw(load_sweep(half_done), spec)


def test_positions_with_a_new_token_come_first_and_stay_in_order() -> None:
    next_tokens = make_next_tokens()
    (changed,) = changed_positions(next_tokens, 1)
    assert changed.context == "It is"
    assert [token.text for token in changed.tuned] == [" $b", " a"]
    assert [position.context for position in changed_positions(next_tokens, 9)] == ["It", "It is"]
    assert changed_positions(NextTokens(token_texts=["It"], positions=[]), 3) == []
