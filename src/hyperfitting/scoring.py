"""From what models did on the texts to their scores: no model, no files, only arrays.

Metric keys: `val/…` for how a model predicts the original texts, `gen/…` for what it writes itself.
Every metric has one value a text, so that means, intervals and differences come from one place.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hyperfitting.config import EvaluationConfig
from hyperfitting.data.corpus import WORD
from hyperfitting.metrics.bleu import dataset_bleu, self_bleu
from hyperfitting.metrics.distribution import top1_agreement
from hyperfitting.metrics.diversity import distinct_n, ends_in_loop, longest_loop, rep_n, ttr
from hyperfitting.metrics.mauve import LEAST, mauve
from hyperfitting.metrics.overlap import Overlap, dataset_overlap, histogram
from hyperfitting.metrics.uncertainty import (
    Difference,
    Estimate,
    Transform,
    bootstrap_mean,
    paired_difference,
)

Floats = NDArray[np.float64]
Values = dict[str, Floats]
"""By metric key one value a text, NaN where a text has none."""
LONG_OVERLAP = 10
"""Tokens above which an overlap counts as long (Carlsson et al., Figure 3)."""
RANKS = (1, 10, 100)
PERPLEXITIES = {
    "val/perplexity": "val/loss",
    "val/context_perplexity": "val/context_loss",
    "gen/original_perplexity": "gen/original_loss",
}
"""Perplexities, and the losses whose mean they are the exponential of."""

_DIVERSITY: Mapping[str, Callable[[ArrayLike], float]] = {
    "gen/ttr": ttr,
    **{f"gen/distinct_{n}": partial(distinct_n, n=n) for n in (2, 3, 4)},
    **{f"gen/rep_{n}": partial(rep_n, n=n) for n in (2, 3, 4)},
    "gen/longest_loop": longest_loop,
    "gen/ends_in_loop": ends_in_loop,
}


@dataclass(frozen=True)
class Output:
    """What one model did on N texts."""

    sets: list[str]
    """N: the evaluation set of each text."""
    likelihood: Mapping[str, NDArray[Any]]
    """Measures of `metrics.distribution` on the original texts: (N, text_len - 1) each."""
    steps: Mapping[str, NDArray[Any]]
    """The same along its own continuations: (N, new_tokens) each, NaN past the end."""
    reading: Mapping[str, NDArray[Any]]
    """`loss` and `rank` of its continuations by the original model: (N, new_tokens) each."""
    samples: list[dict[str, Any]]
    """N: `context`, `reference`, and the continuation's `tokens` and `pieces`."""
    mauve_features: tuple[NDArray[Any], NDArray[Any]] | None = None
    """(N, H) of contexts with continuations, and (N, H) of the original texts."""


@dataclass(frozen=True)
class Slice:
    """The scores of one evaluation set (or all), at one length of the continuations."""

    texts: str | None
    """The set; none: all."""
    new_tokens: int
    metrics: dict[str, Estimate]
    baseline: dict[str, Estimate]
    reference: dict[str, Estimate]
    """Of how the texts really go on: the `gen/` metrics of the originals."""
    difference: dict[str, Difference]
    """Of metrics less baseline, on the same texts."""


@dataclass(frozen=True)
class Compared:
    """What is compared on the same texts."""

    final: "Scores"
    """The tuned model's."""
    original: "Scores"
    """The original model's."""
    reference: "Scores"
    """Those of the texts themselves, as if the original model had written them."""


@dataclass(frozen=True)
class Scores:
    """What is known of one model: values of each text, and what they were found in."""

    output: Output
    at: dict[int, Values]
    """Values by length of the continuations; `val/…` only at the longest."""
    units: dict[int, list[Sequence[int]]]
    """The continuations by length, in the unit that n-gram metrics count."""
    overlap: Overlap
    """Of the longest continuations with the training data."""

    @property
    def values(self) -> Values:
        """The values at the longest length."""
        return self.at[max(self.at)]

    def steps(self) -> dict[str, list[float | None]]:
        """Return the mean entropy (nats) and top-1 mass at each step of the continuations."""
        return {
            f"gen/{name}": jsonable(_means(self.output.steps[name].T))
            for name in ("entropy", "top1_mass")
        }

    def overlap_histogram(self) -> list[int]:
        """Return how many texts share a longest run of 0, 1, 2, … tokens with the training data."""
        return histogram(self.overlap.length)


