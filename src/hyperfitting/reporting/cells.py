"""The numbers of a report: an estimate of one run, or over several, or why there is none."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.stats import spearmanr
from scipy.stats import t as student_t

from hyperfitting import formatting
from hyperfitting.metrics.estimate import Difference, Estimate
from hyperfitting.metrics.registry import metric
from hyperfitting.metrics.uncertainty import Floats, paired_difference, rank_correlation
from hyperfitting.record.downstream import Downstream
from hyperfitting.record.schema import Record, Side
from hyperfitting.reporting.preference import PREFERENCE, preference_share
from hyperfitting.reporting.spec import ColumnSpec
from hyperfitting.reporting.sweep_records import RunEntry, SweepRecords

LEVEL = 0.95
_MIN_CORRELATED = 3
"""Different values without which there is no rank correlation."""


@dataclass(frozen=True)
class Cell:
    """A number with its interval, or why there is none."""

    estimate: Estimate | None = None
    """Over texts where one run makes it, over runs where several do."""
    missing: str = ""
    """Why there is no estimate."""
    n_finished: int = 0
    """Runs that the estimate is of."""
    n_runs: int = 0
    """Runs that it should be of."""
    note: str = ""
    """What a reader must know of the number, or instead of it."""

    def texts(self, form: str) -> tuple[str, str]:
        """Return it as a table shows it: the mean, and its interval with what must be known."""
        remarks = [self.note] if self.note else []
        if self.estimate is None:
            return "", f"({'; '.join([self.missing, *remarks])})"
        if self.n_finished < self.n_runs:
            remarks.insert(0, f"{self.n_finished} of {self.n_runs} runs")
        mean, _, interval = formatting.estimate(self.estimate, form).partition(" ")
        return mean, f"{interval} ({'; '.join(remarks)})".strip() if remarks else interval


def table_cell(sweep: SweepRecords, labels: Mapping[str, str], column: ColumnSpec) -> Cell:
    """Return the number of the runs with some labels.

    The number of one run has its interval over texts; that of several that differ is their mean
    with Student's t interval over runs.

    Args:
        sweep: all runs.
        labels: of the cell; runs that share them differ in what is averaged, such as the seed.
        column: which number.
    """
    runs = sweep.labeled(labels)
    if not runs:
        return Cell(missing="not at this scale")
    if column.spearman is not None:
        return _correlation_cell(runs, column, column.spearman)
    if column.key == PREFERENCE:
        cells = [_preference_cell(sweep, run, column) for run in runs]
    elif column.minus is None:
        cells = [_run_cell(run, column) for run in runs]
    else:
        cells = [
            _difference_cell(run, other, column)
            for run in runs
            for other in sweep.labeled({**run.labels, **column.minus})
        ]
        if not cells:
            return Cell(missing="what it is compared with is not at this scale")
    estimates = [cell.estimate for cell in cells if cell.estimate is not None]
    if not estimates:
        return cells[0]
    estimate = estimates[0] if len(cells) == 1 else over_runs(estimates)
    notes = "; ".join(dict.fromkeys(cell.note for cell in cells if cell.note))
    return Cell(estimate.scaled(column.scale), "", len(estimates), len(cells), notes)


def _preference_cell(sweep: SweepRecords, run: RunEntry, column: ColumnSpec) -> Cell:
    estimate, missing, note = preference_share(sweep, run, column)
    return Cell(estimate, missing, int(estimate is not None), 1, note)


def over_runs(estimates: Sequence[Estimate]) -> Estimate:
    """Return the mean over runs; the interval is open with a single one.

    Runs with the same number are one measurement, repeated: of the base model with several seeds of
    training, say. Their interval is that of the first, over texts.
    """
    means = np.array([estimate.mean for estimate in estimates])
    if len(means) > 1 and np.ptp(means) == 0:
        return estimates[0]
    mean, ci95 = float(means.mean()), None
    if len(means) > 1:
        half = float(student_t.ppf((1 + LEVEL) / 2, len(means) - 1))
        half *= float(means.std(ddof=1)) / len(means) ** 0.5
        ci95 = (mean - half, mean + half)
    return Estimate(mean, ci95, len(means))


def _run_cell(run: RunEntry, column: ColumnSpec) -> Cell:
    record = run.record
    if record is None:
        return Cell(missing=run.missing)
    if column.task is not None:
        return _task_cell(record.downstream, column, column.task)
    part = record.slice_at(column.length, column.dataset)
    if part is None:
        where = " ".join(str(given) for given in (column.dataset, column.length) if given)
        return Cell(missing=f"not measured at {where}")
    if column.statistic == "max":
        per_text = record.per_text.values(column.side).get(column.key, [])
        values = [value for value in per_text if value is not None]
        return _measured(Estimate(max(values), None, len(values)) if values else None)
    return _measured(record.estimate(part, column.side, column.key))


def _task_cell(downstream: Downstream | None, column: ColumnSpec, task: str) -> Cell:
    """Return a model's number on one downstream task or group."""
    by_side = downstream.by_name.get(task, {}) if downstream is not None else {}
    cell = _measured(by_side.get(column.side, {}).get(column.key))
    is_accuracy = column.key in ("down/likelihood", "down/generation")
    if downstream is not None and is_accuracy and downstream.is_at_chance(task, column.side):
        cell = replace(cell, note="at chance")
    return cell


