"""Which metric predicts preference: rank correlation over items, with intervals."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hyperfitting.metrics.diversity import distinct_n, ends_in_loop, longest_loop, rep_n, ttr
from hyperfitting.metrics.estimate import Estimate
from hyperfitting.preference.bootstrap import TAILS, cluster_weights
from hyperfitting.preference.items import Choice, Item, Origin
from hyperfitting.preference.results import Correlation
from hyperfitting.record.schema import Record

Floats = NDArray[np.float64]
SCORES: Mapping[Choice, float] = {"first": 1.0, "equal": 0.5, "both_bad": 0.5, "second": 0.0}
"""What a judgment counts for the first text."""
_OF_TOKENS: Mapping[str, Callable[[Sequence[int]], float]] = {
    "gen/ttr": ttr,
    "gen/distinct_2": lambda tokens: distinct_n(tokens, 2),
    "gen/rep_2": lambda tokens: rep_n(tokens, 2),
    "gen/rep_3": lambda tokens: rep_n(tokens, 3),
    "gen/rep_4": lambda tokens: rep_n(tokens, 4),
    "gen/longest_loop": longest_loop,
    "gen/ends_in_loop": ends_in_loop,
}
"""Metrics of tokens alone: computed at any length, where a record has the full one only."""
_MIN_ITEMS = 10
"""Items below which a correlation says nothing."""


def correlations(
    records: Mapping[str, Record],
    items: Sequence[Item],
    choices: Sequence[Sequence[Choice]],
    resamples: int,
    seed: int,
) -> list[Correlation]:
    """Return how each metric's difference correlates with the mean judgment, strongest first.

    Args:
        records: by run; items of other runs are left out.
        items: normal items.
        choices: the judgments of each.
        resamples: of the contexts.
        seed: of the resampling.
    """
    known = [i for i, item in enumerate(items) if item.first.origin.run in records]
    known = [i for i in known if items[i].second.origin.run in records and choices[i]]
    preference = np.array([np.mean([SCORES[c] for c in choices[i]]) for i in known])
    contexts = [items[i].key for i in known]
    rows = [dict(_differences(records, items[i])) for i in known]
    keys = dict.fromkeys(key for row in rows for key in row)
    results = []
    for key in keys:
        values = np.array([row.get(key, np.nan) for row in rows])
        estimate = spearman(values, preference, contexts, resamples, seed)
        if estimate is not None:
            results.append(Correlation(metric=key, spearman=estimate))
    return sorted(results, key=lambda c: -abs(c.spearman.mean))


def _differences(records: Mapping[str, Record], item: Item) -> Iterator[tuple[str, float]]:
    """Yield the metrics of both texts of an item: key, and the first's minus the second's."""
    first, second = (
        dict(_text_metrics(records[text.origin.run], text.origin, item.length))
        for text in (item.first, item.second)
    )
    yield from ((key, first[key] - second[key]) for key in first if key in second)


def _text_metrics(record: Record, origin: Origin, length: int) -> Iterator[tuple[str, float]]:
    """Yield the metrics of a text at a length; at full length all that the record has."""
    if origin.side == "scrambled":
        return
    tokens = getattr(record.samples[origin.sample], origin.side).tokens[:length]
    for key, metric in _OF_TOKENS.items():
        yield key, metric(tokens) if len(tokens) else np.nan
    if length == record.overall.max_new_tokens:
        for key, values in record.per_text.values(origin.side).items():
            value = values[origin.sample]
            if key.startswith("gen/") and key not in _OF_TOKENS and value is not None:
                yield key, value


def spearman(
    x: Floats, y: Floats, clusters: Sequence[Any], resamples: int, seed: int
) -> Estimate | None:
    """Return Spearman's correlation with its 95% percentile interval, clusters resampled.

    Args:
        x: (N,) values; NaN ones are left out.
        y: (N,) values.
        clusters: (N,) cluster of each.
        resamples: of the clusters.
        seed: of the resampling.

    Returns:
        None with fewer than 10 values, or if either is constant.
    """
    present = np.isfinite(x)
    x, y = x[present], y[present]
    if len(x) < _MIN_ITEMS or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    index = {cluster: i for i, cluster in enumerate(dict.fromkeys(clusters))}
    codes = np.array([index[cluster] for cluster in clusters], dtype=np.intp)[present]
    _, codes = np.unique(codes, return_inverse=True)
    value = float(weighted_spearman(x, y, np.ones((1, len(x))))[0])
    if codes.max() == 0:
        return Estimate(value, None, len(x))
    weights = cluster_weights(codes, resamples, np.random.default_rng(seed))
    replicates = weighted_spearman(x, y, weights)
    low, high = np.quantile(replicates[np.isfinite(replicates)], TAILS)
    return Estimate(value, (float(low), float(high)), len(x))


def weighted_spearman(x: Floats, y: Floats, weights: Floats) -> Floats:
    """Return Spearman's correlation of N values repeated as weights (B, N) say: (B,)."""
    ranks = [_weighted_ranks(values, weights) for values in (x, y)]
    total = weights.sum(axis=1, keepdims=True)
    centered = [r - (weights * r).sum(axis=1, keepdims=True) / total for r in ranks]
    products = [
        (weights * centered[a] * centered[b]).sum(axis=1) for a, b in ((0, 1), (0, 0), (1, 1))
    ]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(products[0] / np.sqrt(products[1] * products[2]))


def _weighted_ranks(values: Floats, weights: Floats) -> Floats:
    """Return the mean rank of each value among the repeated ones: (B, N)."""
    _, groups = np.unique(values, return_inverse=True)
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.diff(groups[order], prepend=-1))
    sizes = np.add.reduceat(weights[:, order], starts, axis=1)  # (B, groups)
    ranks = np.cumsum(sizes, axis=1) - (sizes - 1) / 2
    return np.asarray(ranks[:, groups])
