"""Documents from every source, and sequences that share no document."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from hyperfitting.config import DatasetConfig, EvaluationConfig
from hyperfitting.data import corpus, packaged, sources
from hyperfitting.data.corpus import in_order, passages, split, words
from hyperfitting.errors import UserError
from hyperfitting.models import BaseModel, byte_tokenizer
from hyperfitting.store import Store
from tests.conftest import tiny_model

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]


def document(i: int, n: int = 60) -> str:
    rng = np.random.default_rng(i)
    return f"{i:05d} " + " ".join(rng.choice(WORDS, n))


BYTES = byte_tokenizer()


def files(path: Path, **fields: object) -> DatasetConfig:
    given_fields = {"name": "mine", "source": "files", "path": str(path), "seed": 0} | fields
    return DatasetConfig(**given_fields)


def read(cfg: DatasetConfig, store: Store) -> list[str]:
    return sources.load(sources.texts(cfg, store))


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
def test_every_kind_of_file_gives_the_same_documents(
    tmp_path: Path, store: Store, suffix: str
) -> None:
    # an empty .txt is an error of its own (below); an empty row is no document
    empty = [] if suffix == ".txt" else ["", "  "]
    assert read(files(write(tmp_path, suffix, [*TRICKY, *empty])), store) == TRICKY


def test_a_folder_gives_all_its_files_and_the_id_follows_their_content(
    tmp_path: Path, store: Store
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("a")
    write(tmp_path / "in", ".jsonl", ["b", "c"])
    (tmp_path / "in" / "ignored.md").write_text("no")
    before = sources.texts(files(tmp_path / "in"), store)
    assert sources.load(before) == ["a", "b", "c"]
    (tmp_path / "in" / "z.txt").write_text("d")
    after = sources.texts(files(tmp_path / "in"), store)
    assert after.id != before.id
    assert sources.load(after) == ["a", "b", "c", "d"]


def test_document_start_cuts_a_text_and_joins_rows(tmp_path: Path, store: Store) -> None:
    (tmp_path / "book.txt").write_text("CHAPTER 1\nIt was.\n\nMore.\nCHAPTER 2\nThe end.\n")
    cut = read(files(tmp_path / "book.txt", document_start="CHAPTER"), store)
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
    articles = read(files(write(tmp_path, ".jsonl", rows), document_start=" = [^=].* = $"), store)
    assert articles == [
        "= Robert = \n\n He acts . \n = = Early life = = \n Born .",
        "= Next = \n X",
    ]


def test_a_hub_dataset_is_read_by_subset_split_and_field(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hub's own layout in a folder: only the question which commit is meant needs the Hub."""
    import pyarrow
    import pyarrow.parquet

    for subset in ("one", "two"):
        (tmp_path / "repo" / subset).mkdir(parents=True)
        table = pyarrow.table({"body": [f"{subset} a", f"{subset} b", None]})
        pyarrow.parquet.write_table(table, tmp_path / "repo" / subset / "train-0.parquet")
    (tmp_path / "repo" / "README.md").write_text(
        "---\nconfigs:\n"
        + "".join(
            f"- config_name: {s}\n  data_files: {s}/train-*.parquet\n" for s in ("one", "two")
        )
        + "---\n"
    )
    monkeypatch.setattr("hyperfitting.hub.commit", lambda kind, repo, revision: "f" * 40)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    cfg = files(tmp_path / "repo", source="hub", subset="two", text_field="body")
    assert read(cfg, store) == ["two a", "two b"]
    with pytest.raises(UserError, match=r"(?s)dataset\.path.*dataset\.subset"):
        read(files(tmp_path / "repo", source="hub", subset="three", text_field="body"), store)
    with pytest.raises(UserError, match=r"(?s)dataset\.text_field=text.*body"):
        read(files(tmp_path / "repo", source="hub", subset="two"), store)


