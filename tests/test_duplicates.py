"""Near-duplicates are found, and none is in two sets."""

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyperfitting.data.config import DatasetConfig
from hyperfitting.data.duplicates import (
    MIN_CONTAINMENT,
    PREFIX_WORDS,
    N,
    containment,
    near_duplicate_groups,
)
from hyperfitting.data.sequences import (
    EvaluationTexts,
    load_sequences,
    load_split_sizes,
    sequences_step,
)
from hyperfitting.data.sources import documents_step, load_documents
from hyperfitting.data.splits import split_documents
from hyperfitting.errors import UserError
from hyperfitting.evaluation.contamination import contaminated, contamination_notes
from hyperfitting.models.base import BaseModel
from hyperfitting.store.artifact import Store


def words(seed: int, n: int = 150) -> list[str]:
    rng = np.random.default_rng(seed)
    return [f"w{i}" for i in rng.integers(0, 10_000, n)]


def text(*parts: list[str]) -> str:
    return " ".join(word for part in parts for word in part)


A, B = words(1), words(2)


@pytest.mark.parametrize(
    ("first", "second", "together"),
    [
        (text(A), text(A), True),
        (text(A), text(A).upper().replace(" ", ",\n"), True),  # case and punctuation
        (text(A), text(A[:70]), True),  # an excerpt
        (text(A), text(B, A[40:110], B), True),  # an excerpt inside another text
        (text(A[:80], B), text(A[:80], words(3)), True),  # the same beginning
        (text(A[:40], B), text(A[:40], words(3)), False),  # less than half of the beginning
        (text(A), text(B), False),
        (text(A), text(B, A[100:125]), False),  # a quotation
        ("one two three", "One two three!", True),  # shorter than an n-gram
        ("one two three", "one two three four", False),
        ("中文" * 20, "中文" * 19, True),
        ("???", "!!!", False),  # no words at all
    ],
)
def test_two_documents_are_near_duplicates_or_not(first: str, second: str, together: bool) -> None:
    groups = near_duplicate_groups([first, text(words(9)), second])
    assert (groups[0] == groups[2]) == together
    assert groups[1] not in (groups[0], groups[2])


def ngram_sets(document: str) -> tuple[set[tuple[str, ...]], set[tuple[str, ...]]]:
    """The distinct n-grams of a document of plain words, and those of its first words."""
    whole = document.split()
    n = min(N, len(whole))
    ngrams = [tuple(whole[i : i + n]) for i in range(len(whole) - n + 1)]
    return set(ngrams), set(ngrams[: PREFIX_WORDS - N + 1])


@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 4), st.integers(0, 60), st.integers(1, 60)), max_size=4),
        max_size=8,
    )
)
def test_groups_are_the_connected_components_by_brute_force(
    recipes: list[list[tuple[int, int, int]]],
) -> None:
    sources = [words(seed, 120) for seed in range(5)]
    documents = [
        text(*(sources[source][start : start + n] for source, start, n in recipe)) or f"empty{i}"
        for i, recipe in enumerate(recipes)
    ]
    sets = [ngram_sets(document) for document in documents]
    expected = list(range(len(documents)))
    for i, j in combinations(range(len(documents)), 2):
        pairs = [(part, sets[j][0]) for part in sets[i]] + [(part, sets[i][0]) for part in sets[j]]
        if any(part and len(part & whole) / len(part) >= MIN_CONTAINMENT for part, whole in pairs):
            expected = [expected[i] if group == expected[j] else group for group in expected]
    groups = near_duplicate_groups(documents)
    for i, j in combinations(range(len(documents)), 2):
        assert (groups[i] == groups[j]) == (expected[i] == expected[j])


def test_more_documents_than_are_compared_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hyperfitting.data.duplicates._ROWS", 2)
    groups = near_duplicate_groups([text(A), text(B), text(words(3)), text(B[:90]), text(A[9:])])
    assert [groups[i] == groups[j] for i, j in ((0, 4), (1, 3), (0, 1), (2, 0))] == [
        True, True, False, False,
    ]  # fmt: skip


def test_boilerplate_makes_no_near_duplicates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hyperfitting.data.duplicates._MAX_DOCUMENTS", 3)
    signature = words(7, 300)
    documents = [text(words(i, 60), signature) for i in range(20, 24)]
    assert len(set(near_duplicate_groups(documents).tolist())) == 4
    assert len(set(near_duplicate_groups(documents[:3]).tolist())) == 1


def news_config(**fields: Any) -> DatasetConfig:
    values = {"name": "news", "source": "package", "path": "news", "seed": 0, "seq_len": 64}
    return DatasetConfig(**values | {"n_train": 100, "n_val": 8} | fields)


def test_the_packaged_news_repeat_themselves_and_no_copy_crosses_the_split(store: Store) -> None:
    """Two articles stand in it whole and cut in half; without groups they crossed the split."""
    documents = load_documents(documents_step(news_config(), store).ensure())
    assert len(set(documents.groups)) == 289 < len(set(documents.texts)) == 293
    split = split_documents(documents.texts, documents.groups, 0.2, 0.2)
    sides = [split.held_out, split.validation, split.train]
    for one, other in ((0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)):
        assert containment(sides[one], sides[other]).max() < MIN_CONTAINMENT


def test_the_artifact_says_how_documents_were_split(
    base: BaseModel, store: Store, tmp_path: Path
) -> None:
    rows = [text(words(i)) for i in range(40)]
    rows += [rows[0], *(text(words(i)[:100]) for i in range(40))]  # a copy, and 40 excerpts
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    cfg = news_config(source="files", path=str(tmp_path / "a.jsonl"), n_train=30, n_val=2)
    documents = documents_step(cfg, store).ensure()
    artifact = sequences_step(cfg, documents, base, store).ensure()
    sizes = load_split_sizes(artifact)
    assert (sizes.documents, sizes.distinct, sizes.groups) == (81, 80, 40)
    assert sizes.held_out + sizes.validation + sizes.train // 2 == 40
    decoded = [base.tokenizer().decode(row) for row in load_sequences(artifact).train.tolist()]
    assert sizes.near_duplicate_train_sequences == 30 - len(set(decoded)) > 0


def evaluation_texts(*texts: str) -> EvaluationTexts:
    return EvaluationTexts(np.zeros((len(texts), 1), np.int32), [[t] for t in texts])


def test_evaluation_texts_of_another_dataset_that_are_trained_on_are_found() -> None:
    texts = {
        "other": evaluation_texts(text(A), text(B), text(words(3))),
        "clean": evaluation_texts(text(words(4))),
    }
    found = contaminated(texts, [text(words(5), B[:90]), text(words(6))])
    assert {name: mask.tolist() for name, mask in found.items()} == {
        "other": [False, True, False],
        "clean": [False],
    }
    (note,) = contamination_notes(found)
    assert note.startswith("1 of 3 texts of other are left out")


def test_it_is_an_error_if_every_evaluation_text_is_trained_on() -> None:
    with pytest.raises(UserError, match=r"evaluation\.datasets"):
        contaminated({"other": evaluation_texts(text(A))}, [text(A)])
