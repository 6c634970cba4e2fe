"""Datasets of the Hub: subsets, files and what is refused, with the real client."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from hyperfitting.data.config import ImageConfig, TextsConfig
from hyperfitting.data.image_files import read_image
from hyperfitting.data.images import images_step, load_images
from hyperfitting.data.sources import documents_step
from hyperfitting.errors import UserError
from hyperfitting.store.artifact import Store
from tests.hub_client import (
    DATASET,
    Reported,
    hub_of_this_process,
    push_dataset,
    start_process,
    texts,
)
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


def push_images(server: HubServer, *files: dict[str, Any] | None) -> None:
    features = datasets.Features({"img": datasets.Image(), "label": datasets.Value("int64")})
    rows = {"img": list(files), "label": [0] * len(files)}
    table = io.BytesIO()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(table)
    server.push("datasets", DATASET, {"train.parquet": table.getvalue()})


def hub_images(store: Store, column: str = "img") -> Any:
    image = ImageConfig(height=2, width=2, column=column)
    cfg = TextsConfig(name="pictures", path=DATASET, image=image)
    return load_images(images_step(cfg, image, store).ensure()).pixels


def test_images_of_the_hub_are_read_as_files_are(
    server: HubServer, store: Store, tmp_path: Path
) -> None:
    noise = np.random.default_rng(0).integers(0, 2**16, (2, 2, 4), dtype=np.uint16)
    pictures = [
        Image.fromarray(noise[:, :, 0]),  # 16 bits, gray
        Image.fromarray(noise.astype(np.uint8)),  # transparent
        Image.fromarray(noise[:, :, :3].astype(np.uint8)),
    ]
    paths = [tmp_path / f"{i}.png" for i in range(len(pictures))]
    for picture, path in zip(pictures, paths, strict=True):
        picture.save(path)
    push_images(server, *({"bytes": path.read_bytes(), "path": None} for path in paths))
    assert np.array_equal(hub_images(store), [read_image(path) for path in paths])


def test_what_is_no_image_is_refused_and_no_path_of_a_row_is_opened(
    server: HubServer, store: Store, tmp_path: Path
) -> None:
    buffer, path = io.BytesIO(), tmp_path / "private.png"
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "PNG")
    path.write_bytes(buffer.getvalue())
    good = {"bytes": buffer.getvalue(), "path": None}
    push_images(server, good)
    with pytest.raises(UserError, match=r"(?s)dataset\.image\.column=label.*valid: img$"):
        hub_images(store, column="label")
    for bad, message in (
        (None, "row 2 of owner/texts holds no image"),
        ({"bytes": None, "path": str(path)}, "row 2 of owner/texts holds no image"),
        ({"bytes": b"no image", "path": None}, "row 2 of owner/texts: is not an image"),
        ({"bytes": buffer.getvalue()[:500], "path": None}, "row 2 of owner/texts: is damaged"),
    ):
        push_images(server, good, bad)
        start_process()
        with pytest.raises(UserError, match=message):
            hub_images(store)
