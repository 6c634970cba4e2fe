"""Wins, ties and losses of each pair of systems, with intervals; strengths over all of them."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hyperfitting.metrics.estimate import Estimate
from hyperfitting.preference.agreement import agreement, counts, krippendorff_alpha
from hyperfitting.preference.bootstrap import TAILS, Codes, Interval, two_way_intervals
from hyperfitting.preference.items import ASPECT_QUESTIONS, Aspect, Item, Origin
from hyperfitting.preference.judgments import Judgment
from hyperfitting.preference.ranking import Comparisons
from hyperfitting.preference.results import Comparison, Strength, System

Floats = NDArray[np.float64]
Judged = Sequence[tuple[Item, Judgment]]
"""Judgments with their items."""
_REFERENCES = System(run="", side="reference")
_RANKING_RESAMPLES = 500  # each is a fit


@dataclass(frozen=True)
class Resampling:
    """How often the bootstraps resample, and their seed."""

    resamples: int = 2000
    seed: int = 0


def compare(judged: Judged, resampling: Resampling) -> list[Comparison]:
    """Return the comparison of each pair of systems, at each length, over all and each dataset."""
    cells: dict[tuple[System, System, int, str | None], list[tuple[Item, Judgment]]] = defaultdict(
        list
    )
    for item, judgment in judged:
        pair = _system(item.first.origin), _system(item.second.origin)
        for dataset in (None, item.dataset):
            cells[*pair, item.length, dataset].append((item, judgment))
    order = sorted(cells, key=lambda cell: (cell[2], cell[3] or "", *map(_name, cell[:2])))
    return [_comparison(cell, cells[cell], resampling) for cell in order]


def _system(origin: Origin) -> System:
    return System(run=origin.run, side=origin.side)


def _name(system: System) -> str:
    return f"{system.run}/{system.side}"


def _comparison(
    cell: tuple[System, System, int, str | None], judged: Judged, resampling: Resampling
) -> Comparison:
    choices = np.array([judgment.choice for _, judgment in judged])
    tied = (choices == "equal") | (choices == "both_bad")
    values = np.stack([choices != "second", choices == "first", tied], axis=1).astype(float)
    items, annotators = clusters(judged)
    shares = share_estimates(values, items, annotators, resampling)
    first, second, length, dataset = cell
    table = counts([item.id for item, _ in judged], choices.tolist())
    several = annotators.max() > 0
    return Comparison(
        first=first,
        second=second,
        dataset=dataset,
        length=length,
        items=int(items.max()) + 1,
        annotators=int(annotators.max()) + 1,
        wins=int((choices == "first").sum()),
        ties=int((choices == "equal").sum()),
        both_bad=int((choices == "both_bad").sum()),
        losses=int((choices == "second").sum()),
        preferred_or_equal=shares[0],
        preferred=shares[1],
        tied=shares[2],
        aspects=_aspects(judged, resampling),
        alpha=agreement(krippendorff_alpha, table, *_plan(resampling)) if several else None,
    )


def _aspects(judged: Judged, resampling: Resampling) -> dict[Aspect, Estimate]:
    """Return by aspect the share of answers that prefer the first text or find both equal."""
    estimates: dict[Aspect, Estimate] = {}
    for aspect in ASPECT_QUESTIONS:
        answered = [(item, j) for item, j in judged if aspect in j.aspects]
        if answered:
            values = np.array([[j.aspects[aspect] != "second"] for _, j in answered], dtype=float)
            estimates[aspect] = share_estimates(values, *clusters(answered), resampling)[0]
    return estimates


def _plan(resampling: Resampling) -> tuple[int, int]:
    return resampling.resamples, resampling.seed


def clusters(judged: Judged) -> tuple[Codes, Codes]:
    """Return the item and the annotator of each judgment as numbers from 0 on."""
    names = [item.id for item, _ in judged], [judgment.annotator for _, judgment in judged]
    items, annotators = (np.unique(list(n), return_inverse=True)[1] for n in names)
    return items, annotators


def share_estimates(
    values: Floats, items: Codes, annotators: Codes, resampling: Resampling
) -> list[Estimate]:
    """Return shares of judgments with two-way cluster intervals.

    Where all judgments are alike a resample shows no variation: the interval is then Clopper and
    Pearson's (1934), with the items as the trials.

    Args:
        values: (N, S), 0 or 1.
        items: (N,) item of each judgment.
        annotators: (N,) annotator of each judgment.
        resampling: of the bootstrap.
    """

    def shares(weights: Floats) -> Floats:
        return np.asarray(weights @ values / weights.sum(axis=1, keepdims=True))

    intervals = two_way_intervals(shares, items, annotators, *_plan(resampling))
    n_items = int(items.max()) + 1
    return [
        Estimate(float(mean), _share_interval(float(mean), interval, n_items), len(values))
        for mean, interval in zip(values.mean(axis=0), intervals, strict=True)
    ]


def _share_interval(mean: float, interval: Interval, n_items: int) -> Interval:
    bound = float(1 - TAILS[0] ** (1 / n_items))
    if mean in (0, 1):
        return (0.0, bound) if mean == 0 else (1 - bound, 1.0)
    return interval and (max(interval[0], 0.0), min(interval[1], 1.0))


def strengths(judged: Judged, resampling: Resampling) -> tuple[list[Strength], float | None]:
    """Return the strengths of all systems at the longest length, strongest first, and v.

    Returns:
        Nothing if there is no estimate: a group of systems has never won or tied against the rest.
    """
    longest = max((item.length for item, _ in judged), default=0)
    judged = [pair for pair in judged if pair[0].length == longest]
    systems: dict[str, System] = {}
    pairs = []
    for item, _ in judged:
        names = []
        for origin in (item.first.origin, item.second.origin):
            system = _REFERENCES if origin.side == "reference" else _system(origin)
            systems[_name(system)] = system
            names.append(_name(system))
        pairs.append((names[0], names[1]))
    if not pairs:
        return [], None
    fitted = Comparisons(pairs, [judgment.choice for _, judgment in judged])
    values, v = fitted.fit(fitted.totals())
    if np.isnan(values).any():
        return [], None
    resamples = min(_RANKING_RESAMPLES, resampling.resamples)
    intervals = fitted.intervals(*clusters(judged), resamples, resampling.seed)
    rows = [
        Strength(system=systems[name], log_strength=Estimate(float(value), interval, len(judged)))
        for name, value, interval in zip(fitted.systems, values, intervals, strict=True)
    ]
    return sorted(rows, key=lambda row: -row.log_strength.mean), v
