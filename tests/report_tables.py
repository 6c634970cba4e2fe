"""A sweep of which some runs have finished, and the cells of a table of it."""

from pathlib import Path
from typing import Any

from hyperfitting.reporting import tables
from hyperfitting.reporting.cells import Cell
from hyperfitting.reporting.spec import TableSpec, parse_report
from hyperfitting.reporting.sweep_records import SweepRecords
from tests.records import ttr_record, write_sweep

COLUMNS = {
    "TTR": {"key": "gen/ttr", "scale": 100, "format": "{:.1f}"},
    "at 16": {"key": "gen/ttr", "length": 16},
    "longest": {"key": "gen/dataset_overlap", "statistic": "max", "format": "{:.0f}"},
    "preference": {"key": "preference"},
    "never": {"key": "gen/ttr", "length": 99},
}
TABLE: dict[str, Any] = {
    "caption": "A & B",
    "rows": ["model", "system"],
    "columns": COLUMNS,
    "published": [
        {"model": "ours", "system": "base", "TTR": 12.5},
        {"model": "another", "system": "tuned", "TTR": "1 or 2"},
    ],
    "source": "someone",
}


def table_spec(table: dict[str, Any]) -> TableSpec:
    return parse_report({"tables": {"main": table}}).tables["main"]


def cells_by_labels(sweep: SweepRecords, table: dict[str, Any]) -> dict[Any, dict[str, Cell]]:
    built = tables.build_table(sweep, "main", table_spec(table))
    return {tuple(row.labels.values()): row.cells for row in built.rows}


def mean_of(cell: Cell) -> float:
    assert cell.estimate is not None, cell.missing
    return cell.estimate.mean


def write_half_done(folder: Path) -> Path:
    """Write a sweep of six runs, of which four have finished."""
    return write_sweep(
        folder,
        {"tables": {"main": TABLE}},
        {
            "base_0": ttr_record([0.1, 0.2, 0.4], 0.5),
            "tuned_0": ttr_record([0.6, 0.6, 0.6], 0.7),
            "tuned_1": ttr_record([0.7, 0.7, 0.7], 0.8),
            "tuned_2": ttr_record([0.8, 0.8, 0.8], 0.9),
        },
    )
