"""Documents from files of every format and from the samples of packages."""

from pathlib import Path

import datasets
import pytest

from hyperfitting.data import packaged
from hyperfitting.data.config import DatasetConfig
from hyperfitting.data.sources import documents_step, load_documents
from hyperfitting.errors import UserError
from hyperfitting.store.artifact import Store
from tests.documents import files_config, write


def read(cfg: DatasetConfig, store: Store) -> list[str]:
    return load_documents(documents_step(cfg, store).ensure()).texts


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


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet", ".arrow"])
def test_rows_without_newlines_are_joined_as_lines(
    tmp_path: Path, store: Store, suffix: str
) -> None:
    rows = ["= A =", "one two", "", "three\n", "four", "= B =", "five"]
    cfg = files_config(write(tmp_path, suffix, rows), document_start="= .")
    assert read(cfg, store) == ["= A =\none two\n\nthree\nfour", "= B =\nfive"]


def test_only_the_id_of_joined_rows_tells_that_they_are_lines(tmp_path: Path, store: Store) -> None:
    table = write(tmp_path, ".jsonl", ["= A =", "b"])
    (tmp_path / "lines.txt").write_text("= A =\nb\n")
    settings = {"reader": 2, "text_field": "text"}
    for path, start, joined in (
        (table, None, {}),
        (tmp_path / "lines.txt", "= .", {}),
        (table, "= .", {"row_end": "\n"}),
        (tmp_path, "= .", {"row_end": "\n"}),
    ):
        step = documents_step(files_config(path, document_start=start), store)
        assert step.artifact.recipe["config"] == settings | {"document_start": start} | joined


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


@pytest.mark.parametrize(
    ("split", "expected"),
    [("train", "abc"), ("train[:2]", "ab"), ("test", "d"), ("train[2:]+test", "cd")],
)
def test_a_slice_of_a_saved_dataset_is_read(
    split: str, expected: str, tmp_path: Path, store: Store
) -> None:
    rows = {"train": ["a", "b", "c"], "test": ["d"]}
    saved = datasets.DatasetDict(
        {name: datasets.Dataset.from_dict({"text": texts}) for name, texts in rows.items()}
    )
    saved.save_to_disk(str(tmp_path / "saved"))
    assert read(files_config(tmp_path / "saved", split=split), store) == list(expected)


@pytest.mark.parametrize("split", ["nonsense", "train[:x]", ""])
def test_a_split_that_a_saved_dataset_lacks_is_refused(
    split: str, tmp_path: Path, store: Store
) -> None:
    datasets.Dataset.from_dict({"text": ["a", "b"]}).save_to_disk(str(tmp_path / "saved"))
    assert read(files_config(tmp_path / "saved", split="train[:1]"), store) == ["a"]
    with pytest.raises(UserError, match=r"no such split(.|\n)*train, or a slice"):
        read(files_config(tmp_path / "saved", split=split), store)
