"""From outputs to scores, by set and length, also where texts have no value."""

import math

import numpy as np
import pytest

from hyperfitting import scoring
from hyperfitting.config import EvaluationConfig
from hyperfitting.metrics.bleu import dataset_bleu, self_bleu
from hyperfitting.metrics.uncertainty import bootstrap_mean, paired_difference
from hyperfitting.scoring import Compared, CountedCorpus, Output

RNG = np.random.default_rng(0)
TRAIN = RNG.integers(0, 5, (6, 20))
EVALUATION = EvaluationConfig(context_len=4, new_tokens=[6, 12], bootstrap=200, bleu_n=3)


def output(texts: list[list[int]], sets: list[str], seed: int) -> Output:
    rng = np.random.default_rng(seed)
    n = len(texts)
    past = np.arange(12) >= np.array([len(text) for text in texts])[:, None]
    steps = {name: np.where(past, np.nan, rng.random((n, 12))) for name in ("entropy", "top1_mass")}
    ranks = np.where(past, np.nan, rng.integers(1, 300, (n, 12)))
    names = ("loss", "entropy", "top1_mass", "top3_mass", "top5_mass")
    likelihood = {name: rng.random((n, 15)) for name in names}
    return Output(
        sets,
        likelihood | {"top1": rng.integers(0, 2, (n, 15))},
        steps,
        {"loss": np.where(past, np.nan, rng.random((n, 12))), "rank": ranks},
        [{"tokens": text, "pieces": [f" w{t}" for t in text]} for text in texts],
    )


def compared(
    after: list[list[int]], before: list[list[int]], sets: list[str], corpus: CountedCorpus
) -> Compared:
    outputs = [output(texts, sets, seed) for seed, texts in enumerate((after, before, before))]
    return scoring.compare(*outputs, corpus, EVALUATION)


def random_texts(n: int, length: int = 12) -> list[list[int]]:
    return RNG.integers(0, 5, (n, length)).tolist()


def test_slices_are_the_metrics_of_their_texts_cut_to_their_length() -> None:
    corpus = CountedCorpus(TRAIN, None)
    sets = ["news"] * 4 + ["fiction"] * 3
    after, before = random_texts(7), random_texts(7)
    both = compared(after, before, sets, corpus)
    found = scoring.slices(both, EVALUATION)
    assert [(one.texts, one.new_tokens) for one in found] == [
        (name, length) for length in (12, 6) for name in (None, "news", "fiction")
    ]
    for one in found:
        chosen = [i for i, name in enumerate(sets) if one.texts in (None, name)]
        cut = [after[i][: one.new_tokens] for i in chosen]
        was = [before[i][: one.new_tokens] for i in chosen]
        for key, function in (
            ("gen/self_bleu", lambda texts: self_bleu(texts, 3)),
            ("gen/dataset_bleu", lambda texts: dataset_bleu(texts, list(TRAIN), 3)),
            ("gen/ttr", lambda texts: [len(set(text)) / len(text) for text in texts]),
        ):
            assert one.metrics[key] == bootstrap_mean(function(cut), 200)
            assert one.baseline[key] == bootstrap_mean(function(was), 200)
            assert one.difference[key] == paired_difference(function(cut), function(was), 200)
        assert ("val/loss" in one.metrics) == (one.new_tokens == 12)
        assert not any(key.startswith("val/") for key in one.reference)
        loss, perplexity = one.metrics["gen/original_loss"], one.metrics["gen/original_perplexity"]
        assert perplexity.mean == pytest.approx(math.exp(loss.mean))
        assert one.difference["gen/original_perplexity"].p == one.difference["gen/original_loss"].p


def test_ranks_are_shares_of_tokens() -> None:
    corpus = CountedCorpus(TRAIN, None)
    both = compared(random_texts(3), random_texts(3), ["a"] * 3, corpus)
    ranks = both.final.output.reading["rank"]
    for rank in (1, 10, 100):
        np.testing.assert_allclose(
            both.final.values[f"gen/original_rank_over_{rank}"], (ranks > rank).mean(axis=1)
        )


def test_an_empty_continuation_has_no_values_and_that_is_said() -> None:
    corpus = CountedCorpus(TRAIN, None)
    after = [[], *random_texts(2), [1, 2, 3]]
    both = compared(after, random_texts(4), ["a", "a", "a", "b"], corpus)
    found = scoring.slices(both, EVALUATION)[0]
    for key in found.metrics:
        if key.startswith("gen/") and not key.endswith("_4"):  # three tokens have no 4-gram
            assert found.metrics[key].n == 3, key
            assert found.difference[key].n == 3, key
    assert found.metrics["val/loss"].n == 4
    everything = scoring.per_text(both.final, 3)
    assert everything["gen/ttr"][0] is None
    assert everything["gen/rep_4"][3] is None
    said = scoring.notes(both)
    assert "1 of 4 continuations of the tuned model are empty" in said[0]
    assert "b has one text" in said[1]
    alone = next(one for one in scoring.slices(both, EVALUATION) if one.texts == "b")
    assert "gen/self_bleu" not in alone.metrics  # nothing to compare with
    assert alone.metrics["gen/ttr"].ci95 is None
    assert alone.difference["gen/ttr"].p is None


def test_shorter_originals_are_said() -> None:
    corpus = CountedCorpus(TRAIN, None)
    texts = random_texts(3)
    outputs = [output(one, ["a"] * 3, 0) for one in (texts, texts, [text[:8] for text in texts])]
    both = scoring.compare(*outputs, corpus, EVALUATION)
    assert any("go on for 8 tokens only" in note for note in scoring.notes(both))
    assert scoring.notes(compared(texts, texts, ["a"] * 3, corpus)) == []


def test_words_are_counted_if_asked() -> None:
    words = CountedCorpus(TRAIN, lambda tokens: " ".join(f"w{t}" for t in tokens))
    tokens = CountedCorpus(TRAIN, None)
    texts = random_texts(4)
    # one word a token here: both units give the same
    for a, b in zip(
        scoring.slices(compared(texts, texts, ["a"] * 4, words), EVALUATION),
        scoring.slices(compared(texts, texts, ["a"] * 4, tokens), EVALUATION),
        strict=True,
    ):
        assert a == b
    assert words.units(["The", " cat", "'s", " hat", "."], []) == words.units(
        ["The cat's hat."], []
    )
    assert len(words.units(["The", " cat", "'s", " hat", "."], [])) == 4


def test_overlaps_are_counted_and_found() -> None:
    corpus = CountedCorpus(TRAIN, None)
    quoted = [TRAIN[2][3:15].tolist(), random_texts(1)[0]]
    both = compared(quoted, random_texts(2), ["a", "a"], corpus)
    overlap = both.final.overlap
    assert (overlap.length[0], overlap.sequence[0], overlap.offset[0]) == (12, 2, 3)
    assert both.final.overlap_histogram()[12] == 1
    assert both.final.values["gen/dataset_overlap_over_10"].tolist() == [1, 0]
