"""Files as users have them: any line ends, compressed, hidden, broken, half-written."""

import bz2
import gzip
import json
import lzma
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from hyperfitting.data.config import DatasetConfig
from hyperfitting.data.sources import documents_step, load_documents
from hyperfitting.errors import UserError
from hyperfitting.store.artifact import Store


def read(path: Path, store: Store, **fields: Any) -> list[str]:
    cfg = DatasetConfig(
        **{"name": "mine", "source": "files", "path": str(path), "seed": 0} | fields
    )
    return load_documents(documents_step(cfg, store).ensure()).texts


def problem(path: Path, store: Store, **fields: Any) -> str:
    with pytest.raises(UserError) as raised:
        read(path, store, **fields)
    assert raised.value.field.startswith("dataset.")
    return str(raised.value)


NO_LINE_ENDS = "a\u2028b\u2029c\u0085d\x0be\x0cf\x1cg\x1dh\x1ei"
"""What `str.splitlines` takes for line ends, besides \\n and \\r\\n."""


def test_only_line_feeds_end_a_line_of_jsonl(tmp_path: Path, store: Store) -> None:
    rows = [json.dumps({"text": text}, ensure_ascii=False) for text in ("x\u2028y", "z\u0085")]
    path = tmp_path / "a.jsonl"
    path.write_bytes("\r\n".join(rows).encode())
    assert read(path, store) == ["x\u2028y", "z"]


def test_only_line_feeds_end_a_line_of_txt(tmp_path: Path, store: Store) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(f"CH 1\r\n{NO_LINE_ENDS}\u2028CH 2\nCH 3\n".encode())
    documents = read(path, store, document_start=r"CH \d$")
    assert documents == [f"CH 1\r\n{NO_LINE_ENDS}\u2028CH 2", "CH 3"]


def test_only_line_feeds_end_a_row_of_csv(tmp_path: Path, store: Store) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(f'n,text\r\n1,{NO_LINE_ENDS}\r\n2,"two\r\nlines"\r\n'.encode())
    assert read(path, store) == [NO_LINE_ENDS, "two\r\nlines"]


def test_lone_surrogates_are_replaced_and_counted(
    tmp_path: Path, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\\ud800b\\udfff"}\n{"text": "\\ud83d\\ude00"}\n')
    assert read(path, store) == ["a\ufffdb\ufffd", "\U0001f600"]
    assert "2 lone surrogates" in caplog.text


def zstd(data: bytes) -> bytes:
    """Two frames after each other, as tools that compress in parallel write them."""
    parts = (data[: len(data) // 2], data[len(data) // 2 :])
    return b"".join(pyarrow.compress(part, "zstd", asbytes=True) for part in parts)


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [(".gz", gzip.compress), (".BZ2", bz2.compress), (".xz", lzma.compress), (".zst", zstd)],
)
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"text": "one"}\n{"text": "two"}\n'),
        ("a.json", '[{"text": "one"}, {"text": "two"}]'),
        ("a.csv", "text\none\ntwo\n"),
        ("a.txt", "one\ntwo\n"),
    ],
)
def test_compressed_files_are_read(
    tmp_path: Path,
    store: Store,
    suffix: str,
    compress: Callable[[bytes], bytes],
    name: str,
    content: str,
) -> None:
    path = tmp_path / (name + suffix)
    path.write_bytes(compress(content.encode()))
    assert read(path, store) == (["one\ntwo"] if name == "a.txt" else ["one", "two"])
    path.write_bytes(compress(content.encode() * 9)[:-7])
    assert "cannot be read" in problem(path, store)
    path.write_bytes(b"not compressed")
    assert "cannot be read" in problem(path, store)


@pytest.mark.parametrize(
    "content",
    [
        '[{"text": "one"}, {"text": null}, {"text": "two"}]',
        ' [ "one",\n "two"]',
        '{"text": "one"}\n{"text": "two"}\n',  # as C4 names its files
    ],
)
def test_a_json_file_is_an_array_or_one_object_per_line(
    tmp_path: Path, store: Store, content: str
) -> None:
    path = tmp_path / "A.JSON"
    path.write_text(content)
    assert read(path, store) == ["one", "two"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "one"}, {"body": "two"}]', "item 2 of a.json has no such field"),
        ('[{"text": "one"}, 3]', "item 2 of a.json has no such field"),
        ('[{"text": "one"}', "a.json is not JSON"),
        ('{\n "text": "one"\n}', "line 1 of a.json is not JSON"),
        ("[" * 100_000, "a.json is not JSON"),
    ],
)
def test_an_item_without_text_is_named(
    tmp_path: Path, store: Store, content: str, message: str
) -> None:
    (tmp_path / "a.json").write_text(content)
    assert message in problem(tmp_path / "a.json", store)