class CountedCorpus:
    """Training sequences in the unit that n-gram metrics count: tokens, or words.

    Args:
        sequences: (M, T) token ids.
        decode: from ids to text, to count words; none: tokens are counted.
    """

    def __init__(
        self, sequences: NDArray[np.int32], decode: Callable[[list[int]], str] | None
    ) -> None:
        self._decode = decode
        self._numbers: dict[str, int] = {}
        self.sequences = [
            sequence if decode is None else self._words(decode(sequence.tolist()))
            for sequence in sequences
        ]

    def units(self, pieces: Sequence[str], tokens: Sequence[int]) -> Sequence[int]:
        """Return a continuation in the same unit: (T,) numbers."""
        return tokens if self._decode is None else self._words("".join(pieces))

    def _words(self, text: str) -> list[int]:
        return [self._numbers.setdefault(w, len(self._numbers)) for w in WORD.findall(text)]


def compare(
    final: Output,
    original: Output,
    reference: Output,
    corpus: CountedCorpus,
    evaluation: EvaluationConfig,
) -> Compared:
    """Return the values of each text, at every length asked for.

    Args:
        final: what the tuned model did.
        original: what the original model did on the same texts.
        reference: the texts themselves.
        corpus: the sequences that the tuned model was trained on.
        evaluation: lengths and n-grams.
    """
    return Compared(
        *(_score(output, original, corpus, evaluation) for output in (final, original, reference))
    )


def _score(
    output: Output, original: Output, corpus: CountedCorpus, evaluation: EvaluationConfig
) -> Scores:
    at: dict[int, Values] = {}
    units: dict[int, list[Sequence[int]]] = {}
    for length in evaluation.new_tokens:
        units[length] = [
            corpus.units(sample["pieces"][:length], sample["tokens"][:length])
            for sample in output.samples
        ]
        overlap = dataset_overlap(units[length], corpus.sequences)
        at[length] = _diversity_values(output, length)
        at[length] |= _quotation_values(units[length], overlap, corpus, evaluation.bleu_n)
    at[length] |= _validation_values(output, original, evaluation.context_len)
    return Scores(output, at, units, overlap)


def _diversity_values(output: Output, length: int) -> Values:
    tokens = [sample["tokens"][:length] for sample in output.samples]
    values: Values = {
        key: np.array([function(text) for text in tokens]) for key, function in _DIVERSITY.items()
    }
    for name in ("entropy", "top1_mass"):
        values[f"gen/{name}"] = _means(output.steps[name][:, :length])
    values["gen/original_loss"] = _means(output.reading["loss"][:, :length])
    ranks = output.reading["rank"][:, :length].astype(float)
    for rank in RANKS:
        beyond = np.where(np.isnan(ranks), np.nan, ranks > rank)
        values[f"gen/original_rank_over_{rank}"] = _means(beyond)
    return values


def _quotation_values(
    units: list[Sequence[int]], overlap: Overlap, corpus: CountedCorpus, bleu_n: int
) -> Values:
    quoted = {
        "gen/dataset_bleu": dataset_bleu(units, corpus.sequences, bleu_n),
        "gen/dataset_overlap": overlap.length.astype(float),
        f"gen/dataset_overlap_over_{LONG_OVERLAP}": (overlap.length > LONG_OVERLAP).astype(float),
    }
    return {key: _of_written(units, found) for key, found in quoted.items()}


def _of_written(units: list[Sequence[int]], values: Floats) -> Floats:
    """Return values (N,) with NaN for texts that are empty."""
    return np.where([len(text) == 0 for text in units], np.nan, values)


def _validation_values(output: Output, original: Output, context_len: int) -> Values:
    found = output.likelihood
    values = {
        f"val/{name}": _means(found[name])
        for name in ("loss", "entropy", "top1_mass", "top3_mass", "top5_mass")
    }
    values["val/context_loss"] = _means(found["loss"][:, : context_len - 1])
    values["val/top1_agreement"] = top1_agreement(found["top1"], original.likelihood["top1"])
    return values


