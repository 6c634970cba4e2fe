"""The citation blocker: exact, and with the paper's rule for words."""

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from hyperfitting.decoding.citation_blocker import (
    CitationBlocker,
    NgramIndex,
    ends_inside_word,
    starts_inside_word,
)
from hyperfitting.decoding.config import CitationBlockerConfig, DecodeConfig
from hyperfitting.decoding.generate import continue_texts
from hyperfitting.models.base import BaseModel
from hyperfitting.models.loading import load

Corpus = list[list[int]]


@st.composite
def corpora(draw: st.DrawFn, vocab_size: int = 4) -> Corpus:
    length = draw(st.integers(1, 12))
    sequence = st.lists(st.integers(0, vocab_size - 1), min_size=length, max_size=length)
    return draw(st.lists(sequence, min_size=1, max_size=5))


@cache
def loaded(base: BaseModel) -> PreTrainedModel:
    return load(base).eval()


def ngrams(text: list[int], n: int) -> set[tuple[int, ...]]:
    return {tuple(text[i : i + n]) for i in range(len(text) - n + 1)}


@given(
    corpora(),
    st.integers(1, 4),
    st.lists(st.integers(0, 5), min_size=20, max_size=20),
    st.booleans(),
)
def test_the_index_returns_all_followers(
    corpus: Corpus, n: int, tokens: list[int], is_gpu: bool
) -> None:
    queries, index = torch.tensor(tokens[: 20 - 20 % n]).reshape(-1, n), NgramIndex(corpus, n)
    if is_gpu:
        index._width = lambda count: index._max_followers
    followers, follows = index.followers(queries)
    rows = torch.arange(len(queries)).unsqueeze(1).expand_as(followers)
    pairs = sorted(zip(rows[follows].tolist(), followers[follows].tolist(), strict=True))
    assert pairs == sorted(
        (row, ngram[-1])
        for row, query in enumerate(queries.tolist())
        for ngram in set().union(*(ngrams(sequence, n + 1) for sequence in corpus))
        if list(ngram[:-1]) == query
    )


@settings(max_examples=10)  # for each architecture
@given(
    st.data(),
    st.integers(1, 4),
    st.booleans(),
    st.sampled_from(["greedy", "sample", "beam", "contrastive"]),
)
def test_no_ngram_of_the_training_data_longer_than_n_is_generated(
    any_base: BaseModel, data: st.DataObject, n: int, count_context: bool, strategy: str
) -> None:
    """With corpora made of what the model generates without the blocker."""
    model = loaded(any_base)
    fields = {"sample": {"top_k": 4}, "beam": {"num_beams": 3}}.get(strategy, {})
    fields = fields or ({"top_k": 4, "penalty_alpha": 0.5} if strategy == "contrastive" else {})
    decode = DecodeConfig("x", strategy, **fields, seed=data.draw(st.integers(0, 99)))
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    contexts = rng.integers(0, 256, (3, 5), dtype=np.int32)
    unconstrained = continue_texts(model, contexts, 16, decode, 3).tokens
    cut = data.draw(st.integers(0, 8))
    corpus = [
        [*context[2:], *text][cut : cut + 12]
        for context, text in zip(contexts.tolist(), unconstrained, strict=True)
    ]
    cfg = CitationBlockerConfig(True, n, whole_words=False, count_context=count_context)
    blocker = CitationBlocker(corpus, cfg, lambda token: "")
    blocked = continue_texts(model, contexts, 16, decode, 2, blocker=blocker).tokens
    forbidden = set().union(*(ngrams(sequence, n + 1) for sequence in corpus))
    for context, text in zip(contexts.tolist(), blocked, strict=True):
        assert not ngrams(text, n + 1) & forbidden
        if count_context:
            assert not ngrams([*context, *text], n + 1) - ngrams(context, n + 1) & forbidden
    if n < 3 and cut < 4:
        assert blocked != unconstrained  # the corpus is what the model would generate


TOKEN_TEXTS = ["The", " Uni", "ted", " Sta", "tes", " of", ".", "'s", " ", "x"]


def forbidden_tokens(input_ids: list[int], corpus: Corpus, **fields: bool) -> set[int]:
    cfg = CitationBlockerConfig(True, 2, **fields)
    blocker = CitationBlocker(corpus, cfg, TOKEN_TEXTS.__getitem__)
    scores = blocker(torch.tensor([input_ids]), torch.zeros(1, len(TOKEN_TEXTS)), context_len=1)
    return set(torch.isneginf(scores[0]).nonzero().flatten().tolist())


def test_a_word_may_be_completed_and_the_next_one_is_blocked() -> None:
    corpus = [[0, 1, 2, 3, 4, 5], [9, 0, 1, 9, 9, 9], [0, 1, 5, 5, 5, 5]]
    # "The Uni": "ted" and "x" complete the word, " of" begins another
    assert forbidden_tokens([8, 0, 1], corpus) == {5}
    assert forbidden_tokens([8, 0, 1], corpus, whole_words=False) == {2, 9, 5}
    # " United": " Sta" begins a word
    assert forbidden_tokens([8, 0, 1, 2], corpus) == {3}
    # one generated token is not a 2-gram, unless the context counts
    assert forbidden_tokens([0, 1], corpus) == set()
    assert forbidden_tokens([0, 1], corpus, count_context=True) == {5}


@pytest.mark.parametrize(
    ("preceding", "token_text", "expected"),
    [
        ("Uni", "ted", True), (" Uni", " ted", False), ("Uni", ".", False), ("do", "n't", True),
        ("John", "'s", True), ("said", "'", False), ("\n", "The", False), (".", "The", False),
        ("19", "87", True), ("na", "\ufffd", True), ("\ufffd", "ve", True), ("", "x", False),
        ("中", "国", False), ("ภา", "ษา", False), ("é", "té", True), ("x", "", False),
    ],
)  # fmt: skip
def test_which_tokens_continue_a_word(preceding: str, token_text: str, expected: bool) -> None:
    assert (ends_inside_word(preceding) and starts_inside_word(token_text)) is expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
@pytest.mark.parametrize("n", [1, 3, 5])
def test_a_gpu_forbids_the_same_tokens(n: int) -> None:
    rng = np.random.default_rng(n)
    corpus = rng.zipf(1.5, (200, 64)) % 500
    blocker = CitationBlocker(corpus, CitationBlockerConfig(True, n), lambda i: TOKEN_TEXTS[i % 10])
    input_ids = torch.as_tensor(corpus[:100, :40])
    scores = torch.as_tensor(rng.normal(size=(100, 512)), dtype=torch.float32)
    expected = blocker(input_ids, scores.clone(), context_len=8)
    assert expected.isneginf().any()
    on_gpu = blocker(input_ids.cuda(), scores.cuda(), context_len=8)
    assert torch.equal(on_gpu.cpu(), expected)