def test_the_case_of_an_ending_does_not_matter(tmp_path: Path, store: Store) -> None:
    path = tmp_path / "in" / "A.JSONL"
    path.parent.mkdir()
    path.write_text('{"text": "one"}')
    assert read(path, store) == ["one"]
    assert read(path.parent, store) == ["one"]


def test_in_a_folder_json_counts_where_there_is_nothing_else(tmp_path: Path, store: Store) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.json").write_text('["a"]')
    assert read(folder, store) == ["a"]
    (folder / "a.txt").write_text("text")  # so a.json is likely to describe it
    assert read(folder, store) == ["text"]


def test_hidden_files_and_folders_named_like_files_are_skipped(
    tmp_path: Path, store: Store
) -> None:
    folder = tmp_path / "corpus.v2.jsonl"
    for name in ("a.txt", "._a.txt", ".cache/b.txt", "sub.txt/c.txt", "__MACOSX/._c.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"\0\5\x16\7" if "._" in name else name.encode())
    assert read(folder, store) == ["a.txt", "sub.txt/c.txt"]


def broken_link(path: Path) -> None:
    path.symlink_to("nowhere.txt")


def looping_link(path: Path) -> None:
    path.symlink_to(path.name)


@pytest.mark.parametrize("make", [broken_link, looping_link, os.mkfifo])
def test_what_is_no_file_is_named_and_not_waited_for(
    tmp_path: Path, store: Store, make: Callable[[Path], None]
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("a")
    make(tmp_path / "in" / "b.txt")
    assert "in/b.txt" in problem(tmp_path / "in", store)
    assert "b.txt" in problem(tmp_path / "in" / "b.txt", store)


@pytest.mark.parametrize("name", ["README", "a.docx", "a.gz", "a.parquet.gz"])
def test_a_file_of_another_format_is_refused(tmp_path: Path, store: Store, name: str) -> None:
    (tmp_path / name).write_text("x")
    assert "valid: .txt, .jsonl, .json, .csv, .parquet;" in problem(tmp_path / name, store)


@pytest.mark.parametrize("path", ["x" * 300 + ".txt", "a.txt/b.txt"])
def test_a_path_that_cannot_be_is_an_error(tmp_path: Path, store: Store, path: str) -> None:
    (tmp_path / "a.txt").write_text("a")
    assert "dataset.path=" in problem(tmp_path / path, store)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_without_permission_is_an_error(tmp_path: Path, store: Store) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in").chmod(stat.S_IXUSR)
    assert "Permission denied" in problem(tmp_path, store)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('text\none\n"two\nthree\n', "begins in line 3 of a.csv"),
        ('text,n\none,1\n"two,2\n"three",3\n', "begins in line 3 of a.csv"),
        ('text\n"say "hello" twice"\n', "begins in line 2 of a.csv"),
        ("text\none\rtwo\n", "begins in line 2 of a.csv"),
        ("text,n,text\n1,2,3\n", "2 columns of this name"),
        ("text\nHello, world\n", "line 2 of a.csv has 2 values for 1 columns"),
    ],
)
def test_a_csv_that_loses_text_is_refused(
    tmp_path: Path, store: Store, content: str, message: str
) -> None:
    (tmp_path / "a.csv").write_text(content)
    assert message in problem(tmp_path / "a.csv", store)


def test_missing_values_are_skipped(tmp_path: Path, store: Store) -> None:
    (tmp_path / "a.csv").write_text("n,text\n1,one\n2\n\n3,\n4,two\n")
    assert read(tmp_path / "a.csv", store) == ["one", "two"]
    (tmp_path / "a.jsonl").write_text('{"text": null}\n{"text": "one"}\n')
    assert read(tmp_path / "a.jsonl", store) == ["one"]


def test_a_parquet_file_with_two_such_columns_or_bytes_is_refused(
    tmp_path: Path, store: Store
) -> None:
    column = pyarrow.array(["one"])
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays([column, column], ["text", "text"]), path)
    assert "2 columns of this name" in problem(path, store)
    invalid = pyarrow.StringArray.from_buffers(
        1, pyarrow.array([0, 1], pyarrow.int32()).buffers()[1], pyarrow.py_buffer(b"\xff")
    )
    pyarrow.parquet.write_table(pyarrow.table({"text": invalid}), path)
    assert "holds bytes there, not text" in problem(path, store)
