"""The texts of a sweep by context: the reference, and every run's continuation of it.

Answers to questions (`evaluation.chat`) are continuations of their question, without a reference.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from hyperfitting.metrics.registry import metric
from hyperfitting.record.schema import Record, Sample, Side
from hyperfitting.record.texts import Continuation
from hyperfitting.reporting.images import data_uri, picture
from hyperfitting.reporting.preference import TextKey, judged_texts, text_key
from hyperfitting.reporting.repetition_highlight import shades
from hyperfitting.reporting.sweep_records import SweepRecords

MIN_OVERLAP = 5
"""Tokens: shorter overlaps with the training data are not underlined."""
TEXT_METRICS = ("gen/ttr", "gen/rep_2", "gen/dataset_overlap", "gen/n_tokens")
"""Metrics of a single continuation, or answer, that the page shows; it filters and sorts by all but
the last."""
IMAGE_METRICS = (
    "gen/row_repeat",
    "gen/rep_2",
    "gen/ttr",
    "gen/dataset_overlap",
    "gen/nearest_train",
    "gen/class_confidence",
)
"""The same of a completed image."""
Context = tuple[str, str, int]
"""Evaluation dataset, text of the context, and how many earlier texts have the same context."""
Span = tuple[str, int, int]
"""Text, shade of repetition, and whether it is the overlap with the training data (0 or 1)."""


@dataclass(frozen=True)
class ShownContinuation:
    """A continuation, ready to be displayed."""

    name: str
    run: int | None
    """Index of the run whose tuned model generated it; none: a base model's."""
    metrics: list[tuple[str, str]]
    """Label and value; then who judged it, and how."""
    spans: list[Span]
    """Empty for an image."""
    image: str = ""
    """Address of the completed image; empty: it is a text."""

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(text for text, *_ in self.spans)


@dataclass(frozen=True)
class ContextTexts:
    """A context, and the texts that continue it."""

    context: str
    reference: str
    continuations: list[ShownContinuation]
    context_image: str = ""
    reference_image: str = ""
    """Addresses; empty: they are texts."""


def all_contexts(sweep: SweepRecords) -> list[Context]:
    """Return the contexts of all runs, each once."""
    return list(
        dict.fromkeys(context for _, record in sweep.finished() for context in _contexts(record))
    )


def rows_by_context(record: Record) -> dict[Context, int]:
    """Return the index in `Record.texts` of each context."""
    return {context: row for row, context in enumerate(_contexts(record))}


def _contexts(record: Record) -> Iterator[Context]:
    """Yield the context of each of `Record.texts`, in order."""
    seen: Counter[tuple[str, str]] = Counter()
    for sample in record.texts:
        text = sample.dataset, sample.context.text
        yield *text, seen[text]
        seen[text] += 1


def texts_by_context(sweep: SweepRecords) -> Iterator[ContextTexts]:
    """Yield all contexts with their texts; equal continuations of base models appear once."""
    finished = [
        (index, run.name, run.record, run.record.texts, rows_by_context(run.record))
        for index, run in enumerate(sweep.runs)
        if run.record is not None
    ]
    base_names = base_model_names(sweep)
    judged = judged_texts(sweep)
    for context in all_contexts(sweep):
        continuations: list[ShownContinuation] = []
        seen: set[tuple[int, ...]] = set()
        reference, images = "", ("", "")
        for index, name, record, texts, rows in finished:
            if context not in rows:
                continue
            row = rows[context]
            sample = texts[row]
            reference = max(reference, sample.reference.text, key=len)
            if record.image is not None:
                images = (
                    data_uri(picture(record, row, None)),
                    data_uri(picture(record, row, "reference")),
                )
            if (tokens := tuple(sample.base.tokens)) not in seen:
                seen.add(tokens)
                shown = _shown(record, sample, "base", row, base_names[name], None, judged)
                continuations.append(shown)
            if record.is_tuned:
                continuations.append(_shown(record, sample, "tuned", row, name, index, judged))
        given = ("", "") if any(images) else (context[1], reference)
        yield ContextTexts(*given, continuations, *images)


def base_model_names(sweep: SweepRecords) -> dict[str, str]:
    """Return by run the name of the base model with its decoding."""
    by_decoding: dict[str, str] = {}
    names = {}
    for run, record in sweep.finished():
        decode = record.config["decode"]
        is_controlled = decode.get("control", {}).get("method", "none") != "none"
        decoding = repr({**decode, "control": None})
        if decoding not in by_decoding:
            # a control is named by its decoding, but the base model beside it is as it is
            name = f"base, {decode['strategy'] if is_controlled else record.name('decode')}"
            is_taken = name in by_decoding.values()
            by_decoding[decoding] = f"base, decoding of {run.name}" if is_taken else name
        names[run.name] = by_decoding[decoding]
    return names


def _shown(
    record: Record,
    sample: Sample,
    side: Side,
    row: int,
    name: str,
    run: int | None,
    judged: Mapping[TextKey, Sequence[tuple[str, str]]],
) -> ShownContinuation:
    continuation = sample.tuned if side == "tuned" else sample.base
    values = {key: record.text_values(side, key)[row] for key in text_metrics(record)}
    metrics = [
        (metric(key).label, f"{metric(key).format.format(value)} {metric(key).unit}".strip())
        for key, value in values.items()
        if value is not None
    ]
    metrics += judged.get(text_key(sample, side), ())
    if record.image is None:
        return ShownContinuation(name, run, metrics, list(highlighted_spans(continuation)))
    metrics += _recognized(record, side, row)
    return ShownContinuation(name, run, metrics, [], data_uri(picture(record, row, side)))


def _recognized(record: Record, side: Side, row: int) -> list[tuple[str, str]]:
    """Return which class a classifier sees, if there is one."""
    if record.recognition is None:
        return []
    seen = getattr(record.recognition, side)[row]
    return [("class", f"{seen} (true: {record.recognition.true[row]})")]


def text_metrics(record: Record) -> tuple[str, ...]:
    """Return the metrics of a single continuation that are shown of a record."""
    return TEXT_METRICS if record.image is None else IMAGE_METRICS


def highlighted_spans(continuation: Continuation) -> Iterator[Span]:
    """Yield a continuation in spans of a single shade, the overlap apart.

    The overlap is the longest token run that occurs in a training sequence, from `MIN_OVERLAP`
    tokens on.
    """
    overlap = continuation.overlap
    length = overlap.length if overlap.length >= MIN_OVERLAP else 0
    overlapping = range(overlap.start, overlap.start + length)
    styled = [
        (text, (shade, int(i in overlapping)))
        for i, (text, shade) in enumerate(
            zip(continuation.token_texts, shades(continuation.tokens), strict=True)
        )
    ]
    for (shade, overlaps), group in groupby(styled, key=lambda item: item[1]):
        yield "".join(text for text, _ in group), shade, overlaps
