"""Speed of the metrics against nltk and brute force, on real texts, and by corpus size."""

import re
from collections.abc import Callable, Iterator
from functools import cache, partial

import numpy as np
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from numpy.typing import NDArray

from benchmarks.timing import Result, Timing, interleaved, seconds
from hyperfitting.data import packaged
from hyperfitting.metrics.bleu import dataset_bleu, self_bleu
from hyperfitting.metrics.overlap import dataset_overlap

Tokens = NDArray[np.int64]
TEXTS, TEXT_LEN = 300, 224
CORPUS, SEQ_LEN = 2000, 256


@cache
def all_words() -> Tokens:
    """Return all packaged texts concatenated, as ids of words and punctuation: 2.3 million."""
    words = [
        word
        for sample in ("news", "wikipedia", "shakespeare")
        for document in packaged.read(sample)
        for word in re.findall(r"\w+|[^\w\s]", document)
    ]
    return np.unique(np.array(words), return_inverse=True)[1]


def windows(n: int, length: int, seed: int) -> list[Tokens]:
    """Return ``n`` random windows of real text."""
    starts = np.random.default_rng(seed).integers(0, len(all_words()) - length, n)
    return [all_words()[start : start + length] for start in starts]


def nltk_bleu(texts: list[list[int]], references: list[list[list[int]]]) -> list[float]:
    """Return the BLEU of each text by nltk's `sentence_bleu`."""
    smoothing = SmoothingFunction().method1
    return [
        float(sentence_bleu(refs, text, smoothing_function=smoothing))
        for text, refs in zip(texts, references, strict=True)
    ]


def brute_force_overlap(texts: list[Tokens], corpus: Tokens) -> list[int]:
    """Return longest common runs by dynamic programming, vectorized over the corpus (M, T)."""
    lengths = []
    for text in texts:
        run = np.zeros((len(corpus), corpus.shape[1] + 1), dtype=np.int32)
        longest = 0
        for token in text:
            run[:, 1:] = np.where(corpus == token, run[:, :-1] + 1, 0)
            longest = max(longest, int(run.max()))
        lengths.append(longest)
    return lengths


def run() -> Iterator[Result]:
    """Yield the comparison of each metric with its peer."""
    texts, corpus = windows(TEXTS, TEXT_LEN, 0), windows(CORPUS, SEQ_LEN, 1)
    lists, references = [t.tolist() for t in texts], [s.tolist() for s in corpus]
    few = 20  # texts that the slow peers get

    others = [lists[:i] + lists[i + 1 :] for i in range(TEXTS)]
    np.testing.assert_allclose(self_bleu(texts)[:5], nltk_bleu(lists[:5], others[:5]), atol=1e-9)
    ours, peer = interleaved(lambda: self_bleu(texts), lambda: nltk_bleu(lists, others), 3)
    yield Result(
        "self_bleu_vs_nltk",
        peer.median / ours.median,
        f"Self-BLEU of {TEXTS} texts of {TEXT_LEN} tokens, times faster than nltk's sentence_bleu",
        ours,
        peer,
        {},
    )

    scores = dataset_bleu(texts[:2], corpus, brevity_penalty=True)
    np.testing.assert_allclose(scores, nltk_bleu(lists[:2], [references] * 2), atol=1e-9)
    ours, peer = interleaved(
        lambda: dataset_bleu(texts[:few], corpus),
        lambda: nltk_bleu(lists[:few], [references] * few),
        3,
    )
    yield Result(
        "dataset_bleu_vs_nltk",
        peer.median / ours.median,
        f"Dataset BLEU of {few} texts against {CORPUS} x {SEQ_LEN}, times faster than nltk's",
        ours,
        peer,
        {"by_corpus_size": seconds_by_corpus_size(lambda corpus: dataset_bleu(texts, corpus))},
    )

    table = np.array(corpus)
    assert dataset_overlap(texts[:few], corpus).length.tolist() == brute_force_overlap(
        texts[:few], table
    )
    ours, peer = interleaved(
        lambda: dataset_overlap(texts[:few], corpus),
        lambda: brute_force_overlap(texts[:few], table),
        3,
    )
    yield Result(
        "overlap_vs_bruteforce",
        peer.median / ours.median,
        f"longest shared runs of {few} texts with {CORPUS} x {SEQ_LEN}, times faster than "
        "dynamic programming in numpy",
        ours,
        peer,
        {"by_corpus_size": seconds_by_corpus_size(lambda corpus: dataset_overlap(texts, corpus))},
    )


def seconds_by_corpus_size(
    metric: Callable[[list[Tokens]], object],
) -> dict[str, dict[str, float]]:
    """Return seconds for all texts with 1, 2, 4 and 8 times the corpus, and their ratio to 1."""
    corpora = {times: windows(CORPUS * times, SEQ_LEN, times) for times in (1, 2, 4, 8)}
    measured: dict[int, list[float]] = {times: [] for times in corpora}
    for _ in range(5):
        for times, corpus in corpora.items():
            measured[times] += seconds(partial(metric, corpus), 1).seconds
    medians = {times: Timing(values).median for times, values in measured.items()}
    return {
        f"{times}x": {"seconds": median, "over_1x": median / medians[1]}
        for times, median in medians.items()
    }
