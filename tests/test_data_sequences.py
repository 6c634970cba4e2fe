"""Token sequences and evaluation texts, which share no document."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hyperfitting.data.config import DatasetConfig, TextsConfig
from hyperfitting.data.modality import held_out_step
from hyperfitting.data.sequences import (
    EvaluationTexts,
    Sequences,
    Tokens,
    load_evaluation_texts,
    load_sequences,
    sequences_step,
)
from hyperfitting.data.sources import documents_step
from hyperfitting.data.splits import shuffled, split_documents
from hyperfitting.errors import UserError
from hyperfitting.models.base import BaseModel
from hyperfitting.store.artifact import Store
from tests.documents import document, files_config, word_level_base, write


def build_sequences(base: BaseModel, cfg: DatasetConfig, store: Store) -> Sequences:
    documents = documents_step(cfg, store).ensure()
    return load_sequences(sequences_step(cfg, documents, base, store).ensure())


def build_evaluation_texts(
    base: BaseModel, cfg: DatasetConfig, store: Store, n: int = 10, at: str = "dataset"
) -> EvaluationTexts:
    documents = documents_step(cfg, store, at=at).ensure()
    step = held_out_step(cfg, documents, base, store, n_texts=n, length=32, at=at)
    return load_evaluation_texts(step.ensure())


def build(
    base: BaseModel, path: Path, store: Store, **fields: Any
) -> tuple[Sequences, EvaluationTexts]:
    cfg = files_config(path, **{"seq_len": 32, "n_train": 20, "n_val": 8} | fields)
    return build_sequences(base, cfg, store), build_evaluation_texts(base, cfg, store)


@pytest.fixture(scope="module")
def many_documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("many"), ".jsonl", [document(i) for i in range(200)])


def document_numbers(base: BaseModel, tokens: Tokens) -> list[str]:
    """The number that each test document begins with."""
    return [base.tokenizer().decode(row)[:5] for row in tokens]


def test_prefix_sequences_are_the_starts_of_documents_and_the_sets_share_none(
    base: BaseModel, many_documents: Path, store: Store
) -> None:
    sequences, texts = build(base, many_documents, store)
    assert sequences.train.shape == (20, 32)
    assert sequences.val.shape == (8, 32)
    assert texts.tokens.shape == (10, 32)
    assert sequences.train.dtype == sequences.val.dtype == texts.tokens.dtype == np.int32
    sets = (sequences.train, sequences.val, texts.tokens)
    assert len({number for tokens in sets for number in document_numbers(base, tokens)}) == 38
    assert sequences.train.shape[0] + sequences.val.shape[0] + texts.tokens.shape[0] == 38
    for row in sequences.train:
        text = base.tokenizer().decode(row)
        assert document(int(text[:5])).startswith(text)


def test_evaluation_texts_do_not_depend_on_seed_or_training_sequences(
    base: BaseModel, many_documents: Path, store: Store
) -> None:
    sequences, texts = build(base, many_documents, store)
    other_sequences, other_texts = build(base, many_documents, store, seed=5, n_train=60, n_val=3)
    assert np.array_equal(texts.tokens, other_texts.tokens)
    trained = set(document_numbers(base, other_sequences.train))
    assert trained != set(document_numbers(base, sequences.train))
    assert not trained & set(document_numbers(base, texts.tokens))


def test_ids_depend_on_exactly_what_changes_the_tokens(
    base: BaseModel, many_documents: Path, store: Store
) -> None:
    def ids(**fields: Any) -> tuple[str, str]:
        cfg = files_config(many_documents, **{"seq_len": 32} | fields)
        documents = documents_step(cfg, store).artifact
        texts = held_out_step(cfg, documents, base, store, n_texts=5, length=32)
        return sequences_step(cfg, documents, base, store).artifact.id, texts.artifact.id

    sequences, texts = ids()
    assert ids(name="another") == (sequences, texts)
    cfg = TextsConfig(name="mine", source="files", path=str(many_documents))
    at = "evaluation.datasets.mine"
    documents = documents_step(cfg, store, at=at).artifact
    step = held_out_step(cfg, documents, base, store, n_texts=5, length=32, at=at)
    assert step.artifact.id == texts
    changed = {"seed": 1, "n_train": 3, "n_val": 3, "seq_len": 8, "validation_fraction": 0.3}
    for field, value in changed.items():
        assert ids(**{field: value})[0] != sequences
        assert ids(**{field: value})[1] == texts
    for field, value in {"holdout_fraction": 0.3, "sequences": "packed"}.items():
        assert ids(**{field: value})[0] != sequences
        assert ids(**{field: value})[1] != texts


@pytest.mark.parametrize("mode", ["prefix", "packed"])
def test_fewer_sequences_are_a_prefix_of_more_and_training_does_not_depend_on_validation(
    base: BaseModel, many_documents: Path, store: Store, mode: str
) -> None:
    def of(n_train: int, n_val: int) -> Sequences:
        cfg = files_config(many_documents, seq_len=32, n_train=n_train, n_val=n_val, sequences=mode)
        return build_sequences(base, cfg, store)

    few, more = of(10, 3), of(20, 8)
    assert np.array_equal(few.train, more.train[:10])
    assert np.array_equal(few.val, more.val[:3])
    assert np.array_equal(of(10, 8).train, few.train)
    assert np.array_equal(of(10, 8).val, more.val)


def test_the_same_documents_are_selected_for_every_tokenizer(
    base: BaseModel, many_documents: Path, store: Store, tmp_path: Path
) -> None:
    word_level = word_level_base(tmp_path / "word_level")
    decode = word_level.tokenizer().decode
    byte_sequences, byte_texts = build(base, many_documents, store)
    word_sequences, word_texts = build(word_level, many_documents, store)
    skip = len("<s> ")
    for byte_tokens, word_tokens in (
        (byte_sequences.train, word_sequences.train),
        (byte_sequences.val, word_sequences.val),
        (byte_texts.tokens, word_texts.tokens),
    ):
        numbers = [decode(row)[skip : skip + 5] for row in word_tokens]
        assert numbers == document_numbers(base, byte_tokens)
    assert set(word_sequences.train[:, 0]) == {0}  # BOS, once
    assert not (word_sequences.train[:, 1:] == 0).any()


def test_packed_sequences_are_blocks_of_concatenated_documents(
    base: BaseModel, many_documents: Path, store: Store
) -> None:
    sequences, texts = build(base, many_documents, store, sequences="packed")
    assert sequences.train.shape == (20, 32)
    split = split_documents([document(i) for i in range(200)], range(200), 0.2, 0.2)
    for pool, rows in ((split.validation, sequences.val), (split.train, sequences.train)):
        concatenated = "".join(text + "\n\n" for text in shuffled(pool, 0))
        positions = [concatenated.index(base.tokenizer().decode(row)) for row in rows]
        assert all(position % 32 == 0 for position in positions)
        assert len(set(positions)) == len(positions)
        assert positions != sorted(positions)
    assert all(int(number) < 200 for number in document_numbers(base, texts.tokens))


@pytest.mark.parametrize(
    "letters",
    ["人生而自由在尊严和权利上一律平等", "すべての人間は生まれながら自由", "มนุษย์ทั้งหลายเกิดมามีอิสระ"],
)
@pytest.mark.parametrize("mode", ["prefix", "packed"])
def test_texts_without_spaces_between_words_can_be_used(
    base: BaseModel, store: Store, tmp_path: Path, letters: str, mode: str
) -> None:
    rng = np.random.default_rng(0)
    documents = ["".join(rng.choice(list(letters), 120)) for _ in range(200)]
    sequences, texts = build(base, write(tmp_path, ".jsonl", documents), store, sequences=mode)
    assert sequences.train.shape == (20, 32)
    assert texts.tokens.shape == (10, 32)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_train": 5000}, "dataset.n_train=5000: mine has only 1"),
        ({"n_val": 5000}, "dataset.n_val=5000: mine has only 3"),
        ({"seq_len": 61, "n_train": 5000}, "dataset.n_train"),
        ({"seq_len": 100, "n_train": 1, "n_val": 1}, "dataset.sequences=packed"),
        ({"seq_len": 4096}, "dataset.seq_len=4096: longer than the context of llama"),
    ],
)
def test_too_many_or_too_long_sequences_are_an_error_that_names_the_limit(
    base: BaseModel, many_documents: Path, store: Store, fields: dict[str, int], message: str
) -> None:
    with pytest.raises(UserError) as raised:
        build(base, many_documents, store, **fields)
    assert message in str(raised.value)
    assert "valid: at most" in str(raised.value) or "valid: nothing" in str(raised.value)


def test_one_long_document_is_too_few_and_the_error_suggests_document_start(
    base: BaseModel, store: Store, tmp_path: Path
) -> None:
    (tmp_path / "book.txt").write_text("word " * 5000)
    with pytest.raises(UserError, match="document_start"):
        build(base, tmp_path / "book.txt", store)


def test_evaluation_texts_come_from_their_own_dataset_with_the_text_of_each_token(
    base: BaseModel, many_documents: Path, store: Store, tmp_path: Path
) -> None:
    other_documents = write(tmp_path, ".jsonl", [f"z{document(i)}" for i in range(60)])
    for path, starts_with_z in ((other_documents, True), (many_documents, False)):
        texts = build_evaluation_texts(base, files_config(path), store, n=5)
        assert texts.tokens.shape == (5, 32)
        for row, row_texts in zip(texts.tokens, texts.token_texts, strict=True):
            assert "".join(row_texts) == base.tokenizer().decode(row)
            assert row_texts[0].startswith("z") == starts_with_z


def test_errors_of_an_evaluation_dataset_name_its_own_fields(
    base: BaseModel, many_documents: Path, store: Store, tmp_path: Path
) -> None:
    at = "evaluation.datasets.other"
    with pytest.raises(UserError, match=r"^evaluation\.datasets\.other\.path="):
        documents_step(files_config(tmp_path / "nowhere.txt"), store, at=at)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match=r"^evaluation\.datasets\.other\.path=.*empty"):
        documents_step(files_config(tmp_path / "empty.txt"), store, at=at).ensure()
    cfg = files_config(many_documents)
    documents = documents_step(cfg, store, at=at).ensure()
    with pytest.raises(UserError, match="only 0 held-out texts of 900 tokens") as raised:
        held_out_step(cfg, documents, base, store, n_texts=5, length=900, at=at).ensure()
    assert "evaluation.datasets.other.sequences=packed" in str(raised.value)
    assert "evaluation.n_texts=5" in str(raised.value)
