"""Datasets of the Hub: subsets, files and what is refused, with the real client."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hyperfitting.data.config import TextsConfig
from hyperfitting.data.sources import documents_step
from hyperfitting.errors import UserError
from hyperfitting.store.artifact import Store
from tests.hub_client import DATASET, Reported, hub_of_this_process, push_dataset, texts
from tests.hub_server import HubServer


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with hub_of_this_process(tmp_path / "hf", monkeypatch) as server:
        yield server


def test_only_the_files_of_the_subset_are_downloaded(server: HubServer, store: Store) -> None:
    commit = push_dataset(server)
    progress = Reported()
    assert texts(store, progress) == ["large a", "large b"]
    assert texts(store, split="test") == ["large c"]
    assert texts(store, split="train[:1]") == ["large a"]
    assert server.seen("small/train") == 0
    assert f"downloading {DATASET}" in progress.tasks
    cfg = TextsConfig(name="t", path=DATASET, subset="large")
    recipe = documents_step(cfg, store).artifact.recipe
    assert recipe["inputs"] == {"source": f"{DATASET}@{commit}"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"subset": "lrage"}, r"dataset\.subset=lrage.*small, large.*did you mean large"),
        ({"subset": None}, "dataset.subset=None: it has several subsets.*small, large"),
        ({"split": "valid"}, "dataset.path=owner/texts.*valid.*dataset.split"),
        ({"text_field": "body"}, "dataset.text_field=body.*text"),
        ({"path": "owner/other"}, "dataset.path=owner/other.*no such dataset.*dataset=files"),
    ],
)
def test_wrong_fields_of_a_dataset_are_named(
    server: HubServer, store: Store, fields: dict[str, Any], message: str
) -> None:
    push_dataset(server)
    with pytest.raises(UserError, match=f"(?s){message}"):
        texts(store, **fields)


def test_a_dataset_without_a_readme_is_read_by_its_file_names(
    server: HubServer, store: Store
) -> None:
    rows = '{"text": "a"}\n{"text": "b"}\n'
    server.push("datasets", DATASET, {"train.jsonl": rows, "test.jsonl": '{"text": "c"}\n'})
    assert texts(store, subset=None) == ["a", "b"]
    assert texts(store, subset=None, split="test") == ["c"]
    with pytest.raises(UserError, match=r"dataset\.subset=x.*no such subset"):
        texts(store, subset="x")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"texts.py": b"print()", "train.csv": b"text\na\n"}, "is a dataset script .texts.py"),
        ({"picture.png": b""}, "no data file in it"),
        ({"../train.csv": b"text\na\n"}, "a file named '../train.csv'"),
        ({"train.parquet": b"no table"}, "cannot load it: Parquet"),
    ],
)
def test_a_dataset_that_cannot_be_used_is_refused(
    server: HubServer, store: Store, files: dict[str, bytes], message: str
) -> None:
    server.push("datasets", DATASET, files)
    with pytest.raises(UserError, match=f"(?s)dataset.path=owner/texts.*{message}"):
        texts(store, subset=None)


@pytest.mark.parametrize(
    "pattern", ["../secret.csv", "{root}/secret.csv", "http://127.0.0.1/x.csv"]
)
def test_a_readme_leads_to_no_file_outside_of_the_repository(
    server: HubServer, store: Store, tmp_path: Path, pattern: str
) -> None:
    (tmp_path / "secret.csv").write_text("text\nsecret\n")
    path = pattern.format(root=tmp_path)
    readme = f"---\nconfigs:\n- config_name: a\n  data_files: {path}\n---\n"
    server.push("datasets", DATASET, {"README.md": readme, "train.csv": "text\na\n"})
    with pytest.raises(UserError, match="no data file of subset a"):
        texts(store, subset="a")


def test_a_folder_of_that_name_is_not_taken_for_the_dataset(
    server: HubServer, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push_dataset(server)
    monkeypatch.chdir(tmp_path)
    (tmp_path / DATASET).mkdir(parents=True)
    (tmp_path / DATASET / "train.csv").write_text("text\nnot this\n")
    assert texts(store) == ["large a", "large b"]
