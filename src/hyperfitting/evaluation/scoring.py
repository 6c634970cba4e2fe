"""From model outputs to scores: no model, no files, only arrays.

Which metrics there are, and how each is computed, stands in `metrics.registry`. Every metric has
one value per text, so that means, intervals and differences come from one place: this file.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hyperfitting.data.splits import WORD
from hyperfitting.evaluation.config import EvaluationConfig
from hyperfitting.evaluation.images import ImageScoring, recognize
from hyperfitting.metrics.estimate import Difference, Estimate
from hyperfitting.metrics.inputs import Floats, ScoringInputs
from hyperfitting.metrics.mauve import MIN_TEXTS
from hyperfitting.metrics.overlap import Overlap, dataset_overlap
from hyperfitting.metrics.registry import METRICS, Metric
from hyperfitting.metrics.uncertainty import Transform, bootstrap_mean, paired_difference
from hyperfitting.record.recognition import Recognition
from hyperfitting.record.schema import SIDES, Slice

Values = dict[str, Floats]
"""By metric key one value per text (N,), NaN where a text has none."""


@dataclass(frozen=True)
class TokenizedText:
    """A context, a reference or a continuation."""

    tokens: list[int]
    """Token ids."""
    token_texts: list[str]
    """The text of each token; they join to the whole."""


@dataclass(frozen=True)
class ModelOutput:
    """What one model predicted and generated on N texts, all evaluation datasets together."""

    datasets: list[str]
    """(N) evaluation dataset of each text."""
    token_stats: Mapping[str, NDArray[Any]]
    """`TokenStats` on the reference texts: (N, text_len - 1) each."""
    step_stats: Mapping[str, NDArray[Any]]
    """`STEP_STATS` of its continuations: (N, max_new_tokens) each, NaN past the end."""
    base_loglikelihoods: Mapping[str, NDArray[Any]]
    """`loss` and `rank` of its continuations under the base model: (N, max_new_tokens) each."""
    continuations: list[TokenizedText]
    """(N)"""
    mauve_features: tuple[NDArray[Any], NDArray[Any]] | None = None
    """(N, H) of contexts with continuations, and (N, H) of the reference texts."""
    patching: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    """(N,) what activation patching with this model's states measured; empty: it was not done."""

    def select(self, rows: NDArray[np.bool_]) -> "ModelOutput":
        """Return the output on some texts. ``rows``: (N,)."""

        def of(arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
            return {name: values[rows] for name, values in arrays.items()}

        features = self.mauve_features
        return ModelOutput(
            list(compress(self.datasets, rows)),
            of(self.token_stats),
            of(self.step_stats),
            of(self.base_loglikelihoods),
            list(compress(self.continuations, rows)),
            features and (features[0][rows], features[1][rows]),
            of(self.patching),
        )


class NgramCorpus:
    """The training sequences in the unit that n-gram metrics count: tokens, or words.

    Args:
        sequences: (M, T) token ids.
        decode: from token ids to text, to count words; none: tokens are counted.
    """

    def __init__(
        self, sequences: NDArray[np.int32], decode: Callable[[list[int]], str] | None
    ) -> None:
        self._decode = decode
        self._word_ids: dict[str, int] = {}
        self.tokens = sequences
        """(M, T) token ids."""
        self.sequences: list[Sequence[int]] = [
            sequence if decode is None else self._words(decode(sequence.tolist()))
            for sequence in sequences
        ]

    def units(self, token_texts: Sequence[str], tokens: Sequence[int]) -> Sequence[int]:
        """Return a continuation in the same unit: (T,) ids of tokens or words."""
        return tokens if self._decode is None else self._words("".join(token_texts))

    def _words(self, text: str) -> list[int]:
        ids = self._word_ids
        return [ids.setdefault(word, len(ids)) for word in WORD.findall(text)]


@dataclass(frozen=True)
class Scores:
    """One model's values of every metric, at every length."""

    output: ModelOutput
    inputs: dict[int, ScoringInputs]
    """By length of the continuations."""
    values_by_length: dict[int, Values]
    """`val/` metrics only at the full length."""

    @property
    def full_length(self) -> int:
        """The longest length, in tokens."""
        return max(self.inputs)

    @property
    def values(self) -> Values:
        """The values at full length."""
        return self.values_by_length[self.full_length]

    @property
    def overlap(self) -> Overlap:
        """The overlap of the full continuations with the training data."""
        return self.inputs[self.full_length].overlap


@dataclass(frozen=True)
class Comparison:
    """The scores of both models and of the references, on the same texts."""

    tuned: Scores
    base: Scores
    reference: Scores
    """Of the reference texts, as if the base model had generated them."""
    contexts: list[TokenizedText]
    """(N)"""
    recognition: Recognition | None = None
    """Classes predicted of completed images; none: there is no classifier."""


def score(
    tuned: ModelOutput,
    base: ModelOutput,
    reference: ModelOutput,
    contexts: list[TokenizedText],
    corpus: NgramCorpus,
    evaluation: EvaluationConfig,
    images: ImageScoring | None = None,
) -> Comparison:
    """Return the value of every metric for every text, at every length that is asked for.

    Args:
        tuned: output of the tuned model.
        base: output of the base model on the same texts.
        reference: the reference texts as the base model's output.
        contexts: what all of them continue (N).
        corpus: the sequences that the tuned model was trained on.
        evaluation: lengths and n-grams.
        images: how tokens are pixels; none: they are text.
    """
    outputs = {"tuned": tuned, "base": base, "reference": reference}
    inputs = {
        side: {
            length: _inputs(output, base, corpus, evaluation, length)
            for length in evaluation.max_new_tokens
        }
        for side, output in outputs.items()
    }
    recognition = None
    if images is not None:
        starts = [context.tokens for context in contexts]
        true = [sample.tokens for sample in reference.continuations]
        inputs, recognition = _with_images(inputs, images, starts, true, corpus, evaluation)
    scores = {side: _score(outputs[side], inputs[side], evaluation) for side in SIDES}
    return Comparison(**scores, contexts=contexts, recognition=recognition)


def _with_images(
    inputs: dict[str, dict[int, ScoringInputs]],
    images: ImageScoring,
    contexts: list[list[int]],
    references: list[list[int]],
    corpus: NgramCorpus,
    evaluation: EvaluationConfig,
) -> tuple[dict[str, dict[int, ScoringInputs]], Recognition | None]:
    """Return the inputs with their images, and the classes predicted of the complete ones."""
    pixels = {
        side: {
            length: images.inputs(contexts, texts.continuations, references, corpus.tokens)
            for length, texts in by_length.items()
        }
        for side, by_length in inputs.items()
    }
    full = evaluation.continuation_len
    recognized = recognize(
        images, {side: by_length[full] for side, by_length in pixels.items()}, evaluation.bootstrap
    )
    recognition, arrays = recognized or (None, {})
    for side, of_classifier in arrays.items():
        pixels[side][full] = replace(pixels[side][full], recognition=of_classifier)
    with_images = {
        side: {length: replace(t, images=pixels[side][length]) for length, t in by_length.items()}
        for side, by_length in inputs.items()
    }
    return with_images, recognition


def _score(
    output: ModelOutput, inputs: dict[int, ScoringInputs], evaluation: EvaluationConfig
) -> Scores:
    values = {
        length: {
            metric.key: metric.per_text(inputs[length])
            for metric in METRICS.values()
            if metric.per_text is not None
            and metric.is_measured(inputs[length])
            and not metric.among_texts
            and (metric.of_continuations or length == evaluation.continuation_len)
        }
        for length in evaluation.max_new_tokens
    }
    return Scores(output, inputs, values)


def _inputs(
    output: ModelOutput,
    base: ModelOutput,
    corpus: NgramCorpus,
    evaluation: EvaluationConfig,
    length: int,
) -> ScoringInputs:
    """Return what metrics compute from, with the continuations cut to a length."""
    units = [
        corpus.units(sample.token_texts[:length], sample.tokens[:length])
        for sample in output.continuations
    ]
    is_full = length == evaluation.continuation_len
    return ScoringInputs(
        continuations=[sample.tokens[:length] for sample in output.continuations],
        units=units,
        corpus=corpus.sequences,
        overlap=dataset_overlap(units, corpus.sequences),
        step_stats=_cut(output.step_stats, length),
        base_loglikelihoods=_cut(output.base_loglikelihoods, length),
        token_stats=output.token_stats,
        base_token_stats=base.token_stats,
        context_len=evaluation.context_len,
        bleu_n=evaluation.bleu_n,
        mauve_features=output.mauve_features if is_full else None,
        patching=output.patching,
    )


def _cut(stats: Mapping[str, NDArray[Any]], length: int) -> dict[str, NDArray[Any]]:
    return {name: values[:, :length] for name, values in stats.items()}


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
        tuned=_estimates(*tuned, resamples),
        base=_estimates(*base, resamples),
        reference=_estimates(generated, reference_inputs, resamples),
        difference=_differences(tuned[0], base[0], resamples),
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


def _estimates(values: Values, inputs: ScoringInputs, resamples: int) -> dict[str, Estimate]:
    """Return the estimate of every metric that has one, in the registry's order."""
    estimates = {}
    for key, metric in METRICS.items():
        source, transform = _source(metric)
        if source in values:
            estimates[key] = bootstrap_mean(values[source], resamples, transform=transform)
        elif metric.per_set is None or not metric.is_measured(inputs):
            continue
        elif not np.isnan(value := metric.per_set(inputs)):
            estimates[key] = Estimate(value, None, len(inputs.continuations))
    return {key: estimate for key, estimate in estimates.items() if estimate is not None}


def _differences(tuned: Values, base: Values, resamples: int) -> dict[str, Difference]:
    differences = {}
    for key, metric in METRICS.items():
        source, transform = _source(metric)
        if source in tuned and source in base:
            differences[key] = paired_difference(
                tuned[source], base[source], resamples, transform=transform
            )
    return {key: value for key, value in differences.items() if value is not None}


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
    return notes


def _recognition_note(recognition: Recognition) -> str:
    accuracy, visible = recognition.accuracy, recognition.context_accuracy
    return (
        f"the classifier of gen/class_kept was trained on {recognition.n_train} other real images "
        f"and tells the class of {accuracy.mean:.1%} of {accuracy.n} more; from the context alone "
        f"one tells {visible.mean:.1%} of the true images"
    )


def jsonable(values: Floats) -> list[float | None]:
    """Return numbers as JSON represents them: null for NaN."""
    return [None if np.isnan(value) else float(value) for value in values]
