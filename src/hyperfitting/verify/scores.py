"""A record's scores computed again from what lies beside them: its texts and `predictions.npz`.

Needs neither models nor store. What the record does not hold, the training sequences and the
models' probabilities while they generated, limits it: the text values of the metrics computed from
these are taken as recorded (their means and intervals are computed again), and at shorter lengths
they are left out. `verify.store` checks them with the artifacts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hyperfitting.config import from_plain
from hyperfitting.evaluation.config import EvaluationConfig
from hyperfitting.evaluation.forward import TOKEN_STATS
from hyperfitting.evaluation.scoring import (
    Comparison,
    ModelOutput,
    NgramCorpus,
    Scores,
    TokenizedText,
    Values,
)
from hyperfitting.evaluation.slices import per_text, slices
from hyperfitting.metrics.inputs import ScoringInputs
from hyperfitting.metrics.overlap import Overlap, histogram
from hyperfitting.metrics.registry import METRICS
from hyperfitting.record.files import Predictions
from hyperfitting.record.schema import SIDES, Record, Side
from hyperfitting.runtime.code_version import code_version
from hyperfitting.verify.values import Differences

RTOL, ATOL = 1e-9, 1e-12
"""Rounding: the same functions on the same numbers, with other versions of numpy or scipy."""
Stats = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class ScoresCheck:
    """How the recorded scores differ from those computed again."""

    differences: Differences
    not_computed: list[str]
    """Metrics whose recorded text values could not be computed again, and at shorter lengths
    (`KEY at 96`) those that could not at all."""


def check_scores(record: Record, predictions: Predictions) -> ScoresCheck:
    """Compare a record's scores with those of its texts and predictions.

    Args:
        record: of a run.
        predictions: of both models on the reference texts.

    Raises:
        ValueError: the predictions are not of these texts.
    """
    evaluation = from_plain(record.config).evaluation
    stats = {side: _token_stats(record, predictions, side) for side in ("tuned", "base")}
    recomputation = _Recomputation(record, evaluation, stats)
    sides = {side: recomputation.of_side(side) for side in SIDES}
    missing = {
        n: {key for side in sides.values() for key in side.missing[n]}
        for n in evaluation.max_new_tokens
    }
    full = evaluation.continuation_len
    scores = {side: recomputation.scores(side, sides[side], missing[full]) for side in SIDES}
    contexts = [TokenizedText(s.context.tokens, s.context.token_texts) for s in record.samples]
    comparison = Comparison(scores["tuned"], scores["base"], scores["reference"], contexts)
    expected = slices(comparison, evaluation)
    if len(record.slices) != len(expected):
        raise ValueError(f"{len(record.slices)} slices instead of {len(expected)}")
    differences = Differences(RTOL, ATOL)
    for i, (part, other) in enumerate(zip(record.slices, expected, strict=True)):
        old, new = part.model_dump(), other.model_dump()
        for group in (*SIDES, "difference"):
            for key in set(new[group]) - recomputation.compared:
                del new[group][key]
            extra = set(old[group]) - set(new[group])
            for key in extra & _not_computed(missing[part.max_new_tokens]):
                del old[group][key]
        differences.compare(old, new, f"slices[{i}]")
    for side, of_side in scores.items():
        values = {k: v for k, v in per_text(of_side).items() if k in recomputation.compared}
        differences.compare(record.per_text.values(side), values, f"per_text.{side}")
    lengths = {side: histogram(of_side.overlap.length) for side, of_side in scores.items()}
    differences.compare(record.overlap_histogram.model_dump(), lengths, "overlap_histogram")
    recorded = {
        (part.max_new_tokens, key)
        for part in record.slices
        for side in SIDES
        for key in part.estimates(side)
    }
    as_recorded = [
        key if n == full else f"{key} at {n}"
        for n in sorted(evaluation.max_new_tokens, reverse=True)
        for key in METRICS
        if (n, key) in recorded and key in _not_computed(missing[n])
    ]
    return ScoresCheck(differences, as_recorded)


@dataclass(frozen=True)
class _SideValues:
    """What can be computed of a side, by length."""

    inputs: dict[int, ScoringInputs]
    values: dict[int, Values]
    missing: dict[int, set[str]]
    """Metrics whose text values the record's texts and predictions do not give."""


def _not_computed(missing: set[str]) -> set[str]:
    """Return the metrics that are not computed where the text values of some are missing."""
    return {k for k, m in METRICS.items() if m.per_set or (m.exp_of or k) in missing}


