"""A quantity of the runs of one seed: its number, with one value per text where there are such."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import spearmanr

from hyperfitting.metrics.diversity import ttr
from hyperfitting.metrics.estimate import Estimate
from hyperfitting.metrics.registry import metric
from hyperfitting.metrics.uncertainty import Floats
from hyperfitting.record.schema import NextToken, Position, Record, Side
from hyperfitting.reporting.cells import config_value, contexts, linearized, text_values
from hyperfitting.reporting.claims.schema import Quantity
from hyperfitting.reporting.sweep_records import RunEntry

_WINDOW = 96
_EARLY_SHARE = 10 / 22
"""P2's first 10 layers as a share of TinyLlama's 22, for models of other depths."""
_FITTED_LOSS = 0.1
"""Training loss near zero, as in p1-training-loss."""
_MIN_CORRELATED = 3
_HALF = 0.5


@dataclass(frozen=True)
class Measurement:
    """A quantity of the runs of one seed, or the difference of two."""

    number: float
    texts: Floats | None = None
    """(N,) values whose mean the number is; none: it is no such mean, or they are not kept. Of a
    rank correlation (K, N): of the runs of each setting."""
    linearized: Floats | None = None
    """(N,) the same of a number that is no mean: its first-order terms (`cells.linearized`)."""
    settings: tuple[float, ...] = ()
    """(K,) with which the number is the rank correlation, in order; empty: it is none."""
    interval: Estimate | None = None
    """The number with its interval over texts, if any, where the values are not kept."""
    is_binary: bool = False
    """Whether the value of each text is 0 or 1."""
    contexts: tuple[tuple[str, str], ...] = ()
    """Dataset and context of each text: numbers of the same texts are paired."""
    is_paired: bool = True
    """Whether both numbers of a difference are of the same texts."""

    @property
    def text_values(self) -> Floats | None:
        """(N,) values of the texts, or linearized, whose mean the number is; none: not kept."""
        return None if self.settings else (self.linearized if self.texts is None else self.texts)

    def minus(self, other: "Measurement", recorded: Estimate | None) -> "Measurement":
        """Return the difference to another number, paired by text where values are kept.

        Args:
            other: what is subtracted.
            recorded: the same difference with its paired interval, as a record may have it.
        """
        is_paired = self.contexts == other.contexts
        texts = linear = None
        number = self.number - other.number
        if is_paired:
            texts = _difference(self.texts, other.texts)
            linear = _difference(self.text_values, other.text_values)
        if texts is not None:
            if np.isnan(texts).all():
                raise NotMeasuredError("no text has both values")
            number = float(np.nanmean(texts))
        return Measurement(
            number,
            texts,
            linear,
            interval=recorded or _independent_difference(self.interval, other.interval),
            contexts=self.contexts,
            is_paired=is_paired,
        )


def _difference(x: Floats | None, y: Floats | None) -> Floats | None:
    return None if x is None or y is None else x - y


def _independent_difference(x: Estimate | None, y: Estimate | None) -> Estimate | None:
    """Return the difference of two independent numbers; none: an interval is missing.

    A difference on the same texts is mostly more certain than that.
    """
    if x is None or y is None or x.ci95 is None or y.ci95 is None:
        return None
    mean, low, high = x.mean - y.mean, x.ci95, y.ci95
    below = float(np.hypot(x.mean - low[0], high[1] - y.mean))
    above = float(np.hypot(low[1] - x.mean, y.mean - high[0]))
    return Estimate(mean, (mean - below, mean + above), min(x.n, y.n))


class NotMeasuredError(Exception):
    """The runs do not have a quantity; the message has the reason."""


def measure(runs: Sequence[RunEntry], quantity: Quantity) -> Measurement:
    """Return a quantity of finished runs, which share a seed.

    Raises:
        NotMeasuredError: they do not have it, or are more than one where one is meant.
        UserError: a file beside a record is damaged.
    """
    if quantity.spearman is not None:
        return _correlation(runs, quantity, quantity.spearman)
    if quantity.key == "top1_agreement":
        return _agreement(runs)
    if len(runs) != 1:
        raise NotMeasuredError(f"{len(runs)} runs have these labels: one is meant")
    record = runs[0].record
    if record is None:
        raise NotMeasuredError(runs[0].missing)
    if quantity.epoch is not None:
        return _of_history(record, quantity)
    if quantity.key in _DERIVED:
        return _of_texts(record, np.array(_DERIVED[quantity.key](record, quantity.side)))
    if quantity.key in _DERIVED_NUMBERS:
        return _DERIVED_NUMBERS[quantity.key](record)
    return _of_metric(record, quantity)


def _of_metric(record: Record, quantity: Quantity) -> Measurement:
    length = quantity.length or record.overall.max_new_tokens
    part = record.slice_at(length)
    if part is None:
        raise NotMeasuredError(f"no continuations of {length} tokens")
    values = text_values(record, quantity.key, quantity.side, quantity.length)
    is_mean = not metric(quantity.key).exp_of
    if quantity.statistic == "max":
        if values is None:
            raise NotMeasuredError("values per text are kept at full length only")
        if not is_mean:
            raise NotMeasuredError(f"the highest of an exponential ({quantity.key}) is not defined")
        return Measurement(float(np.nanmax(values)))
    if values is not None and is_mean:
        return _of_texts(record, values, metric(quantity.key).is_binary)
    estimate: Estimate | None = record.estimate(part, quantity.side, quantity.key)
    if estimate is None:
        raise NotMeasuredError(f"{quantity.key} is not measured")
    return Measurement(
        estimate.mean,
        linearized=None if values is None else linearized(values, quantity.key),
        interval=estimate,
        contexts=tuple(contexts(record)),
    )


def recorded_difference(runs: Sequence[RunEntry], quantity: Quantity) -> Estimate | None:
    """Return the tuned minus the base model's number with the paired interval that a record has."""
    record = runs[0].record if len(runs) == 1 else None
    part = record.slice_at(quantity.length) if record is not None else None
    return part.difference.get(quantity.key) if part is not None else None


