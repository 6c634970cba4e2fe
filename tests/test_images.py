"""Images as token sequences: the tokens of transformers' processor, and which set holds which."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers.models.imagegpt.image_processing_pil_imagegpt import ImageGPTImageProcessorPil

from hyperfitting.config import RunConfig
from hyperfitting.data.images import Images, image_key, load_images, split_images
from hyperfitting.data.modality import held_out_step, read_step, training_sequences_step
from hyperfitting.data.sequences import load_evaluation_texts, load_sequences
from hyperfitting.errors import UserError
from hyperfitting.models.base import BaseModel
from hyperfitting.models.image_format import ImageFormat, PixelTokenizer
from hyperfitting.store.artifact import Store
from hyperfitting.training.pretraining import palette
from tests.conftest import Compose
from tests.images import DIGITS, SMALL, digit_sequences, digits, imagegpt, random_images

__all__ = ["digits", "imagegpt"]


def test_tokens_and_their_order_are_those_of_transformers_processor() -> None:
    clusters = np.random.default_rng(0).uniform(-1, 1, (512, 3)).astype(np.float32)
    images = random_images(3, 32, 32)
    processor = ImageGPTImageProcessorPil(clusters=clusters, size={"height": 32, "width": 32})
    expected = np.array(processor([Image.fromarray(i) for i in images])["input_ids"])
    tokens = ImageFormat(32, 32, clusters).quantize(images)
    assert tokens.shape == (3, 1024)
    assert (tokens == expected.reshape(3, -1)).all()


def test_rendered_colors_are_those_of_transformers_example() -> None:
    clusters = np.random.default_rng(0).uniform(-1, 1, (512, 3)).astype(np.float32)
    image_format = ImageFormat(4, 6, clusters)
    tokens = np.random.default_rng(1).integers(512, size=(2, 24))
    expected = np.rint(127.5 * (clusters[tokens] + 1.0)).reshape(2, 4, 6, 3).astype(np.uint8)
    assert (image_format.render(tokens) == expected).all()


@given(st.lists(st.integers(0, 16), min_size=64, max_size=64))
def test_images_in_the_colors_of_the_palette_survive_quantization(levels: list[int]) -> None:
    tokens = np.array([levels], np.int32)
    assert (DIGITS.quantize(DIGITS.render(tokens)) == tokens).all()


def test_pixels_are_written_and_read_as_colors() -> None:
    tokenizer = PixelTokenizer(DIGITS)
    assert tokenizer.decode([17, 0, 16, 8]) == "000000 ffffff 808080 "
    assert tokenizer("000000 ffffff 808080").input_ids == [0, 16, 8]


def test_a_saved_format_is_what_transformers_processor_reads(tmp_path: Path) -> None:
    PixelTokenizer(DIGITS).save_pretrained(tmp_path)
    processor = ImageGPTImageProcessorPil.from_pretrained(tmp_path)
    images = DIGITS.render(digit_sequences(2)[:, 1:])
    tokens = np.array(processor([Image.fromarray(i) for i in images])["input_ids"])
    assert (tokens.reshape(2, -1) == DIGITS.quantize(images)).all()


def test_sos_begins_a_sequence_unless_it_is_switched_off() -> None:
    with_sos, without = digit_sequences(2), digit_sequences(2, prepend_sos=False)
    assert with_sos.shape == (2, 65)
    assert (with_sos[:, 0] == 17).all()
    assert (with_sos[:, 1:] == without).all()


@given(
    groups=st.lists(st.integers(0, 9), min_size=1, max_size=40),
    fraction=st.floats(0.1, 0.9),
    is_packaged=st.booleans(),
)
def test_all_images_of_a_photograph_are_in_one_set(
    groups: list[int], fraction: float, is_packaged: bool
) -> None:
    pixels = random_images(len(groups), 2, 2)
    images = Images(pixels, np.array(groups, np.int32), is_packaged, len(groups))
    sets = vars(split_images(images, fraction, fraction))
    assert sorted(np.concatenate(list(sets.values()))) == list(range(len(groups)))
    photographs = [set(images.groups[rows]) for rows in sets.values()]
    assert sum(map(len, photographs)) == len(set(groups))
    if not is_packaged:
        assert not len(sets["pretraining"]) + len(sets["pretraining_validation"])


def test_the_set_of_an_image_does_not_depend_on_the_others() -> None:
    pixels = random_images(60, 2, 2)
    whole = Images(pixels, np.arange(60, dtype=np.int32), True, 60)
    half = Images(pixels[30:], np.arange(30, dtype=np.int32), True, 30)
    for name, rows in vars(split_images(half, 0.3, 0.2)).items():
        expected = getattr(split_images(whole, 0.3, 0.2), name)
        assert set(rows + 30) == {row for row in expected if row >= 30}


def test_pretraining_never_sees_what_is_tuned_validated_or_evaluated_on(
    compose: Compose, imagegpt: BaseModel, store: Store
) -> None:
    cfg = compose("preset=images")
    images = read_step(cfg.dataset, store)
    loaded = load_images(images.ensure())
    split = split_images(loaded, cfg.dataset.holdout_fraction, cfg.dataset.validation_fraction)
    pretraining = np.concatenate([split.pretraining, split.pretraining_validation])
    seen = {image_key(DIGITS.quantize(loaded.pixels[[row]])) for row in pretraining}
    sequences = load_sequences(
        training_sequences_step(cfg.dataset, images.artifact, imagegpt, store).ensure()
    )
    held_out = load_evaluation_texts(
        held_out_step(
            cfg.dataset, images.artifact, imagegpt, store, n_texts=128, length=65
        ).ensure()
    )
    sets = (sequences.train, sequences.val, held_out.tokens)
    assert [len(tokens) for tokens in sets] == [200, 64, 128]
    used = [{image_key(row[1:]) for row in tokens} for tokens in sets]
    assert not set.union(*used) & seen
    assert len(set.union(*used)) == 392  # nor do the three sets share one


def test_the_palette_is_the_colors_that_occur_or_clusters_of_them() -> None:
    pixels = DIGITS.colors[np.random.default_rng(0).integers(17, size=500)]
    np.testing.assert_allclose(palette(pixels, 17, 0), DIGITS.palette, atol=1e-6)
    spread = np.repeat([[0, 0, 0], [255, 0, 0], [0, 255, 255]], 400, axis=0)
    noisy = np.clip(spread + np.random.default_rng(0).integers(-5, 6, spread.shape), 0, 255)
    clusters = ImageFormat(1, 1, palette(noisy.astype(np.uint8), 3, 0)).colors.astype(int)
    assert np.abs(clusters - [[0, 0, 0], [255, 0, 0], [0, 255, 255]]).max() < 8
    assert (palette(noisy.astype(np.uint8), 3, 0) == palette(noisy.astype(np.uint8), 3, 0)).all()
    with pytest.raises(UserError, match="more colors"):
        palette(pixels, 18, 0)


def test_the_authors_published_validation_continues_the_first_pixels_of_whole_images(
    compose: Compose, imagegpt: BaseModel, store: Store
) -> None:
    cfg = compose(
        *SMALL, "model.path=.", "dataset.image.prepend_sos=false", "evaluation.context_len=32",
        "trainer.val_prompt_len=32",
    )  # fmt: skip
    assert (cfg.trainer.val_max_new_tokens, cfg.evaluation.max_new_tokens) == (32, [32])
    images = read_step(cfg.dataset, store)
    pixels = DIGITS.quantize(load_images(images.ensure()).pixels)
    step = training_sequences_step(cfg.dataset, images.artifact, imagegpt, store)
    val = load_sequences(step.ensure()).val
    expected = {row[:32].tobytes() for row in pixels}
    assert {row[: cfg.trainer.val_prompt_len].astype(np.int32).tobytes() for row in val} <= expected
    assert val.shape == (4, 64)
    assert val.max() < DIGITS.sos


def test_images_of_a_folder_are_scaled_as_transformers_processor_scales(
    digits: RunConfig, tmp_path: Path, store: Store
) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    pictures = random_images(6, 30, 21)
    for n, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{n}.png")
    Image.fromarray(pictures[0]).save(folder / "copy.png")
    dataset = replace(digits.dataset, source="files", path=str(folder))
    images = load_images(read_step(dataset, store).ensure())
    assert (len(images.pixels), images.n_read) == (6, 7)
    processor = ImageGPTImageProcessorPil(clusters=DIGITS.palette, size={"height": 8, "width": 8})
    expected = np.array(processor([Image.fromarray(p) for p in pictures])["input_ids"])
    assert (DIGITS.quantize(images.pixels) == expected.reshape(6, -1)).all()
