"""From model outputs to scores: no model, no files, only arrays.

Metrics and how each is computed are defined in `metrics.registry`. Every metric has
one value per text; means, intervals and differences are made of these in `evaluation.slices`.
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
from hyperfitting.metrics.inputs import FeaturePair, Floats, ScoringInputs, select_pair
from hyperfitting.metrics.overlap import Overlap, dataset_overlap
from hyperfitting.metrics.registry import METRICS
from hyperfitting.record.recognition import Recognition
from hyperfitting.record.schema import SIDES

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
    mauve_features: FeaturePair | None = None
    """(N, H) of contexts with continuations, and (N, H) of the reference texts."""
    image_features: FeaturePair | None = None
    """(N, D) of completed images, and (N, D) of the real ones."""
    patching: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    """(N,) what activation patching with this model's states measured; empty: it was not done."""

    def select(self, rows: NDArray[np.bool_]) -> "ModelOutput":
        """Return the output on some texts. ``rows``: (N,)."""

        def of(arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
            return {name: values[rows] for name, values in arrays.items()}

        return ModelOutput(
            list(compress(self.datasets, rows)),
            of(self.token_stats),
            of(self.step_stats),
            of(self.base_loglikelihoods),
            list(compress(self.continuations, rows)),
            select_pair(self.mauve_features, rows),
            select_pair(self.image_features, rows),
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
            length: scoring_inputs(output, base, corpus, evaluation, length)
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


def scoring_inputs(
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
        image_features=output.image_features if is_full else None,
        patching=output.patching,
    )


def _cut(stats: Mapping[str, NDArray[Any]], length: int) -> dict[str, NDArray[Any]]:
    return {name: values[:, :length] for name, values in stats.items()}