def _of_texts(record: Record, texts: Floats, is_binary: bool = False) -> Measurement:
    if np.isnan(texts).all():
        raise NotMeasuredError("no text has a value")
    return Measurement(
        float(np.nanmean(texts)), texts, is_binary=is_binary, contexts=tuple(contexts(record))
    )


def _of_history(record: Record, quantity: Quantity) -> Measurement:
    rows = [row for row in record.history if quantity.key in row]
    if not rows:
        raise NotMeasuredError(f"{quantity.key} was not measured during training")
    if quantity.epoch == "highest":
        return Measurement(max(rows, key=lambda row: row[quantity.key])["epoch"])
    if isinstance(quantity.epoch, int):
        rows = [row for row in rows if row["epoch"] == quantity.epoch]
    if not rows:
        raise NotMeasuredError(f"{quantity.key} was not measured at epoch {quantity.epoch}")
    return Measurement(rows[0 if quantity.epoch == "first" else -1][quantity.key])


def _agreement(runs: Sequence[RunEntry]) -> Measurement:
    """Return how often two runs have the same most likely token (P1, Figure 5, left)."""
    records = [run.record for run in runs if run.record is not None]
    if len({tuple(contexts(record)) for record in records}) != 1:
        raise NotMeasuredError("the runs are of different texts")
    tokens = [run.predictions["tuned/top1"] for run in runs if run.predictions is not None]
    if len(tokens) < max(2, len(runs)) or len({top1.shape for top1 in tokens}) > 1:
        raise NotMeasuredError("fewer than two runs have predictions of the same texts")
    equal = [(a == b).mean(axis=1) for a, b in itertools.combinations(tokens, 2)]  # (pairs, N)
    return _of_texts(records[0], np.mean(equal, axis=0))


