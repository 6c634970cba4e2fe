"""The numbers of a report: an estimate of one run, or over several, or why there is none."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from hyperfitting import formatting
from hyperfitting.metrics.crossed import mean_of_intervals, mean_over_seeds
from hyperfitting.metrics.estimate import Difference, Estimate
from hyperfitting.metrics.registry import metric
from hyperfitting.metrics.uncertainty import Floats, paired_difference, rank_correlation
from hyperfitting.record.chat import CHAT
from hyperfitting.record.downstream import Downstream
from hyperfitting.record.schema import Record, Side
from hyperfitting.reporting.preference import PREFERENCE, preference_share
from hyperfitting.reporting.spec import ColumnSpec
from hyperfitting.reporting.sweep_records import RunEntry, SweepRecords

_MIN_CORRELATED = 3
"""Different values without which there is no rank correlation."""


@dataclass(frozen=True)
class Cell:
    """A number with its interval, or why there is none."""

    estimate: Estimate | None = None
    """Over texts where one run makes it, over runs and texts where several do."""
    missing: str = ""
    """Why there is no estimate."""
    n_finished: int = 0
    """Runs that the estimate is of."""
    n_runs: int = 0
    """Runs that it should be of."""
    note: str = ""
    """What a reader must know of the number, or instead of it."""
    text_values: Floats | None = field(default=None, compare=False)
    """Of one run: (N,) values of the texts (see `linearized`), whose mean the number is; none: they
    are not kept."""
    evaluated_on: Hashable = field(default=None, compare=False)
    """Of one run: identifies its texts or questions, by which runs are paired. None: unknown."""

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
    with an interval over runs and texts (`metrics.crossed`).

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
        return difference_cell(sweep, labels, column.minus, column, "tuned")
    cell = _over_runs(cells, column.scale)
    if cell.estimate is None or not metric(column.key).is_share:
        return cell
    return replace(cell, estimate=cell.estimate.clipped(0, column.scale))


def difference_cell(
    sweep: SweepRecords,
    labels: Mapping[str, str],
    subtracted: Mapping[str, str],
    column: ColumnSpec,
    side: Side,
) -> Cell:
    """Return the number of some runs minus that of others, paired by text and by other labels.

    Args:
        sweep: all runs.
        labels: of the runs.
        subtracted: labels in which the others differ.
        column: which number.
        side: of the others.
    """
    cells = [
        _difference_cell(run, other, column, side)
        for run in sweep.labeled(labels)
        for other in sweep.labeled({**run.labels, **subtracted})
    ]
    if not cells:
        return Cell(missing="what it is compared with is not at this scale")
    return _over_runs(cells, column.scale)


def _over_runs(cells: Sequence[Cell], scale: float) -> Cell:
    """Return the mean over the runs of some cells; without any that has finished, the first."""
    finished = [cell for cell in cells if cell.estimate is not None]
    if not finished:
        return cells[0]
    notes = "; ".join(dict.fromkeys(cell.note for cell in cells if cell.note))
    estimate = over_runs(finished).scaled(scale)
    if len(finished) == 1 < len(cells):  # of a mean over runs, of which one is known
        estimate = replace(estimate, ci95=None)
    return Cell(estimate, "", len(finished), len(cells), notes)


def _preference_cell(sweep: SweepRecords, run: RunEntry, column: ColumnSpec) -> Cell:
    estimate, missing, note = preference_share(sweep, run, column)
    return Cell(estimate, missing, int(estimate is not None), 1, note)


def over_runs(cells: Sequence[Cell]) -> Estimate:
    """Return the mean over the runs of some cells, which have estimates.

    Runs with the same number are one measurement, repeated: of the base model with several seeds of
    training, say. Their interval is that of the first, over texts. Runs of different texts are
    independent: their interval is Student's t over runs.
    """
    estimates = [cell.estimate for cell in cells if cell.estimate is not None]
    numbers = np.array([estimate.mean for estimate in estimates])
    if np.ptp(numbers) == 0:
        return estimates[0]
    evaluated_on = {cell.evaluated_on for cell in cells}
    if len(evaluated_on) > 1 or None in evaluated_on:
        return mean_over_seeds(numbers).estimate
    if all(cell.text_values is not None for cell in cells):
        return mean_over_seeds(numbers, [cell.text_values for cell in cells]).estimate
    return mean_of_intervals(numbers, estimates).estimate


def _run_cell(run: RunEntry, column: ColumnSpec) -> Cell:
    record = run.record
    return Cell(missing=run.missing) if record is None else _record_cell(record, column)


def _record_cell(record: Record, column: ColumnSpec) -> Cell:
    if column.task is not None:
        return _task_cell(record.downstream, column, column.task)
    if column.key.startswith("train/"):
        epochs = [row[column.key] for row in record.history if column.key in row]
        return _measured(Estimate(epochs[-1], None, 1) if epochs else None)
    part = record.slice_at(column.length, column.dataset)
    if part is None:
        where = " ".join(str(given) for given in (column.dataset, column.length) if given)
        return Cell(missing=f"not measured at {where}")
    values = _column_values(record, column, column.side)
    if column.statistic == "max":
        if values is None:
            return Cell(missing="not measured for each text")
        highest = np.nanmax(np.exp(values) if metric(column.key).exp_of else values)
        return _measured(Estimate(float(highest), None, int((~np.isnan(values)).sum())))
    return replace(
        _measured(record.estimate(part, column.side, column.key)),
        text_values=None if values is None else linearized(values, column.key),
        evaluated_on=tuple(contexts(record, column.dataset)),
    )


def _task_cell(downstream: Downstream | None, column: ColumnSpec, task: str) -> Cell:
    """Return a model's number on one downstream task or group."""
    by_side = downstream.by_name.get(task, {}) if downstream is not None else {}
    cell = _measured(by_side.get(column.side, {}).get(column.key))
    cell = replace(cell, evaluated_on=task)
    is_accuracy = column.key in ("down/likelihood", "down/generation")
    if downstream is not None and is_accuracy and downstream.is_at_chance(task, column.side):
        cell = replace(cell, note="at chance")
    return cell


