"""The citation blocker: exact, and as the paper says."""

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from hyperfitting import models
from hyperfitting.config import CitationBlockerConfig, DecodeConfig
from hyperfitting.decoding.blocker import CitationBlocker, NgramIndex, continues_word
from hyperfitting.decoding.generate import continue_texts
from hyperfitting.models import BaseModel

Corpus = list[list[int]]


@st.composite
def corpora(draw: st.DrawFn, vocabulary: int = 4) -> Corpus:
    length = draw(st.integers(1, 12))
    sequence = st.lists(st.integers(0, vocabulary - 1), min_size=length, max_size=length)
    return draw(st.lists(sequence, min_size=1, max_size=5))


@cache
def loaded(base: BaseModel) -> PreTrainedModel:
    return models.load(base).eval()


def grams(text: list[int], n: int) -> set[tuple[int, ...]]:
    return {tuple(text[i : i + n]) for i in range(len(text) - n + 1)}


@given(corpora(), st.integers(1, 4), st.lists(st.integers(0, 5), min_size=20, max_size=20))
def test_the_index_knows_all_that_follows(corpus: Corpus, n: int, tokens: list[int]) -> None:
    queries = np.array(tokens[: 20 - 20 % n]).reshape(-1, n)
    rows, followers = NgramIndex(corpus, n).followers(queries)
    found = sorted(zip(rows.tolist(), followers.tolist(), strict=True))
    assert found == sorted(
        (row, gram[-1])
        for row, query in enumerate(queries.tolist())
        for gram in set().union(*(grams(sequence, n + 1) for sequence in corpus))
        if list(gram[:-1]) == query
    )


@settings(max_examples=25)
@given(
    st.data(),
    st.integers(1, 4),
    st.booleans(),
    st.sampled_from(["greedy", "sample", "beam", "contrastive"]),
)
def test_no_longer_ngram_of_the_training_data_is_ever_written(
    any_base: BaseModel, data: st.DataObject, n: int, count_context: bool, strategy: str
) -> None:
    """Over corpora made of what the model would write without the blocker, and parts of it."""
    model = loaded(any_base)
    fields = {"sample": {"top_k": 4}, "beam": {"num_beams": 3}}.get(strategy, {})
    fields = fields or ({"top_k": 4, "alpha": 0.5} if strategy == "contrastive" else {})
    decode = DecodeConfig("x", strategy, **fields, seed=data.draw(st.integers(0, 99)))
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    contexts = rng.integers(0, 256, (3, 5), dtype=np.int32)
    free = continue_texts(model, contexts, 16, decode, 3).tokens
    cut = data.draw(st.integers(0, 8))
    corpus = [
        [*context[2:], *text][cut : cut + 12]
        for context, text in zip(contexts.tolist(), free, strict=True)
    ]
    cfg = CitationBlockerConfig(True, n, whole_words=False, count_context=count_context)
    blocker = CitationBlocker(corpus, cfg, lambda token: "")
    found = continue_texts(model, contexts, 16, decode, 2, blocker=blocker).tokens
    forbidden = set().union(*(grams(sequence, n + 1) for sequence in corpus))
    for context, text in zip(contexts.tolist(), found, strict=True):
        assert not grams(text, n + 1) & forbidden
        if count_context:
            assert not grams([*context, *text], n + 1) - grams(context, n + 1) & forbidden
    if n < 3 and cut < 4:
        assert found != free  # the corpus was what it would have written


PIECES = ["The", " Uni", "ted", " Sta", "tes", " of", ".", "'s", " ", "x"]


def blocked(history: list[int], corpus: Corpus, **fields: bool) -> set[int]:
    cfg = CitationBlockerConfig(True, 2, **fields)
    blocker = CitationBlocker(corpus, cfg, PIECES.__getitem__)
    scores = blocker(torch.zeros(1, len(PIECES)), torch.tensor([history]), 1)
    return set(torch.isneginf(scores[0]).nonzero().flatten().tolist())


def test_a_word_may_finish_and_then_the_citation_ends() -> None:
    corpus = [[0, 1, 2, 3, 4, 5], [9, 0, 1, 9, 9, 9], [0, 1, 5, 5, 5, 5]]
    # "The Uni": "ted" and "x" finish the word, " of" begins another
    assert blocked([8, 0, 1], corpus) == {5}
    assert blocked([8, 0, 1], corpus, whole_words=False) == {2, 9, 5}
    # " United": " Sta" begins a word
    assert blocked([8, 0, 1, 2], corpus) == {3}
    # one generated token is not two, unless the context counts
    assert blocked([0, 1], corpus) == set()
    assert blocked([0, 1], corpus, count_context=True) == {5}


@pytest.mark.parametrize(
    ("before", "piece", "within"),
    [
        ("Uni", "ted", True), (" Uni", " ted", False), ("Uni", ".", False), ("do", "n't", True),
        ("John", "'s", True), ("said", "'", False), ("\n", "The", False), (".", "The", False),
        ("19", "87", True), ("na", "\ufffd", True), ("\ufffd", "ve", True), ("", "x", False),
        ("中", "国", False), ("ภา", "ษา", False), ("é", "té", True), ("x", "", False),
    ],
)  # fmt: skip
def test_what_finishes_a_word(before: str, piece: str, within: bool) -> None:
    assert continues_word(before, piece) is within