def _correlation(runs: Sequence[RunEntry], quantity: Quantity, field: str) -> Measurement:
    plain = quantity.model_copy(update={"spearman": None})
    points: dict[float, Measurement] = {}
    for run in runs:
        value = config_value(run.record, field)
        if value in points:
            raise NotMeasuredError(f"several runs have {field}={value:g}: one is meant")
        if value is not None:
            points[value] = measure([run], plain)
    settings = tuple(sorted(points))
    measured = [points[setting] for setting in settings]
    numbers = [measurement.number for measurement in measured]
    if len(settings) < _MIN_CORRELATED or len(set(numbers)) < 2:
        raise NotMeasuredError("too few different values")
    texts = [measurement.texts for measurement in measured if measurement.texts is not None]
    are_paired = len({m.contexts for m in measured}) == 1 and len(texts) == len(measured)
    return Measurement(
        float(spearmanr(settings, numbers).statistic),
        np.array(texts) if are_paired else None,
        settings=settings,
        contexts=measured[0].contexts,
    )


def _first_ttr(record: Record, side: Side) -> list[float]:
    return [ttr(getattr(sample, side).tokens[:_WINDOW]) for sample in record.samples]


def _ttr_fall(record: Record, side: Side) -> list[float]:
    ends = [ttr(getattr(sample, side).tokens[-_WINDOW:]) for sample in record.samples]
    return [first - last for first, last in zip(_first_ttr(record, side), ends, strict=True)]


def _unseen_probability(record: Record) -> Measurement:
    probabilities = [
        token.probability
        for along in record.next_tokens.values()
        for position in along.positions
        for token in position.tuned
        if not token.in_training_data and _base_probability(position, token) < _HALF
    ]
    if not probabilities:
        raise NotMeasuredError("no such next tokens are kept (evaluation.top_tokens)")
    return Measurement(max(probabilities))


def _base_probability(position: Position, token: NextToken) -> float:
    """Return the base model's probability of a token; 0: it is not among those that are kept."""
    return next((other.probability for other in position.base if other.id == token.id), 0.0)


def _early_cosine(record: Record) -> Measurement:
    """Return the lowest mean cosine similarity of the first blocks, with the interval there."""
    curves = record.mechanism.per_layer if record.mechanism is not None else {}
    curve = curves.get("reference/cosine")
    if curve is None:
        raise NotMeasuredError("hidden states are not compared (mechanism.measures)")
    n_blocks = sum(layer.startswith("block ") for layer in curve.layers)
    blocks = {f"block {i}" for i in range(1, round(_EARLY_SHARE * n_blocks) + 1)}
    intervals: Sequence[tuple[float, float] | None] = curve.ci95 or [None] * len(curve.layers)
    points = [
        (mean, ci95)
        for layer, mean, ci95 in zip(curve.layers, curve.mean, intervals, strict=True)
        if layer in blocks and mean is not None
    ]
    mean, ci95 = min(points, key=lambda point: point[0])
    interval = Estimate(mean, ci95, len(record.samples))
    return Measurement(mean, interval=interval, contexts=tuple(contexts(record)))


def _fit_to_peak(record: Record) -> Measurement:
    """Return the epochs from a training loss near zero to the highest TTR (P1, Figure 2)."""
    fitted = [r["epoch"] for r in record.history if r.get("train/loss", math.inf) < _FITTED_LOSS]
    if not fitted:
        raise NotMeasuredError(f"the training loss is never below {_FITTED_LOSS}")
    validated = [row for row in record.history if "gen/ttr" in row]
    if not validated:
        raise NotMeasuredError("gen/ttr was not measured during training")
    return Measurement(max(validated, key=lambda row: row["gen/ttr"])["epoch"] - fitted[0])


_DERIVED: dict[str, Callable[[Record, Side], list[float]]] = {
    "ttr_first_96": _first_ttr,
    "ttr_fall_96": _ttr_fall,
}
"""One value per text."""
_DERIVED_NUMBERS: dict[str, Callable[[Record], Measurement]] = {
    "unseen_probability": _unseen_probability,
    "early_cosine": _early_cosine,
    "fit_to_peak": _fit_to_peak,
}
