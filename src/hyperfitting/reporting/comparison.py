"""Base and tuned model side by side in numbers: on the terminal, the page and model cards."""

from collections.abc import Iterator

from hyperfitting.formatting import estimate, p_value
from hyperfitting.metrics.registry import METRICS, Metric
from hyperfitting.record.schema import Slice

HEADINGS = ("base", "tuned", "difference", "p")
CAPTION = "mean [95% interval over texts]; p of the paired permutation test"


def comparison_row(part: Slice, metric: Metric) -> list[str]:
    """Return a metric that the tuned model has: base, tuned, difference and its p-value."""
    difference = part.difference.get(metric.key)
    return [
        estimate(part.base.get(metric.key), metric.format),
        estimate(part.tuned[metric.key], metric.format),
        estimate(difference, metric.format, signed=True),
        p_value(difference.p if difference else None),
    ]


def comparison_rows(part: Slice) -> Iterator[tuple[str, list[str]]]:
    """Yield the label and the row of each metric of a slice that summaries show."""
    for key, metric in METRICS.items():
        if metric.in_summary and key in part.tuned:
            yield metric.axis_label, comparison_row(part, metric)
