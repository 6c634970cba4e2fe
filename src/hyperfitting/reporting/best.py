"""Which numbers of a table's column are the best, and which do not differ significantly from it."""

from collections.abc import Mapping, Sequence

from hyperfitting.metrics.estimate import Estimate
from hyperfitting.metrics.registry import Direction, metric
from hyperfitting.reporting.cells import Cell, difference_cell
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

    Two numbers are tied if the 95% interval of their difference, paired by run (such as by seed)
    and by text, includes 0; those that cannot be paired (at another than the full length, of
    metrics without a value for each text, of other texts) if their intervals overlap. No number is
    the best where the metric has no direction, where one has no interval, or where all are tied.

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
    cell = difference_cell(sweep, *labels, column, column.side)
    if cell.estimate is None or cell.estimate.ci95 is None or cell.n_finished < cell.n_runs:
        (low, high), (other_low, other_high) = (e.ci95 or (e.mean, e.mean) for e in estimates)
        return low <= other_high and other_low <= high
    low, high = cell.estimate.ci95
    return low <= 0 <= high