@dataclass(frozen=True)
class _Recomputation:
    """The values of all metrics that the record's texts and predictions give."""

    record: Record
    evaluation: EvaluationConfig
    stats: Mapping[str, Stats]
    """Token statistics on the reference texts, of `tuned` and `base`."""

    @cached_property
    def _corpus(self) -> NgramCorpus:
        in_words = self.evaluation.unit == "word"
        no_sequences = np.zeros((0, 1), np.int32)
        return NgramCorpus(no_sequences, str if in_words else None)

    @cached_property
    def compared(self) -> set[str]:
        """Metrics of the record's texts, or of its images.

        A record of other code may lack some, which this code has added; one of this code may not.
        """
        other = "image" if self.record.image is None else "text"
        of_modality = {key for key, metric in METRICS.items() if metric.modality != other}
        if self.record.code.digest == code_version().digest:
            return of_modality
        parts = self.record.slices
        return of_modality & {
            key for part in parts for side in SIDES for key in part.estimates(side)
        }

    def of_side(self, side: Side) -> _SideValues:
        """Return what can be computed of a side."""
        inputs = {n: self._inputs(side, n) for n in self.evaluation.max_new_tokens}
        results = {n: self._values(inputs[n], n) for n in inputs}
        values = {n: values for n, (values, _) in results.items()}
        return _SideValues(inputs, values, {n: missing for n, (_, missing) in results.items()})

    def scores(self, side: Side, computed: _SideValues, missing: set[str]) -> Scores:
        """Return the scores of a side.

        Args:
            side: `tuned`, `base` or `reference`.
            computed: what can be computed of it.
            missing: metrics whose text values at full length are taken from the record.
        """
        recorded = {
            key: np.array(values, dtype=np.float64)
            for key, values in self.record.per_text.values(side).items()
            if key in missing
        }
        full = self.evaluation.continuation_len
        values = computed.values | {full: recorded | computed.values[full]}
        texts = [getattr(sample, side) for sample in self.record.samples]
        output = ModelOutput(
            datasets=[sample.dataset for sample in self.record.samples],
            token_stats=self._stats(side),
            step_stats={},
            base_loglikelihoods={},
            continuations=[TokenizedText(text.tokens, text.token_texts) for text in texts],
        )
        return Scores(output, computed.inputs, values)

    def _values(self, inputs: ScoringInputs, length: int) -> tuple[Values, set[str]]:
        """Return the text values at a length, and the metrics without them."""
        full = self.evaluation.continuation_len
        values: Values = {}
        missing: set[str] = set()
        for key, metric in METRICS.items():
            if metric.per_text is None or metric.among_texts:
                continue
            if key not in self.compared:
                continue
            if metric.modality == "image":  # they need the training images
                missing.add(key)
                continue
            if not metric.of_continuations and (
                length < full or not (metric.is_measured(inputs) or self._is_recorded(key))
            ):
                continue
            if key == "gen/dataset_bleu" or (key.startswith("gen/dataset_") and length < full):
                missing.add(key)
                continue
            try:
                values[key] = metric.per_text(inputs)
            except KeyError:  # a statistic that is not beside the record
                missing.add(key)
        return values, missing

    def _stats(self, side: Side) -> Stats:
        """Return the statistics of a side's model; those of the references are the base's."""
        return self.stats["tuned" if side == "tuned" else "base"]

    def _is_recorded(self, key: str) -> bool:
        return key in self.record.per_text.tuned

    def _inputs(self, side: Side, length: int) -> ScoringInputs:
        own = self._stats(side)
        texts = [getattr(sample, side) for sample in self.record.samples]
        step_stats: Stats = {}
        if side == "reference":  # as `evaluation.outputs.reference_output`
            start = self.evaluation.context_len - 1
            step_stats = {name: values[:, start:][:, :length] for name, values in own.items()}
        return ScoringInputs(
            continuations=[text.tokens[:length] for text in texts],
            units=[
                self._corpus.units(text.token_texts[:length], text.tokens[:length])
                for text in texts
            ],
            corpus=[],
            overlap=Overlap(
                *(np.array([getattr(t.overlap, f.name) for t in texts]) for f in fields(Overlap))
            ),
            step_stats=step_stats,
            base_loglikelihoods=step_stats,
            token_stats=own,
            base_token_stats=self.stats["base"],
            context_len=self.evaluation.context_len,
            bleu_n=self.evaluation.bleu_n,
        )


def _token_stats(record: Record, predictions: Predictions, side: str) -> Stats:
    """Return a model's statistics on the reference texts.

    Raises:
        ValueError: one is missing, or they are not of as many texts as the record has.
    """
    stats = {name: predictions.get(f"{side}/{name}") for name in TOKEN_STATS}
    for name, values in stats.items():
        if values is None or values.shape != stats["top1"].shape:  # type: ignore[union-attr]
            raise ValueError(f"predictions.npz has no {side}.{name}, or one of another shape")
        if len(values) != len(record.samples):
            raise ValueError(f"predictions of {len(values)} texts, not {len(record.samples)}")
    return {name: values for name, values in stats.items() if values is not None}