def slices(compared: Compared, evaluation: EvaluationConfig) -> list[Slice]:
    """Return the scores over all texts and by set, at every length, the longest first.

    The first is the whole: all texts, longest continuations.
    """
    labels = compared.final.output.sets
    sets = list(dict.fromkeys(labels))
    found = []
    for length in reversed(evaluation.new_tokens):
        for name in [None, *(sets if len(sets) > 1 else [])]:
            chosen = np.array([name in (None, label) for label in labels])
            after, before, real = (
                _chosen(scores, chosen, length, evaluation.bleu_n)
                for scores in (compared.final, compared.original, compared.reference)
            )
            one = Slice(
                name,
                length,
                _estimates(after, evaluation.bootstrap),
                _estimates(before, evaluation.bootstrap),
                _estimates(
                    {key: found for key, found in real.items() if key.startswith("gen/")},
                    evaluation.bootstrap,
                ),
                _differences(after, before, evaluation.bootstrap),
            )
            if length == evaluation.longest:
                one.metrics.update(_mauve(compared.final.output, chosen))
                one.baseline.update(_mauve(compared.original.output, chosen))
            found.append(one)
    return found


def _mauve(output: Output, chosen: NDArray[np.bool_]) -> dict[str, Estimate]:
    if output.mauve_features is None:
        return {}
    texts, real = output.mauve_features
    value = mauve(texts[chosen], real[chosen])
    return {} if np.isnan(value) else {"gen/mauve": Estimate(value, None, int(chosen.sum()))}


def _chosen(scores: Scores, chosen: NDArray[np.bool_], length: int, bleu_n: int) -> Values:
    """Return the values of some texts, with their BLEU among each other."""
    values = {key: found[chosen] for key, found in scores.at[length].items()}
    units = [text for text, one in zip(scores.units[length], chosen, strict=True) if one]
    return values | {"gen/self_bleu": _of_written(units, self_bleu(units, bleu_n))}


def _sources(values: Values) -> dict[str, tuple[str, Transform | None]]:
    """Return for each metric the key of its values, and what their mean is put through."""
    plain: dict[str, tuple[str, Transform | None]] = {key: (key, None) for key in values}
    return plain | {key: (loss, np.exp) for key, loss in PERPLEXITIES.items() if loss in values}


def _estimates(values: Values, resamples: int) -> dict[str, Estimate]:
    return {
        key: found
        for key, (source, transform) in _sources(values).items()
        if (found := bootstrap_mean(values[source], resamples, transform=transform)) is not None
    }


def _differences(after: Values, before: Values, resamples: int) -> dict[str, Difference]:
    return {
        key: found
        for key, (source, transform) in _sources(after).items()
        if (
            found := paired_difference(
                after[source], before[source], resamples, transform=transform
            )
        )
        is not None
    }


def per_text(scores: Scores, bleu_n: int) -> dict[str, list[float | None]]:
    """Return every metric of every text, longest continuations, in the order of the texts."""
    everything = np.ones(len(scores.output.sets), dtype=bool)
    values = _chosen(scores, everything, max(scores.at), bleu_n)
    values |= {key: np.exp(values[loss]) for key, loss in PERPLEXITIES.items()}
    return {key: jsonable(found) for key, found in values.items()}


def notes(compared: Compared) -> list[str]:
    """Return what a reader of the scores must know: texts without values, sets without spread."""
    final = compared.final
    found = []
    for name, scores in (("tuned", final), ("original", compared.original)):
        empty = sum(len(sample["tokens"]) == 0 for sample in scores.output.samples)
        if empty:
            found.append(
                f"{empty} of {len(scores.output.samples)} continuations of the {name} model are "
                "empty: they have no gen/ values and are left out of the means"
            )
    real = len(compared.reference.output.samples[0]["tokens"])
    if real < max(final.at):
        found.append(f"the texts themselves go on for {real} tokens only; `reference` is of these")
    counts = {name: final.output.sets.count(name) for name in dict.fromkeys(final.output.sets)}
    for name, count in counts.items():
        if count == 1:
            found.append(
                f"{name} has one text: no intervals, no p-values and no Self-BLEU within it"
            )
    if final.output.mauve_features is not None and len(final.output.sets) < LEAST:
        found.append(f"fewer than {LEAST} texts: no MAUVE")
    return found


def jsonable(values: Floats) -> list[float | None]:
    """Return numbers as JSON can say them: null for NaN."""
    return [None if np.isnan(value) else float(value) for value in values]


def _means(rows: NDArray[Any]) -> Floats:
    """Return the mean of each row (N, T) without its NaNs; NaN for a row that has nothing else."""
    rows = rows.astype(np.float64)
    there = ~np.isnan(rows)
    count = there.sum(axis=1)
    total = np.where(there, rows, 0).sum(axis=1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