def _difference_cell(run: RunEntry, other: RunEntry, column: ColumnSpec, side: Side) -> Cell:
    """Return a run's number minus that of another run on the same texts, paired."""
    record, subtracted = run.record, other.record
    if record is None or subtracted is None:
        return Cell(missing=(run if record is None else other).missing)
    if contexts(record, column.dataset) != contexts(subtracted, column.dataset):
        return Cell(missing=f"of other texts than {other.name}")
    values = _column_values(record, column, column.side)
    subtracted_values = _column_values(subtracted, column, side)
    if values is None or subtracted_values is None:
        return Cell(missing="not measured for each text")
    return replace(
        _measured(_difference(record, column, values, subtracted_values)),
        text_values=linearized(values, column.key) - linearized(subtracted_values, column.key),
        evaluated_on=tuple(contexts(record, column.dataset)),
    )


def linearized(values: Floats, key: str) -> Floats:
    """Return values (N,) whose mean a metric is, from those of the texts.

    The values themselves; of the exponential of their mean (a perplexity), its first-order terms,
    whose variance is that of the delta method.
    """
    if not metric(key).exp_of:
        return values
    mean = np.nanmean(values)
    return np.asarray(np.exp(mean) * (1 + values - mean))


def _column_values(record: Record, column: ColumnSpec, side: Side) -> Floats | None:
    return text_values(record, column.key, side, column.length, column.dataset)


def text_values(
    record: Record, key: str, side: Side, length: int | None = None, dataset: str | None = None
) -> Floats | None:
    """Return a metric's values for each text of a record, (N,); none: they are not kept.

    They are kept at full length. Of a metric that is the exponential of another one's mean, the
    values are those of that one.
    """
    full = record.answers if dataset == CHAT else record.overall
    if full is None or length not in (None, full.max_new_tokens):
        return None
    if metric(key).among_texts and dataset is not None:
        return None  # each slice has its own
    values = record.text_values(side, metric(key).exp_of or key)
    of_rows = [values[row] for row in _rows(record, dataset)]
    return np.array(of_rows, dtype=float) if set(of_rows) - {None} else None


def _difference(
    record: Record, column: ColumnSpec, values: Floats, subtracted: Floats
) -> Difference | None:
    """Return the difference of two models' values (see `text_values`), paired by text."""
    return paired_difference(
        values,
        subtracted,
        record.config["evaluation"]["bootstrap"],
        transform=np.exp if metric(column.key).exp_of else None,
    )


def _correlation_cell(runs: Sequence[RunEntry], column: ColumnSpec, field: str) -> Cell:
    """Return Spearman's rank correlation of a config field with a metric, mean over seeds."""
    by_seed: dict[float | None, list[Record]] = {}
    for run in runs:
        if run.record is not None and config_value(run.record, field) is not None:
            by_seed.setdefault(config_value(run.record, "seed"), []).append(run.record)
    cells = [_correlation_of_seed(records, column, field) for records in by_seed.values()]
    if not cells:
        return Cell(missing="too few different values")
    n_finished = sum(cell.n_finished for cell in cells)
    n_runs = n_finished + sum(run.record is None for run in runs)
    cell = replace(_over_runs(cells, 1.0), n_finished=n_finished, n_runs=n_runs)
    if cell.estimate is None or len(by_seed) == 1:
        return cell
    return replace(cell, estimate=cell.estimate.clipped(-1, 1), note="")


def _correlation_of_seed(records: Sequence[Record], column: ColumnSpec, field: str) -> Cell:
    """Return the rank correlation over the runs of one seed.

    Its interval is over texts, if all runs have values of the same ones.
    """
    measured = [
        (record, config_value(record, field), estimate.mean)
        for record in records
        if (estimate := _record_cell(record, column).estimate) is not None
    ]
    x = np.array([value for _, value, _ in measured], dtype=float)
    y = np.array([mean for _, _, mean in measured])
    if len(np.unique(x)) < _MIN_CORRELATED or len(np.unique(y)) < 2:
        return Cell(missing="too few different values")
    texts = _paired_texts([record for record, _, _ in measured], column)
    resamples = records[0].config["evaluation"]["bootstrap"]
    resampled = None if texts is None else rank_correlation(x, texts, resamples)
    ci95 = None if resampled is None else resampled.estimate.ci95
    return Cell(
        Estimate(float(spearmanr(x, y).statistic), ci95, len(measured)),
        n_finished=len(measured),
        note="interval over texts" if ci95 else "",
        evaluated_on=tuple(contexts(records[0], column.dataset)),
    )


def _paired_texts(records: Sequence[Record], column: ColumnSpec) -> Floats | None:
    """Return a column's values of K runs on the same N texts, (K, N); none: they are not kept."""
    if len({tuple(contexts(record)) for record in records}) > 1:
        return None
    texts = [_column_values(record, column, column.side) for record in records]
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