@pytest.mark.parametrize(
    ("name", "content", "fields", "says"),
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
def test_a_bad_file_gets_a_message_that_helps(
    tmp_path: Path, store: Store, name: str, content: bytes, fields: dict[str, str], says: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as told:
        read(files(tmp_path / name, **fields), store)
    assert says in str(told.value)
    assert "dataset." in str(told.value)


def test_a_missing_file_and_sample_are_named_with_near_matches(
    tmp_path: Path, store: Store
) -> None:
    (tmp_path / "news.jsonl").write_text("{}")
    with pytest.raises(UserError, match=r"(?s)new\.jsonl.*did you mean news\.jsonl"):
        read(files(tmp_path / "new.jsonl"), store)
    with pytest.raises(UserError, match=r"(?s)newz.*did you mean news"):
        packaged.files("newz")


@pytest.mark.parametrize("sample", ["news", "wikipedia", "shakespeare"])
def test_packaged_texts_are_plain_and_readable(sample: str) -> None:
    documents = list(packaged.read(sample))
    assert len(documents) > 100
    text = "\n".join(documents)
    for debris in (
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
        assert text.count(debris) <= len(text) / 5e5, debris
    letters = sum(char.isalpha() or char.isspace() for char in text)
    assert letters / len(text) > 0.93


@given(st.lists(st.text(max_size=30), max_size=60), st.floats(0.1, 0.9))
def test_the_pools_share_nothing_and_lose_nothing(documents: list[str], share: float) -> None:
    held_out, rest = split(documents, share)
    assert not set(held_out) & set(rest)
    assert set(held_out) | set(rest) == set(documents)
    assert len(held_out) + len(rest) == len(set(documents))
    # each document goes by its own text: others do not matter
    assert set(split(documents[::2], share)[0]) == set(held_out) & set(documents[::2])


@given(st.lists(st.text(max_size=30), unique=True), st.integers(0, 5), st.randoms())
def test_the_order_depends_on_seed_and_texts_only(
    documents: list[str], seed: int, random: object
) -> None:
    shuffled = list(documents)
    random.shuffle(shuffled)
    assert in_order(documents, seed) == in_order(shuffled, seed)


def build(
    base: BaseModel, folder: Path, store: Store, **fields: object
) -> tuple[corpus.Corpus, corpus.Tokens]:
    cfg = files(folder, **({"seq_len": 32, "n_train": 20, "n_val": 8} | fields))
    evaluation = EvaluationConfig(n_texts=10, context_len=8, new_tokens=[12, 24])
    texts = sources.texts(cfg, store)
    return (
        corpus.load_corpus(corpus.corpus(cfg, evaluation.share, texts, base, store)),
        corpus.load_evaluation_texts(
            corpus.evaluation_texts(cfg, evaluation, texts, base, store)
        ).tokens,
    )


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("many"), ".jsonl", [document(i) for i in range(200)])


def numbers(base: BaseModel, sequences: corpus.Tokens) -> list[str]:
    """The number that each test document begins with."""
    return [base.tokenizer().decode(row)[:5] for row in sequences]


def test_prefixes_are_the_starts_of_documents_that_no_two_sets_share(
    base: BaseModel, many: Path, store: Store
) -> None:
    data, held_out = build(base, many, store)
    assert data.train.shape == (20, 32)
    assert data.val.shape == (8, 32)
    assert held_out.shape == (10, 32)
    found = [numbers(base, part) for part in (data.train, data.val, held_out)]
    assert len({number for part in found for number in part}) == 38
    for row in data.train:
        text = base.tokenizer().decode(row)
        assert document(int(text[:5])).startswith(text)


def test_evaluation_texts_stay_whatever_is_trained_on(
    base: BaseModel, many: Path, store: Store
) -> None:
    one, held_out = build(base, many, store)
    other, held_out_too = build(base, many, store, seed=5, n_train=60, n_val=3)
    assert np.array_equal(held_out, held_out_too)
    assert set(numbers(base, one.train)) != set(numbers(base, other.train))
    assert not set(numbers(base, other.train)) & set(numbers(base, held_out))


def test_fewer_training_sequences_are_the_first_of_more(
    base: BaseModel, many: Path, store: Store
) -> None:
    few, _ = build(base, many, store, n_train=10)
    more, _ = build(base, many, store, n_train=20)
    assert np.array_equal(few.train, more.train[:10])
    assert np.array_equal(few.val, more.val)


def word_tokenizer_base(folder: Path) -> BaseModel:
    """A model whose tokens are whole words, with an opening and an end token."""
    from tokenizers import Tokenizer, pre_tokenizers, processors
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    names = ["<s>", "</s>", "<unk>", *WORDS, *(f"{i:05d}" for i in range(200))]
    raw = Tokenizer(WordLevel({w: i for i, w in enumerate(names)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    base = tiny_model(folder, "llama", vocab_size=len(names))
    PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    ).save_pretrained(folder)
    return BaseModel("words", "words", "float32", base.folder)


def test_the_same_seed_picks_the_same_documents_for_every_tokenizer(
    base: BaseModel, many: Path, store: Store, tmp_path: Path
) -> None:
    other = word_tokenizer_base(tmp_path / "words")
    ours, held_out = build(base, many, store)
    theirs, held_out_too = build(other, many, store)
    skip = len("<s> ")
    for one, two in ((ours.train, theirs.train), (ours.val, theirs.val), (held_out, held_out_too)):
        assert numbers(base, one) == [other.tokenizer().decode(row)[skip : skip + 5] for row in two]
    assert set(theirs.train[:, 0]) == {0}  # the opening token, once
    assert not (theirs.train[:, 1:] == 0).any()


def test_packed_sequences_are_cuts_of_joined_documents(
    base: BaseModel, many: Path, store: Store
) -> None:
    data, held_out = build(base, many, store, sequences="packed")
    assert data.train.shape == (20, 32)
    _, pool = split([document(i) for i in range(200)], 0.2)
    joined = "".join(text + "\n\n" for text in in_order(pool, 0))
    at = [joined.index(base.tokenizer().decode(row)) for row in (*data.val, *data.train)]
    assert max(at[:8]) < min(at[8:])  # validation comes from documents of its own
    assert all(int(number) < 200 for number in numbers(base, held_out))


def test_passages_start_at_paragraphs_and_do_not_overlap() -> None:
    long = "\n\n".join(f"p{i} " + "word " * 9 for i in range(10)).strip()
    short = "q0 " + "word " * 20
    found = passages([long, short.strip()], 20)
    assert [p[:2] for p in found] == ["p0", "q0", "p2", "p4", "p6", "p8"]
    assert all(words(p) >= 20 for p in found)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"n_train": 5000}, "dataset.n_train=5000: mine has only 1"),
        ({"n_val": 5000}, "dataset.n_val=5000: mine has only 1"),
        ({"seq_len": 61, "n_train": 5000}, "dataset.n_train"),
        ({"seq_len": 100, "n_train": 1, "n_val": 1}, "dataset.sequences=packed"),
        ({"seq_len": 4096}, "dataset.seq_len=4096: longer than the context of llama"),
    ],
)
def test_too_few_or_too_long_sequences_say_how_many_there_are(
    base: BaseModel, many: Path, store: Store, fields: dict[str, int], says: str
) -> None:
    with pytest.raises(UserError) as told:
        build(base, many, store, **fields)
    assert says in str(told.value)
    assert "valid: at most" in str(told.value) or "valid: nothing" in str(told.value)


