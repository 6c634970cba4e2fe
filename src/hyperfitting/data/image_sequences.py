"""From images to token sequences, in the files of those of texts (`data.sequences`)."""

from pathlib import Path

import numpy as np

from hyperfitting.data.config import DatasetConfig, ImageConfig, TextsConfig
from hyperfitting.data.images import Images, ImageSplit, load_images, ordered, split_images
from hyperfitting.data.packaged_images import Pixels
from hyperfitting.data.sequences import (
    EVALUATION_SEED,
    SplitSizes,
    Tokens,
    save_evaluation_texts,
    save_sequences,
)
from hyperfitting.data.sources import errors_at
from hyperfitting.errors import UserError
from hyperfitting.fields import id_config
from hyperfitting.models.base import BaseModel
from hyperfitting.models.image_format import ImageFormat
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
        image_format = _format(base, image, "dataset")
        loaded = load_images(images)
        split = split_images(loaded, cfg.holdout_fraction, cfg.validation_fraction)
        rows = (split.train, split.validation)
        if for_pretraining:
            rows = (split.pretraining, split.pretraining_validation)
        for name, n, part in zip(("n_train", "n_val"), (cfg.n_train, cfg.n_val), rows, strict=True):
            _check_count(f"dataset.{name}", n, len(part), cfg, loaded)
        train, val = (
            to_tokens(ordered(loaded, part, cfg.seed)[:n], image_format, image)
            for part, n in zip(rows, (cfg.n_train, cfg.n_val), strict=True)
        )
        save_sequences(work, train, val, _sizes(loaded, split))

    artifact = store.artifact(
        "sequences",
        version=VERSION,
        config=id_config(cfg, "sequences")
        | id_config(image, "sequences")
        | {"modality": "image", "for_pretraining": for_pretraining},
        inputs={"images": images.id, "model": base.id},
    )
    return Step(artifact, build)


def evaluation_images_step(
    cfg: TextsConfig,
    image: ImageConfig,
    images: Artifact,
    base: BaseModel,
    store: Store,
    *,
    n_texts: int,
    length: int,
    at: str = "dataset",
) -> Step:
    """Return the step of the held-out images of one evaluation dataset.

    Its build raises UserError if there are too few images, or fewer pixels than asked for.

    Args:
        cfg: the dataset; its seed, if it has one, changes nothing here.
        image: whether SOS is prepended.
        images: the `images` artifact.
        base: quantizes them.
        store: where the tokens are kept.
        n_texts: number of images, N.
        length: tokens of each: the context and its reference continuation, SOS included.
        at: position of ``cfg`` in the whole config, for error messages.
    """

    def build(work: Path) -> None:
        image_format = _format(base, image, at)
        if length > image.n_tokens:
            raise UserError(
                "longer than an image",
                field="evaluation.context_len + evaluation.max_new_tokens",
                value=length,
                valid=f"at most {image.n_tokens} tokens",
            )
        loaded = load_images(images)
        held_out = split_images(loaded, cfg.holdout_fraction, 0.0).held_out
        with errors_at(at):
            _check_count("evaluation.n_texts", n_texts, len(held_out), cfg, loaded)
        pictures = ordered(loaded, held_out, EVALUATION_SEED)[:n_texts]
        tokens = to_tokens(pictures, image_format, image)[:, :length]
        decode = base.tokenizer().decode
        texts = [[decode([token]) for token in row] for row in tokens.tolist()]
        save_evaluation_texts(work, tokens, texts)

    artifact = store.artifact(
        "evaluation_texts",
        version=VERSION,
        config={
            "modality": "image",
            "prepend_sos": image.prepend_sos,
            "holdout_fraction": cfg.holdout_fraction,
            "n_texts": n_texts,
            "length": length,
        },
        inputs={"images": images.id, "model": base.id},
    )
    return Step(artifact, build)


def to_tokens(pictures: Pixels, image_format: ImageFormat, image: ImageConfig) -> Tokens:
    """Return images (N, H, W, 3) as token ids (N, T): SOS, if it is prepended, and all pixels."""
    tokens = image_format.quantize(pictures)
    sos = np.full((len(tokens), int(image.prepend_sos)), image_format.sos, np.int32)
    return np.concatenate([sos, tokens], axis=1)


def _format(base: BaseModel, image: ImageConfig, at: str) -> ImageFormat:
    """Return the model's image format; refuse a model that is not made for these images."""
    image_format = base.image_format()
    if image_format is None:
        raise UserError(
            f"is of images, and {base.name} is no image model",
            field=f"{at}.image",
            value=f"{image.height} x {image.width}",
            hint="model=imagegpt_digits or imagegpt_small, or a dataset of texts",
        )
    size, models_size = (image.height, image.width), (image_format.height, image_format.width)
    if size != models_size:
        raise UserError(
            f"{base.name} is made for images of another size",
            field=f"{at}.image.height, {at}.image.width",
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
