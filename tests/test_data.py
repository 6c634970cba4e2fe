"""Documents from every source, and token sequences that share no document."""

import csv
import json
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from hyperfitting.data import packaged
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
from hyperfitting.data.sources import documents_step, load_documents
from hyperfitting.data.splits import count_words, cut_passages, shuffled, split_documents
from hyperfitting.data.tokenization import DocumentTokenizer, token_text_in_context, token_texts
from hyperfitting.errors import UserError
from hyperfitting.models.base import BaseModel
from hyperfitting.models.random_init import byte_tokenizer
from hyperfitting.store.artifact import Store
from tests.conftest import tiny_model

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]


def document(i: int, n: int = 60) -> str:
    rng = np.random.default_rng(i)
    return f"{i:05d} " + " ".join(rng.choice(WORDS, n))


BYTES = byte_tokenizer()


def files_config(path: Path, **fields: Any) -> DatasetConfig:
    return DatasetConfig(
        **{"name": "mine", "source": "files", "path": str(path), "seed": 0} | fields
    )


def read(cfg: DatasetConfig, store: Store) -> list[str]:
    return load_documents(documents_step(cfg, store).ensure()).texts


def write(folder: Path, suffix: str, documents: list[str], field: str = "text") -> Path:
    path = folder / f"data{suffix}"
    if suffix == ".jsonl":
        path.write_text("".join(json.dumps({field: d, "n": 1}) + "\n" for d in documents))
    elif suffix == ".csv":
        with path.open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerows([["n", field], *([i, d] for i, d in enumerate(documents))])
    elif suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({field: documents}), path)
    elif suffix == ".arrow":
        import datasets

        path = folder / "saved"
        datasets.Dataset.from_dict({field: documents}).save_to_disk(str(path))
    else:
        for i, text in enumerate(documents):
            (folder / f"{i:04d}.txt").write_text(text)
        path = folder
    return path


TRICKY = [
    "one, two",
    'with "quotes"',
    "several\nlines\n\nand paragraphs",
    "ünïcödé 中文",
    "x" * 200_000,
]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet", ".arrow", ".txt"])
def test_every_file_format_gives_the_same_documents(
    tmp_path: Path, store: Store, suffix: str
) -> None:
    # an empty .txt is an error (below); an empty row is skipped
    empty = [] if suffix == ".txt" else ["", "  "]
    assert read(files_config(write(tmp_path, suffix, [*TRICKY, *empty])), store) == TRICKY


