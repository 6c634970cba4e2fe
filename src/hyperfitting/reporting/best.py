"""Which numbers of a table's column are the best, with those that are not told apart from it."""

from collections.abc import Mapping, Sequence

from hyperfitting.metrics.estimate import Estimate
from hyperfitting.metrics.registry import Direction, metric
from hyperfitting.reporting.cells import Cell, contexts, difference, per_text
from hyperfitting.reporting.preference import PREFERENCE
from hyperfitting.reporting.spec import ColumnSpec
from hyperfitting.reporting.sweep_records import SweepRecords


def best_cells(
    sweep: SweepRecords,
    labels: Sequence[Mapping[str, str]],
    cells: Sequence[Cell],
    column: ColumnSpec,
) -> set[int]:
    """Return the rows whose number is the best of a column, or tied with it.

    Two numbers of one run each are tied if the 95% interval of their difference, paired by text,
    includes 0; all others (of several runs, at another than the full length, of metrics without a
    value for each text) if their intervals overlap. No number is the best where the metric has no
    direction, where one has no interval, or where all are tied.

    Args:
        sweep: with the runs of the rows.
        labels: of each row.
        cells: the number of each row.
        column: whose numbers they are.
    """
    estimates = {i: cell.estimate for i, cell in enumerate(cells) if cell.estimate is not None}
    direction = _direction(column)
    if not direction or any(estimate.ci95 is None for estimate in estimates.values()):
        return set()
    sign = 1 if direction == "higher" else -1
    best = max(estimates, key=lambda row: sign * estimates[row].mean, default=0)
    tied = {
        row
        for row, estimate in estimates.items()
        if row == best
        or _is_tied(sweep, (labels[row], labels[best]), (estimate, estimates[best]), column)
    }
    return tied if len(tied) < len(estimates) else set()


def _direction(column: ColumnSpec) -> Direction:
    """Return which of a column's numbers are better; empty: none, or they compare already."""
    if column.minus is not None or column.spearman is not None:
        return ""
    return "higher" if column.key == PREFERENCE else metric(column.key).direction


def _is_tied(
    sweep: SweepRecords,
    labels: tuple[Mapping[str, str], Mapping[str, str]],
    estimates: tuple[Estimate, Estimate],
    column: ColumnSpec,
) -> bool:
    interval = _paired_interval(sweep, labels, column)
    if interval is None:
        (low, high), (other_low, other_high) = (e.ci95 or (e.mean, e.mean) for e in estimates)
        return low <= other_high and other_low <= high
    return interval[0] <= 0 <= interval[1]


def _paired_interval(
    sweep: SweepRecords, labels: tuple[Mapping[str, str], Mapping[str, str]], column: ColumnSpec
) -> tuple[float, float] | None:
    """Return the interval of the difference of two rows, paired by text; none: not comparable."""
    runs = [sweep.labeled(row) for row in labels]
    records = [run.record for row in runs for run in row]
    if len(records) != 2 or records[0] is None or records[1] is None:
        return None
    record, other = records[0], records[1]
    full = {None, record.overall.max_new_tokens}
    changes_by_slice = metric(column.key).among_texts and column.dataset is not None
    if column.length not in full or changes_by_slice:
        return None
    if contexts(record, column.dataset) != contexts(other, column.dataset):
        return None
    values = [per_text(r, column, column.side) for r in (record, other)]
    if values[0] is None or values[1] is None:
        return None
    estimate = difference(record, column, values[0], values[1])
    return None if estimate is None else estimate.ci95
