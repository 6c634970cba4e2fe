"""From the scores of every text to means, intervals and paired differences, as in a record."""

import numpy as np
from numpy.typing import NDArray

from hyperfitting.evaluation.config import EvaluationConfig
from hyperfitting.evaluation.scoring import Comparison, Scores, Values
from hyperfitting.metrics.estimate import Difference, Estimate
from hyperfitting.metrics.inputs import Floats, ScoringInputs
from hyperfitting.metrics.mauve import MIN_TEXTS
from hyperfitting.metrics.registry import METRICS, Metric
from hyperfitting.metrics.uncertainty import Transform, bootstrap_mean, paired_difference
from hyperfitting.record.recognition import Recognition
from hyperfitting.record.schema import Slice


def slices(comparison: Comparison, evaluation: EvaluationConfig) -> list[Slice]:
    """Return the scores over all texts and by dataset, at every length, the longest first.

    The first slice is overall: all texts, full length.
    """
    labels = comparison.tuned.output.datasets
    datasets = list(dict.fromkeys(labels))
    return [
        _slice(comparison, dataset, length, evaluation.bootstrap)
        for length in reversed(evaluation.max_new_tokens)
        for dataset in (None, *(datasets if len(datasets) > 1 else ()))
    ]


def _slice(comparison: Comparison, dataset: str | None, length: int, resamples: int) -> Slice:
    rows = np.array([dataset in (None, label) for label in comparison.tuned.output.datasets])
    tuned, base, reference = (
        _select(scores, rows, length)
        for scores in (comparison.tuned, comparison.base, comparison.reference)
    )
    reference_values, reference_inputs = reference
    generated = {k: v for k, v in reference_values.items() if METRICS[k].of_continuations}
    return Slice(
        dataset=dataset,
        max_new_tokens=length,
        tuned=estimates(*tuned, resamples),
        base=estimates(*base, resamples),
        reference=estimates(generated, reference_inputs, resamples),
        difference=differences(tuned[0], base[0], resamples),
    )


def _select(scores: Scores, rows: NDArray[np.bool_], length: int) -> tuple[Values, ScoringInputs]:
    """Return the values of some texts, with those that depend on the others, and their inputs."""
    values = {key: values[rows] for key, values in scores.values_by_length[length].items()}
    inputs = scores.inputs[length].select(rows)
    for metric in METRICS.values():
        if metric.among_texts and metric.per_text is not None and metric.is_measured(inputs):
            values[metric.key] = metric.per_text(inputs)
    return values, inputs


def _source(metric: Metric) -> tuple[str, Transform | None]:
    """Return the key of the values of a metric, and the transform of their mean."""
    return (metric.exp_of, np.exp) if metric.exp_of else (metric.key, None)


def estimates(values: Values, inputs: ScoringInputs, resamples: int) -> dict[str, Estimate]:
    """Return the estimate of every metric that has one, in the registry's order."""
    by_key = {}
    for key, metric in METRICS.items():
        source, transform = _source(metric)
        if source in values:
            by_key[key] = bootstrap_mean(values[source], resamples, transform=transform)
        elif metric.per_set is None or not metric.is_measured(inputs):
            continue
        elif not np.isnan(value := metric.per_set(inputs)):
            by_key[key] = Estimate(value, None, len(inputs.continuations))
    return {key: estimate for key, estimate in by_key.items() if estimate is not None}


def differences(tuned: Values, base: Values, resamples: int) -> dict[str, Difference]:
    """Return the paired difference of every metric that both models have."""
    by_key = {}
    for key, metric in METRICS.items():
        source, transform = _source(metric)
        if source in tuned and source in base:
            by_key[key] = paired_difference(
                tuned[source], base[source], resamples, transform=transform
            )
    return {key: value for key, value in by_key.items() if value is not None}


def per_text(scores: Scores) -> dict[str, list[float | None]]:
    """Return every metric of every text at full length, in the order of the texts."""
    rows = np.ones(len(scores.output.datasets), dtype=bool)
    values, _ = _select(scores, rows, scores.full_length)
    by_key = {}
    for key, metric in METRICS.items():
        source, transform = _source(metric)
        if source in values:
            by_key[key] = jsonable(transform(values[source]) if transform else values[source])
    return by_key


def notes(comparison: Comparison) -> list[str]:
    """Return what a reader of the scores must know: texts without values, datasets of one text."""
    tuned = comparison.tuned
    notes = []
    for name, scores in (("tuned", tuned), ("base", comparison.base)):
        empty = sum(len(sample.tokens) == 0 for sample in scores.output.continuations)
        if empty:
            n_texts = len(scores.output.continuations)
            notes.append(
                f"{empty} of {n_texts} continuations of the {name} model are "
                "empty: they have no gen/ values and are left out of the means"
            )
    reference_len = len(comparison.reference.output.continuations[0].tokens)
    if reference_len < tuned.full_length:
        notes.append(
            f"the reference continuations have {reference_len} tokens only; "
            "the `reference` scores are of these"
        )
    labels = tuned.output.datasets
    for name in dict.fromkeys(labels):
        if labels.count(name) == 1:
            notes.append(
                f"{name} has one text: no intervals, no p-values and no Self-BLEU within it"
            )
    if comparison.recognition is not None:
        notes.append(_recognition_note(comparison.recognition))
    if "gen/mse" in tuned.values:
        notes.append(
            "gen/mse compares with one of many possible completions: a flat or blurred one has "
            "less than a good one that differs; it is no measure of quality"
        )
    if tuned.output.mauve_features is not None and len(labels) < MIN_TEXTS:
        notes.append(f"fewer than {MIN_TEXTS} texts: no MAUVE")
    if tuned.output.image_features is not None:
        notes.append(
            f"gen/fid and gen/kid compare {len(labels)} completed images with the true ones, whose "
            "context they share; FID is biased upward for small sets"
        )
    return notes


def _recognition_note(recognition: Recognition) -> str:
    accuracy, visible = recognition.accuracy, recognition.context_accuracy
    return (
        f"the classifier of gen/class_kept was trained on {recognition.n_train} other real images "
        f"and has an accuracy of {accuracy.mean:.1%} on {accuracy.n} more; from the context alone "
        f"one has {visible.mean:.1%} on the true images"
    )


def jsonable(values: Floats) -> list[float | None]:
    """Return numbers as JSON represents them: null for NaN."""
    return [None if np.isnan(value) else float(value) for value in values]