def test_one_long_text_is_one_document_and_the_message_says_what_to_do(
    base: BaseModel, store: Store, tmp_path: Path
) -> None:
    (tmp_path / "book.txt").write_text("word " * 5000)
    with pytest.raises(UserError, match="document_start"):
        build(base, tmp_path / "book.txt", store)


def test_evaluation_sets_are_datasets_of_their_own_with_the_text_of_each_token(
    base: BaseModel, many: Path, store: Store, tmp_path: Path
) -> None:
    other = write(tmp_path, ".jsonl", [f"z{document(i)}" for i in range(60)])
    evaluation = EvaluationConfig(
        contexts={"other": files(other), "mine": files(many)},
        n_texts=5, context_len=8, new_tokens=[24],
    )  # fmt: skip
    found = corpus.evaluation_sets(files(many), evaluation, base, store)
    assert list(found) == ["other", "mine"]
    for name, artefact in found.items():
        texts = corpus.load_evaluation_texts(artefact)
        assert texts.tokens.shape == (5, 32)
        for row, pieces in zip(texts.tokens, texts.pieces, strict=True):
            assert "".join(pieces) == base.tokenizer().decode(row)
            assert pieces[0].startswith("z") == (name == "other")
    alone = EvaluationConfig(n_texts=5, context_len=8, new_tokens=[24])
    own = corpus.evaluation_sets(files(many), alone, base, store)
    assert {name: artefact.id for name, artefact in own.items()} == {"mine": found["mine"].id}


def test_a_set_that_cannot_be_had_names_its_own_fields(
    base: BaseModel, many: Path, store: Store, tmp_path: Path
) -> None:
    absent = {"away": files(tmp_path / "nowhere.txt")}
    with pytest.raises(UserError, match=r"evaluation\.contexts\.away\.path="):
        corpus.evaluation_sets(files(many), EvaluationConfig(contexts=absent), base, store)
    short = EvaluationConfig(contexts={"short": files(many)}, n_texts=5, text_len=900)
    with pytest.raises(UserError, match="only 0 held-out texts of 900 tokens") as told:
        sets = corpus.evaluation_sets(files(many), short, base, store)
        corpus.ensure_sets(sets, short)
    assert "evaluation.contexts.short.sequences=packed" in str(told.value)
    assert "evaluation.n_texts=5" in str(told.value)


@given(st.text(max_size=20))
def test_the_pieces_join_to_the_text_even_inside_characters(text: str) -> None:
    tokens = BYTES(text).input_ids
    found = corpus.pieces(BYTES.decode, tokens)
    assert len(found) == len(tokens)
    assert "".join(found) == BYTES.decode(tokens) == text


@given(st.text(max_size=20), st.integers(0, 20))
def test_pieces_go_on_from_what_is_given(text: str, cut: int) -> None:
    tokens = BYTES(text).input_ids
    found = corpus.pieces(BYTES.decode, tokens[cut:], tokens[:cut])
    assert found == corpus.pieces(BYTES.decode, tokens)[cut:]


def test_a_word_keeps_its_space_where_the_tokenizer_drops_that_of_a_first_word() -> None:
    """As Llama 2's and TinyLlama's do."""
    vocabulary = {word: i for i, word in enumerate(["a", "▁a", "▁the", "▁cat", "s", "<unk>"])}
    model = tokenizers.models.WordLevel(vocabulary, unk_token="<unk>")
    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    inner.decoder = tokenizers.decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    assert tokenizer.decode([2, 3, 4]) == "the cats"
    assert corpus.pieces(tokenizer.decode, [3, 4]) == ["cat", "s"]
    assert corpus.pieces(tokenizer.decode, [3, 4], [2]) == [" cat", "s"]
    assert [corpus.piece_in_text(tokenizer)(token) for token in (3, 4)] == [" cat", "s"]


@given(st.lists(st.integers(0, 255), max_size=30))
def test_every_sequence_of_tokens_has_pieces(tokens: list[int]) -> None:
    assert len(corpus.pieces(BYTES.decode, tokens)) == len(tokens)