def test_a_folder_gives_the_documents_of_all_its_files_and_the_id_is_a_hash_of_them(
    tmp_path: Path, store: Store
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("a")
    write(tmp_path / "in", ".jsonl", ["b", "c"])
    (tmp_path / "in" / "ignored.md").write_text("no")
    three = documents_step(files_config(tmp_path / "in"), store).ensure()
    assert load_documents(three).texts == ["a", "b", "c"]
    (tmp_path / "in" / "z.txt").write_text("d")
    four = documents_step(files_config(tmp_path / "in"), store).ensure()
    assert four.id != three.id
    assert load_documents(four).texts == ["a", "b", "c", "d"]


def test_document_start_splits_a_text_and_joins_rows(tmp_path: Path, store: Store) -> None:
    (tmp_path / "book.txt").write_text("CHAPTER 1\nIt was.\n\nMore.\nCHAPTER 2\nThe end.\n")
    cut = read(files_config(tmp_path / "book.txt", document_start="CHAPTER"), store)
    assert cut == ["CHAPTER 1\nIt was.\n\nMore.", "CHAPTER 2\nThe end."]
    rows = [
        "",
        " = Robert = \n",
        "\n",
        " He acts . \n",
        " = = Early life = = \n",
        " Born . \n",
        " = Next = \n",
        " X \n",
    ]
    articles = read(
        files_config(write(tmp_path, ".jsonl", rows), document_start=" = [^=].* = $"), store
    )
    assert articles == [
        "= Robert = \n\n He acts . \n = = Early life = = \n Born .",
        "= Next = \n X",
    ]


@pytest.mark.parametrize(
    ("name", "content", "fields", "message"),
    [
        ("a.txt", b"", {}, "empty"),
        ("a.jsonl", b" \n", {}, "empty"),
        ("a.txt", b"\x00\x01\x02", {}, "binary"),
        ("a.txt", "café\ncafé".encode("latin-1"), {}, "byte 3 (line 1) is 0xe9"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', {}, "line 2 of a.jsonl is not JSON"),
        ("a.jsonl", b'{"body": "x"}\n', {}, "dataset.text_field=body"),
        ("a.jsonl", b'{"texts": "x"}\n', {}, "did you mean texts?"),
        ("a.jsonl", b'{"text": 3}\n', {}, "holds int"),
        ("a.csv", b"id,body\n1,x\n", {}, "id, body"),
        ("a.parquet", b"PAR1 not", {}, "not readable as Parquet"),
        ("a.docx", b"x", {}, ".jsonl"),
        ("a.jsonl", b'{"text": ""}\n', {}, "every text is empty"),
        ("a.txt", b"x", {"document_start": "("}, "not a regular expression"),
    ],
)
def test_an_unreadable_file_is_an_error_that_says_why(
    tmp_path: Path, store: Store, name: str, content: bytes, fields: dict[str, str], message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as raised:
        read(files_config(tmp_path / name, **fields), store)
    assert message in str(raised.value)
    assert "dataset." in str(raised.value)


def test_a_missing_file_or_sample_is_an_error_with_near_matches(
    tmp_path: Path, store: Store
) -> None:
    (tmp_path / "news.jsonl").write_text("{}")
    with pytest.raises(UserError, match=r"(?s)new\.jsonl.*did you mean news\.jsonl"):
        read(files_config(tmp_path / "new.jsonl"), store)
    with pytest.raises(UserError, match=r"(?s)newz.*did you mean news"):
        packaged.files("newz")


@pytest.mark.parametrize("sample", ["news", "wikipedia", "shakespeare"])
def test_packaged_samples_are_clean_prose(sample: str) -> None:
    documents = list(packaged.read(sample))
    assert len(documents) > 100
    text = "\n".join(documents)
    for markup in (
        "[[",
        "]]",
        "{{",
        "}}",
        "''",
        "<ref",
        "**",
        "__",
        "==",
        "&nbsp;",
        "\r",
        " ,",
        "( )",
    ):
        assert text.count(markup) <= len(text) / 5e5, markup
    letters = sum(char.isalpha() or char.isspace() for char in text)
    assert letters / len(text) > 0.93


@given(
    st.lists(st.tuples(st.text(max_size=30), st.integers(0, 9)), max_size=60),
    st.floats(0.1, 0.9),
    st.floats(0.1, 0.9),
)
def test_documents_are_split_by_groups(
    documents: list[tuple[str, int]], holdout: float, validation: float
) -> None:
    group_of = dict(reversed(documents))  # of copies the first counts
    split = split_documents(
        [text for text, _ in documents], [group for _, group in documents], holdout, validation
    )
    sides = (split.held_out, split.validation, split.train)
    groups = [{group_of[document] for document in side} for side in sides]
    assert not groups[0] & groups[1]
    assert not (groups[0] | groups[1]) & groups[2]
    assert set().union(*groups) == set(group_of.values())
    for side in sides[:2]:  # the longest of each group
        assert sorted(group_of[document] for document in side) == sorted(
            {group_of[document] for document in side}
        )
        for document in side:
            members = [text for text in group_of if group_of[text] == group_of[document]]
            assert len(document) == max(map(len, members))
    assert set(split.train) == {text for text in group_of if group_of[text] in groups[2]}
    assert len(split.train) == len(set(split.train))


@given(st.lists(st.text(max_size=30), unique=True, max_size=60), st.floats(0.1, 0.9))
def test_the_set_of_a_document_without_near_duplicates_does_not_depend_on_others(
    documents: list[str], fraction: float
) -> None:
    whole = split_documents(documents, range(len(documents)), fraction, 0.3)
    half = split_documents(documents[::2], range(len(documents[::2])), fraction, 0.3)
    for side in ("held_out", "validation", "train"):
        assert set(getattr(half, side)) == set(getattr(whole, side)) & set(documents[::2])


@given(st.lists(st.text(max_size=30), unique=True), st.integers(0, 5), st.randoms())
def test_the_shuffled_order_depends_on_seed_and_texts_only(
    documents: list[str], seed: int, random: Random
) -> None:
    permuted = list(documents)
    random.shuffle(permuted)
    assert shuffled(documents, seed) == shuffled(permuted, seed)


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


def word_level_base(folder: Path) -> BaseModel:
    """A model whose tokens are whole words, with BOS and EOS."""
    vocabulary = ["<s>", "</s>", "<unk>", *WORDS, *(f"{i:05d}" for i in range(200))]
    word_level = tokenizers.models.WordLevel(
        {word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"
    )
    tokenizer = tokenizers.Tokenizer(word_level)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    tiny_model(folder, "llama", vocab_size=len(vocabulary))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return BaseModel.local("word_level", folder)


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


def test_documents_begin_with_bos_and_are_packed_with_eos_between_them(
    base: BaseModel, tmp_path: Path
) -> None:
    with_bos = DocumentTokenizer(word_level_base(tmp_path / "word_level"))
    assert (with_bos.bos_ids, with_bos.separator) == ([0], [1])
    assert with_bos("alpha beta") == [0, 3, 4]
    without_bos = DocumentTokenizer(base)  # no special tokens at all
    assert (without_bos.bos_ids, without_bos.separator) == ([], BYTES("\n\n").input_ids)
    assert without_bos("alpha") == BYTES("alpha").input_ids


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


def test_passages_start_at_paragraphs_and_do_not_overlap() -> None:
    long = "\n\n".join(f"p{i} " + "word " * 9 for i in range(10)).strip()
    short = "q0 " + "word " * 20
    passages = cut_passages([long, short.strip()], 20)
    assert [passage[:2] for passage in passages] == ["p0", "q0", "p2", "p4", "p6", "p8"]
    assert all(count_words(passage) >= 20 for passage in passages)


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


@given(st.text(max_size=20))
def test_token_texts_join_to_the_text_also_inside_characters(text: str) -> None:
    tokens = BYTES(text).input_ids
    texts = token_texts(BYTES.decode, tokens)
    assert len(texts) == len(tokens)
    assert "".join(texts) == BYTES.decode(tokens) == text


@given(st.text(max_size=20), st.integers(0, 20))
def test_token_texts_take_the_context_into_account(text: str, cut: int) -> None:
    tokens = BYTES(text).input_ids
    continuation = token_texts(BYTES.decode, tokens[cut:], tokens[:cut])
    assert continuation == token_texts(BYTES.decode, tokens)[cut:]


def test_a_word_keeps_its_space_where_the_tokenizer_drops_that_of_a_first_word() -> None:
    """As in Llama 2 and TinyLlama."""
    vocabulary = {word: i for i, word in enumerate(["a", "▁a", "▁the", "▁cat", "s", "<unk>"])}
    model = tokenizers.models.WordLevel(vocabulary, unk_token="<unk>")
    metaspace = tokenizers.Tokenizer(model)
    metaspace.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    metaspace.decoder = tokenizers.decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=metaspace)
    assert tokenizer.decode([2, 3, 4]) == "the cats"
    assert token_texts(tokenizer.decode, [3, 4]) == ["cat", "s"]
    assert token_texts(tokenizer.decode, [3, 4], [2]) == [" cat", "s"]
    assert [token_text_in_context(tokenizer)(token) for token in (3, 4)] == [" cat", "s"]


@given(st.lists(st.integers(0, 255), max_size=30))
def test_token_texts_of_any_bytes_join_to_the_decoded_text(tokens: list[int]) -> None:
    texts = token_texts(BYTES.decode, tokens)
    assert len(texts) == len(tokens)
    assert "".join(texts) == BYTES.decode(tokens)