def _difference_cell(run: RunEntry, other: RunEntry, column: ColumnSpec) -> Cell:
    """Return a run's number minus that of another run's tuned model on the same texts, paired."""
    record, subtracted = run.record, other.record
    if record is None or subtracted is None:
        return Cell(missing=(run if record is None else other).missing)
    if contexts(record, column.dataset) != contexts(subtracted, column.dataset):
        return Cell(missing=f"of other texts than {other.name}")
    values, subtracted_values = (
        per_text(record, column, column.side),
        per_text(subtracted, column, "tuned"),
    )
    if values is None or subtracted_values is None:
        return Cell(missing="not measured for each text")
    return _measured(difference(record, column, values, subtracted_values))


def per_text(record: Record, column: ColumnSpec, side: Side) -> Floats | None:
    """Return a column's values for each text of a record at full length, (N,); none: it has none.

    Of a metric that is the exponential of another one's mean, the values are those of that one.
    """
    values = record.text_values(side, metric(column.key).exp_of or column.key)
    of_rows = [values[row] for row in _rows(record, column.dataset)]
    return np.array(of_rows, dtype=float) if set(of_rows) - {None} else None


def difference(
    record: Record, column: ColumnSpec, values: Floats, subtracted: Floats
) -> Difference | None:
    """Return the difference of two models' values (see `per_text`), paired by text."""
    return paired_difference(
        values,
        subtracted,
        record.config["evaluation"]["bootstrap"],
        transform=np.exp if metric(column.key).exp_of else None,
    )


def _correlation_cell(runs: Sequence[RunEntry], column: ColumnSpec, field: str) -> Cell:
    """Return Spearman's rank correlation of a config field with a metric, over runs.

    Its interval is over texts, if all runs have values of the same ones.
    """
    points: list[tuple[float, float]] = []
    measured: list[Record] = []
    for run in runs:
        cell = _run_cell(run, column)
        value = config_value(run.record, field)
        if value is not None and cell.estimate is not None and run.record is not None:
            points.append((value, cell.estimate.mean))
            measured.append(run.record)
    x, y = (np.array(values) for values in zip(*points, strict=True)) if points else ((), ())
    if len(np.unique(x)) < _MIN_CORRELATED or len(np.unique(y)) < 2:
        return Cell(missing="too few different values")
    texts = _paired_texts(measured, column)
    resamples = measured[0].config["evaluation"]["bootstrap"]
    resampled = None if texts is None else rank_correlation(x, texts, resamples)
    ci95 = None if resampled is None else resampled.estimate.ci95
    cell = _measured(Estimate(float(spearmanr(x, y).statistic), ci95, len(points)))
    return replace(cell, note="interval over texts" if ci95 else "")


def _paired_texts(records: Sequence[Record], column: ColumnSpec) -> Floats | None:
    """Return a column's values of K runs on the same N texts, (K, N); none: they are not kept."""
    if column.length is not None or len({tuple(contexts(record)) for record in records}) > 1:
        return None
    texts = [per_text(record, column, column.side) for record in records]
    kept = [values for values in texts if values is not None]
    return np.array(kept) if len(kept) == len(records) else None


def config_value(record: Record | None, field: str) -> float | None:
    """Return a number of a run's config by its dotted name; none: it is not set there."""
    value: Any = record.config if record is not None else None
    for name in field.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return float(value) if isinstance(value, int | float) else None


def _measured(estimate: Estimate | None) -> Cell:
    return Cell(missing="not measured") if estimate is None else Cell(estimate, "", 1, 1)


def contexts(record: Record, dataset: str | None = None) -> list[tuple[str, str]]:
    """Return what was continued; records with the same are compared text by text.

    Args:
        record: of a run.
        dataset: evaluation dataset, or `chat`: the questions; none: all evaluation texts.
    """
    texts = record.texts
    return [(texts[row].dataset, texts[row].context.text) for row in _rows(record, dataset)]


def _rows(record: Record, dataset: str | None) -> list[int]:
    """Return which of `Record.texts` are of a dataset; none: all but the answers to questions."""
    if dataset is None:
        return list(range(len(record.samples)))
    return [row for row, text in enumerate(record.texts) if text.dataset == dataset]
