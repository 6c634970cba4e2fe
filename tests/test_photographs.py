"""The packaged color photographs: patches, sets by photograph, a palette by k-means."""

import importlib.util
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image
from transformers.models.imagegpt.image_processing_pil_imagegpt import ImageGPTImageProcessorPil

from hyperfitting.data.config import DatasetConfig, ImageConfig
from hyperfitting.data.images import (
    Images,
    image_key,
    images_step,
    load_images,
    split_images,
)
from hyperfitting.data.packaged_images import PHOTOGRAPHS, patches
from hyperfitting.errors import UserError
from hyperfitting.models.image_format import ImageFormat
from hyperfitting.store.artifact import Store
from hyperfitting.training import pretraining
from hyperfitting.training.pretraining import palette
from tests.conftest import Compose

PATCH = ImageConfig()
DATASET = DatasetConfig(name="p", source="package", path="photographs", image=PATCH, seed=0)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Images:
    store = Store(tmp_path_factory.mktemp("store"))
    return load_images(images_step(DATASET, PATCH, store).ensure())


def test_patches_tile_a_photograph_without_overlap() -> None:
    picture = np.arange(70 * 100 * 3).reshape(70, 100, 3) % 251
    tiles = patches(picture, PATCH)
    assert tiles.shape == (6, 32, 32, 3)
    together = np.concatenate(
        [np.concatenate(list(row), axis=1) for row in tiles.reshape(2, 3, 32, 32, 3)]
    )
    assert (together == picture[:64, :96]).all()


def test_the_patches_are_of_the_photographs_that_packages_ship(images: Images) -> None:
    assert (images.n_read, len(images.pixels), len(PHOTOGRAPHS)) == (2011, 2009, 8)
    assert images.pixels.shape[1:] == (32, 32, 3)
    flower = load_sample_image("flower.jpg")
    (number,) = (n for n, photo in enumerate(PHOTOGRAPHS) if photo.path.endswith("flower.jpg"))
    rows = np.flatnonzero(images.groups == number)
    assert len(rows) == (flower.shape[0] // 32) * (flower.shape[1] // 32)
    assert (images.pixels[rows[0]] == flower[:32, :32]).all()
    assert (images.pixels[rows[-1]] == flower[384:416, 608:640]).all()


def test_a_photographs_patches_are_in_one_set_and_no_set_is_empty(images: Images) -> None:
    sets = vars(split_images(images, 0.2, 0.2))
    assert sorted(np.concatenate(list(sets.values()))) == list(range(len(images.pixels)))
    photographs = {name: set(images.groups[rows].tolist()) for name, rows in sets.items()}
    assert all(photographs.values())
    assert sum(map(len, photographs.values())) == len(PHOTOGRAPHS)
    keys = [{image_key(images.pixels[row]) for row in rows} for rows in sets.values()]
    assert len(set.union(*keys)) == sum(map(len, keys))


def test_the_palette_is_of_the_photographs_for_pretraining_only(
    compose: Compose, images: Images, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = compose("preset=images", "model=imagegpt_photographs", "dataset=photographs")
    assert (cfg.dataset.seq_len, cfg.evaluation.context_len) == (1025, 257)
    plan = cfg.model.pretraining
    assert plan is not None
    fitted_to = []

    def blacks(pixels: np.ndarray, n_colors: int, seed: int) -> np.ndarray:
        fitted_to.append(pixels)
        return np.full((n_colors, 3), -1, np.float32)

    monkeypatch.setattr(pretraining, "palette", blacks)
    dataset = pretraining._dataset(plan, PATCH)
    step = images_step(dataset, PATCH, store)
    step.ensure()
    small = replace(cfg.model, architecture={"model_type": "imagegpt", "n_embd": 8, "n_layer": 1})
    model = pretraining._initial_model(small, plan, dataset, step.artifact, store)
    model.ensure()
    expected = images.pixels[split_images(images, 0.2, 0.2).pretraining]
    assert (fitted_to[0] == expected.reshape(-1, 3)).all()
    assert (model.image_format().palette == -1).all()
    assert model.image_format().palette.shape == (512, 3)


@pytest.mark.parametrize("field", ["holdout_fraction", "validation_fraction"])
def test_fractions_of_fixed_sets_are_refused(store: Store, field: str) -> None:
    with pytest.raises(UserError, match=rf"dataset\.{field}=0\.4: changes nothing"):
        images_step(replace(DATASET, **{field: 0.4}), PATCH, store)


def test_a_package_that_is_missing_is_named(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "skimage" else found(name)
    )
    with pytest.raises(UserError, match="needs the package scikit-image") as error:
        images_step(DATASET, PATCH, store)
    assert "hyperfitting[images]" in str(error.value)


def test_quantization_by_the_palette_is_imagegpts(images: Images) -> None:
    split = split_images(images, 0.2, 0.2)
    colors = palette(images.pixels[split.pretraining[::40]].reshape(-1, 3), 8, seed=0)
    assert colors.shape == (8, 3)
    assert (np.abs(colors) <= 1).all()
    held_out = images.pixels[split.held_out[:6]]
    processor = ImageGPTImageProcessorPil(clusters=colors, size={"height": 32, "width": 32})
    expected = np.array(processor([Image.fromarray(p) for p in held_out])["input_ids"])
    image_format = ImageFormat(32, 32, colors)
    assert (image_format.quantize(held_out) == expected.reshape(6, -1)).all()
    error = image_format.render(image_format.quantize(held_out)) - held_out.astype(float)
    gray = held_out - held_out.mean((0, 1, 2))
    assert (error**2).mean() < 0.2 * (gray**2).mean()  # of another photograph than it is fitted to
