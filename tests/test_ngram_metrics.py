"""BLEU and overlap against nltk, sacrebleu and brute force."""

import warnings
from collections.abc import Sequence
from difflib import SequenceMatcher
from pathlib import Path

import numpy as np
import pytest
import sacrebleu
from hypothesis import given
from hypothesis import strategies as st
from nltk.translate.bleu_score import (
    SmoothingFunction,
    brevity_penalty,
    closest_ref_length,
    sentence_bleu,
)

from hyperfitting.metrics.bleu import dataset_bleu, self_bleu
from hyperfitting.metrics.ngrams import all_ngrams, join
from hyperfitting.metrics.overlap import dataset_overlap, histogram

Text = Sequence[int]
# few distinct tokens, so that much is shared; empty, one-token and repeated texts come often
text = st.lists(st.integers(0, 4), max_size=14)
collection = st.lists(text, min_size=1, max_size=6)


def by_nltk(hypothesis: Text, references: Sequence[Text], n: int, epsilon: float = 0.1) -> float:
    smoothing = SmoothingFunction(epsilon=epsilon)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(
            sentence_bleu(
                references,
                hypothesis,
                weights=(1 / n,) * n,
                smoothing_function=smoothing.method1 if epsilon else smoothing.method0,
            )
        )


def real_texts(n: int, length: int) -> list[list[int]]:
    """Real news, cut into sequences of word ids."""
    from gensim.test.utils import datapath

    words = Path(datapath("lee_background.cor")).read_text("utf-8").split()
    ids = {word: i for i, word in enumerate(dict.fromkeys(words))}
    return [[ids[w] for w in words[i * length : (i + 1) * length]] for i in range(n)]


@given(st.lists(text, min_size=2, max_size=6), st.integers(1, 5), st.sampled_from([0.1, 0.0, 1.0]))
def test_self_bleu_is_nltks(texts: list[list[int]], n: int, epsilon: float) -> None:
    expected = [
        by_nltk(text, texts[:i] + texts[i + 1 :], n, epsilon) for i, text in enumerate(texts)
    ]
    np.testing.assert_allclose(self_bleu(texts, n, epsilon), expected, rtol=0, atol=1e-9)


@given(collection, collection, st.integers(1, 5), st.sampled_from([0.1, 0.0]))
def test_dataset_bleu_is_nltks(
    texts: list[list[int]], corpus: list[list[int]], n: int, epsilon: float
) -> None:
    expected = [by_nltk(text, corpus, n, epsilon) for text in texts]
    penalized = dataset_bleu(texts, corpus, n, epsilon, brevity_penalty=True)
    np.testing.assert_allclose(penalized, expected, rtol=0, atol=1e-9)
    unpenalized = [
        bleu / brevity_penalty(closest_ref_length(corpus, len(text)), len(text)) if bleu else 0
        for text, bleu in zip(texts, expected, strict=True)
    ]
    np.testing.assert_allclose(dataset_bleu(texts, corpus, n, epsilon), unpenalized, atol=1e-9)


def test_bleu_of_real_texts_is_nltks_and_sacrebleus() -> None:
    texts, corpus = real_texts(12, 60), real_texts(60, 80)[20:]
    texts += [texts[0], corpus[0][:40], texts[1] * 2, texts[2][:1], []]
    for n in (2, 3, 4):
        others = [[t for j, t in enumerate(texts) if j != i] for i in range(len(texts))]
        expected = [by_nltk(t, refs, n) for t, refs in zip(texts, others, strict=True)]
        np.testing.assert_allclose(self_bleu(texts, n), expected, rtol=0, atol=1e-9)
    references = [" ".join(map(str, text)) for text in corpus]
    oracle = sacrebleu.BLEU(
        tokenize="none", smooth_method="floor", smooth_value=0.1, effective_order=False
    )
    long_enough = [text for text in texts if len(text) >= 4]
    expected = [
        oracle.sentence_score(" ".join(map(str, text)), references).score / 100
        for text in long_enough
    ]
    scores = dataset_bleu(long_enough, corpus, brevity_penalty=True)
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-9)
    assert dataset_bleu([corpus[0][:40]], corpus)[0] == pytest.approx(1)  # an exact copy


def test_one_text_has_no_self_bleu_and_no_corpus_is_an_error() -> None:
    assert np.isnan(self_bleu([[1, 2, 3]])).all()
    assert len(self_bleu([])) == 0
    assert self_bleu([[], [1, 2]]).tolist() == [0, 0]
    with pytest.raises(ValueError, match="no training sequence"):
        dataset_bleu([[1]], [])
    for call in (lambda: self_bleu([[1], [1]], 0), lambda: dataset_bleu([[1]], [[1]], 0)):
        with pytest.raises(ValueError, match="n is 0"):
            call()


@given(collection, collection)
def test_overlap_is_the_longest_common_run(texts: list[list[int]], corpus: list[list[int]]) -> None:
    overlap = dataset_overlap(texts, corpus)
    for i, text in enumerate(texts):
        runs = [
            SequenceMatcher(None, text, sequence, autojunk=False).find_longest_match().size
            for sequence in corpus
        ]
        length = overlap.length[i]
        assert length == max(runs)
        if length == 0:
            assert (overlap.start[i], overlap.sequence[i], overlap.offset[i]) == (-1, -1, -1)
            continue
        start, sequence, offset = overlap.start[i], overlap.sequence[i], overlap.offset[i]
        run = text[start : start + length]
        assert corpus[sequence][offset : offset + length] == run
        occurrences = [
            (index, position)
            for index, tokens in enumerate(corpus)
            for position in range(len(tokens))
            if tokens[position : position + length] == run
        ]
        assert (sequence, offset) == occurrences[0]


def test_a_copied_sequence_overlaps_in_full() -> None:
    corpus = real_texts(40, 50)
    overlap = dataset_overlap([[-5, *corpus[7][3:], -6], corpus[0]], corpus)
    assert overlap.length.tolist() == [47, 50]
    assert (overlap.start[0], overlap.sequence[0], overlap.offset[0]) == (1, 7, 3)
    assert histogram(overlap.length)[47:] == [1, 0, 0, 1]
    assert sum(histogram(overlap.length)) == 2


@given(collection)
def test_two_ngrams_have_the_same_number_only_if_they_are_equal(texts: list[list[int]]) -> None:
    joined = join(texts)
    for n, ngrams in enumerate(all_ngrams(joined), start=1):
        assert ngrams.n == n
        number = ngrams.number
        grams = [tuple(joined.tokens[i : i + n].tolist()) for i in ngrams.start]
        assert grams == [tuple(text[i : i + n]) for text in texts for i in range(len(text) - n + 1)]
        pairs = set(zip(grams, number.tolist(), strict=True))
        assert len(pairs) == len(set(grams)) == len(set(number.tolist())) == len(ngrams.keys)
