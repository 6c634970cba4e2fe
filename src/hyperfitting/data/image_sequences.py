"""From images to token sequences, in the files of those of texts (`data.sequences`)."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hyperfitting.data.config import DatasetConfig, ImageConfig, TextsConfig
from hyperfitting.data.images import Images, ImageSplit, load_images, ordered, split_images
from hyperfitting.data.sequences import (
    EVALUATION_SEED,
    EvaluationTexts,
    SplitSizes,
    Tokens,
    save_sequences,
)
from hyperfitting.errors import UserError
from hyperfitting.fields import id_config
from hyperfitting.models.base import BaseModel
from hyperfitting.models.image_format import ImageFormat, Pixels
from hyperfitting.store.artifact import Artifact, Step, Store

VERSION = 1


def image_sequences_step(
    cfg: DatasetConfig,
    image: ImageConfig,
    images: Artifact,
    base: BaseModel,
    store: Store,
    for_pretraining: bool = False,
) -> Step:
    """Return the step that builds the training and validation sequences, each a whole image.

    Its build raises UserError if there are too few images, or the model is not made for them.

    Args:
        cfg: sizes of the sets, and the seed that orders them.
        image: whether SOS is prepended.
        images: the `images` artifact.
        base: quantizes them.
        store: where the sequences are kept.
        for_pretraining: take them from the images that only base models are pre-trained on.
    """

    def build(work: Path) -> None:
        image_format = _format(base, image)
        loaded = load_images(images)
        split = split_images(loaded, cfg.holdout_fraction, cfg.validation_fraction)

        def take(field: str, n: int, rows: NDArray[np.int64]) -> Tokens:
            _check_count(field, n, len(rows), cfg, loaded)
            return to_tokens(ordered(loaded, rows, cfg.seed)[:n], image_format, image)

        train, val = split.train, split.validation
        if for_pretraining:
            train, val = split.pretraining, split.pretraining_validation
        save_sequences(
            work,
            take("dataset.n_train", cfg.n_train, train),
            take("dataset.n_val", cfg.n_val, val),
            _sizes(loaded, split),
        )

    artifact = store.artifact(
        "sequences",
        version=VERSION,
        config=id_config(cfg, "sequences")
        | id_config(image, "sequences")
        | {"modality": "image", "for_pretraining": for_pretraining},
        inputs={"images": images.id, "model": base.id},
    )
    return Step(artifact, build)


def held_out_images(
    cfg: TextsConfig, image: ImageConfig, images: Images, base: BaseModel, n: int, length: int
) -> EvaluationTexts:
    """Return the first ``n`` held-out images, cut to ``length`` tokens, SOS included.

    Raises:
        UserError: there are too few images, or they have fewer tokens; or the model is not made
            for them.
    """
    image_format = _format(base, image)
    if length > image.n_tokens:
        raise UserError(
            "longer than an image",
            field="evaluation.context_len + evaluation.max_new_tokens",
            value=length,
            valid=f"at most {image.n_tokens} tokens",
        )
    held_out = split_images(images, cfg.holdout_fraction, 0.0).held_out
    _check_count("evaluation.n_texts", n, len(held_out), cfg, images)
    pictures = ordered(images, held_out, EVALUATION_SEED)[:n]
    tokens = to_tokens(pictures, image_format, image)[:, :length]
    decode = base.tokenizer().decode
    return EvaluationTexts(tokens, [[decode([token]) for token in row] for row in tokens.tolist()])


def to_tokens(pictures: Pixels, image_format: ImageFormat, image: ImageConfig) -> Tokens:
    """Return images (N, H, W, 3) as token ids (N, T): SOS, if it is prepended, and all pixels."""
    tokens = image_format.quantize(pictures)
    sos = np.full((len(tokens), int(image.prepend_sos)), image_format.sos, np.int32)
    return np.concatenate([sos, tokens], axis=1)


def _format(base: BaseModel, image: ImageConfig) -> ImageFormat:
    """Return the model's image format; refuse a model that is not made for these images."""
    image_format = base.image_format()
    if image_format is None:
        raise UserError(
            f"is of images, and {base.name} is no image model",
            field="dataset.image",
            value=f"{image.height} x {image.width}",
            hint="model=imagegpt_digits or imagegpt_small, or a dataset of texts",
        )
    size, models_size = (image.height, image.width), (image_format.height, image_format.width)
    if size != models_size:
        raise UserError(
            f"{base.name} is made for images of another size",
            field="dataset.image.height, dataset.image.width",
            value=" x ".join(map(str, size)),
            valid=" x ".join(map(str, models_size)),
        )
    return image_format


def _check_count(field: str, wanted: int, available: int, cfg: TextsConfig, images: Images) -> None:
    if available < wanted:
        n_groups = len(np.unique(images.groups))
        raise UserError(
            f"{cfg.name} has only {available} images in this set, of {len(images.pixels)} "
            f"different ones of {n_groups} photographs",
            field=field,
            value=wanted,
            valid=f"at most {available}" if available else "nothing, with these images",
            hint="more images, another dataset.holdout_fraction or dataset.validation_fraction",
        )


def _sizes(images: Images, split: ImageSplit) -> SplitSizes:
    return SplitSizes(
        documents=images.n_read,
        distinct=len(images.pixels),
        groups=len(np.unique(images.groups)),
        held_out=len(split.held_out),
        validation=len(split.validation),
        train=len(split.train),
        near_duplicate_train_sequences=0,
    )
